//! Steps in settings other than the usual one: rows with gaps, foreign addresses, several streams and threads, too little memory,
//! and devices and drivers that are refused.

use std::process::Command;

use catalog_softmax::cuda::{
    Cuda, DeviceBatch, DeviceEmbeddings, DeviceOutput, DevicePool, DeviceSlice, DeviceSliceMut,
};
use catalog_softmax::{Correction, DType, Error, Unavailable};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, DevicePtrMut};

use super::open::{on_stream, on_stream_of};
use super::steps::{assert_same, everything, from_host};
use crate::check_what_is_there;
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::on_device::{DeviceStorage, OnDevice, Results, up};
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::step::Step;
use catalog_softmax_testing::tolerance::Expected;

/// Exclusions, log_q, two pools: every input that a step may have but weights and separate positives.
fn problem(b: usize, dim: usize, dtype: DType) -> Problem {
    let masking = Masking::Excluded;
    Config { dtype, masking, correction: Correction::LogQ, pools: vec![90, 40], ..Config::new(b, 1, dim) }.problem()
}

/// The elements between rows are NaN. Gaps decide which kernel takes the rows, so that the reference is the measure.
pub fn strided_rows_give_what_contiguous_ones_give(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for (dim, padding, separate) in [(33, 1, false), (20, 3, true), (24, 8, false), (64, 64, true), (264, 8, false)]
        {
            let config = Config {
                dtype,
                separate,
                masking: Masking::Ids,
                correction: Correction::LogQ,
                ..Config::new(70, 200, dim)
            };
            let problem = config.problem();
            let like = from_host(cuda, &problem);
            let (inputs, mut results) = (OnDevice::padded(&stream, &problem, padding), Results::new(&stream, &problem));
            let mut output = results.output(everything());
            on_device.compute_on_device(&inputs.batch(&problem), &problem.loss, &mut output).expect("a loss that fits");
            drop(output);
            on_device.fault().expect("valid input");
            let found = results.download(&stream, &like);
            check_what_is_there(&Expected::new(&problem, dtype), &found)
                .unwrap_or_else(|error| panic!("{dtype:?}, dim {dim}, padding {padding}: {error}"));
        }
    }
}

/// A view of a slice by its address alone.
fn raw<'a, T>(stream: &CudaStream, slice: &'a CudaSlice<T>) -> DeviceSlice<'a, T> {
    let (address, _guard) = slice.device_ptr(stream);
    // SAFETY: the slice's own address and length, on the one stream of the test, which keeps the slice to its end.
    unsafe { DeviceSlice::from_raw(address, slice.len()) }
}

fn raw_mut<'a, T>(stream: &CudaStream, slice: &'a mut CudaSlice<T>) -> DeviceSliceMut<'a, T> {
    let len = slice.len();
    let (address, _guard) = slice.device_ptr_mut(stream);
    // SAFETY: as in `raw`, and the slice is borrowed for writing.
    unsafe { DeviceSliceMut::from_raw(address, len) }
}

/// Inputs and outputs as another library would hand them over.
pub fn addresses_of_another_library_do(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let problem = Config { masking: Masking::None, ..Config::new(50, 120, 24) }.problem();
    let wanted = from_host(cuda, &problem);
    let inputs = OnDevice::new(&stream, &problem);
    let (DeviceStorage::F32(queries), DeviceStorage::F32(candidates)) = (&inputs.queries, &inputs.pools[0].0) else {
        panic!("f32")
    };
    let positives = inputs.positives.as_ref().ok().expect("by index");
    let pool = DevicePool::new(DeviceEmbeddings::new(raw(&stream, candidates), 120, 24));
    let queries = DeviceEmbeddings::new(raw(&stream, queries), 50, 24);
    let batch = DeviceBatch::new(queries, pool).positives(raw(&stream, positives));
    let (mut total, mut loss) = (up(&stream, &[f64::NAN]), up(&stream, &[f64::NAN; 50]));
    let mut output = DeviceOutput::new(raw_mut(&stream, &mut total));
    output.loss = Some(raw_mut(&stream, &mut loss));
    on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits");
    drop(output);
    on_device.fault().expect("valid input");
    let found = [stream.clone_dtoh(&total), stream.clone_dtoh(&loss)].map(|down| down.expect("results come down"));
    for (found, wanted) in found.concat().iter().zip(std::iter::once(&wanted.total).chain(&wanted.loss)) {
        assert!((found - wanted).abs() <= 1e-6 * wanted.abs().max(1.0), "{found}, from host memory {wanted}");
    }
}

/// Steps of two backends go to two streams before anything waits for either.
pub fn two_streams_do_not_meet(cuda: &mut Cuda) {
    let context = CudaContext::new(0).expect("opened before");
    let problems = [problem(70, 24, DType::F32), problem(130, 64, DType::F16)];
    let wanted = problems.each_ref().map(|problem| from_host(cuda, problem));
    let mut sides = [on_stream_of(&context), on_stream_of(&context)];
    let inputs = [0, 1].map(|side| OnDevice::new(&sides[side].0, &problems[side]));
    let mut results = [0, 1].map(|side| Results::new(&sides[side].0, &problems[side]));
    for _ in 0..3 {
        for (side, (_, on_device)) in sides.iter_mut().enumerate() {
            let mut output = results[side].output(everything());
            let batch = inputs[side].batch(&problems[side]);
            on_device.compute_on_device(&batch, &problems[side].loss, &mut output).expect("a loss that fits");
        }
    }
    for (side, (stream, on_device)) in sides.iter_mut().enumerate() {
        on_device.fault().expect("valid input");
        assert_same(&results[side].download(stream, &wanted[side]), &wanted[side], &format!("stream {side}"));
    }
}

fn steps(stream: &std::sync::Arc<CudaStream>, cuda: &mut Cuda, problem: &Problem, like: &Step) -> Step {
    let (inputs, mut results) = (OnDevice::new(stream, problem), Results::new(stream, problem));
    for _ in 0..3 {
        let mut output = results.output(everything());
        cuda.compute_on_device(&inputs.batch(problem), &problem.loss, &mut output).expect("a loss that fits");
    }
    cuda.fault().expect("valid input");
    results.download(stream, like)
}

/// A backend that was made here works there, beside another one that was made there.
pub fn two_threads_do_not_meet(cuda: &mut Cuda) {
    let problems = [problem(70, 24, DType::F32), problem(130, 64, DType::F16)];
    let wanted = problems.each_ref().map(|problem| from_host(cuda, problem));
    let (stream, mut made_here) = on_stream();
    let found = std::thread::scope(|scope| {
        let one = scope.spawn(|| steps(&stream, &mut made_here, &problems[0], &wanted[0]));
        let other = scope.spawn(|| {
            let (stream, mut made_there) = on_stream();
            steps(&stream, &mut made_there, &problems[1], &wanted[1])
        });
        [one, other].map(|thread| thread.join().expect("a thread's steps"))
    });
    for side in [0, 1] {
        assert_same(&found[side], &wanted[side], &format!("thread {side}"));
    }
}

/// A step that needs more than there is says so, and changes nothing: a small one works before and after, and the large one
/// where there is room. On an emulated device, whose memory nobody else takes.
pub fn too_little_memory_is_an_error_and_no_more(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let problems = [problem(30, 8, DType::F32), Config::new(150, 300, 64).problem()];
    let wanted = problems.each_ref().map(|problem| from_host(cuda, problem));
    let inputs = problems.each_ref().map(|problem| OnDevice::new(&stream, problem));
    let mut results = problems.each_ref().map(|problem| Results::new(&stream, problem));
    let plan = |side: usize| {
        on_device.plan_on_device(&inputs[side].batch(&problems[side]), &problems[side].loss, everything())
    };
    let [small, large] = [plan(0), plan(1)].map(|plan| plan.expect("a loss that fits").workspace_bytes);
    let left = (small + large) / 2;
    assert!(small < left && left < large, "a case for the test: {small}, {large}");
    stream.synchronize().expect("inputs are up");
    let (free, _) = stream.context().mem_get_info().expect("a number of bytes");
    // SAFETY: nobody reads it.
    let taken = unsafe { stream.alloc::<u8>(free - left) }.expect("what was free");
    let mut output = results[1].output(everything());
    match on_device.compute_on_device(&inputs[1].batch(&problems[1]), &problems[1].loss, &mut output) {
        Err(Error::DeviceMemory { needed, free }) => assert!(needed == large && free <= left, "{needed}, {free}"),
        other => panic!("{other:?}"),
    }
    drop(output);
    let mut check = |side: usize| {
        let mut output = results[side].output(everything());
        let batch = inputs[side].batch(&problems[side]);
        on_device.compute_on_device(&batch, &problems[side].loss, &mut output).expect("a loss that fits");
        drop(output);
        on_device.fault().expect("valid input");
        assert_same(&results[side].download(&stream, &wanted[side]), &wanted[side], &format!("problem {side}"));
    };
    check(0);
    drop(taken);
    stream.synchronize().expect("the memory is free");
    check(1);
    check(0);
}

/// What these tests print first in a process of which the device is another one.
fn first_line(variable: &str, value: &str) -> String {
    let tests = std::env::current_exe().expect("a test has a path");
    let mut child = Command::new(tests);
    child.args(["--exact", "none of the tests"]).env(variable, value).env_remove("REQUIRE_GPU");
    let output = child.output().expect("the tests start");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()
}

fn ignored(reason: Unavailable) -> String {
    format!("gpu tests are ignored: {}", Error::DeviceUnavailable { device: "cuda:0".to_owned(), reason })
}

/// On an emulated device, which is what the environment says.
pub fn a_device_of_too_low_capability_is_refused(_: &mut Cuda) {
    let reason = Unavailable::ComputeCapability { major: 7, minor: 5 };
    assert_eq!(first_line("CUDA_EMULATOR_CC", "75"), ignored(reason));
}

/// On an emulated device, which is what the environment says.
pub fn an_old_driver_is_refused(_: &mut Cuda) {
    let wanted = ignored(Unavailable::DriverTooOld { found: 11020, needed: 0 });
    let wanted = wanted.strip_suffix('0').expect("it ends with what is needed");
    let found = first_line("CUDA_EMULATOR_DRIVER", "11020");
    assert!(found.starts_with(wanted) && found.len() > wanted.len(), "{found}, not {wanted}...");
}
