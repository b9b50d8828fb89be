//! What bytes and sizes from outside can cost: memory by an allocator that counts and refuses, and counters at their
//! end.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use catalog_softmax::evaluation::Recommended;
use catalog_softmax::negatives::{
    CountMin, Distribution, ExactCounts, FrequencyEstimator, GapEstimator, LogUniform, NegativeQueue, QueueOptions,
    RandomStream, Sample, Uniform, Unigram,
};
use catalog_softmax::{DType, Embeddings, Error};
use catalog_softmax_testing::forge;

/// The system's allocator for what a test may have, and none for more. It counts what a thread asks for by itself,
/// since tests run beside each other; memory that is asked for as zeros comes from the system as it is touched, and is
/// not counted.
struct Counting;

thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
    static ZEROED: Cell<usize> = const { Cell::new(0) };
}

/// More than a test needs and less than the sizes that it asks for.
const MOST: usize = 1 << 31;

/// Whether the machine has so much. The count is of all that was ever asked for, given back or not.
fn take(counter: &'static std::thread::LocalKey<Cell<usize>>, size: usize) -> bool {
    counter.with(|counter| counter.set(counter.get().saturating_add(size)));
    size <= MOST
}

// SAFETY: every call that is not refused, as an allocator may, goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !take(&TAKEN, layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract is this function's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(&ZEROED, layout.size());
        // SAFETY: the caller's contract is this function's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is this function's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !take(&TAKEN, size) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's contract is this function's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that `work` asked for, those that were to be zeros apart.
fn cost<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let before = (TAKEN.get(), ZEROED.get());
    let result = work();
    (result, TAKEN.get() - before.0, ZEROED.get() - before.1)
}

fn small_queue() -> Vec<u8> {
    let mut queue = NegativeQueue::new(QueueOptions::new(7, 3, DType::F16).with_ids()).expect("valid options");
    let rows = [half::f16::ONE; 6];
    let pool = catalog_softmax::Pool::new(Embeddings::new(&rows[..], 2, 3)).ids(&[1u64, 2][..]);
    queue.enqueue(&pool).expect("rows that fit");
    queue.to_bytes()
}

/// Where a queue's state has its capacity, dim, next slot and number of enqueues with live rows.
const CAPACITY: usize = 32;
const DIM: usize = 40;
const NEXT: usize = 56;
const RUNS: usize = 64;

#[test]
fn a_small_state_of_a_large_queue_takes_memory_as_rows_come_in() {
    let bytes = small_queue();
    let large = forge::queue(forge::with(&bytes, CAPACITY, (1u64 << 26).to_ne_bytes()));
    let (queue, taken, zeroed) = cost(|| NegativeQueue::from_bytes(&large).expect("a queue that was never full"));
    assert_eq!((queue.capacity(), queue.len()), (1 << 26, 2));
    assert!(zeroed >= (1 << 26) * 14, "{zeroed}");
    assert!(taken < 64 * bytes.len(), "{taken} bytes for {}", bytes.len());
    assert_eq!(queue.to_bytes(), large);
}

#[test]
fn a_queue_past_memory_is_an_error() {
    let bytes = small_queue();
    // 16 PB, which no process can address.
    let huge = forge::with(&bytes, CAPACITY, 4_000_000_000u64.to_ne_bytes());
    let huge = forge::queue(forge::with(&huge, DIM, (1u64 << 20).to_ne_bytes()));
    let (result, taken, _) = cost(|| NegativeQueue::from_bytes(&huge));
    assert!(matches!(result, Err(Error::Shape { argument, .. }) if argument == "queue"));
    assert!(taken < 64 * bytes.len(), "{taken}");
}

#[test]
fn counts_in_a_state_that_its_bytes_do_not_hold_take_no_memory() {
    let bytes = small_queue();
    for (at, number) in [(RUNS, u64::MAX), (RUNS, 1 << 40), (NEXT, u64::MAX)] {
        let forged = forge::queue(forge::with(&bytes, at, number.to_ne_bytes()));
        let (result, taken, zeroed) = cost(|| NegativeQueue::from_bytes(&forged));
        assert!(result.is_err());
        assert!(taken + zeroed < 64 * bytes.len(), "{taken} and {zeroed}");
    }
}

/// Seed 6, width 14, depth 22, draws 30, and then cells, or alpha 38 and cells 46.
const WIDTH: usize = 14;
const DEPTH: usize = 22;
const DRAWS: usize = 30;
const CELLS: usize = 38;

#[test]
fn estimators_take_memory_in_proportion_to_their_bytes() {
    fn check<E: FrequencyEstimator>(mut estimator: E) {
        estimator.observe(&(0..1000).map(|i| i % 300).collect::<Vec<_>>());
        let bytes = estimator.to_bytes();
        let (restored, taken, zeroed) = cost(|| E::from_bytes(&bytes).expect("a saved state"));
        // Hash tables are at most 7/8 full and double, so that 16 bytes of a count may take 39.
        assert!(taken + zeroed < 3 * bytes.len() + 4096, "{taken} and {zeroed} for {}", bytes.len());
        assert_eq!(restored.to_bytes(), bytes);
        for (at, number) in [(WIDTH, 1u64 << 40), (DEPTH, 64), (WIDTH, 1 << 20)] {
            let forged = forge::estimator(forge::with(&bytes, at, number.to_le_bytes()));
            let (_, taken, zeroed) = cost(|| E::from_bytes(&forged).is_err());
            assert!(taken + zeroed < 3 * bytes.len() + 4096, "{taken} and {zeroed} for {}", bytes.len());
        }
    }
    check(ExactCounts::new());
    check(CountMin::new(100, 3, 1).expect("valid options"));
    check(GapEstimator::new(100, 3, 0.1, 1).expect("valid options"));
}

#[test]
fn large_sketches_take_memory_as_ids_come_in() {
    let (mut sketch, taken, zeroed) = cost(|| CountMin::new(1 << 26, 2, 1).expect("memory that is not touched"));
    assert!(taken < 4096 && zeroed >= 1 << 30, "{taken} and {zeroed}");
    sketch.observe(&[1, 2, 1]);
    assert_eq!(sketch.probability(1), 2.0 / 3.0);
    let (gaps, taken, zeroed) = cost(|| GapEstimator::new(1 << 24, 2, 0.1, 1).expect("memory that is not touched"));
    assert!(taken < 4096 && zeroed >= 1 << 29, "{taken} and {zeroed}");
    assert_eq!(gaps.probability(1), 1.0);
    let (queue, taken, _) = cost(|| NegativeQueue::new(QueueOptions::new(1 << 24, 32, DType::F32)));
    assert!(queue.is_ok() && taken < 4096, "{taken}");
}

/// 2^62 ids are the most that an estimator counts. What it has by then it keeps, and its state is one.
#[test]
fn estimators_stop_at_the_end_of_their_range() {
    const MOST: u64 = 1 << 62;
    fn check<E: FrequencyEstimator>(state: Vec<u8>, left: usize) {
        let state = forge::estimator(state);
        let mut estimator = E::from_bytes(&state).expect("counters at the end of their range");
        assert_eq!(estimator.to_bytes(), state);
        let ids = [5, 9, 5, 5, 7];
        estimator.observe(&ids);
        let full = estimator.to_bytes();
        let mut again = E::from_bytes(&full).expect("what to_bytes returned");
        assert_eq!(again.to_bytes(), full);
        let mut one_by_one = E::from_bytes(&state).expect("the same once more");
        ids[..left].iter().for_each(|&id| one_by_one.observe(&[id]));
        assert_eq!(one_by_one.to_bytes(), full, "ids are counted up to the last one");
        again.observe(&ids);
        assert_eq!(again.to_bytes(), full, "and not after it");
        assert!(again.log_q(&[5, 9, 1]).iter().all(|log_q| log_q.is_finite() && *log_q <= 0.0));
        let deduplicated = again.log_q_deduplicated(&[5, 9, 1], usize::MAX);
        assert!(deduplicated.iter().all(|log_q| *log_q <= 0.0), "{deduplicated:?}");
    }
    for left in 0..3u64 {
        let draws = (MOST - left).to_le_bytes();
        let mut counts = ExactCounts::new();
        counts.observe(&[5]);
        check::<ExactCounts>(forge::with(&counts.to_bytes(), 14, draws), left as usize);
        let mut sketch = CountMin::new(1, 1, 0).expect("valid options");
        sketch.observe(&[5]);
        check::<CountMin>(forge::with(&forge::with(&sketch.to_bytes(), DRAWS, draws), CELLS, draws), left as usize);
        // A rate of 1, and a gap so long that 1 less it is rounded to minus it.
        let mut gaps = GapEstimator::new(1, 1, 1.0, 0).expect("valid options");
        gaps.observe(&[5]);
        let state =
            forge::with(&forge::with(&gaps.to_bytes(), DRAWS, draws), CELLS + 8, (MOST - left - 1).to_le_bytes());
        let gap = u64::from((MOST as f32).to_bits()) << 32 | 1;
        check::<GapEstimator>(forge::with(&state, CELLS + 16, gap.to_le_bytes()), left as usize);
    }
    for past in [MOST + 1, u64::MAX] {
        let mut counts = ExactCounts::new();
        counts.observe(&[5]);
        let forged = forge::estimator(forge::with(&counts.to_bytes(), 14, past.to_le_bytes()));
        assert!(ExactCounts::from_bytes(&forged).is_err(), "{past}");
        let state = CountMin::new(1, 1, 0).expect("valid options").to_bytes();
        assert!(CountMin::from_bytes(&forge::estimator(forge::with(&state, DRAWS, past.to_le_bytes()))).is_err());
        let state = GapEstimator::new(1, 1, 0.5, 0).expect("valid options").to_bytes();
        assert!(GapEstimator::from_bytes(&forge::estimator(forge::with(&state, DRAWS, past.to_le_bytes()))).is_err());
    }
}

/// Draws of so many ids that nothing could hold them, or that the allocator refuses.
#[test]
fn sizes_past_memory_are_errors() {
    let samplers: [Box<dyn Distribution>; 3] = [
        Box::new(Uniform::new(u64::from(u32::MAX)).expect("some items")),
        Box::new(LogUniform::new(u64::from(u32::MAX)).expect("some items")),
        Box::new(Unigram::new(&[1.0, 2.0, 3.0], 1.0).expect("some items")),
    ];
    let mut random = RandomStream::new(1, 0);
    let refused = |what: &str, result: Result<Sample, Error>, asked: usize| match result {
        Err(Error::Value { value, rule, .. }) => assert!(value == asked.to_string() && !rule.is_empty(), "{what}"),
        other => panic!("{what} of {asked}: {:?}", other.map(|sample| sample.ids.len())),
    };
    for sampler in &samplers {
        for draws in [usize::MAX, usize::MAX / 16, 1 << 32] {
            refused("draw", sampler.draw(draws, &mut random), draws);
            refused("draw_deduplicated", sampler.draw_deduplicated(draws, &mut random), draws);
        }
        // 32 GiB of ids.
        refused("draw", sampler.draw(u32::MAX as usize, &mut random), u32::MAX as usize);
        assert!(sampler.draw_distinct(usize::MAX, &mut random).is_err());
    }
    for sampler in &samplers[..2] {
        refused("draw_deduplicated", sampler.draw_deduplicated(u32::MAX as usize, &mut random), u32::MAX as usize);
        for count in [u32::MAX as usize, u32::MAX as usize - 1] {
            refused("draw_distinct", sampler.draw_distinct(count, &mut random), count);
        }
    }
    for items in [usize::MAX, 1 << 60] {
        let error = Recommended::new(items).expect_err("too many").to_string();
        assert!(error.starts_with(&format!("num_items is {items}; rule: ")), "{error}");
    }
    // Of three items there are three at most, however many draws.
    let few = samplers[2].draw_deduplicated(10_000_000, &mut random).expect("three ids");
    assert_eq!(few.ids.len(), 3);
}
