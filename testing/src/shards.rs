//! Ranks as threads, and what they return.

use std::time::Duration;

use crate::problem::{Problem, Storage};
use crate::step::Step;
use crate::tolerance::{Expected, Tensor, compare, tensors};
use catalog_softmax::sharded::{Sharded, Threads};
use catalog_softmax::{Backend, Gradients, Matrix, Output, Real, Request, Result, RowSparse, TableGradient};

/// Longer than any operation takes, and short enough to wait for where a test fails.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Runs a function on each rank of a group, in threads of their own.
pub fn on_ranks<A: Sync, R: Send>(of_rank: &[A], run: impl Fn(Threads, &A) -> R + Sync) -> Vec<R> {
    let group = Threads::group(of_rank.len(), TIMEOUT).expect("at least one rank");
    std::thread::scope(|scope| {
        let run = &run;
        let ranks = group.into_iter().zip(of_rank).map(|(threads, given)| scope.spawn(move || run(threads, given)));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    })
}

/// The rows of a problem's table in shards of these sizes.
pub fn shards_of(problem: &Problem, sizes: &[usize]) -> Vec<Storage> {
    let table = &problem.table.as_ref().expect("a problem over a table").embeddings;
    assert_eq!(sizes.iter().sum::<usize>(), problem.table_rows());
    let values = table.to_f32();
    let mut first = 0;
    let shard = |&rows: &usize| {
        let start = first;
        first += rows;
        Storage::new(&values[start * problem.dim..first * problem.dim], table.dtype())
    };
    sizes.iter().map(shard).collect()
}

/// What each rank returns.
pub fn all_steps<B: Backend>(
    backend: &(impl Fn() -> B + Sync),
    problem: &Problem,
    sizes: &[usize],
    request: Request,
) -> Vec<Result<Step<B::Real>>> {
    on_ranks(&shards_of(problem, sizes), |threads, shard| {
        let batch = problem.update_batch().expect("a batch");
        let mut sharded = Sharded::new(backend(), threads, shard.len() / problem.dim)?;
        let mut step = Step { output: Output::default(), gradients: request.gradients.then(Gradients::default) };
        let view = shard.view(problem.dim);
        sharded.compute(&batch, view, &problem.loss, request, &mut step.output, step.gradients.as_mut())?;
        Ok(step)
    })
}

/// The same as one step: ranks must agree on all but the table's gradient, whose parts are put together.
pub fn sharded<B: Backend>(
    backend: impl Fn() -> B + Sync,
    problem: &Problem,
    sizes: &[usize],
    request: Request,
) -> Step<B::Real> {
    let steps = all_steps(&backend, problem, sizes, request);
    let steps = steps.into_iter().collect::<Result<Vec<_>>>().expect("a step");
    together(problem.dim, steps)
}

fn together<T: Real>(dim: usize, mut steps: Vec<Step<T>>) -> Step<T> {
    let d_tables = steps.iter_mut().map(|step| step.gradients.as_mut().and_then(|gradients| gradients.d_table.take()));
    let d_tables: Option<Vec<TableGradient<T>>> = d_tables.collect();
    let mut whole = steps.swap_remove(0);
    // By what they print: a NaN is not equal to itself.
    assert!(steps.iter().all(|step| format!("{step:?}") == format!("{whole:?}")), "ranks differ");
    if let (Some(gradients), Some(parts)) = (&mut whole.gradients, d_tables) {
        gradients.d_table = Some(concatenated(dim, parts));
    }
    whole
}

/// Dense parts one after the other. Row-sparse ones count their rows from the shard's first: `rows_of` gives those.
fn concatenated<T: Real>(dim: usize, parts: Vec<TableGradient<T>>) -> TableGradient<T> {
    let dense = |part: &TableGradient<T>| part.dense().expect("all ranks have the same form").values.clone();
    let values: Vec<T> = parts.iter().flat_map(dense).collect();
    TableGradient::Dense(Matrix { rows: values.len() / dim, values, dim })
}

/// Row-sparse parts of shards of these sizes as one.
pub fn row_sparse<T: Real>(dim: usize, sizes: &[usize], parts: &[RowSparse<T>]) -> RowSparse<T> {
    let (mut rows, mut values, mut first) = (Vec::new(), Vec::new(), 0);
    for (part, size) in parts.iter().zip(sizes) {
        rows.extend(part.rows.iter().map(|row| row + first));
        values.extend_from_slice(&part.values.values);
        first += *size as u32;
    }
    let values = Matrix { rows: rows.len(), values, dim };
    RowSparse { rows, values }
}

/// All results but the mean of the negatives, which no rank has.
pub fn results<T: Real>(step: &Step<T>) -> Vec<Tensor> {
    tensors(step).into_iter().filter(|tensor| tensor.name != "expected_negative").collect()
}

/// Whether the results are those expected, within tolerances of each tensor's rows.
pub fn check(
    expected: &Expected,
    found: &[Tensor],
    tolerances: impl Fn(&Expected, usize) -> Vec<f64>,
) -> Result<(), String> {
    let kept = expected.tensors.iter().enumerate().filter(|(_, tensor)| tensor.name != "expected_negative");
    let (tensors, tolerances): (Vec<Tensor>, Vec<Vec<f64>>) =
        kept.map(|(at, tensor)| (tensor.clone(), tolerances(expected, at))).unzip();
    let names = |tensors: &[Tensor]| tensors.iter().map(|t| (t.name.clone(), t.values.len())).collect::<Vec<_>>();
    if names(&tensors) != names(found) {
        return Err(format!("expected results {:?}, found {:?}", names(&tensors), names(found)));
    }
    compare(&tensors, found, &tolerances, 1.0)
}
