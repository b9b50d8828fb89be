//! Hopper kernels from PTX to results: every swizzle and major of wgmma, TMA in both directions, multicast rings,
//! and kernels whose bug must end in a fault. Needs nvcc (NVCC, CUDA_HOME/bin or PATH); without one the tests pass
//! unrun and say so.
use cuda::hopper::numbers::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use cuda::hopper::{TensorMap, TensorMapRequest};
use cuda::{Fault, LaunchDims, exec, memory::Memory, ptx};
use std::path::PathBuf;
use std::process::Command;

/// PTX of tests/kernels/<name>.cu.
fn compile(name: &str) -> Option<String> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{:?}.ptx", std::thread::current().id()));
    let nvcc = std::env::var("NVCC")
        .or_else(|_| std::env::var("CUDA_HOME").map(|home| format!("{home}/bin/nvcc")))
        .unwrap_or("nvcc".into());
    let run = Command::new(&nvcc)
        .args(["-std=c++17", "-gencode", "arch=compute_90a,code=compute_90a", "-ptx", "-o"])
        .arg(&out)
        .arg(here.join(format!("{name}.cu")))
        .output();
    match run {
        Ok(done) if done.status.success() => Some(std::fs::read_to_string(out).unwrap()),
        Ok(done) => panic!("{}", String::from_utf8_lossy(&done.stderr)),
        Err(_) => {
            eprintln!("no nvcc at {nvcc}: not run");
            None
        }
    }
}

struct Device {
    memory: Memory,
    module: exec::LoadedModule,
}

impl Device {
    fn new(name: &str) -> Option<Device> {
        Device::with(name, Memory::new(1 << 30))
    }

    fn with(name: &str, memory: Memory) -> Option<Device> {
        let module = exec::LoadedModule::load(&memory, ptx::parse(&compile(name)?).unwrap()).unwrap();
        Some(Device { memory, module })
    }

    fn put<T: Copy>(&self, data: &[T]) -> u64 {
        // SAFETY: the bytes are those of a live slice of plain numbers, and are only read.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), std::mem::size_of_val(data)) };
        let at = self.memory.alloc(bytes.len() as u64).unwrap();
        self.memory.write(at, bytes).unwrap();
        at
    }

    fn get<T: Copy + Default>(&self, at: u64, count: usize) -> Vec<T> {
        let mut data = vec![T::default(); count];
        let len = std::mem::size_of_val(&data[..]);
        // SAFETY: the bytes are those of a live vector of plain numbers, for which every pattern of bits is a value.
        let bytes = unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast::<u8>(), len) };
        self.memory.read(at, bytes).unwrap();
        data
    }

    fn launch(
        &self,
        kernel: &str,
        grid: u32,
        block: u32,
        cluster: u32,
        shared: u32,
        args: &[&[u8]],
    ) -> Result<(), Fault> {
        let k = self.module.kernel(kernel).unwrap_or_else(|| panic!("no kernel {kernel}"));
        let mut params = vec![0u8; k.params.iter().map(|p| p.offset + p.size).max().unwrap()];
        for (p, arg) in k.params.iter().zip(args) {
            assert_eq!(p.size, arg.len(), "{kernel}: parameter {}", p.name);
            params[p.offset..p.offset + p.size].copy_from_slice(arg);
        }
        let dims =
            LaunchDims { grid: [grid, 1, 1], block: [block, 1, 1], cluster: [cluster, 1, 1], dynamic_shared: shared };
        exec::launch(&self.memory, &self.module, kernel, dims, &params).map(drop)
    }
}

/// A two-dimensional map, innermost dimension first. Types: 2 u32, 7 f32, 9 bf16, 6 f16.
fn map(data_type: u32, at: u64, dims: [u64; 2], box_dim: [u32; 2], swizzle: u32) -> [u8; 128] {
    let size = if data_type == 6 || data_type == 9 { 2 } else { 4 };
    let request = TensorMapRequest {
        data_type,
        rank: 2,
        global_address: at,
        global_dim: &dims,
        global_strides: &[dims[0] * size],
        box_dim: &box_dim,
        element_strides: &[1, 1],
        interleave: 0,
        swizzle,
        l2_promotion: 0,
        oob_fill: 0,
    };
    TensorMap::encode_tiled(&request).unwrap().to_bytes()
}

/// Small integers, so that sums are exact in every format.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(747796405) + 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1664525).wrapping_add(1013904223);
            (state >> 24) as f32 % 7.0 - 3.0
        })
        .collect()
}

fn bf16(values: &[f32]) -> Vec<u16> {
    values.iter().map(|v| f32_to_bf16(*v)).collect()
}

fn transpose<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// A (m x k) times B^T (n x k).
fn product(m: usize, n: usize, k: usize, a: &[f32], b: &[f32]) -> Vec<f32> {
    (0..m * n).map(|i| (0..k).map(|l| a[i / n * k + l] * b[i % n * k + l]).sum()).collect()
}

fn swizzle_code(bytes: u32) -> u32 {
    [0, 32, 64, 128].iter().position(|b| *b == bytes).unwrap() as u32
}

/// A map of a rows x k operand (given row by row) for the kernels of hopper_tile.cu.
fn operand_map(device: &Device, values: &[f32], rows: usize, k: usize, swizzle: u32, mn: bool) -> [u8; 128] {
    let chunk = if swizzle == 0 { 8 } else { swizzle / 2 };
    if mn {
        let at = device.put(&bf16(&transpose(values, rows, k)));
        map(9, at, [rows as u64, k as u64], [chunk, 16], swizzle_code(swizzle))
    } else {
        let at = device.put(&bf16(values));
        map(9, at, [k as u64, rows as u64], [chunk, rows as u32], swizzle_code(swizzle))
    }
}

#[test]
fn every_swizzle_and_major_multiplies() {
    let Some(device) = Device::new("hopper_tile") else { return };
    let k = 128;
    let mut cases = Vec::new();
    for swizzle in [128, 64, 32, 0] {
        for n in [8, 64, 128] {
            cases.push((format!("tile_{n}_{swizzle}_kk"), n, swizzle, swizzle, false, false));
        }
        for n in [64, 128] {
            cases.push((format!("tile_{n}_{swizzle}_mm"), n, swizzle, swizzle, true, true));
        }
        cases.push((format!("tile_64_{swizzle}_km"), 64, swizzle, swizzle, false, true));
    }
    cases.push(("tile_64_mixed_mk".into(), 64, 128, 32, true, false));
    for (name, n, swizzle_a, swizzle_b, mn_a, mn_b) in cases {
        let (a, b) = (numbers(64 * k, 1), numbers(n * k, 2));
        let out = device.put(&vec![0f32; 64 * n]);
        let map_a = operand_map(&device, &a, 64, k, swizzle_a, mn_a);
        let map_b = operand_map(&device, &b, n, k, swizzle_b, mn_b);
        let args: [&[u8]; 4] = [&map_a, &map_b, &out.to_le_bytes(), &(k as u32).to_le_bytes()];
        device.launch(&name, 1, 128, 1, 32768, &args).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(device.get::<f32>(out, 64 * n), product(64, n, k, &a, &b), "{name}");
    }
}

#[test]
fn a_from_registers_f16_accumulators_and_tf32_multiply() {
    let Some(device) = Device::new("hopper_tile") else { return };
    let (a, b) = (numbers(4096, 3), numbers(4096, 4));
    let expected = product(64, 64, 64, &a, &b);

    let out = device.put(&vec![0f32; 4096]);
    let map_b = map(9, device.put(&bf16(&b)), [64, 64], [64, 64], 3);
    device
        .launch("tile_rs", 1, 128, 1, 8192, &[&device.put(&bf16(&a)).to_le_bytes(), &map_b, &out.to_le_bytes()])
        .unwrap();
    assert_eq!(device.get::<f32>(out, 4096), expected);

    let half = |v: &[f32]| v.iter().map(|x| f32_to_f16(*x)).collect::<Vec<_>>();
    let (pa, pb, out) = (device.put(&half(&a)), device.put(&half(&b)), device.put(&vec![0u16; 4096]));
    device.launch("tile_f16", 1, 128, 1, 0, &[&pa.to_le_bytes(), &pb.to_le_bytes(), &out.to_le_bytes()]).unwrap();
    let got: Vec<f32> = device.get::<u16>(out, 4096).into_iter().map(f16_to_f32).collect();
    assert_eq!(got, expected.iter().map(|v| -v).collect::<Vec<_>>());

    let (a, b) = (&a[..2048], &b[..2048]);
    let out = device.put(&vec![0f32; 4096]);
    let map_a = map(7, device.put(a), [32, 64], [32, 64], 3);
    let map_b = map(7, device.put(b), [32, 64], [32, 64], 3);
    device.launch("tile_tf32", 1, 128, 1, 16384, &[&map_a, &map_b, &out.to_le_bytes()]).unwrap();
    assert_eq!(device.get::<f32>(out, 4096), product(64, 64, 32, a, b).iter().map(|v| v + 1.0).collect::<Vec<_>>());
}

/// What a kernel computed, and what it should have.
type Compared = (Vec<f32>, Vec<f32>);

/// Runs a kernel of hopper_ring.cu.
fn ring(kernel: &str, tiles: usize) -> Option<Result<Compared, Fault>> {
    let device = Device::new("hopper_ring")?;
    let k = 64 * tiles;
    let (a, b) = (numbers(128 * k, 5), numbers(64 * k, 6));
    let map_a = map(9, device.put(&bf16(&a)), [k as u64, 128], [64, 64], 3);
    let map_b = map(9, device.put(&bf16(&b)), [k as u64, 64], [64, 32], 3);
    let out = device.put(&vec![0u16; 128 * 64]);
    let map_out = map(9, out, [64, 128], [64, 64], 3);
    let args: [&[u8]; 4] = [&map_a, &map_b, &map_out, &(tiles as u32).to_le_bytes()];
    let expected = product(128, 64, k, &a, &b).into_iter().map(|v| bf16_to_f32(f32_to_bf16(v))).collect();
    Some(device.launch(kernel, 2, 256, 2, 7 * 8192, &args).map(|()| {
        let got = device.get::<u16>(out, 128 * 64).into_iter().map(bf16_to_f32).collect();
        (got, expected)
    }))
}

#[test]
fn a_multicast_ring_with_warp_specialisation_multiplies() {
    for tiles in [1, 2, 3, 11] {
        let Some(done) = ring("ring_good", tiles) else { return };
        let (got, expected) = done.unwrap();
        assert_eq!(got, expected, "{tiles} tiles");
    }
}

#[test]
fn a_stage_released_before_its_wgmma_is_done_is_noticed() {
    match ring("ring_early_release", 11) {
        None => {}
        Some(Err(fault)) => assert!(fault.what.contains("in flight"), "{fault}"),
        Some(Ok((got, expected))) => assert_ne!(got, expected),
    }
}

#[test]
fn boxes_travel_both_ways_and_stop_at_the_bounds() {
    let Some(device) = Device::new("hopper_copy") else { return };
    let (width, height) = (100u64, 40u64);
    let source: Vec<u32> = (0..(width * height) as u32).collect();
    let from = map(2, device.put(&source), [width, height], [32, 16], 0);
    for (x, y) in [(0i32, 0i32), (64, 20), (90, 30), (-8, -3), (96, 39), (200, 0)] {
        let out = device.put(&vec![7u32; (width * height) as usize]);
        let to = map(2, out, [width, height], [32, 16], 0);
        device.launch("box_copy", 1, 32, 1, 2048, &[&from, &to, &x.to_le_bytes(), &y.to_le_bytes()]).unwrap();
        let got = device.get::<u32>(out, source.len());
        for (i, value) in got.into_iter().enumerate() {
            let (column, row) = (i as i32 % width as i32 - x, i as i32 / width as i32 - y);
            let inside = (0..32).contains(&column) && (0..16).contains(&row);
            assert_eq!(value, if inside { i as u32 } else { 7 }, "box at {x}, {y}, element {i}");
        }
    }
}

#[test]
fn reductions_bulk_copies_and_cluster_memory_work() {
    let Some(device) = Device::new("hopper_copy") else { return };
    let out = device.put(&vec![2f32; 80 * 12]);
    let to = map(7, out, [80, 12], [64, 8], 0);
    device.launch("box_add", 3, 128, 1, 2048, &[&to, &40i32.to_le_bytes(), &6i32.to_le_bytes()]).unwrap();
    for (i, value) in device.get::<f32>(out, 80 * 12).into_iter().enumerate() {
        assert_eq!(value, if i % 80 >= 40 && i / 80 >= 6 { 5.0 } else { 2.0 });
    }

    let (from, to) = (device.put(&(0..1000).collect::<Vec<i32>>()), device.put(&vec![0i32; 1000]));
    device.launch("bulk", 1, 96, 1, 4000, &[&from.to_le_bytes(), &to.to_le_bytes(), &1000i32.to_le_bytes()]).unwrap();
    assert_eq!(device.get::<i32>(to, 1000), (1..1001).collect::<Vec<_>>());

    let out = device.put(&vec![0i32; 256]);
    device.launch("neighbours", 4, 32, 4, 0, &[&out.to_le_bytes()]).unwrap();
    let got = device.get::<i32>(out, 256);
    for rank in 0..4 {
        let from = (rank + 3) % 4;
        for i in 0..32 {
            assert_eq!(got[rank * 64 + i], (from * 1000 + i) as i32);
            assert_eq!(got[rank * 64 + 32 + i], (from * 100 + i) as i32);
        }
    }
}

#[test]
fn small_copies_arrive_on_their_barriers() {
    let Some(device) = Device::new("hopper_copy") else { return };
    let (from, to) = (device.put(&(0..256).collect::<Vec<i32>>()), device.put(&vec![0i32; 256]));
    device.launch("small_copies", 2, 128, 2, 0, &[&from.to_le_bytes(), &to.to_le_bytes()]).unwrap();
    let expected: Vec<i32> = (0..256).map(|i| (1 - i / 128) * 128 + 127 - i % 128).collect();
    assert_eq!(device.get::<i32>(to, 256), expected);
}

#[test]
fn integers_multiply() {
    let Some(device) = Device::new("hopper_tile") else { return };
    let (a, b) = (numbers(64 * 32, 8), numbers(8 * 32, 9));
    let bytes = |v: &[f32]| v.iter().map(|x| *x as i8).collect::<Vec<_>>();
    let out = device.put(&vec![0i32; 512]);
    let args = [device.put(&bytes(&a)).to_le_bytes(), device.put(&bytes(&b)).to_le_bytes(), out.to_le_bytes()];
    device.launch("tile_s8", 1, 128, 1, 0, &[&args[0], &args[1], &args[2]]).unwrap();
    let expected: Vec<i32> = product(64, 8, 32, &a, &b).into_iter().map(|v| v as i32).collect();
    assert_eq!(device.get::<i32>(out, 512), expected);
}

#[test]
fn bugs_end_in_faults_that_name_them() {
    let Some(device) = Device::new("hopper_bugs") else { return };
    let tile = map(9, device.put(&bf16(&numbers(4096, 7))), [64, 64], [64, 64], 3);
    let out = device.put(&vec![0f32; 4096]);
    let cases = [
        ("no_barrier_wait", 128, "in flight"),
        ("left_before_load", 128, "in flight"),
        ("misaligned_target", 128, "128 bytes"),
        ("wrong_bytes", 128, "deadlock"),
        ("no_mma_wait", 128, "nobody waited"),
        ("touched_accumulator", 128, "before waiting"),
        ("no_fence", 128, "wgmma.fence"),
        ("other_descriptor", 128, "descriptor"),
        ("raw_descriptor", 128, "reserved"),
        ("part_of_a_warpgroup", 96, "warpgroup"),
        ("too_many_arrivals", 128, "arrival"),
        ("no_init", 32, "no live mbarrier"),
        ("never_arrives", 32, "deadlock"),
        ("too_many_registers", 512, "65536"),
    ];
    for (kernel, threads, words) in cases {
        let done = device.launch(kernel, 1, threads, 1, 16384, &[&tile, &out.to_le_bytes()]);
        let fault = done.expect_err(kernel).to_string();
        assert!(fault.to_lowercase().contains(words), "{kernel}: {fault}");
    }
    let fault = device.launch("left_its_peer", 2, 32, 2, 0, &[&tile, &out.to_le_bytes()]).unwrap_err();
    assert!(fault.what.contains("exited"), "{fault}");
}

#[test]
fn strict_mode_wants_proxy_fences_and_waits_for_stores() {
    let Some(device) = Device::with("hopper_bugs", Memory::new_strict(1 << 30)) else { return };
    let at = device.put(&vec![0u16; 4096]);
    let tile = map(9, at, [64, 64], [64, 64], 3);
    let args: [&[u8]; 2] = [&tile, &at.to_le_bytes()];
    let fault = device.launch("no_proxy_fence", 1, 128, 1, 16384, &args).unwrap_err();
    assert!(fault.what.contains("fence.proxy.async"), "{fault}");
    let fault = device.launch("left_before_store", 1, 128, 1, 16384, &args).unwrap_err();
    assert!(fault.what.contains("wait_group"), "{fault}");
    let Some(relaxed) = Device::new("hopper_bugs") else { return };
    let at = relaxed.put(&vec![0u16; 4096]);
    let tile = map(9, at, [64, 64], [64, 64], 3);
    for kernel in ["no_proxy_fence", "left_before_store"] {
        relaxed.launch(kernel, 1, 128, 1, 16384, &[&tile, &at.to_le_bytes()]).unwrap();
        assert_ne!(relaxed.get::<u16>(at, 4096)[1], 0);
    }
}
