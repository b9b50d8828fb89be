//! A batch in device memory: what the passes stream, as addresses and sizes.

use super::few::Few;
use super::kernels::Variant;
use crate::error::{Result, shape};
use crate::problem::embeddings::DType;

/// The largest number of (key, row) pairs in the masks. The hash table has twice as many slots, numbered by 32 bits.
const MAX_PAIRS: usize = 1 << 30;

/// Rows in device memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rows {
    pub(super) address: u64,
    pub(super) rows: usize,
    /// Elements between the starts of rows.
    pub(super) stride: usize,
}

impl Rows {
    /// Whether each row starts at a multiple of 16 bytes, as the copies of whole units want it.
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
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum ProblemPositives {
    /// In a search.
    None,
    /// (B) indices over the candidates of all pools.
    Index(u64),
    /// (B, D)
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
    pub(super) positives: ProblemPositives,
    /// Of separate positives: (B) each.
    pub(super) positive_ids: u64,
    pub(super) positive_log_q: u64,
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

    pub(super) fn num_candidates(&self) -> usize {
        self.pools.iter().map(|pool| pool.candidates.rows).sum()
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

    /// Whether the copy engine can read a pool and what belongs to it: at multiples of 16 bytes, two terms of candidates.
    pub(super) fn bulk_copies(&self, pool: &ProblemPool) -> bool {
        self.queries.aligned(self.dtype) && pool.candidates.aligned(self.dtype) && pool.start.is_multiple_of(2)
    }

    /// (key, row) pairs that masks are made of: one for each positive that is a candidate or has an id, and the excluded.
    pub(super) fn positive_pairs(&self) -> usize {
        let by_index = matches!(self.positives, ProblemPositives::Index(_));
        if by_index || self.positive_ids != 0 { self.num_queries() } else { 0 }
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

    /// Address of each query's positive index; 0 if positives are not candidates.
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
        let queries = Rows { address: 16, rows: 8, stride: 8 };
        let problem = |rows: usize, excluded: usize| Problem {
            dtype: DType::F32,
            tf32: false,
            dim: 8,
            cosine: true,
            scale: 1.0,
            queries: Rows { rows, ..queries },
            pools: Few::default(),
            positives: ProblemPositives::Index(16),
            positive_ids: 0,
            positive_log_q: 0,
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
