//! Results against a golden batch's expectations: element by element, in units in which rounding is uniform.
//!
//! An element's error is `|found − expected| / scale`. Its scale is
//! - for loss, total and d_temperature, `|expected|`: an error in a score is a relative error of the loss;
//! - for lse and positive, the largest finite value of the tensor: scores share one unit, and one near 0 has cancelled;
//! - for gradients, the largest value of the element's row: a row is one sum of vectors, then projected as a whole;
//!
//! and never below `1e-7 / temperature`, under which gradients that cancel to nothing would be all rounding.
//! Infinities, and counts, match exactly.

use std::collections::BTreeMap;

use catalog_softmax::{DType, Output, Real};
use safetensors::Dtype;

use super::golden::{Golden, RESULTS, Tensor};
use super::naive::{Naive, naive_rounded};
use super::problem::{PositiveData, Problem};

/// Results by name, as [`Expected`](super::golden::Expected).
pub type Results = BTreeMap<&'static str, Tensor>;

/// Largest error that each result may have.
pub type Tolerances = BTreeMap<&'static str, f64>;

/// What `f64` arithmetic owes.
const FLOAT64: f64 = 1e-9;
/// Above this margin PyTorch's softplus returns the margin itself. Expectations from it lack `exp(−margin)` in the loss
/// of such a row and in the coefficient of its gradients.
const SOFTPLUS_THRESHOLD: f64 = 20.0;
/// How many times the naive baseline's own largest error an `f32` backend may be off.
const TIMES_NAIVE: f64 = 4.0;
/// Least tolerance of an `f32` backend, because the baseline may be lucky, above all in a small batch: this many EPSILON
/// for lse and positive; `max(1, S)` times that for what is exponential in a score, as a score of size S is off by
/// EPSILON·S.
const FLOOR: f64 = 4.0;

/// One result's worst element.
#[derive(Debug, Clone)]
pub struct Comparison {
    pub name: &'static str,
    /// In units of the element's scale.
    pub error: f64,
    pub at: usize,
    pub found: f64,
    pub expected: f64,
    pub tolerance: f64,
}

impl Comparison {
    pub fn passes(&self) -> bool {
        self.error <= self.tolerance
    }
}

/// Every result that the golden batch expects.
pub fn compare(golden: &Golden, results: &Results, tolerances: &Tolerances) -> Vec<Comparison> {
    let expected = RESULTS.iter().filter_map(|&name| Some((name, golden.expected.get(name)?)));
    expected
        .map(|(name, expected)| {
            let tolerance = tolerances[name] + if expected.dtype == Dtype::F32 { f64::from(f32::EPSILON) } else { 0.0 };
            let none = Tensor { values: Vec::new(), ..expected.clone() };
            worst_element(golden, name, results.get(name).unwrap_or(&none), expected, tolerance)
        })
        .collect()
}

/// The same tolerance for every result but the counts, which are exact.
pub fn uniform_tolerances(tolerance: f64) -> Tolerances {
    RESULTS.iter().map(|&name| (name, if name == "num_negatives" { 0.0 } else { tolerance })).collect()
}

/// Of a backend that computes in `f64`.
pub fn float64_tolerances(golden: &Golden) -> Tolerances {
    let mut tolerances = uniform_tolerances(FLOAT64);
    let past_threshold = |loss: &Tensor| loss.values.iter().any(|&loss| loss > SOFTPLUS_THRESHOLD);
    if golden.expected.get("loss").is_some_and(past_threshold) {
        for (_, tolerance) in tolerances.iter_mut().filter(|(name, _)| name.starts_with("d_") || **name == "loss") {
            *tolerance += (-SOFTPLUS_THRESHOLD).exp();
        }
    }
    tolerances
}

/// Of a backend that computes in `f32`, or rounds what it multiplies to `operands`: a multiple of the error that the naive
/// baseline makes so on the same batch. Computes the baseline, and so B x N floats.
pub fn baseline_tolerances(golden: &Golden, operands: DType) -> Tolerances {
    let scores = ["lse", "positive"].iter().filter_map(|&name| golden.expected.get(name));
    let largest_score = scores.map(|tensor| largest(&tensor.values)).fold(1.0, f64::max);
    let floor = FLOOR * f64::from(f32::EPSILON);
    let mut tolerances = uniform_tolerances(floor * largest_score);
    tolerances.extend([("lse", floor), ("positive", floor)]);
    for of_naive in compare(golden, &naive_results(&golden.problem, operands), &uniform_tolerances(0.0)) {
        if of_naive.name != "num_negatives" {
            let tolerance = tolerances.entry(of_naive.name).or_default();
            *tolerance = tolerance.max(TIMES_NAIVE * of_naive.error);
        }
    }
    tolerances
}

fn worst_element(golden: &Golden, name: &'static str, found: &Tensor, expected: &Tensor, tolerance: f64) -> Comparison {
    let least = 1e-7 / golden.problem.loss.temperature;
    let whole = largest(&expected.values).max(least);
    let row_len = if name.starts_with("d_") && name != "d_temperature" { golden.problem.dim } else { 1 };
    let mut worst = Comparison { name, error: 0.0, at: 0, found: f64::NAN, expected: f64::NAN, tolerance };
    for (row, expected) in expected.values.chunks(row_len).enumerate() {
        let scale = if matches!(name, "lse" | "positive") { whole } else { largest(expected).max(least) };
        for (column, &expected) in expected.iter().enumerate() {
            let at = row * row_len + column;
            // A result that was not computed is as wrong as can be.
            let found = found.values.get(at).copied().unwrap_or(f64::NAN);
            let error = error(found, expected, scale);
            if at == 0 || error > worst.error {
                worst = Comparison { error, at, found, expected, ..worst };
            }
        }
    }
    worst
}

fn error(found: f64, expected: f64, scale: f64) -> f64 {
    if found == expected || (found.is_nan() && expected.is_nan()) {
        return 0.0;
    }
    let error = (found - expected).abs() / scale;
    if error.is_nan() { f64::INFINITY } else { error }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().filter(|v| v.is_finite()).fold(0.0, |max, v| max.max(v.abs()))
}

/// A backend's output under the names of [`RESULTS`].
pub fn results<T: Real>(output: &Output<T>) -> Results {
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
        ("d_candidates", gradients.d_candidates.first()),
        ("d_positive_embeddings", gradients.d_positive_embeddings.as_ref()),
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

/// The naive baseline's results under the names of [`RESULTS`], in the shapes that errors need.
fn naive_results(problem: &Problem, operands: DType) -> Results {
    let symmetric = problem.loss.symmetric;
    let found = if symmetric { symmetric_naive(problem, operands) } else { naive_rounded(problem, true, operands) };
    let widened = |values: Vec<f32>| vector(values.into_iter().map(f64::from).collect(), Dtype::F32);
    Results::from([
        ("loss", widened(found.loss)),
        ("total", widened(vec![found.total])),
        ("lse", widened(found.lse)),
        ("positive", widened(found.positive)),
        ("num_negatives", vector(found.num_negatives.iter().map(|&n| n as f64).collect(), Dtype::I64)),
        ("d_queries", widened(found.d_queries)),
        ("d_candidates", widened(found.d_candidates)),
        ("d_positive_embeddings", widened(found.d_positive_embeddings)),
        ("d_temperature", widened(vec![found.d_temperature])),
    ])
}

/// The mean of the naive loss in both directions. The batch is valid: each candidate is one query's positive.
fn symmetric_naive(problem: &Problem, operands: DType) -> Naive {
    let PositiveData::Index(positives) = &problem.positives else { unreachable!("checked by the backend") };
    let (mut out, other) = (naive_rounded(problem, true, operands), naive_rounded(&problem.swapped(), true, operands));
    for (loss, &positive) in out.loss.iter_mut().zip(positives) {
        *loss = 0.5 * (*loss + other.loss[positive as usize]);
    }
    let average = |a: &mut [f32], b: &[f32]| a.iter_mut().zip(b).for_each(|(a, b)| *a = 0.5 * (*a + b));
    average(&mut out.d_queries, &other.d_candidates);
    average(&mut out.d_candidates, &other.d_queries);
    out.total = 0.5 * (out.total + other.total);
    out.d_temperature = 0.5 * (out.d_temperature + other.d_temperature);
    out
}
