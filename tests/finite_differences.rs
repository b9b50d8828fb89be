//! The reference's gradients against central differences of its loss, in float64.
//!
//! Inputs are `f32`: each is moved by a power of two and the difference that was represented is divided by. The error
//! of a central difference is O(step²) and that of the loss 1e-15, so they agree to about 1e-6 of the tensor's size.

use catalog_softmax::{Backend, Correction, Loss, Reduction, Reference, Similarity, TableGradient};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::generate_tables::{CORRECTIONS, PoolKind, PositiveKind, REDUCTIONS, TableConfig};
use catalog_softmax_testing::problem::{PositiveData, Problem, Storage};

/// The total, with each row's coefficient held where the loss stops its gradient.
fn total(problem: &Problem, weights: Option<&[f64]>) -> f64 {
    let output = Reference::new().value(&problem.batch().expect("a valid problem"), &problem.loss).expect("fits");
    let Some(weights) = weights else { return output.total };
    let loss = output.loss.iter().zip(&output.probability).zip(weights);
    // Corrected logQ is w·m with w = 1 − P(positive) a constant of the step.
    let margin = |loss: f64, now: f64| if now == 0.0 { 0.0 } else { loss / now };
    let scaled = loss.map(|((loss, probability), w)| margin(*loss, 1.0 - probability) * w);
    let weight = |row: usize| problem.row_weight.as_ref().map_or(1.0, |w| f64::from(w[row]));
    let b = problem.num_queries();
    let sum: f64 = scaled.enumerate().map(|(row, loss)| weight(row) * loss).sum();
    match problem.loss.reduction {
        Reduction::None | Reduction::Sum => sum,
        Reduction::Mean => sum / b as f64,
        Reduction::WeightedMean => sum / (0..b).map(weight).sum::<f64>(),
        other => panic!("no formula for {other:?}"),
    }
}

/// Central differences by each element of what `access` returns.
fn differences(problem: &Problem, weights: Option<&[f64]>, access: impl Fn(&mut Problem) -> &mut Storage) -> Vec<f64> {
    let step = 2f32.powi(-10);
    let mut moved = problem.clone();
    let count = access(&mut moved).len();
    let mut slopes = Vec::new();
    for k in 0..count {
        let mut at = |delta: f32| {
            let Storage::F32(values) = access(&mut moved) else { panic!("f32") };
            let before = values[k];
            values[k] = before + delta;
            let represented = f64::from(values[k]);
            let loss = total(&moved, weights);
            let Storage::F32(values) = access(&mut moved) else { panic!("f32") };
            values[k] = before;
            (represented, loss)
        };
        let ((x1, y1), (x0, y0)) = (at(step), at(-step));
        slopes.push((y1 - y0) / (x1 - x0));
    }
    slopes
}

fn near(what: &str, slopes: &[f64], gradient: &[f64], size: f64) {
    assert_eq!(slopes.len(), gradient.len(), "{what}");
    for (k, (slope, d)) in slopes.iter().zip(gradient).enumerate() {
        assert!((slope - d).abs() < 2e-5 * size, "{what}[{k}]: {slope} by differences, {d} by the formula");
    }
}

fn check(config: &Config) {
    check_problem(config.problem(), &format!("{config:?}"));
}

fn check_problem(mut problem: Problem, what: &str) {
    // Lengths of at least 0.3, so that a step is small beside them.
    let lengthen = |storage: &mut Storage| {
        *storage = storage.map(|values| values.iter_mut().for_each(|x| *x += 0.3f32.copysign(*x)));
    };
    lengthen(&mut problem.queries);
    problem.pools.iter_mut().for_each(|pool| lengthen(&mut pool.candidates));
    if let Some(table) = &mut problem.table {
        lengthen(&mut table.embeddings);
    }
    let batch = problem.batch().expect("a valid problem");
    let (output, gradients) = Reference::new().value_and_grad(&batch, &problem.loss).expect("fits");
    let weights: Option<Vec<f64>> = (problem.loss.correction == Correction::CorrectedLogQ)
        .then(|| output.probability.iter().map(|p| 1.0 - p).collect());
    let weights = weights.as_deref();

    let size = gradients.d_queries.values.iter().fold(0.0f64, |max, d| max.max(d.abs()));
    assert!(size > 1e-2, "{what}: a case for the test");
    near(what, &differences(&problem, weights, |p| &mut p.queries), &gradients.d_queries.values, size);
    for pool in (0..problem.pools.len()).filter(|&pool| problem.pools[pool].rows.is_none()) {
        let slopes = differences(&problem, weights, |p| &mut p.pools[pool].candidates);
        near(what, &slopes, &gradients.d_candidates[pool].values, size);
    }
    if problem.table.is_some() {
        let slopes = differences(&problem, weights, |p| &mut p.table.as_mut().expect("it has one").embeddings);
        let d = gradients.d_table.as_ref().and_then(TableGradient::dense).expect("a table has a gradient");
        near(what, &slopes, &d.values, size);
    }
    assert_eq!(gradients.d_positive_embeddings.is_some(), matches!(problem.positives, PositiveData::Separate(_)));
    if let Some(d) = &gradients.d_positive_embeddings {
        let slopes = differences(&problem, weights, |p| match &mut p.positives {
            PositiveData::Separate(embeddings) => embeddings,
            PositiveData::Index(_) => panic!("separate"),
        });
        near(what, &slopes, &d.values, size);
    }

    let tau = problem.loss.temperature;
    let mut at = |temperature: f64| {
        problem.loss.temperature = temperature;
        total(&problem, weights)
    };
    let step = 1e-4 * tau;
    let slope = (at(tau + step) - at(tau - step)) / (2.0 * step);
    assert!((slope / gradients.d_temperature - 1.0).abs() < 1e-5, "{what}: {slope} by temperature");
    let log_step = 1e-4f64;
    let slope = (at(tau * log_step.exp()) - at(tau * (-log_step).exp())) / (2.0 * log_step);
    assert!((slope / gradients.d_log_temperature - 1.0).abs() < 1e-5, "{what}: {slope} by log temperature");
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let mut seed = 0;
    for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            for separate in [false, true] {
                for reduction in [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean] {
                    seed += 1;
                    check(&Config {
                        pools: vec![6, 3],
                        similarity,
                        temperature: 0.7,
                        correction,
                        separate,
                        reduction,
                        masking: [Masking::None, Masking::Ids, Masking::Excluded][seed % 3],
                        weights: seed % 2 == 0,
                        seed: seed as u64,
                        ..Config::new(5, 1, 4)
                    });
                }
            }
        }
    }
}

#[test]
fn gradients_of_symmetric_losses_are_slopes_too() {
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        for reduction in [Reduction::Mean, Reduction::Sum, Reduction::WeightedMean] {
            for masking in [Masking::None, Masking::Ids] {
                let config = Config { similarity, temperature: 0.7, reduction, masking, ..Config::new(6, 6, 4) };
                check(&Config { symmetric: true, weights: true, seed: 4, ..config });
            }
        }
    }
}

#[test]
fn gradients_by_a_table_are_slopes_too() {
    let pools = [(vec![PoolKind::Rows(5)], 3), (vec![], 4), (vec![PoolKind::WholeTable, PoolKind::Own(3)], 0)];
    let mut seed = 0;
    for (pools, per_row) in &pools {
        for positives in
            [PositiveKind::One, PositiveKind::Several, PositiveKind::Separate, PositiveKind::SeveralSeparate]
        {
            for correction in CORRECTIONS {
                let several = matches!(positives, PositiveKind::Several | PositiveKind::SeveralSeparate);
                if several && correction == Correction::CorrectedLogQ {
                    // Held weights of rows with several positives are not told by the rows' losses.
                    continue;
                }
                seed += 1;
                let config = TableConfig {
                    similarity: if seed % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                    temperature: 0.7,
                    correction,
                    reduction: REDUCTIONS[seed % 4],
                    pools: pools.clone(),
                    per_row: *per_row,
                    positives,
                    positive_weight: seed % 3 == 0,
                    excluded: seed % 5 == 0,
                    ids: seed % 7 < 3,
                    weights: true,
                    seed: seed as u64,
                    ..TableConfig::new(5, 9, 4)
                };
                // A filter's bound is a constant of the step: far above the scores, it is one for the differences, too.
                let mut problem = config.problem();
                problem.loss = problem.loss.false_negative_margin(50.0);
                check_problem(problem, &format!("{config:?}"));
            }
        }
    }
}

#[test]
fn the_formulas_by_hand() {
    // One query, its positive, two negatives, at temperature 1/2: s = (2, 0, 1).
    let (query, items) = (vec![1.0f32, 0.0], vec![1.0f32, 5.0, 0.0, 1.0, 0.5, -3.0]);
    let batch = catalog_softmax::Batch::in_batch(
        catalog_softmax::Embeddings::new(&query, 1, 2),
        catalog_softmax::Embeddings::new(&items, 3, 2),
    );
    let batch = batch.build().expect("a valid batch");
    let loss = Loss::softmax(Similarity::Dot, 0.5);
    let (output, g) = Reference::new().value_and_grad(&batch, &loss).expect("fits");
    let (negatives, all) = (1.0 + 1f64.exp(), 1.0 + 1f64.exp() + 2f64.exp());
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-14, "{a} != {b}");
    close(output.statistics.lse[0], negatives.ln());
    close(output.statistics.positive[0], 2.0);
    close(output.total, all.ln() - 2.0);
    close(output.probability[0], 2f64.exp() / all);
    // (E[c] − c₊) / τ
    close(g.d_queries.values[0], ((2f64.exp() + 0.5 * 1f64.exp()) / all - 1.0) / 0.5);
    close(g.d_queries.values[1], ((5.0 * 2f64.exp() + 1.0 - 3.0 * 1f64.exp()) / all - 5.0) / 0.5);
    close(g.d_candidates[0].values[4], 1f64.exp() / all / 0.5);
    // −γ² (E[sim] − sim₊)
    close(g.d_temperature, -4.0 * ((2f64.exp() + 0.5 * 1f64.exp()) / all - 1.0));
}
