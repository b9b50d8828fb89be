//! The queue against an explicit one: a `VecDeque` of rows, each with its age.

use std::collections::VecDeque;

use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};

use super::{NegativeQueue, QueueOptions};
use crate::problem::embeddings::{DType, Elements, Embeddings};
use crate::problem::pool::Pool;

/// Rows of a queue's pool.
fn rows(pool: &Pool<'_>) -> usize {
    pool.candidates().expect("a matrix").rows()
}

const DIM: usize = 3;

#[derive(Debug, Clone, PartialEq)]
struct Row {
    embedding: [f32; DIM],
    id: u64,
    log_q: f32,
    age: u64,
}

#[derive(Debug, Clone)]
enum Action {
    Enqueue { rows: usize, padding: usize },
    SaveAndRestore,
    Clear,
}

struct Model {
    capacity: usize,
    max_age: Option<u64>,
    rows: VecDeque<Row>,
    /// Rows that were written since the ring was last empty.
    written: usize,
    made: u64,
}

impl Model {
    /// Rows that no other enqueue makes, exact in every type.
    fn make(&mut self, rows: usize) -> Vec<Row> {
        let mut row = || {
            self.made += 1;
            let n = self.made as f32;
            // Bits in all three bytes of the count, 8 bits in each element: bf16 holds no more.
            let byte = |shift: u64| ((self.made >> shift) & 0xff) as f32;
            Row { embedding: [byte(0), byte(8), -1.0], id: self.made << 33, log_q: -n / 7.0, age: 1 }
        };
        (0..rows).map(|_| row()).collect()
    }

    /// In the order of the queue's pools: oldest first, but for a full ring in the order of its slots.
    fn in_order(&self) -> Vec<Row> {
        let mut rows = Vec::from(self.rows.clone());
        if rows.len() == self.capacity {
            rows.rotate_right(self.written % self.capacity);
        }
        rows
    }

    fn enqueue(&mut self, rows: &[Row]) {
        self.written += rows.len().min(self.capacity);
        self.rows.iter_mut().for_each(|row| row.age += 1);
        for row in rows {
            self.rows.push_back(row.clone());
            if self.rows.len() > self.capacity {
                self.rows.pop_front();
            }
        }
        self.rows.retain(|row| self.max_age.is_none_or(|max_age| row.age <= max_age));
    }
}

fn enqueue(queue: &mut NegativeQueue, rows: &[Row], padding: usize) {
    let stride = DIM + padding;
    let mut values: Vec<f32> =
        rows.iter().flat_map(|row| row.embedding.into_iter().chain(std::iter::repeat_n(f32::NAN, padding))).collect();
    values.truncate((rows.len() - 1) * stride + DIM);
    let (f16s, bf16s): (Vec<_>, Vec<_>) = values.iter().map(|&v| (f16::from_f32(v), bf16::from_f32(v))).unzip();
    let elements = match queue.options.dtype {
        DType::F32 => Elements::F32(&values),
        DType::F16 => Elements::F16(&f16s),
        DType::Bf16 => Elements::Bf16(&bf16s),
    };
    let ids: Vec<u64> = rows.iter().map(|row| row.id).collect();
    let log_q: Vec<f32> = rows.iter().map(|row| row.log_q).collect();
    let mut pool = Pool::new(Embeddings::new(elements, rows.len(), DIM).with_stride(stride));
    if queue.options.ids {
        pool = pool.ids(&ids);
    }
    if queue.options.log_q {
        pool = pool.log_q(&log_q);
    }
    queue.enqueue(&pool).expect("rows that fit");
}

/// What a batch would see, with what the queue does not keep taken from the model.
fn contents(queue: &NegativeQueue, model: &[Row]) -> Vec<Row> {
    let mut embeddings = Vec::new();
    let (mut ids, mut log_q) = (Vec::new(), Vec::new());
    for pool in queue.pools() {
        assert!(!pool.gradient, "a queue has no gradient");
        for row in 0..rows(&pool) {
            let mut embedding = [0f32; DIM];
            pool.candidates().expect("a matrix").widen_row(row, &mut embedding);
            embeddings.push(embedding);
        }
        assert_eq!((pool.ids.is_some(), pool.log_q.is_some()), (queue.options.ids, queue.options.log_q));
        ids.extend(pool.ids_slice().unwrap_or_default());
        log_q.extend(pool.log_q.into_iter().flatten().copied());
    }
    assert_eq!(ids, queue.ids().flatten().copied().collect::<Vec<_>>());
    assert_eq!(log_q, queue.log_q().flatten().copied().collect::<Vec<_>>());
    let ages: Vec<u64> = queue.ages().collect();
    assert_eq!((embeddings.len(), ages.len()), (queue.len(), queue.len()));
    let row = |(i, embedding): (usize, [f32; DIM])| Row {
        embedding,
        id: if queue.options.ids { ids[i] } else { model[i].id },
        log_q: if queue.options.log_q { log_q[i] } else { model[i].log_q },
        age: ages[i],
    };
    embeddings.into_iter().enumerate().map(row).collect()
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let action = prop_oneof![
        12 => (1..20usize, 0..3usize).prop_map(|(rows, padding)| Action::Enqueue { rows, padding }),
        2 => Just(Action::SaveAndRestore),
        1 => Just(Action::Clear),
    ];
    prop::collection::vec(action, 1..30)
}

proptest! {
    #![proptest_config(Config { failure_persistence: None, rng_seed: RngSeed::Fixed(1), ..Config::default() })]
    #[test]
    fn a_queue_holds_what_an_explicit_one_holds(
        capacity in 1..17usize,
        max_age in prop::option::of(1..6u64),
        dtype in prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]),
        (ids, log_q) in any::<(bool, bool)>(),
        actions in actions(),
    ) {
        let options = QueueOptions { capacity, dim: DIM, dtype, ids, log_q, max_age };
        let mut queue = NegativeQueue::new(options).expect("valid options");
        let mut model = Model { capacity, max_age, rows: VecDeque::new(), written: 0, made: 0 };
        for action in actions {
            match action {
                Action::Enqueue { rows, padding } => {
                    let rows = model.make(rows);
                    model.enqueue(&rows);
                    enqueue(&mut queue, &rows, padding);
                }
                Action::SaveAndRestore => {
                    let split: Vec<usize> = queue.pools().map(|pool| rows(&pool)).collect();
                    queue = NegativeQueue::from_bytes(&queue.to_bytes()).expect("saved a moment ago");
                    prop_assert_eq!(split, queue.pools().map(|pool| rows(&pool)).collect::<Vec<_>>());
                }
                Action::Clear => {
                    model.rows.clear();
                    model.written = 0;
                    queue.clear();
                }
            }
            let most = if queue.len() == capacity { 1 } else { 2 };
            prop_assert!(queue.pools().count() <= most);
            prop_assert_eq!(contents(&queue, &model.in_order()), model.in_order());
        }
    }
}

fn saved() -> Vec<u8> {
    let options = QueueOptions::new(7, DIM, DType::F16).with_ids().with_log_q().with_max_age(3);
    let mut queue = NegativeQueue::new(options).expect("valid options");
    let mut model = Model { capacity: 7, max_age: Some(3), rows: VecDeque::new(), written: 0, made: 0 };
    for rows in [4, 2, 1, 3] {
        enqueue(&mut queue, &model.make(rows), 0);
    }
    assert_eq!(queue.pools().count(), 2, "it wraps around");
    queue.to_bytes()
}

#[test]
fn damaged_bytes_are_errors() {
    let bytes = saved();
    for at in 0..bytes.len() {
        for bit in [1, 0x80] {
            let mut damaged = bytes.clone();
            damaged[at] ^= bit;
            assert!(NegativeQueue::from_bytes(&damaged).is_err(), "bit {bit:#x} of byte {at}");
        }
        assert!(NegativeQueue::from_bytes(&bytes[..at]).is_err(), "cut off at {at}");
    }
    let longer = [&bytes[..], &[0; 8]].concat();
    assert!(NegativeQueue::from_bytes(&longer).is_err());
}

/// Bytes with a right checksum and a wrong number: what the checks behind it say.
#[test]
fn impossible_states_are_errors() {
    let bytes = saved();
    let with = |numbers: &[(usize, u64)]| {
        let mut bytes = bytes.clone();
        for &(word, number) in numbers {
            bytes[8 * word..8 * word + 8].copy_from_slice(&number.to_ne_bytes());
        }
        let body = bytes.len() - 8;
        let sum = crate::saved::checksum(&bytes[..body]);
        bytes[body..].copy_from_slice(&sum.to_ne_bytes());
        NegativeQueue::from_bytes(&bytes).map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(with(&[(4, 7)]), Ok(()), "nothing changed");
    // 16 PB, which the process cannot address.
    let huge = with(&[(4, 4_000_000_000), (5, 1 << 20)]).expect_err("too large");
    assert!(huge.starts_with("queue has shape (4000000000, 1048576); rule: what memory holds"), "{huge}");
    // MAGIC, VERSION, type, arrays, capacity, dim, max_age, next, enqueues with live rows; then 2, 1 and 3: the first
    // enqueue has expired.
    for (word, number, message) in [
        (0, 1, "bytes is something else"),
        (1, 1, "bytes is of version 1"),
        (2, 3, "bytes is of elements 3"),
        (3, 4, "bytes is of elements 1 and arrays 4"),
        (4, 0, "queue has shape (0, 3)"),
        (4, u64::MAX, "queue has shape"),
        (4, 5, "bytes is in a state"),
        (5, 0, "queue has shape (7, 0)"),
        (5, 4, "bytes has"),
        (6, 2, "bytes is in a state"),
        (7, 7, "bytes is in a state"),
        (8, 2, "bytes has"),
        (8, u64::MAX, "bytes has"),
        (9, 0, "bytes is in a state"),
        (10, 3, "bytes is in a state"),
        (11, u64::MAX, "bytes is in a state"),
    ] {
        let error = with(&[(word, number)]).expect_err("impossible");
        assert!(error.starts_with(message), "word {word} as {number}: {error}");
    }
}
