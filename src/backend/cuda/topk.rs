//! Exact top-K of a search in host memory: inputs go up, one stream and one merge, the lists come down.

use super::Cuda;
use super::driver::{Grid, Limits};
use super::host::Inputs;
use super::memory::{Layout, Part};
use super::params::{COLUMN_TERM, MergeTopKParams, OUTPUT_NONE, StreamParams, TopKParams};
use super::passes::Step;
use super::problem::Problem;
use super::tiling::{BLOCK_Y, Tiling};
use super::workspace::Workspace;
use crate::error::Result;
use crate::loss::{Loss, Similarity};
use crate::plan::Plan;
use crate::search::{Search, TopK};
use crate::stats::Request;

/// Bound of the memory for the splits' buffers, unless one split of each pool alone needs more.
const MAX_BUFFER_BYTES: usize = 256 << 20;

/// A search's memory on the device.
#[derive(Debug)]
struct Memory {
    layout: Layout,
    inputs: Inputs,
    workspace: Workspace,
    lists: Lists,
}

/// What the stream finds and the merge returns.
#[derive(Debug)]
struct Lists {
    k: usize,
    /// Keys that a row's buffer holds in a split: the best K and as many again, so that a selection frees K places; at least
    /// a tile's.
    capacity: usize,
    /// Per pool.
    tilings: Vec<Tiling>,
    /// (splits, B, capacity)
    keys: Part,
    /// (B, K)
    indices: Part,
    scores: Part,
}

impl Lists {
    fn lay_out(layout: &mut Layout, limits: Limits, problem: &Problem, k: usize) -> Self {
        let b = problem.num_queries();
        let capacity = k + k.max(BLOCK_Y);
        let affordable = (MAX_BUFFER_BYTES / (b * capacity * size_of::<u64>())).max(1);
        let tilings: Vec<Tiling> = (problem.pools.iter())
            .map(|pool| {
                let rows = pool.candidates.rows;
                Tiling::new(limits, problem.dtype, problem.dim, b, rows, false).with_at_most(affordable, rows)
            })
            .collect();
        let splits: usize = tilings.iter().map(|tiling| tiling.splits).sum();
        Lists {
            k,
            capacity,
            keys: layout.part(splits * b * capacity, size_of::<u64>()),
            indices: layout.part(b * k, size_of::<u32>()),
            scores: layout.part(b * k, size_of::<f32>()),
            tilings,
        }
    }

    fn splits(&self) -> usize {
        self.tilings.iter().map(|tiling| tiling.splits).sum()
    }
}

impl Cuda {
    fn lay_out_search(&self, search: &Search<'_>, similarity: Similarity, k: usize) -> Memory {
        let mut layout = Layout::default();
        let inputs = Inputs::lay_out(&mut layout, search.batch());
        let problem = self.search_problem(search, similarity, &inputs);
        let limits = self.driver.limits;
        let workspace = Workspace::lay_out(&mut layout, limits, &problem, Request::value());
        let lists = Lists::lay_out(&mut layout, limits, &problem, k);
        Memory { layout, inputs, workspace, lists }
    }

    /// Scores are similarities: their scale is 1.
    fn search_problem(&self, search: &Search<'_>, similarity: Similarity, inputs: &Inputs) -> Problem {
        Problem { scale: 1.0, ..self.problem(search.batch(), &Loss::softmax(similarity, 1.0), inputs) }
    }

    pub(super) fn plan_top_k(&self, search: &Search<'_>, similarity: Similarity, k: usize) -> Plan {
        let memory = self.lay_out_search(search, similarity, k);
        let Tiling { block_x, block_y, .. } = memory.lists.tilings[0];
        let (splits, workspace_bytes) = (memory.lists.splits(), memory.layout.bytes());
        Plan { block_b: block_x, block_n: block_y, splits, workspace_bytes }
    }

    pub(super) fn find_top_k(&mut self, search: &Search<'_>, similarity: Similarity, k: usize) -> Result<TopK> {
        let memory = self.lay_out_search(search, similarity, k);
        self.upload(search.batch(), memory.layout, &memory.inputs)?;
        let problem = self.search_problem(search, similarity, &memory.inputs);
        let step = self.step_of(&problem, &memory.workspace);
        step.prepare()?;
        step.top_k(&memory.lists)?;
        let count = search.num_queries() * k;
        Ok(TopK { k, indices: self.down(memory.lists.indices, count)?, scores: self.down(memory.lists.scores, count)? })
    }
}

impl Step<'_> {
    /// After [`prepare`](Step::prepare): queries against each pool, and the merge. The splits of all pools are one list.
    fn top_k(&self, lists: &Lists) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        self.candidate_columns(OUTPUT_NONE, None)?;
        let mut first_split = 0;
        for (pool, tiling) in problem.pools.iter().zip(&lists.tilings) {
            let stream = StreamParams {
                y: pool.candidates.address,
                y_terms: self.element(workspace.candidate_columns, pool.start, COLUMN_TERM),
                y_stride: pool.candidates.stride as u64,
                y_rows: pool.candidates.rows as u32,
                first_split: first_split as u32,
                aligned: u32::from(problem.queries.aligned(problem.dtype) && pool.candidates.aligned(problem.dtype)),
                ..self.with_masks(pool, self.queries_stationary(tiling))
            };
            let (k, capacity) = (lists.k as u32, lists.capacity as u32);
            let params = TopKParams { stream, keys: self.at(lists.keys), k, capacity };
            let grid = Grid { blocks: tiling.blocks(problem.num_queries()), shared_bytes: tiling.shared_bytes };
            self.driver.launch(&problem.stream_typed("stream_topk"), grid, &params)?;
            first_split += tiling.splits;
        }
        let params = MergeTopKParams {
            keys: self.at(lists.keys),
            indices: self.at(lists.indices),
            scores: self.at(lists.scores),
            rows: problem.num_queries() as u32,
            splits: lists.splits() as u32,
            k: lists.k as u32,
            capacity: lists.capacity as u32,
        };
        let grid = Grid { blocks: (problem.num_queries() as u32, 1, 1), shared_bytes: 0 };
        self.driver.launch("merge_topk", grid, &params)
    }
}
