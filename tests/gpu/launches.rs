//! What a step costs the host: how many kernels it launches, and that it allocates nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use catalog_softmax::{Correction, Cuda, DType, Reduction, Request};

use crate::open::{on_stream, on_stream_for_capture};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::on_device::{OnDevice, Results};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator, which counts what each thread allocates. The driver has its own.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all work is the system allocator's; a counter without a destructor is always there and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's memory, which `alloc` took from the same allocator.
        unsafe { System.dealloc(memory, layout) }
    }
}

fn allocations(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

/// In-batch negatives: the batch's own candidates, positives by index, accidental hits masked by id.
fn in_batch(dtype: DType, dim: usize, reduction: Reduction) -> Config {
    Config { dtype, reduction, masking: Masking::Ids, weights: true, pools: vec![150], ..Config::new(150, 1, dim) }
}

/// Portable kernels and Hopper's, for rows that they take in one pass.
pub fn a_step_is_eight_launches_and_allocates_nothing_on_the_host(_: &mut Cuda) {
    for (dtype, dim) in [(DType::F32, 33), (DType::F16, 64), (DType::Bf16, 256)] {
        for reduction in [Reduction::Mean, Reduction::WeightedMean] {
            let problem = in_batch(dtype, dim, reduction).problem();
            let (stream, mut on_device) = on_stream_for_capture();
            let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
            let (batch, mut output) = (inputs.batch(&problem), results.output(Request::value_and_grad()));
            let graph = on_device.capture(&batch, &problem.loss, &mut output).expect("a step can be captured");
            assert_eq!(on_device.launches(), 8, "{dtype:?}, {reduction:?}: kernels of a graph");
            // cudarc looks up a function of the driver at its first call.
            on_device.replay(&graph, &batch, &mut output).expect("the graph runs");
            let step = allocations(|| {
                on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits")
            });
            assert_eq!(on_device.launches(), 16, "{dtype:?}, {reduction:?}: kernels of a step");
            let replay = allocations(|| on_device.replay(&graph, &batch, &mut output).expect("the graph runs"));
            assert_eq!((step, replay), (0, 0), "{dtype:?}, {reduction:?}: allocations of a step and of a replay");
            on_device.fault().expect("valid input");
        }
    }
}

/// With cudarc's events, two pools, exclusions and everything that can be asked for.
pub fn other_steps_allocate_nothing_on_the_host_either(_: &mut Cuda) {
    let base = in_batch(DType::F32, 17, Reduction::Mean);
    let value_and_grad = Request::value_and_grad();
    let everything = value_and_grad.with_moments().with_rank();
    let pools = Config {
        pools: vec![90, 40],
        masking: Masking::Excluded,
        correction: Correction::LogQ,
        separate: true,
        ..base.clone()
    };
    let symmetric = Config { symmetric: true, ..base.clone() };
    let cases = [
        ("a value", base.clone(), Request::value(), 7),
        ("moments and ranks", base.clone(), everything, 9),
        ("no mask", Config { masking: Masking::None, separate: true, ..base }, value_and_grad, 7),
        ("two pools", pools, value_and_grad, 13),
        ("symmetric", symmetric, value_and_grad, 17),
    ];
    for (what, config, request, launches) in cases {
        let problem = config.problem();
        let (stream, mut on_device) = on_stream();
        let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
        let (batch, mut output) = (inputs.batch(&problem), results.output(request));
        on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits");
        assert_eq!(on_device.launches(), launches, "{what}");
        let again =
            allocations(|| on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits"));
        assert_eq!(again, 0, "{what}");
        on_device.fault().expect("valid input");
    }
}
