//! The race detector: for each kind of missing order a kernel that must be found whatever the schedule, and its twin
//! that has the order and must be silent. Needs nvcc (NVCC, CUDA_HOME/bin or PATH); without one the tests pass unrun
//! and say so.
use cuda::exec::{self, RaceCheck};
use cuda::hopper::{TensorMap, TensorMapRequest};
use cuda::{Fault, LaunchDims, memory::Memory, ptx};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

fn compile(name: &str, architecture: &str) -> Option<String> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{:?}.ptx", std::thread::current().id()));
    let nvcc = std::env::var("NVCC")
        .or_else(|_| std::env::var("CUDA_HOME").map(|home| format!("{home}/bin/nvcc")))
        .unwrap_or("nvcc".into());
    let target = format!("arch={architecture},code={architecture}");
    let run = Command::new(&nvcc)
        .args(["-std=c++17", "-gencode", &target, "-ptx", "-o"])
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

/// A schedule: the even one, and shuffled ones.
const SCHEDULES: [Option<u64>; 6] = [None, Some(1), Some(2), Some(3), Some(4), Some(5)];

impl Device {
    fn plain() -> Option<Device> {
        static PTX: OnceLock<Option<String>> = OnceLock::new();
        Device::of(PTX.get_or_init(|| compile("races", "compute_80")).as_deref()?)
    }

    fn hopper() -> Option<Device> {
        static PTX: OnceLock<Option<String>> = OnceLock::new();
        Device::of(PTX.get_or_init(|| compile("races_hopper", "compute_90a")).as_deref()?)
    }

    fn of(text: &str) -> Option<Device> {
        let memory = Memory::new(1 << 30);
        let module = exec::LoadedModule::load(&memory, ptx::parse(text).unwrap()).unwrap();
        Some(Device { memory, module })
    }

    fn zeros(&self, words: usize) -> u64 {
        let at = self.memory.alloc(4 * words as u64).unwrap();
        self.memory.fill(at, &[0], 4 * words as u64).unwrap();
        at
    }

    fn words(&self, at: u64, count: usize) -> Vec<i32> {
        let mut bytes = vec![0; 4 * count];
        self.memory.read(at, &mut bytes).unwrap();
        bytes.chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn run(
        &self,
        kernel: &str,
        shape: Shape,
        args: &[Vec<u8>],
        seed: Option<u64>,
        races: RaceCheck,
    ) -> Result<(), Fault> {
        let k = self.module.kernel(kernel).unwrap_or_else(|| panic!("no kernel {kernel}"));
        let mut params = vec![0u8; k.param_bytes()];
        assert_eq!(k.params.len(), args.len(), "{kernel}");
        for (p, arg) in k.params.iter().zip(args) {
            params[p.offset..p.offset + p.size].copy_from_slice(arg);
        }
        let Shape { grid, block, cluster, shared } = shape;
        let dims =
            LaunchDims { grid: [grid, 1, 1], block: [block, 1, 1], cluster: [cluster, 1, 1], dynamic_shared: shared };
        let options = exec::Options { seed, races, traffic: false };
        exec::launch_with(&self.memory, &self.module, kernel, dims, &params, options).map(drop)
    }

    /// With this last argument the kernel is silent in every schedule.
    fn silent(&self, kernel: &str, shape: Shape, args: &[Vec<u8>], how: i32) {
        for seed in SCHEDULES {
            let args = [args, &[how.to_le_bytes().to_vec()]].concat();
            if let Err(fault) = self.run(kernel, shape, &args, seed, RaceCheck::On) {
                panic!("{kernel}, {how}, seed {seed:?}: {fault}");
            }
        }
    }

    /// With this one it is found in every schedule, with these words.
    fn found(&self, kernel: &str, shape: Shape, args: &[Vec<u8>], how: i32, words: &[&str]) {
        for seed in SCHEDULES {
            let args = [args, &[how.to_le_bytes().to_vec()]].concat();
            let Err(fault) = self.run(kernel, shape, &args, seed, RaceCheck::On) else {
                panic!("{kernel}, {how}, seed {seed:?}: not found")
            };
            for word in words {
                assert!(fault.what.contains(word), "{kernel}, {how}, seed {seed:?}: no {word:?} in {fault}");
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Shape {
    grid: u32,
    block: u32,
    cluster: u32,
    shared: u32,
}

fn shape(grid: u32, block: u32) -> Shape {
    Shape { grid, block, cluster: 1, shared: 0 }
}

fn pointer(at: u64) -> Vec<u8> {
    at.to_le_bytes().to_vec()
}

fn int(value: i32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

macro_rules! device {
    ($which:ident) => {
        match Device::$which() {
            Some(d) => d,
            None => return,
        }
    };
}

#[test]
fn barriers_of_a_block_and_of_a_warp_order_shared_memory() {
    let d = device!(plain);
    let out = pointer(d.zeros(256));
    // One block: two would write the same results to the same places, which is a race if both write at the same time.
    for (kernel, threads) in [
        ("block_barrier", 256),
        ("barrier_before_reuse", 256),
        ("small_neighbours", 256),
        ("warp_barrier", 256),
        ("named_barrier", 128),
    ] {
        d.silent(kernel, shape(1, threads), std::slice::from_ref(&out), 1);
        d.found(kernel, shape(1, threads), std::slice::from_ref(&out), 0, &["race at shared address", "st.shared"]);
    }
    d.silent("same_value", shape(1, 256), std::slice::from_ref(&out), 1);
    d.found("same_value", shape(1, 256), std::slice::from_ref(&out), 0, &["race at shared address"]);
}

#[test]
fn a_fault_names_both_accesses() {
    let d = device!(plain);
    let fault =
        d.run("block_barrier", shape(1, 256), &[pointer(d.zeros(256)), int(0)], None, RaceCheck::On).unwrap_err();
    assert_eq!((fault.block, fault.kernel.as_str()), ([0; 3], "block_barrier"), "{fault}");
    // Warp 0 reads before warp 1 writes, in the even schedule.
    for words in [
        "nothing orders the write by warp 1 lane 0",
        "and the earlier read by warp 0 lane 0 of block [0, 0, 0] at ptx line",
        "ld.shared",
    ] {
        assert!(fault.what.contains(words), "{fault}");
    }
    assert_eq!((fault.thread, fault.text.contains("st.shared")), ([32, 0, 0], true), "{fault}");
}

#[test]
fn without_the_switch_nothing_is_looked_for() {
    let d = device!(plain);
    d.run("block_barrier", shape(1, 256), &[pointer(d.zeros(256)), int(0)], None, RaceCheck::Off).unwrap();
}

#[test]
fn copies_are_over_at_their_wait() {
    let d = device!(plain);
    let (input, out) = (pointer(d.zeros(1024)), pointer(d.zeros(64)));
    for kernel in ["copy_wait", "copy_wait_without_barrier", "copy_refill"] {
        d.silent(kernel, shape(1, 64), &[input.clone(), out.clone()], 1);
        d.found(kernel, shape(1, 64), &[input.clone(), out.clone()], 0, &["race at shared address", "cp.async"]);
    }
}

#[test]
fn blocks_and_warps_race_in_global_memory() {
    let d = device!(plain);
    let (data, out) = (pointer(d.zeros(256)), pointer(d.zeros(256)));
    d.silent("global_between_blocks", shape(4, 32), std::slice::from_ref(&data), 1);
    d.found(
        "global_between_blocks",
        shape(4, 32),
        std::slice::from_ref(&data),
        0,
        &["race at global address", "the allocation"],
    );
    for (kernel, grid) in [("global_read_between_blocks", 3), ("global_between_warps", 1)] {
        d.silent(kernel, shape(grid, 128), &[data.clone(), out.clone()], 1);
        d.found(kernel, shape(grid, 128), &[data.clone(), out.clone()], 0, &["race at global address"]);
    }
    d.silent("atomics", shape(4, 64), std::slice::from_ref(&data), 1);
    d.found("atomics", shape(4, 64), std::slice::from_ref(&data), 0, &["race at global address"]);
}

#[test]
fn fences_and_atomics_order_global_memory() {
    let d = device!(plain);
    for how in 0..4 {
        for seed in SCHEDULES {
            let args = [pointer(d.zeros(256)), pointer(d.zeros(1)), pointer(d.zeros(1)), int(how)];
            let done = d.run("last_block", shape(4, 64), &args, seed, RaceCheck::On);
            assert_eq!(done.is_ok(), how == 1, "last_block, {how}, seed {seed:?}: {done:?}");
        }
    }
    for (kernel, threads) in [("flags", 32), ("ordered_flags", 32), ("lock", 128)] {
        for how in [0, 1] {
            for seed in SCHEDULES {
                let (first, second) =
                    if kernel == "lock" { (d.zeros(1), d.zeros(1)) } else { (d.zeros(1), d.zeros(4)) };
                let done =
                    d.run(kernel, shape(4, threads), &[pointer(first), pointer(second), int(how)], seed, RaceCheck::On);
                assert_eq!(done.is_ok(), how == 1, "{kernel}, {how}, seed {seed:?}: {done:?}");
            }
        }
    }
}

/// A vote orders reads before it, unless the letter counts; writes it never does.
#[test]
fn by_the_letter_exchanges_order_nothing() {
    let d = device!(plain);
    let faults = |kernel: &str, right: i32, check: RaceCheck| {
        let args = [pointer(d.zeros(32)), int(right)];
        let done = SCHEDULES.map(|seed| d.run(kernel, shape(1, 32), &args, seed, check));
        for fault in done.iter().filter_map(|done| done.as_ref().err()) {
            assert!(fault.what.contains("race at shared address"), "{fault}");
        }
        done.iter().filter(|done| done.is_err()).count()
    };
    let all = SCHEDULES.len();
    for check in [RaceCheck::On, RaceCheck::ByTheLetter] {
        assert_eq!(faults("exchange_before_write", 1, check), 0, "{check:?}");
        assert_eq!(faults("exchange_after_write", 1, check), 0, "{check:?}");
        assert_eq!(faults("exchange_after_write", 0, check), all, "{check:?}");
    }
    assert_eq!(faults("exchange_before_write", 0, RaceCheck::On), 0);
    assert_eq!(faults("exchange_before_write", 0, RaceCheck::ByTheLetter), all);
}

#[test]
fn two_warp_barriers_in_a_row_are_two() {
    let d = device!(plain);
    for seed in (0..40).map(Some).chain([None]) {
        let out = d.zeros(32);
        d.run("two_warp_barriers", shape(1, 32), &[pointer(out)], seed, RaceCheck::On)
            .unwrap_or_else(|e| panic!("seed {seed:?}: {e}"));
        assert_eq!(d.words(out, 16), (16..32).collect::<Vec<_>>(), "seed {seed:?}");
    }
}

#[test]
fn a_ring_of_stages_needs_all_its_waits() {
    let d = device!(hopper);
    let (input, out) = (pointer(d.zeros(8 * 1024)), pointer(d.zeros(96)));
    let shape = Shape { grid: 1, block: 96, cluster: 1, shared: 8192 };
    let args = [input, out, int(8)];
    d.silent("ring_of_loads", shape, &args, 1);
    // No __syncwarp before the arrival; handed back before it was read; one warp's arrival for two.
    for how in [2, 3, 5] {
        d.found("ring_of_loads", shape, &args, how, &["race at shared address"]);
    }
    // A wait for the wrong phase, and none for what is full, or empty; no barrier after the initialisation: in some
    // schedules these end first in a hang, in too many arrivals, or at a barrier that is not there.
    for how in [4, 6, 7, 8] {
        d.found("ring_of_loads", shape, &args, how, &[]);
    }
}

#[test]
fn an_mbarrier_can_count_copies() {
    let d = device!(hopper);
    let shape = Shape { grid: 1, block: 64, cluster: 1, shared: 1024 };
    let args = [pointer(d.zeros(256)), pointer(d.zeros(64))];
    d.silent("copies_on_a_barrier", shape, &args, 1);
    d.found("copies_on_a_barrier", shape, &args, 0, &["race at shared address", "cp.async"]);
}

#[test]
fn the_asynchronous_proxy_needs_fences_and_waits() {
    let d = device!(hopper);
    let shape = Shape { grid: 1, block: 256, cluster: 1, shared: 1024 };
    let args = [pointer(d.zeros(512))];
    d.silent("stores", shape, &args, 1);
    for (how, words) in
        [(2, "missing fence.proxy.async"), (3, "missing fence.proxy.async"), (4, "race at"), (5, "bulk store")]
    {
        d.found("stores", shape, &args, how, &[words]);
    }
    let shape = Shape { grid: 1, block: 128, cluster: 1, shared: 16384 };
    let args = [pointer(d.zeros(4096))];
    d.silent("multiply_written", shape, &args, 1);
    for (how, words) in [(2, "missing fence.proxy.async"), (3, "race at")] {
        d.found("multiply_written", shape, &args, how, &[words, "wgmma 0 of warpgroup 0"]);
    }
    d.silent("write_after_multiply", shape, &args, 1);
    d.found("write_after_multiply", shape, &args, 0, &["race at shared address", "wgmma 0 of warpgroup 0"]);
}

#[test]
fn clusters_meet_before_and_after() {
    let d = device!(hopper);
    let shape = Shape { grid: 4, block: 64, cluster: 2, shared: 0 };
    let args = [pointer(d.zeros(256))];
    d.silent("neighbours", shape, &args, 1);
    // The neighbour may end, or has.
    for (how, words) in [(2, "race at shared"), (3, "shared memory"), (4, "race at shared"), (5, "race at shared")] {
        d.found("neighbours", shape, &args, how, &[words]);
    }
    let shape = Shape { grid: 2, block: 64, cluster: 2, shared: 8192 };
    let args = [pointer(d.zeros(8 * 1024)), pointer(d.zeros(64)), int(8)];
    d.silent("multicast_ring", shape, &args, 1);
    for how in [2, 3] {
        d.found("multicast_ring", shape, &args, how, &["race at shared"]);
    }
}

/// The ring of tests/kernels/hopper_ring.cu: TMA, multicast and wgmma one group behind.
#[test]
fn a_stage_belongs_to_wgmma_until_its_wait() {
    let Some(text) = compile("hopper_ring", "compute_90a") else { return };
    let d = Device::of(&text).unwrap();
    let (tiles, k) = (9u32, 9 * 64u64);
    let map = |at: u64, dims: [u64; 2], box_dim: [u32; 2]| {
        let request = TensorMapRequest {
            data_type: 9,
            rank: 2,
            global_address: at,
            global_dim: &dims,
            global_strides: &[dims[0] * 2],
            box_dim: &box_dim,
            element_strides: &[1, 1],
            interleave: 0,
            swizzle: 3,
            l2_promotion: 0,
            oob_fill: 0,
        };
        TensorMap::encode_tiled(&request).unwrap().to_bytes().to_vec()
    };
    let a = map(d.zeros(128 * k as usize / 2), [k, 128], [64, 64]);
    let b = map(d.zeros(64 * k as usize / 2), [k, 64], [64, 32]);
    let out = map(d.zeros(128 * 64 / 2), [64, 128], [64, 64]);
    let shape = Shape { grid: 2, block: 256, cluster: 2, shared: 3 * 16384 + 8192 };
    let args = [a, b, out];
    d.silent("ring_good", shape, &args, tiles as i32);
    d.found("ring_early_release", shape, &args, tiles as i32, &["race at shared address", "bulk copy", "wgmma"]);
}
