//! Collects the arrays of a batch and checks them. Bad input in host memory is rejected only here.

use std::borrow::Cow;

use super::arrays::{Excluded, Ids, Indices, check_all, check_csr};
use super::batch::Batch;
use super::embeddings::Embeddings;
use super::pool::Pool;
use super::positives::{Pairs, Positives};
use super::score_matrix::ScoreMatrix;
use super::shape::{BatchShape, PositivesShape, check_batch, given_positives};
use super::table::{RowNegatives, Table, check_rows_of_table};
use crate::error::{Argument, Result, does_not_apply, shape, value};

/// Collects a [`Batch`]; nothing is checked before [`build`](BatchBuilder::build).
#[derive(Debug, Clone)]
#[must_use]
pub struct BatchBuilder<'a> {
    matrix: ScoreMatrix<'a>,
    positives: Option<GivenPositives<'a>>,
    positives_given_twice: bool,
    pairs: Pairs<'a>,
    positive_ids: Option<Ids<'a>>,
    positive_log_q: Option<&'a [f32]>,
    row_weight: Option<&'a [f32]>,
}

#[derive(Debug, Clone, Copy)]
enum GivenPositives<'a> {
    Diagonal,
    Index(Indices<'a>),
    Separate(Embeddings<'a>),
}

impl<'a> BatchBuilder<'a> {
    pub(super) fn new(queries: Embeddings<'a>, candidates: Pool<'a>) -> Self {
        Self::of_matrix(ScoreMatrix::new(queries, candidates))
    }

    pub(super) fn of_table(queries: Embeddings<'a>, table: Table<'a>) -> Self {
        Self::of_matrix(ScoreMatrix::of_table(queries, table))
    }

    fn of_matrix(matrix: ScoreMatrix<'a>) -> Self {
        BatchBuilder {
            matrix,
            positives: None,
            positives_given_twice: false,
            pairs: Pairs::ONE_EACH,
            positive_ids: None,
            positive_log_q: None,
            row_weight: None,
        }
    }

    pub(super) fn diagonal(self) -> Self {
        self.with(GivenPositives::Diagonal)
    }

    fn with(mut self, positives: GivenPositives<'a>) -> Self {
        self.positives_given_twice |= self.positives.is_some();
        self.positives = Some(positives);
        self
    }

    /// A further pool of candidates, e.g. uniform negatives beside the batch's own.
    pub fn pool(mut self, pool: impl Into<Pool<'a>>) -> Self {
        self.matrix.pools.push(pool.into());
        self
    }

    /// Further pools of candidates, such as those of a [queue](crate::negatives::NegativeQueue::pools).
    pub fn pools(self, pools: impl IntoIterator<Item = Pool<'a>>) -> Self {
        pools.into_iter().fold(self, Self::pool)
    }

    /// Negatives of each row's own, (B, K) rows of the batch's table.
    pub fn row_negatives(mut self, row_negatives: RowNegatives<'a>) -> Self {
        self.matrix.row_negatives = Some(row_negatives);
        self
    }

    /// (P): the positive of row i is candidate `positives[i]`, counted over all pools. In a batch over a table it is row
    /// `positives[i]` of the table. P is B, unless [`positive_offsets`](BatchBuilder::positive_offsets) say which
    /// positives a row has.
    pub fn positives(self, positives: impl Into<Indices<'a>>) -> Self {
        self.with(GivenPositives::Index(positives.into()))
    }

    /// (P, D): positives that are not among the candidates. They are not negatives of any row.
    pub fn positive_embeddings(self, positive_embeddings: Embeddings<'a>) -> Self {
        self.with(GivenPositives::Separate(positive_embeddings))
    }

    /// Several positives for a row: those of row i are `offsets[i]..offsets[i + 1]`. `offsets` (B + 1) starts at 0, never
    /// falls, and ends with P. A row may have none; its loss is 0. An item that a row names twice makes two pairs.
    ///
    /// Every pair has the loss of its positive against the row's negatives, which leave out all positives of the row:
    /// `loss_i = Σ_p v_p loss(lse_i, positive_p)` with the weights v of [`positive_weight`](BatchBuilder::positive_weight),
    /// `1 / P_i` by default. The candidates are streamed once for a row, however many positives it has.
    ///
    /// ```
    /// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Similarity};
    /// let table: Vec<f32> = (0..10 * 4).map(|i| (i as f32).sin()).collect();
    /// let queries: Vec<f32> = (0..3 * 4).map(|i| (i as f32).cos()).collect();
    /// // The first query found items 2 and 5, the second none, the third item 9.
    /// let batch = Batch::of_table(Embeddings::new(&queries, 3, 4), Embeddings::new(&table, 10, 4))
    ///     .positives(&[2u32, 5, 9])
    ///     .positive_offsets(&[0, 2, 2, 3])
    ///     .build()?;
    /// let output = Cpu::new().value(&batch, &Loss::softmax(Similarity::Dot, 1.0))?;
    /// assert_eq!(output.statistics.num_negatives, [8, 10, 9]);
    /// assert_eq!((output.loss.len(), output.statistics.positive.len()), (3, 3));
    /// assert_eq!(output.loss[1], 0.0);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    pub fn positive_offsets(mut self, offsets: &'a [i64]) -> Self {
        self.pairs.offsets = Some(offsets);
        self
    }

    /// (P): what each positive's loss is multiplied by, finite and >= 0. They need not sum to 1. A positive of weight 0 is
    /// still not a negative of its row.
    pub fn positive_weight(mut self, positive_weight: &'a [f32]) -> Self {
        self.pairs.weight = Some(positive_weight);
        self
    }

    /// (P): item ids of separate positives, needed to mask accidental hits. Positives that are candidates have their
    /// candidates' ids, rows of a table the table's.
    pub fn positive_ids(mut self, positive_ids: impl Into<Ids<'a>>) -> Self {
        self.positive_ids = Some(positive_ids.into());
        self
    }

    /// (P): log_q of separate positives and of rows of a table. Positives that are candidates by index have their
    /// candidates' log_q.
    pub fn positive_log_q(mut self, positive_log_q: &'a [f32]) -> Self {
        self.positive_log_q = Some(positive_log_q);
        self
    }

    /// Ids that are not negatives of a row, such as the user's other positives. Those of row i are
    /// `ids[offsets[i]..offsets[i + 1]]`. `offsets` (B + 1) starts at 0 and never falls. Errors call them
    /// `exclude_offsets` and `exclude_ids`.
    pub fn excluded_ids(mut self, offsets: &'a [i64], ids: impl Into<Ids<'a>>) -> Self {
        self.matrix.excluded = Some(Excluded { offsets, ids: ids.into() });
        self
    }

    /// (B): sample weights, finite and >= 0.
    pub fn row_weight(mut self, row_weight: &'a [f32]) -> Self {
        self.row_weight = Some(row_weight);
        self
    }

    /// Checks everything and returns the batch.
    ///
    /// # Errors
    /// Names the first argument that breaks a rule: shapes that disagree or are empty, mixed element types, an index
    /// past the candidates, log_q that is NaN or infinite, offsets out of order, a negative or NaN weight, ids missing
    /// where a mask needs them or given where nothing uses them.
    pub fn build(mut self) -> Result<Batch<'a>> {
        if self.matrix.table.is_some() && self.matrix.pools.is_empty() && self.matrix.row_negatives.is_none() {
            self.matrix.pools.push(Pool::whole_table());
        }
        self.matrix.check_views()?;
        let positives = given_positives(self.positives, self.positives_given_twice)?;
        if let (GivenPositives::Diagonal, Some(_)) = (positives, self.pairs.offsets) {
            return Err(does_not_apply("positive_offsets", "in_batch says that row i has the positive i"));
        }
        if let GivenPositives::Separate(embeddings) = positives {
            embeddings.check("positive_embeddings")?;
        }
        check_batch(&Described { builder: &self, positives })?;
        self.matrix.check_values()?;
        let positives = self.checked_positives(positives)?;
        self.check_positive_values(&positives)?;
        if let Some(weights) = self.row_weight {
            check_all("row_weight", weights, "finite and >= 0", |w| w.is_finite() && w >= 0.0)?;
        }
        let (positive_ids, positive_log_q) = self.positive_arrays(&positives);
        let row_weight = self.row_weight.map(Cow::Borrowed);
        Ok(Batch { matrix: self.matrix, positives, pairs: self.pairs, positive_ids, positive_log_q, row_weight })
    }

    /// Positives of a batch whose shapes are right.
    fn checked_positives(&self, positives: GivenPositives<'a>) -> Result<Positives<'a>> {
        let indices = match positives {
            GivenPositives::Separate(embeddings) => return Ok(Positives::Separate(embeddings)),
            GivenPositives::Diagonal => return self.diagonal_positives(),
            GivenPositives::Index(indices) => indices,
        };
        if let Some(table) = &self.matrix.table {
            check_rows_of_table(Argument::Named("positives"), indices, table.shape.rows)?;
            return Ok(Positives::Rows(in_32_bits(indices)));
        }
        const RANGE: &str = "at least 0 and less than the number of candidates in all pools";
        match indices.first_not_below(self.matrix.num_candidates()) {
            Some(at) => Err(value(format!("positives[{at}]"), indices.shown(at), RANGE)),
            None => Ok(Positives::Index(in_32_bits(indices))),
        }
    }

    fn diagonal_positives(&self) -> Result<Positives<'a>> {
        let b = self.matrix.num_queries();
        let rows = self.matrix.candidates(0).len();
        if rows < b {
            let rule = format!("in_batch needs a candidate for each of {b} queries in the first pool");
            return Err(shape("candidates", format!("{rows} rows"), rule));
        }
        Ok(Positives::Index((0..b as u32).collect()))
    }

    fn check_positive_values(&self, positives: &Positives<'a>) -> Result<()> {
        if let Some(offsets) = self.pairs.offsets {
            let (name, len) = match positives {
                Positives::Separate(embeddings) => ("positive_embeddings", embeddings.rows()),
                Positives::Index(indices) | Positives::Rows(indices) => ("positives", indices.len()),
            };
            check_csr(("positive_offsets", offsets), (name, len), self.matrix.num_queries())?;
        }
        if let Some(weights) = self.pairs.weight {
            check_all("positive_weight", weights, "finite and >= 0", |w| w.is_finite() && w >= 0.0)?;
        }
        match self.positive_log_q {
            Some(log_q) => check_all("positive_log_q", log_q, "finite", f32::is_finite),
            None => Ok(()),
        }
    }

    /// The positives' ids and log_q: given, or those of the candidates and rows that they are.
    #[expect(clippy::type_complexity, reason = "a pair is simpler than a name for it")]
    fn positive_arrays(&self, positives: &Positives<'a>) -> (Option<Cow<'a, [u64]>>, Option<Cow<'a, [f32]>>) {
        let given_log_q = self.positive_log_q.map(Cow::Borrowed);
        match (positives, &self.matrix.table) {
            (Positives::Index(rows), _) => {
                let pools = &self.matrix.pools;
                let ids = gather(pools.iter().map(|pool| pool.ids_slice()), rows);
                (ids.map(Cow::Owned), gather(pools.iter().map(|pool| pool.log_q), rows).map(Cow::Owned))
            }
            (Positives::Rows(rows), Some(table)) => {
                (Some(rows.iter().map(|&row| table.id(row as usize)).collect()), given_log_q)
            }
            (Positives::Rows(_) | Positives::Separate(_), _) => {
                (self.positive_ids.as_ref().map(|ids| ids.0.clone()), given_log_q)
            }
        }
    }
}

/// Indices that were checked to be smaller than a number of 32 bits.
fn in_32_bits<'a>(indices: Indices<'a>) -> Cow<'a, [u32]> {
    match indices {
        Indices::U32(indices) => Cow::Borrowed(indices),
        Indices::I64(indices) => indices.iter().map(|&index| index as u32).collect(),
    }
}

/// A builder with its positives, as [`check_batch`] reads it.
struct Described<'b, 'a> {
    builder: &'b BatchBuilder<'a>,
    positives: GivenPositives<'a>,
}

impl<'a> BatchShape for Described<'_, 'a> {
    type Matrix = ScoreMatrix<'a>;

    fn matrix(&self) -> &ScoreMatrix<'a> {
        &self.builder.matrix
    }
    fn positives(&self) -> PositivesShape {
        match self.positives {
            GivenPositives::Diagonal => PositivesShape::Index(self.builder.matrix.num_queries()),
            GivenPositives::Index(indices) if self.builder.matrix.table.is_some() => {
                PositivesShape::Rows(indices.len())
            }
            GivenPositives::Index(indices) => PositivesShape::Index(indices.len()),
            GivenPositives::Separate(embeddings) => PositivesShape::Separate(embeddings.shape()),
        }
    }
    fn positive_offsets(&self) -> Option<usize> {
        self.builder.pairs.offsets.map(<[i64]>::len)
    }
    fn positive_weight(&self) -> Option<usize> {
        self.builder.pairs.weight.map(<[f32]>::len)
    }
    fn positive_ids(&self) -> Option<usize> {
        self.builder.positive_ids.as_ref().map(|ids| ids.0.len())
    }
    fn positive_log_q(&self) -> Option<usize> {
        self.builder.positive_log_q.map(<[f32]>::len)
    }
    fn row_weight(&self) -> Option<usize> {
        self.builder.row_weight.map(<[f32]>::len)
    }
}

/// One value for each row's positive, taken from the arrays of the pools; `None` if a pool lacks that array.
fn gather<'s, T: Copy + 's>(arrays: impl Iterator<Item = Option<&'s [T]>>, positives: &[u32]) -> Option<Vec<T>> {
    let arrays: Vec<&[T]> = arrays.collect::<Option<_>>()?;
    let at = |index: u32| {
        let mut index = index as usize;
        arrays.iter().find_map(|array| {
            let found = array.get(index).copied();
            index = index.wrapping_sub(array.len());
            found
        })
    };
    Some(positives.iter().filter_map(|&index| at(index)).collect())
}
