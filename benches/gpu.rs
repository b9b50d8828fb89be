//! The CUDA backend beside cuBLAS, timed by events on device memory: loss alone, and loss with gradients, of cosine,
//! log_q, Zipf ids, bf16.
//!
//! | function | what it is |
//! |---|---|
//! | `ours` | a step of the crate, with accidental hits masked by id |
//! | `ours_without_ids` | the same where candidates have no ids: nothing is masked but each row's positive |
//! | `naive` | matmul and softmax on materialised logits (`gpu/naive.rs`): cuBLAS and a pass for each thing to do; no masks |
//! | `bare_matmul` | cuBLAS's matmul that writes the logits in 16 bits, and nothing else |
//!
//! ```text
//! cargo bench --bench gpu                                        # lines through the target's shape; about five minutes
//! GPU_BENCH_SHAPES=all cargo bench --bench gpu                   # the whole grid
//! GPU_BENCH_SHAPES=8192x1000000x256 cargo bench --bench gpu      # BxNxD, a list with commas
//! cargo bench --bench gpu -- --test                              # one tiny shape, each function once
//! ```
//!
//! Inputs rotate, so that none is in the L2 cache from the last call. Criterion keeps its reports; a table with rates and
//! the share of the floor (the arithmetic alone, `gpu/shapes.rs`) comes last. Before it is timed, `naive` is held to the
//! crate's loss and gradients without ids. Ids are drawn by the rule of the peers' scripts (`Ids::Zipf` of
//! `testing/src/seeded.rs`). With no device nothing runs; with no cuBLAS, the crate alone.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use catalog_softmax::{Cuda, DType, Request, Similarity};
use criterion::{Criterion, SamplingMode};
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};

#[path = "gpu/cublas.rs"]
mod cublas;
#[path = "gpu/naive.rs"]
mod naive;
#[path = "gpu/shapes.rs"]
mod shapes;
#[path = "gpu/table.rs"]
mod table;

use catalog_softmax_testing::on_device::{OnDevice, Results};
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::seeded::{self, Ids};
use naive::{Library, Naive};
use shapes::{Device, Shape};
use table::Table;

const TEMPERATURE: f64 = 0.05;
/// How far 16-bit logits may take the naive loss and, by the norm of the difference, its gradients.
const AGREEMENT: [f64; 2] = [1e-2, 5e-2];

fn main() -> ExitCode {
    // Says why where there is no device; cudarc would panic.
    if let Err(reason) = Cuda::new(0) {
        println!("gpu benches are skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// Whether every shape went through; the table has what did.
fn run() -> Result<bool, String> {
    let context = CudaContext::new(0).map_err(|error| error.to_string())?;
    // SAFETY: there is one stream, so that nothing needs to be ordered by events.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().map_err(|error| error.to_string())?;
    let device = Device::new(&context).map_err(|error| error.to_string())?;
    // As criterion sees it: `cargo bench` says --bench, `cargo test` does not.
    let given = |flag: &str| std::env::args().any(|argument| argument == flag);
    let testing = given("--test") || !given("--bench");
    let asked = std::env::var("GPU_BENCH_SHAPES").unwrap_or_else(|_| if testing { "40x512x64" } else { "" }.into());
    let shapes = shapes::shapes(&asked, &device)?;
    let library = Library::new(&stream);
    if let Err(reason) = &library {
        println!("naive and bare_matmul are left out: {reason}");
    }
    let mut bench = Bench { criterion: Criterion::default().configure_from_args(), stream, table: Table::default() };
    let mut passed = true;
    for shape in shapes {
        let copies = if testing { 2 } else { device.copies(shape) };
        if let Err(error) = bench.shape(shape, copies, library.as_ref().ok()) {
            println!("{shape}: {error}");
            passed = false;
        }
    }
    bench.criterion.final_summary();
    bench.table.print(&device);
    Ok(passed)
}

struct Bench {
    criterion: Criterion,
    stream: Arc<CudaStream>,
    table: Table,
}

impl Bench {
    fn shape(&mut self, shape: Shape, copies: usize, library: Option<&Library>) -> Result<(), String> {
        let problem = seeded::problem(&seeded::Config {
            queries: shape.b,
            candidates: shape.n,
            dim: shape.d,
            dtype: DType::Bf16,
            similarity: Similarity::Cosine,
            temperature: TEMPERATURE,
            ids: Ids::Zipf,
            history: 0,
            log_q: true,
        });
        let mut inputs: Vec<_> = (0..copies).map(|_| OnDevice::new(&self.stream, &problem)).collect();
        let mut ours = |name, inputs: &[_]| self.ours(shape, name, &problem, inputs).map_err(|error| error.to_string());
        ours("ours", &inputs)?;
        inputs.iter_mut().for_each(|inputs| inputs.pools[0].1 = None);
        let expected = ours("ours_without_ids", &inputs)?;
        match library {
            Some(library) => self.naive(library, shape, &inputs, &expected).map_err(|error| format!("naive: {error}")),
            None => Ok(()),
        }
    }

    fn ours(
        &mut self,
        shape: Shape,
        name: &'static str,
        problem: &Problem,
        inputs: &[OnDevice],
    ) -> Result<Expected, catalog_softmax::Error> {
        let (stream, loss) = (self.stream.clone(), &problem.loss);
        let (low, high) = seeded::log_q_bounds(problem).expect("the inputs have log_q");
        let batches: Vec<_> = inputs.iter().map(|inputs| inputs.batch(problem).log_q_bounds(low, high)).collect();
        let (mut cuda, mut results) = (Cuda::on_stream(stream.clone())?, Results::new(&stream, problem));
        // Allocates, and shows what only the device sees.
        cuda.compute_on_device(&batches[0], loss, &mut results.output(Request::value_and_grad()))?;
        cuda.fault()?;
        let expected = Expected::new(&stream, &results);
        for (pass, request) in [("loss", Request::value()), ("loss_and_gradients", Request::value_and_grad())] {
            let matmuls = if request.gradients { 4.0 } else { 1.0 };
            self.time(shape, pass, name, matmuls, |call| {
                let mut output = results.output(request);
                cuda.compute_on_device(&batches[call % batches.len()], loss, &mut output)
                    .expect("the first call went through");
            });
        }
        cuda.fault()?;
        Ok(expected)
    }

    fn naive(
        &mut self,
        library: &Library,
        shape: Shape,
        inputs: &[OnDevice],
        expected: &Expected,
    ) -> Result<(), String> {
        let naive = Naive::new(library, &self.stream, shape)?;
        if naive.chunks() > 1 {
            println!("{shape}: naive and bare_matmul take the queries in {} chunks", naive.chunks());
        }
        naive.step(&inputs[0], TEMPERATURE as f32, true);
        expected.check(&self.stream, &naive)?;
        let at = |call: usize| &inputs[call % inputs.len()];
        self.time(shape, "loss", "bare_matmul", 1.0, |call| naive.bare_matmul(at(call)));
        self.time(shape, "loss", "naive", 1.0, |call| naive.step(at(call), TEMPERATURE as f32, false));
        self.time(shape, "loss_and_gradients", "naive", 3.0, |call| naive.step(at(call), TEMPERATURE as f32, true));
        Ok(())
    }

    /// Times a function that submits its work to the stream and counts its calls.
    fn time(
        &mut self,
        shape: Shape,
        pass: &'static str,
        name: &'static str,
        matmuls: f64,
        mut submit: impl FnMut(usize),
    ) {
        let (stream, mut calls, mut samples) = (self.stream.clone(), 0, Vec::new());
        let mut group = self.criterion.benchmark_group(format!("{pass}/{shape}"));
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(700));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                let start = stream.record_event(Some(CU_EVENT_DEFAULT)).expect("an event");
                for _ in 0..iterations {
                    submit(calls);
                    calls += 1;
                }
                let end = stream.record_event(Some(CU_EVENT_DEFAULT)).expect("an event");
                // Waits for both.
                let seconds = f64::from(start.elapsed_ms(&end).expect("the device works")) * 1e-3;
                samples.push(seconds / iterations as f64);
                Duration::from_secs_f64(seconds.max(1e-9))
            });
        });
        group.finish();
        self.table.add(shape, pass, name, matmuls, samples);
    }
}

/// The crate's results on the first copy of the inputs, without ids: `naive` masks nothing.
struct Expected {
    total: f64,
    d_queries: Vec<f32>,
    d_candidates: Vec<f32>,
}

impl Expected {
    fn new(stream: &Arc<CudaStream>, results: &Results) -> Self {
        let d_candidates = results.d_candidates[0].as_ref().expect("the pool has a gradient");
        Expected {
            total: down(stream, &results.total)[0],
            d_queries: first(stream, &results.d_queries),
            d_candidates: first(stream, d_candidates),
        }
    }

    fn check(&self, stream: &Arc<CudaStream>, naive: &Naive<'_>) -> Result<(), String> {
        let total = down(stream, &naive.total)[0];
        let apart = [
            ("loss", (total / self.total - 1.0).abs(), AGREEMENT[0]),
            ("d_queries", distance(&first(stream, &naive.d_queries), &self.d_queries), AGREEMENT[1]),
            ("d_candidates", distance(&first(stream, &naive.d_candidates), &self.d_candidates), AGREEMENT[1]),
        ];
        match apart.into_iter().find(|(_, apart, most)| apart.is_nan() || apart > most) {
            None => Ok(()),
            Some((name, apart, most)) => Err(format!("{name} is {apart:.1e} from the crate's, more than {most:.0e}")),
        }
    }
}

fn down<T: Clone + Default + cudarc::driver::DeviceRepr>(stream: &Arc<CudaStream>, slice: &CudaSlice<T>) -> Vec<T> {
    stream.clone_dtoh(slice).expect("results come down")
}

/// The first elements: enough to find a wrong layout, few enough to copy.
fn first(stream: &Arc<CudaStream>, slice: &CudaSlice<f32>) -> Vec<f32> {
    stream.clone_dtoh(&slice.slice(..slice.len().min(1 << 22))).expect("results come down")
}

/// Norm of the difference, relative to the expected one's.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let sum = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = sum(&mut found.iter().zip(expected).map(|(a, b)| f64::from(a - b)));
    (difference / sum(&mut expected.iter().map(|&v| f64::from(v)))).sqrt()
}
