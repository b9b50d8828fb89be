//! Exact top-K: what a search scores, and what it returns.

use crate::batch::Batch;
use crate::embeddings::Real;
use crate::error::{Result, value};

/// A validated search: B queries, N candidates in one or several pools, and per row the ids that it shall not return.
///
/// Built as a [`Batch`] is, by [`BatchBuilder::search`](crate::BatchBuilder::search), without positives and log_q: a search
/// ranks by similarity alone, as at serving time. A row's positive is a candidate like any other unless the row excludes it.
///
/// ```
/// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Pool, Similarity};
/// let users = [1.0f32, 0.0, 0.0, 1.0];
/// let items = [0.9f32, 0.1, 0.5, 0.5, 0.1, 0.9];
/// let ids = [70u64, 71, 72];
/// let (offsets, seen) = ([0i64, 1, 1], [70u64]);
/// let candidates = Pool::new(Embeddings::new(&items[..], 3, 2)).ids(&ids[..]);
/// let search = Batch::builder(Embeddings::new(&users[..], 2, 2), candidates)
///     .excluded_ids(&offsets, &seen[..])
///     .search()?;
/// let top = Cpu::new().top_k(&search, Similarity::Dot, 2)?;
/// assert_eq!(top.row(0), (&[1, 2][..], &[0.5, 0.1][..]));
/// assert_eq!(top.row(1), (&[2, 1][..], &[0.9, 0.5][..]));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Search<'a> {
    batch: Batch<'a>,
}

impl<'a> Search<'a> {
    /// The largest K.
    pub const MAX_K: usize = 1024;

    pub(crate) fn new(batch: Batch<'a>) -> Self {
        Search { batch }
    }

    /// B, the number of queries.
    pub fn num_queries(&self) -> usize {
        self.batch.num_queries()
    }

    /// N, the number of candidates in all pools together.
    pub fn num_candidates(&self) -> usize {
        self.batch.num_candidates()
    }

    /// As a batch whose only masks are the excluded ids.
    pub(crate) fn batch(&self) -> &Batch<'a> {
        &self.batch
    }

    pub(crate) fn check_k(&self, k: usize) -> Result<()> {
        check_k(k, self.num_candidates())
    }
}

pub(crate) fn check_k(k: usize, num_candidates: usize) -> Result<()> {
    if k == 0 || k > Search::MAX_K || k > num_candidates {
        return Err(value("k", k, "at least 1, at most 1024 and at most the number of candidates"));
    }
    Ok(())
}

/// The best K candidates of each row, by similarity; of equal ones the smaller index comes first.
///
/// A row whose exclusions leave fewer than K candidates has fewer, as has one that is NaN with some or all of them: a
/// row or a candidate with a NaN or an infinity is never returned.
///
/// A dot product of finite rows may overflow single precision on its way. What became −∞ or NaN is not returned; what became +∞
/// is, before all finite similarities, and such ones are equal: the smaller index comes first. [`Reference`](crate::Reference)
/// scores in float64, where nothing overflows.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct TopK<T = f32> {
    /// K.
    pub k: usize,
    /// (B, K) index over the candidates of all pools, best first; [`TopK::NONE`] behind the last of a row that has fewer.
    pub indices: Vec<u32>,
    /// (B, K) similarity, with no temperature; +∞ where it overflows; −∞ behind the last of a row that has fewer.
    pub scores: Vec<T>,
}

impl TopK {
    /// The index where there is no further candidate.
    pub const NONE: u32 = u32::MAX;
}

impl<T: Real> TopK<T> {
    /// All places of B rows, none taken.
    pub(crate) fn empty(b: usize, k: usize) -> Self {
        let scores = vec![T::from_f64(f64::NEG_INFINITY); b * k];
        TopK { k, indices: vec![TopK::NONE; b * k], scores }
    }

    /// B, the number of queries; 0 for lists of no K.
    pub fn num_rows(&self) -> usize {
        self.indices.len() / self.k.max(1)
    }

    /// Indices and similarities of a row, best first: K of them, or as many as there are.
    ///
    /// # Panics
    /// If `row` is not less than B.
    pub fn row(&self, row: usize) -> (&[u32], &[T]) {
        let range = row * self.k..(row + 1) * self.k;
        let indices = &self.indices[range.clone()];
        let found = indices.partition_point(|&index| index != TopK::NONE);
        (&indices[..found], &self.scores[range][..found])
    }
}
