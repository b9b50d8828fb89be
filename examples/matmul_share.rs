//! How much of the processor's matmul rate a step on the CPU reaches, and how types of embeddings compare.
//!
//! ```text
//! cargo run --release --example matmul_share -- 512x100000x128 4096x4096x64
//! cargo run --release --example matmul_share -- 512x100000x128 --dtype f32 bf16 bf16-without-amx
//! ```
//!
//! For each shape B x N x D, and for the loss alone and with gradients: the floating-point operations of the step's matmuls (one,
//! or four with gradients) over its time, as a share of the rate of an f32 matmul library on tiles in cache on all threads. Rounds
//! of the library and of a step of each type alternate, because the rate of a shared machine changes from second to second. Prints
//! rows of a markdown table: medians, and in brackets the least and the largest. "times" compares the time of the first type with
//! this one's, round by round.

use std::error::Error;
use std::time::Instant;

use catalog_softmax::{Backend, Batch, Cpu, DType, Gradients, Loss, Output, Request, Similarity};
use catalog_softmax_testing::naive::matmul_rate;
use catalog_softmax_testing::problem::Storage;
use clap::{Parser, ValueEnum};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Compares the time of a step with the processor's matmul rate.
#[derive(Parser)]
struct Args {
    /// Shapes, B x N x D, such as 512x100000x128
    #[arg(required = true, value_parser = shape)]
    shapes: Vec<[usize; 3]>,
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    #[arg(long, default_value_t = 0.05)]
    temperature: f64,
    /// Element types of the embeddings
    #[arg(long, value_enum, num_args = 1.., default_values = ["f32"])]
    dtype: Vec<Type>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Type {
    F32,
    F16,
    Bf16,
    /// bf16 without the processor's matrix unit
    Bf16WithoutAmx,
}

impl Type {
    fn dtype(self) -> DType {
        match self {
            Type::F32 => DType::F32,
            Type::F16 => DType::F16,
            Type::Bf16 | Type::Bf16WithoutAmx => DType::Bf16,
        }
    }

    fn cpu(self) -> Cpu {
        if let Type::Bf16WithoutAmx = self { Cpu::without_amx() } else { Cpu::new() }
    }
}

fn shape(text: &str) -> Result<[usize; 3], String> {
    let sizes: Vec<usize> = text.split('x').map_while(|size| size.parse().ok()).filter(|&size| size > 0).collect();
    sizes.try_into().map_err(|_| "a shape is B x N x D, such as 512x100000x128".into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    println!("| B x N x D | type | pass | ms | times | share of the matmul rate, % | matmul rate, GFLOP/s |");
    println!("|---|---|---|---|---|---|---|");
    for &shape in &args.shapes {
        for request in [Request::value(), Request::value_and_grad()] {
            one_shape(shape, request, &args)?;
        }
    }
    Ok(())
}

/// A step of one type: its inputs, what it writes, and what was measured.
struct Step {
    dtype: Type,
    queries: Storage,
    candidates: Storage,
    positives: Vec<u32>,
    cpu: Cpu,
    output: Output<f32>,
    gradients: Gradients<f32>,
    milliseconds: Vec<f64>,
    shares: Vec<f64>,
    rates: Vec<f64>,
}

impl Step {
    fn new([b, n, dim]: [usize; 3], dtype: Type) -> Step {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut embeddings = |rows: usize| {
            let values: Vec<f32> = std::iter::repeat_with(|| rng.random_range(-1.0..1.0)).take(rows * dim).collect();
            Storage::new(&values, dtype.dtype())
        };
        let (queries, candidates) = (embeddings(b), embeddings(n));
        let positives = (0..b).map(|row| (row % n) as u32).collect();
        let (output, gradients) = (Output::default(), Gradients::default());
        let [milliseconds, shares, rates] = Default::default();
        Step { dtype, queries, candidates, positives, cpu: dtype.cpu(), output, gradients, milliseconds, shares, rates }
    }

    /// Seconds of one step.
    fn run(&mut self, dim: usize, loss: &Loss, request: Request) -> Result<f64, Box<dyn Error>> {
        let (queries, candidates) = (self.queries.view(dim), self.candidates.view(dim));
        let batch = Batch::builder(queries, candidates).positives(&self.positives).build()?;
        let gradients = request.gradients.then_some(&mut self.gradients);
        let start = Instant::now();
        self.cpu.compute(&batch, loss, request, &mut self.output, gradients)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

fn one_shape([b, n, dim]: [usize; 3], request: Request, args: &Args) -> Result<(), Box<dyn Error>> {
    let loss = Loss::softmax(Similarity::Cosine, args.temperature);
    let mut steps: Vec<Step> = args.dtype.iter().map(|&dtype| Step::new([b, n, dim], dtype)).collect();
    let matmuls = if request.gradients { 4.0 } else { 1.0 };
    let operations = matmuls * 2.0 * b as f64 * n as f64 * dim as f64;
    let rate = || matmul_rate(dim, rayon::current_num_threads());
    // The first step allocates.
    for step in &mut steps {
        step.run(dim, &loss, request)?;
    }
    for _ in 0..args.rounds {
        let mut before = rate();
        for step in &mut steps {
            let (mut seconds, mut count) = (0.0, 0.0);
            while seconds < 0.1 {
                seconds += step.run(dim, &loss, request)?;
                count += 1.0;
            }
            let after = rate();
            let here = (before + after) / 2.0;
            before = after;
            step.milliseconds.push(seconds / count * 1e3);
            step.shares.push(operations * count / seconds / here * 100.0);
            step.rates.push(here / 1e9);
        }
    }
    let pass = if request.gradients { "loss and gradients" } else { "loss" };
    for step in &steps {
        let times = steps[0].milliseconds.iter().zip(&step.milliseconds).map(|(first, this)| first / this).collect();
        let [times, shares, rates] = [times, step.shares.clone(), step.rates.clone()].map(summary);
        let milliseconds = summary(step.milliseconds.clone());
        let name = step.dtype.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        println!("| {b} x {n} x {dim} | {name} | {pass} | {milliseconds} | {times} | {shares} | {rates} |");
    }
    Ok(())
}

/// The median, and the least and the largest in brackets.
fn summary(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let places = if values[0] < 10.0 { 2 } else { 0 };
    let (least, median, largest) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    format!("{median:.places$} ({least:.places$} to {largest:.places$})")
}
