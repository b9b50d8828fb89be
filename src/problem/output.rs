//! What a step returns.

use crate::problem::embeddings::{Matrix, Real};
use crate::problem::statistics::RowStatistics;

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
    /// (B) P(positive) under the loss, as in [`Epilogue::probability`](crate::Epilogue::probability).
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
    /// (N, D) for each pool, in order. A pool without gradient has an empty matrix, of 0 rows.
    pub d_candidates: Vec<Matrix<T>>,
    /// (B, D), where the batch has separate positives.
    pub d_positive_embeddings: Option<Matrix<T>>,
    /// `∂total/∂tau`.
    pub d_temperature: f64,
    /// `∂total/∂ log tau = tau ∂total/∂tau`, for a temperature learned through its logarithm. Negate it for a learned
    /// log scale.
    pub d_log_temperature: f64,
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

fn average<T: Real>(into: &mut Matrix<T>, other: &Matrix<T>) {
    for (a, b) in into.values.iter_mut().zip(&other.values) {
        *a = T::from_f64(0.5 * ((*a).into() + (*b).into()));
    }
}
