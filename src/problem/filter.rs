//! The false-negative filter: candidates that score too well to be believed negatives.

use super::loss::Similarity;
use crate::error::{Result, does_not_apply, value};

/// Which candidates score so high that a row takes them for positives that nobody marked, and leaves them out of its
/// negatives.
///
/// The bound is a constant of the step: no gradient flows through it. A candidate whose raw score (before log_q) lies
/// strictly above the bound is not a negative. A row with several positives takes the largest of their scores, and a row
/// without a positive has no bound. A NaN score is never left out.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum FalseNegativeFilter {
    /// The bound is `positive + margin`, in units of scores, that is, after the division by the temperature. Finite; it
    /// may be negative.
    Margin(f64),
    /// The bound is `positive * ratio`, where the positive's score is above 0; other rows have no bound. For cosine
    /// alone. Finite and > 0.
    Ratio(f64),
}

impl FalseNegativeFilter {
    /// The bound of a row, given the scores of its positives; ∞ where it has none.
    pub(crate) fn bound(self, positives: impl Iterator<Item = f64>) -> f64 {
        let best = positives.fold(f64::NEG_INFINITY, |best, score| if score > best { score } else { best });
        match self {
            _ if best == f64::NEG_INFINITY => f64::INFINITY,
            FalseNegativeFilter::Margin(margin) => best + margin,
            FalseNegativeFilter::Ratio(ratio) if best > 0.0 => best * ratio,
            FalseNegativeFilter::Ratio(_) => f64::INFINITY,
        }
    }

    pub(crate) fn check(self, similarity: Similarity) -> Result<()> {
        match self {
            FalseNegativeFilter::Margin(margin) if !margin.is_finite() => {
                Err(value("false_negative_margin", margin, "finite"))
            }
            FalseNegativeFilter::Ratio(ratio) if !(ratio.is_finite() && ratio > 0.0) => {
                Err(value("false_negative_ratio", ratio, "finite and > 0"))
            }
            FalseNegativeFilter::Ratio(_) if similarity == Similarity::Dot => {
                Err(does_not_apply("false_negative_ratio", "a ratio of scores has a meaning for cosine alone"))
            }
            FalseNegativeFilter::Margin(_) | FalseNegativeFilter::Ratio(_) => Ok(()),
        }
    }
}
