//! Judges a step: what a backend found and what a golden batch expects, each against the float64 reference.
//!
//! Nothing here is derived from the numbers that are judged. An expectation that is wrong cannot widen its own
//! tolerance, and a backend that is wrong in the same way as the expectation is found out, too.
//!
//! How far an element may be off:
//!
//! * Found by a backend that computes in f32: as far as in the property suite, which is four times the error of an
//!   honest f32 baseline, clamped (`tolerance.rs`).
//! * A gradient found from f16 or bf16 rows on a GPU: four roundings of an operand to that type more.
//! * Found by the reference: 1e-9 of its terms.
//! * Expected: as far as one that was found, and by what the type in which it is stored loses in a cross-entropy, and
//!   by what PyTorch's softplus leaves out. Where it is stored as F32, at least as far as an f32 backend may be.
//!
//! The sizes of an element's terms come from `scales.rs`. Counts, infinities and NaN are those of the reference
//! exactly.

use std::collections::BTreeMap;

use catalog_softmax::{DType, Real, TableGradient};
use safetensors::Dtype;

use super::golden::{Expected, Golden, RESULTS, Tensor};
use super::problem::Problem;
use super::scales::Scale;
use super::step::Step;
use super::tolerance::{self, FACTOR, epsilon};

/// Results by name, as [`Expected`].
pub type Results = BTreeMap<&'static str, Tensor>;

/// What `f64` arithmetic owes, in units of an element's terms.
const FLOAT64: f64 = 1e-9;
/// Above this margin PyTorch's softplus returns the margin itself. Gradients from it lack `exp(−margin)` in the
/// coefficient of such a row. The loss lacks no more than a tenth of FLOAT64.
const SOFTPLUS_THRESHOLD: f64 = 20.0;

/// How exactly a backend computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Precision {
    /// In `f64`.
    Float64,
    /// In `f32`, with coefficients and probabilities rounded to `operands` before they multiply embeddings.
    Single { operands: DType },
    /// Found and expected may be off by this share of an element's terms.
    Within(f64),
}

/// A number that somebody claims is right, and how far it is from what is right. Error and tolerance are in units of
/// the element's terms.
#[derive(Debug, Clone, Copy)]
pub struct Claim {
    pub value: f64,
    pub error: f64,
    pub tolerance: f64,
}

impl Claim {
    /// `unit` is what errors are counted in. A number that is not there is as wrong as can be.
    fn new(value: Option<f64>, right: f64, tolerance: f64, unit: f64) -> Claim {
        let same = |value: f64| value == right || (value.is_nan() && right.is_nan());
        let error = match value {
            Some(value) if same(value) => 0.0,
            Some(value) if (value - right).is_finite() => (value - right).abs() / unit,
            _ => f64::INFINITY,
        };
        Claim { value: value.unwrap_or(f64::NAN), error, tolerance: tolerance / unit }
    }

    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }

    /// How many tolerances the claim is off.
    fn badness(&self) -> f64 {
        if self.error == 0.0 { 0.0 } else { self.error / self.tolerance }
    }
}

/// The worst element of one result.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub name: &'static str,
    pub at: usize,
    pub right: f64,
    pub found: Claim,
    pub expected: Claim,
}

impl Verdict {
    pub fn passes(&self) -> bool {
        self.found.passes() && self.expected.passes()
    }

    fn badness(&self) -> f64 {
        self.found.badness().max(self.expected.badness())
    }
}

/// A verdict for every result that the golden batch expects.
pub fn judge(golden: &Golden, found: &Results, precision: Precision) -> Vec<Verdict> {
    Judge::new(&golden.problem, precision).judge(&golden.expected, found)
}

/// What is right for one problem, and how far from it a claim may be.
pub struct Judge {
    precision: Precision,
    right: Results,
    measured: tolerance::Expected,
}

impl Judge {
    /// Computes reference and baseline, and so B x N numbers. The problem is one that a backend accepts.
    pub fn new(problem: &Problem, precision: Precision) -> Judge {
        let measured = tolerance::Expected::measure(problem, DType::F32);
        Judge { precision, right: results(&measured.output), measured }
    }

    pub fn judge(&self, expected: &Expected, found: &Results) -> Vec<Verdict> {
        let expected = RESULTS.iter().filter_map(|&name| Some((name, expected.get(name)?)));
        expected.map(|(name, expected)| self.worst_element(name, expected, found.get(name))).collect()
    }

    fn worst_element(&self, name: &'static str, expected: &Tensor, found: Option<&Tensor>) -> Verdict {
        let rows = self.rows(name);
        let right = self.right.get(name).map_or(&[][..], |tensor| &tensor.values);
        let width = right.len() / rows.len().max(1);
        let nothing = Claim::new(None, f64::NAN, 0.0, 1.0);
        let mut worst = Verdict { name, at: 0, right: f64::NAN, found: nothing, expected: nothing };
        for (at, &right) in right.iter().enumerate() {
            let (scale, single) = rows[at / width];
            let unit = if scale.terms > 0.0 && scale.terms.is_finite() { scale.terms } else { 1.0 };
            let (for_found, for_expected) = self.tolerances(name, &scale, single, expected.dtype);
            let value = found.and_then(|tensor| tensor.values.get(at).copied());
            let found = Claim::new(value, right, for_found, unit);
            let expected = Claim::new(expected.values.get(at).copied(), right, for_expected, unit);
            let verdict = Verdict { name, at, right, found, expected };
            if at == 0 || verdict.badness() > worst.badness() {
                worst = verdict;
            }
        }
        worst
    }

    /// Scale and tolerance in `f32` of each row of a result; none where this problem has no such result.
    fn rows(&self, name: &str) -> Vec<(Scale, f64)> {
        let measured = &self.measured;
        let same = |tensor: &tolerance::Tensor| tensor.name.strip_suffix("[0]").unwrap_or(&tensor.name) == name;
        let Some(at) = measured.tensors.iter().position(same) else { return Vec::new() };
        measured.scales[at].iter().copied().zip(measured.tolerances[at].iter().copied()).collect()
    }

    /// How far an element may be off where it was found, and where it is expected and stored as `stored`.
    fn tolerances(&self, name: &str, scale: &Scale, single: f64, stored: Dtype) -> (f64, f64) {
        let gradient = name.starts_with("d_");
        let found = match self.precision {
            Precision::Within(share) => return (share * scale.terms, share * scale.terms),
            // What underflow takes, in numbers that reach further down.
            Precision::Float64 => {
                FLOAT64 * scale.terms + f64::MIN_POSITIVE / f64::from(f32::MIN_POSITIVE) * scale.floor
            }
            // Half a unit in the last place is what one rounding takes.
            Precision::Single { operands } if gradient && operands != DType::F32 => {
                single + FACTOR * 0.5 * epsilon(operands) * scale.terms
            }
            Precision::Single { .. } => single,
        };
        let (least, unit) = match stored {
            Dtype::F32 => (single, f64::from(f32::EPSILON)),
            _ => (0.0, f64::EPSILON),
        };
        let mut expected = found.max(least) + FACTOR * unit * scale.cross_entropy;
        if gradient && self.measured.exact.largest_margin > SOFTPLUS_THRESHOLD {
            expected += (-SOFTPLUS_THRESHOLD).exp() * scale.terms;
        }
        // Where a scale is not finite, only what is equal passes.
        let finite = |tolerance: f64| if tolerance.is_finite() { tolerance } else { 0.0 };
        (finite(found), finite(expected))
    }
}

/// A backend's output under the names of [`RESULTS`].
pub fn results<T: Real>(output: &Step<T>) -> Results {
    let real = if size_of::<T>() == 4 { Dtype::F32 } else { Dtype::F64 };
    let statistics = &output.statistics;
    let counts = statistics.num_negatives.iter().map(|&n| n as f64).collect();
    let mut results = Results::from([
        ("loss", vector(output.loss.clone(), Dtype::F64)),
        ("total", vector(vec![output.total], Dtype::F64)),
        ("lse", vector(statistics.lse.clone(), Dtype::F64)),
        ("positive", vector(statistics.positive.clone(), Dtype::F64)),
        ("num_negatives", vector(counts, Dtype::I64)),
    ]);
    let Some(gradients) = &output.gradients else { return results };
    let matrices = [
        ("d_queries", Some(&gradients.d_queries)),
        ("d_candidates", gradients.d_candidates.first().filter(|_| gradients.d_table.is_none())),
        ("d_positive_embeddings", gradients.d_positive_embeddings.as_ref()),
        ("d_table", gradients.d_table.as_ref().and_then(TableGradient::dense)),
    ];
    for (name, matrix) in matrices {
        if let Some(matrix) = matrix {
            let values = matrix.values.iter().map(|&v| v.into()).collect();
            results.insert(name, Tensor { values, shape: vec![matrix.rows, matrix.dim], dtype: real });
        }
    }
    results.insert("d_temperature", vector(vec![gradients.d_temperature], Dtype::F64));
    results
}

fn vector(values: Vec<f64>, dtype: Dtype) -> Tensor {
    Tensor { shape: vec![values.len()], values, dtype }
}
