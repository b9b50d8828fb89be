//! A device with the crate's kernels loaded, and a stream on it. Launches and copies go through here.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{CudaContext, CudaStream, result, sys};

use super::kernels::{ENTRIES, Kernel, Variant};
use super::loaded::Loaded;
use super::params::{HELD, Params};
use super::problem::Rows;
use super::stream::{PER_THREAD_RULE, bind, captured, checked, is_capturing, is_per_thread, synchronize};
use crate::error::{Result, value};
use crate::problem::embeddings::DType;

/// Threads in a block of every kernel but Hopper's streams.
pub(super) const THREADS: u32 = 256;
pub(super) const HOPPER_THREADS: u32 = 384;

/// The device's limits, on which plans depend.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) multiprocessors: usize,
    /// Bytes of shared memory that a block can have.
    pub(super) shared_bytes: usize,
    /// Whether the kernels for compute capability 9.0 are built in and allowed.
    pub(super) hopper: bool,
}

/// A backend's stream and the kernels that it runs. Things that may outlive the backend (a graph, a queue's memory)
/// keep a clone.
#[derive(Debug, Clone)]
pub(super) struct Driver {
    loaded: Arc<Loaded>,
    /// The backend's stream.
    stream: Arc<CudaStream>,
    /// Where work is submitted: the backend's stream, or one that captures a graph.
    target: sys::CUstream,
    /// Whether the caller may capture the backend's stream ([`Cuda::allow_capture`](super::Cuda::allow_capture)).
    pub(super) capture_allowed: bool,
    pub(super) limits: Limits,
}

// SAFETY: streams, modules and functions are handles that any thread may use with the context bound, which `bind` does.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver's calls are thread-safe.
unsafe impl Sync for Driver {}
/// Blocks and shared memory of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub(super) blocks: (u32, u32, u32),
    pub(super) shared_bytes: usize,
}

impl Grid {
    /// A thread for each of `count` items.
    pub(super) fn threads(count: usize) -> Self {
        Grid { blocks: (count.div_ceil(THREADS as usize) as u32, 1, 1), shared_bytes: 0 }
    }

    /// As many lanes for each of `rows` as `lanes.cuh` gives rows of `dim` elements.
    pub(super) fn rows(rows: usize, dim: usize) -> Self {
        let lanes = [8, 16].into_iter().find(|lanes| dim <= lanes * HELD as usize).unwrap_or(32);
        Grid { blocks: (rows.div_ceil(THREADS as usize / lanes) as u32, 1, 1), shared_bytes: 0 }
    }

    /// A warp for each of `rows`.
    pub(super) fn warps(rows: usize) -> Self {
        Grid { blocks: (rows.div_ceil(THREADS as usize / 32) as u32, 1, 1), shared_bytes: 0 }
    }
}

impl Driver {
    /// Opens a device that `probe` found, with a stream of its own.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let context = checked("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal))?;
        Self::on_stream(checked("cuStreamCreate", context.new_stream())?)
    }

    /// Loads the kernels into a stream's context.
    pub(super) fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        if is_per_thread(&stream) {
            return Err(value("stream", "the per-thread default stream", PER_THREAD_RULE));
        }
        use sys::CUdevice_attribute as Attribute;
        let device = stream.context().cu_device();
        // SAFETY: the device is that of a live context.
        let attribute = |which| unsafe { result::device::get_attribute(device, which) };
        let attribute = |which| checked("cuDeviceGetAttribute", attribute(which));
        let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as usize;
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // Only exactly this capability runs them.
        let hopper = (major, minor) == (9, 0)
            && ENTRIES.iter().filter(|entry| entry.is_hopper()).all(|entry| !entry.image.is_empty());
        let limits = Limits { multiprocessors, shared_bytes, hopper };
        let loaded = Loaded::new(stream, shared_bytes, hopper)?;
        let stream = loaded.stream.clone();
        let target = stream.cu_stream();
        Ok(Driver { loaded: Arc::new(loaded), stream, target, capture_allowed: false, limits })
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.loaded.stream.context()
    }

    /// Whether both are clones of one, on one stream.
    pub(super) fn is(&self, other: &Driver) -> bool {
        Arc::ptr_eq(&self.loaded, &other.loaded) && self.stream.cu_stream() == other.stream.cu_stream()
    }

    /// The same kernels on another stream of the context.
    pub(super) fn moved_to(&self, stream: Arc<CudaStream>) -> Self {
        Driver { target: stream.cu_stream(), stream, ..self.clone() }
    }

    /// Before the backend goes to another stream, or goes away: what frees the kernels waits for the stream that they were loaded on,
    /// and this makes that one wait for the stream that is left. What is being captured has not run; its graph is the caller's to
    /// drop first ([`Cuda::allow_capture`](super::Cuda::allow_capture)).
    pub(super) fn leave(&self) -> Result<()> {
        let (left, first) = (&self.stream, &self.loaded.stream);
        if left.cu_stream() == first.cu_stream() || is_capturing(left.cu_stream())? {
            return Ok(());
        }
        self.order(left, first)
    }

    /// Whether the kernels for compute capability 9.0 are used where they are there.
    pub(super) fn allow_hopper(&mut self, allow: bool) {
        self.limits.hopper = allow && self.loaded.hopper;
    }

    /// A matrix of 16-bit elements as the copy engine reads it: in boxes of 128 bytes of each of `box_rows` rows,
    /// swizzled as layout.h says. Elements outside of the matrix are read as zeros.
    pub(super) fn tensor_map(&self, rows: Rows, dim: usize, dtype: DType, box_rows: usize) -> Result<[u64; 16]> {
        use sys::CUtensorMapDataType as Type;
        let data_type = match dtype {
            DType::F16 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::Bf16 => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F32 => unreachable!("Hopper's kernels take 16-bit elements"),
        };
        let (sizes, strides) = ([dim as u64, rows.rows as u64], [(rows.stride * dtype.size()) as u64]);
        let (box_sizes, steps) = ([64, box_rows as u32], [1, 1]);
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // SAFETY: every pointer is to as many numbers as two dimensions need; the driver reads them in the call. The matrix is only
        // addressed by kernels.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                data_type,
                2,
                rows.address as *mut c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        checked("cuTensorMapEncodeTiled", code.result())?;
        Ok(map.opaque)
    }

    /// Makes the context this thread's. Every entry into the backend does it first. cudarc's own `bind_to_thread` would
    /// fail with an error that cudarc noted in an earlier `drop`.
    pub(super) fn bind(&self) -> Result<()> {
        bind(self.context())
    }

    /// Waits for the backend's stream.
    pub(super) fn synchronize(&self) -> Result<()> {
        synchronize(&self.stream)
    }

    /// Waits for the backend's stream when it is dropped: borrowed host memory must outlive the copies from and to it,
    /// however a function that queues them ends.
    pub(super) fn settled(&self) -> Result<Settled> {
        self.bind()?;
        self.refuse_every_capture()?;
        Ok(Settled(self.clone()))
    }

    /// An error while the caller captures `stream`, unless that is allowed: the memory that the graph uses would not be
    /// kept.
    pub(super) fn refuse_capture(&self, stream: &CudaStream) -> Result<()> {
        if self.capture_allowed || !is_capturing(stream.cu_stream())? { Ok(()) } else { Err(captured()) }
    }

    /// An error during a capture for work that a graph cannot hold: an allocation, or a copy from or to host memory.
    pub(super) fn refuse_every_capture(&self) -> Result<()> {
        if is_capturing(self.target)? { Err(captured()) } else { Ok(()) }
    }

    /// Makes later work of `waiting` wait for all work that `first` has been given so far.
    pub(super) fn order(&self, first: &CudaStream, waiting: &CudaStream) -> Result<()> {
        self.loaded.event.order(first, waiting)
    }

    /// The same driver, submitting to another stream.
    pub(super) fn submitting_to(&self, target: sys::CUstream) -> Self {
        Driver { target, ..self.clone() }
    }

    /// Kernels that were launched so far, those of graphs once, when they were captured.
    pub(super) fn launches(&self) -> u64 {
        self.loaded.launches.load(Ordering::Relaxed)
    }

    pub(super) fn launch<P: Params>(&self, kernel: Kernel<P>, variant: Variant, grid: Grid, params: &P) -> Result<()> {
        let (function, threads) = self.loaded.function(kernel, variant);
        self.loaded.launches.fetch_add(1, Ordering::Relaxed);
        let mut params = *params;
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        // SAFETY: every kernel takes one struct by value, of which `params` is the mirror (kernels.rs); it lives until the
        // driver has copied it, which it does before the call returns. That its addresses are live is passes.rs's duty.
        let launched = unsafe {
            result::launch_kernel(
                function,
                grid.blocks,
                (threads, 1, 1),
                grid.shared_bytes as u32,
                self.target,
                &mut arguments,
            )
        };
        checked("cuLaunchKernel", launched)
    }

    /// Sets bytes, in the order of the stream.
    pub(super) fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: `to` has as many bytes: callers fill whole parts.
        checked("cuMemsetD8Async", unsafe { result::memset_d8_async(to, byte, bytes, self.target) })
    }

    /// Copies from memory of the host, which has to stay as it is until the stream has come there (`settled`).
    pub(super) fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.refuse_every_capture()?;
        // SAFETY: `to` has room (memory.rs asserts it); callers keep `bytes` until they have waited.
        checked("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, bytes, self.target) })
    }

    /// Waits for the device.
    pub(super) fn download(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        self.refuse_every_capture()?;
        // SAFETY: `from` holds as many bytes (memory.rs asserts it), and `bytes` is borrowed until the wait below.
        checked("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(bytes, from, self.target) })?;
        self.synchronize()
    }
}

/// See [`Driver::settled`].
#[must_use]
pub(super) struct Settled(Driver);

impl Drop for Settled {
    fn drop(&mut self) {
        // An error here is that of a device that has failed: it copies nothing any more.
        let _ = self.0.synchronize();
    }
}
