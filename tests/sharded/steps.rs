//! Searches and the optimiser's steps over shards.

use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::sharded::Sharded;
use catalog_softmax::{
    Backend, Cpu, DType, Error, Gradients, Ids, Output, Pool, Reference, Request, Result, Search, Similarity, TopK,
};
use catalog_softmax_testing::generate_tables::{PositiveKind, TableConfig};
use catalog_softmax_testing::problem::{Problem, Storage};

use catalog_softmax_testing::shards::{on_ranks, shards_of};

/// A table with repeated rows, so that scores tie within shards and across them.
fn problem(dtype: DType) -> Problem {
    TableConfig { dtype, ..TableConfig::new(7, 60, 5) }.problem()
}

/// Offsets and ids of what each query must not return.
type Excluded = (Vec<i64>, Vec<u64>);

fn over_shards<B: Backend>(
    backend: &(impl Fn() -> B + Sync),
    problem: &Problem,
    excluded: Option<&Excluded>,
    sizes: &[usize],
    k: usize,
) -> Vec<Result<TopK<B::Real>>> {
    on_ranks(&shards_of(problem, sizes), |threads, shard| {
        let mut sharded = Sharded::new(backend(), threads, shard.len() / problem.dim)?;
        let excluded = excluded.map(|(offsets, ids)| (offsets.as_slice(), Ids::from(ids)));
        let queries = problem.queries.view(problem.dim);
        sharded.top_k(queries, shard.view(problem.dim), excluded, Similarity::Cosine, k)
    })
}

fn in_one<B: Backend>(mut backend: B, problem: &Problem, excluded: Option<&Excluded>, k: usize) -> TopK<B::Real> {
    let table = &problem.table.as_ref().expect("a table").embeddings;
    let rows: Vec<u64> = (0..problem.table_rows() as u64).collect();
    let pool = Pool::new(table.view(problem.dim)).ids(&rows);
    let mut search = Search::builder(problem.queries.view(problem.dim), pool);
    if let Some((offsets, ids)) = excluded {
        search = search.excluded_ids(offsets, ids);
    }
    backend.top_k(&search.build().expect("a search"), Similarity::Cosine, k).expect("lists")
}

fn lists_agree<B: Backend>(backend: impl Fn() -> B + Sync) {
    for dtype in [DType::F32, DType::Bf16] {
        let problem = problem(dtype);
        let excluded = ((0..=7).map(|row| 3 * row).collect(), (0..21).map(|i| i * 17 % 60).collect());
        for sizes in [vec![60], vec![20, 40], vec![3, 0, 57], vec![30, 9, 21, 0]] {
            for k in [1, 10, 60] {
                for excluded in [None, Some(&excluded)] {
                    let expected = in_one(backend(), &problem, excluded, k);
                    for found in over_shards(&backend, &problem, excluded, &sizes, k) {
                        assert_eq!(found.as_ref(), Ok(&expected), "{sizes:?}, k {k}");
                    }
                }
            }
        }
    }
}

#[test]
fn lists_over_shards_are_those_of_one_process() {
    lists_agree(Reference::new);
    lists_agree(Cpu::new);
}

#[test]
fn lists_longer_than_the_table_are_refused() {
    for found in over_shards(&Cpu::new, &problem(DType::F32), None, &[30, 30], 61) {
        assert!(matches!(found, Err(Error::Value { ref argument, .. }) if argument == "k"), "{found:?}");
    }
}

fn table_mut(table: &mut Storage, rows: usize, dim: usize) -> TableMut<'_> {
    match table {
        Storage::F32(values) => TableMut::new(values, rows, dim),
        Storage::F16(values) => TableMut::new(values, rows, dim),
        Storage::Bf16(values) => TableMut::new(values, rows, dim),
    }
}

/// A rule for a table of that many rows.
type Rule = fn(usize, usize) -> Result<Optimizer>;

/// Each rank's shard after an update.
fn updated(problem: &Problem, sizes: &[usize], rule: Rule) -> Vec<f32> {
    let shards = on_ranks(&shards_of(problem, sizes), |threads, shard| -> Result<_> {
        let (mut shard, rows) = (shard.clone(), shard.len() / problem.dim);
        let mut sharded = Sharded::new(Cpu::new(), threads, rows)?;
        let mut optimizer = if rows == 0 { Optimizer::sgd(0.1)? } else { rule(rows, problem.dim)? };
        let (mut output, mut gradients, batch) = (Output::default(), Gradients::default(), problem.update_batch()?);
        for _step in 0..2 {
            let mut view = table_mut(&mut shard, rows, problem.dim);
            let (loss, request) = (&problem.loss, Request::value_and_grad());
            sharded.update(&batch, loss, request, &mut view, &mut optimizer, &mut output, &mut gradients)?;
        }
        assert_eq!((gradients.d_table, optimizer.steps()), (None, if rows == 0 { 0 } else { 2 }));
        Ok(shard.to_f32())
    });
    shards.into_iter().flat_map(|shard| shard.expect("two steps")).collect()
}

/// The gradient over shards, then the step on the shard.
fn gradient_then_step(problem: &Problem, sizes: &[usize], rule: Rule) -> Vec<f32> {
    let whole = problem.pools.iter().any(|pool| pool.rows.is_some() && pool.gradient);
    let shards = on_ranks(&shards_of(problem, sizes), |threads, shard| -> Result<_> {
        let (mut shard, rows) = (shard.clone(), shard.len() / problem.dim);
        let mut sharded = Sharded::new(Cpu::new(), threads, rows)?;
        let mut optimizer = if rows == 0 { Optimizer::sgd(0.1)? } else { rule(rows, problem.dim)? };
        let batch = problem.update_batch()?;
        let request = if whole { Request::value_and_grad() } else { Request::value_and_grad().row_sparse() };
        for _step in 0..2 {
            let (mut output, mut gradients) = (Output::default(), Gradients::default());
            let view = shard.view(problem.dim);
            sharded.compute(&batch, view, &problem.loss, request, &mut output, Some(&mut gradients))?;
            let d_table = gradients.d_table.expect("a gradient");
            let mut view = table_mut(&mut shard, rows, problem.dim);
            match (d_table.dense(), d_table.row_sparse()) {
                _ if rows == 0 => {}
                (Some(dense), _) => optimizer.step(&mut view, dense)?,
                (None, Some(sparse)) => optimizer.step_rows(&mut view, &sparse.rows, &sparse.values)?,
                (None, None) => unreachable!("one of two"),
            }
        }
        Ok(shard.to_f32())
    });
    shards.into_iter().flat_map(|shard| shard.expect("two steps")).collect()
}

#[test]
fn an_update_is_the_gradient_and_then_the_step() {
    let rules: [Rule; 3] = [
        |_, _| Optimizer::sgd(0.1),
        |rows, _| Optimizer::row_adagrad(rows, 0.1),
        |rows, dim| Optimizer::adam(rows, dim, 0.01).and_then(|adam| adam.with_weight_decay(0.1)),
    ];
    for per_row in [0, 6] {
        for dtype in [DType::F32, DType::Bf16] {
            let positives = PositiveKind::Several;
            let config = TableConfig { per_row, dtype, positives, ..TableConfig::new(9, 40, 6) };
            let problem = config.problem();
            for rule in rules {
                for sizes in [[40, 0, 0], [12, 0, 28], [13, 20, 7]] {
                    let stepped = updated(&problem, &sizes, rule);
                    assert_eq!(stepped, gradient_then_step(&problem, &sizes, rule), "{sizes:?} {config:?}");
                    assert_ne!(stepped, problem.table.as_ref().expect("a table").embeddings.to_f32());
                }
            }
        }
    }
}

/// Plain gradient descent on a table in f32 is that of one process, up to the gradient's rounding.
#[test]
fn updated_shards_are_the_updated_table() {
    let problem = TableConfig { positives: PositiveKind::Several, ..TableConfig::new(9, 40, 6) }.problem();
    let mut one = problem.table.as_ref().expect("a table").embeddings.clone();
    let mut sgd = Optimizer::sgd(0.1).expect("a rate");
    for _step in 0..2 {
        let (mut output, mut gradients) = (Output::default(), Gradients::default());
        let (batch, mut view) = (problem.update_batch().expect("a batch"), table_mut(&mut one, 40, 6));
        let (loss, request) = (&problem.loss, Request::value_and_grad());
        Cpu::new().update(&batch, loss, request, &mut view, &mut sgd, &mut output, &mut gradients).expect("a step");
    }
    let found = updated(&problem, &[13, 20, 7], |_, _| Optimizer::sgd(0.1));
    for (one, found) in one.to_f32().iter().zip(found) {
        assert!((one - found).abs() <= 16.0 * f32::EPSILON * one.abs().max(1.0), "{one} {found}");
    }
}

#[test]
fn an_update_of_bad_input_steps_no_rank() {
    let problem = TableConfig::new(4, 10, 3).problem();
    let found = on_ranks(&shards_of(&problem, &[4, 6]), |threads, shard| -> Result<(Vec<f32>, Result<()>)> {
        let (mut shard, rows) = (shard.clone(), shard.len() / 3);
        let mut sharded = Sharded::new(Cpu::new(), threads, rows)?;
        // The second rank's state is of another table.
        let mut adagrad = Optimizer::row_adagrad(4, 0.1)?;
        let (mut output, mut gradients, batch) = (Output::default(), Gradients::default(), problem.update_batch()?);
        let request = Request::value_and_grad();
        let mut view = table_mut(&mut shard, rows, 3);
        let loss = &problem.loss;
        let stepped = sharded.update(&batch, loss, request, &mut view, &mut adagrad, &mut output, &mut gradients);
        Ok((shard.to_f32(), stepped))
    });
    let found: Vec<_> = found.into_iter().map(|rank| rank.expect("a group")).collect();
    assert!(matches!(found[0].1, Err(Error::OtherRank { rank: 1, .. })), "{:?}", found[0].1);
    assert!(matches!(found[1].1, Err(Error::Shape { .. })), "{:?}", found[1].1);
    let table = problem.table.as_ref().expect("a table").embeddings.to_f32();
    assert_eq!([found[0].0.clone(), found[1].0.clone()].concat(), table);
}
