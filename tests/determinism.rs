//! The same inputs give bitwise the same outputs: for any number of threads, again, and with a workspace and an output
//! that other problems have left behind.

use catalog_softmax::{Backend, Correction, Cpu, Request};
use catalog_softmax_testing::bits::{bits, problems, table_problems};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::step::Step;

/// Without a table and with one.
fn all_problems() -> Vec<Problem> {
    problems().into_iter().chain(table_problems()).collect()
}

fn run(cpu: &mut Cpu, problem: &Problem, output: &mut Step) {
    let batch = problem.batch().expect("a valid problem");
    output.compute(cpu, &batch, &problem.loss, request(problem)).expect("a loss that fits");
}

/// Everything; of every other table the rows that have a gradient.
fn request(problem: &Problem) -> Request {
    let everything = Request::value_and_grad().with_moments().with_rank();
    let sparse = problem.table.is_some() && problem.num_pairs().is_multiple_of(2);
    if sparse { everything.row_sparse() } else { everything }
}

fn fresh(problem: &Problem) -> Vec<u64> {
    let mut output = Step::default();
    run(&mut Cpu::new(), problem, &mut output);
    bits(&output)
}

#[test]
fn threads_do_not_matter() {
    for (p, problem) in all_problems().iter().enumerate() {
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
    let problems = all_problems();
    let wanted: Vec<_> = problems.iter().map(fresh).collect();
    // One of NaN leaves NaN in every buffer that it touches.
    let mut poison = Config { separate: true, ..Config::new(600, 1500, 310) }.problem();
    poison.queries = poison.queries.map(|values| values.fill(f32::NAN));
    poison.pools[0].candidates = poison.pools[0].candidates.map(|values| values.fill(f32::NAN));
    let (mut cpu, mut output) = (Cpu::new(), Step::default());
    for shift in 0..5 {
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
    let problems = all_problems();
    let mut output = Step::default();
    let mut cpu = Cpu::new();
    for problem in problems.iter().chain(problems.iter().rev()) {
        run(&mut cpu, problem, &mut output);
        let mut clean = Step::default();
        run(&mut Cpu::new(), problem, &mut clean);
        assert_eq!(output, clean);
        let g = output.gradients.as_ref().expect("asked for");
        for (pool, d) in problem.pools.iter().zip(&g.d_candidates) {
            let own = pool.gradient && pool.rows.is_none();
            assert_eq!(d.values.len(), if own { pool.candidates.len() } else { 0 });
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
        problem.queries = catalog_softmax_testing::problem::Storage::F32(vec![0.5; 512 * 128]);
        problem.positives = catalog_softmax_testing::problem::PositiveData::Index(vec![0; 512]);
        problem.pools[0].candidates = catalog_softmax_testing::problem::Storage::F32(vec![0.5; n * 128]);
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
