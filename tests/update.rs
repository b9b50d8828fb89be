//! `Backend::update`: the optimiser's step on a table in place of its gradient.

use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::{
    Backend, Cpu, DType, Embeddings, Error, Gradients, Loss, Matrix, Output, Reference, Request, Result, Similarity,
    Table,
};
use catalog_softmax_testing::bits::table_problems;
use catalog_softmax_testing::problem::{PoolRows, Problem, Storage};

/// Each rule, with and without the options that go through its own code.
fn optimizers(problem: &Problem) -> Vec<Optimizer> {
    let table = problem.table.as_ref().expect("a problem over a table");
    let (m, d) = (problem.table_rows(), problem.dim);
    let mut all = vec![
        Optimizer::sgd(0.1).expect("a rate"),
        Optimizer::row_adagrad(m, 0.1).expect("a rate"),
        Optimizer::adam(m, d, 0.01).and_then(|adam| adam.with_weight_decay(0.1)).expect("rates"),
    ];
    if table.embeddings.dtype() != DType::F32 {
        let sgd = Optimizer::sgd(0.1).and_then(|sgd| sgd.with_master_copy(table.embeddings.view(d)));
        all.push(sgd.expect("a table of 16 bits"));
    }
    all
}

fn table_mut(table: &mut Storage, rows: usize, dim: usize) -> TableMut<'_> {
    match table {
        Storage::F32(values) => TableMut::new(values, rows, dim),
        Storage::F16(values) => TableMut::new(values, rows, dim),
        Storage::Bf16(values) => TableMut::new(values, rows, dim),
    }
}

/// What a step leaves: the table, the optimiser, and what was returned.
#[derive(Debug, PartialEq)]
struct Stepped<T> {
    table: Vec<f32>,
    optimizer: Vec<u8>,
    output: Output<T>,
    gradients: Gradients<T>,
}

fn updated<B: Backend>(backend: &mut B, problem: &Problem, mut optimizer: Optimizer) -> Stepped<B::Real> {
    let mut table = problem.table.as_ref().expect("a table").embeddings.clone();
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    let (batch, request) = (problem.update_batch().expect("a batch"), Request::value_and_grad().with_rank());
    let mut view = table_mut(&mut table, problem.table_rows(), problem.dim);
    backend
        .update(&batch, &problem.loss, request, &mut view, &mut optimizer, &mut output, &mut gradients)
        .expect("a step");
    assert_eq!(gradients.d_table, None);
    Stepped { table: table.to_f32(), optimizer: optimizer.to_bytes(), output, gradients }
}

/// The same in two calls: the row-sparse gradient, then the step.
fn gradient_then_step<B: Backend>(backend: &mut B, problem: &Problem, mut optimizer: Optimizer) -> Stepped<B::Real> {
    let mut table = problem.table.as_ref().expect("a table").embeddings.clone();
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    let request = Request::value_and_grad().with_rank().row_sparse();
    let batch = problem.batch().expect("a batch");
    backend.compute(&batch, &problem.loss, request, &mut output, Some(&mut gradients)).expect("a step");
    let d_table = gradients.d_table.take().expect("a gradient");
    let d_table = d_table.row_sparse().expect("asked for");
    let values = d_table.values.values.iter().map(|&value| value.into() as f32).collect();
    let values = Matrix { values, rows: d_table.rows.len(), dim: problem.dim };
    let mut view = table_mut(&mut table, problem.table_rows(), problem.dim);
    optimizer.step_rows(&mut view, &d_table.rows, &values).expect("a step");
    Stepped { table: table.to_f32(), optimizer: optimizer.to_bytes(), output, gradients }
}

/// Problems whose table has a gradient.
fn problems() -> Vec<Problem> {
    let all: Vec<Problem> =
        table_problems().into_iter().filter(|p| p.table.as_ref().is_some_and(|t| t.gradient)).collect();
    assert!(all.len() >= 4);
    let whole = |p: &Problem| p.pools.iter().any(|pool| matches!(pool.rows, Some(PoolRows::All)));
    assert!(all.iter().any(whole) && !all.iter().all(whole));
    all
}

#[test]
fn an_update_is_the_gradient_and_then_the_step() {
    for (p, problem) in problems().iter().enumerate() {
        for optimizer in optimizers(problem) {
            let one = updated(&mut Cpu::new(), problem, optimizer.clone());
            assert_ne!(one.table, problem.table.as_ref().expect("a table").embeddings.to_f32());
            assert!(one == gradient_then_step(&mut Cpu::new(), problem, optimizer), "problem {p}");
        }
    }
}

#[test]
fn so_it_is_on_the_reference() {
    let problem = &problems()[0];
    for optimizer in optimizers(problem) {
        let one = updated(&mut Reference::new(), problem, optimizer.clone());
        assert!(one == gradient_then_step(&mut Reference::new(), problem, optimizer));
    }
}

#[test]
fn threads_do_not_matter() {
    let problem = &problems()[0];
    for optimizer in optimizers(problem) {
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
            pool.install(|| updated(&mut Cpu::new(), problem, optimizer.clone()))
        };
        let one = on(1);
        for threads in [2, 3, 7] {
            assert!(on(threads) == one, "{threads} threads");
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let (queries, items) = ([1.0f32, 0.0, 0.5, 0.5], [0.3f32; 6]);
    let of_shape = |rows, dim, dtype| {
        let queries = Embeddings::new(&queries, 4 / dim, dim);
        catalog_softmax::Batch::of_table(queries, Table::of_shape(rows, dim, dtype))
    };
    let good = || of_shape(3, 2, DType::F32).positives(&[0u32, 2]).build();
    let loss = Loss::softmax(Similarity::Dot, 1.0);
    let gradients = Request::value_and_grad();
    let attempt = |batch: Result<catalog_softmax::Batch<'_>>, loss: &Loss, request: Request, optimizer: Optimizer| {
        let (mut table, mut optimizer_after) = (items, optimizer.clone());
        let (mut output, mut found) = (Output::default(), Gradients::default());
        (output.total, found.d_temperature) = (7.0, 7.0);
        let mut view = TableMut::new(&mut table, 3, 2);
        let batch = batch.expect("a batch");
        let result = Cpu::new().update(&batch, loss, request, &mut view, &mut optimizer_after, &mut output, &mut found);
        if result.is_err() {
            assert_eq!((table, output.total, found.d_temperature), (items, 7.0, 7.0));
            assert_eq!(optimizer_after, optimizer);
        }
        result
    };
    let sgd = || Optimizer::sgd(0.1).expect("a rate");
    attempt(good(), &loss, gradients, sgd()).expect("what the cases spoil is good");

    let embeddings = Embeddings::new(&items, 3, 2);
    let borrowed = catalog_softmax::Batch::of_table(Embeddings::new(&queries, 2, 2), embeddings).positives(&[0u32, 2]);
    let frozen = Table::of_shape(3, 2, DType::F32).without_gradient();
    let frozen = catalog_softmax::Batch::of_table(Embeddings::new(&queries, 2, 2), frozen).positives(&[0u32, 2]);
    let without = catalog_softmax::Batch::builder(Embeddings::new(&queries, 2, 2), embeddings).positives(&[0u32, 2]);
    let other_rows = of_shape(4, 2, DType::F32).positives(&[0u32, 2]);
    let cases: Vec<(Result<()>, &str)> = vec![
        (
            attempt(borrowed.build(), &loss, gradients, sgd()),
            "the elements of the batch's table is given but does not apply",
        ),
        (attempt(frozen.build(), &loss, gradients, sgd()), "table.without_gradient is given but does not apply"),
        (attempt(without.build(), &loss, gradients, sgd()), "table is missing; rule: update is given the table"),
        (
            attempt(other_rows.build(), &loss, gradients, sgd()),
            "table has shape (3, 2) of F32; rule: the batch's shape (4, 2) of F32",
        ),
        (attempt(good(), &loss, Request::value(), sgd()), "request.gradients is missing"),
        (attempt(good(), &loss, gradients.row_sparse(), sgd()), "request.row_sparse is given but does not apply"),
        (attempt(good(), &loss, gradients.accumulate(), sgd()), "request.accumulate is given but does not apply"),
        (attempt(good(), &Loss::softmax(Similarity::Dot, -1.0), gradients, sgd()), "temperature is -1"),
        (attempt(good(), &loss, gradients, Optimizer::row_adagrad(4, 0.1).expect("a rate")), "table has"),
    ];
    for (result, message) in cases {
        let error = result.expect_err(message).to_string();
        assert!(error.starts_with(message), "{error:?} does not start with {message:?}");
    }
    let bare = Cpu::new().value(&good().expect("a batch"), &loss).expect_err("no table to read");
    assert!(matches!(bare, Error::Missing { .. }), "{bare}");
}
