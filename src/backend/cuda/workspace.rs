//! The device memory of a step beside inputs and outputs.

use super::driver::{Limits, THREADS};
use super::few::Few;
use super::memory::{Layout, Part};
use super::params::{COLUMN_TERM, HELD, HITS, POSITIVE_TERM, ROW_TERM, ROWS_OF_KEY, SEGMENT, SORT_TILE};
use super::problem::{Problem, ProblemPool, ProblemPositives};
use super::tiling::{Panel, Tiling};
use crate::problem::statistics::Request;

pub(super) type PerPool = Few<Tiling, 2>;

/// How the passes over each pool are cut.
#[derive(Debug, Clone)]
pub(super) struct Tilings {
    /// Per pool: queries against candidates.
    pub(super) statistics: PerPool,
    /// The same with expected negatives.
    pub(super) expected: PerPool,
    /// Per pool: candidates against queries.
    pub(super) gradient: PerPool,
    pub(super) paired: Tiling,
}

impl Tilings {
    pub(super) fn new(limits: Limits, problem: &Problem, detail: bool) -> Self {
        let (b, dtype, dim) = (problem.num_queries(), problem.dtype, problem.dim);
        let stream = |pool: &ProblemPool, x: usize, y: usize, output: bool, portable: bool| {
            let hopper = if portable || !problem.bulk_copies(pool) {
                None
            } else {
                Tiling::hopper(limits, dtype, dim, x, y, output)
            };
            hopper.unwrap_or_else(|| Tiling::new(limits, dtype, dim, x, y, output))
        };
        let each = |cut: &dyn Fn(&ProblemPool, usize) -> Tiling| {
            problem.pools.iter().map(|pool| cut(pool, pool.candidates.rows)).collect()
        };
        Tilings {
            statistics: each(&|pool, n| stream(pool, b, n, false, detail)),
            expected: each(&|pool, n| stream(pool, b, n, true, false)),
            gradient: each(&|pool, n| stream(pool, n, b, true, false)),
            paired: Tiling::new(limits, dtype, dim, problem.pairs.max(1), problem.pairs.max(1), false),
        }
    }
}

/// Rows of a block of `finish_rows.cu`, 8 to 32. With few rows, they are spread over as many blocks as the device can
/// run; with many, each lane of a warp has a row. The number depends on `rows` alone, so that the sums of blocks are
/// the same on every device.
pub(super) fn block_rows(rows: usize) -> usize {
    (rows / 128).next_power_of_two().clamp(8, 32)
}

/// Partial results of splits, (splits, rows) each; ranks are (splits, pairs). The last split is the rows' own negatives, if there
/// are any.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Partials {
    pub(super) splits: usize,
    pub(super) max: Part,
    pub(super) sum: Part,
    pub(super) masked: Part,
    pub(super) sum_score: Part,
    pub(super) sum_z: Part,
    pub(super) above: Part,
    pub(super) ties: Part,
    pub(super) output: Part,
}

impl Partials {
    fn lay_out(layout: &mut Layout, splits: usize, problem: &Problem, detail: bool, output_dim: usize) -> Self {
        let slots = splits * problem.num_queries();
        let ranks = splits * problem.pairs;
        Partials {
            splits,
            max: layout.part(slots, 4),
            sum: layout.part(slots, 4),
            masked: layout.part(slots, 4),
            sum_score: layout.part_if(detail, slots, 4),
            sum_z: layout.part_if(detail, slots, 4),
            above: layout.part_if(detail, ranks, 4),
            ties: layout.part_if(detail, ranks, 4),
            output: layout.part(slots * output_dim, 4),
        }
    }
}

/// A panel of probabilities (`wide_params.h`), large enough for every pass that needs one.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PanelParts {
    pub(super) probabilities: Part,
    pub(super) tile_max: Part,
    pub(super) tile_sum: Part,
    pub(super) tile_spoiled: Part,
    /// Twice a number for each row.
    pub(super) references: Part,
}

impl PanelParts {
    fn lay_out<'a>(layout: &mut Layout, tilings: impl Iterator<Item = &'a Tiling> + Clone) -> Self {
        let panels = tilings.filter_map(Tiling::panel);
        let most = |count: fn(&Panel) -> usize| panels.clone().map(|panel| count(&panel)).max().unwrap_or(0);
        let pairs = most(|panel| panel.rows * panel.tiles);
        PanelParts {
            probabilities: layout.part(most(|panel| panel.bytes()), 1),
            tile_max: layout.part(pairs, 4),
            tile_sum: layout.part(pairs, 4),
            tile_spoiled: layout.part(most(|panel| panel.tiles), 4),
            references: layout.part(2 * most(|panel| panel.rows), 4),
        }
    }
}

/// Rejected keys and the rows that reject them (`resolve.cu`).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Resolved {
    /// Slots of the table of keys, where one more holds the key that marks empty ones, and places of the table of their rows.
    pub(super) capacity: usize,
    pub(super) slot_keys: Part,
    pub(super) slot_first: Part,
    pub(super) slot_last: Part,
    pub(super) rows_of_keys: Part,
    pub(super) hits: Part,
}

/// What the gradient of a table is added up from, beside what the problem holds.
#[derive(Debug, Clone, Default)]
pub(super) struct TableParts {
    /// Per pool, where it starts in `parts`; none where it is not there.
    pub(super) starts: Few<Option<usize>, 2>,
    /// The pool that is the whole table, whose candidates are the rows.
    pub(super) whole: Option<usize>,
    /// (candidates of pools by reference, D): their gradients by unit vectors, over gamma.
    pub(super) parts: Part,
    /// Of the own negatives' uses: coefficients, where rows are wider than a warp holds.
    pub(super) coefficients: Part,
    /// (segments of uses, D): sums of segments that are all of one row.
    pub(super) segments: Part,
    /// Uses of rows, of which those as negatives of rows' own and as positives follow those as candidates. 0 where no gradient is
    /// added up by them.
    pub(super) uses: usize,
    /// The uses before a pass of the sort and after it.
    pub(super) entries: [Part; 2],
    /// (blocks of a sort, 256)
    pub(super) places: Part,
}

/// Columns that a warp of `finish_table.cu` holds.
const TABLE_COLUMNS: usize = 32 * HELD as usize;

impl TableParts {
    fn lay_out(layout: &mut Layout, problem: &Problem, back: bool) -> Self {
        let mut table = TableParts::default();
        let by_lists = problem.positive_index() != 0 && !problem.positive_in_stream();
        if !back || !(problem.table_gradient || by_lists) {
            return table;
        }
        let mut rows = 0;
        for (p, pool) in problem.pools.iter().enumerate() {
            let of_table = pool.of_table && pool.gradient && problem.table_gradient;
            let is_whole = of_table && pool.candidates.indices == 0 && table.whole.is_none();
            if is_whole {
                table.whole = Some(p);
            }
            let by_reference = of_table && !is_whole;
            table.starts.push(by_reference.then_some(rows));
            rows += if by_reference { pool.candidates.rows } else { 0 };
        }
        let own = problem.row_negatives.map_or(0, |own| own.per_row * problem.num_queries());
        let uses = rows + own + problem.pairs;
        table.parts = layout.part(rows * problem.dim, 4);
        table.coefficients = layout.part_if(problem.dim > TABLE_COLUMNS && own > 0, uses, 4);
        table.segments = layout.part(uses / SEGMENT as usize * problem.dim, 4);
        table.uses = uses;
        table.entries = [layout.part(uses, 8), layout.part(uses, 8)];
        table.places = layout.part(256 * uses.div_ceil(SORT_TILE as usize), 4);
        table
    }
}

#[derive(Debug, Clone)]
pub(super) struct Workspace {
    pub(super) tilings: Tilings,
    pub(super) query_norms: Part,
    pub(super) candidate_norms: Part,
    pub(super) separate_norms: Part,
    /// The row of each pair; of its positive, wherever it lies, what follows.
    pub(super) pair_rows: Part,
    /// The copy of the offsets that is in bounds.
    pub(super) pair_offsets: Part,
    pub(super) positive_addresses: Part,
    pub(super) positive_norms: Part,
    pub(super) positive_columns: Part,
    pub(super) positive_z: Part,
    /// Of positives that are candidates; separate ones bring theirs.
    pub(super) positive_ids: Part,
    pub(super) positive_log_q: Part,
    /// Similarities of positives by the sums that score negatives of rows' own.
    pub(super) own_z: Part,
    /// The filter's, for pools and for negatives of rows' own.
    pub(super) bounds: Part,
    pub(super) own_bounds: Part,
    /// By the device's own epilogue.
    pub(super) d_positive: Part,
    pub(super) query_rows: Part,
    /// Of passes without an output, and with one.
    pub(super) candidate_columns: Part,
    pub(super) output_columns: Part,
    /// What blocks of rows add up.
    pub(super) weight_sums: Part,
    pub(super) block_losses: Part,
    pub(super) block_d_gamma: Part,
    pub(super) resolved: Resolved,
    pub(super) statistics: Partials,
    pub(super) expected: Partials,
    // The stream back.
    pub(super) query_columns: Part,
    pub(super) positive_terms: Part,
    pub(super) candidate_rows: Part,
    pub(super) table: TableParts,
    /// Checked copies of the problem's `given_rows`.
    pub(super) checked_rows: Few<Part, 4>,
    /// Of the pool at hand.
    pub(super) gradient: Partials,
    /// Of the pass at hand.
    pub(super) panel: PanelParts,
}

impl Workspace {
    pub(super) fn lay_out(layout: &mut Layout, limits: Limits, problem: &Problem, request: Request) -> Self {
        let (b, n, dim) = (problem.num_queries(), problem.num_candidates(), problem.dim);
        let back = request.gradients;
        let detail = request.moments || request.rank;
        let tilings = Tilings::new(limits, problem, detail);
        let by_index = problem.positive_index() != 0;
        let separate = matches!(problem.positives, ProblemPositives::Separate(_));
        let positives = by_index || separate;
        let own = usize::from(problem.row_negatives.is_some());
        let splits = |tilings: &PerPool| tilings.iter().map(|tiling| tiling.splits).sum::<usize>() + own;
        // A search merges lists.
        let statistics = if positives && (detail || !back) { splits(&tilings.statistics) } else { 0 };
        let expected = if back { splits(&tilings.expected) } else { 0 };
        // Pools come one after the other: one pool's partial gradients take another's place. One split needs no partials:
        // it writes the gradient.
        let partial_rows = |(pool, tiling): (&ProblemPool, &Tiling)| {
            let splits = if pool.gradient && back { tiling.splits } else { 0 };
            (splits * pool.candidates.rows, if splits > 1 { splits * pool.candidates.rows } else { 0 })
        };
        let gradient_rows = || problem.pools.iter().zip(tilings.gradient.iter()).map(partial_rows);
        let gradient = Partials {
            max: layout.part(gradient_rows().map(|(max, _)| max).max().unwrap_or(0), 4),
            output: layout.part(gradient_rows().map(|(_, output)| output).max().unwrap_or(0) * dim, 4),
            ..Partials::default()
        };
        let outputs = tilings.expected.iter().chain(tilings.gradient.iter());
        let panel = PanelParts::lay_out(layout, outputs.filter(|_| back));
        // The stream back reads candidates as stationary rows, Hopper's statistics need nothing else of them.
        let rows_alone = back || positives && tilings.statistics.iter().any(Tiling::is_hopper);
        let row_blocks = b.div_ceil(block_rows(b));
        let pairs = problem.pairs;
        let filtered = problem.filter.is_some();
        Workspace {
            query_norms: layout.part(b, 4),
            candidate_norms: layout.part(n, 4),
            separate_norms: layout.part_if(separate, pairs, 4),
            pair_rows: layout.part_if(problem.positive_offsets != 0, pairs, 4),
            pair_offsets: layout.part_if(problem.positive_offsets != 0, b + 1, 8),
            positive_addresses: layout.part_if(positives, pairs, 8),
            positive_norms: layout.part_if(positives, pairs, 4),
            positive_columns: layout.part_if(positives, pairs, COLUMN_TERM),
            positive_z: layout.part_if(positives, pairs, 4),
            positive_ids: layout.part_if(by_index && problem.pools[0].ids != 0, pairs, 8),
            positive_log_q: layout.part_if(by_index && problem.pools[0].log_q != 0, pairs, 4),
            own_z: layout.part_if(own != 0 && (detail || filtered), pairs, 4),
            bounds: layout.part_if(filtered, b, 4),
            own_bounds: layout.part_if(filtered && own != 0, b, 4),
            d_positive: layout.part_if(back, pairs, 8),
            query_rows: layout.part(b, ROW_TERM),
            candidate_columns: layout.part_if(detail || !back, n, COLUMN_TERM),
            output_columns: layout.part_if(back, n, COLUMN_TERM),
            weight_sums: layout.part_if(positives, b.div_ceil(THREADS as usize), 8),
            block_losses: layout.part_if(positives, row_blocks, 8),
            block_d_gamma: layout.part_if(back, row_blocks, 8),
            resolved: Resolved::lay_out(layout, problem),
            statistics: Partials::lay_out(layout, statistics, problem, detail, 0),
            expected: Partials::lay_out(layout, expected, problem, false, dim),
            query_columns: layout.part_if(back, b, COLUMN_TERM),
            positive_terms: layout.part_if(back && problem.positive_in_stream(), b, POSITIVE_TERM),
            candidate_rows: layout.part_if(rows_alone, n, ROW_TERM),
            table: TableParts::lay_out(layout, problem, back),
            checked_rows: problem.given_rows.iter().map(|rows| layout.part(rows.count, 4)).collect(),
            gradient,
            panel,
            tilings,
        }
    }
}

impl Resolved {
    fn lay_out(layout: &mut Layout, problem: &Problem) -> Self {
        if !problem.masked() {
            return Resolved::default();
        }
        let pairs = problem.positive_pairs() + problem.excluded;
        // At most half full: searches end soon.
        let capacity = (2 * pairs).next_power_of_two();
        Resolved {
            capacity,
            slot_keys: layout.part(capacity + 1, 8),
            slot_first: layout.part(capacity + 1, 4),
            slot_last: layout.part(capacity + 1, 4),
            rows_of_keys: layout.part(capacity, ROWS_OF_KEY),
            hits: layout.part(problem.num_candidates(), HITS),
        }
    }
}
