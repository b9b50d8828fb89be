//! The positives of a step: their embeddings, their similarities with their queries, and the bounds of the filter.

use pulp::Arch;
use rayon::prelude::*;

use super::bf16_matmul::Bf16Matmul;
use super::kernels::Dots;
use super::matmul::PairDots;
use super::tile::Detail;
use super::units::Units;
use super::{rows_per_task, scale};
use crate::problem::batch::Batch;
use crate::problem::embeddings::DType;
use crate::problem::loss::Loss;
use crate::problem::positives::{Pairs, Positives};

/// What the passes know about the P positives.
#[derive(Debug, Default)]
pub(super) struct PairData {
    /// p̂ of each pair.
    pub(super) units: Units,
    /// (P): the row of each pair.
    pub(super) rows: Vec<u32>,
    /// (P): q̂·p̂ by the sums that score the pools, so that ranks see ties with candidates.
    pub(super) sims: Vec<f32>,
    /// (P): the same by the sums that score negatives of a row's own; empty where there are none.
    pub(super) own_sims: Vec<f32>,
    /// (B): similarities above which a row's candidates are no negatives, for pools and for negatives of a row's own.
    /// Empty where nothing is filtered.
    pub(super) bounds: Vec<f32>,
    pub(super) own_bounds: Vec<f32>,
    /// (candidate, row, pair), ascending: which positives a tile of candidates holds.
    pub(super) by_candidate: Vec<(u32, u32, u32)>,
}

impl PairData {
    /// Bytes for that many rows and pairs.
    pub(super) fn bytes(batch: &Batch<'_>) -> usize {
        let (b, pairs) = (batch.num_queries(), batch.num_positives());
        let per_pair = size_of::<u32>() + 2 * size_of::<f32>() + size_of::<(u32, u32, u32)>();
        let units = Units::bytes(pairs, batch.dim(), batch.dtype());
        let scored = if batch.dtype() == DType::Bf16 { Bf16Matmul::pair_bytes(batch.dim()) } else { 0 };
        units + pairs * per_pair + 2 * b * size_of::<f32>() + scored * rayon::current_num_threads()
    }

    /// What the streaming pass reads for pools, and for negatives of a row's own.
    pub(super) fn detail<'a>(&'a self, pairs: Pairs<'a>, moments: bool) -> [Detail<'a>; 2] {
        [(&self.sims, &self.bounds), (&self.own_sims, &self.own_bounds)].map(|(positive_sims, bounds)| Detail {
            bounds: (!bounds.is_empty()).then_some(bounds),
            moments,
            pairs,
            positive_sims,
        })
    }

    pub(super) fn prepare(
        &mut self,
        arch: Arch,
        matmul: Option<Bf16Matmul>,
        batch: &Batch<'_>,
        loss: &Loss,
        queries: &Units,
    ) {
        let pairs = batch.num_positives();
        self.rows.clear();
        self.rows.reserve_exact(pairs);
        self.rows.extend(batch.pairs.rows(batch.num_queries()));
        self.by_candidate.clear();
        if let Positives::Index(indices) = &batch.positives {
            self.by_candidate.reserve_exact(pairs);
            let with_row = indices.iter().zip(&self.rows).zip(0..).map(|((&index, &row), pair)| (index, row, pair));
            self.by_candidate.extend(with_row);
            self.by_candidate.sort_unstable();
        }
        self.units.gather(arch, matmul, pairs, batch.dim(), loss.similarity, |pair| batch.positive_at(pair));
        self.score(arch, matmul, queries);
        self.own_sims.clear();
        if batch.matrix.row_negatives.is_some() {
            self.own_sims.resize(pairs, 0.0);
            for (pair, (&row, sim)) in self.rows.iter().zip(&mut self.own_sims).enumerate() {
                let query = queries.row(row as usize);
                arch.dispatch(Dots { query, rows: self.units.row(pair), to: std::slice::from_mut(sim) });
            }
            spoil(queries, &self.units, &self.rows, &mut self.own_sims);
        }
        let gamma = scale(loss).1;
        bounds(batch, loss, gamma, &self.sims, &mut self.bounds);
        bounds(batch, loss, gamma, &self.own_sims, &mut self.own_bounds);
    }

    /// The similarities of the pairs, as the stream computes them.
    fn score(&mut self, arch: Arch, matmul: Option<Bf16Matmul>, queries: &Units) {
        let dim = self.units.dim();
        self.sims.clear();
        self.sims.resize(self.rows.len(), 0.0);
        let size = rows_per_task(dim);
        let tasks = self.sims.par_chunks_mut(size).zip(self.rows.par_chunks(size)).enumerate();
        tasks.for_each(|(task, (to, rows))| match matmul {
            Some(matmul) => {
                let at = |pair: usize| (rows[pair] as usize, task * size + pair);
                matmul.score_pairs(arch, queries.bf16(), self.units.bf16(), at, to);
            }
            None => {
                let (positives, _) = self.units.rows_from(task * size);
                arch.dispatch(PairDots { queries: queries.values(), positives, rows, dim, to });
            }
        });
        spoil(queries, &self.units, &self.rows, &mut self.sims);
    }
}

/// Makes the similarities of embeddings that are not finite NaN.
fn spoil(queries: &Units, positives: &Units, rows: &[u32], sims: &mut [f32]) {
    for (pair, (&row, sim)) in rows.iter().zip(sims).enumerate() {
        if queries.inverse_norm(row as usize).is_nan() || positives.inverse_norm(pair).is_nan() {
            *sim = f32::NAN;
        }
    }
}

/// Each row's bound as a similarity, from the similarities of its positives.
fn bounds(batch: &Batch<'_>, loss: &Loss, gamma: f64, sims: &[f32], bounds: &mut Vec<f32>) {
    bounds.clear();
    let Some(filter) = loss.false_negatives else { return };
    if sims.is_empty() && batch.num_positives() > 0 {
        return;
    }
    let bound = |row: usize| {
        let scores = sims[batch.pairs.of_row(row)].iter().map(|&sim| gamma * f64::from(sim));
        (filter.bound(scores) / gamma) as f32
    };
    bounds.reserve_exact(batch.num_queries());
    bounds.extend((0..batch.num_queries()).map(bound));
}
