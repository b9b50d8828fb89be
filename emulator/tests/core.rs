//! Kernels from CUDA C++ to results: arithmetic, divergence, shared memory, atomics, matrices, and kernels whose bug
//! must end in a fault that says where. Needs nvcc (NVCC, CUDA_HOME/bin or PATH); without one the tests pass unrun
//! and say so.
use cuda::{Fault, LaunchDims, exec, memory::Memory, ptx};
use half::bf16;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

fn compile(name: &str) -> Option<String> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
    let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.ptx", std::process::id()));
    let nvcc = std::env::var("NVCC")
        .or_else(|_| std::env::var("CUDA_HOME").map(|home| format!("{home}/bin/nvcc")))
        .unwrap_or("nvcc".into());
    let run = Command::new(&nvcc)
        .args(["-std=c++17", "-arch=compute_80", "-ptx", "-o"])
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

fn basic_text() -> Option<&'static str> {
    static PTX: OnceLock<Option<String>> = OnceLock::new();
    PTX.get_or_init(|| compile("core_basic")).as_deref()
}

struct Device {
    memory: Memory,
    module: exec::LoadedModule,
}

impl Device {
    fn basic() -> Option<Device> {
        Device::of(basic_text()?, Memory::new(1 << 30))
    }

    fn matrix() -> Option<Device> {
        static PTX: OnceLock<Option<String>> = OnceLock::new();
        Device::of(PTX.get_or_init(|| compile("core_matrix")).as_deref()?, Memory::new(1 << 30))
    }

    fn of(text: &str, memory: Memory) -> Option<Device> {
        let module = exec::LoadedModule::load(&memory, ptx::parse(text).unwrap()).unwrap();
        Some(Device { memory, module })
    }

    fn put<T: Copy>(&self, data: &[T]) -> u64 {
        // SAFETY: plain numbers.
        let bytes = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), std::mem::size_of_val(data)) };
        let at = self.memory.alloc(bytes.len() as u64).unwrap();
        self.memory.write(at, bytes).unwrap();
        at
    }

    fn get<T: Copy + Default>(&self, at: u64, count: usize) -> Vec<T> {
        let mut data = vec![T::default(); count];
        // SAFETY: plain numbers.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast::<u8>(), std::mem::size_of_val(&data[..])) };
        self.memory.read(at, bytes).unwrap();
        data
    }

    fn run(&self, kernel: &str, grid: [u32; 3], block: u32, shared: u32, args: &[Arg]) -> Result<exec::Work, Fault> {
        let k = self.module.kernel(kernel).unwrap();
        let mut params = vec![0u8; k.param_bytes()];
        assert_eq!(k.params.len(), args.len());
        for (p, a) in k.params.iter().zip(args) {
            let bytes = match a {
                Arg::P(v) => v.to_le_bytes().to_vec(),
                Arg::I(v) => v.to_le_bytes().to_vec(),
                Arg::Bytes(b) => b.clone(),
            };
            assert_eq!(p.size, bytes.len());
            params[p.offset..p.offset + p.size].copy_from_slice(&bytes);
        }
        let dims = LaunchDims { grid, block: [block, 1, 1], cluster: [1; 3], dynamic_shared: shared };
        exec::launch(&self.memory, &self.module, kernel, dims, &params)
    }
}

enum Arg {
    P(u64),
    I(i32),
    Bytes(Vec<u8>),
}
use Arg::{I, P};

/// One turn of ten through a loop of three instructions, with one before and one behind it; then some for odd lanes alone.
const COUNTED: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry turns() {
    .reg .pred %p<3>;
    .reg .b32 %r<4>;
    mov.u32 %r1, %tid.y;
AGAIN:
    add.s32 %r1, %r1, 1;
    setp.lt.s32 %p1, %r1, 10;
    @%p1 bra AGAIN;
    mov.u32 %r2, %tid.x;
    and.b32 %r3, %r2, 1;
    setp.eq.s32 %p2, %r3, 0;
    @%p2 bra EVEN;
    add.s32 %r1, %r1, 1;
    add.s32 %r1, %r1, 1;
EVEN:
    ret;
}
";

#[test]
fn instructions_are_counted_by_warp() {
    let device = Device::of(COUNTED, Memory::new(1 << 20)).unwrap();
    let instructions = |grid: u32, block: u32| device.run("turns", [grid, 1, 1], block, 0, &[]).unwrap().instructions;
    // Lanes 0 and 1 of a warp part and meet again; a warp of one lane never takes the branch for odd ones.
    let (even, odd) = (1 + 3 * 10 + 4 + 1, 2);
    assert_eq!(instructions(1, 1), even);
    assert_eq!(instructions(1, 32), even + odd);
    assert_eq!(instructions(3, 64), 6 * (even + odd));
    assert_eq!(instructions(5, 33), 5 * (even + odd + even));
}

/// Numbers in [-1, 1), the same every time.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut s = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let step = |s: &mut u64| {
        *s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*s >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..n).map(|_| step(&mut s)).collect()
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
fn vector_add_with_a_ragged_end() {
    let d = device!(basic);
    let (a, b) = (noise(1000, 1), noise(1000, 2));
    let (pa, pb, out) = (d.put(&a), d.put(&b), d.memory.alloc(4000).unwrap());
    d.run("vector_add", [8, 1, 1], 128, 0, &[P(pa), P(pb), P(out), I(1000)]).unwrap();
    let got: Vec<f32> = d.get(out, 1000);
    assert!((0..1000).all(|i| got[i] == a[i] + b[i]));
}

#[test]
fn block_sum_by_shuffles() {
    let d = device!(basic);
    let a: Vec<f32> = (0..5000).map(|i| (i % 17) as f32).collect();
    let (pa, out) = (d.put(&a), d.put(&[0f32]));
    d.run("block_sum", [7, 1, 1], 256, 0, &[P(pa), P(out), I(5000)]).unwrap();
    assert_eq!(d.get::<f32>(out, 1)[0], a.iter().sum::<f32>());
}

#[test]
fn softmax_in_shared_memory() {
    let d = device!(basic);
    let x = noise(3 * 300, 5);
    let (px, py) = (d.put(&x), d.memory.alloc(3600).unwrap());
    d.run("softmax", [3, 1, 1], 96, 1200, &[P(px), P(py), I(300)]).unwrap();
    let y: Vec<f32> = d.get(py, 900);
    for r in 0..3 {
        let row = &x[r * 300..][..300];
        let total: f64 = row.iter().map(|v| (*v as f64).exp()).sum();
        for c in 0..300 {
            let want = (row[c] as f64).exp() / total;
            assert!((y[r * 300 + c] as f64 - want).abs() < 1e-6 * want, "{r} {c}");
        }
    }
}

#[test]
fn divergent_loops_and_switches() {
    let d = device!(basic);
    let out = d.memory.alloc(8 * 500).unwrap();
    d.run("diverge", [4, 1, 1], 128, 0, &[P(out), I(500)]).unwrap();
    let got: Vec<u32> = d.get(out, 1000);
    for i in 0..500u32 {
        let (mut v, mut steps, mut kinds) = (i + 1, 0, 0u32);
        while v != 1 {
            kinds = match v % 7 {
                0 => kinds.wrapping_add(1),
                1 => kinds.wrapping_add(10),
                2 => kinds ^ v,
                3 => kinds.wrapping_mul(3).wrapping_add(1),
                4 => kinds.wrapping_sub(5),
                5 => kinds.reverse_bits(),
                _ => kinds.rotate_left(3),
            };
            v = if v & 1 == 1 { 3 * v + 1 } else { v / 2 };
            steps += 1;
        }
        assert_eq!([got[2 * i as usize], got[2 * i as usize + 1]], [steps, kinds], "lane {i}");
    }
}

#[test]
fn device_functions_that_are_not_inlined() {
    let d = device!(basic);
    let x: Vec<f32> = (0..64).map(|i| i as f32 * 0.05).collect();
    let (px, out, pairs) = (d.put(&x), d.memory.alloc(256).unwrap(), d.memory.alloc(1024).unwrap());
    d.run("calls", [1, 1, 1], 64, 0, &[P(px), P(out), P(pairs)]).unwrap();
    let series = |x: f32, terms: i32| {
        let (mut s, mut p) = (0f64, 1f64);
        for k in 1..=terms {
            s += p;
            p *= x as f64 / k as f64;
            if p < 1e-7 {
                break;
            }
        }
        s
    };
    let (got, pairs): (Vec<f32>, Vec<f64>) = (d.get(out, 64), d.get(pairs, 128));
    for i in 0..64 {
        let mut want = series(x[i], i as i32 % 9 + 1);
        if i % 3 == 0 {
            want += series(x[i] * 0.5, 20);
        }
        assert!((got[i] as f64 - want).abs() < 1e-4 * want, "{i}: {} {want}", got[i]);
        let (a, b) = (i as f64, 2.0 * i as f64);
        assert_eq!(pairs[2 * i..2 * i + 2], if i % 2 == 1 { [b, a] } else { [a + 1.0, b * 2.0] });
    }
}

#[test]
fn arrays_in_local_memory() {
    let d = device!(basic);
    let order: Vec<i32> = (0..16).map(|i| i * 7 % 16).collect();
    let (po, out) = (d.put(&order), d.memory.alloc(128).unwrap());
    d.run("local_array", [1, 1, 1], 32, 0, &[P(po), P(out), I(50)]).unwrap();
    let got: Vec<i32> = d.get(out, 32);
    for t in 0..32usize {
        let mut a: Vec<i32> = (0..16).map(|k| k * k + t as i32).collect();
        for k in 0..50 {
            let j = order[(t + k) & 15] as usize;
            a[j] = a[j].wrapping_add(a[(j + 5) & 15]);
        }
        let s = a.iter().fold(0i32, |s, v| s.wrapping_mul(31).wrapping_add(*v));
        assert_eq!(got[t], s);
    }
}

#[test]
fn atomics_of_all_kinds() {
    let d = device!(basic);
    let (sums, wide, fsum) = (d.put(&[0i32; 5]), d.put(&[0u64]), d.put(&[0f32]));
    d.run("atomics", [6, 1, 1], 64, 0, &[P(sums), P(wide), P(fsum)]).unwrap();
    let xor = (0..384).fold(0, |x, i| x ^ i);
    assert_eq!(d.get::<i32>(sums, 5), [383, -383, xor, 96 * (3 + 5 + 7 + 11), 384 % 100]);
    assert_eq!(d.get::<u64>(wide, 1)[0], 3 * 384);
    assert_eq!(d.get::<f32>(fsum, 1)[0], 192.0);
    let (at, size) = d.module.global("counters").unwrap();
    assert_eq!(size, 32);
    assert_eq!(d.get::<u32>(at, 8), [78, 78, 78, 78, 72, 0, 0, 0]);
}

#[test]
fn integers_and_bits() {
    let d = device!(basic);
    let mut s = 88172645463325252u64;
    let mut random = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        s
    };
    let mut input: Vec<u64> = (0..128).map(|_| random()).collect();
    input[2..12].copy_from_slice(&[0, 0, 1, !0, !0, 1, 0x8000_0000, 33, 1 << 63, 40]);
    let (pi, out) = (d.put(&input), d.memory.alloc(64 * 160).unwrap());
    d.run("bits", [1, 1, 1], 64, 0, &[P(pi), P(out), I(64)]).unwrap();
    let got: Vec<u64> = d.get(out, 64 * 20);
    for i in 0..64 {
        let (a, b) = (input[2 * i], input[2 * i + 1]);
        let (x, y) = (a as u32, b as u32);
        let (sx, sy) = (x as i32, y as i32);
        let bytes = ((y as u64) << 32 | x as u64).to_le_bytes();
        let n = y & 63;
        let both = (y as u64) << 32 | x as u64;
        let dp = (0..4).fold(3i32, |s, k| s + sx.to_le_bytes()[k] as i8 as i32 * sy.to_le_bytes()[k] as i8 as i32);
        let m = (b & 63) as u32;
        let p = (a as u128 * b as u128).wrapping_add(a as u128);
        let want: [u64; 20] = [
            ((a as u128 * b as u128) >> 64) as u64,
            ((a as i64 as i128 * b as i64 as i128) >> 64) as u64,
            a.checked_div(b).unwrap_or(1),
            if b == 0 { 2 } else { (a as i64).wrapping_rem((b | 1) as i64) as u64 },
            ((sx as i64 * sy as i64) >> 32) as u32 as u64,
            a.count_ones() as u64
                | (b.leading_zeros() as u64) << 8
                | (x.leading_zeros() as u64) << 16
                | (if y == 0 { 0 } else { y.trailing_zeros() as u64 + 1 }) << 24,
            a.reverse_bits(),
            u32::from_le_bytes([bytes[3], bytes[7], bytes[1], bytes[5]]) as u64,
            (both << (n & 31)) >> 32,
            (both >> n.min(32)) as u32 as u64,
            (sx >> (y & 31)) as u32 as u64 | ((x >> (y & 31)) as u64) << 32,
            sx.abs_diff(sy).wrapping_add(7) as u64 | (x.abs_diff(y).wrapping_add(9) as u64) << 32,
            dp as u32 as u64,
            (a << m) ^ (a >> m),
            ((a as i64) >> m) as u64,
            ((x & y) | (!x & (y >> 3))) as u64,
            (x as u16).wrapping_mul(y as u16).wrapping_add(7) as u64 | ((x as i8 as i64) << 32) as u64,
            (a as i64).min(b as i64) as u64 ^ a.max(b),
            (if sy == 0 { 0 } else { sx.wrapping_div(sy) }) as u32 as u64
                | ((if y == 0 { 0 } else { x % y }) as u64) << 32,
            ((p >> 64) as u64).wrapping_add(p as u64),
        ];
        for k in 0..20 {
            assert_eq!(got[20 * i + k], want[k], "operation {k} of {a:#x} {b:#x}");
        }
    }
}

#[test]
fn single_precision() {
    let d = device!(basic);
    let mut input: Vec<f32> = noise(128, 9).iter().map(|v| v * 20.0).collect();
    input[..10].copy_from_slice(&[2.5, -3.5, 1e-40, 1e30, -0.0, 0.0, f32::INFINITY, 2.0, 65504.0, 1e-7]);
    let (pi, out) = (d.put(&input), d.memory.alloc(64 * 96).unwrap());
    d.run("floats", [1, 1, 1], 64, 0, &[P(pi), P(out), I(64)]).unwrap();
    let got: Vec<f32> = d.get(out, 64 * 24);
    for i in 0..64 {
        let (a, b) = (input[2 * i], input[2 * i + 1]);
        let g = &got[24 * i..][..24];
        let exact = [
            a + b,
            a * b,
            a.mul_add(b, 1.5),
            a / b,
            a.abs().sqrt(),
            a.min(b),
            a.max(b),
            a.round_ties_even(),
            a.trunc(),
            a.floor(),
            a.ceil(),
            a as i32 as f32,
            b.abs().round_ties_even() as u32 as f32,
        ];
        for k in 0..exact.len() {
            assert!(
                g[k] == exact[k] || g[k].is_nan() && exact[k].is_nan(),
                "operation {k} of {a:e} {b:e}: {} {}",
                g[k],
                exact[k]
            );
        }
        // Directed roundings lie on the right side, at most one step from the nearest.
        let (sum, product) = (a as f64 + b as f64, a as f64 * b as f64);
        if a.is_finite() && a.abs() > 1e-30 && b.abs() < 1e30 {
            assert!((g[13].abs() as f64) <= sum.abs() && g[13].next_up().max(-g[13].next_down()) as f64 >= sum.abs());
            assert!(g[14] as f64 >= product && (g[14].next_down() as f64) < product);
            assert!(g[15] as f64 <= product + a as f64 + 1e-12);
            assert!((g[18].abs() as f64) <= (a as f64 / b as f64).abs() * (1.0 + 1e-15));
        }
        assert_eq!(g[16], bf16::from_f32(a).to_f32());
        assert_eq!(g[17], half::f16::from_f32(b).to_f32());
        let near = |x: f32, want: f64| {
            let ok = (x as f64 - want).abs() <= 2e-6 * want.abs().max(1e-6)
                || x as f64 == want
                || (x.is_nan() && want.is_nan());
            assert!(ok || want.abs() < 1e-37 || want.abs() > 3e38, "{a} {b}: {x} {want}");
        };
        near(g[19], (a as f64).exp2());
        near(g[20], (b.abs() as f64).ln());
        if a.abs() < 1e5 {
            near(g[21], (a as f64).sin());
            let all = (a as f64).exp() + (a.abs() as f64).powf(0.3f32 as f64);
            assert!((g[23] as f64 - all).abs() < 1.1 + 1e-5 * all || all > 3e38);
        }
        near(g[22], (b as f64).tanh());
    }
}

#[test]
fn packed_half_floats() {
    let d = device!(basic);
    let input = noise(32 * 4, 3);
    let (pi, out) = (d.put(&input), d.memory.alloc(32 * 64).unwrap());
    d.run("halves", [1, 1, 1], 32, 0, &[P(pi), P(out)]).unwrap();
    let got: Vec<f32> = d.get(out, 32 * 16);
    for i in 0..32 {
        for h in 0..2 {
            let (x, y) = (input[4 * i + h], input[4 * i + 2 + h]);
            let (a, b) = (bf16::from_f32(x).to_f32(), bf16::from_f32(y).to_f32());
            let (c, e) = (half::f16::from_f32(x).to_f32(), half::f16::from_f32(y).to_f32());
            let rb = |v: f64| bf16::from_f64(v).to_f32();
            let rh = |v: f64| half::f16::from_f64(v).to_f32();
            let fma = |a: f32, b: f32| a as f64 * b as f64 + a as f64;
            let want = [
                rb(a as f64 + b as f64),
                rb(fma(a, b)),
                a.max(b),
                -rb(a as f64 * b as f64),
                rh(c as f64 + e as f64),
                rh(fma(c, e)),
                c.min(e),
                rh(c as f64 - e as f64),
            ];
            for k in 0..8 {
                assert_eq!(got[16 * i + 2 * k + h], want[k], "operation {k} of {x} {y}");
            }
        }
    }
}

#[test]
fn votes_and_shuffles() {
    let d = device!(basic);
    let out = d.memory.alloc(32 * 32).unwrap();
    d.run("votes", [1, 1, 1], 32, 0, &[P(out)]).unwrap();
    let got: Vec<u32> = d.get(out, 256);
    for l in 0..32u32 {
        let mask = |f: &dyn Fn(u32) -> bool| (0..32).filter(|i| f(*i)).fold(0u32, |m, i| m | 1 << i);
        let want = [
            mask(&|i| i % 3 == 0),
            2,
            mask(&|i| i / 5 == l / 5),
            496 ^ 31,
            if l % 8 >= 3 { l - 3 } else { l },
            (l & 16) | ((l * 5) & 15),
            if l % 2 == 1 {
                mask(&|i| i % 2 == 1 && i > 10)
            } else if l < 30 {
                l + 2
            } else {
                l
            },
            16 + (1 << 8) + (1 << 9),
        ];
        assert_eq!(got[8 * l as usize..][..8], want, "lane {l}");
    }
}

#[test]
fn parameters_by_value() {
    let d = device!(basic);
    let source: Vec<f32> = (0..32).map(|i| 100.0 + i as f32).collect();
    let mut big = 3i32.to_le_bytes().to_vec();
    (0..40).for_each(|i| big.extend((i as f32).to_le_bytes()));
    big.extend([0; 4]);
    big.extend(d.put(&source).to_le_bytes());
    let out = d.memory.alloc(128).unwrap();
    d.run("by_value", [1, 1, 1], 32, 0, &[Arg::Bytes(big), P(out)]).unwrap();
    let got: Vec<f32> = d.get(out, 32);
    assert!((0..32).all(|i| got[i] == (i * 7 % 40) as f32 * 3.0 + source[i]));
}

#[test]
fn printf_runs() {
    let d = device!(basic);
    d.run("says", [1, 1, 1], 32, 0, &[I(42)]).unwrap();
}

#[test]
fn blocks_that_wait_for_later_blocks() {
    let d = device!(basic);
    let (turn, order) = (d.put(&[0i32]), d.put(&[0i32; 12]));
    d.run("chain", [12, 1, 1], 32, 0, &[P(turn), P(order)]).unwrap();
    assert_eq!(d.get::<i32>(order, 12), (0..12).rev().collect::<Vec<_>>());
}

#[test]
fn lanes_that_wait_for_each_other() {
    let d = device!(basic);
    let (lock, value) = (d.put(&[0i32]), d.put(&[0i32]));
    d.run("lane_lock", [2, 1, 1], 32, 0, &[P(lock), P(value)]).unwrap();
    assert_eq!(d.get::<i32>(value, 1), [64]);
}

#[test]
fn faults_say_where() {
    let d = device!(basic);
    let (a, big) = (d.put(&[0f32; 64]), d.put(&[0f32; 128]));
    let f = d.run("out_of_bounds", [1, 1, 1], 32, 0, &[P(a), I(60)]).unwrap_err();
    assert!(f.what.contains("0 bytes past the end of the allocation") && f.what.contains("256 bytes long"), "{f}");
    assert_eq!((f.thread, f.text.starts_with("st.global")), ([4, 0, 0], true), "{f}");
    let f = d.run("shared_out_of_bounds", [1, 1, 1], 32, 0, &[P(a), I(16)]).unwrap_err();
    assert!(f.what.contains("outside the block's shared memory"), "{f}");
    assert_eq!(f.thread, [16, 0, 0]);
    let f = d.run("misaligned", [1, 1, 1], 1, 0, &[P(a)]).unwrap_err();
    assert!(f.what.contains("misaligned"), "{f}");
    let f = d.run("deadlock", [1, 1, 1], 128, 0, &[P(big)]).unwrap_err();
    assert!(f.what.contains("deadlock") && f.what.contains("barrier 1: 64 of 128 threads arrived"), "{f}");
}

#[test]
fn a_copy_that_nobody_waited_for() {
    let d = device!(basic);
    let a = noise(128, 4);
    let (pa, out) = (d.put(&a), d.memory.alloc(128).unwrap());
    d.run("missing_wait", [1, 1, 1], 32, 0, &[P(pa), P(out), I(1)]).unwrap();
    assert_eq!(d.get::<f32>(out, 32), a[..32]);
    let f = d.run("missing_wait", [1, 1, 1], 32, 0, &[P(pa), P(out), I(0)]).unwrap_err();
    assert!(f.what.contains("in flight"), "{f}");
}

/// The seed is read from the environment, so this runs itself in a process of its own.
#[test]
fn a_missing_barrier_shows_in_a_shuffled_schedule() {
    let me = std::env::current_exe().unwrap();
    if basic_text().is_none() {
        return;
    }
    let wrong = |seed: u32| {
        let run = Command::new(&me)
            .args(["barrier_helper", "--ignored", "--nocapture"])
            .env("CUDA_EMULATOR_SEED", seed.to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&run.stdout).into_owned();
        assert!(said.contains("with barrier: 0 wrong"), "{said}");
        !said.contains("without barrier: 0 wrong")
    };
    assert!((1..4).any(wrong));
}

#[test]
#[ignore = "run by a_missing_barrier_shows_in_a_shuffled_schedule"]
fn barrier_helper() {
    let d = Device::of(&compile("core_basic").unwrap(), Memory::new(1 << 24)).unwrap();
    for (barrier, word) in [(1, "with"), (0, "without")] {
        let out = d.memory.alloc(1024).unwrap();
        d.run("missing_barrier", [1, 1, 1], 256, 0, &[P(out), I(barrier)]).unwrap();
        let got: Vec<i32> = d.get(out, 256);
        let wrong = (0..256).filter(|i| got[*i] != (*i as i32 + 32) & 255).count();
        println!("{word} barrier: {wrong} wrong");
    }
}

#[test]
fn unwritten_memory_in_strict_mode() {
    let Some(text) = basic_text() else { return };
    let d = Device::of(text, Memory::new_strict(1 << 24)).unwrap();
    let (a, b, out) = (d.put(&[1f32; 32]), d.memory.alloc(128).unwrap(), d.memory.alloc(128).unwrap());
    let f = d.run("vector_add", [1, 1, 1], 32, 0, &[P(a), P(b), P(out), I(32)]).unwrap_err();
    assert!(f.what.contains("which nothing wrote"), "{f}");
    d.memory.fill(b, &[0], 128).unwrap();
    d.run("vector_add", [1, 1, 1], 32, 0, &[P(a), P(b), P(out), I(32)]).unwrap();
}

#[test]
fn matmul_with_cp_async_ldmatrix_and_mma() {
    let d = device!(matrix);
    let (m, n, k) = (100, 72, 160);
    let to_bf16 = |v: Vec<f32>| v.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let (a, b) = (to_bf16(noise(m * k, 1)), to_bf16(noise(n * k, 2)));
    let (pa, pb, pc) = (d.put(&a), d.put(&b), d.memory.alloc((m * n * 4) as u64).unwrap());
    d.run("matmul_bf16", [2, 2, 1], 128, 0, &[P(pa), P(pb), P(pc), I(m as i32), I(n as i32), I(k as i32)]).unwrap();
    let got: Vec<f32> = d.get(pc, m * n);
    for r in 0..m {
        for c in 0..n {
            let terms = (0..k).map(|i| a[r * k + i].to_f64() * b[c * k + i].to_f64());
            let (want, size) = terms.fold((0.0, 0.0), |(s, t), v| (s + v, t + v.abs()));
            assert!((got[r * n + c] as f64 - want).abs() <= 1e-6 * size, "{r} {c}: {} {want}", got[r * n + c]);
        }
    }
}

#[test]
fn mma_of_tf32_and_s8() {
    let d = device!(matrix);
    let (a, b) = (noise(128, 1), noise(64, 2));
    let (pa, pb, pc) = (d.put(&a), d.put(&b), d.memory.alloc(512).unwrap());
    d.run("mma_tf32", [1, 1, 1], 32, 0, &[P(pa), P(pb), P(pc)]).unwrap();
    let cut = |v: f32| f32::from_bits((v.to_bits() + 0x1000) & 0xFFFF_E000) as f64;
    let got: Vec<f32> = d.get(pc, 128);
    for r in 0..16 {
        for c in 0..8 {
            let first = [1.0, 2.0, 3.0, 4.0][r / 8 * 2 + c % 2];
            let want = (0..8).fold(first, |s, k| s + cut(a[r * 8 + k]) * cut(b[c * 8 + k]));
            assert!((got[r * 8 + c] as f64 - want).abs() < 1e-6, "{r} {c}");
        }
    }
    let a: Vec<i8> = (0..512).map(|i| (i * 37 % 251) as u8 as i8).collect();
    let b: Vec<i8> = (0..256).map(|i| (i * 91 % 253) as u8 as i8).collect();
    let (pa, pb) = (d.put(&a), d.put(&b));
    d.run("mma_s8", [1, 1, 1], 32, 0, &[P(pa), P(pb), P(pc)]).unwrap();
    let got: Vec<i32> = d.get(pc, 128);
    for r in 0..16 {
        for c in 0..8 {
            let first = if r >= 8 && c % 2 == 1 { 7 } else { 0 };
            let want = (0..32).fold(first, |s, k| s + a[r * 32 + k] as i32 * b[c * 32 + k] as i32);
            assert_eq!(got[r * 8 + c], want, "{r} {c}");
        }
    }
}

#[test]
fn transposing_moves() {
    let d = device!(matrix);
    let input: Vec<u16> = (0..64).collect();
    let (pi, out) = (d.put(&input), d.memory.alloc(256).unwrap());
    d.run("transpose", [1, 1, 1], 32, 0, &[P(pi), P(out)]).unwrap();
    let got: Vec<u16> = d.get(out, 128);
    for r in 0..8 {
        for c in 0..8 {
            assert_eq!(got[r * 8 + c], input[c * 8 + r]);
            assert_eq!(got[64 + r * 8 + c], input[r * 8 + c]);
        }
    }
}

/// Needs no compiler: names in scopes, indexed branches, initialisers, packing, carries.
#[test]
fn hand_written_ptx() {
    let text = r#"
.version 9.0
.target sm_80
.address_size 64
.visible .global .align 8 .u64 table[3] = {7, value, value+4};
.global .align 4 .u32 value[2] = {40, 0x2};
.visible .entry k(.param .u64 out)
{
  .reg .pred %p<4>;
  .reg .b16 %h<4>;
  .reg .b32 %r<20>;
  .reg .b64 %rd<12>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 32;
  add.s64 %rd1, %rd1, %rd2;
  mov.u32 %r2, 0;
  and.b32 %r3, %r1, 3;
list: .branchtargets zero, one, two, zero;
  brx.idx %r3, list;
zero:
  { .reg .b32 n; mov.u32 n, %r1;
  again: setp.eq.u32 %p1, n, 0; @%p1 bra done; add.u32 %r2, %r2, 2; sub.u32 n, n, 1; bra again;
  done: }
  bra.uni join;
one:
  { .reg .b32 n; mov.u32 n, 5;
  again: setp.eq.u32 %p1, n, 0; @%p1 bra done; add.u32 %r2, %r2, 3; sub.u32 n, n, 1; bra again;
  done: }
  bra.uni join;
two:
  mov.u32 %r2, 99;
join:
  st.global.u32 [%rd1], %r2;
  ld.global.u64 %rd3, [table+16];
  ld.global.u32 %r4, [%rd3];
  ld.global.u64 %rd4, [table];
  cvt.u32.u64 %r5, %rd4;
  st.global.v2.u32 [%rd1+8], {%r4, %r5};
  mov.b32 {%h1, %h2}, 0x00050003;
  mov.b32 %r6, {%h2, %h1};
  add.cc.u32 %r7, 0xFFFFFFFF, %r1;
  addc.u32 %r8, 0, 10;
  st.global.v4.b32 [%rd1+16], {%r6, %r7, %r8, -1};
  setp.lt.and.s32 %p2|%p3, %r1, 2, !%p1;
  @%p3 st.global.u32 [%rd1+4], 0f40490FDB;
  @!%p3 st.global.u32 [%rd1+4], 1;
  ret;
}
"#;
    let d = Device::of(text, Memory::new(1 << 20)).unwrap();
    let out = d.memory.alloc(8 * 32).unwrap();
    d.run("k", [1, 1, 1], 8, 0, &[P(out)]).unwrap();
    let got: Vec<u32> = d.get(out, 64);
    for t in 0..8u32 {
        let first = [2 * t, 15, 99, 2 * t][t as usize % 4];
        // %p1 was set where a loop ran, so !%p1 is true only for the third kind of lane, whose %p3 is then t >= 2.
        let pi = t % 4 == 2;
        let want =
            [first, if pi { 0x40490FDB } else { 1 }, 2, 7, 0x00030005, t.wrapping_sub(1), 10 + (t > 0) as u32, !0];
        assert_eq!(got[8 * t as usize..][..8], want, "lane {t}");
    }
}

#[test]
fn what_is_unknown_is_an_error_with_its_line() {
    let body = |line: &str| {
        let text = format!(
            ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{{\n.reg .b32 %r<3>;\n{line}\nret;\n}}\n"
        );
        let memory = Memory::new(1 << 20);
        ptx::parse(&text).map_err(|e| e.to_string()).and_then(|m| exec::LoadedModule::load(&memory, m).map(|_| ()))
    };
    body("add.u32 %r1, %r2, 1;").unwrap();
    for (line, words) in [
        ("frobnicate.u32 %r1, %r2;", "unknown instruction"),
        ("add.sideways.u32 %r1, %r2, 1;", "unknown modifier .sideways"),
        ("add.u32 %r1, %r9, 1;", "unknown name %r9"),
        ("bra nowhere;", "no label nowhere"),
        ("add.u32 %r1, %r2;", "3 operands are needed"),
        ("sin.approx.f64 %r1, %r2;", "64 are written"),
        ("add.u32 %r1 %r2;", "expected `;`"),
    ] {
        let e = body(line).unwrap_err();
        assert!(e.contains(words) && e.contains("line 7"), "{line}: {e}");
    }
}

/// Not a check of speed: prints it. `cargo test --release speed -- --ignored --nocapture`
#[test]
#[ignore = "prints speeds"]
fn speed() {
    let d = device!(matrix);
    let out = d.memory.alloc(4 * 256 * 64).unwrap();
    let began = std::time::Instant::now();
    d.run("spin", [64, 1, 1], 256, 0, &[P(out), I(2000)]).unwrap();
    let t = began.elapsed().as_secs_f64();
    // Eight instructions an iteration, or nine where the branch is taken.
    println!("spin: {:.0} million lane-instructions a second", 64.0 * 256.0 * 2000.0 * 8.0 / t / 1e6);
    let (m, n, k) = (512, 512, 512);
    let (a, b) = (vec![bf16::ONE; m * k], vec![bf16::ONE; n * k]);
    let (pa, pb, pc) = (d.put(&a), d.put(&b), d.memory.alloc((m * n * 4) as u64).unwrap());
    let began = std::time::Instant::now();
    d.run("matmul_bf16", [8, 8, 1], 128, 0, &[P(pa), P(pb), P(pc), I(m as i32), I(n as i32), I(k as i32)]).unwrap();
    let t = began.elapsed().as_secs_f64();
    println!("matmul 512 x 512 x 512: {t:.3} s, {:.2} GFLOP/s", 2.0 * (m * n * k) as f64 / t / 1e9);
}
