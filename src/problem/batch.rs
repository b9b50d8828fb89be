//! What a loss takes: a score matrix, each row's positives and its weight.

use std::borrow::Cow;

use super::arrays::Ids;
use super::batch_builder::BatchBuilder;
use super::embeddings::{DType, Embeddings};
use super::pool::{Candidates, Pool};
use super::positives::{Pairs, Positives};
use super::score_matrix::ScoreMatrix;
use super::shape::{BatchShape, PositivesShape, SYMMETRIC, check_symmetric};
use super::table::Table;
use crate::error::{Result, missing, value};

/// A validated batch: B queries, N candidates in one or several pools, and each query's positives.
///
/// | builder call | shape | meaning |
/// |---|---|---|
/// | [`Batch::builder`] | (B, D), (N, D) | queries and the first pool of candidates |
/// | [`Batch::in_batch`] | (B, D), (N, D), N >= B | the same, where candidate i is the positive of query i |
/// | [`pool`](BatchBuilder::pool) | (N', D) | a further pool |
/// | [`Batch::of_table`] | (B, D), (M, D) | queries and a table, of whose rows pools, positives and negatives are |
/// | [`row_negatives`](BatchBuilder::row_negatives) | (B, K) | negatives of each row's own, rows of the table |
/// | [`positives`](BatchBuilder::positives) | (P) | index of each positive among the candidates of all pools; its row where there is a table |
/// | [`positive_embeddings`](BatchBuilder::positive_embeddings) | (P, D) | positives that are not among the candidates |
/// | [`positive_offsets`](BatchBuilder::positive_offsets) | (B + 1) | which positives a row has; without them P = B and row i has positive i |
/// | [`positive_weight`](BatchBuilder::positive_weight) | (P) | what each positive's loss is multiplied by |
/// | [`positive_ids`](BatchBuilder::positive_ids) | (P) | item ids of separate positives |
/// | [`positive_log_q`](BatchBuilder::positive_log_q) | (P) | log_q of positives that are not candidates by index |
/// | [`excluded_ids`](BatchBuilder::excluded_ids) | (B + 1), (nnz) | per row, ids that are not negatives |
/// | [`row_weight`](BatchBuilder::row_weight) | (B) | sample weights >= 0 |
///
/// Candidate j is a negative of row i unless it is one of the row's positives, has the id of one of them, or has an id
/// that row i excludes.
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
    pub(crate) pairs: Pairs<'a>,
    /// (P): the positives' ids, where candidates have ids.
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

    /// `queries` (B, D) against rows of a `table` (M, D). Positives are rows of the table, and so are the candidates of
    /// [`Pool::rows`] and of [`row_negatives`](BatchBuilder::row_negatives). With neither pools nor row_negatives, every
    /// row of the table is a candidate.
    ///
    /// ```
    /// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Pool, Similarity};
    /// let table: Vec<f32> = (0..100 * 8).map(|i| (i as f32).sin()).collect();
    /// let queries: Vec<f32> = (0..2 * 8).map(|i| (i as f32).cos()).collect();
    /// let (positives, sampled) = ([3i64, 97], [5i64, 5, 12, 40, 97]);
    /// let batch = Batch::of_table(Embeddings::new(&queries, 2, 8), Embeddings::new(&table, 100, 8))
    ///     .positives(&positives)
    ///     .pool(Pool::rows(&sampled))
    ///     .build()?;
    /// let (output, gradients) = Cpu::new().value_and_grad(&batch, &Loss::softmax(Similarity::Cosine, 0.1))?;
    /// // The second row's positive was drawn as a negative, too: an accidental hit, which is left out.
    /// assert_eq!(output.statistics.num_negatives, [5, 4]);
    /// let d_table = gradients.d_table.expect("a batch over a table has its gradient");
    /// assert_eq!(d_table.dense().expect("dense unless asked otherwise").rows, 100);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    pub fn of_table(queries: Embeddings<'a>, table: impl Into<Table<'a>>) -> BatchBuilder<'a> {
        BatchBuilder::of_table(queries, table.into())
    }

    /// B, the number of queries.
    pub fn num_queries(&self) -> usize {
        self.matrix.num_queries()
    }

    /// P, the number of pairs of a query and one of its positives.
    pub fn num_positives(&self) -> usize {
        self.positives().len()
    }

    /// N, the number of candidates in all pools together. Negatives of a row's own are not counted.
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

    pub(crate) fn weight(&self, row: usize) -> f64 {
        self.row_weight.as_ref().map_or(1.0, |w| f64::from(w[row]))
    }

    /// The embedding of positive `pair`: a matrix and a row of it.
    pub(crate) fn positive_at(&self, pair: usize) -> (Embeddings<'a>, usize) {
        match &self.positives {
            Positives::Separate(embeddings) => (*embeddings, pair),
            Positives::Index(indices) => {
                let (pool, candidate) = self.matrix.locate(indices[pair] as usize);
                let candidates = self.matrix.candidates(pool);
                (candidates.embeddings(), candidates.row(candidate))
            }
            Positives::Rows(rows) => (self.table_embeddings(), rows[pair] as usize),
        }
    }

    /// The table, of a batch that has one with its elements.
    pub(crate) fn table_embeddings(&self) -> Embeddings<'a> {
        let embeddings = self.matrix.table.as_ref().and_then(|table| table.embeddings);
        embeddings.expect("a batch with the shape of a table only is rejected before it is streamed")
    }

    /// The rows of the table that positives, pools with gradient and negatives of a row's own name, ascending, each once.
    pub(crate) fn rows_with_gradient(&self) -> Vec<u32> {
        let Some(table) = &self.matrix.table else { return Vec::new() };
        let pools = || self.matrix.pools.iter().enumerate().filter(|(_, pool)| pool.gradient);
        if pools().any(|(_, pool)| matches!(pool.candidates, Candidates::WholeTable)) {
            return (0..table.shape.rows as u32).collect();
        }
        let mut rows = Vec::new();
        if let Positives::Rows(positives) = &self.positives {
            rows.extend_from_slice(positives);
        }
        for (_, pool) in pools() {
            if let Candidates::Rows(of_pool) = pool.candidates {
                rows.extend((0..of_pool.len()).map(|j| of_pool.at(j) as u32));
            }
        }
        if let Some(own) = &self.matrix.row_negatives {
            rows.extend((0..own.rows.len()).filter_map(|index| own.by_index(index)).map(|row| row as u32));
        }
        rows.sort_unstable();
        rows.dedup();
        rows
    }

    /// Fails where the batch knows only the shape of its table.
    pub(crate) fn check_table_is_here(&self) -> Result<()> {
        match &self.matrix.table {
            Some(Table { embeddings: None, .. }) => {
                Err(missing("table", "a batch of Table::of_shape is for Backend::update, which is given the table"))
            }
            _ => Ok(()),
        }
    }

    /// The same batch reading its table from `embeddings`.
    pub(crate) fn with_table<'b>(&'b self, embeddings: Embeddings<'b>) -> Batch<'b>
    where
        'a: 'b,
    {
        let table = self.matrix.table.as_ref().map(|table| Table { embeddings: Some(embeddings), ..table.clone() });
        Batch { matrix: ScoreMatrix { table, ..self.matrix.clone() }, ..self.clone() }
    }

    /// The same batch with the sides swapped: candidates as queries, queries as candidates. For symmetric losses.
    pub(crate) fn swapped(&self) -> Result<Batch<'_>> {
        check_symmetric(self)?;
        let (pool, Positives::Index(positives)) = (&self.matrix.pools[0], &self.positives) else {
            unreachable!("a batch with separate positives is not symmetric");
        };
        let candidates = self.matrix.candidates(0).embeddings();
        let mut query_of = vec![u32::MAX; candidates.rows()];
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
            matrix: ScoreMatrix::new(candidates, Pool { ids, ..Pool::new(self.matrix.queries) }),
            pairs: Pairs::ONE_EACH,
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
            Positives::Rows(rows) => PositivesShape::Rows(rows.len()),
        }
    }
    fn positive_offsets(&self) -> Option<usize> {
        self.pairs.offsets.map(<[i64]>::len)
    }
    fn positive_weight(&self) -> Option<usize> {
        self.pairs.weight.map(<[f32]>::len)
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
