//! Properties at the ends of the range: scores of 1e8, negatives far below the largest, rows of any length.

use catalog_softmax::{DType, Reduction, Request, Similarity};

use super::*;
use crate::formulas::scores;
use crate::generate::{Config, rng, rows};
use crate::problem::{PositiveData, Problem, Storage};
use crate::step::Step;
use crate::tolerance::{Expected, FACTOR, Tensor, epsilon, reference, tensors};

/// Element types and widths: on the device those of every family of kernels.
fn types_and_widths() -> impl Iterator<Item = (DType, usize)> {
    [DType::F32, DType::Bf16, DType::F16].into_iter().flat_map(|dtype| [32, 264].map(|dim| (dtype, dim)))
}

fn largest(values: impl Iterator<Item = f64>) -> f64 {
    values.filter(|z| z.is_finite()).fold(0.0, |max, z| max.max(z.abs()))
}

/// At scores of 1e8 one unit of f32's last place is 8: a pass that rounds a score otherwise than its row's lse is off
/// by a factor of 2^8 and more. Where the largest score stands out from the others, its probability is 1 in any
/// rounding, and each of two equal ones has 1/2.
pub fn gradients_of_scores_of_a_hundred_million(backend: Subject<'_>, operands: Operands) {
    for (dtype, dim) in types_and_widths() {
        for seed in 0..4 {
            let problem = huge_scores(dtype, dim, seed);
            let found = compute(backend, &problem, Request::value_and_grad());
            check_candidates(&problem, &found, operands(dtype)).unwrap_or_else(|error| {
                panic!("{error}\nin {dtype:?}, {dim} elements, seed {seed}");
            });
        }
    }
}

/// Rows whose largest score or positive are nearer to another than rounding have no weight.
fn huge_scores(dtype: DType, dim: usize, seed: u64) -> Problem {
    let (b, n) = (140, 70);
    let config = Config { dtype, similarity: Similarity::Dot, separate: true, seed, ..Config::new(b, n, dim) };
    let mut problem = Config { reduction: Reduction::Sum, ..config }.problem();
    // Candidates 3 and 40 are one, and the largest of many rows.
    problem.pools[0].candidates = problem.pools[0].candidates.map(|values| {
        values[3 * dim..4 * dim].iter_mut().for_each(|x| *x *= 16.0);
        values.copy_within(3 * dim..4 * dim, 40 * dim);
    });
    problem.loss.temperature *= largest(scores(&problem).0.into_iter()) / 1e8;
    let (z, _) = scores(&problem);
    let positive = reference(&problem).output.statistics.positive;
    let stands_out = |(z, positive): (&[f64], &f64)| {
        let max = z.iter().fold(f64::MIN, |max, &z| max.max(z));
        z.iter().all(|&z| z == max || z < max - 1e5) && (positive - max).abs() > 1e5
    };
    let weights: Vec<f32> = z.chunks(n).zip(&positive).map(|row| if stands_out(row) { 1.0 } else { 0.0 }).collect();
    assert!(weights.iter().sum::<f32>() > 0.8 * b as f32, "a case for the test");
    assert!(
        z.chunks(n).any(|z| z[3] == z[40] && z.iter().all(|&z_j| z_j <= z[3])),
        "a case for the test: equal scores"
    );
    problem.row_weight = Some(weights);
    problem
}

/// Each candidate's gradient is near the reference's in units of the coefficients' rounding: the length of what it is a
/// sum of.
fn check_candidates(problem: &Problem, found: &Step, operands: DType) -> Result<(), String> {
    let (wanted, d, n) = (reference(problem), problem.dim, problem.num_candidates());
    let batch = problem.batch().expect("a valid problem");
    let d_lse = problem.loss.epilogue(&batch, &wanted.statistics).expect("a loss that fits").d_lse;
    let (z, _) = scores(problem);
    let mut sizes = vec![0.0; n];
    for (i, q) in problem.queries.to_f32().chunks(d).enumerate() {
        let length = q.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        for (j, size) in sizes.iter_mut().enumerate() {
            let p = (z[i * n + j] - wanted.statistics.lse[i]).exp();
            *size += d_lse[i].abs() * p * length / problem.loss.temperature;
        }
    }
    let wanted = &wanted.gradients.as_ref().expect("asked for").d_candidates[0];
    for (j, size) in sizes.iter().enumerate() {
        for (k, (&found, &wanted)) in gradients(found).d_candidates[0].row(j).iter().zip(wanted.row(j)).enumerate() {
            let error = (f64::from(found) - wanted).abs();
            if error.is_nan() || error > FACTOR * epsilon(operands) * size {
                return Err(format!(
                    "candidate {j}, element {k}: {found:e} for {wanted:e}, a sum of terms of {size:e}"
                ));
            }
        }
    }
    Ok(())
}

/// Many rows at a probability of 2^-25 to 2^-27 of the largest have an element in common that the largest has not: of
/// expected negatives and gradients it is the whole, and must not depend on how probabilities are rounded.
pub fn far_rows_keep_their_share(backend: Subject<'_>, operands: Operands) {
    for (dtype, dim) in types_and_widths() {
        for gap in [17.5, 19.0] {
            let near = |found: f32, wanted: f64, what: &str| {
                let error = (f64::from(found) / wanted - 1.0).abs();
                // A score has an error of its own, which exponentiation makes a relative one.
                let tolerance = FACTOR * (epsilon(operands(dtype)) + epsilon(DType::F32) * f64::from(gap));
                assert!(error <= tolerance, "{what}, {dtype:?}, {dim} elements, {gap} below: {found:e} for {wanted:e}");
            };
            let problem = far_candidates(dtype, dim, gap);
            let (found, wanted) = (compute(backend, &problem, Request::value_and_grad()), reference(&problem));
            let o = |output: &Step| output.statistics.expected_negative.as_ref().expect("asked for").row(0)[2];
            let wanted_o = wanted.statistics.expected_negative.as_ref().expect("asked for").row(0)[2];
            near(o(&found), wanted_o, "expected negative");
            let wanted_d = wanted.gradients.as_ref().expect("asked for").d_queries.row(0)[2];
            near(gradients(&found).d_queries.row(0)[2], wanted_d, "d_queries");

            let problem = far_queries(dtype, dim, gap);
            let (found, wanted) = (compute(backend, &problem, Request::value_and_grad()), reference(&problem));
            let wanted_d = wanted.gradients.as_ref().expect("asked for").d_candidates[0].row(0)[2];
            near(gradients(&found).d_candidates[0].row(0)[2], wanted_d, "d_candidates");
        }
    }
}

/// Of a bulk: several tiles of any backend.
const FAR_ROWS: usize = 1000;

/// Rows of a bulk: `scale` along axis 1, 0.8 along axis 2, small elements behind.
fn bulk(count: usize, dim: usize, scale: f32) -> Vec<f32> {
    let mut values = rows(&mut rng(11), count, dim, 0.05);
    for row in values.chunks_mut(dim) {
        row[..3].copy_from_slice(&[0.0, scale, 0.8]);
    }
    values
}

fn dot_problem(dtype: DType, dim: usize, queries: &[f32], candidates: &[f32]) -> Problem {
    let (b, n) = (queries.len() / dim, candidates.len() / dim);
    let config =
        Config { dtype, similarity: Similarity::Dot, temperature: 1.0, separate: true, ..Config::new(b, n, dim) };
    let mut problem = Config { reduction: Reduction::Sum, ..config }.problem();
    problem.queries = Storage::new(queries, dtype);
    problem.pools[0].candidates = Storage::new(candidates, dtype);
    // Score 0 with every query.
    problem.positives = PositiveData::Separate(Storage::new(&vec![0.0; b * dim], dtype));
    problem
}

/// One query, whose candidate 5 has the score `gap`; the others' are 0.
fn far_candidates(dtype: DType, dim: usize, gap: f32) -> Problem {
    let mut candidates = bulk(FAR_ROWS, dim, 0.0);
    let mut query = vec![0.0; dim];
    query[0] = 1.0;
    candidates[5 * dim..6 * dim].fill(0.0);
    candidates[5 * dim] = gap;
    dot_problem(dtype, dim, &query, &candidates)
}

/// Two candidates along two axes. Query 5 has the first for its largest, the others the second by `gap`.
fn far_queries(dtype: DType, dim: usize, gap: f32) -> Problem {
    let mut queries = bulk(FAR_ROWS, dim, gap);
    queries[5 * dim..6 * dim].fill(0.0);
    queries[5 * dim] = 40.0;
    let mut candidates = vec![0.0; 2 * dim];
    (candidates[0], candidates[dim + 1]) = (1.0, 1.0);
    dot_problem(dtype, dim, &queries, &candidates)
}

/// What rows are multiplied by, of which cosines do not depend; `longest` is to be a power of two. Gradients are
/// divided by it.
pub fn lengths_do_not_matter(backend: Subject<'_>, operands: Operands, dtype: DType, longest: f32) {
    for separate in [false, true] {
        let config = Config { separate, dtype, temperature: 0.2, ..Config::new(17, 280, 16) };
        let problem = config.problem();
        let mut expected = Expected::new(&problem, operands(dtype));
        let one = tensors(&everything(backend, &problem));
        let factor = |row: usize| [1.0, longest, 0.25, 2f32.powi(-20), longest / 8.0][row % 5];
        let scale = |values: &mut Vec<f32>| {
            values.chunks_mut(16).enumerate().for_each(|(row, x)| x.iter_mut().for_each(|x| *x *= factor(row)));
        };
        let mut scaled = problem.clone();
        scaled.queries = problem.queries.map(scale);
        scaled.pools[0].candidates = problem.pools[0].candidates.map(scale);
        if let PositiveData::Separate(embeddings) = &mut scaled.positives {
            *embeddings = embeddings.map(scale);
        }
        let mut two = tensors(&everything(backend, &scaled));
        for Tensor { name, values, .. } in &mut two {
            if ["d_queries", "d_candidates[0]", "d_positive_embeddings"].contains(&name.as_str()) {
                values.iter_mut().enumerate().for_each(|(at, d)| *d *= f64::from(factor(at / 16)));
                // Divided by so large a length, gradients come near f32's least number.
                let at =
                    expected.tensors.iter().position(|tensor| tensor.name == *name).expect("a tensor of that name");
                let rows = expected.tolerances[at].iter_mut().enumerate();
                rows.for_each(|(row, tolerance)| *tolerance += 2f64.powi(-149) * f64::from(factor(row)));
            }
        }
        same(&expected, &one, &two, &format!("lengths of {longest:e}, {dtype:?}"));
    }
}

/// As long as every backend takes rows.
pub fn long_rows_change_nothing_under_cosine(backend: Subject<'_>, operands: Operands) {
    for dtype in [DType::F32, DType::Bf16] {
        lengths_do_not_matter(backend, operands, dtype, 2f32.powi(59));
    }
}

pub fn scores_of_several_hundred(backend: Subject<'_>, operands: Operands) {
    for (size, tau) in [(30.0f32, 1.0), (3.0, 0.02), (120.0, 4.0)] {
        for separate in [false, true] {
            let config = Config { similarity: Similarity::Dot, temperature: tau, separate, ..Config::new(40, 300, 16) };
            let mut problem = config.problem();
            let grow = |values: &mut Vec<f32>| values.iter_mut().for_each(|x| *x *= size);
            problem.queries = problem.queries.map(grow);
            let (z, _) = scores(&problem);
            let largest = z.iter().filter(|z| z.is_finite()).fold(0.0f64, |max, z| max.max(z.abs()));
            assert!(largest > 150.0, "a case for the test: {largest}");
            let output = everything(backend, &problem);
            Expected::new(&problem, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

pub fn both_passes_have_the_same_probabilities(backend: Subject<'_>, _: Operands) {
    // Σ_j ∂L/∂c_j = γ a q under `Dot` with a separate positive: the stream back's probabilities sum to 1 by the stream's
    // lse, however coarse f32 is where scores are some hundreds: a rounded lse would be off by 1e-5.
    for (seed, offset) in [300.0f32, 500.3, 777.7, 903.1].into_iter().enumerate() {
        let config = Config { similarity: Similarity::Dot, temperature: 1.0, separate: true, ..Config::new(1, 400, 8) };
        let mut problem = Config { reduction: Reduction::Sum, seed: seed as u64, ..config }.problem();
        let queries = problem.queries.to_f32();
        let length: f32 = queries.iter().map(|q| q * q).sum();
        let far = |values: &mut Vec<f32>| {
            values
                .chunks_mut(8)
                .for_each(|row| row.iter_mut().zip(&queries).for_each(|(c, q)| *c += q * offset / length));
        };
        problem.pools[0].candidates = problem.pools[0].candidates.map(far);
        let output = everything(backend, &problem);
        assert!(output.statistics.lse[0] > 250.0, "a case for the test");
        let a = 1.0 - output.probability[0];
        let d = &gradients(&output).d_candidates[0];
        for (k, &q) in queries.iter().enumerate() {
            let sum: f64 = (0..400).map(|j| f64::from(d.row(j)[k])).sum();
            let expected = a * f64::from(q);
            assert!((sum / expected - 1.0).abs() < 2e-6, "scores of {offset}, element {k}: {sum} != {expected}");
        }
    }
}

pub fn a_small_temperature(backend: Subject<'_>, operands: Operands) {
    for temperature in [0.01, 1e-3, 1e-5] {
        for correction in [Correction::None, Correction::LogQ, Correction::CorrectedLogQ] {
            let config = Config { temperature, correction, masking: Masking::Ids, ..Config::new(40, 300, 16) };
            must_agree(backend, &config, operands);
            must_agree(backend, &Config { log_q: LogQ::Realistic, ..config }, operands);
        }
    }
}

pub fn lengths_near_the_ends_of_the_range(backend: Subject<'_>, operands: Operands) {
    for separate in [false, true] {
        let config = Config { separate, temperature: 0.2, masking: Masking::Ids, ..Config::new(12, 270, 8) };
        let mut problem = config.problem();
        // 0 and 1e-20 are shorter than 1e-12: cosine 0 with everything. The others are as good as any length.
        let factor = |row: usize| [1.0, 0.0, 1e-20, 1e18, 1e-8, 1e-11][row % 6];
        let scale = |values: &mut Vec<f32>| {
            values.chunks_mut(8).enumerate().for_each(|(row, x)| x.iter_mut().for_each(|x| *x *= factor(row)));
        };
        problem.queries = problem.queries.map(scale);
        problem.pools[0].candidates = problem.pools[0].candidates.map(scale);
        if let PositiveData::Separate(embeddings) = &mut problem.positives {
            *embeddings = embeddings.map(scale);
        }
        let output = everything(backend, &problem);
        Expected::new(&problem, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
        let g = gradients(&output);
        for row in 0..12 {
            assert_eq!(all_zero(g.d_queries.row(row)), [1, 2].contains(&(row % 6)), "query {row}");
            if [1, 2].contains(&(row % 6)) {
                assert_eq!(output.statistics.positive[row], 0.0);
                let negatives = output.statistics.num_negatives[row] as f64;
                assert!((output.statistics.lse[row] - negatives.ln()).abs() < 1e-6, "cosines are 0");
            }
        }
        for row in 0..270 {
            assert_eq!(all_zero(g.d_candidates[0].row(row)), [1, 2].contains(&(row % 6)), "candidate {row}");
        }
    }
}

pub fn log_q_of_any_size(backend: Subject<'_>, operands: Operands) {
    for range in [30.0f32, 300.0, 1e4] {
        for correction in [Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
            let config = Config { correction, ..Config::new(12, 600, 8) };
            let mut problem = config.problem();
            let mut random = rng(9);
            let log_q = problem.pools[0].log_q.as_mut().expect("asked for");
            log_q.iter_mut().for_each(|l| *l = -range * random.random_range(1e-3..1.0f32));
            let output = everything(backend, &problem);
            Expected::new(&problem, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}
