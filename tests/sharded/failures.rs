//! Ranks that die or hang, and bad input: an error on every rank, and no rank that waits for ever.

use std::time::Duration;

use catalog_softmax::sharded::{Collective, Gathered, Numbers, Sharded, Threads};
use catalog_softmax::{
    Batch, Correction, Cpu, DType, Embeddings, Error, Gradients, Loss, Output, Pool, Reduction, Reference, Request,
    Result, Similarity, Table,
};

use catalog_softmax_testing::shards::{TIMEOUT, on_ranks};

const DIM: usize = 4;

fn queries() -> Vec<f32> {
    (0..3 * DIM).map(|i| (i as f32).sin()).collect()
}

fn table(rows: usize) -> Vec<f32> {
    (0..rows * DIM).map(|i| (i as f32).cos()).collect()
}

fn softmax() -> Loss {
    Loss::softmax(Similarity::Dot, 1.0)
}

fn batch<'a>(queries: &'a [f32], rows: usize, positives: &'a [u32]) -> Result<Batch<'a>> {
    let table = Table::of_shape(rows, DIM, DType::F32);
    Batch::of_table(Embeddings::new(queries, 3, DIM), table).positives(positives).build()
}

/// What each rank's step returns, of shards of 5 rows.
fn steps(ranks: usize, step: impl Fn(&mut Sharded<Cpu, Threads>, usize) -> Result<()> + Sync) -> Vec<Result<()>> {
    let all: Vec<usize> = (0..ranks).collect();
    on_ranks(&all, |threads, &rank| {
        let mut sharded = Sharded::new(Cpu::new(), threads, 5)?;
        step(&mut sharded, rank)
    })
}

#[test]
fn an_error_of_one_rank_is_an_error_of_all() {
    let (queries, shard, short) = (queries(), table(5), table(4));
    let found = steps(3, |sharded, rank| {
        let rows = if rank == 1 { &short } else { &shard };
        let view = Embeddings::new(rows, rows.len() / DIM, DIM);
        sharded.value(&batch(&queries, 15, &[0, 7, 14])?, view, &softmax()).map(drop)
    });
    match &found[1] {
        Err(Error::Shape { argument, .. }) => assert_eq!(argument, "shard"),
        other => panic!("{other:?}"),
    }
    for rank in [0, 2] {
        match &found[rank] {
            Err(Error::OtherRank { rank: 1, error }) => assert!(error.starts_with("shard has shape (4, 4)"), "{error}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn ranks_that_give_different_arguments_find_out() {
    let (same, shard) = (queries(), table(5));
    let other: Vec<f32> = same.iter().map(|x| x + 1.0).collect();
    let cases = ["queries", "positives", "loss", "request", "row_weight", "excluded_ids", "candidates"];
    for different in cases {
        let found = steps(3, |sharded, rank| {
            let odd = |argument| rank == 2 && argument == different;
            let queries = Embeddings::new(if odd("queries") { &other } else { &same }, 3, DIM);
            let (weights, offsets) = ([1.0f32, 2.0, 3.0], [0i64, 0, 1, 1]);
            let positives = if odd("positives") { [0u32, 7, 13] } else { [0, 7, 14] };
            let mut builder = Batch::of_table(queries, Table::of_shape(15, DIM, DType::F32)).positives(&positives);
            if odd("row_weight") {
                builder = builder.row_weight(&weights);
            }
            if odd("excluded_ids") {
                builder = builder.excluded_ids(&offsets, &[3u64]);
            }
            if odd("candidates") {
                builder = builder.pool(Pool::whole_table().without_gradient());
            }
            let loss = if odd("loss") { Loss::softmax(Similarity::Dot, 2.0) } else { softmax() };
            let request = if odd("request") { Request::value().with_rank() } else { Request::value() };
            let view = Embeddings::new(&shard, 5, DIM);
            sharded.compute(&builder.build()?, view, &loss, request, &mut Output::default(), None)
        });
        for rank in found {
            match rank {
                Err(Error::Value { argument, value, .. }) => {
                    assert_eq!((argument.as_str(), value.as_str()), (different, "not the same on ranks 0 and 2"));
                }
                other => panic!("{different}: {other:?}"),
            }
        }
    }
}

#[test]
fn batches_that_are_not_over_the_whole_table_are_refused() {
    let (queries, shard) = (queries(), table(5));
    let view = || Embeddings::new(&shard, 5, DIM);
    let argument = |batch: &Batch<'_>, loss: &Loss| {
        let found = steps(2, |sharded, _| sharded.value(batch, view(), loss).map(drop));
        let names = found.into_iter().map(|error| match error {
            Err(Error::Shape { argument, .. } | Error::Missing { argument, .. }) => argument,
            Err(Error::DoesNotApply { argument, .. }) => argument,
            other => panic!("{other:?}"),
        });
        let names: Vec<String> = names.collect();
        assert_eq!(names[0], names[1]);
        names[0].clone()
    };
    let with_elements = Batch::of_table(Embeddings::new(&queries, 3, DIM), view()).positives(&[0u32, 1, 2]).build();
    assert_eq!(argument(&with_elements.expect("a batch"), &softmax()), "the elements of the batch's table");
    let without = Batch::in_batch(Embeddings::new(&queries, 3, DIM), view()).build().expect("a batch");
    assert_eq!(argument(&without, &softmax()), "table");
    assert_eq!(argument(&batch(&queries, 9, &[0, 1, 2]).expect("a batch"), &softmax()), "table");
    let whole = batch(&queries, 10, &[0, 1, 2]).expect("a batch");
    assert_eq!(argument(&whole, &softmax().symmetric()), "table");
    assert_eq!(argument(&whole, &softmax().correction(Correction::LogQ)), "log_q");
    assert_eq!(argument(&whole, &softmax().reduction(Reduction::WeightedMean)), "row_weight");
}

#[test]
fn a_request_without_a_place_for_gradients_is_an_error_of_all() {
    let (queries, shard) = (queries(), table(5));
    let found = steps(2, |sharded, rank| {
        let mut gradients = Gradients::default();
        let gradients = (rank == 0).then_some(&mut gradients);
        let view = Embeddings::new(&shard, 5, DIM);
        let batch = batch(&queries, 10, &[0, 1, 2])?;
        sharded.compute(&batch, view, &softmax(), Request::value_and_grad(), &mut Output::default(), gradients)
    });
    assert!(matches!(&found[0], Err(Error::OtherRank { rank: 1, .. })), "{found:?}");
    assert!(matches!(&found[1], Err(Error::Missing { argument, .. }) if argument == "gradients"), "{found:?}");
}

#[test]
fn a_table_without_rows_is_refused() {
    let found = on_ranks(&[0, 0], |threads, &rows| Sharded::new(Reference::new(), threads, rows).map(drop));
    assert!(found.iter().all(|error| matches!(error, Err(Error::Shape { argument, .. }) if argument == "shard_rows")));
    assert!(matches!(Threads::group(0, TIMEOUT), Err(Error::Value { .. })));
}

/// A rank that panics, or returns, after some operations of a step.
#[test]
fn a_rank_that_dies_ends_the_step_of_all() {
    let (queries, shard) = (queries(), table(5));
    // A step with gradients has five operations, and `new` has one.
    for lives in 0..6 {
        let group = Threads::group(3, TIMEOUT).expect("ranks");
        let found: Vec<Option<Result<()>>> = std::thread::scope(|scope| {
            let (queries, shard) = (&queries, &shard);
            let ranks = group.into_iter().map(|threads| {
                scope.spawn(move || {
                    let dies = threads.rank() == 1;
                    let mortal = Mortal { threads, operations: if dies { lives } else { usize::MAX } };
                    let mut sharded = Sharded::new(Cpu::new(), mortal, 5)?;
                    let batch = batch(queries, 15, &[0, 7, 14])?;
                    sharded.value_and_grad(&batch, Embeddings::new(shard, 5, DIM), &softmax()).map(drop)
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().ok()).collect()
        });
        assert!(found[1].is_none(), "rank 1 panicked");
        for rank in [0, 2] {
            match &found[rank] {
                Some(Err(Error::Collective { rank: of, reason, .. })) => {
                    assert_eq!((*of, reason.as_str()), (rank, "rank 1 has left the group"), "{lives}");
                }
                other => panic!("{lives}: {other:?}"),
            }
        }
    }
}

/// A rank that panics in place of the operation after `operations` of them.
struct Mortal {
    threads: Threads,
    operations: usize,
}

impl Mortal {
    fn next(&mut self) -> &mut Threads {
        self.operations = self.operations.checked_sub(1).unwrap_or_else(|| std::panic::resume_unwind(Box::new("dead")));
        &mut self.threads
    }
}

impl Collective for Mortal {
    fn rank(&self) -> usize {
        self.threads.rank()
    }
    fn num_ranks(&self) -> usize {
        self.threads.num_ranks()
    }
    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.next().all_gather(mine)
    }
    fn sum(&mut self, numbers: Numbers<'_>) -> Result<()> {
        self.next().sum(numbers)
    }
    fn reduce_scatter(&mut self, numbers: Numbers<'_>, lengths: &[usize]) -> Result<()> {
        self.next().reduce_scatter(numbers, lengths)
    }
}

#[test]
fn a_rank_that_hangs_is_given_up() {
    let mut group = Threads::group(3, Duration::from_millis(50)).expect("ranks");
    let mut hangs = group.remove(1);
    let reasons: Vec<String> = std::thread::scope(|scope| {
        let ranks: Vec<_> = group.into_iter().map(|mut rank| scope.spawn(move || rank.all_gather(&[1]))).collect();
        let reason = |result| match result {
            Err(Error::Collective { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        ranks.into_iter().map(|rank| reason(rank.join().expect("no panic"))).collect()
    });
    // The rank that waited longer says who is late. The other hears it, or that this one has left.
    assert!(reasons.iter().any(|reason| reason.starts_with("ranks [1] did not call it within")), "{reasons:?}");
    assert!(matches!(hangs.all_gather(&[1]), Err(Error::Collective { collective: "all_gather", rank: 1, .. })));
}

#[test]
fn operations_that_do_not_fit_fail_on_all_ranks() {
    let found = on_ranks(&[0, 1], |mut threads, &rank| match rank {
        0 => threads.sum(Numbers::F32(&mut [1.0])),
        _ => threads.all_gather(&[1]).map(drop),
    });
    assert!(found.iter().all(|error| matches!(error, Err(Error::Collective { .. }))), "{found:?}");
    let found = on_ranks(&[2, 3], |mut threads, &len| threads.sum(Numbers::F64(&mut vec![1.0; len])));
    assert!(found.iter().all(|error| matches!(error, Err(Error::Collective { .. }))), "{found:?}");
    let found = on_ranks(&[2, 3], |mut threads, &len| threads.reduce_scatter(Numbers::F64(&mut [1.0; 4]), &[1, len]));
    assert!(found.iter().all(|error| matches!(error, Err(Error::Collective { .. }))), "{found:?}");
}

#[test]
fn gathered_batches_of_different_kinds_are_refused() {
    let (queries, items, ids) = (queries(), table(3), [7u64, 8, 9]);
    let found = on_ranks(&[0, 1], |threads, &rank| {
        let pool = Pool::new(Embeddings::new(&items, 3, DIM));
        let pool = if rank == 1 { pool.ids(&ids) } else { pool };
        let batch = Batch::in_batch(Embeddings::new(&queries, 3, DIM), pool).build()?;
        Gathered::new(Cpu::new(), threads).value(&batch, &softmax()).map(drop)
    });
    let refused =
        |error: &Result<()>| matches!(error, Err(Error::Value { argument, .. }) if argument == "the kinds of pools");
    assert!(found.iter().all(refused), "{found:?}");
    let found = on_ranks(&[0, 1], |threads, &rank| {
        let (items, other) = (Embeddings::new(&items, 3, DIM), Table::new(Embeddings::new(&items, 3, DIM)));
        let batch = match rank {
            0 => Batch::in_batch(Embeddings::new(&queries, 3, DIM), items).build()?,
            _ => Batch::of_table(Embeddings::new(&queries, 3, DIM), other).positives(&[0u32, 1, 2]).build()?,
        };
        Gathered::new(Cpu::new(), threads).value(&batch, &softmax()).map(drop)
    });
    assert!(matches!(&found[0], Err(Error::OtherRank { rank: 1, .. })), "{found:?}");
    assert!(matches!(&found[1], Err(Error::DoesNotApply { argument, .. }) if argument == "table"), "{found:?}");
}
