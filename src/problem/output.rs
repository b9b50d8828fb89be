//! What a step returns.

use super::arrays::check_len;
use super::batch::Batch;
use super::embeddings::{Matrix, Real};
use super::positives::Positives;
use super::statistics::{Request, RowStatistics};
use crate::error::{Result, does_not_apply, missing, shape, value};

/// Losses and statistics. Reuse one between steps: its memory is kept.
///
/// `T` is the type of matrices: `f32`, or `f64` from the reference backend. Per-row numbers are few and always `f64`.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Output<T = f32> {
    /// The reduced loss; [`Gradients`] are derivatives of this number.
    pub total: f64,
    /// (B) the loss of each row, before weights.
    pub loss: Vec<f64>,
    /// (P) P(positive) under the loss, as in [`Epilogue::probability`](crate::Epilogue::probability).
    pub probability: Vec<f64>,
    /// Row statistics of queries against candidates.
    pub statistics: RowStatistics<T>,
}

/// Gradients of [`Output::total`] by everything that can be learned. `T` as in [`Output`]. Reuse one between steps.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Gradients<T = f32> {
    /// (B, D)
    pub d_queries: Matrix<T>,
    /// (N, D) for each pool, in order. A pool without gradient has an empty matrix, of 0 rows, and so has one that names
    /// rows of a table.
    pub d_candidates: Vec<Matrix<T>>,
    /// (P, D), where the batch has separate positives.
    pub d_positive_embeddings: Option<Matrix<T>>,
    /// Of a batch over a table that has a gradient: the sum over everything that names its rows, that is positives, pools
    /// and negatives of a row's own.
    pub d_table: Option<TableGradient<T>>,
    /// `∂total/∂tau`.
    pub d_temperature: f64,
    /// `∂total/∂ log tau = tau ∂total/∂tau`, for a temperature learned through its logarithm. Negate it for a learned
    /// log scale.
    pub d_log_temperature: f64,
}

/// The gradient of a table, in one of two forms.
#[derive(Debug, Clone, PartialEq)]
pub enum TableGradient<T = f32> {
    /// (M, D).
    Dense(Matrix<T>),
    /// The rows that a batch names. All others have gradient 0.
    RowSparse(RowSparse<T>),
}

impl<T> TableGradient<T> {
    /// The (M, D) matrix, if it is one.
    pub fn dense(&self) -> Option<&Matrix<T>> {
        match self {
            TableGradient::Dense(matrix) => Some(matrix),
            TableGradient::RowSparse(_) => None,
        }
    }

    /// The rows, if it is row-sparse.
    pub fn row_sparse(&self) -> Option<&RowSparse<T>> {
        match self {
            TableGradient::Dense(_) => None,
            TableGradient::RowSparse(rows) => Some(rows),
        }
    }
}

impl<T: Real> Matrix<T> {
    /// Some rows of the matrix.
    pub(crate) fn rows_of(&self, rows: &[u32]) -> RowSparse<T> {
        let values = rows.iter().flat_map(|&row| self.row(row as usize)).copied().collect();
        RowSparse { rows: rows.to_vec(), values: Matrix { values, rows: rows.len(), dim: self.dim } }
    }

    pub(crate) fn add(&mut self, other: &Matrix<T>) {
        for (a, b) in self.values.iter_mut().zip(&other.values) {
            *a = T::from_f64((*a).into() + (*b).into());
        }
    }
}

/// Some rows of a matrix, each once, in ascending order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowSparse<T = f32> {
    /// (U): which rows.
    pub rows: Vec<u32>,
    /// (U, D): their values.
    pub values: Matrix<T>,
}

impl<T: Real> Gradients<T> {
    /// Adds the gradients of the swapped direction and halves: the mean over both directions.
    pub(crate) fn average_with_swapped(&mut self, swapped: &Gradients<T>) {
        average(&mut self.d_queries, &swapped.d_candidates[0]);
        average(&mut self.d_candidates[0], &swapped.d_queries);
        self.d_temperature = 0.5 * (self.d_temperature + swapped.d_temperature);
        self.d_log_temperature = 0.5 * (self.d_log_temperature + swapped.d_log_temperature);
    }
}

impl<T: Real> Gradients<T> {
    /// Adds gradients of the same shapes; row-sparse ones may name other rows.
    pub(crate) fn add(&mut self, other: &Gradients<T>) {
        self.d_queries.add(&other.d_queries);
        for (a, b) in self.d_candidates.iter_mut().zip(&other.d_candidates) {
            a.add(b);
        }
        if let (Some(a), Some(b)) = (&mut self.d_positive_embeddings, &other.d_positive_embeddings) {
            a.add(b);
        }
        match (&mut self.d_table, &other.d_table) {
            (Some(TableGradient::Dense(a)), Some(TableGradient::Dense(b))) => a.add(b),
            (Some(TableGradient::RowSparse(a)), Some(TableGradient::RowSparse(b))) => a.add(b),
            _ => {}
        }
        self.d_temperature += other.d_temperature;
        self.d_log_temperature += other.d_log_temperature;
    }
}

impl<T: Real> Gradients<T> {
    /// Checks that gradients to be added to have the batch's shapes.
    pub(crate) fn check_shapes(&self, batch: &Batch<'_>, request: Request) -> Result<()> {
        let (matrix, dim) = (&batch.matrix, batch.dim());
        check_matrix("gradients.d_queries", &self.d_queries, (batch.num_queries(), dim))?;
        check_len("gradients.d_candidates", self.d_candidates.len(), matrix.pools.len(), "the number of pools")?;
        for (p, pool) in matrix.pools.iter().enumerate() {
            let expected = match pool.candidates() {
                Some(embeddings) if pool.gradient => (embeddings.rows(), dim),
                _ => (0, 0),
            };
            check_matrix(format!("gradients.d_candidates[{p}]"), &self.d_candidates[p], expected)?;
        }
        if let Positives::Separate(embeddings) = &batch.positives {
            let Some(found) = &self.d_positive_embeddings else {
                return Err(missing("gradients.d_positive_embeddings", TO_ADD_TO));
            };
            check_matrix("gradients.d_positive_embeddings", found, (embeddings.rows(), dim))?;
        }
        let Some(table) = matrix.table.as_ref().filter(|table| table.gradient) else { return Ok(()) };
        match (&self.d_table, request.row_sparse) {
            (Some(TableGradient::Dense(found)), false) => {
                check_matrix("gradients.d_table", found, (table.shape.rows, dim))
            }
            (Some(TableGradient::RowSparse(found)), true) => {
                check_matrix("gradients.d_table", &found.values, (found.rows.len(), dim))?;
                check_ascending(&found.rows, table.shape.rows)
            }
            (None, _) => Err(missing("gradients.d_table", TO_ADD_TO)),
            (Some(_), _) => Err(does_not_apply("gradients.d_table", "it has the other form: see Request::row_sparse")),
        }
    }
}

const TO_ADD_TO: &str = "Request::accumulate adds to gradients that are there, with the batch's shapes";

fn check_matrix<T>(argument: impl Into<String>, found: &Matrix<T>, (rows, dim): (usize, usize)) -> Result<()> {
    if (found.rows, found.dim, found.values.len()) == (rows, dim, rows * dim) {
        return Ok(());
    }
    let shown = format!("shape ({}, {}) and {} values", found.rows, found.dim, found.values.len());
    Err(shape(argument, shown, format!("shape ({rows}, {dim}), which Request::accumulate adds to")))
}

fn check_ascending(rows: &[u32], table_rows: usize) -> Result<()> {
    let falls = rows.windows(2).position(|pair| pair[0] >= pair[1]).map(|at| at + 1);
    let bad = falls.or_else(|| rows.iter().position(|&row| row as usize >= table_rows));
    match bad {
        None => Ok(()),
        Some(at) => {
            let rule = "rows of the table in ascending order, each once";
            Err(value(format!("gradients.d_table.rows[{at}]"), rows[at], rule))
        }
    }
}

impl<T: Real> RowSparse<T> {
    /// The matrix of that many rows, 0 where no row is named.
    pub(crate) fn dense(&self, rows: usize) -> Matrix<T> {
        let dim = self.values.dim;
        let mut values = vec![T::default(); rows * dim];
        for (position, &row) in self.rows.iter().enumerate() {
            values[row as usize * dim..(row as usize + 1) * dim].copy_from_slice(self.values.row(position));
        }
        Matrix { values, rows, dim }
    }

    /// Adds another's rows, in place: those of both are merged from the last one on.
    pub(crate) fn add(&mut self, other: &RowSparse<T>) {
        let dim = self.values.dim.max(other.values.dim);
        let (mut i, mut j) = (self.rows.len(), other.rows.len());
        let common = other.rows.iter().filter(|row| self.rows.binary_search(row).is_ok()).count();
        let rows = i + j - common;
        self.rows.reserve_exact(rows - i);
        self.rows.resize(rows, 0);
        self.values.values.reserve_exact((rows - i) * dim);
        self.values.values.resize(rows * dim, T::default());
        (self.values.rows, self.values.dim) = (rows, dim);
        let values = &mut self.values.values;
        for to in (0..rows).rev() {
            let row = |rows: &[u32], end: usize| end.checked_sub(1).map(|last| rows[last]);
            let (mine, others) = (row(&self.rows, i), row(&other.rows, j));
            if mine >= others {
                i -= 1;
                self.rows[to] = self.rows[i];
                values.copy_within(i * dim..(i + 1) * dim, to * dim);
            }
            if others >= mine {
                j -= 1;
                let (to_row, from) = (&mut values[to * dim..(to + 1) * dim], other.values.row(j));
                match mine == others {
                    true => to_row.iter_mut().zip(from).for_each(|(to, &x)| *to = T::from_f64((*to).into() + x.into())),
                    false => to_row.copy_from_slice(from),
                }
                self.rows[to] = other.rows[j];
            }
        }
    }
}

fn average<T: Real>(into: &mut Matrix<T>, other: &Matrix<T>) {
    for (a, b) in into.values.iter_mut().zip(&other.values) {
        *a = T::from_f64(0.5 * ((*a).into() + (*b).into()));
    }
}
