//! The passes of a step as launches, in the order of the stream:
//!
//! ```text
//! prepare      norms, positives, rejected ids         rows.cu, positives.cu, terms.cu, resolve.cu
//! statistics   queries against candidates, merged     stream_sm80.cu, *_sm90a.cu, merge.cu
//! back         gradients                              positives.cu, stream_sm80.cu, output_sm90a.cu, merge.cu
//! ```
//!
//! `wide.rs` has the launches of a stream over rows of more than 256 elements on Hopper.
//!
//! Every address that a launch gets comes from a [`Problem`] (inputs), a [`Workspace`] in the arena, or one of the output
//! structs here, and holds as many elements as the kernel's parameter file says for the problem's sizes.

use super::driver::{Driver, Grid};
use super::memory::{Arena, Part};
use super::params::{
    COLUMN_TERM, CORRECTION_NONE, EpilogueParams, HITS, HopperParams, MergeParams, MergeRowsParams, OUTPUT_FOLDED,
    OUTPUT_NONE, OUTPUT_PLAIN, PositivesParams, ROW_TERM, ResolveParams, RowInverseNormsParams, StreamParams,
    TermsParams,
};
use super::problem::{Problem, ProblemPool, ProblemPositives, Rows};
use super::tiling::{Family, Tiling, static_shift};
use super::workspace::{Partials, Workspace};
use crate::error::Result;
use crate::problem::embeddings::DType;
use crate::problem::statistics::Request;

/// Addresses of row statistics, (B) each; 0 for what was not asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StatisticsOut {
    pub(super) lse: u64,
    pub(super) positive: u64,
    pub(super) num_negatives: u64,
    pub(super) expected_score: u64,
    pub(super) entropy: u64,
    pub(super) above: u64,
    pub(super) ties: u64,
    /// (B, D)
    pub(super) expected_negative: u64,
}

/// Addresses of the stream back's inputs (lse, num_negatives, d_lse, d_positive, expected_negative) and outputs.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Back {
    pub(super) lse: u64,
    pub(super) num_negatives: u64,
    pub(super) d_lse: u64,
    pub(super) d_positive: u64,
    pub(super) expected_negative: u64,
    pub(super) d_queries: u64,
    pub(super) d_positive_embeddings: u64,
    /// (B) each row's share of `∂L/∂γ`.
    pub(super) d_gamma: u64,
    /// (N, D) for each pool; 0 for one without gradient.
    pub(super) d_candidates: Vec<u64>,
}

/// A step on a device.
#[derive(Clone, Copy)]
pub(super) struct Step<'a> {
    pub(super) driver: &'a Driver,
    pub(super) arena: &'a Arena,
    pub(super) problem: &'a Problem,
    pub(super) workspace: &'a Workspace,
    /// Where kernels report what breaks a rule.
    pub(super) fault: u64,
}

impl Step<'_> {
    pub(super) fn at(&self, part: Part) -> u64 {
        self.arena.address(part)
    }

    /// Address of element `index` of a part; 0 where the part is not there.
    pub(super) fn element(&self, part: Part, index: usize, bytes: usize) -> u64 {
        match self.at(part) {
            0 => 0,
            address => address + (index * bytes) as u64,
        }
    }

    /// What the cosine's chain rule needs, and dot has none of.
    fn cosine_only(&self, norms: u64) -> u64 {
        if self.problem.cosine { norms } else { 0 }
    }

    /// Everything that both passes need.
    pub(super) fn prepare(&self) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        self.norms(problem.queries, self.at(workspace.query_norms))?;
        for pool in &problem.pools {
            self.norms(pool.candidates, self.element(workspace.candidate_norms, pool.start, 4))?;
        }
        if let ProblemPositives::Separate(rows) = problem.positives {
            self.norms(rows, self.at(workspace.separate_norms))?;
        }
        let terms = TermsParams {
            inverse_norm: self.at(workspace.query_norms),
            row_terms: self.at(workspace.query_rows),
            rows: problem.num_queries() as u64,
            scale: problem.scale,
            ..TermsParams::default()
        };
        self.driver.launch("query_rows", Grid::threads(problem.num_queries()), &terms)?;
        self.gather_positives()?;
        self.paired()?;
        if problem.masked() { self.resolve() } else { Ok(()) }
    }

    fn norms(&self, rows: Rows, inverse_norm: u64) -> Result<()> {
        let params = RowInverseNormsParams {
            embeddings: rows.address,
            inverse_norm,
            rows: rows.rows as u64,
            dim: self.problem.dim as u64,
            stride: rows.stride as u64,
            cosine: u64::from(self.problem.cosine),
        };
        self.driver.launch(&self.problem.typed("row_inverse_norms"), Grid::warps(rows.rows), &params)
    }

    fn gather_positives(&self) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let gather = |rows: Rows, start: usize, norms: u64, ids: u64, log_q: u64| {
            let params = PositivesParams {
                base: rows.address,
                positives: problem.positive_index(),
                base_inverse_norm: norms,
                candidate_ids: ids,
                candidate_log_q: log_q,
                positive_ids: self.at(workspace.positive_ids),
                positive_log_q: self.at(workspace.positive_log_q),
                fault: self.fault,
                candidates: problem.num_candidates() as u64,
                addresses: self.at(workspace.positive_addresses),
                positive_inverse_norm: self.at(workspace.positive_norms),
                terms: self.at(workspace.positive_columns),
                stride: rows.stride as u64,
                start: start as u64,
                count: rows.rows as u64,
                rows: problem.num_queries() as u32,
                element_bytes: problem.dtype.size() as u32,
                ..PositivesParams::default()
            };
            self.driver.launch("gather_positives", Grid::threads(problem.num_queries()), &params)
        };
        match problem.positives {
            ProblemPositives::None => Ok(()),
            ProblemPositives::Separate(rows) => gather(rows, 0, self.at(workspace.separate_norms), 0, 0),
            ProblemPositives::Index(_) => problem.pools.iter().try_for_each(|pool| {
                let norms = self.element(workspace.candidate_norms, pool.start, 4);
                gather(pool.candidates, pool.start, norms, pool.ids, pool.log_q)
            }),
        }
    }

    /// Similarities of queries with their positives, by the matmul that the stream uses: a negative with the positive's
    /// embedding ties bit for bit.
    fn paired(&self) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let positives_aligned = match problem.positives {
            ProblemPositives::None => return Ok(()),
            ProblemPositives::Separate(rows) => rows.aligned(problem.dtype),
            ProblemPositives::Index(_) => problem.pools.iter().all(|pool| pool.candidates.aligned(problem.dtype)),
        };
        let tiling = &workspace.tilings.paired;
        let params = StreamParams {
            y_terms: self.at(workspace.positive_columns),
            y_addresses: self.at(workspace.positive_addresses),
            // Where a row is missing, its copy of 0 bytes is addressed from here.
            y: problem.queries.address,
            y_rows: problem.num_queries() as u32,
            max: self.at(workspace.positive_z),
            aligned: u32::from(problem.queries.aligned(problem.dtype) && positives_aligned),
            ..self.queries_stationary(tiling)
        };
        let grid = Grid { blocks: (tiling.blocks(problem.num_queries()).0, 1, 1), shared_bytes: tiling.shared_bytes };
        self.driver.launch(&problem.stream_typed("stream_paired"), grid, &params)
    }

    fn resolve(&self) -> Result<()> {
        let (problem, resolved) = (self.problem, &self.workspace.resolved);
        let params = ResolveParams {
            positive_ids: match problem.positive_ids {
                0 => self.at(self.workspace.positive_ids),
                given => given,
            },
            positives: problem.positive_index(),
            exclude_offsets: problem.exclude_offsets,
            exclude_ids: problem.exclude_ids,
            slot_keys: self.at(resolved.slot_keys),
            slot_first: self.at(resolved.slot_first),
            slot_last: self.at(resolved.slot_last),
            rows_of_keys: self.at(resolved.rows_of_keys),
            fault: self.fault,
            rows: problem.num_queries() as u32,
            positive_pairs: problem.positive_pairs() as u32,
            excluded_pairs: problem.excluded as u32,
            capacity: resolved.capacity as u32,
            ..ResolveParams::default()
        };
        if problem.exclude_offsets != 0 {
            self.driver.launch("check_offsets", Grid::threads(problem.num_queries()), &params)?;
        }
        self.driver.launch("clear_slots", Grid::threads(resolved.capacity + 1), &params)?;
        self.driver.launch("insert_pairs", Grid::threads(problem.positive_pairs() + problem.excluded), &params)?;
        problem.pools.iter().try_for_each(|pool| {
            let params = ResolveParams {
                candidate_ids: pool.ids,
                hits: self.element(resolved.hits, pool.start, HITS),
                candidates: pool.candidates.rows as u64,
                candidate_start: pool.start as u64,
                ..params
            };
            self.driver.launch("find_hits", Grid::threads(pool.candidates.rows), &params)
        })
    }

    /// Row statistics, merged; expected negatives where the request wants gradients.
    pub(super) fn statistics(&self, request: Request, out: &StatisticsOut) -> Result<()> {
        let workspace = self.workspace;
        let detail = request.moments || request.rank;
        if detail || !request.gradients {
            let shift = if detail { None } else { self.shift() };
            self.candidate_columns(OUTPUT_NONE, shift)?;
            if workspace.tilings.statistics.iter().any(Tiling::is_hopper) {
                self.candidate_rows(shift)?;
            }
            let kernel = if detail { "stream_detail" } else { "stream_statistics" };
            self.stream_pools(kernel, &workspace.tilings.statistics, &workspace.statistics, shift)?;
            self.merge_rows(&workspace.statistics, out)?;
        }
        if request.gradients {
            // f16 has too few exponents for the factors; with the other types folding would only cost.
            let factor = if self.problem.dtype == DType::F16 { OUTPUT_FOLDED } else { OUTPUT_PLAIN };
            // bf16 holds probabilities of any size.
            let bounded =
                self.problem.dtype == DType::Bf16 && workspace.tilings.expected.iter().all(Tiling::is_bounded);
            let shift = if bounded { self.shift() } else { None };
            self.candidate_columns(factor, shift)?;
            self.stream_pools("stream_expected", &workspace.tilings.expected, &workspace.expected, shift)?;
            if !detail {
                self.merge_rows(&workspace.expected, out)?;
            }
            self.merge_expected(out)?;
        }
        Ok(())
    }

    pub(super) fn candidate_columns(&self, output_factor: u32, shift: Option<f32>) -> Result<()> {
        self.candidate_terms("candidate_columns", |params, pool| TermsParams {
            columns: self.element(self.workspace.candidate_columns, pool.start, COLUMN_TERM),
            output_factor,
            shift: shift.unwrap_or(0.0),
            ..params
        })
    }

    fn candidate_rows(&self, shift: Option<f32>) -> Result<()> {
        self.candidate_terms("candidate_rows", |params, pool| TermsParams {
            row_terms: self.element(self.workspace.candidate_rows, pool.start, ROW_TERM),
            shift: shift.unwrap_or(0.0),
            ..params
        })
    }

    fn candidate_terms(&self, kernel: &str, with: impl Fn(TermsParams, &ProblemPool) -> TermsParams) -> Result<()> {
        self.problem.pools.iter().try_for_each(|pool| {
            let params = TermsParams {
                inverse_norm: self.element(self.workspace.candidate_norms, pool.start, 4),
                log_q: pool.log_q,
                fault: self.fault,
                rows: pool.candidates.rows as u64,
                start: pool.start as u64,
                ..TermsParams::default()
            };
            self.driver.launch(kernel, Grid::threads(pool.candidates.rows), &with(params, pool))
        })
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
            ..params
        }
    }

    /// A constant in place of the running maximum, where scores are bounded.
    fn shift(&self) -> Option<f32> {
        let (low, high) = self.problem.score_range()?;
        static_shift(low, high, self.problem.num_candidates())
    }

    /// Queries against each pool. The splits of all pools are one list.
    fn stream_pools(&self, kernel: &str, tilings: &[Tiling], partials: &Partials, shift: Option<f32>) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let mut first_split = 0;
        for (pool, tiling) in problem.pools.iter().zip(tilings) {
            let params = StreamParams {
                y: pool.candidates.address,
                y_terms: self.element(workspace.candidate_columns, pool.start, COLUMN_TERM),
                y_stride: pool.candidates.stride as u64,
                y_rows: pool.candidates.rows as u32,
                positive_z: self.at(workspace.positive_z),
                first_split: first_split as u32,
                aligned: u32::from(problem.queries.aligned(problem.dtype) && pool.candidates.aligned(problem.dtype)),
                online: u32::from(shift.is_none()),
                shift: shift.unwrap_or(0.0),
                ..self.with_partials(partials, self.with_masks(pool, self.queries_stationary(tiling)))
            };
            self.launch_stream(kernel, tiling, problem.queries, pool.candidates, &params)?;
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

    fn launch_stream(&self, kernel: &str, tiling: &Tiling, x: Rows, y: Rows, params: &StreamParams) -> Result<()> {
        let grid = Grid { blocks: tiling.blocks(x.rows), shared_bytes: tiling.shared_bytes };
        match tiling.family {
            Family::Portable => {}
            Family::Hopper { .. } => return self.launch_hopper(kernel, tiling, grid, [x, y], params),
            Family::Wide { pairs, panel: None } => return self.wide_statistics(tiling, pairs, [x, y], params),
            Family::Wide { pairs, panel: Some(panel) } => {
                return self.wide_output(kernel, tiling, pairs, panel, [x, y], params);
            }
        }
        let kernel = match tiling.output_chunks {
            0 => kernel.to_owned(),
            chunks => format!("{kernel}_{chunks}"),
        };
        self.driver.launch(&self.problem.stream_typed(&kernel), grid, params)
    }

    fn launch_hopper(
        &self,
        kernel: &str,
        tiling: &Tiling,
        grid: Grid,
        [x, y]: [Rows; 2],
        params: &StreamParams,
    ) -> Result<()> {
        let (dim, dtype) = (self.problem.dim, self.problem.dtype);
        let name = match (kernel, params.online) {
            ("stream_statistics", 0) => "bounded",
            ("stream_statistics", _) => "statistics",
            ("stream_expected", 0) => "bounded_expected",
            ("stream_expected", _) => "expected",
            _ => "gradient",
        };
        let params = HopperParams {
            x_map: self.driver.tensor_map(x, dim, dtype, tiling.block_x)?,
            y_map: self.driver.tensor_map(y, dim, dtype, tiling.block_y)?,
            stream: *params,
            y_row_terms: self.element(self.workspace.candidate_rows, params.candidate_start as usize, ROW_TERM),
            splits: tiling.splits as u32,
            padding: 0,
        };
        let name = self.problem.typed(&format!("stream_hopper_{name}_{}", tiling.output_chunks));
        self.driver.launch(&name, grid, &params)
    }

    fn merge_rows(&self, partials: &Partials, out: &StatisticsOut) -> Result<()> {
        let params = MergeRowsParams {
            max: self.at(partials.max),
            sum: self.at(partials.sum),
            masked: self.at(partials.masked),
            sum_score: self.at(partials.sum_score),
            sum_z: self.at(partials.sum_z),
            above: self.at(partials.above),
            ties: self.at(partials.ties),
            positive_z: self.at(self.workspace.positive_z),
            lse: out.lse,
            positive: out.positive,
            num_negatives: out.num_negatives,
            expected_score: out.expected_score,
            entropy: out.entropy,
            ranked_above: out.above,
            ranked_ties: out.ties,
            rows: self.problem.num_queries() as u64,
            candidates: self.problem.num_candidates() as u64,
            splits: partials.splits as u64,
        };
        self.driver.launch("merge_rows", Grid::threads(self.problem.num_queries()), &params)
    }

    fn merge_expected(&self, out: &StatisticsOut) -> Result<()> {
        let partials = &self.workspace.expected;
        let params = MergeParams {
            max: self.at(partials.max),
            sum: self.at(partials.sum),
            masked: self.at(partials.masked),
            output: self.at(partials.output),
            result: out.expected_negative,
            rows: self.problem.num_queries() as u64,
            candidates: self.problem.num_candidates() as u64,
            dim: self.problem.dim as u32,
            splits: partials.splits as u32,
            ..MergeParams::default()
        };
        self.driver.launch("merge_expected", Grid::warps(self.problem.num_queries()), &params)
    }

    /// Gradients of everything, given each row's derivatives.
    pub(super) fn back(&self, back: &Back) -> Result<()> {
        self.query_gradient(back)?;
        self.query_columns(back)?;
        self.candidate_rows(None)?;
        let pools = self.problem.pools.iter().zip(&self.workspace.tilings.gradient).zip(&back.d_candidates);
        for ((pool, tiling), &d_pool) in pools {
            if pool.gradient {
                self.candidate_gradient(pool, tiling, d_pool)?;
            }
        }
        Ok(())
    }

    /// Losses and derivatives of rows, and the total. Of positives that are candidates, log_q was gathered.
    pub(super) fn epilogue(&self, params: &EpilogueParams) -> Result<()> {
        let gathered = self.at(self.workspace.positive_log_q);
        let positive_log_q = if params.correction == CORRECTION_NONE {
            0
        } else if self.problem.positive_log_q != 0 {
            self.problem.positive_log_q
        } else {
            gathered
        };
        self.driver.launch("epilogue", Grid::threads(1), &EpilogueParams { positive_log_q, ..*params })
    }

    /// Gradients of the temperature, after [`back`](Step::back).
    pub(super) fn finish_temperature(&self, params: &EpilogueParams) -> Result<()> {
        self.driver.launch("finish_temperature", Grid::threads(1), params)
    }

    fn query_gradient(&self, back: &Back) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let params = PositivesParams {
            addresses: self.at(workspace.positive_addresses),
            positive_inverse_norm: self.at(workspace.positive_norms),
            queries: problem.queries.address,
            query_inverse_norm: self.cosine_only(self.at(workspace.query_norms)),
            expected_negative: back.expected_negative,
            d_lse: back.d_lse,
            d_positive: back.d_positive,
            d_queries: back.d_queries,
            d_positive_embeddings: back.d_positive_embeddings,
            d_gamma: back.d_gamma,
            query_stride: problem.queries.stride as u64,
            rows: problem.num_queries() as u32,
            dim: problem.dim as u32,
            gamma: problem.gamma() as f32,
            ..PositivesParams::default()
        };
        self.driver.launch(&problem.typed("query_gradient"), Grid::warps(problem.num_queries()), &params)
    }

    fn query_columns(&self, back: &Back) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let params = TermsParams {
            inverse_norm: self.at(workspace.query_norms),
            lse: back.lse,
            num_negatives: back.num_negatives,
            d_lse: back.d_lse,
            d_positive: back.d_positive,
            positives: problem.positive_index(),
            columns: self.at(workspace.query_columns),
            positive_terms: self.at(workspace.positive_terms),
            rows: problem.num_queries() as u64,
            scale: problem.scale,
            ..TermsParams::default()
        };
        self.driver.launch("query_columns", Grid::threads(problem.num_queries()), &params)
    }

    fn candidate_gradient(&self, pool: &ProblemPool, tiling: &Tiling, d_pool: u64) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let (queries, candidates) = (problem.queries, pool.candidates);
        let output = if tiling.splits > 1 { self.at(workspace.gradient.output) } else { d_pool };
        let by_index = problem.positive_index() != 0;
        let params = StreamParams {
            x: candidates.address,
            y: queries.address,
            x_terms: self.element(workspace.candidate_rows, pool.start, ROW_TERM),
            y_terms: self.at(workspace.query_columns),
            positives: if by_index { self.at(workspace.positive_terms) } else { 0 },
            max: self.at(workspace.gradient.max),
            output,
            x_stride: candidates.stride as u64,
            y_stride: queries.stride as u64,
            x_rows: candidates.rows as u32,
            y_rows: queries.rows as u32,
            dim: problem.dim as u32,
            tiles_per_split: tiling.tiles_per_split as u32,
            aligned: u32::from(queries.aligned(problem.dtype) && candidates.aligned(problem.dtype)),
            x_resident: u32::from(tiling.x_resident),
            // Coefficients are at most their row's d_lse: they need no maximum, except where f16 would lose the small ones.
            online: u32::from(problem.dtype == DType::F16),
            ..self.with_masks(pool, StreamParams::default())
        };
        self.launch_stream("stream_gradient", tiling, candidates, queries, &params)?;
        let params = MergeParams {
            max: params.max,
            output,
            result: d_pool,
            x: candidates.address,
            inverse_norm: self.cosine_only(self.element(workspace.candidate_norms, pool.start, 4)),
            x_stride: candidates.stride as u64,
            rows: candidates.rows as u64,
            dim: problem.dim as u32,
            splits: tiling.splits as u32,
            gamma: problem.gamma() as f32,
            ..MergeParams::default()
        };
        self.driver.launch(&problem.typed("finish_gradient"), Grid::warps(candidates.rows), &params)
    }
}
