//! The judge of `replay` and of the golden batches: what is right passes, and nothing that is wrong does, whether it
//! was found, is expected, or both.

use catalog_softmax::{Backend, Correction, Cpu, DType, Reduction, Reference, Similarity};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use safetensors::Dtype;

use catalog_softmax_testing::formulas::scores;
use catalog_softmax_testing::generate::{Config, LogQ, Masking};
use catalog_softmax_testing::golden::{Expected, Golden, RESULTS, Tensor};
use catalog_softmax_testing::golden_check::{Judge, Precision, Results, Verdict, judge, results};
use catalog_softmax_testing::golden_files::to_bytes;
use catalog_softmax_testing::naive::naive;
use catalog_softmax_testing::problem::{PositiveData, Problem, Storage};

#[path = "judge/spoils.rs"]
mod spoils;
use spoils::Units;

/// What `Cpu` is held to.
const CPU: Precision = Precision::Single { operands: DType::F32 };

#[test]
fn right_batches_of_any_options_pass() {
    for seed in 0..150 {
        let mut rng = StdRng::seed_from_u64(seed);
        let problem = random_problem(&mut rng);
        let right = on(&mut Reference::new(), &problem);
        let names: Vec<_> = right.keys().copied().filter(|_| rng.random_bool(0.6)).collect();
        let dtype = if rng.random_bool(0.5) { Dtype::F64 } else { Dtype::F32 };
        let on_cpu = on(&mut Cpu::new(), &problem);
        let expected = expect(&right, &names, dtype);
        for expected in [expected, naive_results(&problem)] {
            let golden = through_a_file(Golden { problem: problem.clone(), expected });
            for (found, precision) in [(&on_cpu, CPU), (&right, Precision::Float64)] {
                let bad = bad(judge(&golden, found, precision));
                assert!(bad.is_empty(), "seed {seed}, {precision:?}: {bad:#?} of {:?}", golden.problem.loss);
            }
        }
    }
}

/// Small, of random options, with rows of any length.
fn random_problem(rng: &mut StdRng) -> Problem {
    let pick = |rng: &mut StdRng, values: &[f64]| *values.choose(rng).expect("some");
    let dtype = *[DType::F32, DType::F16, DType::Bf16].choose(rng).expect("some");
    let similarity = *[Similarity::Cosine, Similarity::Dot].choose(rng).expect("some");
    let corrections = [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ];
    let reductions = [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean];
    let temperatures: &[f64] = match similarity {
        Similarity::Cosine => &[0.001, 0.01, 0.05, 0.2, 1.0, 7.0],
        _ => &[0.1, 0.5, 1.0, 3.0],
    };
    let config = Config {
        dtype,
        similarity,
        temperature: pick(rng, temperatures),
        correction: *corrections.choose(rng).expect("some"),
        reduction: *reductions.choose(rng).expect("some"),
        symmetric: rng.random_bool(0.15),
        separate: rng.random_bool(0.5),
        masking: *[Masking::None, Masking::Ids, Masking::Excluded].choose(rng).expect("some"),
        log_q: *[LogQ::OrderOne, LogQ::Realistic].choose(rng).expect("some"),
        weights: rng.random_bool(0.5),
        seed: rng.random(),
        ..Config::new(rng.random_range(1..20), rng.random_range(1..40), rng.random_range(1..24))
    };
    let mut problem = config.problem();
    // What the lengths of rows are lets a cosine's scores alone, and f16 holds a part of them.
    let lengths: &[f64] = match (similarity, dtype) {
        (Similarity::Cosine, DType::F16) => &[0.01, 1.0, 100.0],
        (Similarity::Cosine, _) => &[1e-6, 1e-3, 1.0, 1e3, 1e6],
        _ => &[0.3, 1.0, 3.0],
    };
    let (of_queries, of_candidates) = (pick(rng, lengths) as f32, pick(rng, lengths) as f32);
    problem.queries = problem.queries.map(|values| values.iter_mut().for_each(|x| *x *= of_queries));
    let pool = &mut problem.pools[0];
    pool.candidates = pool.candidates.map(|values| values.iter_mut().for_each(|x| *x *= of_candidates));
    problem
}

/// A cross-entropy over all logits is a loss, too, though it rounds what a softplus of the margin does not.
#[test]
fn an_expectation_by_cross_entropy_passes() {
    for (temperature, dtype) in [(0.01, Dtype::F64), (0.05, Dtype::F64), (0.01, Dtype::F32), (0.05, Dtype::F32)] {
        let mut problem = Config { temperature, ..Config::new(30, 50, 8) }.problem();
        // Positives that are their queries: losses down to exp(−1 / temperature).
        let PositiveData::Index(positives) = problem.positives.clone() else { panic!("asked for") };
        let (queries, d) = (problem.queries.to_f32(), problem.dim);
        problem.pools[0].candidates = problem.pools[0].candidates.map(|values| {
            for (i, &j) in positives.iter().enumerate() {
                values[j as usize * d..(j as usize + 1) * d].copy_from_slice(&queries[i * d..(i + 1) * d]);
            }
        });
        let right = on(&mut Reference::new(), &problem);
        let (z, _) = scores(&problem);
        let loss = |(i, z): (usize, &[f64])| {
            let positive = right["positive"].values[i];
            let logits = z.iter().chain([&positive]);
            if dtype == Dtype::F32 { cross_entropy_f32(logits, positive) } else { cross_entropy(logits, positive) }
        };
        let mut expected = expect(&right, &["loss"], dtype);
        let values: Vec<f64> = z.chunks(problem.num_candidates()).enumerate().map(loss).collect();
        assert!(values != expected["loss"].values, "a case for the test");
        expected.get_mut("loss").expect("asked for").values = values;
        let golden = Golden { problem, expected };
        let on_cpu = on(&mut Cpu::new(), &golden.problem);
        for (found, precision) in [(&on_cpu, CPU), (&right, Precision::Float64)] {
            let bad = bad(judge(&golden, found, precision));
            assert!(bad.is_empty(), "{temperature}, {dtype:?}, {precision:?}: {bad:#?}");
        }
    }
}

fn cross_entropy<'a>(logits: impl Iterator<Item = &'a f64> + Clone, positive: f64) -> f64 {
    let max = logits.clone().fold(f64::NEG_INFINITY, |max, &z| max.max(z));
    max + logits.map(|z| (z - max).exp()).sum::<f64>().ln() - positive
}

fn cross_entropy_f32<'a>(logits: impl Iterator<Item = &'a f64> + Clone, positive: f64) -> f64 {
    let max = logits.clone().fold(f32::NEG_INFINITY, |max, &z| max.max(z as f32));
    f64::from(max + logits.map(|&z| (z as f32 - max).exp()).sum::<f32>().ln() - positive as f32)
}

#[test]
fn a_step_that_adds_log_q_is_bad() {
    let problem = Config { correction: Correction::LogQ, temperature: 0.05, ..Config::new(64, 64, 16) }.problem();
    let mut wrong = problem.clone();
    wrong.pools[0].log_q.as_mut().expect("asked for").iter_mut().for_each(|log_q| *log_q = -*log_q);
    let wrong = on(&mut Reference::new(), &wrong);
    let names = ["loss", "total", "lse", "d_queries", "d_candidates", "d_temperature"];
    assert_eq!(judged_bad(problem, expect(&wrong, &names, Dtype::F64)), in_order(&names));
}

#[test]
fn gradients_of_zeros_a_wrong_total_and_nan_are_bad() {
    let problem = Config { temperature: 0.05, ..Config::new(4, 9, 5) }.problem();
    let right = on(&mut Reference::new(), &problem);
    type Spoil = fn(f64) -> f64;
    let cases: [(&'static str, Spoil); 6] = [
        ("d_queries", |_| 0.0),
        ("d_candidates", |_| 0.0),
        ("total", |_| 99.0),
        ("total", |_| f64::NAN),
        ("loss", |_| f64::INFINITY),
        ("lse", |lse| -lse),
    ];
    for (name, spoil) in cases {
        for dtype in [Dtype::F64, Dtype::F32] {
            let mut expected = expect(&right, &[name], dtype);
            expected.get_mut(name).expect("asked for").values.iter_mut().for_each(|value| *value = spoil(*value));
            assert_eq!(judged_bad(problem.clone(), expected), [name], "{dtype:?}");
        }
    }
}

/// A gradient along the only direction there is: the cosine's chain rule takes all of it.
#[test]
fn a_gradient_that_cancels_has_the_tolerance_of_what_cancels() {
    let problem = Config::new(9, 70, 1).problem();
    let golden = Golden { expected: Expected::new(), problem };
    let found = on(&mut Cpu::new(), &golden.problem);
    let judge = Judge::new(&golden.problem, CPU);
    let right = on(&mut Reference::new(), &golden.problem);
    for name in ["d_queries", "d_candidates"] {
        let mut expected = expect(&right, &[name], Dtype::F64);
        assert!(judge.judge(&expected, &found)[0].passes());
        let uncancelled = Units::new(&golden.problem, &right).of(name, 0);
        expected.get_mut(name).expect("asked for").values[0] += 1e-4 * uncancelled;
        assert!(!judge.judge(&expected, &found)[0].passes(), "{name}: {uncancelled}");
    }
}

/// Squares of such lengths are too large for f32: the baseline's cosines are all 0, and its error is no measure.
#[test]
fn a_baseline_that_breaks_down_excuses_nothing() {
    let mut problem = Config::new(12, 30, 8).problem();
    problem.queries = problem.queries.map(|values| values.iter_mut().for_each(|x| *x *= 1e25));
    let (right, on_cpu) = (on(&mut Reference::new(), &problem), on(&mut Cpu::new(), &problem));
    let baseline = naive(&problem, false);
    assert!((baseline.loss[0] as f64 / right["loss"].values[0] - 1.0).abs() > 0.1, "a case for the test");
    let judge = Judge::new(&problem, CPU);
    for &name in right.keys().filter(|&&name| name != "num_negatives") {
        let mut expected = expect(&right, &[name], Dtype::F64);
        assert!(judge.judge(&expected, &on_cpu)[0].passes(), "{name}");
        let values = &mut expected.get_mut(name).expect("asked for").values;
        let largest = (0..values.len()).max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs())).expect("some");
        values[largest] *= 1.01;
        assert!(!judge.judge(&expected, &on_cpu)[0].passes(), "{name}");
    }
}

/// A probability of exp(−742) is no normal number: what is left of it is another implementation's to choose.
#[test]
fn what_underflows_in_float64_may_be_zero() {
    let (problem, right) = by_dot_of_single_numbers(&[0.0, 742.0]);
    let gradient = right["d_candidates"].values[0];
    assert!(gradient > 0.0 && gradient < f64::MIN_POSITIVE, "a case for the test: {gradient:e}");
    passes_as_d_candidate(&problem, &right, &[(0.0, true), (1e-300, false)]);
}

/// PyTorch's softplus of a margin above 20 is the margin, and its derivative is 1.
#[test]
fn a_softplus_that_stops_at_20_passes() {
    let (problem, right) = by_dot_of_single_numbers(&[20.2]);
    let gradient = right["d_candidates"].values[0];
    assert!(1.0 - gradient > 1.5e-9, "a case for the test: {gradient}");
    passes_as_d_candidate(&problem, &right, &[(1.0, true), (1.0 + 1e-8, false)]);
    // Below 20 it is exact.
    let (problem, right) = by_dot_of_single_numbers(&[19.9]);
    passes_as_d_candidate(&problem, &right, &[(1.0, false)]);
}

/// One query, 1, with a positive, 0: scores are the candidates themselves.
fn by_dot_of_single_numbers(candidates: &[f32]) -> (Problem, Results) {
    let row = |values: &[f32]| Storage::new(values, DType::F32);
    let config = Config { separate: true, similarity: Similarity::Dot, temperature: 1.0, ..Config::new(1, 1, 1) };
    let mut problem = config.problem();
    problem.queries = row(&[1.0]);
    problem.pools[0].candidates = row(candidates);
    problem.positives = PositiveData::Separate(row(&[0.0]));
    let right = on(&mut Reference::new(), &problem);
    (problem, right)
}

/// Whether values pass as the expected gradient of the first candidate's only element.
fn passes_as_d_candidate(problem: &Problem, right: &Results, values: &[(f64, bool)]) {
    let mut expected = expect(right, &["d_candidates"], Dtype::F64);
    let judge = Judge::new(problem, Precision::Float64);
    for &(value, passes) in values {
        expected.get_mut("d_candidates").expect("asked for").values[0] = value;
        assert_eq!(judge.judge(&expected, right)[0].passes(), passes, "{value:e}");
    }
}

/// The right value of a row that touches a NaN is NaN: a number there is as wrong as NaN is elsewhere.
#[test]
fn nan_is_right_where_the_reference_says_so() {
    let mut problem = Config { masking: Masking::Ids, weights: true, ..Config::new(6, 12, 4) }.problem();
    problem.queries = problem.queries.map(|values| values[2 * 4] = f32::NAN);
    for weight in [1.0, 0.0] {
        problem.row_weight.as_mut().expect("asked for")[2] = weight;
        let right = on(&mut Reference::new(), &problem);
        let names: Vec<_> = right.keys().copied().collect();
        let golden = Golden { expected: expect(&right, &names, Dtype::F64), problem: problem.clone() };
        let found = on(&mut Cpu::new(), &problem);
        let bad = bad(judge(&golden, &found, CPU));
        assert!(bad.is_empty(), "weight {weight}: {bad:#?}");
        assert!(right["loss"].values[2].is_nan() && right["total"].values[0].is_nan() == (weight == 1.0));
        for (row, value) in [(2, 1.0), (3, f64::NAN)] {
            let mut expected = golden.expected.clone();
            expected.get_mut("loss").expect("there").values[row] = value;
            assert_eq!(judged_bad(problem.clone(), expected), ["loss"], "weight {weight}, row {row}");
        }
    }
}

#[test]
fn a_result_that_is_not_there_is_bad() {
    let problem = Config::new(4, 9, 5).problem();
    let right = on(&mut Reference::new(), &problem);
    let names: Vec<_> = right.keys().copied().collect();
    let golden = Golden { expected: expect(&right, &names, Dtype::F64), problem };
    for &name in &names {
        let mut found = right.clone();
        found.remove(name);
        assert_eq!(bad_names(judge(&golden, &found, Precision::Float64)), [name]);
    }
    // This problem has no such gradient, so that nobody can be right about it.
    let none = Tensor { values: vec![f64::NAN; 20], ..right["d_queries"].clone() };
    let golden = Golden { expected: Expected::from([("d_positive_embeddings", none.clone())]), ..golden };
    let found = Results::from([("d_positive_embeddings", none)]);
    assert_eq!(bad_names(judge(&golden, &found, CPU)), ["d_positive_embeddings"]);
    assert!(Golden::from_bytes(&to_bytes(&golden).expect("a file")).is_err(), "such a file is refused");
}

#[test]
fn a_tolerance_of_the_user_is_a_share_of_what_an_element_is_made_of() {
    let problem = Config::new(4, 9, 5).problem();
    let right = on(&mut Reference::new(), &problem);
    let mut expected = expect(&right, &["total"], Dtype::F64);
    expected.get_mut("total").expect("asked for").values[0] *= 1.01;
    let golden = Golden { problem, expected };
    assert_eq!(bad_names(judge(&golden, &right, Precision::Within(1e-3))), ["total"]);
    assert_eq!(bad_names(judge(&golden, &right, Precision::Within(1e-1))), [""; 0]);
}

fn on<B: Backend>(backend: &mut B, problem: &Problem) -> Results {
    let batch = problem.batch().expect("a valid problem");
    results(&backend.value_and_grad(&batch, &problem.loss).expect("a loss that fits").into())
}

/// Some of the results as what a file expects, stored as `dtype` where they are no counts.
fn expect(results: &Results, names: &[&'static str], dtype: Dtype) -> Expected {
    let stored = |tensor: &Tensor| {
        let round = |&value: &f64| if dtype == Dtype::F32 { f64::from(value as f32) } else { value };
        match tensor.dtype {
            Dtype::I64 => tensor.clone(),
            _ => Tensor { values: tensor.values.iter().map(round).collect(), dtype, ..tensor.clone() },
        }
    };
    names.iter().map(|&name| (name, stored(&results[name]))).collect()
}

/// What an honest training loop in f32 saves.
fn naive_results(problem: &Problem) -> Expected {
    if problem.loss.symmetric {
        return Expected::new();
    }
    let found = naive(problem, true);
    let (b, d) = (problem.num_queries(), problem.dim);
    let wide = |values: &[f32], shape: &[usize]| Tensor {
        values: values.iter().map(|&value| f64::from(value)).collect(),
        shape: shape.to_vec(),
        dtype: Dtype::F32,
    };
    Expected::from([
        ("loss", wide(&found.loss, &[b])),
        ("total", wide(&[found.total], &[1])),
        ("lse", wide(&found.lse, &[b])),
        ("positive", wide(&found.positive, &[b])),
        ("d_queries", wide(&found.d_queries, &[b, d])),
        ("d_candidates", wide(&found.d_candidates, &[problem.num_candidates(), d])),
        ("d_temperature", wide(&[found.d_temperature], &[1])),
    ])
}

fn through_a_file(golden: Golden) -> Golden {
    let bytes = to_bytes(&golden).expect("a file");
    let again = Golden::from_bytes(&bytes).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(format!("{:?}", again.problem), format!("{:?}", golden.problem));
    again
}

/// What is bad on the CPU backend, once the batch went through a file.
fn judged_bad(problem: Problem, expected: Expected) -> Vec<&'static str> {
    let golden = through_a_file(Golden { problem, expected });
    let found = on(&mut Cpu::new(), &golden.problem);
    let verdicts = judge(&golden, &found, CPU);
    assert!(verdicts.iter().all(|verdict| verdict.found.passes()), "{verdicts:#?}");
    bad_names(verdicts)
}

fn bad(verdicts: Vec<Verdict>) -> Vec<Verdict> {
    verdicts.into_iter().filter(|verdict| !verdict.passes()).collect()
}

fn bad_names(verdicts: Vec<Verdict>) -> Vec<&'static str> {
    bad(verdicts).into_iter().map(|verdict| verdict.name).collect()
}

fn in_order(names: &[&'static str]) -> Vec<&'static str> {
    RESULTS.into_iter().filter(|name| names.contains(name)).collect()
}
