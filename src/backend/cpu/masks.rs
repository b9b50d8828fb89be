//! Which candidates are masked in which rows. Ids are resolved once and looked up tile by tile.
//!
//! Hits are rare, so rows are hashed by the ids that they reject, and each candidate of a tile is looked up. Memory is
//! O(B + excluded ids), independent of N.

use crate::hash::IdMap;
use crate::problem::batch::{Batch, Positives};
use crate::problem::score_matrix::ScoreMatrix;

/// Rows by rejected key. A candidate's key is its id; without ids, its index over all pools.
#[derive(Debug, Default)]
pub(super) struct Masks {
    /// Key → start and length in `rows`.
    spans: IdMap<u64, (u32, u32)>,
    /// Rows that reject the key, ascending, each once.
    rows: Vec<u32>,
    /// Scratch of `resolve`: (key, row).
    pairs: Vec<(u64, u32)>,
}

impl Masks {
    /// Resolves a batch: its positives (by id, else by index) and its excluded ids.
    pub(super) fn of_batch(&mut self, batch: &Batch<'_>) {
        self.pairs.clear();
        match (&batch.positive_ids, &batch.positives) {
            // The positive's own index has its id, so the id covers it.
            (Some(ids), _) => self.pairs.extend(ids.iter().zip(0..).map(|(&id, row)| (id, row))),
            (None, Positives::Index(positives)) => {
                self.pairs.extend(positives.iter().zip(0..).map(|(&index, row)| (u64::from(index), row)));
            }
            (None, Positives::Separate(_)) => {}
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
        let mut start = 0;
        for run in self.pairs.chunk_by(|a, b| a.0 == b.0) {
            self.spans.insert(run[0].0, (start, run.len() as u32));
            start += run.len() as u32;
        }
    }

    /// Calls `hit(row, column)` for each masked pair of rows `rows` and of a tile's candidates, both counted from the
    /// range's start. `start` is the index over all pools of the tile's first candidate, `ids` the tile's ids.
    pub(super) fn for_each_hit(
        &self,
        rows: std::ops::Range<usize>,
        start: usize,
        len: usize,
        ids: Option<&[u64]>,
        mut hit: impl FnMut(usize, usize),
    ) {
        if self.spans.is_empty() {
            return;
        }
        for column in 0..len {
            let key = ids.map_or((start + column) as u64, |ids| ids[column]);
            if let Some(&(first, len)) = self.spans.get(&key) {
                let rejecting = &self.rows[first as usize..(first + len) as usize];
                let from = rejecting.partition_point(|&row| (row as usize) < rows.start);
                for &row in rejecting[from..].iter().take_while(|&&row| (row as usize) < rows.end) {
                    hit(row as usize - rows.start, column);
                }
            }
        }
    }

    /// Bytes that masks take.
    pub(super) fn bytes(matrix: &ScoreMatrix<'_>) -> usize {
        let excluded = matrix.excluded.as_ref().map_or(0, |excluded| excluded.ids.0.len());
        // A hash table is at most 7/8 full and doubles: up to 16/7 slots and control bytes for an entry.
        (matrix.num_queries() + excluded) * (4 + 16 + 16 * 25 / 7)
    }
}
