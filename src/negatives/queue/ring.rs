//! Where a queue's rows lie: a ring of slots that are written in turn. The live slots are contiguous in the ring, and
//! so are the expired ones.
//!
//! Rows expire in the order in which they came, so the live ones are the last `len` slots before `next`, modulo the
//! capacity. These are at most two ranges. A full ring is one range, since the order of candidates does not matter. The
//! host computes this without reading the rows, which may be in device memory.

use std::collections::VecDeque;
use std::ops::Range;

/// Slots of the rows that can still be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ring {
    capacity: usize,
    max_age: Option<u64>,
    /// The slot that is written next.
    next: usize,
    /// Live rows of each `push`, oldest first, none of them 0. Every push brings rows and rows go from the front, so
    /// these are the latest pushes without a gap: the place in this list is the age.
    runs: VecDeque<usize>,
}

/// Rows to copy: from row `from` of what is enqueued to slot `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CopiedRows {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) rows: usize,
}

impl Ring {
    pub(crate) fn new(capacity: usize, max_age: Option<u64>) -> Self {
        Ring { capacity, max_age, next: 0, runs: VecDeque::new() }
    }

    /// A ring that was saved; `None` if no ring can have this state.
    pub(crate) fn restored(capacity: usize, max_age: Option<u64>, next: usize, runs: VecDeque<usize>) -> Option<Self> {
        let ring = Ring { capacity, max_age, next, runs };
        let rows = ring.runs.iter().try_fold(0usize, |sum, &rows| sum.checked_add(rows));
        let holds = next < capacity && rows.is_some_and(|rows| rows <= capacity);
        (holds && !ring.has_expired() && !ring.runs.contains(&0)).then_some(ring)
    }

    /// Number of live rows.
    pub(crate) fn len(&self) -> usize {
        self.runs.iter().sum()
    }

    pub(crate) fn next(&self) -> usize {
        self.next
    }

    pub(crate) fn runs(&self) -> &VecDeque<usize> {
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
        let ages = (1..=self.runs.len() as u64).rev();
        let oldest_first = ages.zip(&self.runs).flat_map(|(age, &rows)| std::iter::repeat_n(age, rows));
        // Of a full ring, the first slots hold the rows that came last.
        let first = if self.len() == self.capacity { self.capacity - self.next } else { 0 };
        oldest_first.clone().skip(first).chain(oldest_first.take(first))
    }

    /// Makes room for `rows` rows, at least one, and says where they go, as if they came one by one: of more than
    /// `capacity`, the last `capacity` stay. The second copy has no rows where the first does not wrap around.
    pub(crate) fn push(&mut self, rows: usize) -> [CopiedRows; 2] {
        let kept = rows.min(self.capacity);
        let first = kept.min(self.capacity - self.next);
        let from = rows - kept;
        let copies = [
            CopiedRows { from, to: self.next, rows: first },
            CopiedRows { from: from + first, to: 0, rows: kept - first },
        ];
        self.next = (self.next + kept) % self.capacity;
        let mut overwritten = (self.len() + kept).saturating_sub(self.capacity);
        while let Some(oldest) = self.runs.front_mut().filter(|_| overwritten > 0) {
            let gone = overwritten.min(*oldest);
            *oldest -= gone;
            overwritten -= gone;
            if *oldest == 0 {
                self.runs.pop_front();
            }
        }
        self.runs.push_back(kept);
        while self.has_expired() {
            self.runs.pop_front();
        }
        copies
    }

    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.next = 0;
    }

    /// Whether the oldest rows are too old.
    fn has_expired(&self) -> bool {
        self.max_age.is_some_and(|max_age| self.runs.len() as u64 > max_age)
    }
}
