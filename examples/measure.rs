//! Times one configuration: median, least and largest seconds, workspace and peak resident memory.
//!
//! ```text
//! cargo run --release --example measure -- --backend cpu --queries 512 --candidates 100000 --dim 128 \
//!     --mode value_and_grad --log-q --ids zipf --json
//! ```
//!
//! Inputs are seeded and made in place, or read from a golden batch (`--inputs FILE`), so that another implementation
//! can be timed on the same ones. The first call is not counted: it allocates. Later ones reuse backend and output.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use catalog_softmax::{Backend, Batch, DType, Device, Reference, Request, Similarity};
use clap::{Parser, ValueEnum};

#[path = "train_two_tower/memory.rs"]
mod memory;

use catalog_softmax_testing::golden::Golden;
use catalog_softmax_testing::problem::{PositiveData, Problem};
use catalog_softmax_testing::seeded;
use catalog_softmax_testing::step::Step;

/// More than machines have cores. Each thread is made before anything is measured.
const MAX_THREADS: i64 = 1024;

/// Times one configuration.
#[derive(Parser)]
#[command(allow_negative_numbers = true)]
struct Args {
    #[arg(long, value_enum, default_value = "cpu")]
    backend: BackendName,
    /// B
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    queries: u32,
    /// N
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..))]
    candidates: u32,
    /// D
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    dim: u32,
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DTypeName,
    #[arg(long, value_enum, default_value = "cosine")]
    similarity: SimilarityName,
    #[arg(long, value_enum, default_value = "value_and_grad")]
    mode: Mode,
    /// K of `--mode topk`
    #[arg(long, default_value_t = 100)]
    k: usize,
    #[arg(long, default_value_t = 0.05)]
    temperature: f64,
    /// Which of N items the candidates are; a candidate that is another row's positive item is no negative of that row
    #[arg(long, value_enum, default_value = "none")]
    ids: IdsName,
    /// Excluded ids of each row, popular items in many of them; needs --ids
    #[arg(long, default_value_t = 0)]
    history: u32,
    /// Subtract log_q from negatives and positive
    #[arg(long)]
    log_q: bool,
    /// Counted calls, after one that is not
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    iterations: u32,
    /// Threads of the CPU backend; all cores where not given
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=MAX_THREADS))]
    threads: Option<u32>,
    /// Take inputs and loss from this golden batch; options of shape, type, loss and ids then do not count
    #[arg(long)]
    inputs: Option<PathBuf>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum BackendName {
    Reference,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DTypeName {
    F32,
    F16,
    Bf16,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum SimilarityName {
    Cosine,
    Dot,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Mode {
    /// Loss and row statistics: one matmul
    Statistics,
    /// Loss and gradients: four
    ValueAndGrad,
    /// The best `--k` candidates of each query, from host memory: one matmul and a selection
    Topk,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum IdsName {
    /// No ids: nothing is masked but each row's own positive
    None,
    /// Each item once
    Unique,
    /// Drawn with replacement, item k with a probability of about 1 / (k + 1), as in a log of interactions
    Zipf,
    /// All are one item: every candidate is masked in every row
    Equal,
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

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads as usize).build_global()?;
    }
    let problem = match &args.inputs {
        Some(file) => {
            Golden::load(file).map(|golden| golden.problem).map_err(|e| format!("{}: {e}", file.display()))?
        }
        None => {
            if args.history > 0 && args.ids == IdsName::None {
                return Err(
                    "--history is given without --ids; rule: excluded ids are compared with candidates' ids".into()
                );
            }
            memory::check(bytes_of(args), "this configuration", "lower --queries, --candidates or --dim")?;
            generate(args)
        }
    };
    if args.inputs.is_some() {
        forget_peak_memory();
    }
    let measured = match args.backend {
        BackendName::Reference => measure(args, &problem, &mut Reference::new())?,
        BackendName::Cpu => measure(args, &problem, Device::Cpu.open()?.as_mut())?,
        #[cfg(feature = "cuda")]
        BackendName::Cuda if args.mode == Mode::Topk => measure(args, &problem, Device::Cuda(0).open()?.as_mut())?,
        #[cfg(feature = "cuda")]
        BackendName::Cuda => measure_cuda(args, &problem)?,
        #[cfg(not(feature = "cuda"))]
        BackendName::Cuda => measure(args, &problem, Device::Cuda(0).open()?.as_mut())?,
    };
    if args.json {
        println!("{}", json(args, &problem, &measured));
    } else {
        print(args, &problem, &measured);
    }
    Ok(())
}

struct Measured {
    /// Ascending.
    seconds: Vec<f64>,
    total: f64,
    workspace_bytes: usize,
    output_bytes: usize,
    peak_resident_bytes: Option<usize>,
}

impl Measured {
    fn median(&self) -> f64 {
        let n = self.seconds.len();
        0.5 * (self.seconds[(n - 1) / 2] + self.seconds[n / 2])
    }
}

fn measure<B: Backend + ?Sized>(args: &Args, problem: &Problem, backend: &mut B) -> catalog_softmax::Result<Measured> {
    if args.mode == Mode::Topk {
        return measure_top_k(args, problem, backend);
    }
    let (batch, loss) = (problem.batch()?, &problem.loss);
    let request = request(args.mode);
    let workspace_bytes = backend.plan(&batch, loss, request)?.workspace_bytes;
    let mut step = Step::default();
    let seconds = timed(args, || step.compute(backend, &batch, loss, request))?;
    let output_bytes = output_bytes::<B::Real>(&batch, args.mode, problem);
    Ok(Measured { seconds, total: step.total, workspace_bytes, output_bytes, peak_resident_bytes: peak_memory() })
}

/// The total is the sum of all scores that were found.
fn measure_top_k<B: Backend + ?Sized>(
    args: &Args,
    problem: &Problem,
    backend: &mut B,
) -> catalog_softmax::Result<Measured> {
    let (search, similarity) = (problem.search()?, problem.loss.similarity);
    let workspace_bytes = backend.plan_top_k(&search, similarity, args.k)?.workspace_bytes;
    let mut total = 0.0;
    let seconds = timed(args, || {
        let top = backend.top_k(&search, similarity, args.k)?;
        total = (0..search.num_queries()).flat_map(|row| top.row(row).1).map(|&score| score.into()).sum::<f64>();
        Ok(())
    })?;
    let output_bytes = search.num_queries() * args.k * (size_of::<u32>() + size_of::<B::Real>());
    Ok(Measured { seconds, total, workspace_bytes, output_bytes, peak_resident_bytes: peak_memory() })
}

/// Seconds of each counted call, ascending.
fn timed(args: &Args, mut call: impl FnMut() -> catalog_softmax::Result<()>) -> catalog_softmax::Result<Vec<f64>> {
    call()?;
    let mut seconds = Vec::new();
    for _ in 0..args.iterations {
        let start = Instant::now();
        call()?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}

/// On device memory, timed by events on the stream: inputs are there already and outputs stay.
#[cfg(feature = "cuda")]
fn measure_cuda(args: &Args, problem: &Problem) -> Result<Measured, Box<dyn Error>> {
    use catalog_softmax::Cuda;
    use catalog_softmax_testing::on_device::{OnDevice, Results};
    use cudarc::driver::{CudaContext, sys::CUevent_flags};

    // Says why where there is no device; cudarc would panic.
    drop(Cuda::new(0)?);
    let stream = CudaContext::new(0)?.new_stream()?;
    let mut cuda = Cuda::on_stream(stream.clone())?;
    let (inputs, mut results) = (OnDevice::new(&stream, problem), Results::new(&stream, problem));
    let (mut batch, loss, request) = (inputs.batch(problem), &problem.loss, request(args.mode));
    if let Some((low, high)) = seeded::log_q_bounds(problem) {
        batch = batch.log_q_bounds(low, high);
    }
    let workspace_bytes = cuda.plan_on_device(&batch, loss, request)?.workspace_bytes;
    cuda.compute_on_device(&batch, loss, &mut results.output(request))?;
    cuda.fault()?;
    // All steps are queued before anything is waited for, as benches/peers/gpu.py does: a wait would let the device run dry.
    let mut events = Vec::new();
    for _ in 0..args.iterations {
        let start = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        cuda.compute_on_device(&batch, loss, &mut results.output(request))?;
        events.push((start, stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?));
    }
    stream.synchronize()?;
    cuda.fault()?;
    let mut seconds = Vec::new();
    for (start, end) in events {
        seconds.push(f64::from(start.elapsed_ms(&end)?) * 1e-3);
    }
    seconds.sort_by(f64::total_cmp);
    let total = stream.clone_dtoh(&results.total)?[0];
    let output_bytes = output_bytes::<f32>(&problem.batch()?, args.mode, problem);
    Ok(Measured { seconds, total, workspace_bytes, output_bytes, peak_resident_bytes: peak_memory() })
}

fn request(mode: Mode) -> Request {
    match mode {
        Mode::Statistics | Mode::Topk => Request::value(),
        Mode::ValueAndGrad => Request::value_and_grad(),
    }
}

/// Floating-point operations of the matmuls: one of 2·B·N·D for statistics and top-K, four for value and gradient.
fn flops(problem: &Problem, mode: Mode) -> f64 {
    let matmuls = match mode {
        Mode::Statistics | Mode::Topk => 1.0,
        Mode::ValueAndGrad => 4.0,
    };
    matmuls * 2.0 * problem.num_queries() as f64 * problem.num_candidates() as f64 * problem.dim as f64
}

// ---- memory

fn input_bytes(problem: &Problem) -> usize {
    let (b, size) = (problem.num_queries(), problem.queries.view(problem.dim).dtype().size());
    let mut bytes = problem.queries.len() * size;
    for pool in &problem.pools {
        bytes += pool.candidates.len() * size;
        bytes += pool.ids.as_ref().map_or(0, |ids| size_of_val(ids.as_slice()));
        bytes += pool.log_q.as_ref().map_or(0, |log_q| size_of_val(log_q.as_slice()));
    }
    bytes += match &problem.positives {
        PositiveData::Index(_) => b * size_of::<u32>(),
        PositiveData::Separate(embeddings) => embeddings.len() * size,
    };
    bytes += problem.excluded.as_ref().map_or(0, |(offsets, ids)| (offsets.len() + ids.len()) * size_of::<u64>());
    bytes + problem.row_weight.as_ref().map_or(0, |weight| size_of_val(weight.as_slice()))
}

/// Loss, probability, lse, positive and count of each row; with gradients, those and the expected negative.
fn output_bytes<T>(batch: &Batch<'_>, mode: Mode, problem: &Problem) -> usize {
    let (b, n) = (batch.num_queries(), batch.num_candidates());
    let separate = matches!(problem.positives, PositiveData::Separate(_));
    let rows = match mode {
        Mode::Statistics | Mode::Topk => 0,
        Mode::ValueAndGrad => n + b * if separate { 3 } else { 2 },
    };
    5 * b * size_of::<f64>() + rows * batch.dim() * size_of::<T>()
}

/// Largest resident size of this process so far (Linux).
fn peak_memory() -> Option<usize> {
    memory::peak().map(|bytes| bytes as usize)
}

/// Inputs and gradients, without overflow for any sizes.
fn bytes_of(args: &Args) -> u128 {
    let [b, n, d] = [args.queries, args.candidates, args.dim].map(u128::from);
    let element = if args.dtype == DTypeName::F32 { 4 } else { 2 };
    let gradients = if args.mode == Mode::ValueAndGrad { 4 } else { 0 };
    // Ids, log_q and statistics take some bytes per row.
    (b + n) * (d * (element + gradients) + 16) + b * u128::from(args.history) * 8
}

/// Lowers the peak to what is resident now, so that reading the inputs' file does not count (Linux, where permitted).
fn forget_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

// ---- inputs

fn generate(args: &Args) -> Problem {
    seeded::problem(&seeded::Config {
        queries: args.queries as usize,
        candidates: args.candidates as usize,
        dim: args.dim as usize,
        dtype: match args.dtype {
            DTypeName::F32 => DType::F32,
            DTypeName::F16 => DType::F16,
            DTypeName::Bf16 => DType::Bf16,
        },
        similarity: match args.similarity {
            SimilarityName::Cosine => Similarity::Cosine,
            SimilarityName::Dot => Similarity::Dot,
        },
        temperature: args.temperature,
        ids: match args.ids {
            IdsName::None => seeded::Ids::None,
            IdsName::Unique => seeded::Ids::Unique,
            IdsName::Zipf => seeded::Ids::Zipf,
            IdsName::Equal => seeded::Ids::Equal,
        },
        history: args.history as usize,
        log_q: args.log_q,
    })
}

// ---- reports

fn print(args: &Args, problem: &Problem, measured: &Measured) {
    let (b, n, d) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64);
    let (inputs, median) = (input_bytes(problem), measured.median());
    let seconds = &measured.seconds;
    println!("{b} queries, {n} candidates, dim {d}, {:?}, {:?}", dtype(problem), problem.loss);
    println!("total           {:.9}", measured.total);
    println!(
        "seconds         median {median:.6}, min {:.6}, max {:.6} of {}",
        seconds[0],
        seconds[seconds.len() - 1],
        seconds.len()
    );
    println!("speed           {:.1} GFLOP/s at the median", flops(problem, args.mode) / median * 1e-9);
    println!("workspace       {}", mib(measured.workspace_bytes));
    println!("inputs, outputs {}, {}", mib(inputs), mib(measured.output_bytes));
    if let Some(peak) = measured.peak_resident_bytes {
        let beside = peak.saturating_sub(inputs + measured.output_bytes);
        println!("peak resident   {}, of which beside inputs and outputs {}", mib(peak), mib(beside));
    }
}

fn json(args: &Args, problem: &Problem, measured: &Measured) -> serde_json::Value {
    let name = |value: Option<clap::builder::PossibleValue>| value.map(|value| value.get_name().to_string());
    let seconds = &measured.seconds;
    serde_json::json!({
        "backend": name(args.backend.to_possible_value()),
        "mode": name(args.mode.to_possible_value()),
        "k": (args.mode == Mode::Topk).then_some(args.k),
        "queries": problem.num_queries(),
        "candidates": problem.num_candidates(),
        "dim": problem.dim,
        "dtype": format!("{:?}", dtype(problem)).to_lowercase(),
        "similarity": format!("{:?}", problem.loss.similarity).to_lowercase(),
        "temperature": problem.loss.temperature,
        "ids": if args.inputs.is_some() { None } else { name(args.ids.to_possible_value()) },
        "has_ids": problem.pools[0].ids.is_some(),
        "history": problem.excluded.as_ref().map_or(0, |(_, ids)| ids.len() / problem.num_queries()),
        "log_q": problem.pools[0].log_q.is_some(),
        "threads": rayon::current_num_threads(),
        "iterations": seconds.len(),
        "seconds": seconds,
        "median_s": measured.median(),
        "min_s": seconds[0],
        "max_s": seconds[seconds.len() - 1],
        "gflop_per_s": flops(problem, args.mode) / measured.median() * 1e-9,
        "total": measured.total,
        "workspace_bytes": measured.workspace_bytes,
        "input_bytes": input_bytes(problem),
        "output_bytes": measured.output_bytes,
        "peak_resident_bytes": measured.peak_resident_bytes,
    })
}

fn dtype(problem: &Problem) -> DType {
    problem.queries.view(problem.dim).dtype()
}
