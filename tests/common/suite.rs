//! The properties that every backend has: agreement with the reference, and the identities of the mathematics.
//!
//! Each is a function of a backend; `test_each!` makes a test of each. Tile sizes are read from the backend's plan.

use std::cell::RefCell;

use catalog_softmax::{
    Backend, Correction, DType, Gradients, Loss, Output, Plan, Reduction, Reference, Request, RowStatistics, Similarity,
};
use proptest::test_runner::{Config as Cases, RngSeed, TestCaseError, TestRunner};
use rand::RngExt;

use super::formulas::scores;
use super::generate::{Config, LogQ, Masking, configs, rng, rows};
use super::problem::{PoolData, PositiveData, Problem, Storage};
use super::tolerance::{Expected, Tensor, compare, reference, tensors};

/// The backend under test.
pub type Subject<'a> = &'a mut dyn Backend<Real = f32>;
/// Input type → precision of the matmul operands of the baseline that the backend is measured by.
pub type Operands = fn(DType) -> DType;

/// A property of a backend.
pub type Property = fn(Subject<'_>, Operands);

/// The list of properties, given to another macro.
macro_rules! with_properties {
    ($with:ident!($($arguments:tt)*)) => {
        $with! { ($($arguments)*)
            agrees_on_random_problems,
            agrees_on_wide_random_problems,
            agrees_at_the_edges_of_tiles,
            agrees_at_every_width,
            agrees_over_several_tiles_in_a_split,
            agrees_on_strided_views,
            agrees_for_every_combination_of_options,
            coefficients_sum_to_one_minus_p_and_follow_the_exponential,
            gradients_of_two_negatives_have_the_ratio_of_their_exponentials,
            entropy_grows_with_temperature,
            a_constant_added_to_log_q_changes_nothing,
            lengths_change_nothing_under_cosine,
            permuted_candidates_have_permuted_gradients,
            pools_are_one_catalogue,
            a_masked_candidate_has_no_gradient,
            losses_are_not_negative,
            corrected_logq_is_a_shifted_cross_entropy,
            a_symmetric_loss_is_the_mean_of_both_directions,
            an_epilogue_of_your_own_gets_its_gradients,
            requests_do_not_change_each_other,
            temperature_and_queries_agree_on_the_scale,
            the_expected_score_is_that_of_the_expected_negative,
            ranks_count_what_is_above_and_ties,
            rows_without_negatives_are_absent,
            rows_of_weight_zero_are_absent,
            nan_spoils_what_it_touches,
            nan_spoils_nothing_else,
            scores_of_several_hundred,
            both_passes_have_the_same_probabilities,
            a_small_temperature,
            lengths_near_the_ends_of_the_range,
            long_rows_change_nothing_under_cosine,
            gradients_of_scores_of_a_hundred_million,
            far_rows_keep_their_share,
            log_q_of_any_size,
        }
    };
}

/// Makes a test of each property. `$backend` is a `Box<dyn Backend<Real = f32>>`.
macro_rules! test_each {
    (($backend:expr, $operands:expr) $($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                $crate::common::suite::$name(&mut *$backend, $operands);
            }
        )*
    };
}

macro_rules! list {
    (() $($name:ident,)*) => {
        /// Every property by its name.
        pub const PROPERTIES: &[(&str, Property)] = &[$((stringify!($name), $name)),*];
    };
}
pub use super::ends::{
    far_rows_keep_their_share, gradients_of_scores_of_a_hundred_million, long_rows_change_nothing_under_cosine,
};
with_properties!(list!());
pub(crate) use {test_each, with_properties};

pub(super) fn compute(backend: Subject<'_>, problem: &Problem, request: Request) -> Output<f32> {
    let mut output = Output::default();
    let batch = problem.batch().expect("a valid problem");
    backend.compute(&batch, &problem.loss, request, &mut output).expect("a loss that fits");
    output
}

pub(super) fn everything(backend: Subject<'_>, problem: &Problem) -> Output<f32> {
    compute(backend, problem, Request::value_and_grad().with_moments())
}

/// Whether two requests have the same result. Not bit for bit: a backend may sum in another way for another request.
fn near(a: &[f64], b: &[f64]) -> bool {
    let epsilon = f64::from(f32::EPSILON);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || (a - b).abs() <= 4.0 * epsilon * a.abs().max(1.0))
}

pub(super) fn gradients(output: &Output<f32>) -> &Gradients<f32> {
    output.gradients.as_ref().expect("asked for")
}

/// The output of a valid problem is the reference's.
fn agrees(backend: Subject<'_>, config: &Config, operands: Operands) -> Result<(), String> {
    let problem = config.problem();
    Expected::new(&problem, operands(config.dtype)).check(&everything(backend, &problem))
}

fn must_agree(backend: Subject<'_>, config: &Config, operands: Operands) {
    agrees(backend, config, operands).unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
}

/// Runs a property on random problems: always the same ones, unless `PROPTEST_RNG_SEED` says otherwise;
/// `PROPTEST_CASES` says how many.
fn for_random_configs(cases: u32, sizes: [usize; 3], property: impl FnMut(&Config) -> Result<(), String>) {
    let mut options = Cases { failure_persistence: None, max_shrink_iters: 200, ..Cases::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        options.cases = cases;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        options.rng_seed = RngSeed::Fixed(20_251_123);
    }
    let property = RefCell::new(property);
    let [b, n, dim] = sizes;
    TestRunner::new(options)
        .run(&configs(b, n, dim), |config| (property.borrow_mut())(&config).map_err(TestCaseError::fail))
        .unwrap_or_else(|error| panic!("{error}"));
}

/// The tiles of a large problem of that width.
fn tiles(backend: Subject<'_>, dim: usize) -> Plan {
    let problem = Config::new(1100, 1100, dim).problem();
    let batch = problem.batch().expect("a valid problem");
    backend.plan(&batch, &problem.loss, Request::value_and_grad()).expect("a loss that fits")
}

/// Sizes at which tiles begin, end and are left.
fn edges(tile: usize) -> [usize; 5] {
    [1, (tile - 1).max(1), tile, tile + 1, 2 * tile + 3]
}

pub fn agrees_on_random_problems(backend: Subject<'_>, operands: Operands) {
    for_random_configs(400, [40, 60, 24], |config| agrees(backend, config, operands));
}

pub fn agrees_on_wide_random_problems(backend: Subject<'_>, operands: Operands) {
    for_random_configs(40, [300, 400, 80], |config| agrees(backend, config, operands));
}

pub fn agrees_at_the_edges_of_tiles(backend: Subject<'_>, operands: Operands) {
    let plan = tiles(backend, 8);
    let corrections = [
        Correction::LogQ,
        Correction::None,
        Correction::CorrectedLogQ,
        Correction::LogQNegativesOnly,
        Correction::LogQ,
    ];
    for (x, &b) in edges(plan.block_b).iter().enumerate() {
        for (y, &n) in edges(plan.block_n).iter().enumerate() {
            let config = Config {
                dim: [8, 3, 17, 33, 5][(x + y) % 5],
                similarity: if (x + y) % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                temperature: if (x + y) % 2 == 0 { 0.1 } else { 1.0 },
                correction: corrections[(x + 2 * y) % 5],
                masking: [Masking::Ids, Masking::None, Masking::Excluded][(x + y) % 3],
                separate: y % 2 == 1,
                weights: x % 2 == 1,
                seed: (x * 5 + y) as u64,
                ..Config::new(b, n, 8)
            };
            must_agree(backend, &config, operands);
        }
    }
    // Pools that end and begin within what would be a tile.
    let t = plan.block_n;
    for pools in [vec![1, t - 1, t, t + 1], vec![t + 1, 1, 1, 2 * t + 3], vec![5; 9]] {
        let config = Config { pools, correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(19, 1, 12) };
        must_agree(backend, &config, operands);
    }
}

pub fn agrees_at_every_width(backend: Subject<'_>, operands: Operands) {
    for (i, dim) in
        [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 127, 128, 255, 256, 257, 512, 513, 1030].into_iter().enumerate()
    {
        let n = tiles(backend, dim).block_n;
        let small = Config {
            similarity: if i % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
            correction: Correction::LogQ,
            separate: i % 3 == 0,
            masking: Masking::Ids,
            seed: dim as u64,
            ..Config::new(9, n + 1, dim)
        };
        must_agree(backend, &small, operands);
        let large = Config { similarity: Similarity::Cosine, separate: i % 3 == 1, ..Config::new(65, n - 1, dim) };
        must_agree(backend, &large, operands);
    }
}

/// The running maximum: a split of several tiles carries sums from one to the next and scales them as the maximum grows.
pub fn agrees_over_several_tiles_in_a_split(backend: Subject<'_>, operands: Operands) {
    for b in [1, 37] {
        let base = Config { correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(b, 1, 5) };
        let tiles_and_splits = |backend: Subject<'_>, pools: &[usize]| {
            let problem = Config { pools: pools.to_vec(), ..base.clone() }.problem();
            let batch = problem.batch().expect("a valid problem");
            let request = Request::value_and_grad();
            let plan = backend.plan(&batch, &problem.loss, request).expect("a loss that fits");
            (pools.iter().map(|n| n.div_ceil(plan.block_n)).sum::<usize>(), plan.splits)
        };
        // Tiles do not cross pools: many small pools are many tiles.
        let small: Vec<usize> = (0..300).map(|p| 1 + p % 3).collect();
        let large = vec![60_000 + b];
        let (tiles, splits) = tiles_and_splits(backend, &large);
        assert!(tiles >= 2 * splits, "a case for the test: {tiles} tiles in {splits} splits");
        for pools in [small, large] {
            for (similarity, temperature) in [(Similarity::Cosine, 0.02), (Similarity::Dot, 1.0)] {
                must_agree(
                    backend,
                    &Config { pools: pools.clone(), similarity, temperature, ..base.clone() },
                    operands,
                );
            }
        }
    }
}

pub fn agrees_on_strided_views(backend: Subject<'_>, operands: Operands) {
    for (i, padding) in [1, 3, 29].into_iter().enumerate() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let config = Config {
                dtype,
                separate: i % 2 == 0,
                pools: vec![300, 7],
                correction: Correction::LogQ,
                masking: Masking::Ids,
                ..Config::new(11, 1, 7 + i)
            };
            let problem = config.problem();
            let expected = Expected::new(&problem, operands(dtype));
            let padded = problem.padded(padding);
            let batch = padded.strided_batch(padding).expect("a valid problem");
            let mut output = Output::default();
            let request = Request::value_and_grad().with_moments();
            backend.compute(&batch, &problem.loss, request, &mut output).expect("a loss that fits");
            expected.check(&output).unwrap_or_else(|error| panic!("{error}\nin {config:?}, padding {padding}"));
        }
    }
}

pub fn agrees_for_every_combination_of_options(backend: Subject<'_>, operands: Operands) {
    let mut seed = 0;
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ]
        {
            for reduction in [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean] {
                for masking in [Masking::None, Masking::Ids, Masking::Excluded] {
                    for separate in [false, true] {
                        seed += 1;
                        let config = Config {
                            pools: vec![20, 1, 13],
                            dtype: [DType::F32, DType::F16, DType::Bf16][seed % 3],
                            similarity,
                            temperature: [0.05, 0.2, 1.0][seed % 3],
                            correction,
                            reduction,
                            masking,
                            separate,
                            log_q: if seed % 2 == 0 { LogQ::OrderOne } else { LogQ::Realistic },
                            weights: seed % 4 < 2,
                            frozen: seed as u32 % 8,
                            seed: seed as u64,
                            ..Config::new(12, 1, 10)
                        };
                        must_agree(backend, &config, operands);
                    }
                }
            }
        }
    }
    for (i, reduction) in
        [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean].into_iter().enumerate()
    {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            let masking = if i % 2 == 0 { Masking::Ids } else { Masking::None };
            let config =
                Config { symmetric: true, weights: true, reduction, similarity, masking, ..Config::new(33, 33, 6) };
            must_agree(backend, &config, operands);
        }
    }
}

/// Dot products with the axes' unit vectors: candidate j is e_j and every row's positive e_n, so that gradients of the
/// queries are the coefficients themselves.
fn axes(b: usize, n: usize, temperature: f64, correction: Correction) -> Problem {
    let dim = n + 1;
    let unit = |j: usize| (0..dim).map(move |k| if k == j { 1.0f32 } else { 0.0 });
    let config = Config { correction, masking: Masking::Ids, separate: true, ..Config::new(b, n, 2) };
    let mut problem = config.problem();
    problem.dim = dim;
    problem.queries = Storage::F32(rows(&mut rng(3), b, dim, 1.0));
    problem.pools[0].candidates = Storage::F32((0..n).flat_map(unit).collect());
    problem.positives = PositiveData::Separate(Storage::F32((0..b).flat_map(|_| unit(n)).collect()));
    problem.loss = Loss::softmax(Similarity::Dot, temperature).correction(correction).reduction(Reduction::Sum);
    problem
}

pub fn coefficients_sum_to_one_minus_p_and_follow_the_exponential(backend: Subject<'_>, _: Operands) {
    let (b, n, tau) = (9, 300, 0.7);
    for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
        let problem = axes(b, n, tau, correction);
        let output = everything(backend, &problem);
        let (z, negatives) = scores(&problem);
        let queries = problem.queries.to_f32();
        for i in 0..b {
            let z = &z[i * n..(i + 1) * n];
            let coefficients: Vec<f64> =
                gradients(&output).d_queries.row(i).iter().map(|&d| f64::from(d) * tau).collect();
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            let positive = (f64::from(queries[i * (n + 1) + n]) / tau).exp();
            let log_q = problem.positive_log_q.as_ref().map_or(0.0, |log_q| f64::from(log_q[i]));
            let (sum_here, positive_here) = match correction {
                Correction::LogQ => (sum, positive / log_q.exp()),
                Correction::CorrectedLogQ => (sum * (1.0 - log_q.exp()) / negatives[i] as f64, positive),
                _ => (sum, positive),
            };
            let a = sum_here / (sum_here + positive_here);
            let total: f64 = coefficients[..n].iter().sum();
            assert!((total - a).abs() < 3e-6 * a, "{correction:?}: row {i}: {total} != {a}");
            assert!((coefficients[n] + a).abs() < 3e-6 * a, "{correction:?}: positive of row {i}: {}", coefficients[n]);
            assert!((1.0 - output.probability[i] - a).abs() < 3e-6, "{correction:?}: probability of row {i}");
            for (j, (&coefficient, z)) in coefficients.iter().zip(z).enumerate() {
                if *z == f64::NEG_INFINITY {
                    assert_eq!(coefficient, 0.0, "{correction:?}: masked ({i}, {j})");
                } else {
                    let expected = a * z.exp() / sum;
                    let off = (coefficient - expected).abs();
                    assert!(off < 1e-5 * expected, "{correction:?}: ({i}, {j}): {coefficient} != {expected}");
                }
            }
        }
    }
}

pub fn gradients_of_two_negatives_have_the_ratio_of_their_exponentials(backend: Subject<'_>, _: Operands) {
    for (tau, dim, n) in [(0.3, 20, 500), (1.0, 3, 90), (2.5, 64, 300)] {
        let config = Config { similarity: Similarity::Dot, temperature: tau, ..Config::new(1, n, dim) };
        let problem = config.problem();
        let output = everything(backend, &problem);
        let (z, _) = scores(&problem);
        let queries = problem.queries.to_f32();
        let k = (0..dim).max_by(|&a, &b| queries[a].abs().total_cmp(&queries[b].abs())).expect("dim >= 1");
        let coefficient = |j: usize| f64::from(gradients(&output).d_candidates[0].row(j)[k] / queries[k]);
        let negatives: Vec<usize> = (0..n).filter(|&j| z[j] > f64::NEG_INFINITY).collect();
        for pair in negatives.windows(2) {
            let found = coefficient(pair[0]) / coefficient(pair[1]);
            let expected = (z[pair[0]] - z[pair[1]]).exp();
            assert!((found / expected - 1.0).abs() < 2e-5, "{pair:?} at {tau}: {found} != {expected}");
        }
    }
}

pub fn entropy_grows_with_temperature(backend: Subject<'_>, _: Operands) {
    let config = Config { temperature: 0.2, separate: true, ..Config::new(5, 300, 16) };
    let mut at = |tau: f64| {
        let mut problem = config.problem();
        problem.loss.temperature = tau;
        let output = everything(backend, &problem);
        (problem, output)
    };
    let entropy = |output: &Output<f32>| output.statistics.moments.clone().expect("asked for").entropy;
    let mut before = vec![-1e-6; 5];
    for tau in [1e-3, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0, 100.0] {
        let (problem, output) = at(tau);
        let now = entropy(&output);
        assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "{tau}: {now:?} after {before:?}");
        before = now;
        if !(0.1..=3.0).contains(&tau) {
            continue;
        }
        // ∂H/∂τ = D[sim] / τ³
        let step = 0.01 * tau;
        let (below, above) = (entropy(&at(tau - step).1), entropy(&at(tau + step).1));
        let (z, _) = scores(&problem);
        for i in 0..5 {
            let row = &z[i * 300..(i + 1) * 300];
            let sum: f64 = row.iter().map(|z| z.exp()).sum();
            let mean: f64 = row.iter().map(|z| z.exp() / sum * z).sum();
            let variance: f64 = row.iter().map(|z| z.exp() / sum * (z - mean).powi(2)).sum();
            let (slope, expected) = ((above[i] - below[i]) / (2.0 * step), variance / tau);
            let off = (slope - expected).abs();
            assert!(off < 0.01 * expected + 4e-6 / step, "τ = {tau}, row {i}: {slope} != {expected}");
        }
    }
    // τ → ∞: uniform.
    let (problem, output) = at(1e6);
    let candidates = problem.candidates();
    for i in 0..5 {
        assert!((entropy(&output)[i] - 300f64.ln()).abs() < 1e-5, "{:?}", entropy(&output));
        assert!((output.statistics.lse[i] - 300f64.ln()).abs() < 1e-5);
        for k in 0..16 {
            let unit = |row: &[f32]| f64::from(row[k]) / row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let mean = candidates.chunks(16).map(unit).sum::<f64>() / 300.0;
            let o = output.statistics.expected_negative.as_ref().expect("asked for").row(i)[k];
            assert!((f64::from(o) - mean).abs() < 1e-6, "row {i}, {k}: {o} != {mean}");
        }
    }
    // τ → 0: the best negative takes all.
    let (problem, output) = at(1e-6);
    let (z, _) = scores(&problem);
    for i in 0..5 {
        let row = &z[i * 300..(i + 1) * 300];
        let best = (0..300).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("300 candidates");
        assert!(entropy(&output)[i].abs() < 1e-6);
        assert!((output.statistics.lse[i] / row[best] - 1.0).abs() < 1e-6);
        let c = &candidates[best * 16..(best + 1) * 16];
        let norm = c.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let o = output.statistics.expected_negative.as_ref().expect("asked for").row(i);
        assert!(o.iter().zip(c).all(|(&o, &c)| (f64::from(o) - f64::from(c) / norm).abs() < 1e-6), "row {i}");
    }
}

pub(super) fn same(expected: &Expected, one: &[Tensor], two: &[Tensor], what: &str) {
    compare(one, two, &expected.tolerances, 2.0).unwrap_or_else(|error| panic!("{what}: {error}"));
}

pub fn a_constant_added_to_log_q_changes_nothing(backend: Subject<'_>, operands: Operands) {
    for separate in [false, true] {
        let config =
            Config { correction: Correction::LogQ, separate, masking: Masking::Ids, ..Config::new(17, 300, 12) };
        let mut problem = config.problem();
        // Multiples of 1/64, so that the sum is exact.
        let round = |log_q: &mut Vec<f32>| log_q.iter_mut().for_each(|l| *l = (*l * 64.0).round() / 64.0);
        problem.pools[0].log_q.as_mut().into_iter().chain(problem.positive_log_q.as_mut()).for_each(round);
        let mut shifted = problem.clone();
        let shift = |log_q: &mut Vec<f32>| log_q.iter_mut().for_each(|l| *l += 2.0);
        shifted.pools[0].log_q.as_mut().into_iter().chain(shifted.positive_log_q.as_mut()).for_each(shift);
        let (one, mut two) = (everything(backend, &problem), everything(backend, &shifted));
        two.statistics.lse.iter_mut().for_each(|lse| *lse += 2.0);
        let expected = Expected::new(&shifted, operands(DType::F32));
        same(&expected, &tensors(&one), &tensors(&two), "log_q + 2");
    }
}

pub fn lengths_change_nothing_under_cosine(backend: Subject<'_>, operands: Operands) {
    for separate in [false, true] {
        let config = Config { separate, temperature: 0.2, ..Config::new(17, 280, 12) };
        let problem = config.problem();
        let expected = Expected::new(&problem, operands(DType::F32));
        let one = everything(backend, &problem);
        let factor = |row: usize| [1.0f32, 1024.0, 3.0, 2f32.powi(-20), 0.7][row % 5];
        let scale = |values: &mut Vec<f32>| {
            values.chunks_mut(12).enumerate().for_each(|(row, x)| x.iter_mut().for_each(|x| *x *= factor(row)));
        };
        let mut scaled = problem.clone();
        scaled.queries = problem.queries.map(scale);
        scaled.pools[0].candidates = problem.pools[0].candidates.map(scale);
        if let PositiveData::Separate(embeddings) = &mut scaled.positives {
            *embeddings = embeddings.map(scale);
        }
        let mut two = tensors(&everything(backend, &scaled));
        for tensor in &mut two {
            if ["d_queries", "d_candidates[0]", "d_positive_embeddings"].contains(&tensor.name.as_str()) {
                tensor.values.iter_mut().enumerate().for_each(|(at, d)| *d *= f64::from(factor(at / 12)));
            }
        }
        same(&expected, &tensors(&one), &two, "scaled");

        // Each gradient is orthogonal to its vector.
        let d = tensors(&one);
        for (name, x) in [
            ("d_queries", problem.queries.to_f32()),
            ("d_candidates[0]", problem.candidates()),
            ("d_positive_embeddings", problem.positive_rows()),
        ] {
            let Some(at) = d.iter().position(|t| t.name == name) else { continue };
            for (row, (x, d)) in x.chunks(12).zip(d[at].values.chunks(12)).enumerate() {
                let along: f64 = x.iter().zip(d).map(|(&x, d)| f64::from(x) * d).sum();
                let norm = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let bound = expected.tolerances[at][row] * norm * 12f64.sqrt();
                assert!(along.abs() <= bound, "{name}, row {row}: {along:e} along the vector, bound {bound:e}");
            }
        }
    }
}

fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let (mut order, mut rng) = ((0..n).collect::<Vec<_>>(), rng(seed));
    for i in (1..n).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    order
}

pub fn permuted_candidates_have_permuted_gradients(backend: Subject<'_>, operands: Operands) {
    let (b, n, d) = (31, 530, 9);
    let config = Config { correction: Correction::LogQ, masking: Masking::Excluded, ..Config::new(b, n, d) };
    let problem = config.problem();
    let order = shuffled(n, 5);
    let mut permuted = problem.clone();
    let (pool, from) = (&mut permuted.pools[0], &problem.pools[0]);
    pool.candidates = from.candidates.map(|values| {
        let original = values.clone();
        for (to, &from) in order.iter().enumerate() {
            values[to * d..(to + 1) * d].copy_from_slice(&original[from * d..(from + 1) * d]);
        }
    });
    pool.ids = from.ids.as_ref().map(|ids| order.iter().map(|&j| ids[j]).collect());
    pool.log_q = from.log_q.as_ref().map(|log_q| order.iter().map(|&j| log_q[j]).collect());
    let PositiveData::Index(positives) = &mut permuted.positives else { panic!("by index") };
    for positive in positives {
        *positive = order.iter().position(|&j| j == *positive as usize).expect("a permutation") as u32;
    }
    let (one, two) = (everything(backend, &problem), everything(backend, &permuted));
    let (one, mut two) = (tensors(&one), tensors(&two));
    let at = two.iter().position(|t| t.name == "d_candidates[0]").expect("asked for");
    let d_permuted = two[at].values.clone();
    for (to, &from) in order.iter().enumerate() {
        two[at].values[from * d..(from + 1) * d].copy_from_slice(&d_permuted[to * d..(to + 1) * d]);
    }
    same(&Expected::new(&problem, operands(DType::F32)), &one, &two, "permuted");
}

pub fn pools_are_one_catalogue(backend: Subject<'_>, operands: Operands) {
    let t = tiles(backend, 9).block_n;
    for sizes in [vec![1, t + 1, 31, 2 * t], vec![t, t, 1, 1], vec![7; 40]] {
        let n = sizes.iter().sum();
        let whole =
            Config { correction: Correction::LogQ, masking: Masking::Excluded, ..Config::new(21, n, 9) }.problem();
        let mut split = whole.clone();
        split.pools.clear();
        let (pool, mut start) = (&whole.pools[0], 0);
        for &rows in &sizes {
            let values = pool.candidates.to_f32();
            split.pools.push(PoolData {
                candidates: Storage::F32(values[start * 9..(start + rows) * 9].to_vec()),
                ids: pool.ids.as_ref().map(|ids| ids[start..start + rows].to_vec()),
                log_q: pool.log_q.as_ref().map(|log_q| log_q[start..start + rows].to_vec()),
                gradient: true,
            });
            start += rows;
        }
        let request = Request::value_and_grad().with_moments().with_rank();
        let (one, two) = (compute(backend, &whole, request), compute(backend, &split, request));
        assert_eq!(one.statistics.rank, two.statistics.rank, "{sizes:?}");
        let (one, mut two) = (tensors(&one), tensors(&two));
        let first = two.iter().position(|t| t.name == "d_candidates[0]").expect("asked for");
        let parts: Vec<Tensor> = two.splice(first..first + sizes.len(), []).collect();
        let joined = parts.iter().flat_map(|part| part.values.clone()).collect();
        two.insert(first, Tensor { name: "d_candidates[0]".into(), values: joined, width: 9 });
        same(&Expected::new(&whole, operands(DType::F32)), &one, &two, "pools");

        // A pool without gradient changes no other's.
        let all = everything(backend, &split);
        split.pools[1].gradient = false;
        let frozen = everything(backend, &split);
        for (p, (a, b)) in gradients(&all).d_candidates.iter().zip(&gradients(&frozen).d_candidates).enumerate() {
            if p == 1 {
                assert_eq!((b.rows, b.values.len()), (0, 0), "pool 1 is frozen");
            } else {
                assert_eq!(a, b, "pool {p}");
            }
        }
        assert_eq!(gradients(&all).d_queries, gradients(&frozen).d_queries);
    }
}

pub fn a_masked_candidate_has_no_gradient(backend: Subject<'_>, _: Operands) {
    // Every row excludes id 77, which every fifth candidate has; some rows have further masks.
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        let (b, n, d) = (270, 290, 7);
        let config = Config { similarity, masking: Masking::Excluded, separate: true, ..Config::new(b, n, d) };
        let mut problem = config.problem();
        let masked = |j: usize| j.is_multiple_of(5) || (200..240).contains(&j);
        let ids = problem.pools[0].ids.as_mut().expect("asked for");
        ids.iter_mut().enumerate().filter(|(j, _)| masked(*j)).for_each(|(_, id)| *id = 77);
        let (offsets, excluded) = problem.excluded.as_mut().expect("asked for");
        let old = excluded.clone();
        excluded.clear();
        for i in 0..b {
            let (from, to) = (offsets[i] as usize, offsets[i + 1] as usize);
            offsets[i] = excluded.len() as i64;
            excluded.extend(&old[from..to]);
            excluded.push(77);
        }
        offsets[b] = excluded.len() as i64;
        let output = everything(backend, &problem);
        let expected = reference(&problem).statistics.num_negatives;
        assert_eq!(output.statistics.num_negatives, expected);
        for j in 0..n {
            let d = gradients(&output).d_candidates[0].row(j);
            assert_eq!(d.iter().all(|&d| d == 0.0), masked(j), "{similarity:?}, candidate {j}: {d:?}");
        }
    }
    // Masked in row 0 alone, whose weight is all there is.
    let config = Config { masking: Masking::Ids, separate: true, weights: true, ..Config::new(3, 40, 5) };
    let mut problem = config.problem();
    problem.row_weight = Some(vec![1.0, 0.0, 0.0]);
    let id = problem.pools[0].ids.as_ref().expect("asked for")[11];
    problem.positive_ids.as_mut().expect("asked for")[0] = id;
    let output = everything(backend, &problem);
    for (j, &other) in problem.pools[0].ids.as_ref().expect("asked for").iter().enumerate() {
        let d = gradients(&output).d_candidates[0].row(j);
        assert_eq!(d.iter().all(|&d| d == 0.0), other == id, "candidate {j}: {d:?}");
    }
}

pub fn losses_are_not_negative(backend: Subject<'_>, _: Operands) {
    for_random_configs(100, [20, 40, 8], |config| {
        if config.correction == Correction::CorrectedLogQ {
            return Ok(());
        }
        let output = compute(backend, &config.problem(), Request::value());
        match output.loss.iter().chain([&output.total]).find(|loss| loss.is_nan() || **loss < 0.0) {
            Some(loss) => Err(format!("a loss of {loss}")),
            None => Ok(()),
        }
    });
}

pub fn corrected_logq_is_a_shifted_cross_entropy(backend: Subject<'_>, operands: Operands) {
    let (b, n) = (13, 270);
    let config = Config {
        correction: Correction::CorrectedLogQ,
        separate: true,
        log_q: LogQ::Realistic,
        ..Config::new(b, n, 8)
    };
    let mut corrected = config.problem();
    // One probability for all positives, so that one log_q' serves all rows; no masks, so that n is the same in each.
    let positive_log_q = -1.5f32;
    corrected.positive_log_q = Some(vec![positive_log_q; b]);
    let shift = (n as f64).ln() - (-f64::from(positive_log_q).exp()).ln_1p();
    let mut shifted = corrected.clone();
    shifted.positive_log_q = None;
    shifted.loss = shifted.loss.correction(Correction::LogQNegativesOnly);
    let log_q = shifted.pools[0].log_q.as_mut().expect("asked for");
    log_q.iter_mut().for_each(|l| *l = (f64::from(*l) + shift) as f32);
    let (one, two) = (everything(backend, &corrected), everything(backend, &shifted));
    let tolerances = Expected::new(&corrected, operands(DType::F32)).tolerances;
    let (one, two) = (tensors(&one), tensors(&two));
    for name in ["d_queries", "d_candidates[0]", "d_positive_embeddings", "d_temperature"] {
        let at = one.iter().position(|t| t.name == name).expect("asked for");
        let one = std::slice::from_ref(&one[at]);
        compare(one, &two[at..=at], &tolerances[at..=at], 2.0).unwrap_or_else(|error| panic!("{error}"));
    }
}

pub fn a_symmetric_loss_is_the_mean_of_both_directions(backend: Subject<'_>, operands: Operands) {
    for masking in [Masking::None, Masking::Ids] {
        let b = 261;
        let config = Config { symmetric: true, weights: true, masking, ..Config::new(b, b, 10) };
        let problem = Config { reduction: Reduction::WeightedMean, ..config }.problem();
        let mut one_way = problem.clone();
        one_way.loss.symmetric = false;
        let (both, one, other) =
            (everything(backend, &problem), everything(backend, &one_way), everything(backend, &problem.swapped()));
        let PositiveData::Index(positives) = &problem.positives else { panic!("by index") };
        let mut mean = one.clone();
        mean.total = 0.5 * (one.total + other.total);
        for (i, &j) in positives.iter().enumerate() {
            mean.loss[i] = 0.5 * (one.loss[i] + other.loss[j as usize]);
            mean.probability[i] = 0.5 * (one.probability[i] + other.probability[j as usize]);
        }
        let half = |a: &mut [f32], b: &[f32]| a.iter_mut().zip(b).for_each(|(a, b)| *a = 0.5 * (*a + b));
        let (into, from) = (mean.gradients.as_mut().expect("asked for"), gradients(&other));
        half(&mut into.d_queries.values, &from.d_candidates[0].values);
        half(&mut into.d_candidates[0].values, &from.d_queries.values);
        into.d_temperature = 0.5 * (into.d_temperature + from.d_temperature);
        into.d_log_temperature = 0.5 * (into.d_log_temperature + from.d_log_temperature);
        same(&Expected::new(&problem, operands(DType::F32)), &tensors(&mean), &tensors(&both), "symmetric");
        assert_eq!(both.statistics, one.statistics, "statistics are those of queries against candidates");
        let value = compute(backend, &problem, Request::value());
        assert!(near(&[value.total], &[both.total]) && near(&value.loss, &both.loss));
    }
}

pub fn an_epilogue_of_your_own_gets_its_gradients(backend: Subject<'_>, operands: Operands) {
    let config = Config {
        pools: vec![200, 90],
        correction: Correction::LogQ,
        masking: Masking::Excluded,
        weights: true,
        separate: true,
        ..Config::new(33, 1, 11)
    };
    let problem = config.problem();
    let (batch, loss) = (problem.batch().expect("a valid problem"), &problem.loss);
    let whole = backend.value_and_grad(&batch, loss).expect("a loss that fits");
    let statistics = backend.statistics(&batch, loss, Request::value_and_grad()).expect("a loss that fits");
    let epilogue = loss.epilogue(&batch, &statistics).expect("a loss that fits");
    let parts = backend
        .gradients(&batch, loss, &statistics, &epilogue.d_lse, &epilogue.d_positive)
        .expect("statistics with gradients");
    assert_eq!(epilogue.loss, whole.loss);
    assert_eq!(epilogue.total, whole.total);
    let mut rebuilt = whole.clone();
    rebuilt.gradients = Some(parts);
    let expected = Expected::new(&problem, operands(DType::F32));
    let close = |found: &[Tensor]| {
        let without_moments: Vec<usize> = (0..expected.tensors.len())
            .filter(|&at| !["expected_score", "entropy"].contains(&expected.tensors[at].name.as_str()))
            .collect();
        let want: Vec<Tensor> = without_moments.iter().map(|&at| expected.tensors[at].clone()).collect();
        let tolerances: Vec<Vec<f64>> = without_moments.iter().map(|&at| expected.tolerances[at].clone()).collect();
        compare(&want, found, &tolerances, 1.0)
    };
    close(&tensors(&rebuilt)).unwrap_or_else(|error| panic!("{error}"));

    // Arbitrary derivatives by lse and positive, of both signs, one of them 0: the loss of margins and z-losses.
    let d_lse: Vec<f64> = (0..33).map(|i| f64::from(i % 5 - 2) * 0.3).collect();
    let d_positive: Vec<f64> = (0..33).map(|i| f64::from(i % 3 - 1) * 0.7).collect();
    let found = backend.gradients(&batch, loss, &statistics, &d_lse, &d_positive).expect("statistics with gradients");
    let mut truth = Reference::new();
    let exact = truth.statistics(&batch, loss, Request::value_and_grad()).expect("a loss that fits");
    let want = truth.gradients(&batch, loss, &exact, &d_lse, &d_positive).expect("statistics with gradients");
    let near = |name: &str, found: &[f32], want: &[f64]| {
        for (row, (found, want)) in found.chunks(11).zip(want.chunks(11)).enumerate() {
            let size = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
            let off = found.iter().zip(want).fold(0.0f64, |max, (f, w)| max.max((f64::from(*f) - w).abs()));
            assert!(off <= 3e-5 * size, "{name}, row {row}: off by {off:e} of {size:e}");
        }
    };
    near("d_queries", &found.d_queries.values, &want.d_queries.values);
    for p in 0..2 {
        near("d_candidates", &found.d_candidates[p].values, &want.d_candidates[p].values);
    }
    let (found_p, want_p) = (found.d_positive_embeddings.as_ref(), want.d_positive_embeddings.as_ref());
    near("d_positive_embeddings", &found_p.expect("separate").values, &want_p.expect("separate").values);
    assert!((found.d_temperature / want.d_temperature - 1.0).abs() < 1e-4);
}

pub fn requests_do_not_change_each_other(backend: Subject<'_>, _: Operands) {
    let config =
        Config { pools: vec![300, 20], correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(19, 1, 13) };
    let problem = config.problem();
    let value = compute(backend, &problem, Request::value());
    let all = compute(backend, &problem, Request::value_and_grad().with_moments().with_rank());
    let (plain, rich): (&RowStatistics, &RowStatistics) = (&value.statistics, &all.statistics);
    assert!(near(&plain.lse, &rich.lse) && near(&plain.positive, &rich.positive) && near(&value.loss, &all.loss));
    assert_eq!(plain.num_negatives, rich.num_negatives);
    assert!(plain.moments.is_none() && plain.rank.is_none() && plain.expected_negative.is_none());
    assert!(value.gradients.is_none() && all.gradients.is_some());
    assert!(rich.moments.is_some() && rich.rank.is_some() && rich.expected_negative.is_some());
    let moments = compute(backend, &problem, Request::value().with_moments());
    assert_eq!(moments.statistics.moments, rich.moments);
    let rank = compute(backend, &problem, Request::value().with_rank());
    assert_eq!(rank.statistics.rank, rich.rank);
    // A smaller request clears what a larger one left.
    let mut reused = all.clone();
    let batch = problem.batch().expect("a valid problem");
    backend.compute(&batch, &problem.loss, Request::value(), &mut reused).expect("a loss that fits");
    assert_eq!(reused, value);
}

pub fn temperature_and_queries_agree_on_the_scale(backend: Subject<'_>, _: Operands) {
    // Under `Dot`, to scale the queries is to scale γ: Σ q·∂L/∂q = γ ∂L/∂γ = −∂L/∂log τ = −τ ∂L/∂τ.
    for tau in [0.05, 0.5, 2.0, 30.0] {
        for correction in [Correction::None, Correction::LogQ, Correction::CorrectedLogQ] {
            let similarity = Similarity::Dot;
            let config = Config { similarity, temperature: tau, correction, ..Config::new(23, 280, 14) };
            let problem = config.problem();
            let output = everything(backend, &problem);
            let g = gradients(&output);
            let products = problem.queries.to_f32();
            let products = products.iter().zip(&g.d_queries.values).map(|(&q, &d)| f64::from(q) * f64::from(d));
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            assert!((sum + g.d_log_temperature).abs() < 3e-6 * size, "{tau}: {sum} != −{}", g.d_log_temperature);
            assert!((g.d_log_temperature / (tau * g.d_temperature) - 1.0).abs() < 1e-6, "{tau}");
        }
    }
}

pub fn the_expected_score_is_that_of_the_expected_negative(backend: Subject<'_>, _: Operands) {
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        let config = Config {
            similarity,
            temperature: 0.4,
            correction: Correction::LogQ,
            masking: Masking::Ids,
            ..Config::new(29, 600, 20)
        };
        let problem = config.problem();
        let output = everything(backend, &problem);
        let moments = output.statistics.moments.as_ref().expect("asked for");
        let o = output.statistics.expected_negative.as_ref().expect("asked for");
        let (z, _) = scores(&problem);
        let log_q = problem.pools[0].log_q.as_ref().expect("asked for");
        for (i, q) in problem.queries.to_f32().chunks(20).enumerate() {
            let length = q.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let inverse = if similarity == Similarity::Cosine { 1.0 / length } else { 1.0 };
            let dot: f64 = q.iter().zip(o.row(i)).map(|(&q, &o)| f64::from(q) * f64::from(o)).sum();
            let (score, found) = (dot * inverse / 0.4, moments.expected_score[i]);
            assert!((score - found).abs() < 1e-5 * (1.0 + found.abs()), "row {i}: {score} != {found}");
            // H = lse − E[z]
            let row = &z[i * 600..(i + 1) * 600];
            let sum: f64 = row.iter().map(|z| z.exp()).sum();
            let mean_log_q: f64 = row.iter().zip(log_q).map(|(z, &l)| z.exp() / sum * f64::from(l)).sum();
            let entropy = output.statistics.lse[i] - (found - mean_log_q);
            assert!((entropy - moments.entropy[i]).abs() < 1e-5, "row {i}: {entropy} != {}", moments.entropy[i]);
        }
    }
}

/// Counts of negatives that are bitwise the positive, and bounds of those above it.
fn check_ranks(backend: Subject<'_>, problem: &Problem, what: &str) {
    let output = compute(backend, problem, Request::value().with_rank());
    let rank = output.statistics.rank.as_ref().expect("asked for");
    let mut unadjusted = problem.clone();
    unadjusted.pools.iter_mut().for_each(|pool| pool.log_q = None);
    let (scores, _) = scores(&unadjusted);
    let (n, d) = (problem.num_candidates(), problem.dim);
    let (candidates, positives) = (problem.candidates(), problem.positive_rows());
    let exact = reference(problem).statistics.positive;
    for i in 0..problem.num_queries() {
        let positive = &positives[i * d..(i + 1) * d];
        let (mut twins, mut above, mut close) = (0, 0, 0);
        for (j, &s) in scores[i * n..(i + 1) * n].iter().enumerate() {
            if s == f64::NEG_INFINITY {
                continue;
            }
            if candidates[j * d..(j + 1) * d] == *positive {
                twins += 1;
            } else if (s - exact[i]).abs() < 1e-5 * (exact[i].abs() + 1.0 / problem.loss.temperature) {
                close += 1;
            } else if s > exact[i] {
                above += 1;
            }
        }
        let (found_above, found_ties) = (rank.above[i], rank.ties[i]);
        assert!(found_above >= above && found_above <= above + close, "{what}, row {i}: above {found_above}, {above}");
        assert!(found_ties >= twins && found_ties <= twins + close, "{what}, row {i}: ties {found_ties}, {twins}");
        assert!(found_above + found_ties <= above + twins + close, "{what}, row {i}");
    }
}

pub fn ranks_count_what_is_above_and_ties(backend: Subject<'_>, _: Operands) {
    let sizes = [(1, 1), (1, 600), (2, 7), (7, 97), (9, 31), (97, 257), (257, 96), (300, 33)];
    for dim in [1, 2, 3, 8, 31, 64, 257, 513, 700, 1030] {
        for (k, (b, n)) in sizes.into_iter().enumerate() {
            for separate in [false, true] {
                let config = Config {
                    similarity: if (k + dim) % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                    temperature: 0.3,
                    dtype: [DType::F32, DType::F16, DType::Bf16][(k + dim) % 3],
                    masking: Masking::Ids,
                    separate,
                    correction: if k % 2 == 0 { Correction::LogQ } else { Correction::None },
                    pools: if n > 90 { vec![n - 40, 40] } else { vec![n] },
                    seed: (dim * 10 + k) as u64,
                    ..Config::new(b, 1, dim)
                };
                let mut problem = config.problem();
                // Copies of a few rows' positives, under ids of their own, all over the catalogue.
                let positives = problem.positive_rows();
                let total = problem.num_candidates();
                let mut start = 0;
                let mut random = rng(config.seed);
                for pool in &mut problem.pools {
                    let rows = pool.candidates.len() / dim;
                    let ids = pool.ids.as_mut().expect("asked for");
                    pool.candidates = pool.candidates.map(|values| {
                        for j in 0..rows {
                            let is_positive = match &problem.positives {
                                PositiveData::Index(index) => index.contains(&((start + j) as u32)),
                                PositiveData::Separate(_) => false,
                            };
                            if !is_positive && random.random_bool(0.3) {
                                let i = random.random_range(0..b);
                                values[j * dim..(j + 1) * dim].copy_from_slice(&positives[i * dim..(i + 1) * dim]);
                                ids[j] = 1 << 63 | (start + j) as u64;
                            }
                        }
                    });
                    start += rows;
                }
                assert_eq!(start, total);
                check_ranks(backend, &problem, &format!("B {b}, N {n}, D {dim}, separate {separate}"));
            }
        }
    }
}

fn all_zero(values: &[f32]) -> bool {
    values.iter().all(|&v| v == 0.0)
}

pub fn rows_without_negatives_are_absent(backend: Subject<'_>, operands: Operands) {
    for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            // Row 1 excludes every id. Its positive is candidate 3, which is no other row's.
            let config = Config {
                correction,
                similarity,
                masking: Masking::Excluded,
                temperature: 0.5,
                ..Config::new(4, 300, 6)
            };
            let mut problem = config.problem();
            let mut all = problem.pools[0].ids.clone().expect("asked for");
            problem.positives = PositiveData::Index(vec![0, 3, 7, 299]);
            all.sort_unstable();
            all.dedup();
            problem.excluded = Some((vec![0, 0, all.len() as i64, all.len() as i64, all.len() as i64], all.clone()));
            let output = everything(backend, &problem);
            Expected::new(&problem, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
            let statistics = &output.statistics;
            assert_eq!(statistics.num_negatives[1], 0);
            assert_eq!(statistics.lse[1], f64::NEG_INFINITY);
            assert_eq!((output.loss[1], output.probability[1]), (0.0, 1.0));
            let moments = statistics.moments.as_ref().expect("asked for");
            assert_eq!((moments.expected_score[1], moments.entropy[1]), (0.0, 0.0));
            assert!(all_zero(gradients(&output).d_queries.row(1)));
            assert!(all_zero(statistics.expected_negative.as_ref().expect("asked for").row(1)));
            assert!(output.total > 0.0, "the other rows count");

            // No row has a negative: nothing is left.
            let count = all.len() as i64;
            problem.excluded = Some(((0..5).map(|i| i * count).collect(), all.repeat(4)));
            let output = everything(backend, &problem);
            let g = gradients(&output);
            assert_eq!((output.total, g.d_temperature, g.d_log_temperature), (0.0, 0.0, 0.0));
            assert!(all_zero(&g.d_queries.values) && all_zero(&g.d_candidates[0].values), "{correction:?}");
        }
    }
    // A catalogue of the positive alone; and with separate positives.
    for separate in [false, true] {
        let config = Config { separate, masking: Masking::Ids, ..Config::new(1, 1, 3) };
        let mut problem = config.problem();
        problem.positive_ids = separate.then(|| problem.pools[0].ids.clone().expect("asked for"));
        let output = everything(backend, &problem);
        assert_eq!((output.total, output.statistics.lse[0]), (0.0, f64::NEG_INFINITY));
        let g = gradients(&output);
        assert!(all_zero(&g.d_queries.values) && all_zero(&g.d_candidates[0].values));
        assert!(g.d_positive_embeddings.as_ref().is_none_or(|d| all_zero(&d.values)));
    }
}

pub fn rows_of_weight_zero_are_absent(backend: Subject<'_>, operands: Operands) {
    for reduction in [Reduction::Sum, Reduction::Mean, Reduction::WeightedMean] {
        let config = Config { reduction, weights: true, separate: true, ..Config::new(20, 270, 8) };
        let mut problem = config.problem();
        problem.row_weight = Some((0..20).map(|i| if i % 4 == 1 { 0.0 } else { 0.5 + i as f32 }).collect());
        let output = everything(backend, &problem);
        let expected = Expected::new(&problem, operands(DType::F32));
        expected.check(&output).unwrap_or_else(|error| panic!("{error}"));
        // Something else in the rows of weight 0 changes nothing in the gradients of the candidates.
        let mut other = problem.clone();
        other.queries = problem.queries.map(|values| {
            let absent = values.chunks_mut(8).enumerate().filter(|(row, _)| row % 4 == 1);
            absent.for_each(|(_, row)| row.iter_mut().for_each(|x| *x = 5.0 - *x));
        });
        let changed = everything(backend, &other);
        assert_eq!(gradients(&output).d_candidates, gradients(&changed).d_candidates);
        assert_eq!(output.total, changed.total);
        for row in (1..20).step_by(4) {
            assert!(all_zero(gradients(&changed).d_queries.row(row)));
            let d = gradients(&changed).d_positive_embeddings.as_ref().expect("separate");
            assert!(all_zero(d.row(row)));
            assert!(changed.loss[row] > 0.0, "the loss of a row is before weights");
        }
    }
}

/// Every element type; rows that start at multiples of 16 bytes, and others; rows of more than 256 elements.
const NAN_CASES: [(Similarity, DType, usize); 6] = [
    (Similarity::Cosine, DType::F32, 6),
    (Similarity::Dot, DType::F32, 6),
    (Similarity::Cosine, DType::F16, 72),
    (Similarity::Dot, DType::Bf16, 72),
    (Similarity::Dot, DType::F16, 264),
    (Similarity::Cosine, DType::Bf16, 264),
];

pub fn nan_spoils_what_it_touches(backend: Subject<'_>, _: Operands) {
    let (b, n) = (270, 300);
    for (similarity, dtype, d) in NAN_CASES {
        let config = Config {
            similarity,
            dtype,
            temperature: 0.5,
            separate: true,
            masking: Masking::Ids,
            ..Config::new(b, n, d)
        };
        let clean = config.problem();
        let before = everything(backend, &clean);
        let set = |storage: &Storage, row: usize, value: f32| storage.map(|values| values[row * d + 2] = value);
        let same = |a: f64, b: f64| a.to_bits() == b.to_bits();

        // In a query, of any payload: its row, and the gradients of all candidates, which its row has no share in.
        for nan in [f32::NAN, f32::from_bits(0x7fc0_0001), f32::from_bits(0xffff_ffff), f32::INFINITY] {
            let mut problem = clean.clone();
            problem.queries = set(&clean.queries, 130, nan);
            let after = everything(backend, &problem);
            for i in 0..b {
                let (lse, loss) = (after.statistics.lse[i], after.loss[i]);
                if i == 130 {
                    assert!(!lse.is_finite() && !loss.is_finite(), "{similarity:?}, {nan} in a query: {lse}, {loss}");
                    assert!(gradients(&after).d_queries.row(i).iter().any(|d| d.is_nan()));
                } else {
                    assert!(same(lse, before.statistics.lse[i]) && same(loss, before.loss[i]), "row {i}");
                    assert_eq!(gradients(&after).d_queries.row(i), gradients(&before).d_queries.row(i), "row {i}");
                }
            }
            assert!(!after.total.is_finite());
        }

        // In a separate positive: its row's loss, not its lse.
        let mut problem = clean.clone();
        let PositiveData::Separate(embeddings) = &clean.positives else { panic!("separate") };
        problem.positives = PositiveData::Separate(set(embeddings, 7, f32::NAN));
        let after = everything(backend, &problem);
        for i in 0..b {
            assert!(same(after.statistics.lse[i], before.statistics.lse[i]), "row {i}");
            assert_eq!(after.loss[i].is_nan(), i == 7, "row {i}");
            assert_eq!(gradients(&after).d_queries.row(i).iter().any(|d| d.is_nan()), i == 7, "row {i}");
        }

        // In a candidate: every row that has it for a negative, and no other.
        for nan in [f32::NAN, f32::from_bits(0x7fc0_0001)] {
            let mut problem = clean.clone();
            problem.pools[0].candidates = set(&clean.pools[0].candidates, 33, nan);
            let id = clean.pools[0].ids.as_ref().expect("asked for")[33];
            // Some of them masked.
            let positive_ids = problem.positive_ids.as_mut().expect("asked for");
            for i in (0..b).step_by(40) {
                positive_ids[i] = id;
            }
            let masked = |i: usize| problem.positive_ids.as_ref().expect("asked for")[i] == id;
            let after = everything(backend, &problem);
            for i in 0..b {
                assert_eq!(after.statistics.lse[i].is_nan(), !masked(i), "{similarity:?}, row {i}");
                assert_eq!(after.loss[i].is_nan(), !masked(i), "{similarity:?}, row {i}");
                if !masked(i) {
                    assert!(gradients(&after).d_queries.row(i).iter().any(|d| d.is_nan()), "row {i}");
                }
            }
        }
    }
}

/// 0 · NaN enters no sum: not from a row of weight 0, not from a masked pair.
pub fn nan_spoils_nothing_else(backend: Subject<'_>, _: Operands) {
    let (b, n) = (270, 300);
    for (similarity, dtype, d) in NAN_CASES {
        let config = Config {
            similarity,
            dtype,
            temperature: 0.5,
            separate: true,
            masking: Masking::Ids,
            ..Config::new(b, n, d)
        };
        let clean = config.problem();
        let set = |storage: &Storage, row: usize, value: f32| storage.map(|values| values[row * d + 2] = value);
        let ids = clean.pools[0].ids.as_ref().expect("asked for");

        // In the query of a row of weight 0: all but that row stays.
        let mut problem = clean.clone();
        problem.row_weight = Some((0..b).map(|i| if i == 130 { 0.0 } else { 1.0 }).collect());
        let before = everything(backend, &problem);
        problem.queries = set(&clean.queries, 130, f32::NAN);
        let after = everything(backend, &problem);
        assert_eq!(after.total, before.total, "{similarity:?}");
        let same = gradients(&after).d_candidates == gradients(&before).d_candidates;
        assert!(same, "{similarity:?}: a NaN in a query of weight 0 reached the candidates' gradients");
        assert_eq!(gradients(&after).d_temperature, gradients(&before).d_temperature, "{similarity:?}");

        // In a query: what its row masks has no share in it.
        let mut problem = clean.clone();
        problem.queries = set(&clean.queries, 130, f32::NAN);
        problem.positive_ids.as_mut().expect("asked for")[130] = ids[33];
        let after = everything(backend, &problem);
        for (j, id) in ids.iter().enumerate() {
            let finite = gradients(&after).d_candidates[0].row(j).iter().all(|d| d.is_finite());
            assert_eq!(finite, *id == ids[33], "{similarity:?}, candidate {j}");
        }

        // In candidates, early and late in a tile and beyond it: the rows that mask them.
        for candidate in [33, 100, 290] {
            let mut problem = clean.clone();
            let masked = |i: usize| i.is_multiple_of(40);
            let positive_ids = problem.positive_ids.as_mut().expect("asked for");
            for i in (0..b).filter(|&i| masked(i)) {
                positive_ids[i] = ids[candidate];
            }
            let before = everything(backend, &problem);
            problem.pools[0].candidates = set(&clean.pools[0].candidates, candidate, f32::NAN);
            let after = everything(backend, &problem);
            for i in (0..b).filter(|&i| masked(i)) {
                assert_eq!(after.loss[i], before.loss[i], "{similarity:?}, candidate {candidate}, row {i}");
                let [after, before] = [&after, &before].map(|output| gradients(output).d_queries.row(i));
                assert_eq!(after, before, "{similarity:?}, candidate {candidate}, row {i}");
            }
        }
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
