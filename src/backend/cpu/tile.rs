//! One tile of scores: operands of unit length, the matmul, the mask, and what the two passes do with it.

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::best::Best;
use super::kernels::{self, ChainRule, Coefficients, LANES, Normalize, RowState, Score, Statistics, Tile};
use super::masks::Masks;
use super::matmul;
use crate::problem::embeddings::Embeddings;
use crate::problem::loss::Similarity;
use crate::problem::plan::Plan;
use crate::problem::pool::Pool;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::statistics::Partial;

/// Matmuls that give similarities have at least `MIN_HEIGHT` rows and `MIN_WIDTH` columns, the missing ones zero. The
/// library computes smaller ones differently, with sums in another order. A positive's similarity must be bitwise the
/// one that the stream computes for the same pair; otherwise ranks would see false ties and miss real ones.
pub(super) const MIN_HEIGHT: usize = 8;
pub(super) const MIN_WIDTH: usize = 96;

/// Rows in `f32`, of unit length under cosine, zero rows behind them to fill the smallest matmul.
#[derive(Debug, Default)]
pub(super) struct Units {
    values: Vec<f32>,
    inverse_norm: Vec<f64>,
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
        // Any block of rows can be read as MIN_HEIGHT or MIN_WIDTH rows.
        super::resize(&mut self.values, (rows + MIN_WIDTH) * dim);
        super::resize(&mut self.inverse_norm, rows);
        let (values, padding) = self.values.split_at_mut(rows * dim);
        padding.fill(0.0);
        let tasks = values.par_chunks_mut(ROWS_PER_TASK * dim).zip(self.inverse_norm.par_chunks_mut(ROWS_PER_TASK));
        tasks.enumerate().for_each(|(task, (x, inverse_norm))| {
            for (row, x) in x.chunks_exact_mut(dim).enumerate() {
                let (embeddings, from) = at(task * ROWS_PER_TASK + row);
                embeddings.widen_row(from, x);
            }
            arch.dispatch(Normalize { x, dim, similarity, inverse_norm });
        });
    }

    /// Bytes of that many rows.
    pub(super) fn bytes(rows: usize, dim: usize) -> usize {
        (rows + MIN_WIDTH) * dim * size_of::<f32>() + rows * size_of::<f64>()
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// Rows from `row` on and their inverse norms.
    pub(super) fn rows_from(&self, row: usize) -> (&[f32], &[f64]) {
        (&self.values[row * self.dim..self.rows * self.dim], &self.inverse_norm[row..])
    }

    /// `height` rows from `start`, those past the end zero (or, within the padding, a following block's).
    fn padded(&self, start: usize, height: usize) -> &[f32] {
        &self.values[start * self.dim..(start + height) * self.dim]
    }
}

/// `similarities[i] = a_i · b_i`, by the matmul that the stream uses.
pub(super) fn paired_sims(a: &Units, b: &Units, similarities: &mut Vec<f32>) {
    similarities.clear();
    similarities.reserve_exact(a.rows);
    let (a_norms, b_norms) = (&a.inverse_norm, &b.inverse_norm);
    let mut block = [0.0f32; MIN_WIDTH * MIN_WIDTH];
    for start in (0..a.rows).step_by(MIN_WIDTH) {
        let rows = MIN_WIDTH.min(a.rows - start);
        let (a, b) = (a.padded(start, MIN_WIDTH), b.padded(start, MIN_WIDTH));
        matmul::similarities(a, b, &mut block, MIN_WIDTH, MIN_WIDTH);
        let spoiled = |i: usize| a_norms[start + i].is_nan() || b_norms[start + i].is_nan();
        similarities.extend((0..rows).map(|i| if spoiled(i) { f32::NAN } else { block[i * MIN_WIDTH + i] }));
    }
}

/// A thread's buffers.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// What a search keeps of each row.
    pub(super) best: Best,
    /// (block_n, D) candidates of unit length.
    candidates: Vec<f32>,
    inverse_norm: Vec<f64>,
    /// (block_n) `−log_q · log2(e)`
    bias: Vec<f32>,
    /// (block_b, block_n) similarities, then probabilities.
    pub(super) sims: Vec<f32>,
    states: Vec<RowState>,
    rescale: Vec<f32>,
}

impl Scratch {
    /// Bytes of a thread's buffers.
    pub(super) fn bytes(block_b: usize, block_n: usize, dim: usize) -> usize {
        let height = block_b.max(MIN_HEIGHT);
        let candidates = block_n * (dim * size_of::<f32>() + size_of::<f64>() + size_of::<f32>());
        let rows = height * (block_n * size_of::<f32>() + size_of::<RowState>() + size_of::<f32>());
        size_of::<Scratch>() + candidates + rows
    }
}

/// What both passes know about the step.
#[derive(Clone, Copy)]
pub(super) struct TileJob<'a> {
    pub(super) arch: Arch,
    pub(super) matrix: &'a ScoreMatrix<'a>,
    pub(super) similarity: Similarity,
    pub(super) scale: (f32, f64),
    pub(super) plan: Plan,
    pub(super) masks: &'a Masks,
    pub(super) queries: &'a Units,
}

/// What the stream back knows beside.
#[derive(Clone, Copy)]
pub(super) struct BackInputs<'a> {
    pub(super) coefficients: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) d_positive: &'a [f64],
    pub(super) positives_by_candidate: &'a [(u32, u32)],
}

/// A tile of candidates: a stretch of a pool.
pub(super) struct CandidateTile<'a> {
    pool: &'a Pool<'a>,
    /// Index of the tile's first candidate over all pools.
    pub(super) start: usize,
    /// Rows of the pool.
    pub(super) range: Range<usize>,
    /// Columns of the score tile, padding included.
    pub(super) width: usize,
}

impl<'a> TileJob<'a> {
    /// Streams one split past one block of queries: into `slots` a partial for each row, into `expected` `Σ P ĉ`.
    pub(super) fn stream_split(
        &self,
        scratch: &mut Scratch,
        rows: Range<usize>,
        split: usize,
        positives: Option<&[f32]>,
        slots: &mut [Partial],
        mut expected: Option<&mut [f32]>,
    ) {
        let dim = self.matrix.dim();
        scratch.states.clear();
        scratch.states.resize(rows.len(), RowState::EMPTY);
        super::resize(&mut scratch.rescale, rows.len());
        for (t, tile) in self.tiles(split).enumerate() {
            self.load(scratch, &tile);
            self.score(scratch, &tile, rows.clone());
            for state in &mut scratch.states {
                state.num_negatives += tile.range.len() as u64;
            }
            let (sims, states) = (&mut scratch.sims, &mut scratch.states);
            self.masks.for_each_hit(rows.clone(), tile.start, tile.range.len(), self.ids(&tile), |r, column| {
                sims[r * tile.width + column] = f32::NEG_INFINITY;
                states[r].num_negatives -= 1;
            });
            let score = Score { scale: self.scale.0, bias: &scratch.bias[..tile.width] };
            self.arch.dispatch(Statistics {
                tile: Tile { sims: &mut scratch.sims[..rows.len() * tile.width], width: tile.width },
                score,
                states: &mut scratch.states,
                positives,
                keep: expected.is_some().then_some(&mut scratch.rescale),
            });
            if let Some(o) = &mut expected {
                for (o, &factor) in o.chunks_exact_mut(dim).zip(&scratch.rescale) {
                    if factor != 1.0 && t > 0 {
                        kernels::scale_row(o, factor);
                    }
                }
                let shape = (rows.len(), dim, tile.range.len());
                matmul::accumulate(shape, &scratch.sims, [tile.width, 1], &scratch.candidates, o, t > 0, 1.0);
            }
        }
        for (slot, state) in slots.iter_mut().zip(&scratch.states) {
            *slot = state.partial(self.scale.1);
        }
    }

    /// The gradient of one tile of a pool's candidates, starting at row `first` of the pool, into `d_tile`.
    pub(super) fn back_tile(
        &self,
        scratch: &mut Scratch,
        pool: &'a Pool<'a>,
        pool_start: usize,
        first: usize,
        back: &BackInputs<'_>,
        d_tile: &mut [f32],
    ) {
        let dim = self.matrix.dim();
        let range = first..first + d_tile.len() / dim;
        let tile = CandidateTile { pool, start: pool_start + first, width: width(range.len()), range };
        self.load(scratch, &tile);
        let b = self.matrix.num_queries();
        for start in (0..b).step_by(self.plan.block_b) {
            let rows = start..(start + self.plan.block_b).min(b);
            self.score(scratch, &tile, rows.clone());
            self.coefficients(scratch, &tile, rows.clone(), back);
            let queries = self.queries.padded(start, rows.len());
            let shape = (tile.range.len(), dim, rows.len());
            matmul::accumulate(shape, &scratch.sims, [1, tile.width], queries, d_tile, start > 0, self.scale.1 as f32);
        }
        if self.similarity == Similarity::Cosine {
            let (unit, inverse_norm) = (&scratch.candidates, &scratch.inverse_norm);
            self.arch.dispatch(ChainRule { d: d_tile, unit, dim, inverse_norm });
        }
    }

    /// Replaces a tile of similarities by coefficients: `d_lse q_ij`, 0 where masked, `d_positive` at the positive.
    fn coefficients(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>, back: &BackInputs<'_>) {
        let sims = &mut scratch.sims;
        let score = Score { scale: self.scale.0, bias: &scratch.bias[..tile.width] };
        self.arch.dispatch(Coefficients {
            tile: Tile { sims: &mut sims[..rows.len() * tile.width], width: tile.width },
            score,
            lse: &back.lse[rows.clone()],
            d_lse: &back.coefficients[rows.clone()],
        });
        // After the exponentials, so that a row whose lse is NaN does not affect the candidates that it masks.
        self.masks.for_each_hit(rows.clone(), tile.start, tile.range.len(), self.ids(tile), |r, column| {
            sims[r * tile.width + column] = 0.0;
        });
        let from = back.positives_by_candidate.partition_point(|&(candidate, _)| (candidate as usize) < tile.start);
        for &(candidate, row) in &back.positives_by_candidate[from..] {
            let column = candidate as usize - tile.start;
            if column >= tile.range.len() {
                break;
            }
            if rows.contains(&(row as usize)) {
                sims[(row as usize - rows.start) * tile.width + column] = back.d_positive[row as usize] as f32;
            }
        }
    }

    /// The tiles of a split, in order. Tiles do not cross pools.
    pub(super) fn tiles(&self, split: usize) -> impl Iterator<Item = CandidateTile<'a>> + use<'a> {
        let (matrix, block_n) = (self.matrix, self.plan.block_n);
        let count: usize = matrix.pools.iter().map(|pool| pool.candidates.rows().div_ceil(block_n)).sum();
        let first = split * count / self.plan.splits;
        let last = (split + 1) * count / self.plan.splits;
        let all = matrix.pools_with_start().flat_map(move |(start, pool)| {
            let n = pool.candidates.rows();
            (0..n).step_by(block_n).map(move |row| {
                let range = row..(row + block_n).min(n);
                CandidateTile { pool, start: start + row, width: width(range.len()), range }
            })
        });
        all.skip(first).take(last - first)
    }

    fn ids(&self, tile: &CandidateTile<'a>) -> Option<&'a [u64]> {
        tile.pool.ids_slice().map(|ids| &ids[tile.range.clone()])
    }

    /// Brings a tile's candidates, inverse norms and biases into the scratch.
    pub(super) fn load(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>) {
        let (dim, len) = (self.matrix.dim(), tile.range.len());
        super::resize(&mut scratch.candidates, self.plan.block_n.max(tile.width) * dim);
        super::resize(&mut scratch.inverse_norm, self.plan.block_n);
        super::resize(&mut scratch.bias, self.plan.block_n.max(tile.width));
        for (row, to) in tile.range.clone().zip(scratch.candidates.chunks_exact_mut(dim)) {
            tile.pool.candidates.widen_row(row, to);
        }
        scratch.candidates[len * dim..tile.width * dim].fill(0.0);
        let x = &mut scratch.candidates[..len * dim];
        let inverse_norm = &mut scratch.inverse_norm;
        self.arch.dispatch(Normalize { x, dim, similarity: self.similarity, inverse_norm });
        scratch.bias.fill(0.0);
        if let Some(log_q) = tile.pool.log_q {
            for (bias, log_q) in scratch.bias.iter_mut().zip(&log_q[tile.range.clone()]) {
                *bias = -log_q * std::f32::consts::LOG2_E;
            }
        }
    }

    /// Makes the similarities of excluded pairs −∞.
    pub(super) fn mask(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>) {
        let sims = &mut scratch.sims;
        self.masks.for_each_hit(rows, tile.start, tile.range.len(), self.ids(tile), |r, column| {
            sims[r * tile.width + column] = f32::NEG_INFINITY;
        });
    }

    /// `S = Q̂ Ĉᵀ` for one block of queries; padded columns become −∞, those of spoiled embeddings NaN.
    pub(super) fn score(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>) {
        let height = rows.len().max(MIN_HEIGHT);
        let needed = self.plan.block_b.max(MIN_HEIGHT) * self.plan.block_n.max(tile.width);
        super::resize(&mut scratch.sims, needed);
        let queries = self.queries.padded(rows.start, height);
        matmul::similarities(queries, &scratch.candidates, &mut scratch.sims, height, tile.width);
        let row_norms = &self.queries.inverse_norm[rows.clone()];
        for (row, _) in row_norms.iter().enumerate().filter(|(_, inverse)| inverse.is_nan()) {
            scratch.sims[row * tile.width..][..tile.range.len()].fill(f32::NAN);
        }
        let column_norms = &scratch.inverse_norm[..tile.range.len()];
        for (column, _) in column_norms.iter().enumerate().filter(|(_, inverse)| inverse.is_nan()) {
            scratch.sims[column..].iter_mut().step_by(tile.width).take(rows.len()).for_each(|sim| *sim = f32::NAN);
        }
        if tile.width > tile.range.len() {
            for row in scratch.sims[..rows.len() * tile.width].chunks_exact_mut(tile.width) {
                row[tile.range.len()..].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Columns of a score tile for that many candidates.
fn width(candidates: usize) -> usize {
    candidates.next_multiple_of(LANES).max(MIN_WIDTH)
}
