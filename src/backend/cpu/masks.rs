//! Which candidates are masked in which rows. Ids are resolved once and looked up tile by tile.
//!
//! Hits are rare, so rows are hashed by the ids that they reject, and each candidate of a tile is looked up. Memory is
//! O(B + excluded ids), independent of N.

use crate::hash::{IdMap, mix};
use crate::problem::batch::Batch;
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;

/// Rows by rejected key. A candidate's key is its id; without ids, its index over all pools.
#[derive(Debug, Default)]
pub(super) struct Masks {
    /// Key → start and length in `rows`.
    spans: IdMap<u64, (u32, u32)>,
    /// Rows that reject the key, ascending, each once.
    rows: Vec<u32>,
    /// One bit for each of some hashes, set where a key of that hash is rejected. Almost no candidate is rejected, and
    /// this says so with one look at a few KiB.
    some: Vec<u64>,
    /// Scratch of `resolve`: (key, row).
    pairs: Vec<(u64, u32)>,
}

/// A candidate of a tile, and the next row that rejects it.
#[derive(Debug, Clone, Copy)]
pub(super) struct RejectedCandidate {
    next_row: u32,
    column: u32,
    /// Where that row and the last one behind it are in the list of rows.
    at: u32,
    end: u32,
}

impl Masks {
    /// Resolves a batch: its positives (by id, else by index) and its excluded ids.
    pub(super) fn of_batch(&mut self, batch: &Batch<'_>) {
        self.pairs.clear();
        let rows = batch.pairs.rows(batch.num_queries());
        match (&batch.positive_ids, &batch.positives) {
            // A positive's own index has its id, so the id covers it.
            (Some(ids), _) => self.pairs.extend(ids.iter().copied().zip(rows)),
            (None, Positives::Index(positives)) => {
                self.pairs.extend(positives.iter().map(|&index| u64::from(index)).zip(rows));
            }
            (None, Positives::Separate(_) | Positives::Rows(_)) => {}
        }
        self.resolve(&batch.matrix);
    }

    /// Resolves a search: excluded ids.
    pub(super) fn of_search(&mut self, matrix: &ScoreMatrix<'_>) {
        self.pairs.clear();
        self.resolve(matrix);
    }

    fn resolve(&mut self, matrix: &ScoreMatrix<'_>) {
        if let Some(excluded) = &matrix.excluded {
            for row in 0..matrix.num_queries() {
                self.pairs.extend(excluded.row(row).iter().map(|&id| (id, row as u32)));
            }
        }
        // One pair once: a candidate that is excluded twice is one negative less, not two.
        self.pairs.sort_unstable();
        self.pairs.dedup();
        self.rows.clear();
        self.rows.extend(self.pairs.iter().map(|&(_, row)| row));
        self.spans.clear();
        self.some.clear();
        self.some.resize(words(self.pairs.len()), 0);
        let mut start = 0;
        for run in self.pairs.chunk_by(|a, b| a.0 == b.0) {
            let (word, bit) = self.bit(run[0].0);
            self.some[word] |= bit;
            self.spans.insert(run[0].0, (start, run.len() as u32));
            start += run.len() as u32;
        }
    }

    /// Where the bit of a key's hash is.
    fn bit(&self, key: u64) -> (usize, u64) {
        let hash = mix(key);
        ((hash >> 32) as usize & (self.some.len() - 1), 1 << (hash % 64))
    }

    /// The rows that reject a candidate of that key, ascending.
    pub(super) fn rejecting(&self, key: u64) -> &[u32] {
        &self.rows[self.span(key)]
    }

    /// Where these rows are in the list of rows.
    fn span(&self, key: u64) -> std::ops::Range<usize> {
        let (word, bit) = self.bit(key);
        if self.some[word] & bit == 0 {
            return 0..0;
        }
        self.spans.get(&key).map_or(0..0, |&(first, len)| first as usize..(first + len) as usize)
    }

    /// Lists the candidates of a tile that some of `rows` reject, before [`Masks::take_hits`] walks through these rows.
    pub(super) fn open(
        &self,
        rows: std::ops::Range<usize>,
        keys: impl Iterator<Item = u64>,
        to: &mut Vec<RejectedCandidate>,
    ) {
        to.clear();
        if self.spans.is_empty() {
            return;
        }
        for (column, key) in keys.enumerate() {
            let span = self.span(key);
            let rejecting = &self.rows[span.clone()];
            let from = rejecting.partition_point(|&row| (row as usize) < rows.start);
            if let Some(&next_row) = rejecting.get(from).filter(|&&row| (row as usize) < rows.end) {
                let (at, end) = ((span.start + from) as u32, span.end as u32);
                to.push(RejectedCandidate { next_row, column: column as u32, at, end });
            }
        }
    }

    /// Calls `hit(row, column)` for each masked pair with a row before `end` that no earlier call has had.
    pub(super) fn take_hits(&self, rejected: &mut [RejectedCandidate], end: usize, mut hit: impl FnMut(usize, usize)) {
        for candidate in rejected {
            while (candidate.next_row as usize) < end {
                hit(candidate.next_row as usize, candidate.column as usize);
                candidate.at += 1;
                let next = (candidate.at < candidate.end).then(|| self.rows[candidate.at as usize]);
                candidate.next_row = next.unwrap_or(u32::MAX);
            }
        }
    }

    /// Bytes that the masks of that many positives and of a matrix's exclusions take.
    pub(super) fn bytes(matrix: &ScoreMatrix<'_>, positives: usize) -> usize {
        let pairs = positives + matrix.excluded.as_ref().map_or(0, |excluded| excluded.ids.0.len());
        // A hash table is at most 7/8 full and doubles: up to 16/7 slots and control bytes for an entry.
        pairs * (4 + 16 + 16 * 25 / 7) + words(pairs) * size_of::<u64>()
    }
}

/// Words of 64 bits that say of a hash whether a key of it is rejected: sixteen bits for each of so many pairs. A power of
/// two, for quick remainders.
fn words(pairs: usize) -> usize {
    (pairs / 4).next_power_of_two()
}
