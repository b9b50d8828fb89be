//! Collects the arrays of a batch and checks them. Bad input in host memory is rejected only here.

use std::borrow::Cow;

use super::arrays::{Excluded, Ids, Indices, check_all};
use super::batch::{Batch, Positives};
use super::embeddings::Embeddings;
use super::pool::Pool;
use super::score_matrix::ScoreMatrix;
use super::shape::{BatchShape, PositivesShape, check_batch, given_positives};
use crate::error::{Result, shape, value};

/// Collects a [`Batch`]; nothing is checked before [`build`](BatchBuilder::build).
#[derive(Debug, Clone)]
#[must_use]
pub struct BatchBuilder<'a> {
    matrix: ScoreMatrix<'a>,
    positives: Option<GivenPositives<'a>>,
    positives_given_twice: bool,
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
        BatchBuilder {
            matrix: ScoreMatrix::new(queries, candidates),
            positives: None,
            positives_given_twice: false,
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

    /// (B): the positive of row i is candidate `positives[i]`, counted over all pools.
    pub fn positives(self, positives: impl Into<Indices<'a>>) -> Self {
        self.with(GivenPositives::Index(positives.into()))
    }

    /// (B, D): positives that are not among the candidates. They are not negatives of any row.
    pub fn positive_embeddings(self, positive_embeddings: Embeddings<'a>) -> Self {
        self.with(GivenPositives::Separate(positive_embeddings))
    }

    /// (B): item ids of separate positives, needed to mask accidental hits. Positives that are candidates have their
    /// candidates' ids.
    pub fn positive_ids(mut self, positive_ids: impl Into<Ids<'a>>) -> Self {
        self.positive_ids = Some(positive_ids.into());
        self
    }

    /// (B): log_q of separate positives. Positives that are candidates have their candidates' log_q.
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
    pub fn build(self) -> Result<Batch<'a>> {
        self.matrix.check_views()?;
        let positives = given_positives(self.positives, self.positives_given_twice)?;
        if let GivenPositives::Separate(embeddings) = positives {
            embeddings.check("positive_embeddings")?;
        }
        check_batch(&Described { builder: &self, positives })?;
        self.matrix.check_values()?;
        let positives = self.checked_positives(positives)?;
        if let Some(log_q) = self.positive_log_q {
            check_all("positive_log_q", log_q, "finite", f32::is_finite)?;
        }
        if let Some(weights) = self.row_weight {
            check_all("row_weight", weights, "finite and >= 0", |w| w.is_finite() && w >= 0.0)?;
        }
        let (positive_ids, positive_log_q) = match &positives {
            Positives::Index(rows) => {
                let pools = &self.matrix.pools;
                let ids = gather(pools.iter().map(|pool| pool.ids_slice()), rows);
                (ids.map(Cow::Owned), gather(pools.iter().map(|pool| pool.log_q), rows).map(Cow::Owned))
            }
            Positives::Separate(_) => (self.positive_ids.map(|ids| ids.0), self.positive_log_q.map(Cow::Borrowed)),
        };
        let row_weight = self.row_weight.map(Cow::Borrowed);
        Ok(Batch { matrix: self.matrix, positives, positive_ids, positive_log_q, row_weight })
    }

    /// Positives of a batch whose shapes are right.
    fn checked_positives(&self, positives: GivenPositives<'a>) -> Result<Positives<'a>> {
        let (b, n) = (self.matrix.num_queries(), self.matrix.num_candidates());
        const RANGE: &str = "at least 0 and less than the number of candidates in all pools";
        match positives {
            GivenPositives::Separate(embeddings) => Ok(Positives::Separate(embeddings)),
            GivenPositives::Diagonal => {
                let rows = self.matrix.pools[0].candidates.rows();
                if rows < b {
                    let rule = format!("in_batch needs a candidate for each of {b} queries in the first pool");
                    return Err(shape("candidates", format!("{rows} rows"), rule));
                }
                Ok(Positives::Index((0..b as u32).collect()))
            }
            GivenPositives::Index(Indices::U32(indices)) => match indices.iter().position(|&i| i as usize >= n) {
                Some(row) => Err(value(format!("positives[{row}]"), indices[row], RANGE)),
                None => Ok(Positives::Index(Cow::Borrowed(indices))),
            },
            GivenPositives::Index(Indices::I64(indices)) => {
                match indices.iter().position(|&i| i < 0 || i as u64 >= n as u64) {
                    Some(row) => Err(value(format!("positives[{row}]"), indices[row], RANGE)),
                    None => Ok(Positives::Index(indices.iter().map(|&i| i as u32).collect())),
                }
            }
        }
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
            GivenPositives::Index(Indices::U32(indices)) => PositivesShape::Index(indices.len()),
            GivenPositives::Index(Indices::I64(indices)) => PositivesShape::Index(indices.len()),
            GivenPositives::Separate(embeddings) => PositivesShape::Separate(embeddings.shape()),
        }
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
