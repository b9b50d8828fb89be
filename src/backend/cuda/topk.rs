//! Exact top-K: one stream over each pool and one merge; for searches in host memory, whose arrays are copied to the
//! device and back, and for searches in the caller's device memory.

use super::Cuda;
use super::device_batch::DeviceBatch;
use super::device_search::{DeviceSearch, DeviceTopK};
use super::driver::{Driver, Grid, Limits};
use super::host_layout::SearchInputs;
use super::kernels::{MERGE_TOPK, TOPK, Variant};
use super::memory::{Layout, Part};
use super::params::{COLUMN_TERM, MergeTopKParams, StreamParams, TopKParams};
use super::passes::Step;
use super::problem::Problem;
use super::step::checked_rows;
use super::tiling::{BLOCK_Y, Tiling};
use super::uses::Uses;
use super::workspace::{PerPool, Workspace};
use crate::error::Result;
use crate::problem::loss::Similarity;
use crate::problem::plan::Plan;
use crate::problem::search::{Search, TopK};
use crate::problem::statistics::Request;

/// Bound of the memory for the splits' buffers, unless one split of each pool alone needs more.
const MAX_BUFFER_BYTES: usize = 256 << 20;

/// What a search keeps in device memory beside inputs and results.
#[derive(Debug)]
struct Memory {
    workspace: Workspace,
    lists: Lists,
}

/// A search's memory where the host has its inputs and wants its results.
#[derive(Debug)]
struct HostMemory {
    layout: Layout,
    inputs: SearchInputs,
    search: Memory,
    /// (B, K)
    indices: Part,
    scores: Part,
}

/// What the stream finds.
#[derive(Debug)]
struct Lists {
    k: usize,
    /// Keys that a row's buffer holds in a split: the best K and as many again, so that a selection frees K places; at least
    /// a tile's.
    capacity: usize,
    /// Per pool.
    tilings: PerPool,
    /// (splits, B, capacity)
    keys: Part,
}

impl Lists {
    fn lay_out(layout: &mut Layout, limits: Limits, problem: &Problem, k: usize) -> Self {
        let b = problem.num_queries();
        let capacity = k + k.max(BLOCK_Y);
        let affordable = (MAX_BUFFER_BYTES / (b * capacity * size_of::<u64>())).max(1);
        let tilings: PerPool = (problem.pools.iter())
            .map(|pool| {
                let rows = pool.candidates.rows;
                Tiling::new(limits, problem.dtype, problem.dim, b, rows, false).with_at_most(affordable, rows)
            })
            .collect();
        let splits: usize = tilings.iter().map(|tiling| tiling.splits).sum();
        Lists { k, capacity, keys: layout.part(splits * b * capacity, size_of::<u64>()), tilings }
    }

    fn splits(&self) -> usize {
        self.tilings.iter().map(|tiling| tiling.splits).sum()
    }
}

impl Memory {
    fn lay_out(layout: &mut Layout, limits: Limits, problem: &Problem, k: usize) -> Self {
        Memory {
            workspace: Workspace::lay_out(layout, limits, problem, Request::value()),
            lists: Lists::lay_out(layout, limits, problem, k),
        }
    }

    fn plan(&self, layout: Layout) -> Plan {
        let Tiling { block_x, block_y, .. } = self.lists.tilings[0];
        Plan { block_b: block_x, block_n: block_y, splits: self.lists.splits(), workspace_bytes: layout.bytes() }
    }
}

/// In host memory.
impl Cuda {
    fn lay_out_search(&self, search: &Search<'_>, similarity: Similarity, k: usize) -> HostMemory {
        let mut layout = Layout::default();
        let inputs = SearchInputs::lay_out(&mut layout, &search.matrix);
        let problem = self.search_problem(&search.matrix, similarity, 1.0, &inputs);
        let memory = Memory::lay_out(&mut layout, self.driver.limits, &problem, k);
        let count = search.num_queries() * k;
        let (indices, scores) = (layout.part(count, size_of::<u32>()), layout.part(count, size_of::<f32>()));
        HostMemory { layout, inputs, search: memory, indices, scores }
    }

    pub(super) fn plan_host_search(&self, search: &Search<'_>, similarity: Similarity, k: usize) -> Plan {
        let memory = self.lay_out_search(search, similarity, k);
        memory.search.plan(memory.layout)
    }

    pub(super) fn search_from_host(&mut self, search: &Search<'_>, similarity: Similarity, k: usize) -> Result<TopK> {
        let HostMemory { layout, inputs, search: memory, indices, scores } = self.lay_out_search(search, similarity, k);
        self.search_problem(&search.matrix, similarity, 1.0, &inputs).check_pairs()?;
        let _settled = self.driver.settled()?;
        self.upload_search(&search.matrix, layout, &inputs)?;
        let problem = self.search_problem(&search.matrix, similarity, 1.0, &inputs);
        let step = self.step_of(&problem, &memory.workspace, self.arena.base());
        step.prepare(Request::value())?;
        step.top_k(&memory.lists, self.arena.address(indices), self.arena.address(scores))?;
        let count = search.num_queries() * k;
        Ok(TopK { k, indices: self.down(indices, count)?, scores: self.down(scores, count)? })
    }
}

/// In device memory.
impl Cuda {
    /// Tiles, splits and device memory beside the result of a search in device memory. Allocates nothing.
    ///
    /// # Errors
    /// As [`top_k_on_device`](Cuda::top_k_on_device).
    pub fn plan_top_k_on_device(&self, search: &DeviceSearch<'_>, similarity: Similarity, k: usize) -> Result<Plan> {
        let (_, memory, layout) = self.lay_out_device_search(search, similarity, k, &mut Uses::new(&self.driver)?)?;
        Ok(memory.plan(layout))
    }

    /// Allocates what searches of this size need. Later searches whose plan is not larger allocate nothing.
    ///
    /// # Errors
    /// As [`top_k_on_device`](Cuda::top_k_on_device).
    pub fn reserve_top_k_on_device(
        &mut self,
        search: &DeviceSearch<'_>,
        similarity: Similarity,
        k: usize,
    ) -> Result<()> {
        let (_, _, layout) = self.lay_out_device_search(search, similarity, k, &mut Uses::new(&self.driver)?)?;
        self.arena.reserve(&self.driver, layout)
    }

    /// Queues a search of the caller's device memory on the backend's stream, without copies to or from the host. It
    /// finds the lists of [`Backend::top_k`](crate::Backend::top_k). Returns before the device has done it. Other
    /// streams that own memory are ordered with it, as for [`compute_on_device`](Cuda::compute_on_device).
    ///
    /// ```no_run
    /// use catalog_softmax::cuda::{Cuda, DeviceEmbeddings, DevicePool, DeviceSearch, DeviceSlice, DeviceSliceMut, DeviceTopK};
    /// # use catalog_softmax::Similarity;
    /// # use cudarc::driver::CudaContext;
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let (b, n, d, k) = (512, 1_000_000, 64, 100);
    /// let stream = CudaContext::new(0)?.new_stream()?;
    /// let mut cuda = Cuda::on_stream(stream.clone())?;
    /// let (users, items) = (stream.alloc_zeros::<half::f16>(b * d)?, stream.alloc_zeros::<half::f16>(n * d)?);
    /// let (mut indices, mut scores) = (stream.alloc_zeros::<u32>(b * k)?, stream.alloc_zeros::<f32>(b * k)?);
    ///
    /// let users = DeviceEmbeddings::new(DeviceSlice::new(&users), b, d);
    /// let items = DeviceEmbeddings::new(DeviceSlice::new(&items), n, d);
    /// let search = DeviceSearch::new(users, DevicePool::new(items));
    /// let mut top = DeviceTopK {
    ///     indices: DeviceSliceMut::new(&mut indices),
    ///     scores: DeviceSliceMut::new(&mut scores),
    ///     workspace: None,
    /// };
    /// cuda.top_k_on_device(&search, Similarity::Dot, k, &mut top)?;
    /// cuda.fault()?; // waits, and reports offsets of exclusions that are out of order
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// A `k` that is 0, above 1024 or above the number of candidates; a pool with log_q, which a search does not use;
    /// shapes, alignment or devices of views that do not fit; a stream that is being captured; too little device
    /// memory; a driver that refuses. Nothing has been submitted then, except in the last case.
    pub fn top_k_on_device(
        &mut self,
        search: &DeviceSearch<'_>,
        similarity: Similarity,
        k: usize,
        top: &mut DeviceTopK<'_>,
    ) -> Result<()> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let (problem, memory, layout) = self.lay_out_device_search(search, similarity, k, &mut uses)?;
        self.submit_search(&driver, (problem, memory, layout), top, uses)
    }

    /// Queues a search for each row's `k` most similar negatives among the candidates of the batch's pools, as
    /// [`Backend::hardest_negatives`](crate::Backend::hardest_negatives) does on host memory: the batch's masks leave out what is no
    /// negative of the row. log_q, weights and the rows' own negatives do not matter.
    ///
    /// # Errors
    /// As [`top_k_on_device`](Cuda::top_k_on_device); a batch of the rows' own negatives alone.
    pub fn hardest_negatives_on_device(
        &mut self,
        batch: &DeviceBatch<'_>,
        similarity: Similarity,
        k: usize,
        top: &mut DeviceTopK<'_>,
    ) -> Result<()> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let problem = batch.negatives(similarity, k, self.tf32, &mut uses)?;
        let (memory, layout) = self.lay_out_problem(&problem, k);
        self.submit_search(&driver, (problem, memory, layout), top, uses)
    }

    /// Device memory that [`hardest_negatives_on_device`](Cuda::hardest_negatives_on_device) works in. Allocates nothing.
    ///
    /// # Errors
    /// As [`hardest_negatives_on_device`](Cuda::hardest_negatives_on_device).
    pub fn plan_hardest_negatives_on_device(
        &self,
        batch: &DeviceBatch<'_>,
        similarity: Similarity,
        k: usize,
    ) -> Result<Plan> {
        let problem = batch.negatives(similarity, k, self.tf32, &mut Uses::new(&self.driver)?)?;
        let (memory, layout) = self.lay_out_problem(&problem, k);
        Ok(memory.plan(layout))
    }

    fn submit_search<'u>(
        &mut self,
        driver: &Driver,
        (problem, memory, layout): (Problem, Memory, Layout),
        top: &'u mut DeviceTopK<'_>,
        mut uses: Uses<'u>,
    ) -> Result<()> {
        let (indices, scores, given) = top.checked(problem.num_queries(), memory.lists.k, &mut uses)?;
        let base = self.arena.place(driver, layout, given)?;
        uses.start()?;
        let problem = checked_rows(&problem, &memory.workspace, base);
        let step = self.step_of(&problem, &memory.workspace, base);
        uses.finish(step.prepare(Request::value()).and_then(|()| step.top_k(&memory.lists, indices, scores)))
    }

    fn lay_out_device_search<'u>(
        &self,
        search: &DeviceSearch<'u>,
        similarity: Similarity,
        k: usize,
        uses: &mut Uses<'u>,
    ) -> Result<(Problem, Memory, Layout)> {
        let problem = search.checked(similarity, k, self.tf32, uses)?;
        let (memory, layout) = self.lay_out_problem(&problem, k);
        Ok((problem, memory, layout))
    }

    fn lay_out_problem(&self, problem: &Problem, k: usize) -> (Memory, Layout) {
        let mut layout = Layout::default();
        let memory = Memory::lay_out(&mut layout, self.driver.limits, problem, k);
        (memory, layout)
    }
}

impl Step<'_> {
    /// After [`prepare`](Step::prepare): queries against each pool, and the merge, which writes (B, K) `indices` and `scores`. The
    /// splits of all pools are one list.
    fn top_k(&self, lists: &Lists, indices: u64, scores: u64) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let mut first_split = 0;
        for (pool, tiling) in problem.pools.iter().zip(lists.tilings.iter()) {
            let stream = StreamParams {
                y: pool.candidates.address,
                y_terms: self.element(workspace.candidate_columns, pool.start, COLUMN_TERM),
                y_indices: pool.candidates.indices,
                y_stride: pool.candidates.stride as u64,
                y_rows: pool.candidates.rows as u32,
                first_split: first_split as u32,
                alignment: problem.alignment(problem.queries, pool.candidates),
                ..self.with_masks(pool, self.queries_stationary(tiling))
            };
            let (k, capacity) = (lists.k as u32, lists.capacity as u32);
            let params = TopKParams { stream, keys: self.at(lists.keys), k, capacity };
            let grid = Grid { blocks: tiling.blocks(problem.num_queries()), shared_bytes: tiling.shared_bytes };
            self.driver.launch(TOPK, problem.stream_typed(), grid, &params)?;
            first_split += tiling.splits;
        }
        let params = MergeTopKParams {
            keys: self.at(lists.keys),
            indices,
            scores,
            rows: problem.num_queries() as u32,
            splits: lists.splits() as u32,
            k: lists.k as u32,
            capacity: lists.capacity as u32,
        };
        let grid = Grid { blocks: (problem.num_queries() as u32, 1, 1), shared_bytes: 0 };
        self.driver.launch(MERGE_TOPK, Variant::ONLY, grid, &params)
    }
}
