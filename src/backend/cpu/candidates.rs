//! Tiles of candidates: which they are, and how their embeddings come into a thread's memory.

use super::kernels::{self, Score};
use super::matmul::{PANEL, PackTransposed, Panels, pack_rows, packed_len};
use super::resize;
use super::row_kernels::Normalize;
use super::tile::TileJob;
use super::words::{Bf16Rows, Bf16Tile};
use crate::problem::embeddings::DType;
use crate::problem::loss::Similarity;
use crate::problem::pool::Candidates;
use crate::problem::score_matrix::ScoreMatrix;

/// Rows of a table that are asked for ahead of their use: enough to hide the memory's latency.
const ROWS_AHEAD: usize = 16;

/// No cosine of rows of that many elements is larger, with all its roundings.
fn largest_cosine(dim: usize) -> f32 {
    1.001 + dim as f32 * f32::EPSILON
}

/// What a tile is loaded for, beside its scores.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Purpose {
    Scores,
    /// Expected negatives.
    Expected,
    /// Gradients of its candidates.
    Gradient,
}

/// A tile of candidates: the columns of a tile of scores.
#[derive(Clone, Copy)]
pub(super) struct CandidateTile<'a> {
    pub(super) columns: Columns<'a>,
    /// Columns of the tile of scores: the candidates and what fills the last panel.
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
        CandidateTile { columns, width: len.next_multiple_of(PANEL) }
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

/// Rows of a table, of unit length.
pub(super) struct UnitRows<'a> {
    /// (R, D)
    pub(super) values: &'a [f32],
    pub(super) inverse_norm: &'a [f64],
    pub(super) bf16: &'a Bf16Rows,
}

/// The candidates of one tile in a thread's memory.
#[derive(Debug, Default)]
pub(super) struct LoadedTile {
    /// (width, D) rows of unit length, zeros behind the last candidate, and a panel's row more.
    rows: Vec<f32>,
    inverse_norm: Vec<f64>,
    /// (width) `−log_q · log2(e)`
    bias: Vec<f32>,
    largest_bias: f32,
    /// The rows as the right operand of the scores, and of the expected negatives.
    transposed: Vec<f32>,
    panels: Vec<f32>,
    /// The same for the matrix unit, where it is used.
    bf16: Bf16Tile,
    len: usize,
    dim: usize,
    /// Whether some embedding is not finite.
    spoiled: bool,
}

impl LoadedTile {
    /// Bytes of a tile of at most `block_n` candidates of a pool, with or without expected negatives. Negatives of a row's own
    /// take less.
    pub(super) fn bytes(block_n: usize, dim: usize, dtype: DType, expected: bool) -> usize {
        let width = block_n.next_multiple_of(PANEL);
        let panels = width * dim + if expected { packed_len(width, dim) } else { 0 };
        let bf16 = if dtype == DType::Bf16 { Bf16Tile::bytes(width, dim, expected) } else { 0 };
        let operands = bf16.max(panels * size_of::<f32>());
        LoadedTile::bytes_of_own(block_n, dim) + operands
    }

    /// The same for negatives of a row's own.
    pub(super) fn bytes_of_own(block_n: usize, dim: usize) -> usize {
        let width = block_n.next_multiple_of(PANEL);
        (width * dim + PANEL + width) * size_of::<f32>() + width * size_of::<f64>()
    }

    /// (len, D): the candidates, of unit length.
    pub(super) fn rows(&self) -> &[f32] {
        &self.rows[..self.len * self.dim]
    }

    pub(super) fn inverse_norm(&self) -> &[f64] {
        &self.inverse_norm[..self.len]
    }

    /// How similarities of a tile become scores. Moments want the exact maximum: entropy is a difference that would cancel.
    pub(super) fn score(&self, job: &TileJob<'_>, tile: &CandidateTile<'_>, moments: bool) -> Score<'_> {
        let scale = job.scale.0;
        let largest = match job.similarity {
            Similarity::Cosine if !moments => largest_cosine(self.dim).mul_add(scale, self.largest_bias),
            Similarity::Cosine | Similarity::Dot => f32::INFINITY,
        };
        Score { scale, bias: &self.bias[..tile.width], largest }
    }

    /// The candidates whose embeddings are not finite.
    pub(super) fn spoiled(&self) -> impl Iterator<Item = usize> {
        let norms = if self.spoiled { self.inverse_norm() } else { &[] };
        norms.iter().enumerate().filter(|(_, inverse)| inverse.is_nan()).map(|(column, _)| column)
    }

    /// The right operand (D, width) of the scores.
    pub(super) fn transposed(&self) -> Panels<'_> {
        Panels::transposed(&self.transposed, self.len.next_multiple_of(PANEL), self.dim)
    }

    /// The right operand (len, D) of the expected negatives. Negatives of a row's own are used once, so they are read as
    /// they are.
    pub(super) fn panels(&self, columns: Columns<'_>) -> Panels<'_> {
        match columns {
            Columns::Own(_) => Panels::in_place(&self.rows, self.len, self.dim),
            Columns::Pool { .. } | Columns::ByRow(_) => Panels::of_rows(&self.panels, self.len, self.dim, 0, self.len),
        }
    }

    /// The operands for the matrix unit.
    pub(super) fn bf16(&self) -> &Bf16Tile {
        &self.bf16
    }

    /// Makes room for a tile and lets `write(column, row)` write its rows.
    fn fill(&mut self, job: &TileJob<'_>, tile: &CandidateTile<'_>, mut write: impl FnMut(usize, &mut [f32])) {
        (self.len, self.dim) = (tile.len(), job.matrix.dim());
        let (block_n, dim) = (job.plan.block_n.next_multiple_of(PANEL), self.dim);
        resize(&mut self.rows, block_n * dim + PANEL);
        resize(&mut self.inverse_norm, block_n);
        resize(&mut self.bias, block_n);
        if job.matmul_of(tile).is_some() {
            self.bf16.rows.resize(tile.len(), dim);
        }
        for (column, to) in self.rows.chunks_exact_mut(dim).take(self.len).enumerate() {
            write(column, to);
        }
        self.rows[self.len * dim..tile.width * dim].fill(0.0);
        for (column, bias) in self.bias[..tile.width].iter_mut().enumerate() {
            let log_q = if column < tile.len() { job.log_q(tile, column) } else { None };
            *bias = log_q.map_or(0.0, kernels::bias);
        }
        self.largest_bias = self.bias[..tile.len()].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    }

    /// What follows once rows and norms are there.
    fn finish(&mut self, job: &TileJob<'_>, tile: &CandidateTile<'_>, purpose: Purpose) {
        let expected = purpose == Purpose::Expected;
        self.spoiled = self.inverse_norm().iter().any(|inverse| inverse.is_nan());
        if let Columns::Own(_) = tile.columns {
            return;
        }
        if job.matmul.is_some() {
            return self.bf16.finish(job.arch, tile.width, expected);
        }
        let (block_n, dim) = (job.plan.block_n.next_multiple_of(PANEL), self.dim);
        resize(&mut self.transposed, block_n * dim);
        let (from, to) = (&self.rows[..tile.width * dim], &mut self.transposed[..tile.width * dim]);
        job.arch.dispatch(PackTransposed { from, k: dim, to });
        if expected {
            resize(&mut self.panels, packed_len(block_n, dim));
            pack_rows(&self.rows[..self.len * dim], dim, &mut self.panels[..packed_len(self.len, dim)]);
        }
    }
}

impl<'a> TileJob<'a> {
    /// Brings a tile's candidates, inverse norms and biases into `to`.
    pub(super) fn load(&self, to: &mut LoadedTile, tile: &CandidateTile<'_>, purpose: Purpose) {
        to.fill(self, tile, |column, to| {
            self.prefetch(tile, column + ROWS_AHEAD);
            self.widen(tile, column, to);
        });
        let (dim, similarity) = (self.matrix.dim(), self.similarity);
        let (x, inverse_norm) = (&mut to.rows[..tile.len() * dim], to.inverse_norm.as_mut_slice());
        let bf16 = self.matmul_of(tile).map(|_| to.bf16.rows.rows_mut());
        let keep = bf16.is_none() || purpose == Purpose::Gradient;
        self.arch.dispatch(Normalize { x, dim, similarity, inverse_norm, bf16, keep });
        to.finish(self, tile, purpose);
    }

    /// The same with candidates that are of unit length already: row `at(column)` of `units`.
    pub(super) fn load_units(
        &self,
        to: &mut LoadedTile,
        tile: &CandidateTile<'_>,
        units: &UnitRows<'_>,
        at: impl Fn(usize) -> usize,
    ) {
        let dim = self.matrix.dim();
        to.fill(self, tile, |column, row| row.copy_from_slice(&units.values[at(column) * dim..][..dim]));
        for column in 0..tile.len() {
            to.inverse_norm[column] = units.inverse_norm[at(column)];
            if self.matmul.is_some() {
                to.bf16.rows.copy_row(column, units.bf16, at(column));
            }
        }
        to.finish(self, tile, Purpose::Gradient);
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
    pub(super) fn keys<'t>(&self, tile: &'t CandidateTile<'_>) -> impl Iterator<Item = u64> + use<'t, 'a> {
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
}

/// The table's row of a negative of a query's own that there is.
pub(super) fn own_row(matrix: &ScoreMatrix<'_>, place: u32) -> usize {
    let row = matrix.row_negatives.and_then(|negatives| negatives.by_index(place as usize));
    row.expect("only negatives that there are have a column")
}
