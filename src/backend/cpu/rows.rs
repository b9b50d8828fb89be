//! Gradients of the sides that have one row for each query or positive, and how gradients are written or added.

use std::sync::Mutex;

use pulp::Arch;
use rayon::prelude::*;

use super::row_kernels::ChainRule;
use super::tile::Scratch;
use super::units::Units;
use super::{Borrowed, resize, rows_per_task};
use crate::problem::embeddings::Matrix;
use crate::problem::loss::Similarity;

/// How the gradient of one side is written.
#[derive(Clone, Copy)]
pub(super) struct RowTasks<'a> {
    pub(super) arch: Arch,
    pub(super) similarity: Similarity,
    /// 1 / temperature.
    pub(super) gamma: f64,
    /// Whether gradients are added to what is there.
    pub(super) accumulate: bool,
    pub(super) scratch: &'a Mutex<Vec<Scratch>>,
}

impl RowTasks<'_> {
    /// Writes the gradient (rows, D) of `side`. `sum(row, d)` writes the gradient by the row's unit vector, without gamma.
    pub(super) fn write(
        &self,
        to: &mut Matrix<f32>,
        side: &Units,
        rows: usize,
        sum: impl Fn(usize, &mut [f64]) + Sync,
    ) {
        let dim = side.dim();
        if !self.accumulate {
            to.set_shape(rows, dim);
        }
        let size = rows_per_task(dim);
        let chunks = to.values.par_chunks_mut(size * dim).enumerate();
        chunks.for_each_init(
            || Borrowed::take(self.scratch),
            |Borrowed(scratch, _), (chunk, to)| {
                let (first, sums) = (chunk * size, &mut scratch.sums);
                resize(sums, dim);
                write_or_add(to, self.accumulate, &mut scratch.spare, |d| {
                    for (row, d) in d.chunks_exact_mut(dim).enumerate() {
                        sum(first + row, sums);
                        for (d, &sum) in d.iter_mut().zip(sums.iter()) {
                            *d = (self.gamma * sum) as f32;
                        }
                    }
                    if self.similarity == Similarity::Cosine {
                        let (unit, inverse_norm) = side.rows_from(first);
                        self.arch.dispatch(ChainRule { d, unit, dim, inverse_norm });
                    }
                });
            },
        );
    }
}

/// Lets `write` write a stretch of gradients: into the caller's, or into `spare`, which is then added to the caller's.
pub(super) fn write_or_add(to: &mut [f32], accumulate: bool, spare: &mut Vec<f32>, write: impl FnOnce(&mut [f32])) {
    if !accumulate {
        return write(to);
    }
    resize(spare, to.len());
    write(spare);
    for (to, &d) in to.iter_mut().zip(spare.iter()) {
        *to += d;
    }
}
