//! The loss: its options, and their check against a batch. `epilogue.rs` has the formulas.
//!
//! A loss never touches the B x N scores. It is a function of each row's log-sum-exp over negatives and of its
//! positive's score, and its gradient is one coefficient for each of the two.

use super::batch::Batch;
use super::filter::FalseNegativeFilter;
use super::positives::Positives;
use crate::error::{Result, does_not_apply, missing, value};

/// How a query and a candidate are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Similarity {
    /// `q·c / (|q| |c|)`. A vector shorter than 1e-12 has cosine 0 with everything, and gradient 0. The CUDA backend
    /// treats a vector of length 2^63 = 9.2e18 or more as not finite: its cosines are NaN. The other backends accept
    /// any length.
    Cosine,
    /// `q·c`.
    Dot,
}

impl Similarity {
    /// A vector shorter than this has cosine 0 with everything.
    pub(crate) const MIN_NORM: f64 = 1e-12;
}

/// How a loss corrects for the probability with which negatives were sampled. Under every correction but `None`,
/// negatives enter the log-sum-exp as `s − log_q`, where `s = sim / temperature`. The corrections differ in how they
/// treat the positive, and in the coefficient of the gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Correction {
    /// No correction: full softmax over the catalogue, InfoNCE, plain sampled softmax.
    #[default]
    None,
    /// log_q is subtracted from negatives and positive (Bengio and Senécal 2008; Yi et al., RecSys 2019, section 4).
    LogQ,
    /// log_q is subtracted from the negatives alone; the positive's score stays as it is.
    LogQNegativesOnly,
    /// "Correcting the LogQ Correction" (RecSys 2025): the positive leaves the denominator, and the row is weighted by
    /// the estimated probability that the model does not choose it.
    CorrectedLogQ,
}

/// How per-row losses become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Reduction {
    /// The per-row losses are the result. Gradients are derivatives of `total`, which is `Σ weight·loss`.
    None,
    /// `Σ weight·loss / B`.
    #[default]
    Mean,
    /// `Σ weight·loss`.
    Sum,
    /// `Σ weight·loss / Σ weight`; needs `row_weight`.
    WeightedMean,
}

/// Options of a softmax loss.
///
/// With the margin `m = lse + shift − positive` of a row, where `lse = log Σ_negatives exp(s − log_q)`:
///
/// | loss | correction | shift | value | coefficient a |
/// |---|---|---|---|---|
/// | softmax, InfoNCE, sampled softmax | [`Correction::None`] | 0 | softplus(m) | σ(m) |
/// | logQ | [`Correction::LogQ`] | positive_log_q | softplus(m) | σ(m) |
/// | logQ on negatives alone | [`Correction::LogQNegativesOnly`] | 0 | softplus(m) | σ(m) |
/// | corrected logQ | [`Correction::CorrectedLogQ`] | log(1 − exp(positive_log_q)) | w·m | w = σ(m − log n), a constant |
///
/// `∂loss/∂lse = a` and `∂loss/∂positive = −a` for all of them. A row with no negatives has loss 0 and gradient 0.
///
/// ```
/// use catalog_softmax::{Correction, Loss, Reduction, Similarity};
/// let info_nce = Loss::softmax(Similarity::Cosine, 0.07);
/// let clip = Loss::softmax(Similarity::Cosine, 0.07).symmetric();
/// let two_tower = Loss::softmax(Similarity::Cosine, 0.05)
///     .correction(Correction::LogQ)
///     .reduction(Reduction::WeightedMean);
/// assert_eq!(two_tower.temperature, 0.05);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
#[must_use]
pub struct Loss {
    /// How a query and a candidate are compared.
    pub similarity: Similarity,
    /// `tau`: scores are `sim / tau`. Finite and > 0, with an inverse that is a normal number of single precision.
    pub temperature: f64,
    /// How the sampling probability of negatives is corrected for.
    pub correction: Correction,
    /// How per-row losses become one number.
    pub reduction: Reduction,
    /// Whether the loss is the mean over both directions, queries against candidates and candidates against queries.
    pub symmetric: bool,
    /// Which candidates score too well to be taken for negatives; `None` leaves none out.
    pub false_negatives: Option<FalseNegativeFilter>,
}

/// Which optional arrays of a batch are present. Positives that are candidates by index have their candidates' log_q;
/// others are given theirs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GivenArrays {
    pub(crate) log_q: bool,
    pub(crate) positive_log_q: bool,
    pub(crate) positives_by_index: bool,
    pub(crate) row_weight: bool,
}

impl Loss {
    /// Softmax cross-entropy of the positive against the negatives, uncorrected, reduced by the mean.
    pub fn softmax(similarity: Similarity, temperature: f64) -> Self {
        Loss {
            similarity,
            temperature,
            correction: Correction::None,
            reduction: Reduction::Mean,
            symmetric: false,
            false_negatives: None,
        }
    }

    /// Sets the correction for the sampling probability.
    pub fn correction(mut self, correction: Correction) -> Self {
        self.correction = correction;
        self
    }

    /// Sets the reduction.
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// The mean of the loss and of the loss with the two sides swapped (CLIP's loss). Needs one pool in which each
    /// candidate is the positive of one query. Row statistics are those of queries against candidates.
    pub fn symmetric(mut self) -> Self {
        self.symmetric = true;
        self
    }

    /// Leaves out candidates whose score lies more than `margin` above that of the row's positive:
    /// [`FalseNegativeFilter::Margin`].
    pub fn false_negative_margin(mut self, margin: f64) -> Self {
        self.false_negatives = Some(FalseNegativeFilter::Margin(margin));
        self
    }

    /// Leaves out candidates whose score is above `ratio` times that of the row's positive, for cosine:
    /// [`FalseNegativeFilter::Ratio`].
    pub fn false_negative_ratio(mut self, ratio: f64) -> Self {
        self.false_negatives = Some(FalseNegativeFilter::Ratio(ratio));
        self
    }

    /// `gamma = 1 / temperature`.
    pub fn scale(&self) -> f64 {
        1.0 / self.temperature
    }

    /// What backends multiply similarities by: `log2(e) / temperature`, so that scores are in units of log 2.
    pub(crate) fn scale_log2(&self) -> f32 {
        (self.scale() * std::f64::consts::LOG2_E) as f32
    }

    /// Checks the options, and that batch and loss fit each other.
    pub(crate) fn check(&self, batch: &Batch<'_>) -> Result<()> {
        self.check_options(&GivenArrays {
            log_q: batch.matrix.pools.iter().any(|pool| pool.log_q.is_some())
                || batch.matrix.row_negatives.is_some_and(|negatives| negatives.log_q.is_some()),
            positive_log_q: batch.positive_log_q.is_some(),
            positives_by_index: matches!(batch.positives, Positives::Index(_)),
            row_weight: batch.row_weight.is_some(),
        })?;
        if let (Correction::CorrectedLogQ, Some(log_q)) = (self.correction, &batch.positive_log_q)
            && let Some(row) = log_q.iter().position(|&l| l >= 0.0)
        {
            let rule = "< 0 for Correction::CorrectedLogQ: a probability below 1, not an expected count";
            return Err(value(format!("positive_log_q[{row}]"), log_q[row], rule));
        }
        if let (Reduction::WeightedMean, Some(weights)) = (self.reduction, &batch.row_weight) {
            let sum: f64 = weights.iter().map(|&w| f64::from(w)).sum();
            if sum <= 0.0 {
                return Err(value("the sum of row_weight", sum, "> 0 with Reduction::WeightedMean"));
            }
        }
        if self.symmetric {
            batch.swapped()?;
        }
        Ok(())
    }

    /// Options that are out of range or do not fit what a batch was given, wherever its arrays are.
    pub(crate) fn check_options(&self, given: &GivenArrays) -> Result<()> {
        // A subnormal factor would have lost digits, and the gradients with it.
        if !(self.temperature > 0.0 && self.temperature.is_finite() && self.scale_log2().is_normal()) {
            let rule = "finite and > 0, with log2(e) / temperature a normal number of single precision";
            return Err(value("temperature", self.temperature, rule));
        }
        self.false_negatives.map_or(Ok(()), |filter| filter.check(self.similarity))?;
        if self.reduction == Reduction::WeightedMean && !given.row_weight {
            return Err(missing("row_weight", "Reduction::WeightedMean divides by its sum"));
        }
        if self.correction == Correction::None {
            if given.log_q {
                return Err(does_not_apply(
                    "log_q",
                    "Correction::None subtracts none: choose a correction, or give none",
                ));
            }
            if given.positive_log_q {
                return Err(does_not_apply("positive_log_q", "Correction::None uses none"));
            }
            return Ok(());
        }
        if self.symmetric {
            let rule = "in the swapped direction queries are the candidates, and they have no log_q";
            return Err(does_not_apply(format!("Correction::{:?}", self.correction), rule));
        }
        if !given.log_q {
            return Err(missing("log_q", "every correction subtracts it from the negatives' scores"));
        }
        let uses_positive = self.correction != Correction::LogQNegativesOnly;
        if uses_positive && !given.positive_log_q {
            return Err(missing(
                "positive_log_q",
                "this correction needs it for positives that are not candidates by index",
            ));
        }
        if !given.positives_by_index && given.positive_log_q && !uses_positive {
            let rule = "Correction::LogQNegativesOnly leaves the positive as it is";
            return Err(does_not_apply("positive_log_q", rule));
        }
        Ok(())
    }
}
