//! `Backend::update`: the optimiser's step on a table in place of its gradient.

use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::{
    Backend, Cpu, DType, Embeddings, Error, Gradients, Loss, Output, Reference, Request, Result, Similarity, Table,
};
use catalog_softmax_testing::updates::{self, optimizers, problems, updated};

#[test]
fn an_update_is_the_gradient_and_then_the_step() {
    updates::an_update_is_the_gradient_and_then_the_step(&mut Cpu::new(), &problems());
}

#[test]
fn so_it_is_on_the_reference() {
    updates::an_update_is_the_gradient_and_then_the_step(&mut Reference::new(), &problems()[..1]);
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
