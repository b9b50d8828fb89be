//! One step over a table in device memory, for `scripts/count_tables.py` to count what its kernels do.
//!
//! ```text
//! cargo run --release --example count_table -- --queries 512 --per-row 256 --rows 20000 --dim 64 --gradient row-sparse
//! ```
//!
//! Each query has one positive and `--per-row` negatives of its own, and with `--candidates` a pool by reference; all are rows of the
//! table, drawn uniformly. Prints the total and how many rows are named, as JSON.

use std::error::Error;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

#[derive(Parser)]
struct Args {
    /// B
    #[arg(long, default_value_t = 512)]
    queries: usize,
    /// K
    #[arg(long, default_value_t = 256)]
    per_row: usize,
    /// M
    #[arg(long, default_value_t = 20_000)]
    rows: usize,
    /// N of a pool by reference, 0 for none
    #[arg(long, default_value_t = 0)]
    candidates: usize,
    /// D
    #[arg(long, default_value_t = 64)]
    dim: usize,
    #[arg(long)]
    bf16: bool,
    /// The table's
    #[arg(long, value_enum, default_value = "none")]
    gradient: Gradient,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Gradient {
    /// The loss alone
    None,
    Dense,
    RowSparse,
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

#[cfg(not(feature = "cuda"))]
fn run(_: &Args) -> Result<(), Box<dyn Error>> {
    Err("the crate is built without the feature cuda".into())
}

#[cfg(feature = "cuda")]
fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    use catalog_softmax::cuda::{
        DeviceBatch, DeviceGradients, DeviceOutput, DevicePool, DeviceRowNegatives, DeviceSlice, DeviceSliceMut,
        DeviceTable, DeviceTableGradient,
    };
    use catalog_softmax::{Cuda, Loss};
    use catalog_softmax_testing::on_device::{DeviceStorage, up};
    use catalog_softmax_testing::problem::Storage;
    use cudarc::driver::CudaContext;
    use rand::rngs::SmallRng;
    use rand::{RngExt, SeedableRng};

    drop(Cuda::new(0)?); // Says why where there is no device; cudarc would panic.
    let stream = CudaContext::new(0)?.new_stream()?;
    let mut cuda = Cuda::on_stream(stream.clone())?;
    let Args { queries: b, per_row: k, rows: m, candidates: n, dim, .. } = *args;
    let mut rng = SmallRng::seed_from_u64(1);
    let mut embeddings = |rows: usize| {
        let values: Vec<f32> = (0..rows * dim).map(|_| rng.random::<f32>() * 2.0 - 1.0).collect();
        let dtype = if args.bf16 { catalog_softmax::DType::Bf16 } else { catalog_softmax::DType::F32 };
        DeviceStorage::new(&stream, &Storage::new(&values, dtype))
    };
    let (queries, table) = (embeddings(b), embeddings(m));
    let mut draw = |count: usize| (0..count).map(|_| rng.random_range(0..m as u32)).collect::<Vec<_>>();
    let (positives, own, candidates) = (draw(b), draw(b * k), draw(n));
    let mut named: Vec<u32> = positives.iter().chain(&own).chain(&candidates).copied().collect();
    let uses = named.len();
    named.sort_unstable();
    named.dedup();

    let up_rows = |rows: &[u32]| (!rows.is_empty()).then(|| up(&stream, rows));
    let (positives, own, candidates) = (up(&stream, &positives), up_rows(&own), up_rows(&candidates));
    let table = DeviceTable::new(table.view(dim));
    let table = if args.gradient == Gradient::None { table.without_gradient() } else { table };
    let mut batch = DeviceBatch::of_table(queries.view(dim), table).positives(DeviceSlice::new(&positives));
    if let Some(own) = &own {
        batch = batch.row_negatives(DeviceRowNegatives::new(DeviceSlice::new(own), k));
    }
    if let Some(candidates) = &candidates {
        batch = batch.pool(DevicePool::rows(DeviceSlice::new(candidates)));
    }
    let most = uses.min(m);
    let mut total = stream.alloc_zeros::<f64>(1)?;
    let table_rows = if args.gradient == Gradient::RowSparse { most } else { m };
    let mut d_queries = stream.alloc_zeros::<f32>(b * dim)?;
    let mut d_table = stream.alloc_zeros::<f32>(table_rows * dim)?;
    let (mut rows, mut num_rows) = (stream.alloc_zeros::<u32>(most)?, stream.alloc_zeros::<u64>(1)?);
    let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
    let pools = usize::from(candidates.is_some()) + usize::from(candidates.is_none() && own.is_none());
    let values = DeviceSliceMut::new(&mut d_table);
    let d_table = match args.gradient {
        Gradient::None => None,
        Gradient::Dense => Some(DeviceTableGradient::Dense(values)),
        Gradient::RowSparse => {
            let (rows, num_rows) = (DeviceSliceMut::new(&mut rows), DeviceSliceMut::new(&mut num_rows));
            Some(DeviceTableGradient::RowSparse { rows, values, num_rows })
        }
    };
    if d_table.is_some() {
        let mut gradients =
            DeviceGradients::new(DeviceSliceMut::new(&mut d_queries), (0..pools).map(|_| None).collect());
        gradients.d_table = d_table;
        output.gradients = Some(gradients);
    }
    cuda.compute_on_device(&batch, &Loss::softmax(catalog_softmax::Similarity::Cosine, 0.1), &mut output)?;
    drop(output);
    cuda.fault()?;
    let total = stream.clone_dtoh(&total)?[0];
    println!("{}", serde_json::json!({ "total": total, "uses": uses, "named_rows": named.len() }));
    Ok(())
}
