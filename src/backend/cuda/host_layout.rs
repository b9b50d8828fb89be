//! Where a batch in host memory goes on the device, and where its results are there.

use super::memory::{Layout, Part};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Embeddings;
use crate::problem::pool::Candidates;
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::statistics::Request;

/// Where a search's arrays go, and those of a batch that a search has too.
#[derive(Debug)]
pub(super) struct SearchInputs {
    pub(super) queries: Part,
    pub(super) table: Part,
    pub(super) table_ids: Part,
    pub(super) pools: Vec<PoolInputs>,
    pub(super) exclude_offsets: Part,
    pub(super) exclude_ids: Part,
}

/// Where a batch's arrays go.
#[derive(Debug)]
pub(super) struct Inputs {
    pub(super) search: SearchInputs,
    /// Indices, or embeddings.
    pub(super) positives: Part,
    pub(super) positive_offsets: Part,
    pub(super) positive_ids: Part,
    pub(super) row_negatives: Part,
    pub(super) row_negatives_log_q: Part,
}

#[derive(Debug)]
pub(super) struct PoolInputs {
    /// Embeddings, or rows of the table.
    pub(super) candidates: Part,
    pub(super) ids: Part,
    pub(super) log_q: Part,
}

/// Where row statistics and gradients are on the device.
#[derive(Debug)]
pub(super) struct Outputs {
    pub(super) lse: Part,
    pub(super) positive: Part,
    pub(super) num_negatives: Part,
    pub(super) expected_score: Part,
    pub(super) entropy: Part,
    pub(super) above: Part,
    pub(super) ties: Part,
    pub(super) expected_negative: Part,
    pub(super) d_lse: Part,
    pub(super) d_positive: Part,
    pub(super) d_queries: Part,
    pub(super) d_positive_embeddings: Part,
    /// By tau, and by its logarithm.
    pub(super) temperature: Part,
    pub(super) d_candidates: Vec<Part>,
    /// Of the rows with a gradient.
    pub(super) d_table: Part,
    /// Which these are; none where they are all of the table.
    pub(super) table_rows: Part,
    pub(super) most_table_rows: usize,
}

impl SearchInputs {
    pub(super) fn lay_out(layout: &mut Layout, matrix: &ScoreMatrix<'_>) -> Self {
        let pool = |layout: &mut Layout, (p, pool): (usize, &crate::Pool<'_>)| {
            let n = matrix.candidates(p).len();
            PoolInputs {
                candidates: match pool.candidates {
                    Candidates::Embeddings(embeddings) => rows_part(layout, &embeddings),
                    Candidates::Rows(_) => layout.part(n, 4),
                    Candidates::WholeTable => Part::default(),
                },
                ids: layout.part_if(pool.ids.is_some(), n, 8),
                log_q: layout.part_if(pool.log_q.is_some(), n, 4),
            }
        };
        let table = matrix.table.as_ref();
        let embeddings = table.and_then(|table| table.embeddings);
        SearchInputs {
            queries: rows_part(layout, &matrix.queries),
            table: embeddings.map_or_else(Part::default, |embeddings| rows_part(layout, &embeddings)),
            table_ids: layout.part(table.and_then(|table| table.ids.as_ref()).map_or(0, |ids| ids.0.len()), 8),
            pools: matrix.pools.iter().enumerate().map(|p| pool(layout, p)).collect(),
            exclude_offsets: layout.part_if(matrix.excluded.is_some(), matrix.num_queries() + 1, 8),
            exclude_ids: layout.part(matrix.excluded.as_ref().map_or(0, |excluded| excluded.ids.0.len()), 8),
        }
    }
}

impl Inputs {
    pub(super) fn lay_out(layout: &mut Layout, batch: &Batch<'_>) -> Self {
        let (pairs, separate) = (batch.num_positives(), matches!(batch.positives, Positives::Separate(_)));
        let own = batch.matrix.row_negatives;
        Inputs {
            search: SearchInputs::lay_out(layout, &batch.matrix),
            positives: match &batch.positives {
                Positives::Index(_) | Positives::Rows(_) => layout.part(pairs, 4),
                Positives::Separate(embeddings) => rows_part(layout, embeddings),
            },
            positive_offsets: layout.part_if(several(batch).is_some(), batch.num_queries() + 1, 8),
            positive_ids: layout.part_if(separate && batch.positive_ids.is_some(), pairs, 8),
            row_negatives: layout.part(own.map_or(0, |own| own.rows.len()), 4),
            row_negatives_log_q: layout.part(own.and_then(|own| own.log_q).map_or(0, <[f32]>::len), 4),
        }
    }
}

fn rows_part(layout: &mut Layout, embeddings: &Embeddings<'_>) -> Part {
    layout.part(embeddings.bytes().len(), 1)
}

impl Outputs {
    pub(super) fn lay_out(layout: &mut Layout, batch: &Batch<'_>, request: Request) -> Self {
        let (b, pairs, dim, back) = (batch.num_queries(), batch.num_positives(), batch.dim(), request.gradients);
        let most_table_rows = if back { most_table_rows(batch) } else { 0 };
        let separate = matches!(batch.positives, Positives::Separate(_));
        let detail = request.moments || request.rank;
        Outputs {
            lse: layout.part(b, 8),
            positive: layout.part(pairs, 8),
            num_negatives: layout.part(b, 8),
            expected_score: layout.part_if(detail, b, 8),
            entropy: layout.part_if(detail, b, 8),
            above: layout.part_if(detail, pairs, 8),
            ties: layout.part_if(detail, pairs, 8),
            expected_negative: layout.part_if(back, b * dim, 4),
            d_lse: layout.part_if(back, b, 8),
            d_positive: layout.part_if(back, pairs, 8),
            d_queries: layout.part_if(back, b * dim, 4),
            d_positive_embeddings: layout.part_if(back && separate, pairs * dim, 4),
            temperature: layout.part_if(back, 2, 8),
            d_candidates: batch
                .matrix
                .pools
                .iter()
                .map(|pool| layout.part_if(back, gradient_rows(pool) * dim, 4))
                .collect(),
            d_table: layout.part(most_table_rows * dim, 4),
            table_rows: layout.part_if(!has_whole_table(batch), most_table_rows, 4),
            most_table_rows,
        }
    }
}

/// The offsets of positives, unless each row has one: such a batch is computed as one without offsets.
pub(super) fn several<'b>(batch: &'b Batch<'_>) -> Option<&'b [i64]> {
    batch.pairs.offsets.filter(|offsets| offsets.iter().zip(0..).any(|(&offset, row)| offset != row))
}

pub(super) fn has_whole_table(batch: &Batch<'_>) -> bool {
    batch.matrix.pools.iter().any(|pool| pool.gradient && matches!(pool.candidates, Candidates::WholeTable))
}

/// A bound of the rows of the table that have a gradient, so that a plan need not look for them.
fn most_table_rows(batch: &Batch<'_>) -> usize {
    let matrix = &batch.matrix;
    let Some(table) = matrix.table.as_ref().filter(|table| table.gradient) else { return 0 };
    if has_whole_table(batch) {
        return table.shape.rows;
    }
    let by_reference = matrix.pools.iter().filter(|pool| pool.gradient).map(|pool| match pool.candidates {
        Candidates::Rows(rows) => rows.len(),
        Candidates::Embeddings(_) | Candidates::WholeTable => 0,
    });
    let own = matrix.row_negatives.map_or(0, |own| own.rows.len());
    (by_reference.sum::<usize>() + own + batch.num_positives()).min(table.shape.rows)
}

/// Rows of a pool's own gradient: none of a pool without one, and of a pool whose candidates are rows of a table.
pub(super) fn gradient_rows(pool: &crate::Pool<'_>) -> usize {
    pool.candidates().filter(|_| pool.gradient).map_or(0, |embeddings| embeddings.rows())
}
