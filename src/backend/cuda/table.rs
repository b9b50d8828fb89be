//! What a batch over a table adds to the passes: bounds of the filter, negatives of rows' own, and gradients of rows that several
//! things name.

use super::driver::Grid;
use super::finish::{Back, TableRows};
use super::kernels::{
    BOUNDS, CHECK_ROWS, COUNT_ROWS, EVERY_ROW, FINISH_TABLE, LIST_USES, OWN_NEGATIVES, PLACE_ROWS, SORT_COUNT,
    SORT_PLACES, SORT_SCATTER, SUM_SEGMENTS, Variant,
};
use super::params::{
    BoundsParams, CheckRowsParams, FinishGradientParams, FinishTableParams, KeyTable, ListUsesParams, OwnNegatives,
    OwnNegativesParams, PlaceRowsParams, SEGMENT, SORT_TILE, SortUsesParams, USE_BITS, USES_OF_WARP, Uses,
};
use super::passes::Step;
use super::problem::{ProblemPool, ProblemPositives, Rows};
use super::tiling::Tiling;
use super::workspace::Partials;
use crate::error::Result;
use crate::problem::embeddings::DType;

impl Step<'_> {
    /// Copies of the caller's rows of the table, in bounds.
    pub(super) fn check_rows(&self) -> Result<()> {
        let limit = self.problem.table.map_or(0, |table| table.rows);
        let given = self.problem.given_rows.iter().zip(self.workspace.checked_rows.iter());
        given.filter(|(rows, _)| rows.count > 0).try_for_each(|(rows, &copy)| {
            let params = CheckRowsParams {
                rows: rows.address,
                checked: self.at(copy),
                fault: self.fault,
                count: rows.count as u64,
                limit: limit as u64,
                kind: rows.kind,
                allows_none: u32::from(rows.allows_none),
            };
            self.driver.launch(CHECK_ROWS, Variant::ONLY, Grid::threads(rows.count), &params)
        })
    }

    /// Bounds of the filter, and similarities of positives by the sums that score negatives of rows' own. Nothing where neither is
    /// needed.
    pub(super) fn bounds(&self) -> Result<()> {
        let (problem, workspace) = (self.problem, self.workspace);
        let own_z = self.at(workspace.own_z);
        if problem.filter.is_none() && own_z == 0 {
            return Ok(());
        }
        let (filter, is_ratio) = problem.filter_value();
        let params = BoundsParams {
            positive_z: self.at(workspace.positive_z),
            positive_offsets: self.at(workspace.pair_offsets),
            queries: problem.queries.address,
            query_inverse_norm: self.at(workspace.query_norms),
            positive_addresses: self.at(workspace.positive_addresses),
            positive_inverse_norm: self.at(workspace.positive_norms),
            own_z,
            bounds: self.at(workspace.bounds),
            own_bounds: self.at(workspace.own_bounds),
            query_stride: problem.queries.stride as u64,
            rows: problem.num_queries() as u64,
            filter,
            dim: problem.dim as u32,
            is_ratio: u32::from(is_ratio),
            scale: problem.scale,
            padding: 0,
        };
        self.driver.launch(BOUNDS, problem.typed(), Grid::warps(problem.num_queries()), &params)
    }

    /// Negatives of rows' own, as the last split of the partial results. Nothing where there are none.
    pub(super) fn stream_own(&self, partials: &Partials) -> Result<()> {
        let problem = self.problem;
        let Some(negatives) = problem.row_negatives else { return Ok(()) };
        let params = OwnNegativesParams {
            own: self.own_negatives(),
            own_z: self.at(self.workspace.own_z),
            positive_offsets: self.at(self.workspace.pair_offsets),
            max: self.at(partials.max),
            sum: self.at(partials.sum),
            masked: self.at(partials.masked),
            output: self.at(partials.output),
            sum_score: self.at(partials.sum_score),
            sum_z: self.at(partials.sum_z),
            above: self.at(partials.above),
            ties: self.at(partials.ties),
            fault: self.fault,
            split: partials.splits as u64 - 1,
            queries: problem.num_queries() as u64,
            pairs: problem.pairs as u64,
        };
        let grid = Grid { blocks: (problem.num_queries() as u32, 1, 1), shared_bytes: 3 * 4 * negatives.per_row };
        self.driver.launch(OWN_NEGATIVES, problem.typed(), grid, &params)
    }

    /// Queries also where rows have no negatives of their own.
    fn own_negatives(&self) -> OwnNegatives {
        let (problem, workspace) = (self.problem, self.workspace);
        let queries = OwnNegatives {
            queries: problem.queries.address,
            query_norms: self.at(workspace.query_norms),
            query_stride: problem.queries.stride as u64,
            dim: problem.dim as u32,
            cosine: u32::from(problem.cosine),
            scale: problem.scale,
            ..OwnNegatives::default()
        };
        let (Some(own), Some(table)) = (problem.row_negatives, problem.table) else { return queries };
        OwnNegatives {
            rows: own.rows,
            log_q: own.log_q,
            bounds: self.at(workspace.own_bounds),
            table: table.address,
            table_ids: problem.table_ids,
            keys: if problem.masked() { self.keys() } else { KeyTable::default() },
            table_stride: table.stride as u64,
            per_row: own.per_row as u32,
            ..queries
        }
    }

    /// The gradient of the table: pools by reference into parts, the pool that is the table, then each row's sum.
    pub(super) fn table_gradient(&self, uses: Uses, back: &Back) -> Result<()> {
        let (problem, tilings, table) = (self.problem, &self.workspace.tilings.gradient, &self.workspace.table);
        let Some(rows) = problem.table else { return Ok(()) };
        for ((pool, tiling), start) in problem.pools.iter().zip(tilings.iter()).zip(table.starts.iter()) {
            let Some(start) = *start else { continue };
            let parts = self.element(table.parts, start * problem.dim, 4);
            let output = self.stream_gradient(pool, tiling, parts)?;
            // One split of other types has the sums themselves: it subtracts no maximum.
            if tiling.splits > 1 || problem.dtype == DType::F16 {
                let merged = FinishGradientParams { result: parts, ..self.merge_params(pool, tiling, output) };
                self.finish_gradient(&merged, false)?;
            }
        }
        let whole = table.whole.is_some();
        let (listed, count, by_use) = match back.table_rows {
            TableRows::Listed(address, count) => (address, count, false),
            TableRows::All | TableRows::Sparse { .. } if whole => (0, rows.rows, false),
            TableRows::All => {
                self.driver.fill(back.d_table, 0, rows.rows * problem.dim * 4)?;
                (0, uses.count as usize, true)
            }
            TableRows::Sparse { .. } => (0, uses.count as usize, true),
        };
        let places = match back.table_rows {
            TableRows::Sparse { rows: list, num_rows } if whole => self.every_row(rows.rows, list, num_rows)?,
            TableRows::Sparse { rows, num_rows } => self.place_rows(uses, rows, num_rows)?,
            TableRows::Listed(..) | TableRows::All => 0,
        };
        let params = FinishTableParams {
            by_use: u32::from(by_use),
            places,
            rows: listed,
            parts: self.at(table.parts),
            coefficients: self.at(table.coefficients),
            count: count as u64,
            ..self.finish_table_params(rows, uses, back, back.d_table)
        };
        let params = match table.whole {
            None => params,
            Some(whole) => self.with_splits(&problem.pools[whole], &tilings[whole], back.d_table, params)?,
        };
        self.finish_table(&params)
    }

    fn with_splits(
        &self,
        pool: &ProblemPool,
        tiling: &Tiling,
        result: u64,
        params: FinishTableParams,
    ) -> Result<FinishTableParams> {
        let output = self.stream_gradient(pool, tiling, result)?;
        Ok(FinishTableParams {
            max: self.at(self.workspace.gradient.max),
            output,
            splits: tiling.splits as u32,
            ..params
        })
    }

    /// Of a pool of embeddings, where rows have several positives by index.
    pub(super) fn finish_candidates(
        &self,
        pool: &ProblemPool,
        tiling: &Tiling,
        output: u64,
        d_pool: u64,
        uses: Uses,
        back: &Back,
    ) -> Result<()> {
        let params = FinishTableParams {
            max: self.at(self.workspace.gradient.max),
            output,
            splits: tiling.splits as u32,
            count: pool.candidates.rows as u64,
            start: pool.start as u64,
            ..self.finish_table_params(pool.candidates, uses, back, d_pool)
        };
        let own = OwnNegatives { per_row: 0, ..params.own };
        self.finish_table(&FinishTableParams { own, ..params })
    }

    fn finish_table_params(&self, rows: Rows, uses: Uses, back: &Back, result: u64) -> FinishTableParams {
        let workspace = self.workspace;
        FinishTableParams {
            own: self.own_negatives(),
            uses,
            columns: self.at(workspace.query_columns),
            pair_rows: self.at(workspace.pair_rows),
            d_positive: if back.d_positive == 0 { self.at(workspace.d_positive) } else { back.d_positive },
            segments: self.at(workspace.table.segments),
            x: rows.address,
            x_rows: rows.rows as u32,
            result,
            x_stride: rows.stride as u64,
            gamma: self.problem.gamma() as f32,
            ..FinishTableParams::default()
        }
    }

    fn finish_table(&self, params: &FinishTableParams) -> Result<()> {
        let (typed, uses) = (self.problem.typed(), params.uses.count as usize);
        let warps = if params.by_use == 1 { uses.div_ceil(USES_OF_WARP as usize) } else { params.count as usize };
        if warps == 0 {
            return Ok(());
        }
        // No row has a use before the first segment.
        let segments = (uses / SEGMENT as usize).saturating_sub(1);
        if segments > 0 {
            self.driver.launch(SUM_SEGMENTS, typed, Grid::warps(segments), params)?;
        }
        self.driver.launch(FINISH_TABLE, typed, Grid::warps(warps), params)
    }
}

/// Of a digit of the sort (`sort_uses.cu`).
const DIGIT_BITS: u32 = 8;

/// Who names which row.
impl Step<'_> {
    /// Lists the uses of rows and sorts them by row, where gradients are added up by them.
    pub(super) fn sorted_uses(&self) -> Result<Uses> {
        let (problem, table) = (self.problem, &self.workspace.table);
        let mut uses = Uses::default();
        if table.uses == 0 {
            return Ok(uses);
        }
        let rows = match problem.table {
            Some(table) => table.rows,
            None => problem.num_candidates(),
        };
        let list = |address: u64, count: usize, uses: &Uses| {
            let params = ListUsesParams {
                rows: address,
                entries: self.at(table.entries[0]) + uses.count * 8,
                count: count as u64,
                first: uses.count,
                limit: rows as u64,
            };
            self.driver.launch(LIST_USES, Variant::ONLY, Grid::threads(count), &params)
        };
        for (pool, start) in problem.pools.iter().zip(table.starts.iter()) {
            if start.is_some() {
                list(pool.candidates.indices, pool.candidates.rows, &uses)?;
                uses.count += pool.candidates.rows as u64;
            }
        }
        uses.first_own = uses.count;
        if let (Some(own), true) = (problem.row_negatives, problem.table_gradient) {
            let count = own.per_row * problem.num_queries();
            list(own.rows, count, &uses)?;
            uses.count += count as u64;
        }
        uses.first_pair = uses.count;
        let positives = match problem.positives {
            ProblemPositives::Separate(rows) => rows.indices,
            ProblemPositives::Index(address) => address,
            ProblemPositives::None => 0,
        };
        if positives != 0 && problem.pairs > 0 {
            list(positives, problem.pairs, &uses)?;
            uses.count += problem.pairs as u64;
        }
        if uses.count == 0 {
            return Ok(uses);
        }
        let sorted = self.sort(uses.count as usize, rows)?;
        Ok(Uses { entries: self.at(table.entries[sorted]), ..uses })
    }

    /// The rows that have a use, ascending, and where each one's gradient goes. Returns the address of these places.
    fn place_rows(&self, uses: Uses, rows: u64, num_rows: u64) -> Result<u64> {
        let table = &self.workspace.table;
        if uses.count == 0 {
            self.driver.fill(num_rows, 0, 8)?;
            return Ok(0);
        }
        // The sort is over: what was sorted from is free.
        let places = table.entries.map(|part| self.at(part)).into_iter().find(|&part| part != uses.entries);
        let places = places.unwrap_or_default();
        let blocks = (uses.count as usize).div_ceil(SORT_TILE as usize);
        let counts = self.at(table.places);
        let params = PlaceRowsParams {
            entries: uses.entries,
            counts,
            places,
            rows,
            num_rows,
            count: uses.count,
            blocks: blocks as u64,
        };
        let grid = Grid { blocks: (blocks as u32, 1, 1), shared_bytes: 0 };
        self.driver.launch(COUNT_ROWS, Variant::ONLY, grid, &params)?;
        self.driver.launch(PLACE_ROWS, Variant::ONLY, grid, &params)?;
        Ok(places)
    }

    /// The same where every row has a use. Each one's gradient goes to its own place.
    fn every_row(&self, count: usize, rows: u64, num_rows: u64) -> Result<u64> {
        let params = PlaceRowsParams { rows, num_rows, count: count as u64, ..PlaceRowsParams::default() };
        self.driver.launch(EVERY_ROW, Variant::ONLY, Grid::threads(count), &params)?;
        Ok(0)
    }

    /// Sorts the entries by row; returns in which of the two places they are then.
    fn sort(&self, count: usize, rows: usize) -> Result<usize> {
        let table = &self.workspace.table;
        let blocks = count.div_ceil(SORT_TILE as usize) as u32;
        // Uses of no row have a row of all ones.
        let passes = (usize::BITS - rows.leading_zeros()).div_ceil(DIGIT_BITS);
        for pass in 0..passes {
            let [from, to] = if pass % 2 == 0 { [0, 1] } else { [1, 0] };
            let params = SortUsesParams {
                from: self.at(table.entries[from]),
                to: self.at(table.entries[to]),
                places: self.at(table.places),
                count: count as u64,
                blocks,
                shift: USE_BITS + pass * DIGIT_BITS,
            };
            let grid = |blocks| Grid { blocks: (blocks, 1, 1), shared_bytes: 0 };
            self.driver.launch(SORT_COUNT, Variant::ONLY, grid(blocks), &params)?;
            self.driver.launch(SORT_PLACES, Variant::ONLY, grid(1), &params)?;
            self.driver.launch(SORT_SCATTER, Variant::ONLY, grid(blocks), &params)?;
        }
        Ok(passes as usize % 2)
    }
}
