//! One tile of scores: operands of unit length, the matmul, the mask, and what the two passes do with it.

use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::best::Best;
use super::kernels::{
    self, ChainRule, Coefficients, Dots, Filter, LANES, Normalize, Place, Places, RowState, Score, Statistics, Tile,
};
use super::masks::Masks;
use super::matmul;
use super::table::TableScratch;
use crate::problem::embeddings::{Embeddings, prefetch};
use crate::problem::loss::Similarity;
use crate::problem::plan::Plan;
use crate::problem::pool::Candidates;
use crate::problem::positives::Pairs;
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
        (&self.values[row * self.dim..self.rows * self.dim], &self.inverse_norm[row..])
    }

    /// `height` rows from `start`, those past the end zero (or, within the padding, a following block's).
    pub(super) fn padded(&self, start: usize, height: usize) -> &[f32] {
        &self.values[start * self.dim..(start + height) * self.dim]
    }
}

/// Rows of a table that are asked for ahead of their use: enough to hide the memory's latency.
const ROWS_AHEAD: usize = 16;

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
    /// Bytes of a thread's buffers.
    pub(super) fn bytes(block_b: usize, block_n: usize, dim: usize) -> usize {
        let height = block_b.max(MIN_HEIGHT);
        let candidates = block_n * (dim * size_of::<f32>() + size_of::<f64>() + size_of::<f32>());
        let rows = height * (block_n * size_of::<f32>() + size_of::<RowState>() + size_of::<f32>());
        let sums = dim * size_of::<f64>();
        size_of::<Scratch>() + candidates + rows + sums
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

/// A tile of candidates: the columns of a tile of scores.
#[derive(Clone, Copy)]
pub(super) struct CandidateTile<'a> {
    pub(super) columns: Columns<'a>,
    /// Columns of the score tile, padding included.
    pub(super) width: usize,
}

/// Which candidates a tile holds.
#[derive(Clone, Copy)]
pub(super) enum Columns<'a> {
    /// `len` candidates of a pool, from `first` on; `start` is the first one's index over all pools.
    Pool { pool: usize, first: usize, len: usize, start: usize },
    /// Candidates of pools by reference, in the order of the table's rows: the row in the upper 32 bits, the index over
    /// all pools in the lower ones.
    ByRow(&'a [u64]),
    /// Negatives of one query's own, as places in the (B, K) array.
    Own(&'a [u32]),
}

impl<'a> CandidateTile<'a> {
    pub(super) fn new(columns: Columns<'a>) -> Self {
        let len = match columns {
            Columns::Pool { len, .. } => len,
            Columns::ByRow(candidates) => candidates.len(),
            Columns::Own(places) => places.len(),
        };
        CandidateTile { columns, width: width(len) }
    }

    pub(super) fn len(&self) -> usize {
        match self.columns {
            Columns::Pool { len, .. } => len,
            Columns::ByRow(candidates) => candidates.len(),
            Columns::Own(places) => places.len(),
        }
    }

    /// The index over all pools of the first candidate, of a tile of a pool's stretch.
    pub(super) fn start(&self) -> Option<usize> {
        match self.columns {
            Columns::Pool { start, .. } => Some(start),
            Columns::ByRow(_) | Columns::Own(_) => None,
        }
    }
}

impl<'a> TileJob<'a> {
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
        for (t, tile) in tiles.enumerate() {
            self.load(scratch, &tile);
            self.score(scratch, &tile, rows.clone());
            self.leave_out(scratch, &tile, rows.clone(), detail.bounds);
            let first_pair = detail.pairs.of_row(rows.start).start;
            let places = out.places.as_deref_mut().map(|counts| Places {
                pairs: detail.pairs,
                first_row: rows.start,
                sims: &detail.positive_sims[first_pair..],
                counts,
            });
            self.arch.dispatch(Statistics {
                tile: Tile { sims: &mut scratch.sims[..rows.len() * tile.width], width: tile.width },
                score: Score { scale: self.scale.0, bias: &scratch.bias[..tile.width] },
                states: &mut scratch.states,
                moments: detail.moments,
                places,
                keep: out.expected.is_some().then_some(&mut scratch.rescale),
            });
            if let Some(o) = &mut out.expected {
                self.add_expected(scratch, &tile, rows.len(), o, t == 0);
            }
        }
        for (slot, state) in out.slots.iter_mut().zip(&scratch.states) {
            *slot = state.partial(self.scale.1);
        }
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

    /// Takes masked candidates, and those above the rows' bounds, off the rows' negatives.
    fn leave_out(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>, bounds: Option<&[f32]>) {
        let (sims, states) = (&mut scratch.sims, &mut scratch.states);
        for state in &mut *states {
            state.num_negatives += tile.len() as u64;
        }
        self.masks.for_each_hit(rows.clone(), self.keys(tile), |r, column| {
            sims[r * tile.width + column] = f32::NEG_INFINITY;
            states[r].num_negatives -= 1;
        });
        if let Some(bounds) = bounds {
            let tile = Tile { sims: &mut sims[..rows.len() * tile.width], width: tile.width };
            self.arch.dispatch(Filter { tile, bounds: &bounds[rows], states });
        }
    }

    /// `O = O · rescale + P Ĉ`; the first tile writes.
    fn add_expected(&self, scratch: &Scratch, tile: &CandidateTile<'_>, rows: usize, o: &mut [f32], first: bool) {
        let dim = self.matrix.dim();
        for (o, &factor) in o.chunks_exact_mut(dim).zip(&scratch.rescale) {
            if factor != 1.0 && !first {
                kernels::scale_row(o, factor);
            }
        }
        let shape = (rows, dim, tile.len());
        matmul::accumulate(shape, &scratch.sims, [tile.width, 1], &scratch.candidates, o, !first, 1.0);
    }

    /// The gradient of one tile's candidates into `d_tile`.
    pub(super) fn back_tile(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        back: &BackInputs<'_>,
        d_tile: &mut [f32],
    ) {
        self.load(scratch, tile);
        self.back_loaded(scratch, tile, back, d_tile, false);
        if self.similarity == Similarity::Cosine {
            let (unit, inverse_norm) = (&scratch.candidates, &scratch.inverse_norm);
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
        let (b, dim) = (self.matrix.num_queries(), self.matrix.dim());
        for start in (0..b).step_by(self.plan.block_b) {
            let rows = start..(start + self.plan.block_b).min(b);
            self.score(scratch, tile, rows.clone());
            self.coefficients(scratch, tile, rows.clone(), back);
            let queries = self.queries.padded(start, rows.len());
            let shape = (tile.len(), dim, rows.len());
            let add = add || start > 0;
            matmul::accumulate(shape, &scratch.sims, [1, tile.width], queries, d_tile, add, self.scale.1 as f32);
        }
    }

    /// Replaces a tile of similarities by coefficients: `d_lse q_ij`, 0 where masked, `d_positive` at the positives.
    fn coefficients(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>, back: &BackInputs<'_>) {
        let sims = &mut scratch.sims;
        let score = Score { scale: self.scale.0, bias: &scratch.bias[..tile.width] };
        self.arch.dispatch(Coefficients {
            tile: Tile { sims: &mut sims[..rows.len() * tile.width], width: tile.width },
            score,
            lse: &back.lse[rows.clone()],
            d_lse: &back.coefficients[rows.clone()],
            bounds: back.bounds.map(|bounds| &bounds[rows.clone()]),
        });
        // After the exponentials, so that a row whose lse is NaN does not affect the candidates that it masks.
        self.masks.for_each_hit(rows.clone(), self.keys(tile), |r, column| {
            sims[r * tile.width + column] = 0.0;
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

    /// The tiles of a split, in order. Tiles do not cross pools.
    pub(super) fn tiles(&self, split: usize) -> impl Iterator<Item = CandidateTile<'a>> + use<'a> {
        let (matrix, block_n) = (self.matrix, self.plan.block_n);
        let lens = move || (0..matrix.pools.len()).map(move |pool| matrix.candidates(pool).len());
        let count: usize = lens().map(|len| len.div_ceil(block_n)).sum();
        let first = split * count / self.plan.splits;
        let last = (split + 1) * count / self.plan.splits;
        let starts = lens().scan(0, |start, len| Some(std::mem::replace(start, *start + len)));
        let all = lens().zip(starts).enumerate().flat_map(move |(pool, (n, start))| {
            (0..n).step_by(block_n).map(move |first| {
                let len = block_n.min(n - first);
                CandidateTile::new(Columns::Pool { pool, first, len, start: start + first })
            })
        });
        all.skip(first).take(last - first)
    }

    /// The keys by which masks tell a tile's candidates apart: their ids, else their indices over all pools.
    fn keys<'t>(&self, tile: &'t CandidateTile<'_>) -> impl Iterator<Item = u64> + use<'t, 'a> {
        let matrix = self.matrix;
        let of_row = move |row: usize| matrix.table.as_ref().map_or(row as u64, |table| table.id(row));
        let columns = tile.columns;
        (0..tile.len()).map(move |column| match columns {
            Columns::Pool { pool, first, start, .. } => {
                matrix.candidate_id(pool, first + column).unwrap_or((start + column) as u64)
            }
            Columns::ByRow(candidates) => of_row((candidates[column] >> 32) as usize),
            Columns::Own(places) => of_row(own_row(matrix, places[column])),
        })
    }

    fn log_q(&self, tile: &CandidateTile<'_>, column: usize) -> Option<f32> {
        let of_pool = |pool: usize, candidate: usize| self.matrix.pools[pool].log_q.map(|log_q| log_q[candidate]);
        match tile.columns {
            Columns::Pool { pool, first, .. } => of_pool(pool, first + column),
            Columns::ByRow(candidates) => {
                let (pool, candidate) = self.matrix.locate(candidates[column] as u32 as usize);
                of_pool(pool, candidate)
            }
            Columns::Own(places) => self.matrix.row_negatives?.log_q.map(|log_q| log_q[places[column] as usize]),
        }
    }

    /// Asks for a candidate's embedding ahead of its use, where a tile's candidates are scattered.
    fn prefetch(&self, tile: &CandidateTile<'_>, column: usize) {
        if column >= tile.len() {
            return;
        }
        let row = match tile.columns {
            Columns::Pool { pool, first, .. } => match self.matrix.pools[pool].candidates {
                Candidates::Rows(rows) => rows.at(first + column),
                // Rows that follow each other are fetched without being asked for.
                Candidates::Embeddings(_) | Candidates::WholeTable => return,
            },
            Columns::ByRow(candidates) => (candidates[column] >> 32) as usize,
            Columns::Own(places) => own_row(self.matrix, places[column]),
        };
        if let Some(embeddings) = self.matrix.table.as_ref().and_then(|table| table.embeddings) {
            embeddings.prefetch_row(row);
        }
    }

    /// Copies the embedding of one candidate, widened.
    fn widen(&self, tile: &CandidateTile<'_>, column: usize, to: &mut [f32]) {
        let row = match tile.columns {
            Columns::Pool { pool, first, .. } => return self.matrix.candidates(pool).widen(first + column, to),
            Columns::ByRow(candidates) => (candidates[column] >> 32) as usize,
            Columns::Own(places) => own_row(self.matrix, places[column]),
        };
        let table = self.matrix.table.as_ref().and_then(|table| table.embeddings);
        table.expect("a streamed batch has its table").widen_row(row, to);
    }

    /// Brings a tile's candidates, inverse norms and biases into the scratch.
    pub(super) fn load(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>) {
        self.load_candidates(scratch, tile, |column, to| {
            self.prefetch(tile, column + ROWS_AHEAD);
            self.widen(tile, column, to);
        });
        let x = &mut scratch.candidates[..tile.len() * self.matrix.dim()];
        let inverse_norm = &mut scratch.inverse_norm;
        self.arch.dispatch(Normalize { x, dim: self.matrix.dim(), similarity: self.similarity, inverse_norm });
    }

    /// The same with candidates that are of unit length already: `unit(column)` and its inverse norm.
    pub(super) fn load_units<'u>(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        mut unit: impl FnMut(usize) -> (&'u [f32], f64),
    ) {
        self.load_candidates(scratch, tile, |_, _| ());
        let rows = scratch.candidates.chunks_exact_mut(self.matrix.dim());
        for (column, (to, norm)) in rows.zip(&mut scratch.inverse_norm).take(tile.len()).enumerate() {
            let (from, inverse_norm) = unit(column);
            to.copy_from_slice(from);
            *norm = inverse_norm;
        }
    }

    fn load_candidates(
        &self,
        scratch: &mut Scratch,
        tile: &CandidateTile<'_>,
        mut write: impl FnMut(usize, &mut [f32]),
    ) {
        let (dim, len) = (self.matrix.dim(), tile.len());
        super::resize(&mut scratch.candidates, self.plan.block_n.max(tile.width) * dim);
        super::resize(&mut scratch.inverse_norm, self.plan.block_n);
        super::resize(&mut scratch.bias, self.plan.block_n.max(tile.width));
        for (column, to) in scratch.candidates.chunks_exact_mut(dim).take(len).enumerate() {
            write(column, to);
        }
        scratch.candidates[len * dim..tile.width * dim].fill(0.0);
        for (column, bias) in scratch.bias.iter_mut().enumerate() {
            let log_q = if column < len { self.log_q(tile, column) } else { None };
            *bias = log_q.map_or(0.0, |log_q| -log_q * std::f32::consts::LOG2_E);
        }
    }

    /// Makes the similarities of excluded pairs −∞.
    pub(super) fn mask(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>) {
        let sims = &mut scratch.sims;
        self.masks.for_each_hit(rows, self.keys(tile), |r, column| {
            sims[r * tile.width + column] = f32::NEG_INFINITY;
        });
    }

    /// `S = Q̂ Ĉᵀ` for one block of queries; padded columns become −∞, those of spoiled embeddings NaN.
    pub(super) fn score(&self, scratch: &mut Scratch, tile: &CandidateTile<'_>, rows: Range<usize>) {
        let (len, height) = (tile.len(), rows.len().max(MIN_HEIGHT));
        let needed = self.plan.block_b.max(MIN_HEIGHT) * self.plan.block_n.max(tile.width);
        super::resize(&mut scratch.sims, needed);
        if let Columns::Own(_) = tile.columns {
            let (query, to) = (self.queries.row(rows.start), &mut scratch.sims[..len]);
            self.arch.dispatch(Dots { query, rows: &scratch.candidates, to });
        } else {
            let queries = self.queries.padded(rows.start, height);
            matmul::similarities(queries, &scratch.candidates, &mut scratch.sims, height, tile.width);
        }
        let row_norms = &self.queries.inverse_norm[rows.clone()];
        for (row, _) in row_norms.iter().enumerate().filter(|(_, inverse)| inverse.is_nan()) {
            scratch.sims[row * tile.width..][..len].fill(f32::NAN);
        }
        let column_norms = &scratch.inverse_norm[..len];
        for (column, _) in column_norms.iter().enumerate().filter(|(_, inverse)| inverse.is_nan()) {
            scratch.sims[column..].iter_mut().step_by(tile.width).take(rows.len()).for_each(|sim| *sim = f32::NAN);
        }
        if tile.width > len {
            for row in scratch.sims[..rows.len() * tile.width].chunks_exact_mut(tile.width) {
                row[len..].fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// The table's row of a negative of a query's own that there is.
pub(super) fn own_row(matrix: &ScoreMatrix<'_>, place: u32) -> usize {
    let row = matrix.row_negatives.and_then(|negatives| negatives.by_index(place as usize));
    row.expect("only negatives that there are have a column")
}

/// Columns of a score tile for that many candidates.
fn width(candidates: usize) -> usize {
    candidates.next_multiple_of(LANES).max(MIN_WIDTH)
}
