//! Operands of the matrix unit (`amx/`): bf16 numbers in words of two.
//!
//! The two numbers of a word are [`TILE`] places apart, in each block of [`BLOCK`] along the dimension that is summed over. Whether
//! that is D, the candidates of a tile or the queries differs from matmul to matmul, and so do the words.

use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

use super::amx::{BLOCK, TILE};
use super::matmul::PackTransposed;
use super::resize;

/// The upper half of a word, and the bits of an `f32` that a bf16 number has.
const UPPER: u32 = 0xffff_0000;

/// A word of two bf16 numbers, each of which is the upper half of its argument.
#[inline(always)]
fn word(lower: u32, upper: u32) -> u32 {
    lower >> 16 | upper & UPPER
}

/// Words of a row of `dim` numbers.
pub(super) fn words_per_row(dim: usize) -> usize {
    dim.next_multiple_of(BLOCK) / 2
}

/// Rows of embeddings, each times a power of two: words along D.
#[derive(Debug, Default)]
pub(super) struct Bf16Rows {
    /// (rows, words of a row). Zeros fill up the last block of a row, and [`BLOCK`] rows of zeros follow.
    words: Vec<u32>,
    /// (rows): what each row is multiplied by to have the length that it has in scores.
    factors: Vec<f32>,
    dim: usize,
}

/// A stretch of rows to be written.
pub(super) struct Bf16RowsMut<'a> {
    words: &'a mut [u32],
    factors: &'a mut [f32],
    stride: usize,
}

impl Bf16Rows {
    pub(super) fn bytes(rows: usize, dim: usize) -> usize {
        (rows + BLOCK) * (words_per_row(dim) * size_of::<u32>() + size_of::<f32>())
    }

    pub(super) fn resize(&mut self, rows: usize, dim: usize) {
        self.dim = dim;
        let stride = self.stride();
        resize(&mut self.words, (rows + BLOCK) * stride);
        resize(&mut self.factors, rows + BLOCK);
        self.words[rows * stride..].fill(0);
        self.factors[rows..].fill(0.0);
    }

    pub(super) fn dim(&self) -> usize {
        self.dim
    }

    /// Words from one row to the next.
    pub(super) fn stride(&self) -> usize {
        words_per_row(self.dim)
    }

    /// Words from `row` on.
    pub(super) fn words_from(&self, row: usize) -> &[u32] {
        &self.words[row * self.stride()..]
    }

    /// Factors from `row` on.
    pub(super) fn factors_from(&self, row: usize) -> &[f32] {
        &self.factors[row..]
    }

    /// Copies row `from` of `rows` to row `to`.
    pub(super) fn copy_row(&mut self, to: usize, rows: &Bf16Rows, from: usize) {
        let stride = self.stride();
        self.words[to * stride..(to + 1) * stride].copy_from_slice(&rows.words_from(from)[..stride]);
        self.factors[to] = rows.factors[from];
    }

    /// The rows, to be written.
    pub(super) fn rows_mut(&mut self) -> Bf16RowsMut<'_> {
        let stride = self.stride();
        Bf16RowsMut { words: &mut self.words, factors: &mut self.factors, stride }
    }

    /// The rows in stretches of `size`.
    pub(super) fn stretches_mut(&mut self, size: usize) -> impl Iterator<Item = Bf16RowsMut<'_>> {
        let stride = self.stride();
        let stretches = self.words.chunks_mut(size * stride).zip(self.factors.chunks_mut(size));
        stretches.map(move |(words, factors)| Bf16RowsMut { words, factors, stride })
    }
}

impl Bf16RowsMut<'_> {
    /// Writes row `r`, whose elements are bf16 numbers. `norm` is its length, and `inverse` what scores multiply it by, or NaN
    /// if the row is spoiled.
    ///
    /// The power of two brings the length to between 1 and 2. So no product of two rows overflows, and elements that the matrix
    /// unit takes as 0 are less than 2^-126 of their row.
    #[inline(always)]
    pub(super) fn write(&mut self, r: usize, row: &[f32], norm: f64, inverse: f64) {
        let to = &mut self.words[r * self.stride..(r + 1) * self.stride];
        let power = power_of_two(norm);
        self.factors[r] = if inverse.is_nan() { 0.0 } else { (inverse * power) as f32 };
        let down = (1.0 / power) as f32;
        for (to, from) in to.as_chunks_mut::<TILE>().0.iter_mut().zip(row.chunks(BLOCK)) {
            let mut block = [0.0f32; BLOCK];
            block[..from.len()].copy_from_slice(from);
            for k in 0..TILE {
                to[k] = word((block[k] * down).to_bits(), (block[TILE + k] * down).to_bits());
            }
        }
    }
}

/// The largest power of two that is not above a length, within the range of `f32`; 1 for 0 and what is not finite.
#[inline(always)]
fn power_of_two(norm: f64) -> f64 {
    if norm == 0.0 || !norm.is_finite() {
        return 1.0;
    }
    f64::from_bits(norm.to_bits() & (0x7ff << 52)).clamp(f64::from(f32::MIN_POSITIVE), 2f64.powi(127))
}

/// A power of two near the largest of some sizes, within the range of `f32`; 1 if all are 0, or one is infinite.
fn near_largest(sizes: impl Iterator<Item = f32>) -> f32 {
    power_of_two(f64::from(sizes.fold(0.0, f32::max))) as f32
}

/// Turns words along D of two rows into words of these rows: [`BLOCK`] words, one for each element.
#[inline(always)]
fn side_by_side(first: &[u32; TILE], second: &[u32; TILE]) -> [[u32; TILE]; 2] {
    [std::array::from_fn(|k| first[k] & !UPPER | second[k] << 16), std::array::from_fn(|k| word(first[k], second[k]))]
}

/// Calls `put(pair, block of D, words)` for the pairs of rows of one block of [`BLOCK`] rows.
#[inline(always)]
fn for_each_pair(rows: &Bf16Rows, block: usize, mut put: impl FnMut(usize, usize, [[u32; TILE]; 2])) {
    let stride = rows.stride();
    for pair in 0..TILE {
        let row = |row: usize| rows.words_from(block * BLOCK + row)[..stride].as_chunks::<TILE>().0;
        for (d, (first, second)) in row(pair).iter().zip(row(pair + TILE)).enumerate() {
            put(pair, d, side_by_side(first, second));
        }
    }
}

/// The candidates of a tile, as the right operands of two matmuls.
#[derive(Debug, Default)]
pub(super) struct Bf16Tile {
    pub(super) rows: Bf16Rows,
    /// Of the scores: (panels of [`BLOCK`] candidates, words along D, candidates of a panel).
    pub(super) transposed: Vec<u32>,
    /// Of the expected negatives: (panels of [`BLOCK`] elements, words along the candidates, elements of a panel).
    pub(super) paired: Vec<u32>,
    /// (width): what probabilities are multiplied by for it. The rows' factors over `scale`, a power of two near the largest: what
    /// the unit takes as 0 is then small beside the largest.
    pub(super) relative: Vec<f32>,
    pub(super) scale: f32,
}

impl Bf16Tile {
    /// Bytes of a tile of `width` candidates, with or without expected negatives.
    pub(super) fn bytes(width: usize, dim: usize, expected: bool) -> usize {
        let words = width * words_per_row(dim) * size_of::<u32>();
        let expected = if expected { words + width * size_of::<f32>() } else { 0 };
        Bf16Rows::bytes(width, dim) + words + expected
    }

    /// Makes the operands of the first `width` rows, which are there.
    pub(super) fn finish(&mut self, arch: Arch, width: usize, expected: bool) {
        let words = width * self.rows.stride();
        resize(&mut self.transposed, words);
        let from = bytemuck::cast_slice(&self.rows.words[..words]);
        let to = bytemuck::cast_slice_mut(&mut self.transposed);
        arch.dispatch(PackTransposed { from, k: self.rows.stride(), to });
        if expected {
            resize(&mut self.paired, words);
            arch.dispatch(PairCandidates { rows: &self.rows, width, to: &mut self.paired });
            let factors = &self.rows.factors[..width];
            self.scale = near_largest(factors.iter().copied());
            resize(&mut self.relative, width);
            self.relative.iter_mut().zip(factors).for_each(|(relative, factor)| *relative = factor / self.scale);
        }
    }
}

/// Writes [`Bf16Tile::paired`].
struct PairCandidates<'a> {
    rows: &'a Bf16Rows,
    width: usize,
    to: &'a mut [u32],
}

impl NullaryFnOnce for PairCandidates<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for block in 0..self.width / BLOCK {
            for_each_pair(self.rows, block, |pair, panel, words| {
                let row = panel * self.width / 2 + block * TILE + pair;
                self.to[row * BLOCK..][..BLOCK].copy_from_slice(words.as_flattened());
            });
        }
    }
}

/// Queries as the left operand of the gradients by candidates: (blocks of [`BLOCK`] queries, D, words along the queries).
#[derive(Debug, Default)]
pub(super) struct PairedQueries {
    words: Vec<u32>,
    /// D, rounded up to blocks.
    dims: usize,
    /// (queries): what coefficients are multiplied by. The rows' factors over `scale`, a power of two near the largest coefficient
    /// times its factor: what the unit takes as 0 is then small beside the largest.
    relative: Vec<f32>,
    scale: f32,
}

impl PairedQueries {
    pub(super) fn bytes(rows: usize, dim: usize) -> usize {
        rows.next_multiple_of(BLOCK) * words_per_row(dim) * size_of::<u32>() + rows * size_of::<f32>()
    }

    /// Prepares for coefficients: none of a query's negatives is larger than its `d_lse`, and each of `positives`, a query and its
    /// derivative, is one.
    pub(super) fn weigh(&mut self, rows: &Bf16Rows, d_lse: &[f32], positives: impl Iterator<Item = (u32, f64)>) {
        let PairedQueries { relative, scale, .. } = self;
        // The largest of each query, and then its factor.
        relative.clear();
        relative.reserve_exact(d_lse.len());
        relative.extend(d_lse.iter().map(|d_lse| d_lse.abs()));
        for (query, d_positive) in positives {
            let largest = &mut relative[query as usize];
            *largest = largest.max(d_positive.abs() as f32);
        }
        *scale = near_largest(relative.iter().zip(&rows.factors).map(|(largest, factor)| largest * factor));
        for (relative, factor) in relative.iter_mut().zip(&rows.factors) {
            // The factor of a query without coefficients may be too large for a quotient.
            *relative = if *relative == 0.0 { 0.0 } else { (factor / *scale).min(f32::MAX) };
        }
    }

    /// What coefficients are multiplied by, from query `row` on.
    pub(super) fn relative_from(&self, row: usize) -> &[f32] {
        &self.relative[row..]
    }

    pub(super) fn scale(&self) -> f32 {
        self.scale
    }

    pub(super) fn load(&mut self, from: &Bf16Rows, rows: usize) {
        self.dims = 2 * from.stride();
        let block_words = self.dims * TILE;
        resize(&mut self.words, rows.div_ceil(BLOCK) * block_words);
        self.words.par_chunks_mut(block_words.max(1)).enumerate().for_each(|(block, to)| {
            for_each_pair(from, block, |pair, d, words| {
                for (to, &word) in to[d * BLOCK * TILE..].chunks_exact_mut(TILE).zip(words.as_flattened()) {
                    to[pair] = word;
                }
            });
        });
    }

    pub(super) fn dims(&self) -> usize {
        self.dims
    }

    /// Words from the block of query `row` on.
    pub(super) fn words_from(&self, row: usize) -> &[u32] {
        &self.words[row / BLOCK * self.dims * TILE..]
    }
}

/// An `f32` is the sum of so many bf16 numbers, of 8 significant bits each: its pieces.
pub(super) const PIECES: usize = 3;

/// Writes words of the pieces of `lower` and `upper`: piece p to `to[p · stride..]`.
#[inline(always)]
fn split(mut lower: [f32; TILE], mut upper: [f32; TILE], to: &mut [u32], stride: usize) {
    for p in 0..PIECES {
        let to = to[p * stride..].first_chunk_mut::<TILE>().expect("room for all pieces");
        for k in 0..TILE {
            let [below, above] = [&mut lower[k], &mut upper[k]].map(|x| {
                let piece = x.to_bits() & UPPER;
                *x -= f32::from_bits(piece);
                piece
            });
            to[k] = word(below, above);
        }
    }
}

/// Splits some columns of probabilities, each times its candidate's factor, for a left operand: (rows, pieces, words along the
/// columns).
pub(super) struct SplitRows<'a> {
    /// (rows, width)
    pub(super) from: &'a [f32],
    pub(super) width: usize,
    pub(super) columns: std::ops::Range<usize>,
    /// (width)
    pub(super) factors: &'a [f32],
    pub(super) to: &'a mut [u32],
}

impl NullaryFnOnce for SplitRows<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let words = self.columns.len() / 2;
        let factors = &self.factors[self.columns.clone()];
        for (from, to) in self.from.chunks_exact(self.width).zip(self.to.chunks_exact_mut(PIECES * words)) {
            let blocks = from[self.columns.clone()].as_chunks::<BLOCK>().0.iter().zip(factors.as_chunks::<BLOCK>().0);
            for (block, (p, factors)) in blocks.enumerate() {
                let lower = std::array::from_fn(|k| p[k] * factors[k]);
                let upper = std::array::from_fn(|k| p[TILE + k] * factors[TILE + k]);
                split(lower, upper, &mut to[block * TILE..], words);
            }
        }
    }
}

/// Splits coefficients of at most [`BLOCK`] queries, each row times its query's factor, for a right operand: (panels of [`BLOCK`]
/// columns, pieces, words along the queries, columns of a panel). Writes [`TILE`] words along the queries, from `first` on of
/// `along`; zeros stand for queries that are not there.
pub(super) struct SplitColumns<'a> {
    /// (queries, width)
    pub(super) from: &'a [f32],
    pub(super) width: usize,
    /// (queries)
    pub(super) factors: &'a [f32],
    pub(super) to: &'a mut [u32],
    pub(super) first: usize,
    pub(super) along: usize,
}

impl NullaryFnOnce for SplitColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let SplitColumns { from, width, factors, to, first, along } = self;
        let rows = from.len() / width;
        let load = |row: usize, column: usize| -> [f32; TILE] {
            if row >= rows {
                return [0.0; TILE];
            }
            let from: &[f32; TILE] = from[row * width + column..].first_chunk().expect("whole tiles");
            std::array::from_fn(|k| from[k] * factors[row])
        };
        for (panel, to) in to[..width * along * PIECES].chunks_exact_mut(PIECES * along * BLOCK).enumerate() {
            for pair in 0..TILE {
                for half in [0, TILE] {
                    let column = panel * BLOCK + half;
                    let to = &mut to[(first + pair) * BLOCK + half..];
                    split(load(pair, column), load(TILE + pair, column), to, along * BLOCK);
                }
            }
        }
    }
}
