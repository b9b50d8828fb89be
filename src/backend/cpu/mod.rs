//! The CPU backend: tiles of scores that stay in cache, one library matmul and one vector pass over each.
//!
//! ```text
//! stream       each (block of queries, split of the candidates), in parallel:
//!                for each tile of candidates: S = Q̂ Ĉᵀ, mask, z = S·γ − log_q, running max and sum, O += P Ĉ
//!              merge the splits in order
//! stream back  d_queries from O; each tile of candidates, in parallel:
//!                for each block of queries: S again, P = d_lse·exp(z − lse), dĈ += Pᵀ Q̂
//! ```
//!
//! The cut into blocks, tiles and splits depends on the problem alone, every sum has one order, and threads share no
//! sums: results are bitwise the same for any number of threads.

mod best;
mod kernels;
mod masks;
mod matmul;
mod plan;
mod search;
mod tile;

use std::sync::Mutex;

use pulp::Arch;
use rayon::prelude::*;

use crate::backend::Backend;
use crate::backend::stream::{CheckedBatch, CheckedSearch, Stream};
use crate::error::Result;
use crate::problem::batch::{Batch, Positives};
use crate::problem::embeddings::Matrix;
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::Gradients;
use crate::problem::plan::Plan;
use crate::problem::search::TopK;
use crate::problem::statistics::{Partial, Request, RowStatistics};
use kernels::ChainRule;
use masks::Masks;
use tile::{Scratch, TileJob, Units};

/// The CPU backend. Runs on the current rayon pool and keeps its workspace between calls.
///
/// Arithmetic is in `f32`, as a matmul of `f32` inputs would be; `f16` and `bf16` are widened tile by tile. Per-row sums
/// are `f64`.
#[derive(Debug, Default)]
pub struct Cpu {
    arch: Arch,
    workspace: Workspace,
}

#[derive(Debug, Default)]
struct Workspace {
    masks: Masks,
    queries: Units,
    positives: Units,
    /// (positive, row), ascending: which positives a tile of candidates holds.
    positives_by_candidate: Vec<(u32, u32)>,
    /// q̂·p̂ of each row.
    positive_sims: Vec<f32>,
    /// One per split and row.
    partials: Vec<Partial>,
    /// (D) per split and row: `Σ exp(z − max) ĉ`.
    partial_expected: Vec<f32>,
    /// One per row.
    merged: Vec<Partial>,
    /// Per row: what the stream back multiplies by and shifts by.
    coefficients: Vec<f32>,
    lse: Vec<f32>,
    scratch: Mutex<Vec<Scratch>>,
    /// (K) per split and row: what a search found there.
    found: Vec<best::Key>,
}

impl Cpu {
    /// A backend with an empty workspace.
    pub fn new() -> Self {
        Cpu::default()
    }
}

impl Backend for Cpu {}

/// `gamma` as this backend applies it: the `f32` factor of similarities in units of log 2, and the same factor in
/// natural units. Rounding is then a tiny change of the temperature, and positive and lse stay consistent.
fn scale(loss: &Loss) -> (f32, f64) {
    let scale = loss.scale_log2();
    (scale, f64::from(scale) * std::f64::consts::LN_2)
}

/// Rows that one task of a per-row pass takes.
const ROWS_PER_TASK: usize = 64;

impl Stream for Cpu {
    type Real = f32;

    fn plan_stream(&self, CheckedBatch { batch, loss }: CheckedBatch<'_>, request: Request) -> Plan {
        plan::plan(&batch.matrix, loss.symmetric, request)
    }

    fn stream(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        request: Request,
        statistics: &mut RowStatistics<f32>,
    ) -> Result<()> {
        let plan = plan::plan(&batch.matrix, loss.symmetric, request);
        self.prepare(batch, loss);
        let (matrix, b, dim) = (&batch.matrix, batch.num_queries(), batch.dim());
        let Workspace { masks, queries, positive_sims, partials, partial_expected, scratch, .. } = &mut self.workspace;
        partials.clear();
        partials.resize(plan.splits * b, Partial::EMPTY);
        let expected_len = if request.gradients { plan.splits * b * dim } else { 0 };
        resize(partial_expected, expected_len);

        let job =
            TileJob { arch: self.arch, matrix, similarity: loss.similarity, scale: scale(loss), plan, masks, queries };
        let detail = (request.moments || request.rank).then_some(positive_sims.as_slice());
        // A unit is one block of queries in one split; its slots are contiguous in the order (split, row).
        let mut units = Vec::with_capacity(plan.splits * b.div_ceil(plan.block_b));
        let mut expected = partial_expected.as_mut_slice();
        let mut slots = partials.as_mut_slice();
        for split in 0..plan.splits {
            for start in (0..b).step_by(plan.block_b) {
                let rows = start..(start + plan.block_b).min(b);
                let slot = split_off(&mut slots, rows.len());
                let expected_slot = request.gradients.then(|| split_off(&mut expected, rows.len() * dim));
                units.push((split, rows, slot, expected_slot));
            }
        }
        units.into_par_iter().for_each_init(
            || Borrowed::take(scratch),
            |scratch, (split, rows, slots, expected)| {
                let positives = detail.map(|sims| &sims[rows.clone()]);
                job.stream_split(&mut scratch.0, rows, split, positives, slots, expected);
            },
        );
        self.merge(batch, loss, request, plan.splits, statistics);
        Ok(())
    }

    fn stream_back(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        statistics: &RowStatistics<f32>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<f32>,
    ) -> Result<()> {
        let Some(expected_negative) = &statistics.expected_negative else { return Ok(()) };
        let plan = plan::plan(&batch.matrix, loss.symmetric, Request::value_and_grad());
        self.prepare(batch, loss);
        self.fold_lse(statistics, d_lse);
        let (_, gamma) = scale(loss);
        let upstream = Upstream { d_lse, d_positive, gamma };
        let d_gamma = self.row_gradients(batch, loss, expected_negative, &upstream, gradients);
        gradients.d_temperature = -gamma * gamma * d_gamma;
        gradients.d_log_temperature = -gamma * d_gamma;

        let matrix = &batch.matrix;
        let Workspace { masks, queries, positives_by_candidate, coefficients, lse, scratch, .. } = &mut self.workspace;
        let job =
            TileJob { arch: self.arch, matrix, similarity: loss.similarity, scale: scale(loss), plan, masks, queries };
        let back = tile::BackInputs { coefficients, lse, d_positive, positives_by_candidate };
        gradients.d_candidates.resize_with(matrix.pools.len(), Matrix::default);
        for (p, (start, pool)) in matrix.pools_with_start().enumerate() {
            let d_pool = &mut gradients.d_candidates[p];
            if !pool.gradient {
                *d_pool = Matrix::default();
                continue;
            }
            d_pool.set_shape(pool.candidates.rows(), batch.dim());
            d_pool.values.par_chunks_mut(plan.block_n * batch.dim()).enumerate().for_each_init(
                || Borrowed::take(scratch),
                |scratch, (tile, d_tile)| {
                    let first = tile * plan.block_n;
                    job.back_tile(&mut scratch.0, pool, start, first, &back, d_tile);
                },
            );
        }
        Ok(())
    }

    fn plan_search(&self, CheckedSearch { search, k, .. }: CheckedSearch<'_>) -> Plan {
        search::plan(search, k)
    }

    fn search(&mut self, CheckedSearch { search, similarity, k }: CheckedSearch<'_>) -> Result<TopK<f32>> {
        Ok(search::search(self, search, similarity, k))
    }
}

/// Each row's derivatives, and `gamma` in natural units.
struct Upstream<'a> {
    d_lse: &'a [f64],
    d_positive: &'a [f64],
    gamma: f64,
}

impl Cpu {
    /// Queries, positives and masks, as both passes use them.
    fn prepare(&mut self, batch: &Batch<'_>, loss: &Loss) {
        let arch = self.arch;
        let workspace = &mut self.workspace;
        workspace.masks.of_batch(batch);
        workspace.queries.load(arch, &batch.matrix.queries, loss.similarity);
        workspace.positives_by_candidate.clear();
        match &batch.positives {
            Positives::Separate(embeddings) => workspace.positives.load(arch, embeddings, loss.similarity),
            Positives::Index(positives) => {
                let at = |row: usize| {
                    let (pool, at) = batch.locate(positives[row] as usize);
                    (batch.matrix.pools[pool].candidates, at)
                };
                workspace.positives.gather(arch, positives.len(), batch.dim(), loss.similarity, at);
                workspace.positives_by_candidate.extend(positives.iter().copied().zip(0..));
                workspace.positives_by_candidate.sort_unstable();
            }
        }
        tile::paired_sims(&workspace.queries, &workspace.positives, &mut workspace.positive_sims);
    }

    /// Merges the splits of each row in order.
    fn merge(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        splits: usize,
        statistics: &mut RowStatistics<f32>,
    ) {
        let (b, dim, (_, gamma)) = (batch.num_queries(), batch.dim(), scale(loss));
        let Workspace { partials, partial_expected, positive_sims, merged, .. } = &mut self.workspace;
        let slots = |row: usize| (0..splits).map(move |split| split * b + row);
        (0..b)
            .into_par_iter()
            .map(|row| Partial::merge_all(slots(row).map(|slot| partials[slot])))
            .collect_into_vec(merged);

        statistics.clear(request, b);
        for (row, &positive_sim) in merged.iter().zip(positive_sims.iter()) {
            statistics.push(row, gamma * f64::from(positive_sim));
        }
        if !request.gradients {
            return;
        }
        let expected_negative = statistics.expected_negative.get_or_insert_default();
        expected_negative.set_shape(b, dim);
        expected_negative.values.par_chunks_mut(dim).zip(merged).enumerate().for_each(|(row, (o, merged))| {
            let mut sum = vec![0.0f64; dim];
            for slot in slots(row) {
                let factor = partials[slot].factor(merged.max);
                for (sum, &part) in sum.iter_mut().zip(&partial_expected[slot * dim..(slot + 1) * dim]) {
                    *sum += factor * f64::from(part);
                }
            }
            let empty = merged.num_negatives == 0;
            for (o, sum) in o.iter_mut().zip(&sum) {
                *o = if empty { 0.0 } else { (sum / merged.sum) as f32 };
            }
        });
    }

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
            lse.push(rounded);
            coefficients.push(if empty { 0.0 } else { (d_lse * (-rest).exp2()) as f32 });
        }
    }

    /// Gradients of queries and separate positives, row by row. Returns `∂L/∂γ`.
    fn row_gradients(
        &self,
        batch: &Batch<'_>,
        loss: &Loss,
        expected_negative: &Matrix<f32>,
        upstream: &Upstream<'_>,
        gradients: &mut Gradients<f32>,
    ) -> f64 {
        let (b, dim) = (batch.num_queries(), batch.dim());
        let Workspace { queries, positives, positive_sims, .. } = &self.workspace;
        let Upstream { d_lse, d_positive, gamma } = *upstream;

        // ∂L/∂q̂ = γ (d_lse O + d_positive p̂)
        gradients.d_queries.set_shape(b, dim);
        gradients.d_queries.values.par_chunks_mut(dim).enumerate().for_each(|(row, d)| {
            for (d, (&o, &p)) in d.iter_mut().zip(expected_negative.row(row).iter().zip(positives.row(row))) {
                *d = (gamma * (times(d_lse[row], o) + times(d_positive[row], p))) as f32;
            }
        });
        // ∂L/∂p̂ = γ d_positive q̂
        if matches!(batch.positives, Positives::Separate(_)) {
            let d_positives = gradients.d_positive_embeddings.get_or_insert_default();
            d_positives.set_shape(b, dim);
            d_positives.values.par_chunks_mut(dim).enumerate().for_each(|(row, d)| {
                for (d, &q) in d.iter_mut().zip(queries.row(row)) {
                    *d = (gamma * times(d_positive[row], q)) as f32;
                }
            });
        } else {
            gradients.d_positive_embeddings = None;
        }
        if loss.similarity == Similarity::Cosine {
            chain_rule(self.arch, &mut gradients.d_queries, queries);
            if let Some(d_positives) = &mut gradients.d_positive_embeddings {
                chain_rule(self.arch, d_positives, positives);
            }
        }
        // ∂L/∂γ = Σ d_lse q̂·O + d_positive sim₊, summed in the order of the rows.
        let row_d_gamma = |row: usize| {
            let pairs = queries.row(row).iter().zip(expected_negative.row(row));
            let q_dot_o: f64 = pairs.map(|(&q, &o)| f64::from(q) * f64::from(o)).sum();
            let negative = if d_lse[row] == 0.0 { 0.0 } else { d_lse[row] * q_dot_o };
            negative + times(d_positive[row], positive_sims[row])
        };
        (0..b).map(row_d_gamma).sum()
    }
}

/// `d · x`, and 0 where d is 0: a row without weight is absent, whatever its values.
fn times(d: f64, x: f32) -> f64 {
    if d == 0.0 { 0.0 } else { d * f64::from(x) }
}

/// The cosine's chain rule on the gradient of one side.
fn chain_rule(arch: Arch, d: &mut Matrix<f32>, side: &Units) {
    d.values.par_chunks_mut(ROWS_PER_TASK * d.dim).enumerate().for_each(|(chunk, d)| {
        let (unit, inverse_norm) = side.rows_from(chunk * ROWS_PER_TASK);
        arch.dispatch(ChainRule { d, unit, dim: side.dim(), inverse_norm });
    });
}

/// Takes the first `len` elements off a slice.
fn split_off<'a, T>(slice: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(len);
    *slice = tail;
    head
}

/// Gives `values` a length without clearing what stays.
fn resize<T: Clone + Default>(values: &mut Vec<T>, len: usize) {
    if values.len() != len {
        values.clear();
        values.resize(len, T::default());
    }
}

/// A thread's scratch, taken from the workspace and put back.
struct Borrowed<'a>(Scratch, &'a Mutex<Vec<Scratch>>);

impl<'a> Borrowed<'a> {
    fn take(from: &'a Mutex<Vec<Scratch>>) -> Self {
        // A panic elsewhere leaves the list whole: it only holds buffers.
        let scratch = from.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        Borrowed(scratch.unwrap_or_default(), from)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.0);
        self.1.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(scratch);
    }
}
