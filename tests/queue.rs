//! A loss with a queue: the same as with the queue's rows in one more pool, masks across pools, no gradient, and errors.

use catalog_softmax::negatives::{ExactCounts, FrequencyEstimator, NegativeQueue, QueueOptions};
use catalog_softmax::{
    Backend, Batch, Correction, Cpu, DType, Embeddings, Error, Loss, Pool, Real, Reference, Request, Similarity,
};
use catalog_softmax_testing::generate::{rng, rows};
use catalog_softmax_testing::problem::Storage;
use catalog_softmax_testing::step::Step;
use rand::RngExt;

const DIM: usize = 9;

/// One step's inputs.
struct Inputs {
    queries: Storage,
    items: Storage,
    ids: Vec<u64>,
    log_q: Vec<f32>,
}

/// Few ids, so that the same one is in many steps.
fn inputs(seed: u64, b: usize, dtype: DType) -> Inputs {
    let mut rng = rng(seed);
    Inputs {
        queries: Storage::new(&rows(&mut rng, b, DIM, 1.0), dtype),
        items: Storage::new(&rows(&mut rng, b, DIM, 1.0), dtype),
        ids: (0..b).map(|_| rng.random_range(0..12)).collect(),
        log_q: (0..b).map(|_| rng.random_range(-4.0..-0.5f32)).collect(),
    }
}

impl Inputs {
    fn pool(&self) -> Pool<'_> {
        Pool::new(self.items.view(DIM)).ids(&self.ids).log_q(&self.log_q)
    }
}

fn assert_near(what: &str, found: &[f64], wanted: &[f64]) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        // Float64 sums of some dozens of terms of order 1, in another order.
        assert!((found - wanted).abs() <= 1e-13 * wanted.abs().max(1.0), "{what}[{i}] is {found}, not {wanted}");
    }
}

fn step<B: Backend>(backend: &mut B, batch: &Batch<'_>, loss: &Loss) -> Step<B::Real> {
    let mut output = Step::default();
    let request = Request::value_and_grad().with_moments().with_rank();
    output.compute(backend, batch, loss, request).expect("a loss that fits");
    output
}

fn wide<T: Real>(values: &[T]) -> Vec<f64> {
    values.iter().map(|&v| v.into()).collect()
}

#[test]
fn a_loss_with_a_queue_is_the_loss_with_one_concatenated_pool() {
    // Three steps of five rows are young enough and leave slots free; or the ring is full, and its pool the whole memory.
    for (dtype, correction, options, most) in [
        (DType::F32, Correction::LogQ, QueueOptions::new(17, DIM, DType::F32).with_max_age(3), 15),
        (DType::F16, Correction::CorrectedLogQ, QueueOptions::new(17, DIM, DType::F16).with_max_age(3), 15),
        (DType::Bf16, Correction::LogQNegativesOnly, QueueOptions::new(12, DIM, DType::Bf16), 12),
    ] {
        let options = options.with_ids().with_log_q();
        let mut queue = NegativeQueue::new(options).expect("valid options");
        // All past rows, oldest first, of which the queue holds the last.
        let (mut past, mut past_ids, mut past_log_q) = (Vec::new(), Vec::new(), Vec::new());
        let loss = Loss::softmax(Similarity::Cosine, 0.3).correction(correction);
        let mut wrapped = 0;
        for seed in 0..7 {
            let inputs = inputs(seed, 5, dtype);
            let builder = || Batch::in_batch(inputs.queries.view(DIM), inputs.pool());
            let batch = builder().pools(queue.pools()).build().expect("a valid batch");

            let kept = queue.len();
            assert_eq!(kept, most.min(5 * seed as usize));
            let rows = Storage::new(&past[past.len() - kept * DIM..], dtype);
            let mut joined = inputs.items.to_f32();
            joined.extend(rows.to_f32());
            let joined = Storage::new(&joined, dtype);
            let ids = [&inputs.ids[..], &past_ids[past_ids.len() - kept..]].concat();
            let log_q = [&inputs.log_q[..], &past_log_q[past_log_q.len() - kept..]].concat();
            let one = Pool::new(joined.view(DIM)).ids(&ids).log_q(&log_q);
            let one = Batch::in_batch(inputs.queries.view(DIM), one).build().expect("a valid batch");

            let (found, wanted) =
                (step(&mut Reference::new(), &batch, &loss), step(&mut Reference::new(), &one, &loss));
            assert_near("total", &[found.total], &[wanted.total]);
            assert_near("loss", &found.loss, &wanted.loss);
            assert_near("lse", &found.statistics.lse, &wanted.statistics.lse);
            assert_eq!(found.statistics.rank, wanted.statistics.rank);
            // Masks reach across pools: each row has lost exactly the candidates that carry its positive's id.
            let with_other_id = |&id: &u64| ids.iter().filter(|&&other| other != id).count() as u64;
            let negatives: Vec<u64> = inputs.ids.iter().map(with_other_id).collect();
            assert_eq!(found.statistics.num_negatives, negatives);
            assert!(seed == 0 || negatives.iter().any(|&n| n < 4 + kept as u64), "there are accidental hits");

            let (found, wanted) = (found.gradients.expect("asked for"), wanted.gradients.expect("asked for"));
            assert_near("d_queries", &found.d_queries.values, &wanted.d_queries.values);
            assert_near("d_candidates", &found.d_candidates[0].values, &wanted.d_candidates[0].values[..5 * DIM]);
            assert_near("d_temperature", &[found.d_temperature], &[wanted.d_temperature]);
            for queue in &found.d_candidates[1..] {
                assert_eq!((queue.rows, queue.values.len()), (0, 0), "no gradient");
            }
            wrapped += usize::from(found.d_candidates.len() == 3);

            // And the fast backend: within f32's rounding of few terms of order 1, under a temperature of 0.3.
            let cpu = step(&mut Cpu::new(), &batch, &loss).gradients.expect("asked for");
            for (a, b) in wide(&cpu.d_queries.values).iter().zip(&wanted.d_queries.values) {
                assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{a}, float64 {b}");
            }

            queue.enqueue(&inputs.pool()).expect("rows that fit");
            past.extend(inputs.items.to_f32());
            past_ids.extend_from_slice(&inputs.ids);
            past_log_q.extend_from_slice(&inputs.log_q);
        }
        assert_eq!(wrapped > 0, most < queue.capacity(), "the live part wraps around, but for a full ring");
    }
}

/// The reason for the order of enqueue and loss: a batch's own candidates count twice, ids mask each row's own.
#[test]
fn enqueued_before_the_loss_the_batch_is_there_twice() {
    let inputs = inputs(1, 5, DType::F32);
    let mut queue = NegativeQueue::new(QueueOptions::new(5, DIM, DType::F32)).expect("valid options");
    let own = Pool::new(inputs.items.view(DIM));
    queue.enqueue(&own).expect("rows that fit");
    let batch = Batch::in_batch(inputs.queries.view(DIM), own).pools(queue.pools());
    let batch = batch.build().expect("a valid batch");
    let output = Reference::new().value(&batch, &Loss::softmax(Similarity::Cosine, 0.3)).expect("fits");
    // Without ids nothing tells that the queue's row i is the positive of query i.
    assert_eq!(output.statistics.num_negatives, [4 + 5; 5]);
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let message = |result: Result<(), Error>| result.expect_err("does not fit").to_string();
    let made = |options| message(NegativeQueue::new(options).map(|_| ()));
    assert!(made(QueueOptions::new(0, 4, DType::F32)).starts_with("queue has shape (0, 4); rule: capacity >= 1"));
    assert!(made(QueueOptions::new(4, 0, DType::F32)).starts_with("queue has shape (4, 0)"));
    assert!(
        made(QueueOptions::new(usize::MAX, 4, DType::F32)).starts_with("queue has shape (18446744073709551615, 4)")
    );
    // 16 PB, which the process cannot address.
    let huge = made(QueueOptions::new(4_000_000_000, 1 << 20, DType::F32).with_ids());
    assert_eq!(huge, "queue has shape (4000000000, 1048576); rule: what memory holds, at 4194312 bytes for each row");
    assert!(made(QueueOptions::new(4, 4, DType::F32).with_max_age(0)).starts_with("max_age is 0; rule: >= 1"));

    let Inputs { items, ids, log_q, .. } = &inputs(3, 5, DType::F32);
    let mut queue = NegativeQueue::new(QueueOptions::new(8, DIM, DType::F32).with_ids().with_log_q()).expect("valid");
    let candidates = items.view(DIM);
    let whole = Pool::new(candidates).ids(ids).log_q(log_q);
    queue.enqueue(&whole).expect("rows that fit");
    let before = queue.to_bytes();
    let narrow = items.strided_view(DIM - 1, 1);
    let half = Storage::new(&items.to_f32(), DType::F16);
    let mut spoiled = log_q.clone();
    spoiled[3] = f32::NEG_INFINITY;
    for (pool, start) in [
        (Pool::new(narrow).ids(ids).log_q(log_q), "candidates has dim 8; rule: the dim of the queue, which is 9"),
        (Pool::new(half.view(DIM)).ids(ids).log_q(log_q), "candidates has elements of type F16"),
        (Pool::new(candidates).log_q(log_q), "candidate_ids is missing"),
        (Pool::new(candidates).ids(ids), "log_q is missing"),
        (whole.clone().ids(&ids[..4]), "candidate_ids has length 4; rule: length 5, the number of candidates"),
        (whole.clone().log_q(&log_q[..4]), "log_q has length 4; rule: length 5, the number of candidates"),
        (whole.log_q(&spoiled), "log_q[3] is -inf; rule: finite"),
        (Pool::new(Embeddings::new(&[0.0f32][..0], 0, DIM)).ids(&ids[..0]).log_q(&[]), "candidates has shape (0, 9)"),
    ] {
        let error = message(queue.enqueue(&pool));
        assert!(error.starts_with(start), "{error}");
    }
    assert_eq!(queue.to_bytes(), before, "errors leave the queue as it was");
}

/// Of a batch's own pool a queue takes what it keeps, and does not look at the rest.
#[test]
fn what_a_queue_does_not_keep_is_ignored() {
    let inputs = inputs(3, 5, DType::F32);
    let candidates = || Pool::new(inputs.items.view(DIM));
    let (ids, log_q) = (&inputs.ids, &inputs.log_q);
    let options = QueueOptions::new(8, DIM, DType::F32);
    let spoiled = [f32::NAN; 2];
    for (options, exact, more) in [
        (options, candidates(), vec![candidates().ids(ids), candidates().log_q(log_q), inputs.pool().log_q(&spoiled)]),
        (options.with_ids(), candidates().ids(ids), vec![inputs.pool(), inputs.pool().log_q(&spoiled)]),
        (options.with_log_q(), candidates().log_q(log_q), vec![inputs.pool(), inputs.pool().ids(&ids[..2])]),
    ] {
        let enqueued = |pool: &Pool<'_>| {
            let mut queue = NegativeQueue::new(options).expect("valid options");
            queue.enqueue(pool).expect("rows that fit");
            queue.to_bytes()
        };
        for pool in more {
            assert_eq!(enqueued(&pool), enqueued(&exact));
        }
    }
}

/// What enqueue's docs say of a row that is not finite.
#[test]
fn a_row_that_is_nan_spoils_losses_until_it_is_gone() {
    let inputs = inputs(4, 2, DType::F32);
    let mut spoiled = inputs.items.to_f32();
    spoiled[3] = f32::NAN;
    let losses_are_nan = |queue: &NegativeQueue| {
        let builder = Batch::in_batch(inputs.queries.view(DIM), inputs.items.view(DIM));
        let batch = builder.pools(queue.pools()).build().expect("a valid batch");
        let output = Cpu::new().value(&batch, &Loss::softmax(Similarity::Cosine, 0.3)).expect("fits");
        output.loss.iter().map(|loss| loss.is_nan()).collect::<Vec<_>>()
    };
    // Overwritten by the third enqueue of two rows, or too old after the second.
    for (options, steps) in
        [(QueueOptions::new(6, DIM, DType::F32), 3), (QueueOptions::new(100, DIM, DType::F32).with_max_age(2), 2)]
    {
        let mut queue = NegativeQueue::new(options).expect("valid options");
        queue.enqueue(&Embeddings::new(&spoiled, 2, DIM).into()).expect("elements are not looked at");
        for _ in 0..steps {
            assert_eq!(losses_are_nan(&queue), [true, true]);
            queue.enqueue(&inputs.items.view(DIM).into()).expect("rows that fit");
        }
        assert_eq!(losses_are_nan(&queue), [false, false]);
    }
}

#[test]
fn a_queue_from_bytes_says_what_it_was_made_for() {
    let options = QueueOptions::new(8, DIM, DType::Bf16).with_ids().with_max_age(3);
    assert_eq!((options.capacity(), options.dim(), options.dtype()), (8, DIM, DType::Bf16));
    assert_eq!((options.keeps_ids(), options.keeps_log_q(), options.max_age()), (true, false, Some(3)));
    let other = QueueOptions::new(8, DIM, DType::Bf16).with_log_q();
    assert_eq!((other.keeps_ids(), other.keeps_log_q(), other.max_age()), (false, true, None));
    for options in [options, other] {
        let queue = NegativeQueue::new(options).expect("valid options");
        let again = NegativeQueue::from_bytes(&queue.to_bytes()).expect("bytes of a moment ago");
        assert_eq!((queue.options(), again.options()), (options, options));
    }
    // Bytes of another kind.
    let error = NegativeQueue::from_bytes(&ExactCounts::new().to_bytes()).expect_err("no queue").to_string();
    assert!(error.starts_with("bytes is something else; rule: a NegativeQueue as to_bytes returned it"), "{error}");
}
