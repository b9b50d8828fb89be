//! What comes after the stream: merged statistics, losses, gradients of queries, and after the stream back gradients of
//! candidates and totals.

use super::driver::Grid;
use super::few::Few;
use super::kernels::{FINISH_GRADIENT, FINISH_ROWS, FINISH_TOTALS, Variant};
use super::params::{
    CORRECTION_NONE, EpilogueParams, ExpectedParams, FinishGradientParams, FinishRowsParams, QueryGradientParams,
    Splits, StatisticsParams, TotalsParams,
};
use super::passes::Step;
use super::problem::ProblemPool;
use super::tiling::Tiling;
use super::workspace::{Partials, block_rows};
use crate::error::Result;
use crate::problem::statistics::Request;

/// Addresses of row statistics, (B) each; 0 for those that were not asked for.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct StatisticsOut {
    pub(super) lse: u64,
    pub(super) positive: u64,
    pub(super) num_negatives: u64,
    pub(super) expected_score: u64,
    pub(super) entropy: u64,
    pub(super) above: u64,
    pub(super) ties: u64,
    /// (B, D); where gradients follow it may be their `d_queries`.
    pub(super) expected_negative: u64,
}

/// Addresses of an epilogue's results.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LossOut {
    /// (B) each; 0 for those that were not asked for.
    pub(super) loss: u64,
    pub(super) probability: u64,
    pub(super) d_lse: u64,
    /// (P); 0 for a place in the workspace.
    pub(super) d_positive: u64,
    pub(super) correction: u32,
    pub(super) reduction: u32,
}

/// Addresses of each row's derivatives by an epilogue that is not the device's own, and of the statistics that it was
/// made of: (B) each, and (B, D).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Upstream {
    pub(super) lse: u64,
    pub(super) num_negatives: u64,
    pub(super) d_lse: u64,
    pub(super) d_positive: u64,
    pub(super) expected_negative: u64,
}

/// Addresses of gradients.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Back {
    /// (B, D)
    pub(super) d_queries: u64,
    /// (B, D); 0 where positives are candidates.
    pub(super) d_positive_embeddings: u64,
    /// (N, D) for each pool; 0 for one without gradient.
    pub(super) d_candidates: Few<u64, 2>,
    /// Of a table with gradient: a row for each of `table_rows`.
    pub(super) d_table: u64,
    pub(super) table_rows: TableRows,
    /// (P) derivatives by the pairs' scores; 0 where the device's own epilogue computes them.
    pub(super) d_positive: u64,
    /// The gradients are added to what is there (`accumulate.rs`).
    pub(super) accumulate: bool,
}

/// Which rows of a table get their gradients written.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) enum TableRows {
    /// All of them: those that nothing names get zeros.
    #[default]
    All,
    /// Those of an ascending list at an address.
    Listed(u64, usize),
    /// Those that something names: which they are, and how many, goes to addresses.
    Sparse { rows: u64, num_rows: u64 },
}

/// Addresses of a step's totals, (1) each; 0 for those that were not asked for.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Totals {
    pub(super) total: u64,
    pub(super) d_temperature: u64,
    pub(super) d_log_temperature: u64,
}

/// After [`stream`](Step::stream).
impl Step<'_> {
    /// Row statistics; expected negatives where the request wants gradients.
    pub(super) fn finish_statistics(&self, request: Request, out: &StatisticsOut) -> Result<()> {
        let (statistics, expected) = (self.statistics_params(request, out), self.expected_params(request, out));
        self.finish_rows(FinishRowsParams { statistics, expected, ..FinishRowsParams::default() })
    }

    /// The same with losses, and where there is a place for them gradients of queries and separate positives. These come
    /// from expected negatives, which are kept where gradients of queries go unless they have a place of their own.
    pub(super) fn finish_losses(
        &self,
        request: Request,
        out: &StatisticsOut,
        loss: &LossOut,
        back: Option<&Back>,
    ) -> Result<()> {
        let kept =
            if out.expected_negative == 0 { back.map_or(0, |back| back.d_queries) } else { out.expected_negative };
        let out = StatisticsOut { expected_negative: kept, ..*out };
        self.finish_rows(FinishRowsParams {
            statistics: self.statistics_params(request, &out),
            expected: self.expected_params(request, &out),
            epilogue: self.epilogue_params(loss),
            gradient: back.map_or_else(QueryGradientParams::default, |back| self.gradient_params(back)),
            ..FinishRowsParams::default()
        })
    }

    /// Gradients of queries and separate positives alone. Needs no stream before it.
    pub(super) fn finish_upstream(&self, upstream: &Upstream, back: &Back) -> Result<()> {
        let gradient = QueryGradientParams {
            lse: upstream.lse,
            num_negatives: upstream.num_negatives,
            d_lse: upstream.d_lse,
            d_positive: upstream.d_positive,
            ..self.gradient_params(back)
        };
        let expected = ExpectedParams { expected_negative: upstream.expected_negative, ..ExpectedParams::default() };
        self.finish_rows(FinishRowsParams { expected, gradient, ..FinishRowsParams::default() })
    }

    fn finish_rows(&self, params: FinishRowsParams) -> Result<()> {
        let rows = self.problem.num_queries();
        let params = FinishRowsParams {
            rows: rows as u64,
            dim: self.problem.dim as u32,
            block_rows: block_rows(rows) as u32,
            ..params
        };
        let grid = Grid { blocks: (self.row_blocks() as u32, 1, 1), shared_bytes: 0 };
        self.driver.launch(FINISH_ROWS, self.problem.typed(), grid, &params)
    }

    fn row_blocks(&self) -> usize {
        let rows = self.problem.num_queries();
        rows.div_ceil(block_rows(rows))
    }

    fn statistics_params(&self, request: Request, out: &StatisticsOut) -> StatisticsParams {
        let value_and_grad = request.gradients && !request.moments && !request.rank;
        let partials = if value_and_grad { &self.workspace.expected } else { &self.workspace.statistics };
        StatisticsParams {
            splits: self.splits(partials),
            sum_score: self.at(partials.sum_score),
            sum_z: self.at(partials.sum_z),
            above: self.at(partials.above),
            ties: self.at(partials.ties),
            positive_z: self.at(self.workspace.positive_z),
            positive_offsets: self.at(self.workspace.pair_offsets),
            lse: out.lse,
            positive: out.positive,
            num_negatives: out.num_negatives,
            expected_score: out.expected_score,
            entropy: out.entropy,
            ranked_above: out.above,
            ranked_ties: out.ties,
            candidates: self.problem.most_negatives() as u64,
            pairs: self.problem.pairs as u64,
        }
    }

    fn expected_params(&self, request: Request, out: &StatisticsOut) -> ExpectedParams {
        if !request.gradients {
            return ExpectedParams::default();
        }
        let partials = &self.workspace.expected;
        ExpectedParams {
            splits: self.splits(partials),
            output: self.at(partials.output),
            expected_negative: out.expected_negative,
        }
    }

    fn splits(&self, partials: &Partials) -> Splits {
        Splits {
            max: self.at(partials.max),
            sum: self.at(partials.sum),
            masked: self.at(partials.masked),
            count: partials.splits as u64,
        }
    }

    /// Of positives that are candidates, log_q was gathered.
    fn epilogue_params(&self, loss: &LossOut) -> EpilogueParams {
        let (problem, workspace) = (self.problem, self.workspace);
        let given = problem.positive_log_q;
        let log_q = if given == 0 { self.at(workspace.positive_log_q) } else { given };
        EpilogueParams {
            block_losses: self.at(workspace.block_losses),
            loss: loss.loss,
            probability: loss.probability,
            d_lse: loss.d_lse,
            d_positive: if loss.d_positive == 0 { self.at(workspace.d_positive) } else { loss.d_positive },
            positive_weight: problem.positive_weight,
            positive_log_q: if loss.correction == CORRECTION_NONE { 0 } else { log_q },
            row_weight: if self.swap.swapped_weight == 0 { problem.row_weight } else { self.swap.swapped_weight },
            weight_sums: self.at(workspace.weight_sums),
            weight_blocks: Grid::threads(problem.num_queries()).blocks.0.into(),
            fault: self.fault,
            correction: loss.correction,
            reduction: loss.reduction,
        }
    }

    fn gradient_params(&self, back: &Back) -> QueryGradientParams {
        let (problem, workspace) = (self.problem, self.workspace);
        QueryGradientParams {
            queries: problem.queries.address,
            query_inverse_norm: self.at(workspace.query_norms),
            positive_addresses: self.at(workspace.positive_addresses),
            positive_inverse_norm: self.at(workspace.positive_norms),
            positive_offsets: self.at(workspace.pair_offsets),
            positives: if problem.positive_in_stream() { problem.positive_index() } else { 0 },
            d_positive: if back.d_positive == 0 { self.at(workspace.d_positive) } else { back.d_positive },
            d_queries: back.d_queries,
            d_positive_embeddings: back.d_positive_embeddings,
            columns: self.at(workspace.query_columns),
            positive_terms: self.at(workspace.positive_terms),
            block_d_gamma: self.at(workspace.block_d_gamma),
            query_stride: problem.queries.stride as u64,
            gamma: problem.gamma() as f32,
            scale: problem.scale,
            cosine: u32::from(problem.cosine),
            ..QueryGradientParams::default()
        }
    }
}

/// The stream back and what follows it.
impl Step<'_> {
    /// The totals of a step without gradients.
    pub(super) fn finish_value(&self, totals: &Totals) -> Result<()> {
        self.finish_totals(&TotalsParams { block_d_gamma: 0, ..self.totals_params(totals) })
    }

    /// Gradients of the candidates of all pools and of the table, and the step's totals: the last launch computes them, or one of
    /// their own.
    pub(super) fn back(&self, back: &Back, totals: &Totals) -> Result<()> {
        let (problem, totals) = (self.problem, self.totals_params(totals));
        // A row's one positive by index has its gradient from the stream; several have theirs from lists.
        let by_lists = problem.positive_index() != 0 && !problem.positive_in_stream();
        let pools = problem.pools.iter().zip(self.workspace.tilings.gradient.iter()).zip(back.d_candidates.iter());
        let mut pools = pools.filter(|((pool, _), _)| pool.gradient && !pool.of_table).peekable();
        let uses = self.sorted_uses()?;
        let totals_apart = pools.peek().is_none() || by_lists || problem.table_gradient;
        while let Some(((pool, tiling), &d_pool)) = pools.next() {
            let output = self.stream_gradient(pool, tiling, d_pool)?;
            if by_lists {
                self.finish_candidates(pool, tiling, output, d_pool, uses, back)?;
                continue;
            }
            let candidates = pool.candidates;
            let norms = self.element(self.workspace.candidate_norms, pool.start, 4);
            let with_totals = pools.peek().is_none() && !totals_apart;
            let params = FinishGradientParams {
                result: d_pool,
                x: candidates.address,
                inverse_norm: if problem.cosine { norms } else { 0 },
                x_stride: candidates.stride as u64,
                gamma: problem.gamma() as f32,
                totals,
                ..self.merge_params(pool, tiling, output)
            };
            self.finish_gradient(&params, with_totals)?;
        }
        if problem.table_gradient {
            self.table_gradient(uses, back)?;
        }
        if totals_apart { self.finish_totals(&totals) } else { Ok(()) }
    }

    /// Merges a pool's splits.
    pub(super) fn merge_params(&self, pool: &ProblemPool, tiling: &Tiling, output: u64) -> FinishGradientParams {
        FinishGradientParams {
            max: self.at(self.workspace.gradient.max),
            output,
            rows: pool.candidates.rows as u64,
            dim: self.problem.dim as u32,
            splits: tiling.splits as u32,
            gamma: 1.0,
            ..FinishGradientParams::default()
        }
    }

    pub(super) fn finish_gradient(&self, params: &FinishGradientParams, with_totals: bool) -> Result<()> {
        let blocks = Grid::rows(params.rows as usize, params.dim as usize).blocks.0 + u32::from(with_totals);
        let grid = Grid { blocks: (blocks, 1, 1), shared_bytes: 0 };
        self.driver.launch(FINISH_GRADIENT, self.problem.typed(), grid, params)
    }

    fn finish_totals(&self, totals: &TotalsParams) -> Result<()> {
        self.driver.launch(FINISH_TOTALS, Variant::ONLY, Grid::threads(1), totals)
    }

    fn totals_params(&self, totals: &Totals) -> TotalsParams {
        TotalsParams {
            // If the epilogue is the caller's, there are no losses to add up, and their total was not asked for.
            block_losses: if totals.total == 0 { 0 } else { self.at(self.workspace.block_losses) },
            block_d_gamma: self.at(self.workspace.block_d_gamma),
            total: totals.total,
            d_temperature: totals.d_temperature,
            d_log_temperature: totals.d_log_temperature,
            blocks: self.row_blocks() as u64,
            gamma: self.problem.gamma(),
        }
    }
}
