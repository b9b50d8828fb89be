//! The same inputs give bitwise the same outputs: for any number of threads, again, and with a workspace and an output
//! that other problems have left behind.

mod common;

use catalog_softmax::{Backend, Correction, Cpu, DType, Output, Request, Similarity};
use common::generate::{Config, Masking};
use common::problem::Problem;

/// Problems of many shapes: several blocks, tiles, splits and pools; separate and indexed positives; every element type.
fn problems() -> Vec<Problem> {
    let base = Config {
        pools: vec![700, 33, 300],
        correction: Correction::LogQ,
        masking: Masking::Excluded,
        weights: true,
        ..Config::new(530, 1, 24)
    };
    vec![
        base.problem(),
        Config { separate: true, dtype: DType::F16, ..base.clone() }.problem(),
        Config { b: 3, dim: 300, dtype: DType::Bf16, similarity: Similarity::Dot, temperature: 2.0, ..base.clone() }
            .problem(),
        Config { b: 1, dim: 1, pools: vec![5000], masking: Masking::None, ..base.clone() }.problem(),
        Config { b: 300, dim: 7, symmetric: true, ..base.clone() }.problem(),
        Config { b: 40, dim: 130, pools: vec![1; 7], frozen: 0b101, correction: Correction::None, ..base }.problem(),
    ]
}

fn run(cpu: &mut Cpu, problem: &Problem, output: &mut Output) {
    let batch = problem.batch().expect("a valid problem");
    let request = Request::value_and_grad().with_moments().with_rank();
    cpu.compute(&batch, &problem.loss, request, output).expect("a loss that fits");
}

/// All of an output as bits: −0 is not 0, and NaN is itself.
fn bits(output: &Output) -> Vec<u64> {
    let statistics = &output.statistics;
    let moments = statistics.moments.as_ref().expect("asked for");
    let rank = statistics.rank.as_ref().expect("asked for");
    let g = output.gradients.as_ref().expect("asked for");
    let doubles = [&output.loss, &output.probability, &statistics.lse, &statistics.positive];
    let doubles = doubles.into_iter().chain([&moments.expected_score, &moments.entropy]).flatten().copied();
    let doubles = doubles.chain([output.total, g.d_temperature, g.d_log_temperature]).map(f64::to_bits);
    let singles = [&g.d_queries, statistics.expected_negative.as_ref().expect("asked for")];
    let singles = singles.into_iter().chain(&g.d_candidates).chain(&g.d_positive_embeddings);
    let singles = singles.flat_map(|matrix| &matrix.values).map(|v| u64::from(v.to_bits()));
    let counts = [&statistics.num_negatives, &rank.above, &rank.ties].into_iter().flatten().copied();
    doubles.chain(singles).chain(counts).collect()
}

fn fresh(problem: &Problem) -> Vec<u64> {
    let mut output = Output::default();
    run(&mut Cpu::new(), problem, &mut output);
    bits(&output)
}

#[test]
fn threads_do_not_matter() {
    for (p, problem) in problems().iter().enumerate() {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
            pool.install(|| fresh(problem))
        };
        let one = on(1);
        assert!(one.len() > 100);
        for threads in [2, 3, 7] {
            assert!(on(threads) == one, "problem {p} on {threads} threads");
        }
    }
}

#[test]
fn nothing_is_left_of_earlier_problems() {
    let problems = problems();
    let wanted: Vec<_> = problems.iter().map(fresh).collect();
    // One of NaN leaves NaN in every buffer that it touches.
    let mut poison = Config { separate: true, ..Config::new(600, 1500, 310) }.problem();
    poison.queries = poison.queries.map(|values| values.fill(f32::NAN));
    poison.pools[0].candidates = poison.pools[0].candidates.map(|values| values.fill(f32::NAN));
    let (mut cpu, mut output) = (Cpu::new(), Output::default());
    for shift in 0..problems.len() {
        for k in 0..problems.len() {
            let p = (k * (shift + 1)) % problems.len();
            if k % 2 == 0 {
                run(&mut cpu, &poison, &mut output);
            }
            run(&mut cpu, &problems[p], &mut output);
            assert!(bits(&output) == wanted[p], "problem {p} after others");
            run(&mut cpu, &problems[p], &mut output);
            assert!(bits(&output) == wanted[p], "problem {p} twice");
        }
    }
}

#[test]
fn an_output_has_the_shape_of_its_last_problem() {
    let problems = problems();
    let mut output = Output::default();
    let mut cpu = Cpu::new();
    for problem in problems.iter().chain(problems.iter().rev()) {
        run(&mut cpu, problem, &mut output);
        let mut clean = Output::default();
        run(&mut Cpu::new(), problem, &mut clean);
        assert_eq!(output, clean);
        let g = output.gradients.as_ref().expect("asked for");
        for (pool, d) in problem.pools.iter().zip(&g.d_candidates) {
            assert_eq!(d.values.len(), if pool.gradient { pool.candidates.len() } else { 0 });
            assert_eq!(d.rows * d.dim, d.values.len());
        }
        assert_eq!(g.d_candidates.len(), problem.pools.len());
    }
}

#[test]
fn the_workspace_does_not_grow_with_the_catalogue() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads start");
    let bytes = |n: usize, request: Request| {
        let mut config = Config { correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(1, 1, 1) };
        let mut problem = config.problem();
        config = Config { b: 512, dim: 128, ..config };
        problem.dim = config.dim;
        problem.queries = common::problem::Storage::F32(vec![0.5; 512 * 128]);
        problem.positives = common::problem::PositiveData::Index(vec![0; 512]);
        problem.pools[0].candidates = common::problem::Storage::F32(vec![0.5; n * 128]);
        problem.pools[0].ids = Some(vec![3; n]);
        problem.pools[0].log_q = Some(vec![-1.0; n]);
        let batch = problem.batch().expect("a valid problem");
        pool.install(|| Cpu::new().plan(&batch, &problem.loss, request)).expect("a loss that fits").workspace_bytes
    };
    let gradients = bytes(100_000, Request::value_and_grad());
    assert!(gradients <= 32 << 20, "{gradients} bytes");
    assert_eq!(gradients, bytes(400_000, Request::value_and_grad()));
    assert_eq!(gradients, bytes(30_000, Request::value_and_grad()));
    let value = bytes(100_000, Request::value());
    assert!(value < gradients, "{value} bytes");
    assert!(gradients < 512 * 100_000 * 4 / 6, "far below the logits");
}
