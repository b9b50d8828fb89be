//! Rows of one side of the step in `f32`, of unit length under cosine.

use pulp::Arch;
use rayon::prelude::*;

use super::bf16_matmul::Bf16Matmul;
use super::matmul::{PANEL, Panels, packed_len};
use super::row_kernels::Normalize;
use super::words::{Bf16Rows, Bf16RowsMut, PairedQueries};
use super::{resize, rows_per_task};
use crate::problem::embeddings::{DType, Embeddings, prefetch};
use crate::problem::loss::Similarity;

/// Queries, or positives.
#[derive(Debug, Default)]
pub(super) struct Units {
    /// (rows, D)
    values: Vec<f32>,
    inverse_norm: Vec<f64>,
    /// The rows as the right operand of a matmul; empty until [`Units::pack`].
    panels: Vec<f32>,
    /// The same for the matrix unit, where it is used.
    bf16: Bf16Rows,
    paired: PairedQueries,
    rows: usize,
    dim: usize,
}

impl Units {
    pub(super) fn load(
        &mut self,
        arch: Arch,
        matmul: Option<Bf16Matmul>,
        from: &Embeddings<'_>,
        similarity: Similarity,
    ) {
        self.gather(arch, matmul, from.rows(), from.dim(), similarity, |row| (*from, row));
    }

    /// Row i is row `at(i).1` of `at(i).0`.
    pub(super) fn gather<'a>(
        &mut self,
        arch: Arch,
        matmul: Option<Bf16Matmul>,
        rows: usize,
        dim: usize,
        similarity: Similarity,
        at: impl Fn(usize) -> (Embeddings<'a>, usize) + Sync,
    ) {
        (self.rows, self.dim) = (rows, dim);
        resize(&mut self.values, rows * dim);
        resize(&mut self.inverse_norm, rows);
        let size = rows_per_task(dim);
        let mut bf16: Vec<Option<Bf16RowsMut<'_>>> = Vec::new();
        if matmul.is_some() {
            self.bf16.resize(rows, dim);
            bf16.extend(self.bf16.stretches_mut(size).map(Some));
        }
        bf16.resize_with(rows.div_ceil(size), || None);
        let tasks = self.values.par_chunks_mut(size * dim).zip(self.inverse_norm.par_chunks_mut(size));
        tasks.zip(bf16).enumerate().for_each(|(task, ((x, inverse_norm), bf16))| {
            for (row, x) in x.chunks_exact_mut(dim).enumerate() {
                let (embeddings, from) = at(task * size + row);
                embeddings.widen_row(from, x);
            }
            arch.dispatch(Normalize { x, dim, similarity, inverse_norm, bf16, keep: true });
        });
    }

    /// Makes the rows the right operand of the gradients by candidates: [`Units::panels`], or [`Units::paired`].
    pub(super) fn pack(&mut self, matmul: Option<Bf16Matmul>) {
        let (rows, dim) = (self.rows, self.dim);
        if matmul.is_some() {
            return self.paired.load(&self.bf16, rows);
        }
        resize(&mut self.panels, packed_len(rows, dim));
        let panels = self.panels.par_chunks_mut((rows * PANEL).max(1)).enumerate();
        panels.for_each(|(p, panel)| super::matmul::pack_panel(&self.values, dim, p, panel));
    }

    /// [`PairedQueries::weigh`]. [`Units::pack`] must have been called.
    pub(super) fn weigh(&mut self, d_lse: &[f32], positives: impl Iterator<Item = (u32, f64)>) {
        self.paired.weigh(&self.bf16, d_lse, positives);
    }

    /// Bytes of that many rows on every processor, without what [`Units::pack`] makes.
    pub(super) fn bytes(rows: usize, dim: usize, dtype: DType) -> usize {
        // A list of the tasks' rows, which doubles as it grows.
        let tasks = 2 * (rows.div_ceil(rows_per_task(dim)) + 4) * size_of::<Option<Bf16RowsMut<'_>>>();
        let bf16 = if dtype == DType::Bf16 { Bf16Rows::bytes(rows, dim) } else { 0 };
        rows * (dim * size_of::<f32>() + size_of::<f64>()) + bf16 + tasks
    }

    /// Bytes of what [`Units::pack`] makes.
    pub(super) fn packed_bytes(rows: usize, dim: usize, dtype: DType) -> usize {
        let paired = if dtype == DType::Bf16 { PairedQueries::bytes(rows, dim) } else { 0 };
        paired.max(packed_len(rows, dim) * size_of::<f32>())
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

    /// All rows for the matrix unit.
    pub(super) fn bf16(&self) -> &Bf16Rows {
        &self.bf16
    }

    /// All rows as the matrix unit takes them for gradients. [`Units::pack`] must have been called.
    pub(super) fn paired(&self) -> &PairedQueries {
        &self.paired
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
