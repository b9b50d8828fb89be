//! The loss by its formulas, in float64: similarities, scores, masks, log-sum-exp, margins. Shares nothing with the
//! crate.

use catalog_softmax::{Correction, Reduction, Similarity};
use rayon::prelude::*;

use super::naive::mask;
use super::problem::{PositiveData, Problem};

/// Unit vectors (or the vectors, under `Dot`) in float64, their lengths, and the inverse by which gradients are scaled.
/// A row that is not finite has length 0: what depends on it is not finite, and a scale for the rest has no use for it.
pub struct Sides {
    pub values: Vec<f64>,
    pub length: Vec<f64>,
    pub inverse: Vec<f64>,
}

pub fn sides(x: &[f32], d: usize, similarity: Similarity) -> Sides {
    let mut sides = Sides { values: Vec::new(), length: Vec::new(), inverse: Vec::new() };
    for row in x.chunks(d) {
        let row: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        let inverse = match similarity {
            Similarity::Dot => 1.0,
            Similarity::Cosine if norm < 1e-12 => 0.0,
            Similarity::Cosine => 1.0 / norm,
            other => panic!("no formula for {other:?}"),
        };
        sides.values.extend(row.iter().map(|v| v * inverse));
        sides.length.push(if norm.is_finite() { norm * inverse } else { 0.0 });
        sides.inverse.push(if norm.is_finite() { inverse } else { 0.0 });
    }
    sides
}

/// log_q of all candidates, pool after pool; empty where the batch has none.
pub fn log_q(problem: &Problem) -> Vec<f32> {
    problem.pools.iter().flat_map(|pool| pool.log_q.clone().unwrap_or_default()).collect()
}

/// The adjusted scores (B, N) of a problem in float64, −∞ where masked; number of negatives.
pub fn scores(problem: &Problem) -> (Vec<f64>, Vec<u64>) {
    let (n, d) = (problem.num_candidates(), problem.dim);
    let similarity = problem.loss.similarity;
    let (q, c) =
        (sides(&problem.queries.to_f32(), d, similarity).values, sides(&problem.candidates(), d, similarity).values);
    let log_q = log_q(problem);
    let mut z = vec![0.0; problem.num_queries() * n];
    z.par_chunks_mut(n).zip(q.par_chunks(d)).for_each(|(z, q)| {
        for (j, (z, c)) in z.iter_mut().zip(c.chunks(d)).enumerate() {
            let sim = dot(q, c);
            *z = sim / problem.loss.temperature - log_q.get(j).map_or(0.0, |&log_q| f64::from(log_q));
        }
    });
    let num_negatives = mask(problem, &mut z, n, f64::NEG_INFINITY);
    (z, num_negatives)
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a8, a_rest), (b8, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut lanes = [0.0; 8];
    for (a, b) in a8.iter().zip(b8) {
        for k in 0..8 {
            lanes[k] += a[k] * b[k];
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// A row's loss by the formulas.
pub struct Row {
    pub lse: f64,
    pub margin: f64,
    /// The derivative of the loss by lse.
    pub a: f64,
    pub loss: f64,
    /// What a cross-entropy rounds in place of `a`; 0 where there is nothing to round.
    pub rest: f64,
}

impl Row {
    /// `z` are the row's scores, `log_q` the candidates'.
    pub fn new(problem: &Problem, row: usize, z: &[f64], positive: f64, negatives: u64, log_q: &[f32]) -> Row {
        let max = z.iter().fold(f64::NEG_INFINITY, |max, &z| max.max(z));
        let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        let margin = lse + shift(problem, row, log_q) - positive;
        if negatives == 0 {
            return Row { lse, margin: f64::NEG_INFINITY, a: 0.0, loss: 0.0, rest: 0.0 };
        }
        let (a, loss) = match problem.loss.correction {
            Correction::CorrectedLogQ => {
                let a = sigmoid(margin - (negatives as f64).ln());
                (a, a * margin)
            }
            _ => (sigmoid(margin), margin.max(0.0) + (-margin.abs()).exp().ln_1p()),
        };
        Row { lse, margin, a, loss, rest: 1.0 - a }
    }
}

/// What multiplies each row's loss in the total.
pub fn weights(problem: &Problem) -> Vec<f64> {
    let b = problem.num_queries();
    let weight = |i: usize| problem.row_weight.as_ref().map_or(1.0, |w| f64::from(w[i]));
    let upstream = match problem.loss.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean => 1.0 / b as f64,
        Reduction::WeightedMean => 1.0 / (0..b).map(weight).sum::<f64>(),
        other => panic!("no formula for {other:?}"),
    };
    (0..b).map(|i| weight(i) * upstream).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn shift(problem: &Problem, row: usize, log_q: &[f32]) -> f64 {
    let positive_log_q = || match (&problem.positives, &problem.positive_log_q) {
        (PositiveData::Separate(_), Some(log_q)) => f64::from(log_q[row]),
        (PositiveData::Index(index), _) => f64::from(log_q[index[row] as usize]),
        (PositiveData::Separate(_), None) => panic!("this loss needs positive_log_q"),
    };
    match problem.loss.correction {
        Correction::None | Correction::LogQNegativesOnly => 0.0,
        Correction::LogQ => positive_log_q(),
        Correction::CorrectedLogQ => (-positive_log_q().exp()).ln_1p(),
        other => panic!("no formula for {other:?}"),
    }
}
