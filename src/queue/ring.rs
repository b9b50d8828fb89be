//! Where a queue's rows lie: a ring of slots, written in turn, whose expired and live parts are contiguous.
//!
//! Rows come and expire in one order, so that the live ones are the last `len` slots before `next`, modulo the capacity:
//! at most two ranges, and one where the ring is full, for the order of candidates does not matter. The host knows this
//! without looking at the rows, wherever these are.

use std::collections::VecDeque;
use std::ops::Range;

/// Slots of the rows that can still be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ring {
    capacity: usize,
    max_age: Option<u64>,
    /// The slot that is written next.
    next: usize,
    /// Calls of `push` so far.
    enqueues: u64,
    /// Live rows by the `push` that brought them, oldest first.
    runs: VecDeque<Run>,
}

/// Live rows of one enqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Its number: the first is 1.
    pub(crate) enqueue: u64,
    pub(crate) rows: usize,
}

/// Rows to copy: from row `from` of what is enqueued to slot `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) rows: usize,
}

impl Ring {
    pub(crate) fn new(capacity: usize, max_age: Option<u64>) -> Self {
        Ring { capacity, max_age, next: 0, enqueues: 0, runs: VecDeque::new() }
    }

    /// A ring that was saved, if it can have been one.
    pub(crate) fn restored(
        capacity: usize,
        max_age: Option<u64>,
        next: usize,
        enqueues: u64,
        runs: VecDeque<Run>,
    ) -> Option<Self> {
        let ring = Ring { capacity, max_age, next, enqueues, runs };
        let rows = ring.runs.iter().try_fold(0usize, |sum, run| sum.checked_add(run.rows));
        let ascending = ring.runs.iter().zip(ring.runs.iter().skip(1)).all(|(a, b)| a.enqueue < b.enqueue);
        let each = |run: &Run| run.rows >= 1 && (1..=enqueues).contains(&run.enqueue) && !ring.expired(run);
        let holds = next < capacity && rows.is_some_and(|rows| rows <= capacity);
        (holds && ascending && ring.runs.iter().all(each)).then_some(ring)
    }

    /// Number of live rows.
    pub(crate) fn len(&self) -> usize {
        self.runs.iter().map(|run| run.rows).sum()
    }

    pub(crate) fn next(&self) -> usize {
        self.next
    }

    pub(crate) fn enqueues(&self) -> u64 {
        self.enqueues
    }

    pub(crate) fn runs(&self) -> &VecDeque<Run> {
        &self.runs
    }

    /// Slots of the live rows: all of them where the ring is full, which is the same memory in every step; else oldest first.
    /// The second range is empty where they do not wrap around.
    pub(crate) fn live(&self) -> [Range<usize>; 2] {
        let len = self.len();
        if len == self.capacity {
            return [0..len, 0..0];
        }
        // Not `next - len`, which may be below 0.
        let start = (self.next + self.capacity - len) % self.capacity;
        let first = len.min(self.capacity - start);
        [start..start + first, 0..len - first]
    }

    /// Age of each live row in the step that follows, in the order of [`live`](Ring::live). The latest have age 1.
    pub(crate) fn ages(&self) -> impl Iterator<Item = u64> {
        let oldest_first = self.runs.iter().flat_map(|run| std::iter::repeat_n(self.age(run), run.rows));
        // Of a full ring, the first slots hold the rows that came last.
        let first = if self.len() == self.capacity { self.capacity - self.next } else { 0 };
        oldest_first.clone().skip(first).chain(oldest_first.take(first))
    }

    /// Makes room for `rows` rows and says where they go, as if they came one by one: of more than `capacity`, the last
    /// `capacity` stay. The second copy has no rows where the first does not wrap around.
    pub(crate) fn push(&mut self, rows: usize) -> [Rows; 2] {
        let kept = rows.min(self.capacity);
        let first = kept.min(self.capacity - self.next);
        let from = rows - kept;
        let copies =
            [Rows { from, to: self.next, rows: first }, Rows { from: from + first, to: 0, rows: kept - first }];
        self.next = (self.next + kept) % self.capacity;
        self.enqueues += 1;
        let mut overwritten = (self.len() + kept).saturating_sub(self.capacity);
        while let Some(oldest) = self.runs.front_mut().filter(|_| overwritten > 0) {
            let gone = oldest.rows.min(overwritten);
            oldest.rows -= gone;
            overwritten -= gone;
            if oldest.rows == 0 {
                self.runs.pop_front();
            }
        }
        self.runs.push_back(Run { enqueue: self.enqueues, rows: kept });
        while self.runs.front().is_some_and(|run| self.expired(run)) {
            self.runs.pop_front();
        }
        copies
    }

    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.next = 0;
    }

    fn age(&self, run: &Run) -> u64 {
        self.enqueues - run.enqueue + 1
    }

    fn expired(&self, run: &Run) -> bool {
        self.max_age.is_some_and(|max_age| self.age(run) > max_age)
    }
}
