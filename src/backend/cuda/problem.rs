//! A batch in device memory: what the passes stream, as addresses and sizes.

use super::few::Few;
use super::kernels::Variant;
use crate::error::{Result, shape};
use crate::problem::embeddings::DType;
use crate::problem::filter::FalseNegativeFilter;

/// The largest number of (key, row) pairs in the masks. The hash table has twice as many slots, numbered by 32 bits.
const MAX_PAIRS: usize = 1 << 30;

/// Rows in device memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rows {
    pub(super) address: u64,
    pub(super) rows: usize,
    /// Elements between the starts of rows.
    pub(super) stride: usize,
    /// Of rows by reference, which rows of the matrix they are, `u32` each. 0 where row i is row i.
    pub(super) indices: u64,
}

impl Rows {
    /// That many rows of the matrix by reference.
    pub(super) fn by_reference(self, indices: u64, rows: usize) -> Self {
        Rows { indices, rows, ..self }
    }

    /// What divides the rows' addresses and the bytes of each row's `dim` elements, up to 16: the widest copies of the portable streams.
    pub(super) fn alignment(&self, dtype: DType, dim: usize) -> u32 {
        let parts = [self.address as usize, self.stride * dtype.size(), dim * dtype.size()];
        1 << parts.map(usize::trailing_zeros).into_iter().fold(4, u32::min)
    }

    /// Whether each row starts at a multiple of 16 bytes, as the copy engine wants it.
    pub(super) fn aligned(&self, dtype: DType) -> bool {
        self.address.is_multiple_of(16) && (self.stride * dtype.size()).is_multiple_of(16)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ProblemPool {
    pub(super) candidates: Rows,
    /// Index over all pools of the pool's first candidate.
    pub(super) start: usize,
    pub(super) ids: u64,
    pub(super) log_q: u64,
    pub(super) gradient: bool,
    /// Whether candidates are rows of the table. `ids` are then the table's.
    pub(super) of_table: bool,
}

/// Rows of the table that only the device sees: (count) `u32` at an address.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct GivenRows {
    pub(super) address: u64,
    pub(super) count: usize,
    /// Of the fault where one is none (`fault.cuh`).
    pub(super) kind: u32,
    pub(super) allows_none: bool,
}

/// Negatives of each row's own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ProblemRowNegatives {
    /// (B, K) rows of the table.
    pub(super) rows: u64,
    pub(super) log_q: u64,
    pub(super) per_row: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum ProblemPositives {
    /// In a search.
    None,
    /// (P) indices over the candidates of all pools.
    Index(u64),
    /// (P, D), or P rows of the table by reference.
    Separate(Rows),
}

/// The address of an optional array that is not given is 0.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Problem {
    pub(super) dtype: DType,
    /// Products of f32 embeddings may round them to tf32.
    pub(super) tf32: bool,
    pub(super) dim: usize,
    pub(super) cosine: bool,
    /// `log2(e) / temperature`, as the kernels apply it.
    pub(super) scale: f32,
    pub(super) queries: Rows,
    pub(super) pools: Few<ProblemPool, 2>,
    /// (M, D)
    pub(super) table: Option<Rows>,
    /// (M)
    pub(super) table_ids: u64,
    pub(super) table_gradient: bool,
    /// Which arrays of rows are to be checked on the device: those of the problem's that are in the caller's memory.
    pub(super) given_rows: Few<GivenRows, 4>,
    pub(super) row_negatives: Option<ProblemRowNegatives>,
    pub(super) positives: ProblemPositives,
    /// P.
    pub(super) pairs: usize,
    /// (B + 1); 0 where row i has the positive i alone.
    pub(super) positive_offsets: u64,
    /// Of separate positives: (P) each.
    pub(super) positive_ids: u64,
    pub(super) positive_log_q: u64,
    pub(super) positive_weight: u64,
    pub(super) filter: Option<FalseNegativeFilter>,
    pub(super) row_weight: u64,
    pub(super) exclude_offsets: u64,
    pub(super) exclude_ids: u64,
    pub(super) excluded: usize,
    /// Smallest and largest log_q, where they are known: bounds of the scores.
    pub(super) log_q_range: Option<(f32, f32)>,
}

impl Problem {
    pub(super) fn num_queries(&self) -> usize {
        self.queries.rows
    }

    /// `StreamParams::alignment` of two sides.
    pub(super) fn alignment(&self, x: Rows, y: Rows) -> u32 {
        x.alignment(self.dtype, self.dim).min(y.alignment(self.dtype, self.dim))
    }

    pub(super) fn num_candidates(&self) -> usize {
        self.pools.iter().map(|pool| pool.candidates.rows).sum()
    }

    /// The same problem that reads checked copies of those rows: `copy_of` returns that of an array, which may have none in
    /// it or not.
    pub(super) fn with_rows(&self, copy_of: impl Fn(u64, bool) -> u64) -> Self {
        let mut problem = self.clone();
        let pools = self.pools.iter().map(|pool| {
            let candidates = Rows { indices: copy_of(pool.candidates.indices, false), ..pool.candidates };
            ProblemPool { candidates, ..*pool }
        });
        problem.pools = pools.collect();
        if let Some(own) = &mut problem.row_negatives {
            own.rows = copy_of(own.rows, true);
        }
        if let ProblemPositives::Separate(rows) = &mut problem.positives {
            rows.indices = copy_of(rows.indices, false);
        }
        problem
    }

    /// Whether a pool with gradient is the whole table: then every row has a gradient.
    pub(super) fn has_whole_table(&self) -> bool {
        self.pools.iter().any(|pool| pool.of_table && pool.gradient && pool.candidates.indices == 0)
    }

    /// Uses of the table's rows where no pool is the whole table.
    pub(super) fn table_uses(&self) -> usize {
        let by_reference = self.pools.iter().filter(|pool| pool.of_table && pool.gradient);
        let own = self.row_negatives.map_or(0, |own| own.per_row * self.num_queries());
        let positives = if self.positives_of_table() { self.pairs } else { 0 };
        by_reference.map(|pool| pool.candidates.rows).sum::<usize>() + own + positives
    }

    /// The most rows of the table that have a gradient: all of them, or as many as there are uses.
    pub(super) fn most_table_rows(&self) -> usize {
        let rows = self.table.map_or(0, |table| table.rows);
        if self.has_whole_table() { rows } else { self.table_uses().min(rows) }
    }

    /// Negatives that a row can have: those of the pools, and its own.
    pub(super) fn most_negatives(&self) -> usize {
        self.num_candidates() + self.row_negatives.map_or(0, |own| own.per_row)
    }

    /// The variant of a kernel that reads embeddings.
    pub(super) fn typed(&self) -> Variant {
        Variant::of(self.dtype)
    }

    /// The same for the streaming kernels, which have one for tf32 products.
    pub(super) fn stream_typed(&self) -> Variant {
        if self.tf32 && self.dtype == DType::F32 { Variant::TF32 } else { self.typed() }
    }

    /// 1 / temperature in natural units, computed from the rounded `scale`. Rounding is then a tiny change of the
    /// temperature, and positive and lse stay consistent.
    pub(super) fn gamma(&self) -> f64 {
        f64::from(self.scale) * std::f64::consts::LN_2
    }

    /// Whether the copy engine can read a pool and what belongs to it: at multiples of 16 bytes, two terms of candidates. It copies
    /// stretches of a matrix, so not rows by reference. A filter asks both passes for the same scores bit for bit, which the portable
    /// kernels give.
    pub(super) fn bulk_copies(&self, pool: &ProblemPool) -> bool {
        self.filter.is_none()
            && pool.candidates.indices == 0
            && self.queries.aligned(self.dtype)
            && pool.candidates.aligned(self.dtype)
            && pool.start.is_multiple_of(2)
    }

    /// (key, row) pairs that masks are made of: one for each positive that is a candidate or has an id, and the excluded.
    pub(super) fn positive_pairs(&self) -> usize {
        let by_index = matches!(self.positives, ProblemPositives::Index(_));
        if by_index || self.positives_of_table() || self.positive_ids != 0 { self.pairs } else { 0 }
    }

    /// Whether positives are rows of the table.
    pub(super) fn positives_of_table(&self) -> bool {
        matches!(self.positives, ProblemPositives::Separate(rows) if rows.indices != 0)
    }

    pub(super) fn masked(&self) -> bool {
        self.positive_pairs() + self.excluded > 0
    }

    /// Fails where a hash table of the pairs would have more slots than 32 bits number.
    pub(super) fn check_pairs(&self) -> Result<()> {
        let (positives, excluded) = (self.positive_pairs(), self.excluded);
        if positives.saturating_add(excluded) <= MAX_PAIRS {
            return Ok(());
        }
        let argument = if excluded == 0 { "queries" } else { "exclude_ids" };
        let found = format!("{excluded} excluded ids and {positives} positives that are masked");
        Err(shape(argument, found, format!("at most 2^30 = {MAX_PAIRS} of both together")))
    }

    /// The margin in units of log 2, or the ratio; and whether it is a ratio.
    pub(super) fn filter_value(&self) -> (f64, bool) {
        match self.filter {
            Some(FalseNegativeFilter::Margin(margin)) => (margin * std::f64::consts::LOG2_E, false),
            Some(FalseNegativeFilter::Ratio(ratio)) => (ratio, true),
            None => (f64::INFINITY, false),
        }
    }

    /// Whether the stream back gives a row's positive its gradient: a candidate, and the row's only positive.
    pub(super) fn positive_in_stream(&self) -> bool {
        self.positive_index() != 0 && self.positive_offsets == 0
    }

    /// Address of each pair's positive index; 0 if positives are not candidates.
    pub(super) fn positive_index(&self) -> u64 {
        match self.positives {
            ProblemPositives::Index(address) => address,
            ProblemPositives::Separate(_) | ProblemPositives::None => 0,
        }
    }

    /// Bounds of `z` in units of log 2, where there are any: cosine bounds the similarity.
    pub(super) fn score_range(&self) -> Option<(f64, f64)> {
        let (low, high) = self.log_q_range?;
        // Rounded operands are a little longer than 1.
        let scale = f64::from(self.scale) * 1.01;
        let log2 = |x: f32| f64::from(x) * std::f64::consts::LOG2_E;
        self.cosine.then(|| (-scale - log2(high), scale - log2(low)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_stop_where_slots_are_numbered_by_32_bits() {
        let queries = Rows { address: 16, rows: 8, stride: 8, indices: 0 };
        let problem = |rows: usize, excluded: usize| Problem {
            dtype: DType::F32,
            tf32: false,
            dim: 8,
            cosine: true,
            scale: 1.0,
            queries: Rows { rows, ..queries },
            pools: Few::default(),
            table: None,
            table_ids: 0,
            table_gradient: false,
            given_rows: Few::default(),
            row_negatives: None,
            positives: ProblemPositives::Index(16),
            pairs: rows,
            positive_offsets: 0,
            positive_ids: 0,
            positive_log_q: 0,
            positive_weight: 0,
            filter: None,
            row_weight: 0,
            exclude_offsets: 0,
            exclude_ids: 0,
            excluded,
            log_q_range: None,
        };
        // A power of two of slots, at least two for each pair, fits just so.
        assert_eq!((2 * MAX_PAIRS).next_power_of_two() as u32 as usize, 2 * MAX_PAIRS);
        assert!(problem(MAX_PAIRS, 0).check_pairs().is_ok());
        assert!(problem(8, MAX_PAIRS - 8).check_pairs().is_ok());
        for (rows, excluded, argument) in [(MAX_PAIRS + 1, 0, "queries"), (8, MAX_PAIRS - 7, "exclude_ids")] {
            let error = problem(rows, excluded).check_pairs().expect_err("one too many").to_string();
            assert!(error.contains(argument) && error.contains("at most 2^30"), "{error}");
        }
    }
}
