//! From a row's statistics to its loss: all that distinguishes one loss from another.
//!
//! The formulas are in the table of [`Loss`].

use super::arrays::check_len;
use super::batch::Batch;
use super::loss::{Correction, Loss, Reduction};
use super::statistics::RowStatistics;
use crate::error::{Result, shape};

/// Per-row losses and what they send back into the stream.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Epilogue {
    /// (B): the loss of each row, before row weights. Positives of the row are weighted in it.
    pub loss: Vec<f64>,
    /// (P): P(positive) = 1 − a, the probability that the model gives to the positive among the row's negatives and it.
    pub probability: Vec<f64>,
    /// (B): derivative of the total by each row's `lse`, row weight and reduction folded in.
    pub d_lse: Vec<f64>,
    /// (P): derivative of the total by each `positive`, row weight and reduction folded in.
    pub d_positive: Vec<f64>,
    /// The reduced loss.
    pub total: f64,
}

impl Loss {
    /// The per-row loss and its derivatives: everything that distinguishes one loss from another.
    ///
    /// [`Epilogue::d_lse`] and [`Epilogue::d_positive`] have row weight and reduction folded in; they are what
    /// [`Backend::gradients`](crate::Backend::gradients) takes. A loss of your own replaces this function and nothing
    /// else.
    ///
    /// # Errors
    /// As [`Backend::compute`](crate::Backend::compute), and [`Error::Shape`](crate::Error::Shape) where the
    /// statistics are not of this batch's length.
    pub fn epilogue<T>(&self, batch: &Batch<'_>, statistics: &RowStatistics<T>) -> Result<Epilogue> {
        self.check(batch)?;
        let b = batch.num_queries();
        if [statistics.lse.len(), statistics.num_negatives.len()] != [b; 2] {
            let found = format!("length {}", statistics.lse.len());
            return Err(shape("statistics", found, format!("{b} rows, as many as queries")));
        }
        check_len("statistics.positive", statistics.positive.len(), batch.num_positives(), "the number of positives")?;
        Ok(self.checked_epilogue(batch, statistics))
    }

    pub(crate) fn checked_epilogue<T>(&self, batch: &Batch<'_>, statistics: &RowStatistics<T>) -> Epilogue {
        self.epilogue_times(self.upstream(batch), batch, statistics)
    }

    /// The same of a batch whose reduction spans more rows than its own: `upstream` multiplies each weighted row.
    pub(crate) fn epilogue_times<T>(
        &self,
        upstream: f64,
        batch: &Batch<'_>,
        statistics: &RowStatistics<T>,
    ) -> Epilogue {
        let rows = || Vec::with_capacity(batch.num_queries());
        let pairs = || Vec::with_capacity(batch.num_positives());
        let (loss, probability, d_lse, d_positive) = (rows(), pairs(), rows(), pairs());
        let mut out = Epilogue { loss, probability, d_lse, d_positive, ..Epilogue::default() };
        for row in 0..batch.num_queries() {
            let row_weight = batch.weight(row);
            let (mut row_loss, mut row_coefficient) = (0.0, 0.0);
            for pair in batch.pairs.of_row(row) {
                let PairLoss { loss, coefficient } = self.pair(batch, statistics, row, pair);
                let weight = batch.pairs.weight(row, pair);
                row_loss += times(weight, loss);
                row_coefficient += times(weight, coefficient);
                out.probability.push(1.0 - coefficient);
                out.d_positive.push(times(row_weight * weight * upstream, -coefficient));
            }
            out.loss.push(row_loss);
            out.d_lse.push(times(row_weight * upstream, row_coefficient));
            out.total += times(row_weight * upstream, row_loss);
        }
        out
    }

    /// What multiplies each weighted row: the derivative of the total by a row's weighted loss.
    fn upstream(&self, batch: &Batch<'_>) -> f64 {
        match self.reduction {
            Reduction::None | Reduction::Sum => 1.0,
            Reduction::Mean => 1.0 / batch.num_queries() as f64,
            Reduction::WeightedMean => 1.0 / (0..batch.num_queries()).map(|row| batch.weight(row)).sum::<f64>(),
        }
    }

    fn pair<T>(&self, batch: &Batch<'_>, statistics: &RowStatistics<T>, row: usize, pair: usize) -> PairLoss {
        let n = statistics.num_negatives[row];
        if n == 0 {
            return PairLoss { loss: 0.0, coefficient: 0.0 };
        }
        let positive_log_q = || batch.positive_log_q.as_ref().map_or(0.0, |log_q| f64::from(log_q[pair]));
        let shift = match self.correction {
            Correction::None | Correction::LogQNegativesOnly => 0.0,
            Correction::LogQ => positive_log_q(),
            Correction::CorrectedLogQ => log1m_exp(positive_log_q()),
        };
        let margin = statistics.lse[row] + shift - statistics.positive[pair];
        if self.correction == Correction::CorrectedLogQ {
            // The weight is a constant of the step (stop-gradient): 1 − P(positive), the denominator's full sum over
            // the catalogue being estimated by the mean over n draws.
            let weight = sigmoid(margin - (n as f64).ln());
            return PairLoss { loss: times(weight, margin), coefficient: weight };
        }
        PairLoss { loss: softplus(margin), coefficient: sigmoid(margin) }
    }
}

/// The loss of a row with one of its positives, and the coefficient `a`.
struct PairLoss {
    loss: f64,
    coefficient: f64,
}

/// `weight · x`, and 0 where the weight is 0: what has no weight is absent, whatever its value. 0 · NaN must not enter a
/// sum.
pub(crate) fn times(weight: f64, x: f64) -> f64 {
    if weight == 0.0 { 0.0 } else { weight * x }
}

/// `log(1 + exp(x))`, exact to rounding on both sides: the loss of a row with margin x.
fn softplus(x: f64) -> f64 {
    // `max` would drop a NaN.
    let positive_part = if x < 0.0 { 0.0 } else { x };
    positive_part + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + exp(−x))` without overflow.
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// `log(1 − exp(x))` for x < 0, without cancellation near either end (Mächler 2012).
fn log1m_exp(x: f64) -> f64 {
    if x > -std::f64::consts::LN_2 { (-x.exp_m1()).ln() } else { (-x.exp()).ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epilogue_functions_hold_at_the_ends() {
        assert_eq!(softplus(f64::NEG_INFINITY), 0.0);
        assert_eq!(softplus(800.0), 800.0);
        assert_eq!(softplus(-40.0), (-40.0f64).exp());
        assert!(softplus(f64::NAN).is_nan() && sigmoid(f64::NAN).is_nan());
        assert_eq!((sigmoid(f64::NEG_INFINITY), sigmoid(800.0)), (0.0, 1.0));
        assert!((log1m_exp(-1e-9) - 1e-9f64.ln()).abs() < 1e-8);
        assert_eq!(log1m_exp(-50.0), -(-50.0f64).exp());
    }
}
