//! Replays one training step from a file: computes it with a backend, compares with what the file expects, writes what
//! came out.
//!
//! ```text
//! cargo run --release --example replay -- tests/golden/*.safetensors --backend cpu
//! cargo run --release --example replay -- my_step.safetensors --backend reference --out results.safetensors
//! ```
//!
//! The file's format is described in `tests/common/golden.rs`; the shortest way to one is `safetensors.torch.save_file`
//! with the step's tensors and, as metadata, its options. Exits with 1 where a result is past tolerance and with 2 where
//! a file or the device cannot be used.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use catalog_softmax::{Backend, DType, Device, Real, Reference};
use clap::{Parser, ValueEnum};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};

#[path = "../tests/common"]
#[allow(dead_code, missing_docs)]
mod common {
    pub mod golden;
    pub mod golden_check;
    pub mod naive;
    pub mod problem;
}

use common::golden::{Golden, Tensor};
use common::golden_check::{
    Comparison, Results, Tolerances, baseline_tolerances, compare, float64_tolerances, results, uniform_tolerances,
};

/// Computes the training step in each FILE and compares it with the results that the file expects.
#[derive(Parser)]
struct Args {
    /// Golden batches, in safetensors
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Where to compute
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// Write the results here, in safetensors; with one FILE only
    #[arg(long)]
    out: Option<PathBuf>,
    /// Largest error allowed, instead of 1e-9 for the reference and of a multiple of the naive baseline's own error (which
    /// takes queries x candidates floats to compute) for the others
    #[arg(long)]
    tolerance: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BackendName {
    Reference,
    Cpu,
    Cuda,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.out.is_some() && args.files.len() > 1 {
        eprintln!("--out takes the results of one FILE, and there are {}", args.files.len());
        return ExitCode::from(2);
    }
    match replay_on(&args) {
        Ok(Tally { unusable, .. }) if unusable > 0 => ExitCode::from(2),
        Ok(Tally { failed, .. }) if failed > 0 => ExitCode::from(1),
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

fn replay_on(args: &Args) -> catalog_softmax::Result<Tally> {
    Ok(match args.backend {
        BackendName::Reference => replay_all(args, &mut Reference::new()),
        BackendName::Cpu => replay_all(args, Device::Cpu.open()?.as_mut()),
        BackendName::Cuda => replay_all(args, Device::Cuda(0).open()?.as_mut()),
    })
}

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    not_compared: usize,
    unusable: usize,
}

fn replay_all<B: Backend + ?Sized>(args: &Args, backend: &mut B) -> Tally {
    let mut tally = Tally::default();
    for file in &args.files {
        println!("{}", file.display());
        match replay(args, backend, file) {
            Ok(compared) if compared.is_empty() => tally.not_compared += 1,
            Ok(compared) if compared.iter().all(Comparison::passes) => tally.passed += 1,
            Ok(_) => tally.failed += 1,
            Err(error) => {
                eprintln!("  {}: {error}", file.display());
                tally.unusable += 1;
            }
        }
    }
    let Tally { passed, failed, not_compared, unusable } = tally;
    println!("{passed} passed, {failed} failed, {not_compared} with nothing to compare, {unusable} not usable");
    tally
}

fn replay<B: Backend + ?Sized>(args: &Args, backend: &mut B, file: &Path) -> Result<Vec<Comparison>, Box<dyn Error>> {
    let golden = Golden::load(file)?;
    let output = backend.value_and_grad(&golden.problem.batch()?, &golden.problem.loss)?;
    let found = results(&output);
    print_summary(&golden, &found);
    if let Some(out) = &args.out {
        write(&found, out)?;
    }
    if golden.expected.is_empty() {
        return Ok(Vec::new());
    }
    let compared = compare(&golden, &found, &tolerances::<B::Real>(args, &golden));
    print_comparisons(&compared);
    Ok(compared)
}

fn tolerances<T: Real>(args: &Args, golden: &Golden) -> Tolerances {
    match args.tolerance {
        Some(tolerance) => uniform_tolerances(tolerance),
        None if size_of::<T>() == size_of::<f64>() => float64_tolerances(golden),
        None => baseline_tolerances(golden, operands(args.backend, golden)),
    }
}

/// What a backend multiplies: the CUDA backend rounds probabilities to the type of the embeddings.
fn operands(backend: BackendName, golden: &Golden) -> DType {
    match backend {
        BackendName::Cuda => golden.problem.queries.view(golden.problem.dim).dtype(),
        BackendName::Reference | BackendName::Cpu => DType::F32,
    }
}

fn print_summary(golden: &Golden, found: &Results) {
    let problem = &golden.problem;
    let (b, n, d) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let dtype = problem.queries.view(d).dtype();
    println!("  {b} queries, {n} candidates, dim {d}, {dtype:?}; total {:.9}", found["total"].values[0]);
}

fn print_comparisons(compared: &[Comparison]) {
    println!(
        "  {:<22} {:>10} {:>10}     {:>9} {:>18} {:>18}",
        "result", "error", "tolerance", "worst at", "found", "expected"
    );
    for c in compared {
        let verdict = if c.passes() { "ok" } else { "BAD" };
        println!(
            "  {:<22} {:>10.2e} {:>10.2e} {verdict:<3} {:>9} {:>18.10e} {:>18.10e}",
            c.name, c.error, c.tolerance, c.at, c.found, c.expected
        );
    }
}

fn write(found: &Results, path: &Path) -> Result<(), Box<dyn Error>> {
    let bytes: Vec<_> = found.iter().map(|(name, tensor)| (*name, tensor, stored(tensor))).collect();
    let views = bytes
        .iter()
        .map(|(name, tensor, bytes)| Ok((*name, TensorView::new(tensor.dtype, tensor.shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_, safetensors::SafeTensorError>>()?;
    Ok(serialize_to_file(views, None, path)?)
}

/// The values in the type in which they were computed.
fn stored(tensor: &Tensor) -> Vec<u8> {
    let values = tensor.values.iter();
    match tensor.dtype {
        Dtype::F32 => values.flat_map(|&v| (v as f32).to_le_bytes()).collect(),
        Dtype::I64 => values.flat_map(|&v| (v as i64).to_le_bytes()).collect(),
        _ => values.flat_map(|&v| v.to_le_bytes()).collect(),
    }
}
