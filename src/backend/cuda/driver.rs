//! A device with the crate's kernels loaded, and a stream on it: the only place that calls the driver.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::image;
use super::params::Params;
use super::problem::Rows;
use crate::embeddings::DType;
use crate::error::{Error, Result};

/// Threads in a block of every kernel but Hopper's streams.
pub(super) const THREADS: u32 = 256;
const HOPPER_THREADS: u32 = 384;
const HOPPER_PREFIX: &str = "stream_hopper_";

/// A driver call's result as the crate's own error. (Formatting cudarc's would call the driver again.)
pub(super) fn checked<T>(call: &'static str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|DriverError(code)| Error::Driver { call, code: code as i32 })
}

/// What plans depend on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) multiprocessors: usize,
    /// Bytes of shared memory that a block can have.
    pub(super) shared_bytes: usize,
    /// Whether the kernels for compute capability 9.0 are there, and wanted.
    pub(super) hopper: bool,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    functions: HashMap<&'static str, sys::CUfunction>,
    modules: Vec<sys::CUmodule>,
    pub(super) limits: Limits,
}

// SAFETY: modules and functions are handles that any thread may use with the context bound, which `bind` does.
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

    /// A warp for each of `rows`.
    pub(super) fn warps(rows: usize) -> Self {
        Grid { blocks: (rows.div_ceil(THREADS as usize / 32) as u32, 1, 1), shared_bytes: 0 }
    }
}

macro_rules! names {
    ($($image:ident: $($name:literal),* $(,)?;)*) => {
        &[$((image::$image, &[$(($name, match CStr::from_bytes_with_nul(concat!($name, "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => panic!("kernel names hold no zero"),
        })),*])),*]
    };
}

/// The same for devices of compute capability 9.0.
const HOPPER_KERNELS: &[(&[u8], &[Name])] = names! {
    STATISTICS_SM90A: "stream_hopper_statistics_1_f16", "stream_hopper_statistics_1_bf16", "stream_hopper_statistics_2_f16", "stream_hopper_statistics_2_bf16", "stream_hopper_statistics_4_f16", "stream_hopper_statistics_4_bf16", "stream_hopper_bounded_1_f16", "stream_hopper_bounded_1_bf16", "stream_hopper_bounded_2_f16", "stream_hopper_bounded_2_bf16", "stream_hopper_bounded_4_f16", "stream_hopper_bounded_4_bf16";
    OUTPUT_SM90A: "stream_hopper_expected_1_f16", "stream_hopper_expected_1_bf16", "stream_hopper_expected_2_f16", "stream_hopper_expected_2_bf16", "stream_hopper_expected_4_f16", "stream_hopper_expected_4_bf16", "stream_hopper_gradient_1_f16", "stream_hopper_gradient_1_bf16", "stream_hopper_gradient_2_f16", "stream_hopper_gradient_2_bf16", "stream_hopper_gradient_4_f16", "stream_hopper_gradient_4_bf16", "stream_hopper_bounded_expected_1_bf16", "stream_hopper_bounded_expected_2_bf16", "stream_hopper_bounded_expected_4_bf16";
    WIDE_STATISTICS_SM90A: "stream_hopper_wide_statistics_f16", "stream_hopper_wide_statistics_bf16", "stream_hopper_wide_bounded_f16", "stream_hopper_wide_bounded_bf16";
    WIDE_PANEL_SM90A: "stream_hopper_wide_expected_f16", "stream_hopper_wide_expected_bf16", "stream_hopper_wide_gradient_f16", "stream_hopper_wide_gradient_bf16";
    WIDE_OUTPUT_SM90A: "stream_hopper_wide_output_f16", "stream_hopper_wide_output_bf16";
};

/// A kernel's name, and the same as the driver takes it.
type Name = (&'static str, &'static CStr);

/// Every kernel, by the image that holds it.
const KERNELS: &[(&[u8], &[Name])] = names! {
    ROWS: "row_inverse_norms_f16", "row_inverse_norms_bf16", "row_inverse_norms_f32";
    RESOLVE: "check_offsets", "clear_slots", "insert_pairs", "find_hits";
    TERMS: "candidate_columns", "candidate_rows", "query_rows", "query_columns";
    STREAM_SM80: "stream_statistics_f16", "stream_statistics_bf16", "stream_statistics_f32", "stream_statistics_tf32",
        "stream_detail_f16", "stream_detail_bf16", "stream_detail_f32", "stream_detail_tf32",
        "stream_paired_f16", "stream_paired_bf16", "stream_paired_f32", "stream_paired_tf32",
        "stream_expected_1_f16", "stream_expected_1_bf16", "stream_expected_1_f32", "stream_expected_1_tf32",
        "stream_expected_2_f16", "stream_expected_2_bf16", "stream_expected_2_f32", "stream_expected_2_tf32",
        "stream_expected_4_f16", "stream_expected_4_bf16", "stream_expected_4_f32", "stream_expected_4_tf32",
        "stream_gradient_1_f16", "stream_gradient_1_bf16", "stream_gradient_1_f32", "stream_gradient_1_tf32",
        "stream_gradient_2_f16", "stream_gradient_2_bf16", "stream_gradient_2_f32", "stream_gradient_2_tf32",
        "stream_gradient_4_f16", "stream_gradient_4_bf16", "stream_gradient_4_f32", "stream_gradient_4_tf32";
    POSITIVES: "gather_positives", "query_gradient_f16", "query_gradient_bf16", "query_gradient_f32";
    MERGE: "merge_rows", "merge_expected", "finish_gradient_f16", "finish_gradient_bf16", "finish_gradient_f32";
    TOPK: "stream_topk_f16", "stream_topk_bf16", "stream_topk_f32", "stream_topk_tf32", "merge_topk";
    EPILOGUE: "epilogue", "finish_temperature";
    SYMMETRIC: "swap_positives", "swap_weights", "average_rows", "average_f32", "average_f64";
};

impl Driver {
    /// Opens a device that `probe` found, with a stream of its own.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let context = checked("cuDevicePrimaryCtxRetain", CudaContext::new(ordinal))?;
        Self::on_stream(checked("cuStreamCreate", context.new_stream())?)
    }

    /// Loads the kernels into a stream's context.
    pub(super) fn on_stream(stream: Arc<CudaStream>) -> Result<Self> {
        let context = stream.context().clone();
        let (major, minor) = checked("cuDeviceGetAttribute", context.compute_capability())?;
        use sys::CUdevice_attribute as Attribute;
        let attribute = |which| Ok(checked("cuDeviceGetAttribute", context.attribute(which))? as usize);
        let limits = Limits {
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            // Only exactly this capability runs them.
            hopper: (major, minor) == (9, 0) && HOPPER_KERNELS.iter().all(|(image, _)| !image.is_empty()),
        };
        let mut driver = Driver { context, stream, functions: HashMap::new(), modules: Vec::new(), limits };
        for &(image, names) in KERNELS {
            driver.load_kernels(image, names)?;
        }
        if limits.hopper {
            for &(image, names) in HOPPER_KERNELS {
                driver.load_kernels(image, names)?;
            }
        }
        Ok(driver)
    }

    /// Whether the kernels for compute capability 9.0 are used where they are there.
    pub(super) fn allow_hopper(&mut self, allow: bool) {
        self.limits.hopper = allow && self.functions.keys().any(|name| name.starts_with(HOPPER_PREFIX));
    }

    /// A matrix of 16-bit elements as the copy engine takes it: in boxes of 128 bytes of each of `box_rows` rows, swizzled as
    /// layout.h says, with zeros where there is nothing.
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

    fn load_kernels(&mut self, image: &'static [u8], names: &[Name]) -> Result<()> {
        self.bind()?;
        // SAFETY: a fat binary that nvcc made, aligned, and in the executable for ever.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        let module = checked("cuModuleLoadData", loaded)?;
        self.modules.push(module);
        for &(name, c_name) in names {
            // SAFETY: the module was just loaded and stays so as long as `self`.
            let found = unsafe { result::module::get_function(module, c_name.to_owned()) };
            let function = checked("cuModuleGetFunction", found)?;
            if name.starts_with("stream_") {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is valid, and the value is what the device reports as its limit.
                let set = unsafe {
                    result::function::set_function_attribute(function, attribute, self.limits.shared_bytes as i32)
                };
                checked("cuFuncSetAttribute", set)?;
            }
            self.functions.insert(name, function);
        }
        Ok(())
    }

    /// Makes the context this thread's. Every entry into the backend does it first.
    pub(super) fn bind(&self) -> Result<()> {
        checked("cuCtxSetCurrent", self.context.bind_to_thread())
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        checked("cuStreamSynchronize", self.stream.synchronize())
    }

    pub(super) fn launch<P: Params>(&self, name: &str, grid: Grid, params: &P) -> Result<()> {
        let Some(&function) = self.functions.get(name) else { unreachable!("{name} is in KERNELS") };
        let threads = if name.starts_with(HOPPER_PREFIX) { HOPPER_THREADS } else { THREADS };
        let mut params = *params;
        let mut arguments = [(&raw mut params).cast::<c_void>()];
        // SAFETY: every kernel takes one struct by value, of which `params` is the mirror (params.rs); it lives until the
        // driver has copied it, which it does before the call returns. That its addresses are live is passes.rs's duty.
        let launched = unsafe {
            result::launch_kernel(
                function,
                grid.blocks,
                (threads, 1, 1),
                grid.shared_bytes as u32,
                self.stream.cu_stream(),
                &mut arguments,
            )
        };
        checked("cuLaunchKernel", launched)
    }

    /// Sets bytes, in the order of the stream.
    pub(super) fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: `to` has as many bytes: callers fill whole parts.
        checked("cuMemsetD8Async", unsafe { result::memset_d8_async(to, byte, bytes, self.stream.cu_stream()) })
    }

    /// Copies rows within the device, in the order of the stream: to contiguous ones from ones that lie `stride` bytes apart.
    pub(super) fn copy_rows(&self, to: u64, from: u64, rows: usize, row_bytes: usize, stride: usize) -> Result<()> {
        let stream = self.stream.cu_stream();
        if stride == row_bytes {
            // SAFETY: callers have checked that both places have as many bytes; they are of different allocations.
            let copied = unsafe { result::memcpy_dtod_async(to, from, rows * row_bytes, stream) };
            return checked("cuMemcpyDtoDAsync", copied);
        }
        let device = sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: device,
            srcHost: std::ptr::null(),
            srcDevice: from,
            srcArray: std::ptr::null_mut(),
            srcPitch: stride,
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: device,
            dstHost: std::ptr::null_mut(),
            dstDevice: to,
            dstArray: std::ptr::null_mut(),
            dstPitch: row_bytes,
            WidthInBytes: row_bytes,
            Height: rows,
        };
        // SAFETY: as above; the driver reads `copy` in the call.
        checked("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, stream) }.result())
    }

    pub(super) fn upload(&self, to: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: `to` has room (memory.rs asserts it); from pageable memory the call returns when `bytes` was read.
        checked("cuMemcpyHtoDAsync", unsafe { result::memcpy_htod_async(to, bytes, self.stream.cu_stream()) })
    }

    /// Waits for the device.
    pub(super) fn download(&self, bytes: &mut [u8], from: u64) -> Result<()> {
        // SAFETY: `from` holds as many bytes (memory.rs asserts it), and `bytes` is borrowed until the wait below.
        checked("cuMemcpyDtoHAsync", unsafe { result::memcpy_dtoh_async(bytes, from, self.stream.cu_stream()) })?;
        self.synchronize()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() || self.synchronize().is_err() {
            return;
        }
        for module in self.modules.drain(..) {
            // SAFETY: the module is unloaded once, and the stream that ran its kernels is idle.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
