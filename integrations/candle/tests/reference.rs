//! Losses and gradients against the float64 reference, element by element.
//!
//! The tolerance is the error of an honest baseline: twice the largest error that the same loss has when it is composed
//! of candle's operators in f32. Results in f16 and bf16 may also be off by the rounding to their type.

mod common;

use candle_core::{DType, Result};
use catalog_softmax_candle::{Correction, Options, Reduction, Similarity, softmax_loss};
use common::{PARTS, Problem, Step, Variables, composed, numbers, random, reference};

/// Each option once at least, in losses that people train.
fn problems() -> Vec<Problem> {
    let log_q = |seed, count| numbers(&mut random(seed), count, -6.0, -1.0);
    let ids = |count: usize, different: u32| (0..count as u32).map(|j| (j * 7) % different).collect::<Vec<u32>>();
    let rows = |seed, count| Problem::new("", seed, count, 1).queries;
    let in_batch = Problem::new("in-batch", 1, 17, 17);
    let index = Problem { positives: vec![3, 0, 39, 12, 3, 20, 7], ..Problem::new("full softmax", 2, 7, 40) };
    let separate = Problem {
        name: "sampled, positives apart",
        positive_embeddings: rows(30, 9),
        positive_ids: (0..9).collect(),
        positive_log_q: log_q(31, 9),
        candidate_ids: ids(33, 20),
        log_q: log_q(32, 33),
        correction: Correction::LogQ,
        ..Problem::new("", 3, 9, 33)
    };
    let several = Problem {
        name: "several positives",
        positives: vec![1, 2, 30, 4, 4, 5],
        positive_offsets: vec![0, 2, 3, 3, 6],
        ..Problem::new("", 4, 4, 31)
    };
    vec![
        Problem {
            name: "in-batch with logQ, accidental hits and exclusions",
            candidate_ids: ids(17, 11),
            log_q: log_q(10, 17),
            correction: Correction::LogQ,
            excluded: Some(((0..=17).map(|i| (i / 2) * 2).collect(), (0..16).map(|i| i % 11).collect())),
            ..in_batch.clone()
        },
        Problem { name: "more candidates than queries", ..Problem::new("", 5, 5, 23) },
        index.clone(),
        Problem { name: "dot", similarity: Similarity::Dot, temperature: 1.5, ..index.clone() },
        Problem {
            name: "weighted mean, logQ of negatives alone",
            row_weight: vec![1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0],
            reduction: Reduction::WeightedMean,
            log_q: log_q(11, 40),
            correction: Correction::LogQNegativesOnly,
            ..index.clone()
        },
        Problem {
            name: "sum, corrected logQ",
            reduction: Reduction::Sum,
            log_q: log_q(12, 40),
            correction: Correction::CorrectedLogQ,
            ..index.clone()
        },
        Problem {
            name: "no reduction",
            reduction: Reduction::None,
            row_weight: vec![1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0],
            ..index
        },
        Problem { name: "corrected, positives apart", correction: Correction::CorrectedLogQ, ..separate.clone() },
        separate,
        Problem { name: "symmetric", symmetric: true, candidate_ids: ids(17, 11), ..in_batch.clone() },
        Problem {
            name: "symmetric, permuted",
            symmetric: true,
            positives: (0..17).map(|i| (i * 5) % 17).collect(),
            row_weight: numbers(&mut random(13), 17, 0.0, 2.0),
            candidate_ids: ids(17, 11),
            ..in_batch
        },
        Problem {
            name: "several positives with weights",
            positive_weight: vec![0.5, 1.0, 0.0, 2.0, 1.0, 1.0],
            reduction: Reduction::Sum,
            ..several.clone()
        },
        Problem { name: "several positives, no reduction", reduction: Reduction::None, ..several.clone() },
        several,
    ]
}

fn ours(problem: &Problem, dtype: DType, upstream: &[f32]) -> Result<Step> {
    let variables = Variables::new(problem, dtype, DType::F64)?;
    let positive_embeddings = variables.positive_embeddings.as_ref().map(|var| var.as_tensor().clone());
    let options =
        Options { temperature: variables.temperature.as_tensor().into(), positive_embeddings, ..problem.options()? };
    let loss = softmax_loss(&variables.queries, &variables.candidates, &options)?;
    assert_eq!(loss.dtype(), DType::F32);
    Step::of(&loss, &variables, upstream)
}

fn of_candle(problem: &Problem, dtype: DType, upstream: &[f32]) -> Result<Step> {
    let variables = Variables::new(problem, dtype, dtype)?;
    Step::of(&composed::loss(problem, &variables)?, &variables, upstream)
}

/// Derivatives by each row, in eighths: times a weight of the row, they are exact.
fn upstream_of(problem: &Problem) -> Vec<f32> {
    numbers(&mut random(7), problem.b(), 1.0, 16.0).into_iter().map(|x| x.round() / 8.0).collect()
}

fn largest_error(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

fn check(problem: &Problem, dtype: DType, baseline: &Step) {
    let upstream = upstream_of(problem);
    let (truth, found) = (reference(problem, dtype, &upstream), ours(problem, dtype, &upstream).unwrap());
    let exact = reference(problem, DType::F32, &upstream);
    // Half a unit in the last place of the gradients' type, and half of the smallest number.
    let (relative, smallest) = match dtype {
        DType::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DType::BF16 => (2f64.powi(-8), 0.0),
        _ => (2f64.powi(-24), 0.0),
    };
    for (part, name) in PARTS.into_iter().enumerate() {
        let (truth, found) = (truth.parts()[part], found.parts()[part]);
        let allowed = 2.0 * largest_error(baseline.parts()[part], exact.parts()[part]);
        assert_eq!(truth.len(), found.len());
        let largest = truth.iter().fold(0f64, |largest, x| largest.max(x.abs()));
        for (at, (&found, &truth)) in found.iter().zip(truth).enumerate() {
            // The two directions of a symmetric loss are rounded each, and their sum is: none is larger than twice the largest.
            let rounded = if problem.symmetric && part > 0 { 5.0 * largest } else { truth.abs() };
            let limit = allowed + relative * rounded + smallest;
            let error = (found - truth).abs();
            assert!(
                error <= limit,
                "{}, {dtype:?}: {name}[{at}] is {found}, not {truth}: {error:e} > {limit:e}",
                problem.name
            );
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_the_reference() {
    for problem in problems() {
        let upstream = upstream_of(&problem);
        let baseline = of_candle(&problem, DType::F32, &upstream).unwrap();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            check(&problem, dtype, &baseline);
        }
    }
}

/// Both say the same in float64, so the truth of the test above is that of an independent program.
#[test]
fn the_reference_and_candle_in_float64_agree() {
    for problem in problems() {
        let upstream = upstream_of(&problem);
        let (a, b) = (reference(&problem, DType::F32, &upstream), of_candle(&problem, DType::F64, &upstream).unwrap());
        for (part, name) in PARTS.into_iter().enumerate() {
            let error = largest_error(a.parts()[part], b.parts()[part]);
            assert!(
                error < 1e-12 * (1.0 + a.parts()[part].iter().fold(0f64, |m, x| m.max(x.abs()))),
                "{}: {name} {error:e}",
                problem.name
            );
        }
    }
}

/// The filter's mask depends on the scores, so the baseline is that of the loss without it.
#[test]
fn the_filter_of_false_negatives_is_the_cores() {
    let problem = Problem { positives: vec![3, 0, 39, 12, 3, 20, 7], ..Problem::new("margin", 2, 7, 40) };
    let upstream = vec![1.0; 7];
    let baseline = of_candle(&problem, DType::F32, &upstream).unwrap();
    let filtered = Problem { margin: Some(0.5), ..problem.clone() };
    check(&filtered, DType::F32, &baseline);
    let (with, without) =
        (ours(&filtered, DType::F32, &upstream).unwrap(), ours(&problem, DType::F32, &upstream).unwrap());
    assert!(with.loss[0] < without.loss[0]);
}
