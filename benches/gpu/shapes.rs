//! What is timed, what is left out and why, and the floor of each.

use std::fmt;

use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
};

const QUERIES: [usize; 4] = [256, 2048, 8192, 65_536];
const CANDIDATES: [usize; 4] = [8192, 100_000, 1_000_000, 10_000_000];
const DIMS: [usize; 5] = [64, 128, 256, 512, 1024];
/// The target's: lines through the grid go through it.
const TARGET: Shape = Shape { b: 8192, n: 1_000_000, d: 128 };
/// Least seconds of loss and gradients at which a shape is left out: ten samples of each of seven functions are taken.
const LONGEST: f64 = 1.0;
/// Measured tensor rate of an H100 and an H200 at bf16, and their exponentials a second and multiprocessor (16 a clock at 1.755 GHz).
const TENSOR_FLOPS: f64 = 790e12;
const EXPONENTIALS: f64 = 16.0 * 1.755e9;

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub b: usize,
    pub n: usize,
    pub d: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "B={} N={} D={}", self.b, self.n, self.d)
    }
}

impl Shape {
    /// Of one matmul of all queries and candidates.
    pub fn flops(self) -> f64 {
        2.0 * self.b as f64 * self.n as f64 * self.d as f64
    }

    /// Bytes of queries, candidates, positives, log_q and ids.
    pub fn input_bytes(self) -> usize {
        2 * (self.b + self.n) * self.d + 4 * (self.b + self.n) + 8 * self.n
    }

    /// Seconds that the arithmetic takes at least: a matmul or the exponentials; with gradients twice two matmuls or the exponentials.
    pub fn floor(self, gradients: bool, multiprocessors: usize) -> f64 {
        let matmul = self.flops() / TENSOR_FLOPS;
        let exp = self.b as f64 * self.n as f64 / (EXPONENTIALS * multiprocessors as f64);
        if gradients { 2.0 * exp.max(2.0 * matmul) } else { exp.max(matmul) }
    }
}

/// What shapes and floors depend on.
pub struct Device {
    pub name: String,
    pub multiprocessors: usize,
    pub memory: usize,
    pub l2_bytes: usize,
}

impl Device {
    pub fn new(context: &CudaContext) -> Result<Self, cudarc::driver::DriverError> {
        Ok(Device {
            name: context.name()?,
            multiprocessors: context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            memory: context.total_mem()?,
            l2_bytes: context.attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
        })
    }

    /// Whether the rates above are this device's.
    pub fn has_floor(&self) -> bool {
        ["H100", "H200"].iter().any(|known| self.name.contains(known))
    }

    /// How many copies of the inputs are twice the L2 cache, so that a call finds nothing of the last one's in it.
    pub fn copies(&self, shape: Shape) -> usize {
        (2 * self.l2_bytes).div_ceil(shape.input_bytes()).max(1)
    }

    fn left_out(&self, shape: Shape) -> Option<String> {
        // Gradients in f32 and unit vectors in bf16 beside the inputs, and a gigabyte for the rest.
        let bytes = shape.input_bytes() * self.copies(shape) + 6 * (shape.b + shape.n) * shape.d + (1 << 30);
        if bytes > self.memory / 10 * 9 {
            return Some(format!("memory: {:.0} GiB", bytes as f64 / (1u64 << 30) as f64));
        }
        let floor = shape.floor(true, self.multiprocessors);
        (floor > LONGEST).then(|| format!("time: {floor:.1} s a call at least"))
    }
}

/// The shapes that `GPU_BENCH_SHAPES` asks for, without those that it would be no use to try: lines through the target's shape
/// along each axis by default; `all` of the grid; or a list, such as `8192x1000000x128,256x8192x64`.
pub fn shapes(asked: &str, device: &Device) -> Result<Vec<Shape>, String> {
    let grid = || {
        let of = |b| CANDIDATES.into_iter().flat_map(move |n| DIMS.into_iter().map(move |d| Shape { b, n, d }));
        QUERIES.into_iter().flat_map(of)
    };
    let all: Vec<Shape> = match asked {
        "" => grid().filter(|&shape| on_a_line(shape)).collect(),
        "all" => grid().collect(),
        list => list.split(',').map(parse).collect::<Result<_, _>>()?,
    };
    let (kept, out): (Vec<_>, Vec<_>) = all.into_iter().partition(|&shape| device.left_out(shape).is_none());
    for shape in out {
        println!("left out: {shape} ({})", device.left_out(shape).unwrap_or_default());
    }
    Ok(kept)
}

fn on_a_line(shape: Shape) -> bool {
    let other = [shape.b != TARGET.b, shape.n != TARGET.n, shape.d != TARGET.d];
    other.into_iter().filter(|&other| other).count() <= 1
}

fn parse(text: &str) -> Result<Shape, String> {
    let numbers: Option<Vec<usize>> = text.split('x').map(|number| number.parse().ok()).collect();
    match numbers.as_deref() {
        Some(&[b, n, d]) if b > 0 && n > 0 && n.is_multiple_of(8) && d > 0 && d.is_multiple_of(8) => {
            Ok(Shape { b, n, d })
        }
        _ => Err(format!("GPU_BENCH_SHAPES has {text:?}; rule: BxNxD, N and D multiples of 8")),
    }
}
