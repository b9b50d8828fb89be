//! Rows of one side of the step in `f32`, of unit length under cosine.

use pulp::Arch;
use rayon::prelude::*;

use super::matmul::{PANEL, Panels, packed_len};
use super::row_kernels::Normalize;
use super::{resize, rows_per_task};
use crate::problem::embeddings::{Embeddings, prefetch};
use crate::problem::loss::Similarity;

/// Queries, or positives.
#[derive(Debug, Default)]
pub(super) struct Units {
    /// (rows, D)
    values: Vec<f32>,
    inverse_norm: Vec<f64>,
    /// The rows as the right operand of a matmul; empty until [`Units::pack`].
    panels: Vec<f32>,
    rows: usize,
    dim: usize,
}

impl Units {
    pub(super) fn load(&mut self, arch: Arch, from: &Embeddings<'_>, similarity: Similarity) {
        self.gather(arch, from.rows(), from.dim(), similarity, |row| (*from, row));
    }

    /// Row i is row `at(i).1` of `at(i).0`.
    pub(super) fn gather<'a>(
        &mut self,
        arch: Arch,
        rows: usize,
        dim: usize,
        similarity: Similarity,
        at: impl Fn(usize) -> (Embeddings<'a>, usize) + Sync,
    ) {
        (self.rows, self.dim) = (rows, dim);
        resize(&mut self.values, rows * dim);
        resize(&mut self.inverse_norm, rows);
        let size = rows_per_task(dim);
        let tasks = self.values.par_chunks_mut(size * dim).zip(self.inverse_norm.par_chunks_mut(size)).enumerate();
        tasks.for_each(|(task, (x, inverse_norm))| {
            for (row, x) in x.chunks_exact_mut(dim).enumerate() {
                let (embeddings, from) = at(task * size + row);
                embeddings.widen_row(from, x);
            }
            arch.dispatch(Normalize { x, dim, similarity, inverse_norm });
        });
    }

    /// Copies the rows into panels, for [`Units::panels`].
    pub(super) fn pack(&mut self) {
        let (rows, dim) = (self.rows, self.dim);
        resize(&mut self.panels, packed_len(rows, dim));
        let panels = self.panels.par_chunks_mut((rows * PANEL).max(1)).enumerate();
        panels.for_each(|(p, panel)| super::matmul::pack_panel(&self.values, dim, p, panel));
    }

    /// Bytes of that many rows, without panels.
    pub(super) fn bytes(rows: usize, dim: usize) -> usize {
        rows * (dim * size_of::<f32>() + size_of::<f64>())
    }

    /// Bytes of the panels.
    pub(super) fn panel_bytes(rows: usize, dim: usize) -> usize {
        packed_len(rows, dim) * size_of::<f32>()
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    /// All rows.
    pub(super) fn values(&self) -> &[f32] {
        &self.values
    }

    /// `k` rows from `from` on as the right operand of a matmul. [`Units::pack`] must have been called.
    pub(super) fn panels(&self, from: usize, k: usize) -> Panels<'_> {
        Panels::of_rows(&self.panels, self.rows, self.dim, from, k)
    }

    /// Asks the processor for a row that is read soon.
    pub(super) fn prefetch(&self, row: usize) {
        prefetch(self.row(row));
    }

    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// 1 / length of a row; NaN where it is not finite.
    pub(super) fn inverse_norm(&self, row: usize) -> f64 {
        self.inverse_norm[row]
    }

    /// Rows from `row` on and their inverse norms.
    pub(super) fn rows_from(&self, row: usize) -> (&[f32], &[f64]) {
        (&self.values[row * self.dim..], &self.inverse_norm[row..])
    }
}
