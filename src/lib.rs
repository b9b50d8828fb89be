//! Softmax losses over large item catalogues, for training two-tower and sequential recommenders: full softmax, sampled
//! softmax and InfoNCE, with logQ correction, cosine scoring, temperature and masks. The scores of B queries against N
//! candidates are computed tile by tile in one streaming pass, so the B x N logits are never in memory.
//!
//! # The mathematics
//!
//! Row i is query i with its scores. Query i and candidate j score `s_ij = sim(q_i, c_j) / tau`, where `sim` is the
//! cosine or the dot product and `tau` the temperature. The positive of a row, written `+`, is the candidate that its
//! query should find. Every other candidate is a negative of the row, unless it carries the positive's id (an
//! accidental hit) or an id that the row excludes. If candidate j is drawn as a negative with probability `Q_j`, the
//! logQ correction turns its score into `z_ij = s_ij − log Q_j`. The streaming pass computes for each row
//!
//! ```text
//! lse_i = log Σ_negatives exp(z_ij)     positive_i = s_i+     num_negatives_i     O_i = Σ softmax(z_i)_j ĉ_j
//! ```
//!
//! with `ĉ_j` the candidate's embedding, which cosine divides by its length. A loss is a function of these numbers.
//! With the margin `m = lse + shift − positive`, `softplus(m) = log(1 + exp(m))` and `σ(m) = 1 / (1 + exp(−m))`:
//!
//! | loss | options | shift | value |
//! |---|---|---|---|
//! | full softmax | whole catalogue as candidates, [`Correction::None`] | 0 | softplus(m) |
//! | InfoNCE | [`Batch::in_batch`], [`Correction::None`] | 0 | softplus(m) |
//! | symmetric InfoNCE (CLIP) | the same with [`Loss::symmetric`] | 0 | mean of both directions |
//! | sampled softmax | a drawn pool, [`Correction::None`] | 0 | softplus(m) |
//! | logQ | [`Correction::LogQ`] | log Q₊ | softplus(m) |
//! | logQ on negatives alone | [`Correction::LogQNegativesOnly`] | 0 | softplus(m) |
//! | corrected logQ | [`Correction::CorrectedLogQ`] | log(1 − Q₊) | w·m, w = stop-gradient σ(m − log n) |
//!
//! The streamed sum leaves the positive out and the loss adds it, which avoids a difference of two large numbers. In
//! every case `∂loss/∂lse = a` and `∂loss/∂positive = −a` for one number a of the row. One backward pass therefore
//! serves all losses. It also serves an *epilogue* of your own, which is any function of a row's `lse` and `positive`:
//!
//! ```text
//! ∂L/∂q̂_i = γ (d_lse_i O_i + d_positive_i p̂_i)
//! ∂L/∂ĉ_j = γ Σ_i (d_lse_i softmax(z_i)_j + d_positive_i [j is i's positive]) q̂_i          γ = 1/tau
//! ∂L/∂γ  = Σ_i (d_lse_i q̂_i·O_i + d_positive_i sim_i+)                                    ∂L/∂tau = −γ² ∂L/∂γ
//! ```
//!
//! Sources: Bengio and Senécal, "Adaptive Importance Sampling to Accelerate Training of a Neural Probabilistic Language
//! Model", IEEE TNN 2008 (the correction); Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
//! Recommendations", RecSys 2019, section 4 (in-batch logQ); "Correcting the LogQ Correction", RecSys 2025; van den
//! Oord et al. 2018 (InfoNCE); Radford et al. 2021 (symmetric). [`Reference`] computes the same formulas with plain
//! loops in float64.
//!
//! # Use
//!
//! A [`Batch`] holds the arrays of one step; building it rejects bad arrays. A [`Loss`] holds the options, which are
//! checked against the batch when a step is computed. A [`Backend`] computes an [`Output`] from both and, on request,
//! [`Gradients`].
//!
//! ```
//! use catalog_softmax::{
//!     Backend, Batch, Correction, Cpu, Embeddings, Gradients, Loss, Output, Pool, Request, Similarity,
//! };
//!
//! let (b, n, d) = (4, 100, 8);
//! let queries: Vec<f32> = (0..b * d).map(|i| (i as f32).sin()).collect();
//! let items: Vec<f32> = (0..n * d).map(|i| (i as f32).cos()).collect();
//! let positives = vec![3u32, 14, 15, 92];
//! let ids: Vec<u64> = (1000..1100).collect();
//! let log_q = vec![(1.0f32 / 100.0).ln(); n];
//!
//! let candidates = Pool::new(Embeddings::new(&items, n, d)).ids(&ids).log_q(&log_q);
//! let batch = Batch::builder(Embeddings::new(&queries, b, d), candidates).positives(&positives).build()?;
//! let loss = Loss::softmax(Similarity::Cosine, 0.05).correction(Correction::LogQ);
//!
//! let (mut cpu, mut output, mut gradients) = (Cpu::new(), Output::default(), Gradients::default());
//! for _step in 0..3 {
//!     // Workspace, output and gradients keep their memory from step to step.
//!     cpu.compute(&batch, &loss, Request::value_and_grad(), &mut output, Some(&mut gradients))?;
//! }
//! assert_eq!(output.loss.len(), b);
//! assert_eq!((gradients.d_queries.rows, gradients.d_candidates[0].rows), (b, n));
//! # Ok::<(), catalog_softmax::Error>(())
//! ```
//!
//! To evaluate over the whole catalogue, ask for the exact [`Rank`] of each positive ([`Request::with_rank`]): the same
//! pass counts it, without a top-K search. Give the items that the user has seen as
//! [`excluded_ids`](BatchBuilder::excluded_ids). For the best K items themselves, build a [`Search`] and call
//! [`Backend::top_k`]. [`evaluation`] computes its metrics from ranks or from such lists.
//!
//! # Negatives and their log_q
//!
//! Every sampler returns ids and the log_q that belongs to its way of drawing them. [`negatives`] has samplers,
//! estimators of the frequencies of in-batch negatives, a queue of past candidates, and one log_q for the union of such
//! sources.
//!
//! # The optimiser's step
//!
//! [`optimizer`] steps an embedding table (f32, f16 or bf16) in place: SGD, row-wise Adagrad or Adam, on all rows or on those
//! that a step names.
//!
//! # Tables
//!
//! Sequential recommenders train an embedding table by ids. [`Batch::of_table`] names rows of it: [`Pool::rows`] as
//! candidates of all queries, [`RowNegatives`] as negatives of each query's own, rows as positives, of which a query may
//! have several ([`BatchBuilder::positive_offsets`]). Rows are read where they are. The gradient is that of the table,
//! [`Gradients::d_table`], dense or for the named rows alone. With [`Backend::update`] it does not exist as a whole: the
//! [`optimizer`] takes its step on a few rows at a time.
//!
//! # Temperature and evaluation
//!
//! A temperature is fixed, follows a schedule, or is learned from each step's gradient: [`temperature`]. [`evaluation`]
//! has metrics from ranks and lists, and alignment and uniformity, which measure how embeddings lie on the unit sphere.
//!
//! # Promises
//!
//! * **Determinism.** The same inputs on the same machine give bitwise the same outputs, for any number of threads.
//! * **Memory.** A step needs inputs, outputs and a workspace. [`Backend::plan`] returns an upper bound of the workspace in bytes
//!   before anything is allocated. On the CPU it does not grow with N; on CUDA by at most 50 bytes for each candidate.
//! * **Errors.** Bad input returns an [`Error`] before anything runs. It names the argument, its value and the rule. An
//!   argument that the loss would have to ignore, such as log_q without a correction, is an error too.
//! * **Non-finite embeddings** affect only the rows, and the candidates' gradients, that depend on them.

mod backend;
mod error;
pub mod evaluation;
mod hash;
mod memory;
pub mod negatives;
pub mod optimizer;
mod problem;
mod saved;
pub mod sharded;
pub mod temperature;

/// Half-precision numbers: the elements of [`Embeddings`] may be `half::f16` or `half::bf16`.
pub use half;

pub use backend::Backend;
pub use backend::cpu::Cpu;
#[cfg(feature = "cuda")]
pub use backend::cuda::Cuda;

/// Losses and searches on the caller's own device memory and stream.
/// [`Cuda::compute_on_device`](cuda::Cuda::compute_on_device) computes a step,
/// [`Cuda::top_k_on_device`](cuda::Cuda::top_k_on_device) a search.
///
/// ```no_run
/// use catalog_softmax::cuda::{
///     Cuda, DeviceBatch, DeviceEmbeddings, DeviceGradients, DeviceOutput, DevicePool, DeviceSlice, DeviceSliceMut,
/// };
/// use catalog_softmax::{Correction, Loss, Request, Similarity};
/// use cudarc::driver::CudaContext;
///
/// let (b, n, d) = (4096, 100_000, 128);
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let mut cuda = Cuda::on_stream(stream.clone())?;
///
/// // Your memory: towers write the embeddings, an optimiser reads the gradients.
/// let queries = stream.alloc_zeros::<half::bf16>(b * d)?;
/// let items = stream.alloc_zeros::<half::bf16>(n * d)?;
/// let (positives, ids) = (stream.alloc_zeros::<u32>(b)?, stream.alloc_zeros::<u64>(n)?);
/// let log_q = stream.alloc_zeros::<f32>(n)?;
/// let (mut d_queries, mut d_items) = (stream.alloc_zeros::<f32>(b * d)?, stream.alloc_zeros::<f32>(n * d)?);
/// let mut total = stream.alloc_zeros::<f64>(1)?;
///
/// let pool = DevicePool::new(DeviceEmbeddings::new(DeviceSlice::new(&items), n, d))
///     .ids(DeviceSlice::new(&ids))
///     .log_q(DeviceSlice::new(&log_q));
/// let queries = DeviceEmbeddings::new(DeviceSlice::new(&queries), b, d);
/// let batch = DeviceBatch::new(queries, pool).positives(DeviceSlice::new(&positives));
/// let loss = Loss::softmax(Similarity::Cosine, 0.05).correction(Correction::LogQ);
///
/// // Reserve once what a step needs. Steps then allocate nothing and wait for nothing.
/// cuda.reserve(&batch, &loss, Request::value_and_grad())?;
/// let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
/// output.gradients = Some(DeviceGradients::new(
///     DeviceSliceMut::new(&mut d_queries),
///     vec![Some(DeviceSliceMut::new(&mut d_items))],
/// ));
/// cuda.compute_on_device(&batch, &loss, &mut output)?;
/// // Before you use the results: did the device find input that breaks a rule?
/// cuda.fault()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "cuda")]
pub mod cuda {
    /// The crate whose streams and slices the functions here take.
    pub use cudarc;

    pub use crate::backend::cuda::{
        Cuda, DeviceBatch, DeviceElement, DeviceEmbeddings, DeviceGradients, DeviceMemory, DeviceMemoryMut,
        DeviceMoments, DeviceOutput, DevicePool, DeviceQueue, DeviceRank, DeviceRowNegatives, DeviceSearch,
        DeviceSlice, DeviceSliceMut, DeviceStatistics, DeviceTable, DeviceTableGradient, DeviceTopK, DeviceUpstream,
        StepGraph,
    };
}
pub use backend::device::{Device, Selected};
pub use backend::reference::Reference;
pub use error::{Error, NotBuilt, Result, Unavailable};
pub use problem::arrays::{Ids, Indices};
pub use problem::batch::Batch;
pub use problem::batch_builder::BatchBuilder;
pub use problem::embeddings::{DType, Elements, Embeddings, Matrix, Real};
pub use problem::epilogue::Epilogue;
pub use problem::filter::FalseNegativeFilter;
pub use problem::loss::{Correction, Loss, Reduction, Similarity};
pub use problem::output::{Gradients, Output, RowSparse, TableGradient};
pub use problem::plan::Plan;
pub use problem::pool::Pool;
pub use problem::search::{Search, SearchBuilder, TopK};
pub use problem::statistics::{Moments, Rank, Request, RowStatistics};
pub use problem::table::{RowNegatives, Table};

/// Compiles and runs the examples of the README and of the guide.
#[cfg(doctest)]
mod pages {
    macro_rules! pages {
        ($($name:ident = $file:literal)*) => {
            $(#[doc = include_str!(concat!("../", $file))] struct $name;)*
        };
    }
    pages! {
        ReadMe = "README.md"
        GettingStarted = "docs/guide/src/getting-started.md"
        Negatives = "docs/guide/src/negatives.md"
        LogQ = "docs/guide/src/log-q.md"
        PoolsAndQueue = "docs/guide/src/pools-and-queue.md"
        Tables = "docs/guide/src/tables.md"
        Temperature = "docs/guide/src/temperature.md"
        Evaluation = "docs/guide/src/evaluation.md"
        ManyGpus = "docs/guide/src/many-gpus.md"
        Extending = "docs/guide/src/extending.md"
        Troubleshooting = "docs/guide/src/troubleshooting.md"
    }
    #[cfg(feature = "cuda")]
    pages! { Gpu = "docs/guide/src/gpu.md" }
}
