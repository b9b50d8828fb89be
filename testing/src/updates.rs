//! Steps of an optimiser in place of a table's gradient, and the same in two calls.

use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::{Backend, DType, Gradients, Matrix, Output, Request};

use super::bits::table_problems;
use super::problem::{PoolRows, Problem, Storage};

/// Each rule, with and without the options that go through its own code.
pub fn optimizers(problem: &Problem) -> Vec<Optimizer> {
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

pub fn table_mut(table: &mut Storage, rows: usize, dim: usize) -> TableMut<'_> {
    match table {
        Storage::F32(values) => TableMut::new(values, rows, dim),
        Storage::F16(values) => TableMut::new(values, rows, dim),
        Storage::Bf16(values) => TableMut::new(values, rows, dim),
    }
}

/// What a step leaves: the table, the optimiser, and what was returned.
#[derive(Debug, PartialEq)]
pub struct Stepped<T> {
    pub table: Vec<f32>,
    pub optimizer: Vec<u8>,
    pub output: Output<T>,
    pub gradients: Gradients<T>,
}

pub fn updated<B: Backend>(backend: &mut B, problem: &Problem, mut optimizer: Optimizer) -> Stepped<B::Real> {
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
pub fn gradient_then_step<B: Backend>(
    backend: &mut B,
    problem: &Problem,
    mut optimizer: Optimizer,
) -> Stepped<B::Real> {
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
pub fn problems() -> Vec<Problem> {
    let all: Vec<Problem> =
        table_problems().into_iter().filter(|p| p.table.as_ref().is_some_and(|t| t.gradient)).collect();
    assert!(all.len() >= 4);
    let whole = |p: &Problem| p.pools.iter().any(|pool| matches!(pool.rows, Some(PoolRows::All)));
    assert!(all.iter().any(whole) && !all.iter().all(whole));
    all
}

/// Every rule's step on the problems.
pub fn an_update_is_the_gradient_and_then_the_step<B: Backend>(backend: &mut B, problems: &[Problem]) {
    for (p, problem) in problems.iter().enumerate() {
        for optimizer in optimizers(problem) {
            let one = updated(backend, problem, optimizer.clone());
            assert_ne!(one.table, problem.table.as_ref().expect("a table").embeddings.to_f32());
            assert!(one == gradient_then_step(backend, problem, optimizer), "problem {p}");
        }
    }
}
