//! The best K of each row of a block: a threshold that filters, a buffer that fills, a selection that empties it.
//!
//! Scores and indices are one integer key, so that the order is total: the best K are one set, however they are found.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::kernels::{LANES, Tile};

/// A score above an inverted index: the larger key is the larger score, or the smaller index of equal scores. 0 is the
/// key of no candidate.
pub(super) type Key = u64;

const SIGN: u32 = 1 << 31;

#[inline(always)]
fn key(score: f32, index: u32) -> Key {
    // −0 + 0 is 0: the two are equal, so their keys must be.
    let bits = (score + 0.0).to_bits();
    let ordered = if bits & SIGN == 0 { bits | SIGN } else { !bits };
    u64::from(ordered) << 32 | u64::from(!index)
}

/// The score of a key.
pub(super) fn score(key: Key) -> f32 {
    let ordered = (key >> 32) as u32;
    f32::from_bits(if ordered & SIGN == 0 { !ordered } else { ordered & !SIGN })
}

/// The index of a key.
pub(super) fn index(key: Key) -> u32 {
    !(key as u32)
}

/// Moves the `k` largest keys, or all where there are fewer, to the front. Returns how many.
pub(super) fn keep_largest(keys: &mut [Key], k: usize) -> usize {
    if keys.len() > k {
        keys.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    }
    keys.len().min(k)
}

/// What a block's rows have found in a split so far.
#[derive(Debug, Default)]
pub(super) struct Best {
    /// Buffers of `2 k` keys, row after row.
    keys: Vec<Key>,
    rows: Vec<BestOfRow>,
    k: usize,
}

#[derive(Debug, Clone, Copy)]
struct BestOfRow {
    /// Keys in the row's buffer.
    len: usize,
    /// The k-th best score of those seen when the buffer was last full; −∞ before. Candidates come in the order of
    /// their indices, so one that scores no more has k better ones before it. It may rise while a chunk's survivors are
    /// pushed; survivors below the new threshold do no harm.
    threshold: f32,
}

impl Best {
    /// Empties the buffers of `rows` rows.
    pub(super) fn clear(&mut self, rows: usize, k: usize) {
        super::resize(&mut self.keys, rows * 2 * k);
        self.rows.clear();
        self.rows.resize(rows, BestOfRow { len: 0, threshold: f32::NEG_INFINITY });
        self.k = k;
    }

    /// The buffers of some rows.
    pub(super) fn rows(&mut self, rows: Range<usize>) -> BestOfRows<'_> {
        let keys = &mut self.keys[rows.start * 2 * self.k..rows.end * 2 * self.k];
        BestOfRows { keys, rows: &mut self.rows[rows], k: self.k }
    }

    /// Writes each row's best `k` keys, in no order; 0 where there are fewer.
    pub(super) fn write(&mut self, to: &mut [Key]) {
        let buffers = self.keys.chunks_exact_mut(2 * self.k);
        for ((row, keys), to) in self.rows.iter().zip(buffers).zip(to.chunks_exact_mut(self.k)) {
            let len = keep_largest(&mut keys[..row.len], self.k);
            to[..len].copy_from_slice(&keys[..len]);
            to[len..].fill(0);
        }
    }

    pub(super) fn bytes(rows: usize, k: usize) -> usize {
        rows * (2 * k * size_of::<Key>() + size_of::<BestOfRow>())
    }
}

/// The buffers of some rows of a block.
pub(super) struct BestOfRows<'a> {
    keys: &'a mut [Key],
    rows: &'a mut [BestOfRow],
    k: usize,
}

/// Takes a tile of similarities into its rows' buffers. `first` is the index of the tile's first candidate.
pub(super) struct Collect<'a> {
    pub(super) tile: Tile<'a>,
    pub(super) first: u32,
    pub(super) best: BestOfRows<'a>,
}

impl WithSimd for Collect<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let BestOfRows { keys, rows, k } = self.best;
        let buffers = keys.chunks_exact_mut(2 * k);
        for ((sims, row), keys) in self.tile.sims.chunks_exact(self.tile.width).zip(rows).zip(buffers) {
            if !any_above(simd, sims, row.threshold) {
                continue;
            }
            for (chunk, lanes) in sims.as_chunks::<LANES>().0.iter().enumerate() {
                let first = self.first + (chunk * LANES) as u32;
                let mut above = lanes_above(lanes, row.threshold);
                while above != 0 {
                    let lane = above.trailing_zeros();
                    row.push(keys, key(lanes[lane as usize], first + lane), k);
                    above &= above - 1;
                }
            }
        }
    }
}

impl BestOfRow {
    #[inline(always)]
    fn push(&mut self, keys: &mut [Key], key: Key, k: usize) {
        keys[self.len] = key;
        self.len += 1;
        if self.len == keys.len() {
            self.len = keep_largest(keys, k);
            self.threshold = score(keys[k - 1]);
        }
    }
}

/// Bit by bit, which lanes are above a threshold: not NaN, and not −∞, as masked pairs and the padding are.
#[inline(always)]
fn lanes_above(lanes: &[f32; LANES], threshold: f32) -> u32 {
    let mut above = 0;
    for (lane, &sim) in lanes.iter().enumerate() {
        above |= u32::from(sim > threshold) << lane;
    }
    above
}

/// Whether any score is above a threshold. In most rows of most tiles none is, so this test is the cost of a search
/// beside its matmul.
#[inline(always)]
fn any_above<S: Simd>(simd: S, sims: &[f32], threshold: f32) -> bool {
    // A multiple of LANES, and so of the vectors' lanes: nothing is left over.
    let (vectors, _) = S::as_simd_f32s(sims);
    let threshold = simd.splat_f32s(threshold);
    let mut any = simd.greater_than_f32s(threshold, threshold);
    for &sims in vectors {
        any = simd.or_m32s(any, simd.greater_than_f32s(sims, threshold));
    }
    simd.first_true_m32s(any) < S::F32_LANES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_scores_and_then_indices() {
        let scores = [f32::INFINITY, 3.5, 1e-40, 0.0, -1e-40, -2.0, f32::MIN];
        for pair in scores.windows(2) {
            assert!(key(pair[0], 9) > key(pair[1], 0), "{pair:?}");
        }
        for s in scores {
            assert!(key(s, 4) > key(s, 5) && key(s, u32::MAX - 1) > 0);
            assert_eq!((score(key(s, 7)).to_bits(), index(key(s, 7))), (s.to_bits(), 7));
        }
        assert_eq!(key(-0.0, 3), key(0.0, 3));
    }
}
