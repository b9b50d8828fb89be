//! The one way in which the GPU tests open backends. `GPU_TESTS_HOPPER=0` then holds for all of them: a test that compares
//! two backends bit by bit compares the same kernels.

use std::sync::Arc;

use catalog_softmax::{Cuda, Error};
use cudarc::driver::{CudaContext, CudaStream};

/// A backend of its own, on a stream of its own.
pub fn backend() -> Result<Cuda, Error> {
    Cuda::new(0).map(as_asked)
}

/// A backend on a new stream, with cudarc's event tracking on, as in a context that a user makes.
pub fn on_stream() -> (Arc<CudaStream>, Cuda) {
    on_stream_of(&CudaContext::new(0).expect("opened before"))
}

/// The same for a test that captures a step: events that cudarc would wait for break a capture.
pub fn on_stream_for_capture() -> (Arc<CudaStream>, Cuda) {
    let context = CudaContext::new(0).expect("opened before");
    // SAFETY: everything that uses this context's memory is on the one stream made here.
    unsafe { context.disable_event_tracking() };
    on_stream_of(&context)
}

/// A further stream of a context, with a backend.
pub fn on_stream_of(context: &Arc<CudaContext>) -> (Arc<CudaStream>, Cuda) {
    let stream = context.new_stream().expect("a stream");
    let cuda = Cuda::on_stream(stream.clone()).expect("opened before");
    (stream, as_asked(cuda))
}

fn as_asked(mut cuda: Cuda) -> Cuda {
    cuda.allow_hopper(std::env::var("GPU_TESTS_HOPPER").map_or(true, |value| value != "0"));
    cuda
}
