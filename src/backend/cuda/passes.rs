//! The passes of a step as launches, in the order of the stream:
//!
//! ```text
//! prepare.rs   norms, terms, positives, rejected ids   rows.cu, positives.cu, resolve.cu
//! here         queries against candidates              stream_sm80.cu, *_sm90a.cu
//! finish.rs    merge, epilogue, gradients of queries   finish_rows.cu
//! here         candidates against queries              stream_sm80.cu, *_sm90a.cu
//! finish.rs    gradients of candidates, totals         finish_gradient.cu
//! ```
//!
//! `wide.rs` has the launches of a stream over rows of more than 256 elements on Hopper.
//!
//! Every address that a launch gets comes from a [`Problem`] (inputs), a [`Workspace`], or one of the output
//! structs in `finish.rs`, and holds as many elements as the kernel's parameter file says for the problem's sizes.

use super::driver::{Driver, Grid};
use super::finish::{Back, StatisticsOut, Totals, Upstream};
use super::kernels::{
    DETAIL, EXPECTED, GRADIENT, HOPPER_BOUNDED, HOPPER_BOUNDED_EXPECTED, HOPPER_EXPECTED, HOPPER_GRADIENT,
    HOPPER_STATISTICS, PAIRED, STATISTICS,
};
use super::memory::{Base, Part};
use super::params::{COLUMN_TERM, HITS, HopperParams, ROW_TERM, StreamParams};
use super::prepare::Swap;
use super::problem::{Problem, ProblemPool, ProblemPositives, Rows};
use super::tiling::{Family, Tiling};
use super::workspace::{Partials, PerPool, Workspace};
use crate::error::Result;
use crate::problem::embeddings::DType;
use crate::problem::statistics::Request;

/// What a stream computes of each stationary row (`stream_sm80.cu`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pass {
    Statistics,
    Detail,
    Expected,
    Gradient,
}

/// A step on a device.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub(super) driver: &'a Driver,
    /// Where the workspace begins.
    pub(super) base: Base,
    pub(super) problem: &'a Problem,
    pub(super) workspace: &'a Workspace,
    /// Where kernels report what breaks a rule.
    pub(super) fault: u64,
    /// Which direction of a symmetric loss it is.
    pub(super) swap: Swap,
}

impl Step<'_> {
    pub(super) fn at(&self, part: Part) -> u64 {
        self.base.address(part)
    }

    /// Address of element `index` of a part; 0 where the part is not there.
    pub(super) fn element(&self, part: Part, index: usize, bytes: usize) -> u64 {
        match self.at(part) {
            0 => 0,
            address => address + (index * bytes) as u64,
        }
    }

    /// Row statistics, and expected negatives where the request wants gradients.
    pub(super) fn statistics_alone(&self, request: Request, out: &StatisticsOut) -> Result<()> {
        self.prepare(request)?;
        self.stream(request)?;
        self.finish_statistics(request, out)
    }

    /// Gradients of everything, given each row's derivatives.
    pub(super) fn gradients_alone(&self, upstream: &Upstream, back: &Back, totals: &Totals) -> Result<()> {
        self.prepare(Request::value_and_grad())?;
        if self.problem.filter.is_some() {
            self.paired()?;
            self.bounds()?;
        }
        self.finish_upstream(upstream, back)?;
        self.back(back, totals)
    }

    /// Queries against the candidates of all pools.
    pub(super) fn stream(&self, request: Request) -> Result<()> {
        let (workspace, shifts) = (self.workspace, self.shifts(request));
        let (tilings, detail) = (&workspace.tilings, request.moments || request.rank);
        self.paired()?;
        self.bounds()?;
        if detail || !request.gradients {
            let pass = if detail { Pass::Detail } else { Pass::Statistics };
            let columns = workspace.candidate_columns;
            self.stream_pools(pass, &tilings.statistics, columns, &workspace.statistics, shifts.statistics)?;
            self.stream_own(&workspace.statistics)?;
        }
        if request.gradients {
            let columns = workspace.output_columns;
            self.stream_pools(Pass::Expected, &tilings.expected, columns, &workspace.expected, shifts.expected)?;
            self.stream_own(&workspace.expected)?;
        }
        Ok(())
    }

    /// Similarities of pairs, of queries with their positives, by the matmul that the stream uses: a negative with the positive's
    /// embedding ties bit for bit.
    fn paired(&self) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let alignment = |rows: Rows| rows.alignment(problem.dtype, problem.dim);
        let of_positives = match problem.positives {
            ProblemPositives::None => return Ok(()),
            ProblemPositives::Separate(rows) => alignment(rows),
            ProblemPositives::Index(_) => {
                problem.pools.iter().map(|pool| alignment(pool.candidates)).min().unwrap_or(16)
            }
        };
        if problem.pairs == 0 {
            return Ok(());
        }
        let tiling = &workspace.tilings.paired;
        let params = StreamParams {
            x_indices: self.at(workspace.pair_rows),
            y_terms: self.at(workspace.positive_columns),
            y_addresses: self.at(workspace.positive_addresses),
            // Where a row is missing, its copy of 0 bytes is addressed from here.
            y: problem.queries.address,
            y_rows: problem.pairs as u32,
            max: self.at(workspace.positive_z),
            alignment: alignment(problem.queries).min(of_positives),
            ..self.queries_stationary(tiling)
        };
        let params = StreamParams { x_rows: problem.pairs as u32, ..params };
        let grid = Grid { blocks: (tiling.blocks(problem.pairs).0, 1, 1), shared_bytes: tiling.shared_bytes };
        self.driver.launch(PAIRED, problem.stream_typed(), grid, &params)
    }

    pub(super) fn queries_stationary(&self, tiling: &Tiling) -> StreamParams {
        let queries = self.problem.queries;
        StreamParams {
            x: queries.address,
            x_terms: self.at(self.workspace.query_rows),
            x_stride: queries.stride as u64,
            x_rows: queries.rows as u32,
            dim: self.problem.dim as u32,
            tiles_per_split: tiling.tiles_per_split as u32,
            x_resident: u32::from(tiling.x_resident),
            ..StreamParams::default()
        }
    }

    pub(super) fn with_masks(&self, pool: &ProblemPool, params: StreamParams) -> StreamParams {
        let resolved = &self.workspace.resolved;
        StreamParams {
            hits: self.element(resolved.hits, pool.start, HITS),
            rows_of_keys: self.at(resolved.rows_of_keys),
            rows_capacity: resolved.capacity as u32,
            candidate_start: pool.start as u32,
            bounds: self.at(self.workspace.bounds),
            ..params
        }
    }

    /// Queries against each pool. The splits of all pools are one list.
    fn stream_pools(
        &self,
        pass: Pass,
        tilings: &PerPool,
        columns: Part,
        partials: &Partials,
        shift: Option<f32>,
    ) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let mut first_split = 0;
        for (pool, tiling) in problem.pools.iter().zip(tilings.iter()) {
            let params = StreamParams {
                y: pool.candidates.address,
                y_terms: self.element(columns, pool.start, COLUMN_TERM),
                y_indices: pool.candidates.indices,
                y_stride: pool.candidates.stride as u64,
                y_rows: pool.candidates.rows as u32,
                positive_z: self.at(workspace.positive_z),
                pair_offsets: self.at(workspace.pair_offsets),
                pairs: problem.pairs as u32,
                first_split: first_split as u32,
                alignment: problem.alignment(problem.queries, pool.candidates),
                online: u32::from(shift.is_none()),
                shift: shift.unwrap_or(0.0),
                ..self.with_partials(partials, self.with_masks(pool, self.queries_stationary(tiling)))
            };
            self.launch_stream(pass, tiling, problem.queries, pool.candidates, &params)?;
            first_split += tiling.splits;
        }
        Ok(())
    }

    fn with_partials(&self, partials: &Partials, params: StreamParams) -> StreamParams {
        StreamParams {
            max: self.at(partials.max),
            sum: self.at(partials.sum),
            masked: self.at(partials.masked),
            output: self.at(partials.output),
            sum_score: self.at(partials.sum_score),
            sum_z: self.at(partials.sum_z),
            above: self.at(partials.above),
            ties: self.at(partials.ties),
            ..params
        }
    }

    fn launch_stream(&self, pass: Pass, tiling: &Tiling, x: Rows, y: Rows, params: &StreamParams) -> Result<()> {
        let grid = Grid { blocks: tiling.blocks(x.rows), shared_bytes: tiling.shared_bytes };
        match tiling.family {
            Family::Portable => {}
            Family::Hopper { .. } => return self.launch_hopper(pass, tiling, grid, [x, y], params),
            Family::Wide { pairs, panel: None } => return self.wide_statistics(tiling, pairs, [x, y], params),
            Family::Wide { pairs, panel: Some(panel) } => {
                return self.wide_output(pass, tiling, pairs, panel, [x, y], params);
            }
        }
        let kernel = match pass {
            Pass::Statistics => STATISTICS,
            Pass::Detail => DETAIL,
            Pass::Expected => EXPECTED,
            Pass::Gradient => GRADIENT,
        };
        self.driver.launch(kernel, self.problem.stream_typed().chunks(tiling.output_chunks), grid, params)
    }

    fn launch_hopper(
        &self,
        pass: Pass,
        tiling: &Tiling,
        grid: Grid,
        [x, y]: [Rows; 2],
        params: &StreamParams,
    ) -> Result<()> {
        let (dim, dtype) = (self.problem.dim, self.problem.dtype);
        let kernel = match (pass, params.online) {
            (Pass::Statistics | Pass::Detail, 0) => HOPPER_BOUNDED,
            (Pass::Statistics | Pass::Detail, _) => HOPPER_STATISTICS,
            (Pass::Expected, 0) => HOPPER_BOUNDED_EXPECTED,
            (Pass::Expected, _) => HOPPER_EXPECTED,
            (Pass::Gradient, _) => HOPPER_GRADIENT,
        };
        let params = HopperParams {
            x_map: self.driver.tensor_map(x, dim, dtype, tiling.block_x)?,
            y_map: self.driver.tensor_map(y, dim, dtype, tiling.block_y)?,
            stream: *params,
            y_row_terms: self.element(self.workspace.candidate_rows, params.candidate_start as usize, ROW_TERM),
            splits: tiling.splits as u32,
            padding: 0,
        };
        self.driver.launch(kernel, self.problem.typed().chunks(tiling.output_chunks), grid, &params)
    }

    /// A pool's candidates against all queries: partial gradients, or with one split the gradients themselves in `d_pool`.
    /// Returns where they are.
    pub(super) fn stream_gradient(&self, pool: &ProblemPool, tiling: &Tiling, d_pool: u64) -> Result<u64> {
        let (problem, workspace) = (self.problem, self.workspace);
        let (queries, candidates) = (problem.queries, pool.candidates);
        let output = if tiling.splits > 1 { self.at(workspace.gradient.output) } else { d_pool };
        let in_stream = problem.positive_in_stream();
        let params = StreamParams {
            x: candidates.address,
            x_indices: candidates.indices,
            y: queries.address,
            x_terms: self.element(workspace.candidate_rows, pool.start, ROW_TERM),
            y_terms: self.at(workspace.query_columns),
            positives: if in_stream { self.at(workspace.positive_terms) } else { 0 },
            max: self.at(workspace.gradient.max),
            output,
            x_stride: candidates.stride as u64,
            y_stride: queries.stride as u64,
            x_rows: candidates.rows as u32,
            y_rows: queries.rows as u32,
            dim: problem.dim as u32,
            tiles_per_split: tiling.tiles_per_split as u32,
            alignment: problem.alignment(queries, candidates),
            x_resident: u32::from(tiling.x_resident),
            // Coefficients are at most their row's d_lse: they need no maximum, except where f16 would lose the small ones.
            online: u32::from(problem.dtype == DType::F16),
            ..self.with_masks(pool, StreamParams::default())
        };
        self.launch_stream(Pass::Gradient, tiling, candidates, queries, &params)?;
        Ok(output)
    }
}
