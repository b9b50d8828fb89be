//! How much of the processor's matmul rate a step on the CPU reaches.
//!
//! ```text
//! cargo run --release --example matmul_share -- 512x100000x128 4096x4096x64
//! ```
//!
//! For each shape B x N x D, and for the loss alone and with gradients: the floating-point operations of the step's matmuls (one,
//! or four with gradients) over its time, as a share of the rate of a matmul library on tiles in cache on all threads. Rounds of
//! the library, the step, and the library again alternate, because the rate of a shared machine changes from second to second.
//! Prints rows of a markdown table: medians, and in brackets the least and the largest.

use std::error::Error;
use std::time::Instant;

use catalog_softmax::{Backend, Batch, Cpu, Elements, Embeddings, Gradients, Loss, Output, Request, Similarity};
use catalog_softmax_testing::naive::matmul_rate;
use clap::{Parser, ValueEnum};
use half::{bf16, f16};
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
    dtype: Vec<DTypeName>,
    /// Keep the matrix unit (AMX) out, where there is one
    #[arg(long)]
    without_amx: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DTypeName {
    F32,
    F16,
    Bf16,
}

fn shape(text: &str) -> Result<[usize; 3], String> {
    let sizes: Vec<usize> = text.split('x').map_while(|size| size.parse().ok()).filter(|&size| size > 0).collect();
    sizes.try_into().map_err(|_| "a shape is B x N x D, such as 512x100000x128".into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    println!("| B x N x D | type | pass | ms | share of the matmul rate, % | matmul rate, GFLOP/s |");
    println!("|---|---|---|---|---|---|");
    for &shape in &args.shapes {
        for &dtype in &args.dtype {
            for request in [Request::value(), Request::value_and_grad()] {
                match dtype {
                    DTypeName::F32 => one_shape(shape, dtype, |x| x, request, &args)?,
                    DTypeName::F16 => one_shape(shape, dtype, f16::from_f32, request, &args)?,
                    DTypeName::Bf16 => one_shape(shape, dtype, bf16::from_f32, request, &args)?,
                }
            }
        }
    }
    Ok(())
}

fn one_shape<T>(
    [b, n, dim]: [usize; 3],
    dtype: DTypeName,
    convert: fn(f32) -> T,
    request: Request,
    args: &Args,
) -> Result<(), Box<dyn Error>>
where
    for<'a> &'a [T]: Into<Elements<'a>>,
{
    let mut rng = SmallRng::seed_from_u64(1);
    let mut embeddings = |rows: usize| -> Vec<T> {
        std::iter::repeat_with(|| convert(rng.random_range(-1.0..1.0))).take(rows * dim).collect()
    };
    let (queries, candidates) = (embeddings(b), embeddings(n));
    let positives: Vec<u32> = (0..b).map(|row| (row % n) as u32).collect();
    let (queries, candidates) = (queries.as_slice(), candidates.as_slice());
    let batch = Batch::builder(Embeddings::new(queries, b, dim), Embeddings::new(candidates, n, dim));
    let batch = batch.positives(&positives).build()?;
    let loss = Loss::softmax(Similarity::Cosine, args.temperature);
    let mut cpu = if args.without_amx { Cpu::without_amx() } else { Cpu::new() };
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    let mut step = || -> Result<f64, Box<dyn Error>> {
        let start = Instant::now();
        cpu.compute(&batch, &loss, request, &mut output, request.gradients.then_some(&mut gradients))?;
        Ok(start.elapsed().as_secs_f64())
    };
    // Enough steps in a round for a tenth of a second; the first step allocates.
    step()?;
    let steps = (0.1 / step()?).ceil().max(1.0);
    let matmuls = if request.gradients { 4.0 } else { 1.0 };
    let operations = matmuls * 2.0 * b as f64 * n as f64 * dim as f64;
    let (mut times, mut shares, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.rounds {
        let before = matmul_rate(dim, rayon::current_num_threads());
        let mut time = 0.0;
        for _ in 0..steps as usize {
            time += step()? / steps;
        }
        let rate = (before + matmul_rate(dim, rayon::current_num_threads())) / 2.0;
        times.push(time * 1e3);
        shares.push(operations / time / rate * 100.0);
        rates.push(rate / 1e9);
    }
    let pass = if request.gradients { "loss and gradients" } else { "loss" };
    let [times, shares, rates] = [times, shares, rates].map(summary);
    println!("| {b} x {n} x {dim} | {dtype:?} | {pass} | {times} | {shares} | {rates} |");
    Ok(())
}

/// The median, and the least and the largest in brackets.
fn summary(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let places = if values[0] < 10.0 { 2 } else { 0 };
    let (least, median, largest) = (values[0], values[values.len() / 2], values[values.len() - 1]);
    format!("{median:.places$} ({least:.places$} to {largest:.places$})")
}
