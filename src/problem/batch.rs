//! What a loss takes: a score matrix, each row's positive and its weight.

use std::borrow::Cow;

use super::arrays::Ids;
use super::batch_builder::BatchBuilder;
use super::embeddings::{DType, Embeddings};
use super::pool::Pool;
use super::score_matrix::ScoreMatrix;
use super::shape::{BatchShape, PositivesShape, SYMMETRIC, check_symmetric};
use crate::error::{Result, value};

/// Where the positives are, after validation.
#[derive(Debug, Clone)]
pub(crate) enum Positives<'a> {
    /// Indices over the candidates of all pools.
    Index(Cow<'a, [u32]>),
    /// Embeddings (B, D) that are not among the candidates.
    Separate(Embeddings<'a>),
}

/// A validated batch: B queries, N candidates in one or several pools, and each query's positive.
///
/// | builder call | shape | meaning |
/// |---|---|---|
/// | [`Batch::builder`] | (B, D), (N, D) | queries and the first pool of candidates |
/// | [`Batch::in_batch`] | (B, D), (N, D), N >= B | the same, where candidate i is the positive of query i |
/// | [`pool`](BatchBuilder::pool) | (N', D) | a further pool |
/// | [`positives`](BatchBuilder::positives) | (B) | index of each row's positive among the candidates of all pools |
/// | [`positive_embeddings`](BatchBuilder::positive_embeddings) | (B, D) | positives that are not among the candidates |
/// | [`positive_ids`](BatchBuilder::positive_ids) | (B) | their item ids |
/// | [`positive_log_q`](BatchBuilder::positive_log_q) | (B) | their log_q |
/// | [`excluded_ids`](BatchBuilder::excluded_ids) | (B + 1), (nnz) | per row, ids that are not negatives |
/// | [`row_weight`](BatchBuilder::row_weight) | (B) | sample weights >= 0 |
///
/// Candidate j is a negative of row i unless it is the row's positive, has the positive's id, or has an id that row i
/// excludes.
///
/// ```
/// use catalog_softmax::{Batch, Embeddings, Pool};
/// let (queries, items) = (vec![1.0f32; 2 * 4], vec![0.5f32; 2 * 4]);
/// let (ids, log_q) = (vec![17u64, 42], vec![-3.0f32, -5.0]);
/// let batch = Batch::in_batch(
///     Embeddings::new(&queries, 2, 4),
///     Pool::new(Embeddings::new(&items, 2, 4)).ids(&ids).log_q(&log_q),
/// )
/// .build()?;
/// assert_eq!((batch.num_queries(), batch.num_candidates(), batch.dim()), (2, 2, 4));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    pub(crate) matrix: ScoreMatrix<'a>,
    pub(crate) positives: Positives<'a>,
    /// Id of each row's positive, where candidates have ids.
    pub(crate) positive_ids: Option<Cow<'a, [u64]>>,
    pub(crate) positive_log_q: Option<Cow<'a, [f32]>>,
    pub(crate) row_weight: Option<Cow<'a, [f32]>>,
}

impl<'a> Batch<'a> {
    /// `queries` (B, D) against `candidates` (N, D). Say next where the positives are.
    pub fn builder(queries: Embeddings<'a>, candidates: impl Into<Pool<'a>>) -> BatchBuilder<'a> {
        BatchBuilder::new(queries, candidates.into())
    }

    /// In-batch negatives: candidate i is the positive of query i, the other candidates are its negatives.
    pub fn in_batch(queries: Embeddings<'a>, candidates: impl Into<Pool<'a>>) -> BatchBuilder<'a> {
        BatchBuilder::new(queries, candidates.into()).diagonal()
    }

    /// B, the number of queries.
    pub fn num_queries(&self) -> usize {
        self.matrix.num_queries()
    }

    /// N, the number of candidates in all pools together.
    pub fn num_candidates(&self) -> usize {
        self.matrix.num_candidates()
    }

    /// D, the width of the embeddings.
    pub fn dim(&self) -> usize {
        self.matrix.dim()
    }

    /// The element type of all embeddings.
    pub fn dtype(&self) -> DType {
        self.matrix.dtype()
    }

    /// The embedding of candidate `index`, as its pool and row there.
    pub(crate) fn locate(&self, index: usize) -> (usize, usize) {
        let mut row = index;
        for (p, pool) in self.matrix.pools.iter().enumerate() {
            match row.checked_sub(pool.candidates.rows()) {
                None => return (p, row),
                Some(rest) => row = rest,
            }
        }
        unreachable!("positives were checked against the number of candidates when the batch was built")
    }

    pub(crate) fn weight(&self, row: usize) -> f64 {
        self.row_weight.as_ref().map_or(1.0, |w| f64::from(w[row]))
    }

    /// The same batch with the sides swapped: candidates as queries, queries as candidates. For symmetric losses.
    pub(crate) fn swapped(&self) -> Result<Batch<'_>> {
        check_symmetric(self)?;
        let (pool, Positives::Index(positives)) = (&self.matrix.pools[0], &self.positives) else {
            unreachable!("a batch with separate positives is not symmetric");
        };
        let mut query_of = vec![u32::MAX; pool.candidates.rows()];
        for (row, &positive) in positives.iter().enumerate() {
            if query_of[positive as usize] != u32::MAX {
                return Err(value(format!("positives[{row}]"), positive, SYMMETRIC));
            }
            query_of[positive as usize] = row as u32;
        }
        let row_weight = self.row_weight.as_ref().map(|w| query_of.iter().map(|&row| w[row as usize]).collect());
        // As a candidate, query i has its positive's id: a pair is masked in both directions or in neither.
        let ids = self.positive_ids.as_deref().map(|ids| Ids(Cow::Borrowed(ids)));
        Ok(Batch {
            matrix: ScoreMatrix::new(pool.candidates, Pool { ids, ..Pool::new(self.matrix.queries) }),
            positive_ids: pool.ids_slice().map(Cow::Borrowed),
            positives: Positives::Index(Cow::Owned(query_of)),
            positive_log_q: None,
            row_weight,
        })
    }
}

impl<'a> BatchShape for Batch<'a> {
    type Matrix = ScoreMatrix<'a>;

    fn matrix(&self) -> &ScoreMatrix<'a> {
        &self.matrix
    }
    fn positives(&self) -> PositivesShape {
        match &self.positives {
            Positives::Index(indices) => PositivesShape::Index(indices.len()),
            Positives::Separate(embeddings) => PositivesShape::Separate(embeddings.shape()),
        }
    }
    fn positive_ids(&self) -> Option<usize> {
        self.positive_ids.as_ref().map(|ids| ids.len())
    }
    fn positive_log_q(&self) -> Option<usize> {
        self.positive_log_q.as_ref().map(|log_q| log_q.len())
    }
    fn row_weight(&self) -> Option<usize> {
        self.row_weight.as_ref().map(|weights| weights.len())
    }
}
