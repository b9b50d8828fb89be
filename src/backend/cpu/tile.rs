//! One tile of scores at a time, and what the two passes do with it.
//!
//! A chunk of queries is scored, masked and summed before the next one, so its scores stay in the first-level cache. The
//! stream back keeps the coefficients of a block of queries for the matmul over them.

use std::ops::Range;

use pulp::Arch;

use super::amx::BLOCK;
use super::best::Best;
use super::bf16_matmul::{Bf16Matmul, Bf16Scratch, GradientOut, QUERIES};
use super::candidates::{CandidateTile, Columns, LoadedTile, Purpose};
use super::kernels::{self, Coefficients, Dots, Filter, Place, Places, RowState, Statistics, Tile};
use super::masks::{Masks, RejectedCandidate};
use super::matmul::Product;
use super::plan::BACK_ROWS;
use super::row_kernels::{ChainRule, scale_row};
use super::table::TableScratch;
use super::units::Units;
use crate::problem::embeddings::DType;
use crate::problem::loss::Similarity;
use crate::problem::plan::Plan;
use crate::problem::positives::Pairs;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::statistics::Partial;

/// Queries that are scored at a time. A chunk of scores is 24 KiB, which leaves room for its queries in a first-level cache
/// of 32 KiB. A multiple of the rows that a matmul holds in registers.
pub(super) const CHUNK: usize = 24;

/// A thread's buffers.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// What a search keeps of each row.
    pub(super) best: Best,
    pub(super) candidates: LoadedTile,
    /// Similarities, then probabilities: of a chunk of queries, or of a block in the stream back.
    pub(super) sims: Vec<f32>,
    states: Vec<RowState>,
    rescale: Vec<f32>,
    /// The candidates of a tile that some query of a block excludes.
    rejected: Vec<RejectedCandidate>,
    /// Excluded candidates of each query of a chunk.
    excluded: [u32; BLOCK],
    /// For the matrix unit.
    bf16: Bf16Scratch,
    /// Negatives of one query's own that there are, as places in the (B, K) array.
    pub(super) own: Vec<u32>,
    /// A stretch of gradients before they are added to the caller's.
    pub(super) spare: Vec<f32>,
    /// One row's sums.
    pub(super) sums: Vec<f64>,
    /// Rows of a table with their gradients.
    pub(super) table: TableScratch,
}

impl Scratch {
    /// Bytes of a thread's buffers, but those of a tile of candidates, in a step with gradients or one without.
    pub(super) fn bytes(block_b: usize, block_n: usize, dim: usize, dtype: DType, gradients: bool) -> usize {
        let queries = block_b.min(if gradients { BACK_ROWS } else { BLOCK }).next_multiple_of(BLOCK);
        let width = block_n.next_multiple_of(kernels::LANES);
        let sims = queries * width * size_of::<f32>();
        let bf16 = if dtype == DType::Bf16 { Bf16Scratch::bytes(width, dim, gradients) } else { 0 };
        let rows = block_b * (size_of::<RowState>() + size_of::<f32>());
        let rejected = block_n.next_power_of_two() * size_of::<RejectedCandidate>();
        size_of::<Scratch>() + sims + bf16 + rows + rejected + dim * size_of::<f64>()
    }

    /// Makes room for similarities of a tile's candidates with that many queries.
    fn make_room(&mut self, rows: usize, tile: &CandidateTile<'_>) {
        let needed = rows.next_multiple_of(BLOCK) * tile.width;
        if self.sims.len() < needed {
            super::resize(&mut self.sims, needed);
        }
    }
}

/// What both passes know about the step.
#[derive(Clone, Copy)]
pub(super) struct TileJob<'a> {
    pub(super) arch: Arch,
    /// Where the matmuls with pools run on the matrix unit.
    pub(super) matmul: Option<Bf16Matmul>,
    pub(super) matrix: &'a ScoreMatrix<'a>,
    pub(super) similarity: Similarity,
    pub(super) scale: (f32, f64),
    pub(super) plan: Plan,
    pub(super) masks: &'a Masks,
    pub(super) queries: &'a Units,
}

/// What the streaming pass knows beside: each row's bound, and what it counts beside the log-sum-exp.
#[derive(Clone, Copy)]
pub(super) struct Detail<'a> {
    /// (B), of the false-negative filter, if there is one.
    pub(super) bounds: Option<&'a [f32]>,
    pub(super) moments: bool,
    pub(super) pairs: Pairs<'a>,
    /// (P) similarities of the positives.
    pub(super) positive_sims: &'a [f32],
}

/// Where one part of one block of rows writes.
pub(super) struct PartOut<'o> {
    pub(super) slots: &'o mut [Partial],
    /// (rows, D): `Σ P ĉ`.
    pub(super) expected: Option<&'o mut [f32]>,
    /// The rows' pairs.
    pub(super) places: Option<&'o mut [Place]>,
}

/// What the stream back knows beside.
#[derive(Clone, Copy)]
pub(super) struct BackInputs<'a> {
    pub(super) coefficients: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) bounds: Option<&'a [f32]>,
    /// (P)
    pub(super) d_positive: &'a [f64],
    /// (candidate, row, pair), ascending: which positives a tile of candidates holds.
    pub(super) positives_by_candidate: &'a [(u32, u32, u32)],
}

/// A chunk of a block of queries whose scores are in the scratch, excluded pairs −∞.
pub(super) struct Chunk {
    pub(super) rows: Range<usize>,
    /// The same, counted from the block's first row.
    pub(super) in_block: Range<usize>,
}

/// A range of rows in pieces of `size`.
fn pieces(rows: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    rows.clone().step_by(size).map(move |start| start..(start + size).min(rows.end))
}

impl TileJob<'_> {
    /// Streams tiles past one block of queries.
    pub(super) fn stream_tiles<'t>(
        &self,
        scratch: &mut Scratch,
        rows: Range<usize>,
        tiles: impl Iterator<Item = CandidateTile<'t>>,
        detail: &Detail<'_>,
        mut out: PartOut<'_>,
    ) {
        scratch.states.clear();
        scratch.states.resize(rows.len(), RowState::EMPTY);
        super::resize(&mut scratch.rescale, rows.len());
        let dim = self.matrix.dim();
        let purpose = if out.expected.is_some() { Purpose::Expected } else { Purpose::Scores };
        for (t, tile) in tiles.enumerate() {
            self.load(&mut scratch.candidates, &tile, purpose);
            self.for_each_chunk(scratch, &tile, rows.clone(), |scratch, chunk| {
                self.add_statistics(scratch, &tile, &chunk, detail, &mut out);
                if let Some(o) = &mut out.expected {
                    let o = &mut o[chunk.in_block.start * dim..chunk.in_block.end * dim];
                    self.add_expected(scratch, &tile, &chunk, o, t == 0);
                }
            });
        }
        for (slot, state) in out.slots.iter_mut().zip(&scratch.states) {
            *slot = state.partial(self.scale.1);
        }
    }

    /// Scores the loaded tile with a block of queries chunk by chunk, makes excluded pairs −∞, and calls `work` on each chunk.
    pub(super) fn for_each_chunk(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        block: Range<usize>,
        mut work: impl FnMut(&mut Scratch, Chunk),
    ) {
        self.masks.open(block.clone(), self.keys(tile), &mut scratch.rejected);
        for rows in pieces(block.clone(), self.chunk()) {
            let in_block = rows.start - block.start..rows.end - block.start;
            scratch.make_room(rows.len(), tile);
            self.score(scratch, tile, rows.clone(), 0);
            let Scratch { rejected, excluded, sims, .. } = scratch;
            excluded.fill(0);
            self.masks.take_hits(rejected, rows.end, |row, column| {
                sims[(row - rows.start) * tile.width + column] = f32::NEG_INFINITY;
                excluded[row - rows.start] += 1;
            });
            work(scratch, Chunk { rows, in_block });
        }
    }

    /// Takes a chunk into its rows' states. With expected negatives, its scores are replaced by `2^(z − max)`.
    fn add_statistics(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        chunk: &Chunk,
        detail: &Detail<'_>,
        out: &mut PartOut<'_>,
    ) {
        let Chunk { rows, in_block } = chunk;
        let Scratch { candidates, sims, states, rescale, excluded, .. } = scratch;
        let (sims, states) = (&mut sims[..rows.len() * tile.width], &mut states[in_block.clone()]);
        for (state, &excluded) in states.iter_mut().zip(&*excluded) {
            state.num_negatives += tile.len() as u64 - u64::from(excluded);
        }
        if let Some(bounds) = detail.bounds {
            let tile = Tile { sims, width: tile.width };
            self.arch.dispatch(Filter { tile, bounds: &bounds[rows.clone()], states });
        }
        let pairs = detail.pairs.of_row(rows.start).start..detail.pairs.of_row(rows.end - 1).end;
        let before = detail.pairs.of_row(rows.start - in_block.start).start;
        let places = out.places.as_deref_mut().map(|counts| Places {
            pairs: detail.pairs,
            first_row: rows.start,
            sims: &detail.positive_sims[pairs.clone()],
            counts: &mut counts[pairs.start - before..pairs.end - before],
        });
        self.arch.dispatch(Statistics {
            tile: Tile { sims, width: tile.width },
            score: candidates.score(self, tile, detail.moments),
            states,
            moments: detail.moments,
            places,
            keep: out.expected.is_some().then_some(&mut rescale[in_block.clone()]),
        });
    }

    /// Streams each row's own negatives past it.
    pub(super) fn stream_own(&self, scratch: &mut Scratch, rows: Range<usize>, detail: &Detail<'_>, out: PartOut<'_>) {
        let Some(negatives) = &self.matrix.row_negatives else { return };
        let dim = self.matrix.dim();
        let first_pair = detail.pairs.of_row(rows.start).start;
        let PartOut { slots, mut expected, mut places } = out;
        let mut present = std::mem::take(&mut scratch.own);
        for (r, slot) in slots.iter_mut().enumerate() {
            let row = rows.start + r;
            let all = (row * negatives.per_row) as u32..((row + 1) * negatives.per_row) as u32;
            present.clear();
            present.extend(all.filter(|&place| negatives.by_index(place as usize).is_some()));
            let pairs = detail.pairs.of_row(row);
            let mut expected = expected.as_deref_mut().map(|o| &mut o[r * dim..(r + 1) * dim]);
            if let (true, Some(o)) = (present.is_empty(), &mut expected) {
                // No tile writes it, and an earlier step may have.
                o.fill(0.0);
            }
            let out = PartOut {
                slots: std::slice::from_mut(slot),
                expected,
                places: places.as_deref_mut().map(|p| &mut p[pairs.start - first_pair..pairs.end - first_pair]),
            };
            let tiles = present.chunks(self.plan.block_n).map(|places| CandidateTile::new(Columns::Own(places)));
            self.stream_tiles(scratch, row..row + 1, tiles, detail, out);
        }
        scratch.own = present;
    }

    /// `O = O · rescale + P Ĉ` of a chunk's rows; the first tile writes.
    fn add_expected(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, chunk: &Chunk, o: &mut [f32], first: bool) {
        let dim = self.matrix.dim();
        let Scratch { candidates, sims, rescale, bf16, .. } = scratch;
        let rescale = &rescale[chunk.in_block.clone()];
        if let Some(matmul) = self.matmul_of(tile) {
            let (p, width) = (&sims[..chunk.rows.len() * tile.width], tile.width);
            return matmul.add_expected(self.arch, bf16, p, candidates.bf16(), width, rescale, o, first);
        }
        for (o, &factor) in o.chunks_exact_mut(dim).zip(rescale) {
            if factor != 1.0 && !first {
                scale_row(o, factor);
            }
        }
        self.arch.dispatch(Product {
            m: chunk.rows.len(),
            a: sims,
            a_strides: [tile.width, 1],
            b: candidates.panels(tile.columns),
            to: o,
            to_stride: dim,
            add: !first,
            factor: 1.0,
        });
    }

    /// The gradient of one tile's candidates into `d_tile`.
    pub(super) fn back_tile(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        back: &BackInputs<'_>,
        d_tile: &mut [f32],
    ) {
        self.load(&mut scratch.candidates, tile, Purpose::Gradient);
        self.back_loaded(scratch, tile, back, d_tile, false);
        if self.similarity == Similarity::Cosine {
            let (unit, inverse_norm) = (scratch.candidates.rows(), scratch.candidates.inverse_norm());
            self.arch.dispatch(ChainRule { d: d_tile, unit, dim: self.matrix.dim(), inverse_norm });
        }
    }

    /// The gradient by the unit vectors of a tile that is loaded, into `d_tile` or added to it.
    pub(super) fn back_loaded(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        back: &BackInputs<'_>,
        d_tile: &mut [f32],
        add: bool,
    ) {
        let dim = self.matrix.dim();
        self.masks.open(0..self.matrix.num_queries(), self.keys(tile), &mut scratch.rejected);
        if let Some(matmul) = self.matmul {
            let to = GradientOut { to: d_tile, dim, add };
            return self.back_bf16(matmul, scratch, tile, back, to);
        }
        for rows in pieces(0..self.matrix.num_queries(), BACK_ROWS) {
            self.coefficients(scratch, tile, rows.clone(), back);
            self.arch.dispatch(Product {
                m: tile.len(),
                a: &scratch.sims[..rows.len() * tile.width],
                a_strides: [1, tile.width],
                b: self.queries.panels(rows.start, rows.len()),
                to: d_tile,
                to_stride: dim,
                add: add || rows.start > 0,
                factor: self.scale.1 as f32,
            });
        }
    }

    /// The same on the matrix unit, which takes coefficients chunk by chunk, while they are in the first-level cache.
    fn back_bf16(
        &self,
        matmul: Bf16Matmul,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        back: &BackInputs<'_>,
        to: GradientOut<'_>,
    ) {
        for block in pieces(0..self.matrix.num_queries(), QUERIES) {
            for chunk in pieces(block.clone(), BLOCK) {
                self.coefficients(scratch, tile, chunk.clone(), back);
                let Scratch { sims, bf16, .. } = &mut *scratch;
                let from = &sims[..chunk.len() * tile.width];
                matmul.take_coefficients(self.arch, bf16, self.queries, &block, chunk, from, tile.width);
            }
            matmul.gradient(&mut scratch.bf16, self.queries, &block, tile.width, block.start > 0);
        }
        matmul.write_gradient(self.arch, &mut scratch.bf16, self.queries, tile.width, self.scale.1, to);
    }

    /// The coefficients of a tile and a block of queries: `d_lse q_ij`, 0 where masked, `d_positive` at the positives.
    fn coefficients(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>, back: &BackInputs<'_>) {
        scratch.make_room(rows.len(), tile);
        for chunk in pieces(rows.clone(), self.chunk()) {
            let first = chunk.start - rows.start;
            self.score(scratch, tile, chunk.clone(), first);
            let Scratch { candidates, sims, .. } = &mut *scratch;
            let sims = &mut sims[first * tile.width..][..chunk.len() * tile.width];
            self.arch.dispatch(Coefficients {
                tile: Tile { sims, width: tile.width },
                score: candidates.score(self, tile, false),
                lse: &back.lse[chunk.clone()],
                d_lse: &back.coefficients[chunk.clone()],
                bounds: back.bounds.map(|bounds| &bounds[chunk.clone()]),
            });
        }
        let Scratch { sims, rejected, .. } = scratch;
        // After the exponentials, so that a row whose lse is NaN does not affect the candidates that it masks.
        self.masks.take_hits(rejected, rows.end, |row, column| {
            sims[(row - rows.start) * tile.width + column] = 0.0;
        });
        let Some(first) = tile.start() else { return };
        let from = back.positives_by_candidate.partition_point(|&(candidate, ..)| (candidate as usize) < first);
        for &(candidate, row, pair) in &back.positives_by_candidate[from..] {
            let column = candidate as usize - first;
            if column >= tile.len() {
                break;
            }
            if rows.contains(&(row as usize)) {
                // A positive is masked, so 0 stands here, or another pair of the row and this item.
                sims[(row as usize - rows.start) * tile.width + column] += back.d_positive[pair as usize] as f32;
            }
        }
    }

    /// The matrix unit, where it scores a tile. Negatives of a row's own have other queries each, and stay with the vector
    /// units.
    pub(super) fn matmul_of(&self, tile: &CandidateTile<'_>) -> Option<Bf16Matmul> {
        self.matmul.filter(|_| !matches!(tile.columns, Columns::Own(_)))
    }

    /// Queries that are scored at a time.
    fn chunk(&self) -> usize {
        if self.matmul.is_some() { BLOCK } else { CHUNK }
    }

    /// `S = Q̂ Ĉᵀ` of a chunk of queries and the loaded tile, into the scratch from row `first` on. Padded columns become −∞,
    /// those of spoiled embeddings NaN.
    fn score(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>, first: usize) {
        let (len, dim) = (tile.len(), self.matrix.dim());
        let Scratch { candidates, sims, bf16, .. } = scratch;
        let sims = &mut sims[first * tile.width..];
        if let Columns::Own(_) = tile.columns {
            let query = self.queries.row(rows.start);
            self.arch.dispatch(Dots { query, rows: candidates.rows(), to: &mut sims[..len] });
        } else if let Some(matmul) = self.matmul {
            let (queries, of_tile) = (self.queries.bf16(), candidates.bf16());
            matmul.score(self.arch, bf16, queries, rows.clone(), of_tile, tile.width, sims);
        } else {
            self.arch.dispatch(Product {
                m: rows.len(),
                a: &self.queries.values()[rows.start * dim..],
                a_strides: [dim, 1],
                b: candidates.transposed(),
                to: &mut *sims,
                to_stride: tile.width,
                add: false,
                factor: 1.0,
            });
        }
        for (row, sims) in rows.zip(sims.chunks_exact_mut(tile.width)) {
            if self.queries.inverse_norm(row).is_nan() {
                sims[..len].fill(f32::NAN);
            }
            candidates.spoiled().for_each(|column| sims[column] = f32::NAN);
            sims[len..].fill(f32::NEG_INFINITY);
        }
    }
}
