//! Calls of the driver about contexts, streams and their order.
//!
//! They go to the driver itself: cudarc's own begin with `bind_to_thread`, which returns an error that cudarc noted in
//! an earlier `drop` and then does nothing.

use std::sync::{Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use crate::error::{Error, Result, value};

/// A driver call's result as the crate's own error. (Formatting cudarc's would call the driver again.)
pub(super) fn checked<T>(call: &'static str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|DriverError(code)| Error::Driver { call, code: code as i32 })
}

/// The handle of the per-thread default stream means another stream on each thread, so nothing can be ordered by it.
pub(super) const PER_THREAD_RULE: &str = "a stream that is the same one on every thread";

pub(super) fn is_per_thread(stream: &CudaStream) -> bool {
    const CU_STREAM_PER_THREAD: usize = 2;
    stream.cu_stream().addr() == CU_STREAM_PER_THREAD
}

pub(super) fn bind(context: &CudaContext) -> Result<()> {
    // SAFETY: the context is live.
    checked("cuCtxSetCurrent", unsafe { result::ctx::set_current(context.cu_ctx()) })
}

pub(super) fn synchronize(stream: &CudaStream) -> Result<()> {
    // SAFETY: the stream is live.
    checked("cuStreamSynchronize", unsafe { result::stream::synchronize(stream.cu_stream()) })
}

pub(super) fn is_capturing(stream: sys::CUstream) -> Result<bool> {
    // SAFETY: the stream is live.
    let status = checked("cuStreamIsCapturing", unsafe { result::stream::is_capturing(stream) })?;
    Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

pub(super) fn captured() -> Error {
    value("the stream", "being captured", "not being captured, except by Cuda::capture or after Cuda::allow_capture")
}

/// An event that makes one stream wait for another.
#[derive(Debug)]
pub(super) struct Event(Mutex<Handle>);

#[derive(Debug)]
struct Handle(sys::CUevent);

// SAFETY: an event is a handle that any thread may use with its context bound.
unsafe impl Send for Handle {}

impl Event {
    /// In the context that is bound.
    pub(super) fn new() -> Result<Self> {
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Event(Mutex::new(Handle(checked("cuEventCreate", event)?))))
    }

    /// Makes what `waiting` is given from now on come after what `first` was given until now. All three are of the
    /// context that is bound.
    pub(super) fn order(&self, first: &CudaStream, waiting: &CudaStream) -> Result<()> {
        // Locked: between the two calls another thread would record another stream's work.
        let event = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the event and the stream are live.
        checked("cuEventRecord", unsafe { result::event::record(event.0, first.cu_stream()) })?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: as above.
        checked("cuStreamWaitEvent", unsafe { result::stream::wait_event(waiting.cu_stream(), event.0, flags) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let event = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the event is destroyed once. An error is that of a context that is gone, and the event with it.
        let _ = unsafe { result::event::destroy(event.0) };
    }
}
