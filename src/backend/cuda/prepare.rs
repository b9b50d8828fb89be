//! What comes before the stream: norms and terms of rows, positives, rejected ids.

use super::driver::{Grid, THREADS};
use super::kernels::{FIND_HITS, PLACE_POSITIVES, PREPARE_ROWS, Variant};
use super::params::{
    COLUMN_TERM, FindHitsParams, HITS, KeyTable, OUTPUT_FOLDED, OUTPUT_PLAIN, PlacePositivesParams, PrepareRowsParams,
    ROW_TERM, RowSet,
};
use super::passes::Step;
use super::problem::{ProblemPool, ProblemPositives, Rows};
use super::tiling::{Tiling, static_shift};
use crate::error::Result;
use crate::problem::embeddings::DType;
use crate::problem::statistics::Request;

/// Constants in place of the running maximum, where scores are bounded.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Shifts {
    /// Of statistics alone.
    pub(super) statistics: Option<f32>,
    /// Of the pass with expected negatives.
    pub(super) expected: Option<f32>,
}

/// The two directions of a symmetric loss.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Swap {
    /// The first: where each candidate's query goes.
    pub(super) query_of: u64,
    /// The second: where each row's weight goes. Those of the problem's rows are then by query.
    pub(super) swapped_weight: u64,
}

impl Step<'_> {
    /// Everything that the passes need. One launch for each pool of rows, of positives and of hits.
    pub(super) fn prepare(&self, request: Request) -> Result<()> {
        self.check_rows()?;
        self.rows(request)?;
        self.positives()?;
        if self.problem.masked() { self.find_hits() } else { Ok(()) }
    }

    /// Where a pass wants the shift, its terms have it.
    pub(super) fn shifts(&self, request: Request) -> Shifts {
        let (problem, tilings) = (self.problem, &self.workspace.tilings);
        let shift = || {
            let (low, high) = problem.score_range()?;
            static_shift(low, high, problem.num_candidates())
        };
        // bf16 holds probabilities of any size.
        let bounded = problem.dtype == DType::Bf16 && tilings.expected.iter().all(Tiling::is_bounded);
        let value_alone = !request.gradients && !request.moments && !request.rank;
        Shifts {
            statistics: if value_alone { shift() } else { None },
            expected: if request.gradients && bounded { shift() } else { None },
        }
    }

    /// Queries, separate positives and the key table's slots go with the first pool, or alone where there is none.
    fn rows(&self, request: Request) -> Result<()> {
        let (problem, workspace, shifts) = (self.problem, self.workspace, self.shifts(request));
        let queries = RowSet {
            row_terms: self.at(workspace.query_rows),
            scale: problem.scale,
            ..row_set(problem.queries, self.at(workspace.query_norms))
        };
        let separate = match problem.positives {
            ProblemPositives::Separate(rows) => row_set(rows, self.at(workspace.separate_norms)),
            ProblemPositives::Index(_) | ProblemPositives::None => RowSet::default(),
        };
        for pool in problem.pools.iter().map(Some).chain(problem.pools.iter().next().is_none().then_some(None)) {
            let first = pool.is_none_or(|pool| pool.start == 0);
            let keys = if first { self.keys() } else { KeyTable::default() };
            let [queries, separate] = if first { [queries, separate] } else { [RowSet::default(); 2] };
            let candidates = pool.map_or_else(RowSet::default, |pool| self.candidates(pool, shifts));
            let sets = [queries, separate, candidates];
            let slots = if keys.capacity == 0 { 0 } else { keys.capacity as usize + 1 };
            let blocks = sets.iter().map(|set| Grid::rows(set.rows as usize, problem.dim).blocks.0).sum::<u32>();
            let grid = Grid { blocks: (blocks + Grid::threads(slots).blocks.0, 1, 1), shared_bytes: 0 };
            let params = PrepareRowsParams {
                sets,
                keys,
                fault: self.fault,
                dim: problem.dim as u64,
                cosine: u64::from(problem.cosine),
            };
            self.driver.launch(PREPARE_ROWS, problem.typed(), grid, &params)?;
        }
        Ok(())
    }

    fn candidates(&self, pool: &ProblemPool, shifts: Shifts) -> RowSet {
        let workspace = self.workspace;
        // f16 has too few exponents for the factors; with the other types folding would only cost.
        let folded = self.problem.dtype == DType::F16;
        RowSet {
            log_q: pool.log_q,
            row_terms: self.element(workspace.candidate_rows, pool.start, ROW_TERM),
            columns: self.element(workspace.candidate_columns, pool.start, COLUMN_TERM),
            output_columns: self.element(workspace.output_columns, pool.start, COLUMN_TERM),
            start: pool.start as u64,
            shift: shifts.statistics.unwrap_or(0.0),
            output_shift: shifts.expected.unwrap_or(0.0),
            output_factor: if folded { OUTPUT_FOLDED } else { OUTPUT_PLAIN },
            ..row_set(pool.candidates, self.element(workspace.candidate_norms, pool.start, 4))
        }
    }

    pub(super) fn keys(&self) -> KeyTable {
        let resolved = &self.workspace.resolved;
        KeyTable {
            keys: self.at(resolved.slot_keys),
            first: self.at(resolved.slot_first),
            last: self.at(resolved.slot_last),
            rows: self.at(resolved.rows_of_keys),
            capacity: resolved.capacity as u64,
        }
    }

    /// Excluded pairs and sums of weights go with the first launch.
    fn positives(&self) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let rows = problem.num_queries();
        let any = PlacePositivesParams {
            positives: problem.positive_index(),
            positive_offsets: problem.positive_offsets,
            separate_ids: if problem.positives_of_table() { problem.table_ids } else { problem.positive_ids },
            pair_rows: self.at(workspace.pair_rows),
            addresses: self.at(workspace.positive_addresses),
            inverse_norm: self.at(workspace.positive_norms),
            terms: self.at(workspace.positive_columns),
            positive_ids: self.at(workspace.positive_ids),
            positive_log_q: self.at(workspace.positive_log_q),
            keys: self.keys(),
            fault: self.fault,
            candidates: problem.num_candidates() as u64,
            rows: rows as u32,
            pairs: problem.pairs as u32,
            element_bytes: problem.dtype.size() as u32,
            ..PlacePositivesParams::default()
        };
        let first = PlacePositivesParams {
            exclude_offsets: problem.exclude_offsets,
            exclude_ids: problem.exclude_ids,
            excluded_pairs: problem.excluded as u32,
            row_weight: problem.row_weight,
            weight_sums: self.at(workspace.weight_sums),
            pair_offsets: self.at(workspace.pair_offsets),
            query_of: self.swap.query_of,
            swapped_weight: self.swap.swapped_weight,
            ..any
        };
        let launch = |params: &PlacePositivesParams| {
            let by_rows = Grid::threads(rows).blocks.0 + Grid::threads(problem.pairs).blocks.0;
            let blocks = by_rows + params.excluded_pairs.div_ceil(THREADS);
            let grid = Grid { blocks: (blocks, 1, 1), shared_bytes: 0 };
            self.driver.launch(PLACE_POSITIVES, Variant::ONLY, grid, params)
        };
        match problem.positives {
            ProblemPositives::None if problem.exclude_offsets == 0 => Ok(()),
            ProblemPositives::None => launch(&first),
            ProblemPositives::Separate(rows) => launch(&PlacePositivesParams {
                base: rows.address,
                base_indices: rows.indices,
                base_inverse_norm: self.at(workspace.separate_norms),
                stride: rows.stride as u64,
                count: rows.rows as u64,
                ..first
            }),
            ProblemPositives::Index(_) => problem.pools.iter().try_for_each(|pool| {
                launch(&PlacePositivesParams {
                    base: pool.candidates.address,
                    base_indices: pool.candidates.indices,
                    base_inverse_norm: self.element(workspace.candidate_norms, pool.start, 4),
                    candidate_ids: pool.ids,
                    candidate_log_q: pool.log_q,
                    stride: pool.candidates.stride as u64,
                    start: pool.start as u64,
                    count: pool.candidates.rows as u64,
                    ..if pool.start == 0 { first } else { any }
                })
            }),
        }
    }

    fn find_hits(&self) -> Result<()> {
        self.problem.pools.iter().try_for_each(|pool| {
            let params = FindHitsParams {
                keys: self.keys(),
                candidate_ids: pool.ids,
                indices: pool.candidates.indices,
                hits: self.element(self.workspace.resolved.hits, pool.start, HITS),
                candidates: pool.candidates.rows as u64,
                start: if pool.of_table { 0 } else { pool.start as u64 },
            };
            self.driver.launch(FIND_HITS, Variant::ONLY, Grid::threads(pool.candidates.rows), &params)
        })
    }
}

fn row_set(rows: Rows, inverse_norm: u64) -> RowSet {
    RowSet {
        embeddings: rows.address,
        indices: rows.indices,
        inverse_norm,
        rows: rows.rows as u64,
        stride: rows.stride as u64,
        scale: 1.0,
        ..RowSet::default()
    }
}
