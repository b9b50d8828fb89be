//! A table of all items' embeddings, and what names rows of it: pools by reference, and negatives of a row's own.

use super::arrays::{Ids, Indices, check_len};
use super::embeddings::{DType, Embeddings};
use super::shape::{MatrixShape, RowNegativesShape};
use crate::error::{Argument, Result, shape, value};

/// All items' embeddings (M, D), of which a batch names rows.
///
/// A batch over a table ([`Batch::of_table`](crate::Batch::of_table)) reads rows where they are and never copies them
/// into matrices of its own. Its gradient is a gradient of the table:
/// [`Gradients::d_table`](crate::Gradients::d_table).
///
/// An item's identity is its row, unless [`ids`](Table::ids) are given. Masks compare identities: a candidate with the
/// identity of one of the row's positives, or with an id that the row excludes, is not a negative of that row.
#[derive(Debug, Clone)]
pub struct Table<'a> {
    pub(crate) shape: MatrixShape,
    /// `None` where only the shape was given.
    pub(crate) embeddings: Option<Embeddings<'a>>,
    pub(crate) ids: Option<Ids<'a>>,
    pub(crate) gradient: bool,
}

impl<'a> Table<'a> {
    /// A table whose items are identified by their rows, and that receives a gradient.
    pub fn new(embeddings: Embeddings<'a>) -> Self {
        Table { shape: embeddings.shape(), embeddings: Some(embeddings), ids: None, gradient: true }
    }

    /// The shape of a table (M, D) whose elements [`Backend::update`](crate::Backend::update) receives: it changes them,
    /// so the batch cannot borrow them meanwhile.
    pub fn of_shape(rows: usize, dim: usize, dtype: DType) -> Self {
        Table { shape: MatrixShape { rows, dim, dtype }, embeddings: None, ids: None, gradient: true }
    }

    /// (M): ids of the items, where an item is not its row.
    pub fn ids(mut self, ids: impl Into<Ids<'a>>) -> Self {
        self.ids = Some(ids.into());
        self
    }

    /// The table is constant: no gradient is computed for it.
    pub fn without_gradient(mut self) -> Self {
        self.gradient = false;
        self
    }

    /// The identity of a row's item.
    pub(crate) fn id(&self, row: usize) -> u64 {
        self.ids.as_ref().map_or(row as u64, |ids| ids.0[row])
    }

    pub(crate) fn check(&self) -> Result<()> {
        match &self.embeddings {
            Some(embeddings) => embeddings.check("table"),
            None if self.shape.rows == 0 || self.shape.dim == 0 => {
                let found = format!("shape ({}, {})", self.shape.rows, self.shape.dim);
                Err(shape("table", found, "rows >= 1 and dim >= 1"))
            }
            None => Ok(()),
        }
    }
}

impl<'a> From<Embeddings<'a>> for Table<'a> {
    fn from(embeddings: Embeddings<'a>) -> Self {
        Table::new(embeddings)
    }
}

/// Negatives of each row's own: row i's k-th is row `rows[i * K + k]` of the batch's table.
///
/// They stand beside the pools, which all rows share, in one log-sum-exp. A repeated negative counts as often as it is
/// drawn.
///
/// ```
/// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, RowNegatives, Similarity};
/// let table: Vec<f32> = (0..10 * 4).map(|i| (i as f32).sin()).collect();
/// let queries: Vec<f32> = (0..2 * 4).map(|i| (i as f32).cos()).collect();
/// // Two queries with three negatives each, the last one of the second row left out.
/// let negatives = [4i64, 7, 7, 1, 9, -1];
/// let batch = Batch::of_table(Embeddings::new(&queries, 2, 4), Embeddings::new(&table, 10, 4))
///     .positives(&[3u32, 5])
///     .row_negatives(RowNegatives::new(&negatives, 3))
///     .build()?;
/// let (output, _) = Cpu::new().value_and_grad(&batch, &Loss::softmax(Similarity::Dot, 1.0))?;
/// assert_eq!(output.statistics.num_negatives, [3, 2]);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct RowNegatives<'a> {
    pub(crate) rows: Indices<'a>,
    pub(crate) per_row: usize,
    pub(crate) log_q: Option<&'a [f32]>,
}

impl<'a> RowNegatives<'a> {
    /// The index that stands for no negative, in a row that has fewer than K. In `i64` it is -1.
    pub const NONE: u32 = u32::MAX;
    /// The largest K.
    pub const MAX_PER_ROW: usize = 4096;

    /// `rows` (B, K), one query's K after the other's; `per_row` is K.
    pub fn new(rows: impl Into<Indices<'a>>, per_row: usize) -> Self {
        RowNegatives { rows: rows.into(), per_row, log_q: None }
    }

    /// (B, K): natural logarithm of the probability that one draw of the row is this item, as [`Pool::log_q`](crate::Pool::log_q).
    pub fn log_q(mut self, log_q: &'a [f32]) -> Self {
        self.log_q = Some(log_q);
        self
    }

    /// The table's row of a query's k-th negative. `None` where there is none.
    pub(crate) fn at(&self, query: usize, k: usize) -> Option<usize> {
        self.by_index(query * self.per_row + k)
    }

    /// The same by the place in the (B, K) array.
    pub(crate) fn by_index(&self, index: usize) -> Option<usize> {
        let row = self.rows.at(index);
        (row < Self::NONE as usize).then_some(row)
    }

    pub(crate) fn shape(&self) -> RowNegativesShape {
        RowNegativesShape { rows: self.rows.len(), per_row: self.per_row, log_q: self.log_q.map(<[f32]>::len) }
    }

    /// Checks that each index is a row of a table of that many rows, or stands for none.
    pub(super) fn check_values(&self, table_rows: usize) -> Result<()> {
        let none = match self.rows {
            Indices::U32(_) => Self::NONE as usize,
            Indices::I64(_) => -1i64 as usize,
        };
        let bad = |row: usize| row >= table_rows && row != none;
        match (0..self.rows.len()).find(|&index| bad(self.rows.at(index))) {
            None => Ok(()),
            Some(index) => {
                let argument = format!("row_negatives[{}, {}]", index / self.per_row, index % self.per_row);
                Err(value(argument, self.rows.shown(index), ROW_OR_NONE))
            }
        }
    }
}

const ROW_OR_NONE: &str = "a row of the table, or -1 (u32::MAX) for none";

/// Checks that indices are rows of a table of that many rows.
pub(super) fn check_rows_of_table(argument: Argument, rows: Indices<'_>, table_rows: usize) -> Result<()> {
    match rows.first_not_below(table_rows) {
        None => Ok(()),
        Some(at) => {
            Err(value(format!("{argument}[{at}]"), rows.shown(at), "at least 0 and less than the table's rows"))
        }
    }
}

/// Checks the length of the ids of a table.
pub(super) fn check_table_ids(ids: Option<usize>, table_rows: usize) -> Result<()> {
    ids.map_or(Ok(()), |len| check_len("table ids", len, table_rows, "the number of the table's rows"))
}
