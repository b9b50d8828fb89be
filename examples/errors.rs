//! Accuracy: errors of lse, loss and gradients against the float64 reference, for each element type, of each kernel family of a
//! backend, beside those of a naive baseline whose matmuls take operands of the same type (`testing/src/naive.rs`).
//!
//! ```text
//! cargo run --release --example errors -- --backend cpu
//! cargo run --release --example errors -- --backend cuda --dim 256 --temperature 0.02
//! ```
//!
//! Errors of lse and loss are absolute: a score's unit is one of the exponent. Those of gradients are relative: the largest to the
//! largest element of the tensor, the root mean square to that of the tensor. `benches/peers/gpu.py --errors` prints the same of
//! PyTorch. Each type has inputs of its own (the same numbers, rounded) and a reference on them: what is measured is the
//! computation, not the rounding of its inputs. Holds B x N floats for the baseline.

use std::process::ExitCode;

use catalog_softmax::{Backend, DType, Device, Reference, Request, Result, Similarity};
use clap::{Parser, ValueEnum};

use catalog_softmax_testing::naive::naive_rounded;
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::seeded;
use catalog_softmax_testing::step::Step;

/// Errors against float64.
#[derive(Parser)]
struct Args {
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// B
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    queries: u32,
    /// N
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..))]
    candidates: u32,
    /// D
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    dim: u32,
    /// One type; all where not given
    #[arg(long, value_enum)]
    dtype: Option<DTypeName>,
    #[arg(long, default_value_t = 0.05)]
    temperature: f64,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BackendName {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DTypeName {
    F32,
    F16,
    Bf16,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let Args { queries, candidates, dim, temperature, .. } = args;
    println!(
        "{queries} queries, {candidates} candidates, dim {dim}, cosine, tau {temperature}, log_q, ids: errors, max and rms"
    );
    println!(
        "{:<24} {:<5} {:>19} {:>19} {:>19} {:>19} {:>19}",
        "", "dtype", "lse, loss alone", "lse, with gradients", "loss", "d_queries", "d_candidates"
    );
    let types = [(DTypeName::Bf16, DType::Bf16), (DTypeName::F16, DType::F16), (DTypeName::F32, DType::F32)];
    for (_, dtype) in types.into_iter().filter(|(name, _)| args.dtype.is_none_or(|wanted| wanted == *name)) {
        of_type(args, dtype)?;
    }
    Ok(())
}

fn of_type(args: &Args, dtype: DType) -> Result<()> {
    let problem = seeded::problem(&seeded::Config {
        queries: args.queries as usize,
        candidates: args.candidates as usize,
        dim: args.dim as usize,
        dtype,
        similarity: Similarity::Cosine,
        temperature: args.temperature,
        ids: seeded::Ids::Zipf,
        history: 0,
        log_q: true,
    });
    let expected = reference(&problem)?;
    for (name, mut backend) in families(args.backend, dtype)? {
        print(&name, dtype, &expected, &compute(&problem, backend.as_mut())?);
    }
    print("naive", dtype, &expected, &naive(&problem, dtype));
    Ok(())
}

/// A backend with a choice of kernels for that type, by name.
type Family = (String, Box<dyn Backend<Real = f32>>);

fn families(backend: BackendName, dtype: DType) -> Result<Vec<Family>> {
    match backend {
        BackendName::Cpu => Ok(vec![("cpu".into(), Device::Cpu.open()?)]),
        #[cfg(feature = "cuda")]
        BackendName::Cuda => {
            use catalog_softmax::Cuda;

            let device = Cuda::new(0)?;
            let mut other = Cuda::new(0)?;
            let name = if dtype == DType::F32 {
                other.allow_tf32(true);
                "cuda, tf32"
            } else {
                other.allow_hopper(false);
                "cuda, portable kernels"
            };
            Ok(vec![("cuda".into(), Box::new(device)), (name.into(), Box::new(other))])
        }
        #[cfg(not(feature = "cuda"))]
        BackendName::Cuda => Ok(vec![(format!("cuda, {dtype:?}"), Device::Cuda(0).open()?)]),
    }
}

/// What is compared. The value alone is computed by other kernels than the value with gradients.
struct Tensors {
    lse_alone: Vec<f64>,
    lse: Vec<f64>,
    loss: Vec<f64>,
    d_queries: Vec<f64>,
    d_candidates: Vec<f64>,
}

impl Tensors {
    fn new<T: Copy + Into<f64>>(lse_alone: Vec<f64>, output: &Step<T>) -> Self {
        let wide = |values: &[T]| values.iter().map(|&v| v.into()).collect();
        let gradients = output.gradients.as_ref().expect("asked for");
        Tensors {
            lse_alone,
            lse: output.statistics.lse.clone(),
            loss: output.loss.clone(),
            d_queries: wide(&gradients.d_queries.values),
            d_candidates: wide(&gradients.d_candidates[0].values),
        }
    }
}

fn reference(problem: &Problem) -> Result<Tensors> {
    let output = Step::from(Reference::new().value_and_grad(&problem.batch()?, &problem.loss)?);
    Ok(Tensors::new(output.statistics.lse.clone(), &output))
}

fn compute(problem: &Problem, backend: &mut dyn Backend<Real = f32>) -> Result<Tensors> {
    let (batch, mut output) = (problem.batch()?, Step::default());
    output.compute(backend, &batch, &problem.loss, Request::value())?;
    let lse_alone = output.statistics.lse.clone();
    output.compute(backend, &batch, &problem.loss, Request::value_and_grad())?;
    Ok(Tensors::new(lse_alone, &output))
}

fn naive(problem: &Problem, dtype: DType) -> Tensors {
    let found = naive_rounded(problem, true, dtype);
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
    let lse = wide(found.lse);
    Tensors {
        lse_alone: lse.clone(),
        lse,
        loss: wide(found.loss),
        d_queries: wide(found.d_queries),
        d_candidates: wide(found.d_candidates),
    }
}

fn print(name: &str, dtype: DType, expected: &Tensors, found: &Tensors) {
    let absolute = |found: &[f64], expected: &[f64]| {
        let [max, rms] = largest_and_rms(found.iter().zip(expected).map(|(a, b)| a - b));
        format!("{max:>9.1e} {rms:>9.1e}")
    };
    let relative = |found: &[f64], expected: &[f64]| {
        let [max, rms] = largest_and_rms(found.iter().zip(expected).map(|(a, b)| a - b));
        let [largest, size] = largest_and_rms(expected.iter().copied());
        format!("{:>9.1e} {:>9.1e}", max / largest, rms / size)
    };
    println!(
        "{name:<24} {:<5} {} {} {} {} {}",
        format!("{dtype:?}").to_lowercase(),
        absolute(&found.lse_alone, &expected.lse_alone),
        absolute(&found.lse, &expected.lse),
        absolute(&found.loss, &expected.loss),
        relative(&found.d_queries, &expected.d_queries),
        relative(&found.d_candidates, &expected.d_candidates),
    );
}

/// NaN where an element is.
fn largest_and_rms(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let (mut largest, mut squares, mut count) = (0.0, 0.0, 0.0);
    for value in values {
        largest = if value.abs() <= largest { largest } else { value.abs() };
        squares += value * value;
        count += 1.0;
    }
    [largest, f64::sqrt(squares / count)]
}
