//! A search among a batch's negatives: what its masks leave out, as exclusions of a search.

use std::borrow::Cow;

use super::arrays::{Excluded, Ids};
use super::batch::Batch;
use super::pool::Pool;
use super::positives::Positives;
use super::score_matrix::ScoreMatrix;
use super::search::Search;
use crate::error::{Result, missing};

/// What a search among a batch's negatives leaves out, per row as CSR, and ids to compare where the batch has none.
pub(crate) struct Negatives {
    offsets: Vec<i64>,
    left_out: Vec<u64>,
    /// (N): each candidate's index as its id, where candidates have no ids.
    indices: Option<Vec<u64>>,
}

impl Negatives {
    pub(crate) fn of_batch(batch: &Batch<'_>) -> Result<Self> {
        if batch.matrix.pools.is_empty() {
            return Err(missing("candidates", "negatives are searched among the candidates of pools"));
        }
        let (mut offsets, mut left_out) = (vec![0], Vec::new());
        for row in 0..batch.num_queries() {
            let pairs = batch.pairs.of_row(row);
            match (&batch.positive_ids, &batch.positives) {
                (Some(ids), _) => left_out.extend_from_slice(&ids[pairs]),
                (None, Positives::Index(indices)) => left_out.extend(indices[pairs].iter().map(|&i| u64::from(i))),
                (None, _) => {}
            }
            left_out.extend(batch.matrix.excluded.iter().flat_map(|excluded| excluded.row(row)));
            offsets.push(left_out.len() as i64);
        }
        let indices = (!batch.matrix.has_ids()).then(|| (0..batch.num_candidates() as u64).collect());
        Ok(Negatives { offsets, left_out, indices })
    }

    pub(crate) fn search<'s>(&'s self, batch: &'s Batch<'_>) -> Search<'s> {
        let matrix = &batch.matrix;
        let excluded = Excluded { offsets: &self.offsets, ids: Ids(Cow::Borrowed(&self.left_out)) };
        let mut pools: Vec<Pool<'s>> = matrix.pools.clone();
        for ((start, _), pool) in matrix.pools_with_start().zip(&mut pools) {
            pool.log_q = None;
            if let (Some(indices), Some(embeddings)) = (&self.indices, pool.candidates()) {
                pool.ids = Some(Ids(Cow::Borrowed(&indices[start..start + embeddings.rows()])));
            }
        }
        Search {
            matrix: ScoreMatrix {
                queries: matrix.queries,
                table: matrix.table.clone(),
                pools,
                row_negatives: None,
                excluded: Some(excluded),
            },
        }
    }
}
