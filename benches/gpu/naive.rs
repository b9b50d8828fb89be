//! Matmul and softmax on materialised logits, as fast as cuBLAS and a pass for each thing to do (`naive.cu`) make it: unit vectors,
//! 16-bit logits, a pass for lse and loss, one that turns logits into coefficients, two more matmuls, the chain rule. Queries go in
//! chunks where the logits do not fit. Cosine and log_q; no ids: a candidate that is a row's positive twice is a negative here, too.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute::{
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
};
use cudarc::driver::{
    CudaFunction, CudaModule, CudaSlice, CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
    ValidAsZeroBits,
};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

use super::cublas::{Cublas, Matmul, Side};
use super::shapes::Shape;
use catalog_softmax_testing::on_device::{DeviceStorage, OnDevice};

/// Most bytes of logits at a time: those of 8192 queries and a million candidates.
const LOGITS_BYTES: usize = 16 << 30;
/// Chunks start at multiples of this many rows, so that matrices start at multiples of the 256 bytes that cuBLAS plans for.
const CHUNK_ROWS: usize = 128;

/// cuBLAS and the passes, compiled.
pub struct Library {
    cublas: Cublas,
    normalize: CudaFunction,
    row_loss: CudaFunction,
    softmax_minus_positive: CudaFunction,
    chain_rule: CudaFunction,
    mean: CudaFunction,
}

impl Library {
    /// Or why it cannot be had here.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self, String> {
        let cublas = Cublas::new(stream)?;
        let module = compiled(stream)?;
        let function = |name: &str| module.load_function(name).map_err(|error| format!("{name}: {error}"));
        Ok(Library {
            cublas,
            normalize: function("normalize")?,
            row_loss: function("row_loss")?,
            softmax_minus_positive: function("softmax_minus_positive")?,
            chain_rule: function("chain_rule")?,
            mean: function("mean")?,
        })
    }
}

fn compiled(stream: &Arc<CudaStream>) -> Result<Arc<CudaModule>, String> {
    // SAFETY: opening NVIDIA's library runs its initialisers, which expect nothing of this process.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(
            "libnvrtc is not found (it comes with the CUDA toolkit and with PyTorch; see LD_LIBRARY_PATH)".into()
        );
    }
    let attribute = |which| stream.context().attribute(which).map_err(|error| error.to_string());
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let options = vec![format!("--gpu-architecture=compute_{major}{minor}")];
    let ptx = compile_ptx_with_opts(include_str!("naive.cu"), CompileOptions { options, ..CompileOptions::default() });
    let ptx = ptx.map_err(|error| format!("benches/gpu/naive.cu: {error:?}"))?;
    stream.context().load_module(ptx).map_err(|error| format!("benches/gpu/naive.cu: {error}"))
}

/// A step's memory and plans for one shape.
pub struct Naive<'a> {
    library: &'a Library,
    stream: Arc<CudaStream>,
    shape: Shape,
    chunk: usize,
    /// For chunks of `chunk` rows, and for the last one where it is smaller.
    plans: Vec<Plans>,
    logits: CudaSlice<u16>,
    units: [CudaSlice<u16>; 2],
    inverse_norms: [CudaSlice<f32>; 2],
    lse: CudaSlice<f32>,
    loss: CudaSlice<f32>,
    pub total: CudaSlice<f64>,
    pub d_queries: CudaSlice<f32>,
    pub d_candidates: CudaSlice<f32>,
}

struct Plans {
    rows: usize,
    logits: Matmul,
    d_queries: Matmul,
    d_candidates: Matmul,
}

impl<'a> Naive<'a> {
    pub fn new(library: &'a Library, stream: &Arc<CudaStream>, shape: Shape) -> Result<Self, String> {
        fn zeros<T: DeviceRepr + ValidAsZeroBits>(
            stream: &Arc<CudaStream>,
            len: usize,
        ) -> Result<CudaSlice<T>, String> {
            stream.alloc_zeros(len).map_err(|error| format!("memory for {len} elements: {error}"))
        }
        let Shape { b, n, d } = shape;
        assert!(n.is_multiple_of(8), "the passes take eight candidates at a time");
        let (units, inverse_norms) =
            ([zeros(stream, b * d)?, zeros(stream, n * d)?], [zeros(stream, b)?, zeros(stream, n)?]);
        let (d_queries, d_candidates) = (zeros(stream, b * d)?, zeros(stream, n * d)?);
        let (free, _) = stream.context().mem_get_info().map_err(|error| error.to_string())?;
        let fit = LOGITS_BYTES.min(free / 10 * 9) / (2 * n) / CHUNK_ROWS * CHUNK_ROWS;
        let chunk = b.min(fit.max(CHUNK_ROWS));
        let sizes = [chunk, b % chunk];
        let plans = sizes.into_iter().filter(|&rows| rows > 0).map(|rows| Plans::new(&library.cublas, rows, n, d));
        Ok(Naive {
            library,
            stream: stream.clone(),
            shape,
            chunk,
            plans: plans.collect::<Result<_, _>>()?,
            logits: zeros(stream, chunk * n)?,
            units,
            inverse_norms,
            lse: zeros(stream, b)?,
            loss: zeros(stream, b)?,
            total: zeros(stream, 1)?,
            d_queries,
            d_candidates,
        })
    }

    /// Chunks of queries.
    pub fn chunks(&self) -> usize {
        self.shape.b.div_ceil(self.chunk)
    }

    /// The logits' matmul alone, of embeddings as they are: every chunk of it.
    pub fn bare_matmul(&self, inputs: &OnDevice) {
        let [queries, candidates] = embeddings(inputs).map(|slice| address(slice, &self.stream));
        for (first, plans) in self.parts() {
            let operands = [candidates, queries + (2 * first * self.shape.d) as u64];
            // SAFETY: planned for these sizes; `logits` holds a chunk.
            unsafe { self.library.cublas.run(&plans.logits, 1.0, operands, 0.0, address(&self.logits, &self.stream)) };
        }
    }

    /// The loss, and gradients where wanted.
    pub fn step(&self, inputs: &OnDevice, temperature: f32, gradients: bool) {
        let Shape { b, n, d } = self.shape;
        let at = |slice: &CudaSlice<f32>, first: usize| address(slice, &self.stream) + (4 * first) as u64;
        let (_, _, Some(log_q)) = &inputs.pools[0] else { panic!("the bench's inputs have log_q") };
        let Ok(positives) = &inputs.positives else { panic!("the bench's positives are indices") };
        let (log_q, positives) = (address(log_q, &self.stream), address(positives, &self.stream));
        let [queries, candidates] = self.units.each_ref().map(|units| address(units, &self.stream));
        let [query_norms, candidate_norms] = self.inverse_norms.each_ref().map(|norms| at(norms, 0));
        let logits = address(&self.logits, &self.stream);
        let sources = embeddings(inputs).map(|slice| address(slice, &self.stream));
        self.warps(&self.library.normalize, b, &[sources[0], queries, query_norms, b as u64, d as u64]);
        self.warps(&self.library.normalize, n, &[sources[1], candidates, candidate_norms, n as u64, d as u64]);
        for (first, plans) in self.parts() {
            let (mine, rows) = (queries + (2 * first * d) as u64, plans.rows);
            let (lse, loss, positives) = (at(&self.lse, first), at(&self.loss, first), positives + (4 * first) as u64);
            let cublas = &self.library.cublas;
            // SAFETY: planned for these sizes; `logits` holds a chunk.
            unsafe { cublas.run(&plans.logits, 1.0 / temperature, [candidates, mine], 0.0, logits) };
            self.launch(&self.library.row_loss, rows, 1024, &[logits, log_q, positives, lse, loss, n as u64]);
            if gradients {
                self.launch(
                    &self.library.softmax_minus_positive,
                    rows,
                    1024,
                    &[logits, log_q, positives, lse, n as u64],
                );
                let (scale, sum) = (1.0 / (temperature * b as f32), if first == 0 { 0.0 } else { 1.0 });
                // SAFETY: planned for these sizes; gradients are whole matrices.
                unsafe {
                    cublas.run(&plans.d_queries, scale, [candidates, logits], 0.0, at(&self.d_queries, first * d));
                    cublas.run(&plans.d_candidates, scale, [mine, logits], sum, at(&self.d_candidates, 0));
                }
            }
        }
        if gradients {
            let (d_queries, d_candidates) = (at(&self.d_queries, 0), at(&self.d_candidates, 0));
            self.warps(&self.library.chain_rule, b, &[d_queries, queries, query_norms, b as u64, d as u64]);
            self.warps(&self.library.chain_rule, n, &[d_candidates, candidates, candidate_norms, n as u64, d as u64]);
        }
        self.launch(&self.library.mean, 1, 256, &[at(&self.loss, 0), address(&self.total, &self.stream), b as u64]);
    }

    /// First row and plans of each chunk.
    fn parts(&self) -> impl Iterator<Item = (usize, &Plans)> {
        let chunks = (0..self.shape.b).step_by(self.chunk);
        chunks.map(|first| (first, if first + self.chunk <= self.shape.b { &self.plans[0] } else { &self.plans[1] }))
    }

    /// A warp for each row.
    fn warps(&self, function: &CudaFunction, rows: usize, arguments: &[u64]) {
        self.launch(function, rows.div_ceil(8), 256, arguments);
    }

    /// All arguments of the passes are addresses and 64-bit sizes.
    fn launch(&self, function: &CudaFunction, blocks: usize, threads: u32, arguments: &[u64]) {
        let mut builder = self.stream.launch_builder(function);
        for argument in arguments {
            builder.arg(argument);
        }
        let config = LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: arguments are as `naive.cu` declares them: addresses of arrays of this shape, and its sizes.
        unsafe { builder.launch(config) }.expect("a pass is launched");
    }
}

impl Plans {
    /// Row-major matrices are column-major ones of their transposes.
    fn new(cublas: &Cublas, rows: usize, n: usize, d: usize) -> Result<Self, String> {
        let plain = |leading| Side { transposed: false, leading };
        let transposed = |leading| Side { transposed: true, leading };
        Ok(Plans {
            rows,
            // (n, rows) = candidates' (d, n) transposed, queries' (d, rows)
            logits: cublas.plan([n, rows, d], [transposed(d), plain(d)], false)?,
            // (d, rows) = candidates' (d, n), coefficients' (n, rows)
            d_queries: cublas.plan([d, rows, n], [plain(d), plain(n)], true)?,
            // (d, n) = queries' (d, rows), coefficients' (n, rows) transposed
            d_candidates: cublas.plan([d, n, rows], [plain(d), transposed(n)], true)?,
        })
    }
}

fn embeddings(inputs: &OnDevice) -> [&CudaSlice<half::bf16>; 2] {
    [&inputs.queries, &inputs.pools[0].0].map(|storage| match storage {
        DeviceStorage::Bf16(slice) => slice,
        _ => panic!("the bench's embeddings are bf16"),
    })
}

fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}
