//! cuBLAS matmuls of bf16 operands: planned once (descriptors, the library's own choice of algorithm), run many times.
//! The library is opened at run time; without it there is a reason in place of a `Cublas`.

use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

/// What NVIDIA recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;

pub struct Cublas {
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    stream: Arc<CudaStream>,
}

/// A side of a product, in column-major order: whether it is transposed, and its leading dimension.
#[derive(Clone, Copy)]
pub struct Side {
    pub transposed: bool,
    pub leading: usize,
}

/// `c (m, n) = alpha op(a) (m, k) op(b) (k, n) + beta c`, column-major, sums in f32.
pub struct Matmul {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Cublas {
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, String> {
        // SAFETY: opening NVIDIA's library runs its initialisers, which expect nothing of this process.
        if !unsafe { sys::is_culib_present() } {
            return Err(
                "libcublasLt is not found (it comes with the CUDA toolkit and with PyTorch; see LD_LIBRARY_PATH)"
                    .into(),
            );
        }
        let handle = result::create_handle().map_err(|error| format!("cublasLtCreate: {error}"))?;
        let workspace = stream.alloc_zeros(WORKSPACE_BYTES).map_err(|error| format!("cuBLAS's workspace: {error}"))?;
        Ok(Cublas { handle, workspace, stream: stream.clone() })
    }

    /// Plans a product with an output of bf16, or of f32 where `wide`.
    pub fn plan(&self, [m, n, k]: [usize; 3], [a, b]: [Side; 2], wide: bool) -> Result<Matmul, String> {
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let planned = || -> Result<Matmul, CublasError> {
            let layout = |kind, rows: usize, columns: usize, leading: usize| {
                result::create_matrix_layout(kind, rows as u64, columns as u64, leading as i64)
            };
            let of = |side: Side, rows: usize, columns: usize| {
                let (rows, columns) = if side.transposed { (columns, rows) } else { (rows, columns) };
                layout(CUDA_R_16BF, rows, columns, side.leading)
            };
            let output = layout(if wide { CUDA_R_32F } else { CUDA_R_16BF }, m, n, m)?;
            let layouts = [of(a, m, k)?, of(b, k, n)?, output];
            let desc = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
            let attributes = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
            let other = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB;
            for (attribute, side) in [(attributes, a), (other, b)] {
                let operation = i32::from(side.transposed);
                // SAFETY: the descriptor is alive, and the attribute is four bytes.
                unsafe { result::set_matmul_desc_attribute(desc, attribute, (&raw const operation).cast(), 4)? };
            }
            let preference = result::create_matmul_pref()?;
            let bytes = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            let [a, b, c] = layouts;
            let limit = WORKSPACE_BYTES;
            // SAFETY: all handles are alive; the attribute is of `usize`'s size; the preference is destroyed once.
            let heuristic = unsafe {
                result::set_matmul_pref_attribute(preference, bytes, (&raw const limit).cast(), size_of::<usize>())?;
                let found = result::get_matmul_algo_heuristic(self.handle, desc, a, b, c, c, preference);
                result::destroy_matmul_pref(preference)?;
                found?
            };
            Ok(Matmul { desc, layouts, algorithm: heuristic.algo })
        };
        planned().map_err(|error| format!("cuBLAS, {m} x {n} x {k}: {error}"))
    }

    /// Submits a planned product to the stream.
    ///
    /// # Safety
    /// The addresses are those of matrices of the planned sizes in device memory, aligned to 256 bytes.
    pub unsafe fn run(&self, matmul: &Matmul, alpha: f32, [a, b]: [u64; 2], beta: f32, c: u64) {
        let [a_layout, b_layout, c_layout] = matmul.layouts;
        let (workspace, _) = self.workspace.device_ptr(&self.stream);
        let (alpha, beta) = ((&raw const alpha).cast(), (&raw const beta).cast());
        // SAFETY: the caller's promise; handles live as long as `self` and `matmul`; scalars are the host's, read by the call.
        let submitted = unsafe {
            result::matmul(
                self.handle,
                matmul.desc,
                alpha,
                beta,
                a as *const _,
                a_layout,
                b as *const _,
                b_layout,
                c as *const _,
                c_layout,
                c as *mut _,
                c_layout,
                &raw const matmul.algorithm,
                workspace as *mut _,
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        };
        submitted.expect("a planned matmul is taken");
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

impl Drop for Matmul {
    fn drop(&mut self) {
        // SAFETY: created in `plan`, each destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.desc);
            for layout in self.layouts {
                let _ = result::destroy_matrix_layout(layout);
            }
        }
    }
}
