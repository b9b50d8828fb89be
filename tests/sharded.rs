//! A table in shards against one process that has all of it, with threads as ranks.

use catalog_softmax::sharded::Sharded;
use catalog_softmax::{
    Backend, Correction, Cpu, DType, Gradients, Output, Reference, Request, Result, RowSparse, Similarity,
    TableGradient,
};
use catalog_softmax_testing::generate_tables::{
    CORRECTIONS, FILTERS, FilterKind, PoolKind, PositiveKind, REDUCTIONS, TableConfig, table_configs,
};
use catalog_softmax_testing::problem::{PoolRows, PositiveData, Problem};
use catalog_softmax_testing::shards::{all_steps, check, on_ranks, results, row_sparse, sharded, shards_of};
use catalog_softmax_testing::step::Step;
use catalog_softmax_testing::tolerance::Expected;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

#[path = "sharded/failures.rs"]
mod failures;
#[path = "sharded/gathered.rs"]
mod gathered;
#[path = "sharded/steps.rs"]
mod steps;

/// The largest error in float64, as a share of the terms of an element times the condition of its row: two orders of
/// summation differ by some ε for each term, and ε is 2.2e-16.
const FLOAT64: f64 = 1e-12;

fn everything() -> Request {
    Request::value_and_grad().with_moments().with_rank()
}

fn one_process<B: Backend>(mut backend: B, problem: &Problem) -> Step<B::Real> {
    let mut step = Step::default();
    step.compute(&mut backend, &problem.batch().expect("a batch"), &problem.loss, everything()).expect("a step");
    step
}

/// The reference over shards is the reference, to float64's rounding. Counts are equal.
fn check_reference(problem: &Problem, sizes: &[usize]) -> Result<(), String> {
    let expected = Expected::new(problem, DType::F32);
    let found = sharded(Reference::new, problem, sizes, everything());
    if found.statistics.rank != one_process(Reference::new(), problem).statistics.rank {
        return Err("ranks of positives differ".into());
    }
    let tolerances = |e: &Expected, at: usize| e.scales[at].iter().map(|scale| FLOAT64 * scale.size + 1e-300).collect();
    check(&expected, &results(&found), tolerances)
}

/// The CPU's results over shards agree with the reference as those of one process do.
fn check_cpu(problem: &Problem, sizes: &[usize]) -> Result<(), String> {
    let found = sharded(Cpu::new, problem, sizes, everything());
    if found.statistics.rank != one_process(Cpu::new(), problem).statistics.rank {
        return Err("ranks of positives differ".into());
    }
    check(&Expected::new(problem, DType::F32), &results(&found), |expected, at| expected.tolerances[at].clone())
}

/// Sizes of shards of `rows` rows: equal, uneven, with empty ones at the ends and within, all on one rank.
fn divisions(rows: usize) -> Vec<Vec<usize>> {
    let third = rows / 3;
    vec![
        vec![rows],
        vec![rows / 2, rows - rows / 2],
        vec![1, rows - 1],
        vec![third, rows - 2 * third, third],
        vec![0, rows - third, third],
        vec![third, 0, rows - third],
        vec![third, rows - 2 * third, 0, third],
        vec![0, 0, rows, 0],
    ]
}

#[test]
fn every_combination_of_options_agrees_with_one_process() {
    let pools = [
        (vec![], 5),
        (vec![], 0),
        (vec![PoolKind::Rows(13)], 4),
        (vec![PoolKind::Own(7), PoolKind::Rows(6)], 0),
        (vec![PoolKind::WholeTable, PoolKind::Own(4)], 3),
    ];
    let positives = [PositiveKind::One, PositiveKind::Several, PositiveKind::Separate, PositiveKind::SeveralSeparate];
    let divisions = divisions(23);
    let mut seed = 0;
    for (pools, per_row) in &pools {
        for positives in positives {
            for filter in FILTERS {
                for correction in CORRECTIONS {
                    seed += 1;
                    let config = TableConfig {
                        similarity: if seed % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                        temperature: 0.3,
                        dtype: [DType::F32, DType::F16, DType::Bf16][seed % 3],
                        correction,
                        reduction: REDUCTIONS[seed / 3 % 4],
                        pools: pools.clone(),
                        per_row: *per_row,
                        positives,
                        positive_weight: seed % 5 < 3,
                        filter,
                        excluded: seed % 7 < 4,
                        ids: seed % 11 < 5,
                        weights: seed % 4 < 2,
                        frozen: if seed % 3 == 0 { seed as u32 % 8 } else { 0 },
                        frozen_table: seed % 13 == 0,
                        seed: seed as u64,
                        ..TableConfig::new(9, 23, 6)
                    };
                    let (problem, sizes) = (config.problem(), &divisions[seed % divisions.len()]);
                    check_reference(&problem, sizes).unwrap_or_else(|e| panic!("reference: {e}\n{sizes:?} {config:?}"));
                    check_cpu(&problem, sizes).unwrap_or_else(|e| panic!("cpu: {e}\n{sizes:?} {config:?}"));
                }
            }
        }
    }
}

/// Shards of random sizes, some of them empty.
fn random_division() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(prop_oneof![1 => Just(0u32), 3 => 1..100u32], 1..=4)
}

/// `rows` divided in the proportion of `parts`; all on the first rank where they are 0.
fn divided(rows: usize, parts: &[u32]) -> Vec<usize> {
    let sum: u32 = parts.iter().sum();
    let mut sizes: Vec<usize> = parts.iter().map(|&part| rows * part as usize / sum.max(1) as usize).collect();
    let rest = rows - sizes.iter().sum::<usize>();
    *sizes.iter_mut().max().expect("a rank") += rest;
    sizes
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 48,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(20_261_130),
        ..ProptestConfig::default()
    })]

    #[test]
    fn random_problems_agree_with_one_process(config in table_configs(12, 40, 9), parts in random_division()) {
        let problem = config.problem();
        let sizes = divided(config.rows, &parts);
        prop_assert_eq!(check_reference(&problem, &sizes), Ok(()), "reference, {:?}", sizes);
        prop_assert_eq!(check_cpu(&problem, &sizes), Ok(()), "cpu, {:?}", sizes);
    }
}

/// Several tiles of queries and candidates, all kinds of candidates.
fn large() -> TableConfig {
    TableConfig {
        pools: vec![PoolKind::Rows(700), PoolKind::WholeTable, PoolKind::Own(33)],
        per_row: 20,
        positives: PositiveKind::Several,
        correction: Correction::LogQ,
        filter: FilterKind::MarginAbove,
        excluded: true,
        weights: true,
        ..TableConfig::new(300, 2_000, 24)
    }
}

#[test]
fn several_tiles_agree_with_one_process() {
    let problem = large().problem();
    check_cpu(&problem, &[700, 0, 1_299, 1]).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn one_rank_is_one_process_bit_for_bit() {
    let config = TableConfig { pools: vec![PoolKind::Rows(50), PoolKind::Own(7)], ..TableConfig::new(20, 60, 8) };
    let problem = TableConfig { positives: PositiveKind::SeveralSeparate, ..config }.problem();
    let (mut one, found) = (one_process(Cpu::new(), &problem), sharded(Cpu::new, &problem, &[60], everything()));
    one.statistics.expected_negative = None;
    assert_eq!(one, found);
}

#[test]
fn results_repeat_bit_for_bit() {
    let problem = large().problem();
    let sizes = [900, 300, 800];
    assert_eq!(sharded(Cpu::new, &problem, &sizes, everything()), sharded(Cpu::new, &problem, &sizes, everything()));
}

/// Rows whose positives and negatives all live on another rank, and a rank that has no part in the step.
#[test]
fn a_rank_may_have_nothing_of_a_step() {
    let config = TableConfig { pools: vec![PoolKind::Rows(8)], ..TableConfig::new(5, 12, 4) };
    let mut problem = config.problem();
    let (positives, candidates) = (vec![1, 0, 2, 11, 10], vec![9, 10, 11, 9, 0, 1, 2, 3]);
    problem.positives = PositiveData::Index(positives);
    problem.pools[0].rows = Some(PoolRows::These(candidates));
    check_reference(&problem, &[4, 5, 3]).unwrap_or_else(|error| panic!("{error}"));
    check_cpu(&problem, &[4, 5, 3]).unwrap_or_else(|error| panic!("{error}"));
    // The same with a correction: the idle rank's batch needs a log_q, too.
    let mut problem = TableConfig { correction: Correction::LogQ, ..config }.problem();
    problem.pools[0].rows = Some(PoolRows::These(vec![9, 10, 11, 9, 0, 1, 2, 3]));
    check_cpu(&problem, &[4, 5, 3]).unwrap_or_else(|error| panic!("{error}"));
}

/// The parts of a row-sparse gradient, as one.
fn row_sparse_parts(problem: &Problem, sizes: &[usize]) -> RowSparse {
    let steps = all_steps(&Cpu::new, problem, sizes, Request::value_and_grad().row_sparse());
    let part = |step: Result<Step>| match step.expect("a step").gradients.expect("asked for").d_table {
        Some(TableGradient::RowSparse(part)) => part,
        other => panic!("{other:?}"),
    };
    row_sparse(problem.dim, sizes, &steps.into_iter().map(part).collect::<Vec<_>>())
}

#[test]
fn row_sparse_gradients_are_the_dense_ones_rows() {
    let pools = [(vec![PoolKind::Rows(30)], 3), (vec![PoolKind::WholeTable], 0), (vec![], 4)];
    for (pools, per_row) in pools {
        let positives = PositiveKind::Several;
        let problem = TableConfig { pools, per_row, positives, ..TableConfig::new(14, 50, 6) }.problem();
        let sizes = [20, 0, 17, 13];
        let sparse = row_sparse_parts(&problem, &sizes);
        let mut one = Step::default();
        let request = Request::value_and_grad().row_sparse();
        one.compute(&mut Cpu::new(), &problem.batch().expect("a batch"), &problem.loss, request).expect("a step");
        let of_one = one.gradients.as_ref().and_then(|gradients| gradients.d_table.as_ref()).expect("asked for");
        assert_eq!(sparse.rows, of_one.row_sparse().expect("asked for").rows);
        let dense = sharded(Cpu::new, &problem, &sizes, everything());
        let dense = dense.gradients.as_ref().and_then(|gradients| gradients.d_table.as_ref()?.dense()).expect("dense");
        for row in 0..problem.table_rows() {
            match sparse.rows.binary_search(&(row as u32)) {
                Ok(place) => assert_eq!(dense.row(row), sparse.values.row(place), "row {row}"),
                Err(_) => assert!(dense.row(row).iter().all(|&d| d == 0.0), "row {row}"),
            }
        }
    }
}

#[test]
fn accumulated_gradients_are_sums() {
    for positives in [PositiveKind::Several, PositiveKind::Separate] {
        for row_sparse in [false, true] {
            let pools = vec![PoolKind::Rows(20), PoolKind::Own(6)];
            let problem = TableConfig { pools, positives, ..TableConfig::new(8, 30, 5) }.problem();
            let request = Request::value_and_grad();
            let request = if row_sparse { request.row_sparse() } else { request };
            let twice = on_ranks(&shards_of(&problem, &[11, 0, 19]), |threads, shard| -> Result<_> {
                let (batch, mut output) = (problem.update_batch()?, Output::default());
                let mut sharded = Sharded::new(Cpu::new(), threads, shard.len() / problem.dim)?;
                let (shard, loss, mut once) = (shard.view(problem.dim), &problem.loss, Gradients::default());
                sharded.compute(&batch, shard, loss, request, &mut output, Some(&mut once))?;
                let mut twice = once.clone();
                sharded.compute(&batch, shard, loss, request.accumulate(), &mut output, Some(&mut twice))?;
                Ok((once, twice))
            });
            for (rank, both) in twice.into_iter().enumerate() {
                let (once, twice) = both.expect("two steps");
                let numbers = |gradients| results(&Step::from((Output::default(), gradients)));
                let row_sparse = |g: &Gradients| Some(g.d_table.as_ref()?.row_sparse()?.values.values.clone());
                let (of_once, of_twice) = (row_sparse(&once), row_sparse(&twice));
                // The positives' part is added in another place: one rounding more.
                let near = |a: f64, b: f64| (2.0 * a - b).abs() <= 1e-6 * a.abs().max(1e-2);
                for (a, b) in numbers(once).iter().zip(&numbers(twice)) {
                    assert_eq!((&a.name, a.values.len()), (&b.name, b.values.len()));
                    let doubled = a.values.iter().zip(&b.values).all(|(&a, &b)| near(a, b));
                    assert!(doubled, "rank {rank}: {} {:?} {:?}", a.name, a.values, b.values);
                }
                let (of_once, of_twice) = (of_once.unwrap_or_default(), of_twice.unwrap_or_default());
                assert_eq!(of_once.len(), of_twice.len());
                assert!(of_once.iter().zip(&of_twice).all(|(&a, &b)| near(a.into(), b.into())));
            }
        }
    }
}

/// The numbers that the documentation of `Sharded` promises, and 8 bytes a fingerprint.
#[test]
fn ranks_exchange_as_many_bytes_as_documented() {
    let (b, m, d) = (16, 4_000, 12);
    for (positives, rows) in [(PositiveKind::One, m), (PositiveKind::One, m / 4), (PositiveKind::Several, m)] {
        let problem = TableConfig { positives, dtype: DType::Bf16, ..TableConfig::new(b, rows, d) }.problem();
        let (batch, p) = (problem.update_batch().expect("a batch"), problem.num_pairs());
        let sizes = [rows / 2, rows / 4, rows / 4];
        let sent = on_ranks(&shards_of(&problem, &sizes), |threads, shard| -> Result<_> {
            let mut sharded = Sharded::new(Cpu::new(), threads, shard.len() / d)?;
            let before = sharded.collective().bytes_sent();
            sharded.value_and_grad(&batch, shard.view(d), &problem.loss)?;
            Ok(sharded.collective().bytes_sent() - before)
        });
        for (rank, sent) in sent.into_iter().enumerate() {
            let (home, most) = (if rank == 0 { 8 * p } else { 0 }, 128);
            let documented = 4 * p * d + 2 * 8 * b + home + 4 * b * d;
            let sent = sent.expect("a step") as usize;
            assert!((documented..=documented + most).contains(&sent), "{documented} documented, {sent} sent");
        }
    }
}
