//! The part of a batch over the whole table that a rank computes: the candidates whose rows it holds.

use std::borrow::Cow;
use std::ops::Range;

use super::elements::Received;
use crate::problem::arrays::{Excluded, Ids, Indices};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Embeddings;
use crate::problem::pool::{Candidates, Pool};
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::table::{RowNegatives, Table};

/// The arrays of a rank's part of a batch, counted from the rank's first row. [`Part::batch`] makes a batch of them.
pub(super) struct Part {
    /// Which rows of the table the rank holds.
    rows: Range<usize>,
    pools: Vec<PoolPart>,
    row_negatives: Option<OwnRowNegatives>,
    /// The embeddings of positives that are rows of the table, from the ranks that hold them.
    positives: Option<Received>,
    positive_ids: Vec<u64>,
    exclude_ids: Option<Vec<u64>>,
}

/// What a rank has of a pool.
struct PoolPart {
    /// Which of the batch's pools it is.
    of: usize,
    candidates: PartCandidates,
}

enum PartCandidates {
    /// All of the rank's rows.
    Shard,
    /// Those of the named rows that the rank holds.
    Rows { rows: Vec<u32>, log_q: Option<Vec<f32>> },
    /// Embeddings of the pool's own.
    Own { ids: Option<Vec<u64>> },
}

struct OwnRowNegatives {
    rows: Vec<u32>,
    per_row: usize,
    /// Where the part has none of the batch's.
    log_q: Option<Vec<f32>>,
}

impl Part {
    /// `rows` are not empty. `home` says that this rank also computes what is in no shard: pools of their own embeddings.
    pub(super) fn new(batch: &Batch<'_>, rows: Range<usize>, home: bool, positives: Option<Received>) -> Part {
        let matrix = &batch.matrix;
        let ids = matrix.table.as_ref().and_then(|table| table.ids.as_ref());
        let shift = Shift { start: if ids.is_some() { 0 } else { rows.start as u64 } };
        let parts = matrix.pools.iter().enumerate().filter_map(|(of, pool)| {
            let candidates = match pool.candidates {
                Candidates::WholeTable => PartCandidates::Shard,
                Candidates::Rows(named) => rows_here(named, pool.log_q, &rows)?,
                Candidates::Embeddings(_) if home => {
                    PartCandidates::Own { ids: pool.ids_slice().map(|ids| shift.ids(ids)) }
                }
                Candidates::Embeddings(_) => return None,
            };
            Some(PoolPart { of, candidates })
        });
        let pools: Vec<PoolPart> = parts.collect();
        let row_negatives = match &matrix.row_negatives {
            Some(all) => Some(OwnRowNegatives { rows: own_here(all, &rows), per_row: all.per_row, log_q: None }),
            // A batch needs candidates: one place for each row, and nothing in it.
            None if pools.is_empty() => Some(OwnRowNegatives {
                rows: vec![RowNegatives::NONE; batch.num_queries()],
                per_row: 1,
                log_q: matrix.pools.first().and_then(|pool| pool.log_q).map(|_| vec![0.0; batch.num_queries()]),
            }),
            None => None,
        };
        Part {
            rows,
            pools,
            row_negatives,
            positives,
            positive_ids: batch.positive_ids.as_deref().map_or(Vec::new(), |ids| shift.ids(ids)),
            exclude_ids: matrix.excluded.as_ref().map(|excluded| shift.ids(&excluded.ids.0)),
        }
    }

    /// Which pool of the part is the batch's pool `of`.
    pub(super) fn pool(&self, of: usize) -> Option<usize> {
        self.pools.iter().position(|pool| pool.of == of)
    }

    /// The rank's batch over its `shard`.
    pub(super) fn batch<'p>(&'p self, whole: &'p Batch<'_>, shard: Embeddings<'p>) -> Batch<'p> {
        let matrix = &whole.matrix;
        let table = matrix.table.as_ref().map(|table| Table {
            shape: shard.shape(),
            embeddings: Some(shard),
            ids: table.ids.as_ref().map(|ids| Ids(Cow::Borrowed(&ids.0[self.rows.clone()]))),
            gradient: table.gradient,
        });
        let row_negatives = self.row_negatives.as_ref().map(|own| RowNegatives {
            rows: Indices::U32(&own.rows),
            per_row: own.per_row,
            log_q: own.log_q.as_deref().or(matrix.row_negatives.and_then(|all| all.log_q)),
        });
        let exclude_ids = self.exclude_ids.as_ref();
        let excluded = matrix
            .excluded
            .as_ref()
            .zip(exclude_ids)
            .map(|(excluded, ids)| Excluded { offsets: excluded.offsets, ids: Ids(Cow::Borrowed(ids)) });
        Batch {
            matrix: ScoreMatrix {
                queries: matrix.queries,
                table,
                pools: self.pools.iter().map(|pool| self.pool_view(pool, &matrix.pools[pool.of])).collect(),
                row_negatives,
                excluded,
            },
            positives: match (&self.positives, &whole.positives) {
                (Some(received), _) => Positives::Separate(received.view()),
                (None, Positives::Separate(embeddings)) => Positives::Separate(*embeddings),
                // There are none: a batch with offsets may have rows without positives alone.
                (None, _) => Positives::Rows(Cow::Borrowed(&[])),
            },
            pairs: whole.pairs,
            positive_ids: Some(Cow::Borrowed(&self.positive_ids)),
            positive_log_q: whole.positive_log_q.as_deref().map(Cow::Borrowed),
            row_weight: whole.row_weight.as_deref().map(Cow::Borrowed),
        }
    }

    fn pool_view<'p>(&'p self, part: &'p PoolPart, whole: &Pool<'p>) -> Pool<'p> {
        let (candidates, ids, log_q) = match &part.candidates {
            PartCandidates::Shard => (Candidates::WholeTable, None, whole.log_q.map(|log_q| &log_q[self.rows.clone()])),
            PartCandidates::Rows { rows, log_q } => (Candidates::Rows(Indices::U32(rows)), None, log_q.as_deref()),
            PartCandidates::Own { ids } => (whole.candidates, ids.as_deref(), whole.log_q),
        };
        Pool { candidates, ids: ids.map(|ids| Ids(Cow::Borrowed(ids))), log_q, gradient: whole.gradient }
    }
}

/// Identities as a rank counts them. An item without an id is its row, and a rank counts rows from its first one, so all
/// other ids are lowered by that row, too. The subtraction wraps: different ids stay different.
struct Shift {
    start: u64,
}

impl Shift {
    fn ids(&self, ids: &[u64]) -> Vec<u64> {
        ids.iter().map(|id| id.wrapping_sub(self.start)).collect()
    }
}

/// The named rows that a rank holds, with their log_q; `None` where it holds none of them.
fn rows_here(named: Indices<'_>, log_q: Option<&[f32]>, here: &Range<usize>) -> Option<PartCandidates> {
    let mine: Vec<usize> = (0..named.len()).filter(|&place| here.contains(&named.at(place))).collect();
    let rows = mine.iter().map(|&place| (named.at(place) - here.start) as u32).collect();
    let log_q = log_q.map(|log_q| mine.iter().map(|&place| log_q[place]).collect());
    (!mine.is_empty()).then_some(PartCandidates::Rows { rows, log_q })
}

/// Negatives of rows' own, less those of other ranks.
fn own_here(all: &RowNegatives<'_>, here: &Range<usize>) -> Vec<u32> {
    let place = |index| match all.by_index(index).filter(|row| here.contains(row)) {
        Some(row) => (row - here.start) as u32,
        None => RowNegatives::NONE,
    };
    (0..all.rows.len()).map(place).collect()
}
