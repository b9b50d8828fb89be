//! A batch in device memory: what the passes stream, as addresses and sizes.

use crate::embeddings::DType;

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

/// Addresses of optional arrays are 0 where they are not there.
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
    pub(super) pools: Vec<ProblemPool>,
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

    /// Name of a kernel that is there for each element type.
    pub(super) fn typed(&self, kernel: &str) -> String {
        let dtype = match self.dtype {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        };
        format!("{kernel}_{dtype}")
    }

    /// The same for the streaming kernels, which have one for tf32 products.
    pub(super) fn stream_typed(&self, kernel: &str) -> String {
        if self.tf32 && self.dtype == DType::F32 { format!("{kernel}_tf32") } else { self.typed(kernel) }
    }

    /// 1 / temperature in natural units, as the rounded `scale` has it: rounding it is then a tiny change of the temperature
    /// and no inconsistency between positive and lse.
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

    /// Address of each query's positive index; 0 where positives are no candidates.
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
