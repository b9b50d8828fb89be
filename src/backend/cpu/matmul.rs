//! The matmuls of a tile: `to = [to +] factor · a · b`.
//!
//! A block of `to` stays in registers while the sum over k runs. Each step of the sum reads two vectors of `b` and one
//! element of `a` for each row of the block. `b` is copied into panels beforehand, so that these reads follow each other
//! in memory; a tile's panels are used by every block of queries, and the panels of the queries by every tile.
//!
//! Every element of `to` is one chain of fused multiply-adds in the order of k, whatever the shape and the instruction set.
//! So the similarity of a pair is bitwise the same in every tile, and in [`PairDots`], which computes it alone.

use pulp::{NullaryFnOnce, Simd, WithSimd};

use super::kernels::LANES;

/// Columns of a panel: two vectors of the widest instruction set, several pairs of narrower ones.
pub(super) const PANEL: usize = LANES;

/// The operand `b` (k, n): its columns in panels, each of which holds k rows.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    values: &'a [f32],
    /// Elements between two rows of a panel, and between two panels.
    row_stride: usize,
    panel_stride: usize,
    k: usize,
    n: usize,
}

impl<'a> Panels<'a> {
    /// What [`PackTransposed`] wrote of a matrix (n, k), where n is a multiple of [`PANEL`].
    pub(super) fn transposed(values: &'a [f32], n: usize, k: usize) -> Self {
        Panels { values, row_stride: PANEL, panel_stride: k * PANEL, k, n }
    }

    /// Rows `from..from + k` of what [`pack_rows`] wrote of a matrix (rows, n).
    pub(super) fn of_rows(values: &'a [f32], rows: usize, n: usize, from: usize, k: usize) -> Self {
        Panels { values: &values[from * PANEL..], row_stride: PANEL, panel_stride: rows * PANEL, k, n }
    }

    /// A row-major matrix (k, n) as it is, with at least [`PANEL`] elements behind it.
    pub(super) fn in_place(values: &'a [f32], k: usize, n: usize) -> Self {
        Panels { values, row_stride: n, panel_stride: PANEL, k, n }
    }

    /// Whether every row of every panel lies within the values.
    fn is_within(&self) -> bool {
        let last_panel = (self.n.div_ceil(PANEL) - 1) * self.panel_stride;
        self.values.len() >= last_panel + (self.k - 1) * self.row_stride + PANEL
    }
}

/// Elements that [`pack_rows`] writes of a matrix (rows, n).
pub(super) fn packed_len(rows: usize, n: usize) -> usize {
    rows * n.next_multiple_of(PANEL)
}

/// Copies a row-major matrix (rows, n) into panels: `to` holds columns `0..PANEL` of each row, then the next columns of
/// each row, and so on. The last panel is filled with zeros.
pub(super) fn pack_rows(from: &[f32], n: usize, to: &mut [f32]) {
    let rows = from.len() / n;
    for (p, panel) in to.chunks_exact_mut(rows * PANEL).enumerate() {
        pack_panel(from, n, p, panel);
    }
}

/// Panel `p` of [`pack_rows`].
pub(super) fn pack_panel(from: &[f32], n: usize, p: usize, panel: &mut [f32]) {
    let columns = p * PANEL..((p + 1) * PANEL).min(n);
    for (from, to) in from.chunks_exact(n).zip(panel.as_chunks_mut::<PANEL>().0) {
        let from = &from[columns.clone()];
        match from.first_chunk::<PANEL>() {
            Some(from) => *to = *from,
            None => {
                to[..from.len()].copy_from_slice(from);
                to[from.len()..].fill(0.0);
            }
        }
    }
}

/// Copies the transpose of a row-major matrix (n, k) into panels of its n columns, where n is a multiple of [`PANEL`].
pub(super) struct PackTransposed<'a> {
    pub(super) from: &'a [f32],
    pub(super) k: usize,
    /// (n · k)
    pub(super) to: &'a mut [f32],
}

/// Rows and columns that are transposed at a time, by shuffles of vectors.
const SQUARE: usize = 4;

impl NullaryFnOnce for PackTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let k = self.k;
        for (rows, panel) in self.from.chunks_exact(PANEL * k).zip(self.to.chunks_exact_mut(PANEL * k)) {
            let mut squares = panel.chunks_exact_mut(SQUARE * PANEL);
            let mut first = 0;
            for to in &mut squares {
                for (j, rows) in rows.chunks_exact(SQUARE * k).enumerate() {
                    let square: [[f32; SQUARE]; SQUARE] =
                        std::array::from_fn(|row| std::array::from_fn(|i| rows[row * k + first + i]));
                    for i in 0..SQUARE {
                        let column: [f32; SQUARE] = std::array::from_fn(|row| square[row][i]);
                        to[i * PANEL + j * SQUARE..][..SQUARE].copy_from_slice(&column);
                    }
                }
                first += SQUARE;
            }
            for (i, to) in squares.into_remainder().chunks_exact_mut(PANEL).enumerate() {
                for (to, row) in to.iter_mut().zip(rows.chunks_exact(k)) {
                    *to = row[first + i];
                }
            }
        }
    }
}

/// `to (m, n) = [to +] factor · a (m, k) · b (k, n)`
pub(super) struct Product<'a> {
    pub(super) m: usize,
    pub(super) a: &'a [f32],
    /// Elements between two rows of `a`, and between two columns.
    pub(super) a_strides: [usize; 2],
    pub(super) b: Panels<'a>,
    pub(super) to: &'a mut [f32],
    /// Elements between two rows of `to`.
    pub(super) to_stride: usize,
    /// Whether the product is added to what `to` holds.
    pub(super) add: bool,
    pub(super) factor: f32,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Panels { k, n, .. } = self.b;
        if self.m == 0 || n == 0 || k == 0 {
            return;
        }
        let a_len = (self.m - 1) * self.a_strides[0] + (k - 1) * self.a_strides[1] + 1;
        assert!(self.a.len() >= a_len && self.b.is_within() && self.to_stride >= n);
        assert!(self.to.len() >= (self.m - 1) * self.to_stride + n);
        let (pair, four) = (2 * S::F32_LANES, 4 * S::F32_LANES);
        assert!(PANEL.is_multiple_of(pair));
        // A single row has no other rows whose sums could run meanwhile, so it takes more columns at a time, where columns
        // of different panels follow each other.
        let wide = if self.m == 1 && self.b.panel_stride == PANEL { n / four * four } else { 0 };
        (0..wide).step_by(four).for_each(|column| self.block::<S, 1, 4>(simd, 0, column));
        for column in (wide..n).step_by(pair) {
            self.rows(simd, column);
        }
    }
}

/// Rows of a block, where 32 registers hold it.
const MOST_ROWS: usize = 12;

impl Product<'_> {
    /// All rows of two vectors of columns: as many rows at a time as there are registers for, then fewer.
    #[inline(always)]
    fn rows<S: Simd>(&mut self, simd: S, column: usize) {
        let mut row = 0;
        if S::REGISTER_COUNT >= 32 {
            while row + MOST_ROWS <= self.m {
                self.block::<S, MOST_ROWS, 2>(simd, row, column);
                row += MOST_ROWS;
            }
            while row + 8 <= self.m {
                self.block::<S, 8, 2>(simd, row, column);
                row += 8;
            }
        } else {
            while row + 5 <= self.m {
                self.block::<S, 5, 2>(simd, row, column);
                row += 5;
            }
        }
        while row + 4 <= self.m {
            self.block::<S, 4, 2>(simd, row, column);
            row += 4;
        }
        while row < self.m {
            self.block::<S, 1, 2>(simd, row, column);
            row += 1;
        }
    }

    /// M rows by V vectors.
    #[expect(clippy::needless_range_loop, reason = "loops over constant ranges keep the sums in registers")]
    #[inline(always)]
    fn block<S: Simd, const M: usize, const V: usize>(&mut self, simd: S, row: usize, column: usize) {
        let [a_row, a_k] = self.a_strides;
        let at = column / PANEL * self.b.panel_stride + column % PANEL;
        let mut sums = [[simd.splat_f32s(0.0); V]; M];
        // SAFETY: `with_simd` has asserted that each row of `a` holds k elements and each panel of `b` k rows of PANEL
        // elements. The vectors read lie within one panel, or, where `b` is in place, within its rows and what is behind.
        unsafe {
            let a = self.a.as_ptr().add(row * a_row);
            let b = self.b.values.as_ptr().add(at);
            for k in 0..self.b.k {
                let (a, b) = (a.add(k * a_k), b.add(k * self.b.row_stride));
                let mut columns = [simd.splat_f32s(0.0); V];
                for v in 0..V {
                    columns[v] = b.add(v * S::F32_LANES).cast::<S::f32s>().read_unaligned();
                }
                for i in 0..M {
                    let element = simd.splat_f32s(*a.add(i * a_row));
                    for v in 0..V {
                        sums[i][v] = simd.mul_add_f32s(element, columns[v], sums[i][v]);
                    }
                }
            }
        }
        let width = V * S::F32_LANES;
        if column + width <= self.b.n {
            let to = self.to[row * self.to_stride + column..].as_mut_ptr();
            // SAFETY: the assertions of `with_simd` give `to` all rows of n columns.
            unsafe { store(simd, sums, self.factor, to, self.to_stride, self.add) };
            return;
        }
        // The last columns, by way of a whole block.
        let mut whole = [0.0f32; MOST_ROWS * PANEL];
        let columns = self.b.n - column;
        let to = &mut self.to[row * self.to_stride + column..];
        for i in 0..M {
            whole[i * width..][..columns].copy_from_slice(&to[i * self.to_stride..][..columns]);
        }
        // SAFETY: MOST_ROWS rows of a panel's width hold a block.
        unsafe { store(simd, sums, self.factor, whole.as_mut_ptr(), width, self.add) };
        for i in 0..M {
            to[i * self.to_stride..][..columns].copy_from_slice(&whole[i * width..][..columns]);
        }
    }
}

/// Writes `factor` times the sums, or adds it to what is there.
///
/// # Safety
/// `to` must hold M rows of V vectors, `stride` elements apart.
#[expect(clippy::needless_range_loop, reason = "loops over constant ranges keep the sums in registers")]
#[inline(always)]
unsafe fn store<S: Simd, const M: usize, const V: usize>(
    simd: S,
    sums: [[S::f32s; V]; M],
    factor: f32,
    to: *mut f32,
    stride: usize,
    add: bool,
) {
    let (factor, zero) = (simd.splat_f32s(factor), simd.splat_f32s(0.0));
    for i in 0..M {
        for v in 0..V {
            // SAFETY: the caller's contract.
            unsafe {
                let to = to.add(i * stride + v * S::F32_LANES).cast::<S::f32s>();
                let before = if add { to.read_unaligned() } else { zero };
                to.write_unaligned(simd.mul_add_f32s(factor, sums[i][v], before));
            }
        }
    }
}

/// `to[p] = queries[rows[p]] · positives[p]`, by the chain of multiply-adds that [`Product`] has for the same pair.
pub(super) struct PairDots<'a> {
    /// (B, D) and (P, D)
    pub(super) queries: &'a [f32],
    pub(super) positives: &'a [f32],
    pub(super) rows: &'a [u32],
    pub(super) dim: usize,
    pub(super) to: &'a mut [f32],
}

/// Pairs whose chains run beside each other, since each step of a chain waits for the one before.
const CHAINS: usize = 8;

impl NullaryFnOnce for PairDots<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let dim = self.dim;
        for (p, to) in self.to.chunks_mut(CHAINS).enumerate() {
            // The last group takes a pair several times, and keeps one result of it.
            let pair = |i: usize| p * CHAINS + i.min(to.len() - 1);
            let positives: [&[f32]; CHAINS] =
                std::array::from_fn(|i| &self.positives[pair(i) * dim..(pair(i) + 1) * dim]);
            let queries: [&[f32]; CHAINS] = std::array::from_fn(|i| {
                let row = self.rows[pair(i)] as usize;
                &self.queries[row * dim..(row + 1) * dim]
            });
            let mut sums = [0.0f32; CHAINS];
            for k in 0..dim {
                for i in 0..CHAINS {
                    sums[i] = queries[i][k].mul_add(positives[i][k], sums[i]);
                }
            }
            to.copy_from_slice(&sums[..to.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Arch;

    use super::*;

    /// Every instruction set that this processor has.
    fn archs() -> Vec<Arch> {
        let mut archs = vec![Arch::Scalar, Arch::new()];
        #[cfg(target_arch = "x86_64")]
        archs.extend(pulp::x86::V3::try_new().map(Arch::V3));
        archs
    }

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.37 + seed).sin() * 3.0).collect()
    }

    /// The chain of multiply-adds that defines every element.
    fn chain(k: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> f32 {
        (0..k).fold(0.0, |sum, k| a(k).mul_add(b(k), sum))
    }

    #[test]
    fn products_are_chains_bit_for_bit_in_every_shape_and_instruction_set() {
        let widths = [1, PANEL - 1, PANEL, PANEL + 1, 3 * PANEL + 5];
        for (m, n, k) in (1..=2 * MOST_ROWS + 5).flat_map(|m| widths.map(|n| (m, n, 1 + (m * n) % 70))) {
            let (a, b) = (numbers(m * k, 1.0), numbers(k * n, 2.0));
            let mut packed = vec![f32::NAN; packed_len(k, n)];
            pack_rows(&b, n, &mut packed);
            let behind = [b.as_slice(), &[f32::NAN; PANEL]].concat();
            for arch in archs() {
                for b_panels in [Panels::of_rows(&packed, k, n, 0, k), Panels::in_place(&behind, k, n)] {
                    for (a_strides, add) in [([k, 1], false), ([1, m], true)] {
                        let mut to = numbers(m * (n + 3), 3.0);
                        let before = to.clone();
                        let (b_panels, factor) = (b_panels, 0.5);
                        let to_stride = n + 3;
                        arch.dispatch(Product {
                            m,
                            a: &a,
                            a_strides,
                            b: b_panels,
                            to: &mut to,
                            to_stride,
                            add,
                            factor,
                        });
                        for (at, (&to, &before)) in to.iter().zip(&before).enumerate() {
                            let (row, column) = (at / to_stride, at % to_stride);
                            let of_a = |k: usize| a[row * a_strides[0] + k * a_strides[1]];
                            let sum = chain(k, of_a, |k| b[k * n + column.min(n - 1)]);
                            let expected = match column < n {
                                true => 0.5f32.mul_add(sum, if add { before } else { 0.0 }),
                                false => before,
                            };
                            assert_eq!(to.to_bits(), expected.to_bits(), "{m} x {n} x {k}, {row}, {column}, {arch:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_pair_alone_has_the_similarity_that_it_has_in_a_tile() {
        for dim in [1, 3, 4, 63, 130] {
            let (queries, positives) = (numbers(20 * dim, 1.0), numbers(PANEL * dim, 2.0));
            let rows: Vec<u32> = (0..PANEL as u32).map(|p| p * 7 % 20).collect();
            for arch in archs() {
                let mut transposed = vec![f32::NAN; PANEL * dim];
                arch.dispatch(PackTransposed { from: &positives, k: dim, to: &mut transposed });
                let (mut tile, mut alone) = (vec![0.0; 20 * PANEL], vec![0.0; PANEL - 1]);
                let b = Panels::transposed(&transposed, PANEL, dim);
                let (a_strides, to_stride) = ([dim, 1], PANEL);
                let to = &mut tile;
                arch.dispatch(Product { m: 20, a: &queries, a_strides, b, to, to_stride, add: false, factor: 1.0 });
                let rows = &rows[..PANEL - 1];
                arch.dispatch(PairDots { queries: &queries, positives: &positives, rows, dim, to: &mut alone });
                for (p, (&row, &alone)) in rows.iter().zip(&alone).enumerate() {
                    assert_eq!(
                        alone.to_bits(),
                        tile[row as usize * PANEL + p].to_bits(),
                        "D {dim}, pair {p}, {arch:?}"
                    );
                }
            }
        }
    }
}
