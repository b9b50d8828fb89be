//! Exact top-K: what a search scores, and what it returns.

use super::arrays::{Excluded, Ids};
use super::embeddings::{Embeddings, Real};
use super::pool::Pool;
use super::score_matrix::ScoreMatrix;
use crate::error::{Result, does_not_apply, value};

/// A validated search: B queries, N candidates in one or several pools, and per row the ids that it must not return.
///
/// A search has no positives and no log_q: it ranks by similarity alone, as at serving time. A row's positive is a
/// candidate like any other unless the row excludes it.
///
/// ```
/// use catalog_softmax::{Backend, Cpu, Embeddings, Pool, Search, Similarity};
/// let users = [1.0f32, 0.0, 0.0, 1.0];
/// let items = [0.9f32, 0.1, 0.5, 0.5, 0.1, 0.9];
/// // The first user has seen the item with id 70.
/// let (ids, offsets, seen) = ([70u64, 71, 72], [0i64, 1, 1], [70u64]);
/// let candidates = Pool::new(Embeddings::new(&items, 3, 2)).ids(&ids);
/// let search = Search::builder(Embeddings::new(&users, 2, 2), candidates).excluded_ids(&offsets, &seen).build()?;
/// let top = Cpu::new().top_k(&search, Similarity::Dot, 2)?;
/// assert_eq!(top.row(0), (&[1, 2][..], &[0.5, 0.1][..]));
/// assert_eq!(top.row(1), (&[2, 1][..], &[0.9, 0.5][..]));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Search<'a> {
    pub(crate) matrix: ScoreMatrix<'a>,
}

impl<'a> Search<'a> {
    /// The largest K.
    pub const MAX_K: usize = 1024;

    /// `queries` (B, D) against `candidates` (N, D).
    pub fn builder(queries: Embeddings<'a>, candidates: impl Into<Pool<'a>>) -> SearchBuilder<'a> {
        SearchBuilder { matrix: ScoreMatrix::new(queries, candidates.into()) }
    }

    /// B, the number of queries.
    pub fn num_queries(&self) -> usize {
        self.matrix.num_queries()
    }

    /// N, the number of candidates in all pools together.
    pub fn num_candidates(&self) -> usize {
        self.matrix.num_candidates()
    }

    pub(crate) fn check_k(&self, k: usize) -> Result<()> {
        check_k(k, self.num_candidates())
    }
}

/// Collects a [`Search`]; nothing is checked before [`build`](SearchBuilder::build).
#[derive(Debug, Clone)]
#[must_use]
pub struct SearchBuilder<'a> {
    matrix: ScoreMatrix<'a>,
}

impl<'a> SearchBuilder<'a> {
    /// A further pool of candidates.
    pub fn pool(mut self, pool: impl Into<Pool<'a>>) -> Self {
        self.matrix.pools.push(pool.into());
        self
    }

    /// Further pools of candidates.
    pub fn pools(self, pools: impl IntoIterator<Item = Pool<'a>>) -> Self {
        pools.into_iter().fold(self, Self::pool)
    }

    /// Ids that a row must not return, such as the items that the user has seen. Those of row i are
    /// `ids[offsets[i]..offsets[i + 1]]`. `offsets` (B + 1) starts at 0 and never falls. Errors call them
    /// `exclude_offsets` and `exclude_ids`.
    pub fn excluded_ids(mut self, offsets: &'a [i64], ids: impl Into<Ids<'a>>) -> Self {
        self.matrix.excluded = Some(Excluded { offsets, ids: ids.into() });
        self
    }

    /// Checks everything and returns the search.
    ///
    /// # Errors
    /// As [`BatchBuilder::build`](crate::BatchBuilder::build) for queries, pools and exclusions; and if a pool has
    /// log_q, which a search does not use.
    pub fn build(self) -> Result<Search<'a>> {
        if self.matrix.pools.iter().any(|pool| pool.log_q.is_some()) {
            return Err(does_not_apply("log_q", "a search ranks all candidates by similarity alone"));
        }
        self.matrix.check()?;
        Ok(Search { matrix: self.matrix })
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
/// A row has fewer than K if its exclusions leave fewer, or if scores are NaN. A candidate with a NaN or an infinity is
/// never returned, and a query with one gets an empty list.
///
/// A dot product of finite rows may overflow single precision. A candidate whose similarity became −∞ or NaN is not
/// returned. One whose similarity became +∞ comes before all finite ones; among several of them the smaller index comes
/// first. [`Reference`](crate::Reference) scores in float64, where nothing overflows.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct TopK<T = f32> {
    /// K.
    pub k: usize,
    /// (B, K) index over the candidates of all pools, best first. A row with fewer than K ends with [`TopK::NONE`].
    pub indices: Vec<u32>,
    /// (B, K) similarity, not divided by a temperature; +∞ where it overflows. A row with fewer than K ends with −∞.
    pub scores: Vec<T>,
}

impl TopK {
    /// The index where there is no further candidate.
    pub const NONE: u32 = u32::MAX;
}

impl<T: Real> TopK<T> {
    /// Lists of B rows without any candidate.
    pub(crate) fn empty(b: usize, k: usize) -> Self {
        let scores = vec![T::from_f64(f64::NEG_INFINITY); b * k];
        TopK { k, indices: vec![TopK::NONE; b * k], scores }
    }

    /// The lists through an array: what stands at each index, such as the rows of a table that a pool's candidates are.
    /// [`TopK::NONE`] stays, which [`RowNegatives`](crate::RowNegatives) understand.
    ///
    /// # Panics
    /// If an index of the lists is not one of the array.
    pub fn through(&self, candidate_rows: &[u32]) -> Vec<u32> {
        let at = |&index: &u32| if index == TopK::NONE { TopK::NONE } else { candidate_rows[index as usize] };
        self.indices.iter().map(at).collect()
    }

    /// B, the number of queries; 0 if K is 0.
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
