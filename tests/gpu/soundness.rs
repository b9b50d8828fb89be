//! What no safe call may do: touch memory that is not its own to use, or overtake the work of another stream.
//!
//! Each case runs in a process of its own, since a fault would spoil the context of the others, and on an emulated
//! device with `CUDA_EMULATOR_DEFER=1`: nothing queued runs until something waits for it, so that a missing wait shows
//! every time.

use std::process::Command;
use std::sync::Arc;

use catalog_softmax::cuda::{Cuda, DeviceOutput, DevicePool, DeviceQueue, DeviceSlice, DeviceSliceMut};
use catalog_softmax::negatives::QueueOptions;
use catalog_softmax::{Backend, Batch, DType, Embeddings, Error, Loss, Request, Similarity};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode, cuCtxCreate_v4, cuStreamQuery};
use cudarc::driver::{CudaContext, DriverError};
use half::f16;
use libtest_mimic::{Failed, Trial};

use super::steps::{assert_same, everything, from_host};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::on_device::{OnDevice, Results};
use catalog_softmax_testing::problem::{Problem, Storage};
use catalog_softmax_testing::step::Step;

/// Holds the name of the case that a process is to run.
const CASE: &str = "GPU_TESTS_SOUNDNESS_CASE";
/// Device memory of the emulated device: little, so that a test can use it up.
const MEMORY: usize = 256 << 20;

const CASES: [(&str, fn()); 17] = [
    ("memory_of_another_stream_is_freed_after_the_step", memory_of_another_stream_is_freed_after_the_step),
    ("results_are_read_on_the_stream_that_owns_them", results_are_read_on_the_stream_that_owns_them),
    ("inputs_are_written_on_the_stream_that_owns_them", inputs_are_written_on_the_stream_that_owns_them),
    ("a_context_without_streams_is_ordered_too", a_context_without_streams_is_ordered_too),
    ("a_third_stream_is_ordered_by_events", a_third_stream_is_ordered_by_events),
    ("an_error_that_cudarc_noted_stays_its_own", an_error_that_cudarc_noted_stays_its_own),
    ("memory_is_freed_after_an_error_that_cudarc_noted", memory_is_freed_after_an_error_that_cudarc_noted),
    ("a_queue_is_ordered_between_backends", a_queue_is_ordered_between_backends),
    ("a_graph_outlives_larger_steps", a_graph_outlives_larger_steps),
    ("a_graph_runs_on_its_memory_alone", a_graph_runs_on_its_memory_alone),
    ("a_capture_by_the_caller_is_refused", a_capture_by_the_caller_is_refused),
    ("a_capture_that_reaches_the_backend_is_refused", a_capture_that_reaches_the_backend_is_refused),
    ("memory_of_another_context_is_refused", memory_of_another_context_is_refused),
    ("an_allowed_capture_outlives_larger_steps", an_allowed_capture_outlives_larger_steps),
    ("streams_that_differ_by_thread_are_refused", streams_that_differ_by_thread_are_refused),
    ("pinned_memory_outlives_the_copies_of_a_failed_step", pinned_memory_outlives_the_copies_of_a_failed_step),
    ("memory_that_will_be_free_is_waited_for", memory_that_will_be_free_is_waited_for),
];

pub fn trials() -> impl Iterator<Item = Trial> {
    CASES.iter().map(|&(name, _)| Trial::test(format!("soundness::{name}"), move || in_a_process(name)))
}

fn in_a_process(name: &str) -> Result<(), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(CASE, name).env("CUDA_EMULATOR_DEFER", "1").env("CUDA_EMULATOR_MEMORY", MEMORY.to_string());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(text.into_owned().into()) }
}

/// Runs the case that this process was started for, if it was started for one.
pub fn run_case() -> bool {
    let Ok(name) = std::env::var(CASE) else { return false };
    let (_, case) = CASES.iter().find(|(found, _)| *found == name).expect("the name of a case");
    case();
    true
}

/// A context of the device, as a caller opens it.
fn context() -> Arc<CudaContext> {
    CudaContext::new(0).expect("a device")
}

fn problem() -> Problem {
    Config { masking: Masking::Ids, ..Config::new(40, 90, 16) }.problem()
}

/// Computed before the work that is tested: to open a backend waits for everything in the context.
fn wanted(problem: &Problem) -> Step {
    from_host(&mut Cuda::new(0).expect("a device"), problem)
}

/// The first pool with its ids.
fn pool(inputs: &OnDevice, dim: usize) -> DevicePool<'_> {
    let (candidates, ids, _) = &inputs.pools[0];
    DevicePool::new(candidates.view(dim)).ids(DeviceSlice::new(ids.as_ref().expect("with ids")))
}

fn step(cuda: &mut Cuda, problem: &Problem, inputs: &OnDevice, results: &mut Results) {
    cuda.compute_on_device(&inputs.batch(problem), &problem.loss, &mut results.output(everything()))
        .expect("a loss that fits");
}

fn memory_of_another_stream_is_freed_after_the_step() {
    let (problem, stream) = (problem(), context().new_stream().expect("a stream"));
    let mut cuda = Cuda::new(0).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    step(&mut cuda, &problem, &inputs, &mut results);
    drop((inputs, results));
    stream.synchronize().expect("nothing was read or written after it was freed");
    cuda.fault().expect("valid input");
}

fn results_are_read_on_the_stream_that_owns_them() {
    let (problem, context) = (problem(), context());
    let wanted = wanted(&problem);
    let (stream, own) = (context.new_stream().expect("a stream"), context.new_stream().expect("a stream"));
    let mut cuda = Cuda::on_stream(own).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    step(&mut cuda, &problem, &inputs, &mut results);
    assert_same(&results.download(&stream, &wanted), &wanted, "right after the step");
}

/// Before a step, and after it while it is queued.
fn inputs_are_written_on_the_stream_that_owns_them() {
    let (problem, stream) = (problem(), context().new_stream().expect("a stream"));
    let wanted = wanted(&problem);
    let mut cuda = Cuda::new(0).expect("a device");
    let (mut inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let Storage::F32(queries) = &problem.queries else { panic!("f32") };
    inputs.write_queries(&stream, &vec![0.0; queries.len()]);
    stream.synchronize().expect("zeros are up");
    inputs.write_queries(&stream, queries);
    step(&mut cuda, &problem, &inputs, &mut results);
    inputs.write_queries(&stream, &vec![f32::NAN; queries.len()]);
    assert_same(&results.download(&stream, &wanted), &wanted, "with the inputs that were there at the step");
}

/// cudarc does not wait for events in a context in which it has made no stream.
fn a_context_without_streams_is_ordered_too() {
    let (problem, stream) = (problem(), context().default_stream());
    let Storage::F32(queries) = &problem.queries else { panic!("f32") };
    let zeros = Problem { queries: Storage::F32(vec![0.0; queries.len()]), ..problem.clone() };
    let (wanted, wanted_of_zeros) = (wanted(&problem), wanted(&zeros));
    let mut cuda = Cuda::new(0).expect("a device");
    let (mut inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    step(&mut cuda, &problem, &inputs, &mut results);
    assert_same(&results.download(&stream, &wanted), &wanted, "right after the step");
    inputs.clear_queries(&stream);
    step(&mut cuda, &problem, &inputs, &mut results);
    // Waits for the backend's stream alone.
    cuda.fault().expect("valid input");
    assert_same(&results.download(&stream, &wanted_of_zeros), &wanted_of_zeros, "after a write that was queued");
    step(&mut cuda, &problem, &inputs, &mut results);
    drop((inputs, results));
    stream.synchronize().expect("nothing was read or written after it was freed");
    cuda.fault().expect("valid input");
}

/// Memory of the backend's stream, written and read on another one.
fn a_third_stream_is_ordered_by_events() {
    let (problem, context) = (problem(), context());
    let wanted = wanted(&problem);
    let (own, third) = (context.new_stream().expect("a stream"), context.new_stream().expect("a stream"));
    let mut cuda = Cuda::on_stream(own.clone()).expect("a device");
    let (mut inputs, mut results) = (OnDevice::new(&own, &problem), Results::new(&own, &problem));
    let Storage::F32(queries) = &problem.queries else { panic!("f32") };
    inputs.write_queries(&own, &vec![0.0; queries.len()]);
    own.synchronize().expect("zeros are up");
    inputs.write_queries(&third, queries);
    step(&mut cuda, &problem, &inputs, &mut results);
    inputs.write_queries(&third, &vec![f32::NAN; queries.len()]);
    third.synchronize().expect("written after the step");
    assert_same(&results.download(&third, &wanted), &wanted, "on a third stream");
}

const NOTED: DriverError = DriverError(CUresult::CUDA_ERROR_NOT_FOUND);

/// As a `drop` that failed notes it.
fn an_error_that_cudarc_noted_stays_its_own() {
    let (problem, context) = (problem(), context());
    let (stream, own) = (context.new_stream().expect("a stream"), context.new_stream().expect("a stream"));
    let mut cuda = Cuda::on_stream(own).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let wanted = wanted(&problem);
    context.record_err::<()>(Err(NOTED));
    step(&mut cuda, &problem, &inputs, &mut results);
    cuda.fault().expect("valid input");
    assert_eq!(context.check_err(), Err(NOTED), "cudarc's next call returns it");
    assert_same(&results.download(&stream, &wanted), &wanted, "in the order of the streams all the same");

    context.record_err::<()>(Err(NOTED));
    assert_same(&from_host(&mut cuda, &problem), &wanted, "from host memory");
    Cuda::on_stream(cuda.stream().clone()).expect("opened before");
    assert_eq!(context.check_err(), Err(NOTED));
}

fn memory_is_freed_after_an_error_that_cudarc_noted() {
    let (problem, context) = (problem(), context());
    let stream = context.new_stream().expect("a stream");
    // The same device, in an object that has noted nothing.
    let observer = CudaContext::new(0).expect("a device");
    let free = || {
        observer.synchronize().expect("the device works");
        observer.mem_get_info().expect("the device works").0
    };
    let before = free();
    let mut cuda = Cuda::on_stream(stream).expect("a device");
    from_host(&mut cuda, &problem);
    let queue = DeviceQueue::new(&cuda, QueueOptions::new(1000, 16, DType::F32)).expect("memory");
    assert!(free() + cuda.device_bytes() + queue.device_bytes() <= before);
    context.record_err::<()>(Err(NOTED));
    drop((queue, cuda));
    assert_eq!(free(), before);
}

/// Made with one backend, filled by a second, read by a third, and dropped with everything queued.
fn a_queue_is_ordered_between_backends() {
    let problem =
        Config { pools: vec![90, 30], frozen: 0b10, masking: Masking::Ids, ..Config::new(40, 1, 16) }.problem();
    let wanted = wanted(&problem);
    let own = Problem { pools: vec![problem.pools[0].clone()], ..problem.clone() };
    let stream = context().new_stream().expect("a stream");
    let [first, second, mut third] = [(); 3].map(|()| Cuda::new(0).expect("a device"));
    let (inputs, mut results) = (OnDevice::new(&stream, &own), Results::new(&stream, &problem));
    // On a stream of its own, so that no order comes from there.
    let other = context().new_stream().expect("a stream");
    let rows = OnDevice::new(&other, &Problem { pools: vec![problem.pools[1].clone()], ..problem.clone() });
    let mut queue = DeviceQueue::new(&first, QueueOptions::new(30, 16, DType::F32).with_ids()).expect("memory");
    queue.enqueue(&second, &pool(&rows, 16)).expect("rows that fit");
    let batch = inputs.batch(&own).pool(queue.pools().next().expect("rows in it"));
    third.compute_on_device(&batch, &problem.loss, &mut results.output(everything())).expect("a loss that fits");
    let more = OnDevice::new(&other, &own);
    queue.enqueue(&second, &pool(&more, 16)).expect("rows that fit");
    drop((queue, rows, more, inputs, first));
    assert_same(&results.download(&stream, &wanted), &wanted, "with the rows that were there at the step");
    third.fault().expect("valid input");
}

fn a_graph_outlives_larger_steps() {
    let (small, large) = (problem(), Config::new(200, 300, 32).problem());
    let stream = context().new_stream().expect("a stream");
    let mut cuda = Cuda::new(0).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &small), Results::new(&stream, &small));
    let (large_inputs, mut large_results) = (OnDevice::new(&stream, &large), Results::new(&stream, &large));
    let graph = cuda.capture(&inputs.batch(&small), &small.loss, &mut results.output(everything())).expect("a graph");
    let (wanted, large_wanted) = (wanted(&small), wanted(&large));
    for round in 0..2 {
        let what = format!("round {round}");
        stream.memset_zeros(&mut results.total).expect("the stream works");
        stream.memset_zeros(&mut results.d_queries).expect("the stream works");
        cuda.replay(&graph, &inputs.batch(&small), &mut results.output(everything())).expect("the graph's memory");
        step(&mut cuda, &large, &large_inputs, &mut large_results);
        assert_same(&results.download(&stream, &wanted), &wanted, &what);
        assert_same(&large_results.download(&stream, &large_wanted), &large_wanted, &what);
        assert!(graph.device_bytes() < cuda.device_bytes(), "the workspace has moved");
    }
    cuda.replay(&graph, &inputs.batch(&small), &mut results.output(everything())).expect("the graph's memory");
    drop((inputs, results, cuda, graph));
    stream.synchronize().expect("nothing was used after it was freed");
}

fn a_graph_runs_on_its_memory_alone() {
    let (problem, stream) = (problem(), context().new_stream().expect("a stream"));
    let (mut cuda, mut other) = (Cuda::new(0).expect("a device"), Cuda::new(0).expect("a device"));
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let (more_inputs, mut more_results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let (batch, more) = (inputs.batch(&problem), more_inputs.batch(&problem));
    let graph = cuda.capture(&batch, &problem.loss, &mut results.output(everything())).expect("a graph");
    let refused = |replayed: catalog_softmax::Result<()>| replayed.expect_err("refused").to_string();
    let error = refused(cuda.replay(&graph, &more, &mut results.output(everything())));
    assert!(error.starts_with("batch is other memory"), "{error}");
    let error = refused(cuda.replay(&graph, &batch, &mut more_results.output(everything())));
    assert!(error.starts_with("output is other places"), "{error}");
    let error = refused(cuda.replay(&graph, &batch, &mut results.output(Request::value())));
    assert!(error.starts_with("output is other places"), "{error}");
    let error = refused(other.replay(&graph, &batch, &mut results.output(everything())));
    assert!(error.starts_with("graph is of another backend"), "{error}");
    cuda.fault().expect("nothing was submitted");
}

/// With an error, and without harm to the capture.
fn a_capture_by_the_caller_is_refused() {
    let (problem, context) = (problem(), context());
    // SAFETY: everything here is on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let mut cuda = Cuda::on_stream(stream.clone()).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let options = QueueOptions::new(30, 16, DType::F32).with_ids();
    let mut queue = DeviceQueue::new(&cuda, options).expect("memory");
    queue.enqueue(&cuda, &pool(&inputs, 16)).expect("rows that fit");
    stream.synchronize().expect("the rows are there");
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a stream of its own");
    let host = problem.batch().expect("a valid problem");
    let (batch, mut output) = (inputs.batch(&problem), results.output(everything()));
    let attempts = [
        cuda.compute_on_device(&batch, &problem.loss, &mut output),
        cuda.capture(&batch, &problem.loss, &mut output).map(drop),
        queue.enqueue(&cuda, &pool(&inputs, 16)),
        queue.to_host().map(drop),
        DeviceQueue::new(&cuda, options).map(drop),
        cuda.value(&host, &problem.loss).map(drop),
        cuda.fault(),
    ];
    for (i, attempt) in attempts.into_iter().enumerate() {
        let error = attempt.expect_err("refused").to_string();
        assert!(error.starts_with("the stream is being captured"), "attempt {i}: {error}");
    }
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    stream.end_capture(flags).expect("the capture is as it was");
    drop(output);
    step(&mut cuda, &problem, &inputs, &mut results);
    cuda.fault().expect("valid input");
}

/// A slice was written by a stream that is being captured, so that whoever waits for that becomes part of the capture.
fn a_capture_that_reaches_the_backend_is_refused() {
    let (problem, context) = (problem(), context());
    let (stream, third) = (context.new_stream().expect("a stream"), context.new_stream().expect("a stream"));
    let mut cuda = Cuda::on_stream(stream.clone()).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    // So that there is nothing left to allocate, which a capture refuses.
    step(&mut cuda, &problem, &inputs, &mut results);
    // SAFETY: nothing reads it. cudarc has no events of it to wait for, which the capture would refuse.
    results.total = unsafe { stream.alloc(1) }.expect("memory");
    third.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a stream of its own");
    third.memset_zeros(&mut results.total).expect("it can be captured");
    // Nothing but the capture: a wait for any other event after it would be refused.
    let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut results.total));
    let stepped = cuda.compute_on_device(&inputs.batch(&problem), &problem.loss, &mut output);
    let error = stepped.expect_err("refused").to_string();
    assert!(error.starts_with("the stream is being captured"), "{error}");
}

fn memory_of_another_context_is_refused() {
    let (problem, device) = (problem(), context().cu_device());
    let mut handle = std::ptr::null_mut();
    // SAFETY: `handle` has room for what the driver writes, and parameters are optional.
    let made = unsafe { cuCtxCreate_v4(&raw mut handle, std::ptr::null_mut(), 0, device) };
    made.result().expect("a second context");
    // SAFETY: the context was just made, on that device, and is not used but through cudarc.
    let other = unsafe { CudaContext::from_raw_context(0, device, handle) }.expect("a context");
    let stream = other.new_stream().expect("a stream");
    let mut cuda = Cuda::new(0).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let stepped = cuda.compute_on_device(&inputs.batch(&problem), &problem.loss, &mut results.output(everything()));
    let error = stepped.expect_err("refused").to_string();
    assert!(error.starts_with("the CUDA context of queries is another one"), "{error}");
}

fn an_allowed_capture_outlives_larger_steps() {
    let (small, large, context) = (problem(), Config::new(200, 300, 32).problem(), context());
    // SAFETY: everything here is on one stream. Events that cudarc would wait for break a capture.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().expect("a stream");
    let mut cuda = Cuda::on_stream(stream.clone()).expect("a device");
    // SAFETY: the graph runs before `cuda` and its memory are dropped, on the same stream.
    unsafe { cuda.allow_capture() };
    let (inputs, mut results) = (OnDevice::new(&stream, &small), Results::new(&stream, &small));
    let (large_inputs, mut large_results) = (OnDevice::new(&stream, &large), Results::new(&stream, &large));
    let wanted = wanted(&small);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a stream of its own");
    let early = cuda.compute_on_device(&inputs.batch(&small), &small.loss, &mut results.output(everything()));
    assert!(matches!(early, Err(Error::Value { .. })), "memory is reserved before a capture: {early:?}");
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    stream.end_capture(flags).expect("the capture is as it was");

    cuda.reserve(&inputs.batch(&small), &small.loss, everything()).expect("memory");
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a stream of its own");
    step(&mut cuda, &small, &inputs, &mut results);
    let graph = stream.end_capture(flags).expect("a graph").expect("with nodes");
    step(&mut cuda, &large, &large_inputs, &mut large_results);
    graph.launch().expect("the graph runs");
    cuda.fault().expect("valid input");
    assert_same(&results.download(&stream, &wanted), &wanted, "after a larger step");
}

fn streams_that_differ_by_thread_are_refused() {
    let (problem, context) = (problem(), context());
    let stream = context.per_thread_stream();
    let error = Cuda::on_stream(stream.clone()).expect_err("refused").to_string();
    assert!(error.starts_with("stream is the per-thread default stream"), "{error}");
    let mut cuda = Cuda::new(0).expect("a device");
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let stepped = cuda.compute_on_device(&inputs.batch(&problem), &problem.loss, &mut results.output(everything()));
    let error = stepped.expect_err("refused").to_string();
    assert!(error.starts_with("the stream of queries is the per-thread default stream"), "{error}");
}

/// Copies from pinned memory read it when the stream has come there. What fails between the copies and the wait for
/// them is the tensor map of a row stride of 2^40 elements, which only the kernels for compute capability 9.0 need.
fn pinned_memory_outlives_the_copies_of_a_failed_step() {
    let (context, dim) = (context(), 64);
    let mut cuda = Cuda::new(0).expect("a device");
    // SAFETY: all of it is written before it is read.
    let mut pinned = unsafe { context.alloc_pinned::<f16>(dim) }.expect("memory of the host");
    pinned.as_mut_slice().expect("nothing is queued").fill(f16::ONE);
    let candidates = vec![f16::ONE; 100 * dim];
    let queries = Embeddings::new(pinned.as_slice().expect("nothing is queued"), 1, dim).with_stride(1 << 40);
    let batch = Batch::builder(queries, Embeddings::new(&candidates[..], 100, dim)).positives(&[0u32][..]);
    let value = cuda.value(&batch.build().expect("a valid batch"), &Loss::softmax(Similarity::Dot, 1.0));
    let hopper = context.compute_capability().expect("the device works") == (9, 0);
    assert_eq!(value.is_err(), hopper, "a step that fails half-way");
    // SAFETY: the stream is live.
    let idle = unsafe { cuStreamQuery(cuda.stream().cu_stream()) };
    assert_eq!(idle, CUresult::CUDA_SUCCESS, "no copy is left in the stream");
    drop(pinned);
    cuda.fault().expect("nothing was read after it was freed");
}

/// Memory that was freed in the order of a stream that has not come there counts as used.
fn memory_that_will_be_free_is_waited_for() {
    const NEEDED: usize = 64 << 20;
    let stream = context().new_stream().expect("a stream");
    let mut cuda = Cuda::new(0).expect("a device");
    let problem = problem();
    from_host(&mut cuda, &problem);
    let (free, _) = context().mem_get_info().expect("the device works");
    let options = QueueOptions::new(NEEDED / 4096, 1024, DType::F32);
    let most = stream.alloc_zeros::<u8>(free - NEEDED / 2).expect("memory");
    match DeviceQueue::new(&cuda, options) {
        Err(Error::DeviceMemory { needed, free }) => assert!(needed == NEEDED && free < NEEDED, "{needed}, {free}"),
        other => panic!("{other:?}"),
    }
    from_host(&mut cuda, &problem);
    drop(most);
    DeviceQueue::new(&cuda, options).expect("what was freed can be had");
}
