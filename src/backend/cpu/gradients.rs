//! Gradients of queries, positives, temperature and pools, from what the streaming pass left. Those of a table are in `table.rs`.

use std::sync::Mutex;

use pulp::Arch;
use rayon::prelude::*;

use super::bf16_matmul::Bf16Matmul;
use super::candidates::{CandidateTile, Columns};
use super::row_kernels::{Times, WideDot};
use super::rows::{RowTasks, write_or_add};
use super::tile::{BackInputs, Scratch, TileJob};
use super::{Borrowed, Cpu, Workspace, plan, scale};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Matrix;
use crate::problem::loss::Loss;
use crate::problem::output::Gradients;
use crate::problem::plan::Plan;
use crate::problem::positives::Positives;
use crate::problem::statistics::{Request, RowStatistics};

/// What the pass back takes.
#[derive(Clone, Copy)]
pub(super) struct PassBack<'a> {
    pub(super) batch: &'a Batch<'a>,
    pub(super) loss: &'a Loss,
    pub(super) request: Request,
    pub(super) statistics: &'a RowStatistics<f32>,
    /// (B) and (P): derivatives by each row's lse and by each positive's score.
    pub(super) d_lse: &'a [f64],
    pub(super) d_positive: &'a [f64],
}

impl Cpu {
    /// `d_lse · 2^(z − lse)` with lse in two parts: the `f32` that the exponent subtracts, and the remainder of the
    /// rounding, which goes into the factor.
    fn fold_lse(&mut self, statistics: &RowStatistics<f32>, d_lse: &[f64]) {
        let Workspace { coefficients, lse, .. } = &mut self.workspace;
        coefficients.clear();
        lse.clear();
        coefficients.reserve_exact(d_lse.len());
        lse.reserve_exact(d_lse.len());
        for (row, &d_lse) in d_lse.iter().enumerate() {
            let exact = statistics.lse[row] * std::f64::consts::LOG2_E;
            let rounded = exact as f32;
            let empty = statistics.num_negatives[row] == 0;
            let rest = if exact.is_finite() { exact - f64::from(rounded) } else { 0.0 };
            // `exp2` keeps this NaN; one of a caller's may have other bits.
            lse.push(if rounded.is_nan() { f32::NAN } else { rounded });
            coefficients.push(if empty { 0.0 } else { (d_lse * (-rest).exp2()) as f32 });
        }
    }

    /// Gradients of everything but the table.
    pub(super) fn side_gradients(&mut self, pass: PassBack<'_>, gradients: &mut Gradients<f32>) {
        self.prepare(pass.batch, pass.loss);
        self.workspace.queries.pack(self.bf16_matmul(pass.batch.dtype()));
        self.row_gradients(pass, gradients);
        self.pool_gradients(pass, gradients);
    }

    /// Gradients of queries, separate positives and temperature, row by row.
    fn row_gradients(&mut self, pass: PassBack<'_>, gradients: &mut Gradients<f32>) {
        let PassBack { batch, loss, request, statistics, d_lse, d_positive } = pass;
        let Some(expected_negative) = &statistics.expected_negative else { return };
        self.fold_lse(statistics, d_lse);
        if self.bf16_matmul(batch.dtype()).is_some() {
            let Workspace { queries, pairs, coefficients, .. } = &mut self.workspace;
            queries.weigh(coefficients, pairs.rows.iter().copied().zip(d_positive.iter().copied()));
        }
        let Workspace { queries, pairs, scratch, .. } = &self.workspace;
        let gamma = scale(loss).1;
        let tasks =
            RowTasks { arch: self.arch, similarity: loss.similarity, gamma, accumulate: request.accumulate, scratch };

        // ∂L/∂q̂ = γ (d_lse O + Σ_p d_positive p̂)
        tasks.write(&mut gradients.d_queries, queries, batch.num_queries(), |row, to| {
            self.arch.dispatch(Times { d: d_lse[row], x: expected_negative.row(row), to: &mut *to, add: false });
            for pair in batch.pairs.of_row(row) {
                self.arch.dispatch(Times { d: d_positive[pair], x: pairs.units.row(pair), to: &mut *to, add: true });
            }
        });
        // ∂L/∂p̂ = γ d_positive q̂
        if matches!(batch.positives, Positives::Separate(_)) {
            let to = gradients.d_positive_embeddings.get_or_insert_default();
            tasks.write(to, &pairs.units, pairs.rows.len(), |pair, to| {
                let x = queries.row(pairs.rows[pair] as usize);
                self.arch.dispatch(Times { d: d_positive[pair], x, to, add: false });
            });
        } else if !request.accumulate {
            gradients.d_positive_embeddings = None;
        }
        // ∂L/∂γ = Σ d_lse q̂·O + Σ_p d_positive sim₊, summed in the order of the rows. ∂L/∂τ = −γ² ∂L/∂γ.
        let row_d_gamma = |row: usize| {
            let q_dot_o = || self.arch.dispatch(WideDot { a: queries.row(row), b: expected_negative.row(row) });
            let negative = if d_lse[row] == 0.0 { 0.0 } else { d_lse[row] * q_dot_o() };
            batch.pairs.of_row(row).fold(negative, |sum, pair| sum + times(d_positive[pair], pairs.sims[pair]))
        };
        let d_gamma: f64 = (0..batch.num_queries()).map(row_d_gamma).sum();
        let before = if request.accumulate { [gradients.d_temperature, gradients.d_log_temperature] } else { [0.0; 2] };
        gradients.d_temperature = before[0] - gamma * gamma * d_gamma;
        gradients.d_log_temperature = before[1] - gamma * d_gamma;
    }

    /// Gradients of the pools that have embeddings of their own.
    fn pool_gradients(&mut self, pass: PassBack<'_>, gradients: &mut Gradients<f32>) {
        let PassBack { batch, loss, request, d_positive, .. } = pass;
        let (matrix, dim) = (&batch.matrix, batch.dim());
        let plan = plan::plan(batch, loss.symmetric, Request::value_and_grad());
        let matmul = self.bf16_matmul(batch.dtype());
        let (job, back, scratch) = self.workspace.back(self.arch, matmul, batch, loss, plan, d_positive);
        gradients.d_candidates.resize_with(matrix.pools.len(), Matrix::default);
        for (p, (start, pool)) in matrix.pools_with_start().enumerate() {
            let d_pool = &mut gradients.d_candidates[p];
            let Some(candidates) = pool.candidates().filter(|_| pool.gradient) else {
                *d_pool = Matrix::default();
                continue;
            };
            if !request.accumulate {
                d_pool.set_shape(candidates.rows(), dim);
            }
            d_pool.values.par_chunks_mut(plan.block_n * dim).enumerate().with_max_len(1).for_each_init(
                || Borrowed::take(scratch),
                |Borrowed(scratch, _), (tile, d_tile)| {
                    let (first, len) = (tile * plan.block_n, d_tile.len() / dim);
                    let tile = CandidateTile::new(Columns::Pool { pool: p, first, len, start: start + first });
                    let mut spare = std::mem::take(&mut scratch.spare);
                    write_or_add(d_tile, request.accumulate, &mut spare, |d| job.back_tile(scratch, &tile, &back, d));
                    scratch.spare = spare;
                },
            );
        }
    }
}

impl Workspace {
    /// What tiles of the backward pass read.
    pub(super) fn back<'w>(
        &'w self,
        arch: Arch,
        matmul: Option<Bf16Matmul>,
        batch: &'w Batch<'_>,
        loss: &Loss,
        plan: Plan,
        d_positive: &'w [f64],
    ) -> (TileJob<'w>, BackInputs<'w>, &'w Mutex<Vec<Scratch>>) {
        let Workspace { masks, queries, pairs, coefficients, lse, scratch, .. } = self;
        let (matrix, scale) = (&batch.matrix, scale(loss));
        let job = TileJob { arch, matmul, matrix, similarity: loss.similarity, scale, plan, masks, queries };
        let bounds = (!pairs.bounds.is_empty()).then_some(pairs.bounds.as_slice());
        let positives_by_candidate = &pairs.by_candidate;
        (job, BackInputs { coefficients, lse, bounds, d_positive, positives_by_candidate }, scratch)
    }
}

/// `d · x`, and 0 where d is 0: a row without weight is absent, whatever its values.
fn times(d: f64, x: f32) -> f64 {
    if d == 0.0 { 0.0 } else { d * f64::from(x) }
}
