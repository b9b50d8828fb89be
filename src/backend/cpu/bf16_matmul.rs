//! The matmuls of a tile of bf16 embeddings on the matrix unit.
//!
//! Embeddings go in as they are, times a power of two for each row, and rows' lengths are applied to the results. Probabilities and
//! coefficients are `f32`, and go in as three bf16 numbers each. So every product is exact, as it is on the vector units.

use std::ops::Range;

use pulp::{Arch, NullaryFnOnce};

use super::amx::{Amx, BLOCK, Product, Step, Steps, TILE};
use super::matmul::PackTransposed;
use super::resize;
use super::units::Units;
use super::words::{Bf16Rows, Bf16Tile, PIECES, SplitColumns, SplitRows, words_per_row};

/// Columns of probabilities that are multiplied at a time: their words, 24 KiB, stay in the first-level cache.
const COLUMNS: usize = 128;
/// Queries whose coefficients are multiplied at a time: a panel of their words is 24 KiB.
pub(super) const QUERIES: usize = 128;

/// The matrix unit, in a step whose embeddings are bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Matmul(Amx);

/// A thread's buffers.
#[derive(Debug, Default)]
pub(super) struct Bf16Scratch {
    steps: Steps,
    /// Probabilities or coefficients.
    words: Vec<u32>,
    /// (BLOCK, D) expected negatives of a chunk of queries, or (D, width) gradients of a tile's candidates.
    product: Vec<f32>,
    /// The gradients, in panels of [`BLOCK`] elements of each candidate.
    transposed: Vec<f32>,
}

impl Bf16Scratch {
    /// Bytes for tiles of `width` candidates.
    pub(super) fn bytes(width: usize, dim: usize, gradients: bool) -> usize {
        let (dims, columns) = (dim.next_multiple_of(BLOCK), COLUMNS.min(width));
        if !gradients {
            return Steps::bytes(dims / BLOCK);
        }
        let steps = (dims / BLOCK).max(PIECES * QUERIES.max(COLUMNS) / BLOCK);
        let words = (columns * BLOCK).max(QUERIES * width) / 2 * PIECES;
        Steps::bytes(steps) + words * size_of::<u32>() + 2 * dims * width.max(BLOCK) * size_of::<f32>()
    }
}

/// Where the tiles along a sum of `along` words begin, each with all pieces of the `f32` operand: the other operand's tile is then
/// loaded once.
fn pieces_of_tiles(along: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..along).step_by(TILE).flat_map(|word| (0..PIECES).rev().map(move |piece| (word, piece)))
}

impl Bf16Matmul {
    pub(super) fn new(amx: Amx) -> Bf16Matmul {
        Bf16Matmul(amx)
    }

    /// `S = Q̂ Ĉᵀ` of at most [`BLOCK`] queries and a tile of `width` candidates. `to` has room for [`BLOCK`] rows.
    #[expect(clippy::too_many_arguments, reason = "the operands of a product")]
    pub(super) fn score(
        &self,
        arch: Arch,
        scratch: &mut Bf16Scratch,
        queries: &Bf16Rows,
        rows: Range<usize>,
        tile: &Bf16Tile,
        width: usize,
        to: &mut [f32],
    ) {
        let words = queries.stride();
        scratch.steps.set((0..words).step_by(TILE).map(|word| Step { a: word, b: word * BLOCK }));
        self.0.start().product(Product {
            m: BLOCK,
            n: width,
            a: queries.words_from(rows.start),
            a_stride: words,
            b: &tile.transposed,
            b_panel: words * BLOCK,
            steps: &scratch.steps,
            to: &mut *to,
            to_stride: width,
            add: false,
        });
        let (query, candidate) = (&queries.factors_from(rows.start)[..rows.len()], &tile.rows.factors_from(0)[..width]);
        arch.dispatch(ScaleScores { sims: to, query, candidate });
    }

    /// Bytes that [`Bf16Matmul::score_pairs`] takes.
    pub(super) fn pair_bytes(dim: usize) -> usize {
        Bf16Scratch::bytes(BLOCK, dim, false) + Bf16Rows::bytes(BLOCK, dim) + Bf16Tile::bytes(BLOCK, dim, false)
    }

    /// The similarities of pairs of a query and a positive, whose rows `at(pair)` returns, as [`Bf16Matmul::score`] computes them.
    pub(super) fn score_pairs(
        &self,
        arch: Arch,
        queries: &Bf16Rows,
        positives: &Bf16Rows,
        at: impl Fn(usize) -> (usize, usize),
        to: &mut [f32],
    ) {
        let (mut scratch, mut rows, mut tile) = (Bf16Scratch::default(), Bf16Rows::default(), Bf16Tile::default());
        rows.resize(BLOCK, queries.dim());
        tile.rows.resize(BLOCK, queries.dim());
        let mut sims = [0.0; BLOCK * BLOCK];
        for (block, to) in to.chunks_mut(BLOCK).enumerate() {
            for pair in 0..to.len() {
                let (query, positive) = at(block * BLOCK + pair);
                rows.copy_row(pair, queries, query);
                tile.rows.copy_row(pair, positives, positive);
            }
            tile.finish(arch, BLOCK, false);
            self.score(arch, &mut scratch, &rows, 0..to.len(), &tile, BLOCK, &mut sims);
            for (pair, to) in to.iter_mut().enumerate() {
                *to = sims[pair * BLOCK + pair];
            }
        }
    }

    /// `to (rows, D) = to · rescale + P Ĉ` of a chunk of probabilities and a tile of `width` candidates; the first tile writes.
    #[expect(clippy::too_many_arguments, reason = "the operands of a product")]
    pub(super) fn add_expected(
        &self,
        arch: Arch,
        scratch: &mut Bf16Scratch,
        probabilities: &[f32],
        tile: &Bf16Tile,
        width: usize,
        rescale: &[f32],
        to: &mut [f32],
        first: bool,
    ) {
        let Bf16Scratch { steps, words, product, .. } = scratch;
        let dims = 2 * words_per_row(tile.rows.dim());
        resize(product, BLOCK * dims);
        let amx = self.0.start();
        for start in (0..width).step_by(COLUMNS) {
            let columns = start..(start + COLUMNS).min(width);
            let along = columns.len() / 2;
            resize(words, BLOCK * PIECES * along);
            arch.dispatch(SplitRows { from: probabilities, width, columns, factors: &tile.relative, to: words });
            let at = |(word, piece)| Step { a: piece * along + word, b: (start / 2 + word) * BLOCK };
            steps.set(pieces_of_tiles(along).map(at));
            amx.product(Product {
                m: BLOCK,
                n: dims,
                a: words,
                a_stride: PIECES * along,
                b: &tile.paired,
                b_panel: width / 2 * BLOCK,
                steps,
                to: product,
                to_stride: dims,
                add: start > 0,
            });
        }
        let (scale, dim) = (tile.scale, tile.rows.dim());
        arch.dispatch(AddProduct { product, product_stride: dims, scale, rescale, to, dim, first });
    }

    /// Takes coefficients of a chunk of queries, before [`Bf16Matmul::gradient`] multiplies those of all chunks of `block`, a block
    /// of at most [`QUERIES`].
    #[expect(clippy::too_many_arguments, reason = "the operands of a product")]
    pub(super) fn take_coefficients(
        &self,
        arch: Arch,
        scratch: &mut Bf16Scratch,
        queries: &Units,
        block: &Range<usize>,
        chunk: Range<usize>,
        from: &[f32],
        width: usize,
    ) {
        let (first, along) = ((chunk.start - block.start) / 2, block.len().div_ceil(BLOCK) * TILE);
        resize(&mut scratch.words, PIECES * along * width);
        let factors = queries.paired().relative_from(chunk.start);
        arch.dispatch(SplitColumns { from, width, factors, to: &mut scratch.words, first, along });
    }

    /// `Q̂ᵀ P` of a block of queries, which begins at a multiple of [`BLOCK`], and a tile of `width` candidates: written to the
    /// scratch, or added to what is there.
    pub(super) fn gradient(
        &self,
        scratch: &mut Bf16Scratch,
        queries: &Units,
        block: &Range<usize>,
        width: usize,
        add: bool,
    ) {
        let Bf16Scratch { steps, words, product, .. } = scratch;
        let (paired, along) = (queries.paired(), block.len().div_ceil(BLOCK) * TILE);
        let dims = paired.dims();
        let at = |(word, piece)| Step { a: word * dims, b: (piece * along + word) * BLOCK };
        steps.set(pieces_of_tiles(along).map(at));
        if !add {
            resize(product, dims * width);
        }
        self.0.start().product(Product {
            m: dims,
            n: width,
            a: paired.words_from(block.start),
            a_stride: TILE,
            b: words,
            b_panel: PIECES * along * BLOCK,
            steps,
            to: product,
            to_stride: width,
            add,
        });
    }

    /// `to (len, D) = [to +] factor · Pᵀ Q̂`, from what [`Bf16Matmul::gradient`] left in the scratch.
    pub(super) fn write_gradient(
        &self,
        arch: Arch,
        scratch: &mut Bf16Scratch,
        queries: &Units,
        width: usize,
        factor: f64,
        to: GradientOut<'_>,
    ) {
        let Bf16Scratch { product, transposed, .. } = scratch;
        let factor = (factor * f64::from(queries.paired().scale())) as f32;
        resize(transposed, product.len());
        arch.dispatch(PackTransposed { from: product, k: width, to: transposed });
        arch.dispatch(AddPanels { panels: transposed, width, factor, to });
    }
}

/// Where gradients of a tile's candidates go.
pub(super) struct GradientOut<'a> {
    /// (len, D)
    pub(super) to: &'a mut [f32],
    pub(super) dim: usize,
    pub(super) add: bool,
}

/// Turns products of rows into similarities.
struct ScaleScores<'a> {
    sims: &'a mut [f32],
    query: &'a [f32],
    candidate: &'a [f32],
}

impl NullaryFnOnce for ScaleScores<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (sims, &query) in self.sims.chunks_exact_mut(self.candidate.len()).zip(self.query) {
            for (sim, &candidate) in sims.iter_mut().zip(self.candidate) {
                // The smaller factor first: so nothing overflows that is finite in the end.
                let (smaller, larger) = if query < candidate { (query, candidate) } else { (candidate, query) };
                *sim = *sim * smaller * larger;
            }
        }
    }
}

/// `to = to · rescale + product · scale` row by row, or `to = product · scale`.
struct AddProduct<'a> {
    product: &'a [f32],
    product_stride: usize,
    /// A power of two.
    scale: f32,
    rescale: &'a [f32],
    to: &'a mut [f32],
    dim: usize,
    first: bool,
}

impl NullaryFnOnce for AddProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.to.chunks_exact_mut(self.dim).zip(self.product.chunks_exact(self.product_stride));
        for ((to, product), &rescale) in rows.zip(self.rescale) {
            for (to, &product) in to.iter_mut().zip(product) {
                *to = product.mul_add(self.scale, if self.first { 0.0 } else { *to * rescale });
            }
        }
    }
}

/// Writes `factor` times panels of [`BLOCK`] elements of each of `width` rows, or adds it.
struct AddPanels<'a> {
    panels: &'a [f32],
    width: usize,
    factor: f32,
    to: GradientOut<'a>,
}

impl NullaryFnOnce for AddPanels<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let GradientOut { to, dim, add } = self.to;
        for (panel, first) in self.panels.chunks_exact(BLOCK * self.width).zip((0..dim).step_by(BLOCK)) {
            for (to, from) in to.chunks_exact_mut(dim).zip(panel.as_chunks::<BLOCK>().0) {
                for (to, &from) in to[first..].iter_mut().zip(from) {
                    *to = self.factor.mul_add(from, if add { *to } else { 0.0 });
                }
            }
        }
    }
}
