//! Vector loops over tiles of scores. Plain loops over fixed-width lanes, compiled for the widest instruction set
//! that the processor has; the lanes fix the order of every sum.

use pulp::NullaryFnOnce;

use crate::problem::positives::Pairs;
use crate::problem::statistics::Partial;

/// Columns that a loop handles at a time; rows of a score tile are padded to a multiple.
pub(super) const LANES: usize = 32;

/// `2^x`, relative error below 1.2e-7 for x from −126 to 127; below −126 a number from 0 to 2^-126, and 0 from −127 on; above
/// 127 it is 2^127. A NaN stays one if it is [`f32::NAN`] or came out of arithmetic: its low bits must be 0.
///
/// Adding 1.5 * 2^23 rounds x to an integer n and leaves n in the low mantissa bits, from where it is added to the
/// exponent of 2^(x − n), a polynomial (minimax of degree 6 on [−1/2, 1/2], relative error 1.9e-9). At −127 the polynomial
/// is exactly 1, and the sum of exponents 0.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -127.0 { -127.0 } else { x };
    let clamped = if clamped > 127.0 { 127.0 } else { clamped };
    let shifted = clamped + ROUND;
    let r = clamped - (shifted - ROUND);
    let mut p = 1.534_581_2e-4f32;
    for c in [1.339_993_1e-3, 9.618_489e-3, 5.550_328_8e-2, 0.240_226_47, std::f32::consts::LN_2, 1.0] {
        p = p.mul_add(r, c);
    }
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// How a raw similarity becomes `z` in units of log 2: `z = sim · scale + bias[column]`.
#[derive(Clone, Copy)]
pub(super) struct Score<'a> {
    /// `gamma · log2(e)`
    pub(super) scale: f32,
    /// `−log_q · log2(e)` per column, padded as the tile's rows are.
    pub(super) bias: &'a [f32],
    /// No `z` of the tile is larger. Infinite where similarities have no bound.
    pub(super) largest: f32,
}

/// The bias of a candidate. Finite, so that the score of an excluded pair, −∞, stays that.
pub(super) fn bias(log_q: f32) -> f32 {
    (-log_q * std::f32::consts::LOG2_E).clamp(f32::MIN, f32::MAX)
}

/// The one definition of `z` on this backend. It is rounded before a shift is subtracted: of scores beyond 2^31 the rounding is
/// larger than the range of `exp2`, so a score and the maximum that it is must be rounded alike.
#[inline(always)]
fn z(sim: f32, scale: f32, bias: f32) -> f32 {
    sim.mul_add(scale, bias)
}

#[inline(always)]
fn lane_chunks<'a>(row: &'a [f32], bias: &'a [f32]) -> impl Iterator<Item = (&'a [f32; LANES], &'a [f32; LANES])> {
    row.as_chunks::<LANES>().0.iter().zip(bias.as_chunks::<LANES>().0)
}

/// Running state of one row of a block over the tiles of a split.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowState {
    /// What is subtracted from `z`, in units of log 2: the largest so far, or less by at most `MOST_HEADROOM`.
    pub(super) max: f32,
    /// `Σ 2^(z − max)`, and the sums of [`Partial`] in its units.
    pub(super) sum: f64,
    pub(super) sum_score: f64,
    pub(super) sum_z: f64,
    pub(super) num_negatives: u64,
}

impl RowState {
    pub(super) const EMPTY: RowState =
        RowState { max: f32::NEG_INFINITY, sum: 0.0, sum_score: 0.0, sum_z: 0.0, num_negatives: 0 };

    /// In natural units. `gamma` turns similarities into scores.
    pub(super) fn partial(&self, gamma: f64) -> Partial {
        use std::f64::consts::LN_2;
        Partial {
            max: f64::from(self.max) * LN_2,
            sum: self.sum,
            sum_score: self.sum_score * gamma,
            sum_z: self.sum_z * LN_2,
            num_negatives: self.num_negatives,
        }
    }
}

/// How far, in units of log 2, a score may lie above the shift of its row: 2^31 summands of 2^64 are far below the largest
/// `f32`.
const MOST_HEADROOM: f32 = 64.0;

/// Moves a row's state to the maximum that it has with this tile. Returns the factor by which everything summed before
/// was scaled. Where no score of the tile can lie far above the shift, that stays, and the scores are not looked at.
#[inline(always)]
fn advance_max(row: &[f32], score: Score<'_>, state: &mut RowState) -> f32 {
    // The difference of a score and the shift is rounded to `f32`. A score of `scale`, a cosine of 1, is rounded by as much.
    if score.largest - state.max <= score.scale.min(MOST_HEADROOM) {
        return 1.0;
    }
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for (sims, bias) in lane_chunks(row, score.bias) {
        for k in 0..LANES {
            let z = z(sims[k], score.scale, bias[k]);
            lanes[k] = if z > lanes[k] { z } else { lanes[k] };
        }
    }
    let max = fold_lanes(lanes, |a, b| if a > b { a } else { b });
    let max = if max > state.max { max } else { state.max };
    // Before any finite score the sums are 0, or NaN, which shall stay.
    let factor = if state.max == f32::NEG_INFINITY { 1.0 } else { exp2(state.max - max) };
    if factor != 1.0 {
        let factor = f64::from(factor);
        state.sum_z = factor * (state.sum_z + f64::from(state.max - max) * state.sum);
        state.sum_score *= factor;
        state.sum *= factor;
    }
    state.max = max;
    factor
}

/// What is subtracted from `z` before exponentiation; −∞ − (−∞) must not arise.
#[inline(always)]
fn shift(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

/// Adds `Σ 2^(z − max)`. With `keep`, the similarities are replaced by the summands.
#[inline(always)]
fn sum_exponentials(row: &mut [f32], score: Score<'_>, state: &mut RowState, keep: bool) {
    let shift = shift(state.max);
    let mut sums = [0.0f32; LANES];
    for (sims, bias) in row.as_chunks_mut::<LANES>().0.iter_mut().zip(score.bias.as_chunks::<LANES>().0) {
        for k in 0..LANES {
            let p = exp2(z(sims[k], score.scale, bias[k]) - shift);
            sums[k] += p;
            if keep {
                sims[k] = p;
            }
        }
    }
    state.sum += sum_lanes(sums);
}

/// The sum of the lanes in one fixed order: two vectors of 16 lanes onto each other, and from there on in `f64`.
#[inline(always)]
fn sum_lanes(lanes: [f32; LANES]) -> f64 {
    let lanes: [f32; WIDE] = halves(lanes, |a, b| a + b);
    sum_wide(std::array::from_fn(|k| f64::from(lanes[k])))
}

/// Lanes of a loop in `f64`.
pub(super) const WIDE: usize = 16;

#[inline(always)]
pub(super) fn sum_wide(lanes: [f64; WIDE]) -> f64 {
    let lanes: [f64; 8] = halves(lanes, |a, b| a + b);
    let lanes: [f64; 4] = halves(lanes, |a, b| a + b);
    let [even, odd] = halves(lanes, |a, b| a + b);
    even + odd
}

/// Folds halves onto each other until one lane is left: short chains, which a processor computes beside the next row.
#[inline(always)]
pub(super) fn fold_lanes<T: Copy>(lanes: [T; LANES], fold: impl Fn(T, T) -> T) -> T {
    let lanes: [T; 16] = halves(lanes, &fold);
    let lanes: [T; 8] = halves(lanes, &fold);
    let lanes: [T; 4] = halves(lanes, &fold);
    let [even, odd] = halves(lanes, &fold);
    fold(even, odd)
}

/// The two halves, lane by lane. Arrays of a fixed length stay in registers.
#[inline(always)]
fn halves<T: Copy, const N: usize, const HALF: usize>(lanes: [T; N], fold: impl Fn(T, T) -> T) -> [T; HALF] {
    std::array::from_fn(|k| fold(lanes[k], lanes[k + HALF]))
}

/// Adds a row's moments.
#[inline(always)]
fn sum_moments(row: &[f32], score: Score<'_>, state: &mut RowState) {
    let shift = shift(state.max);
    let (mut sum_score, mut sum_z) = ([0.0f32; LANES], [0.0f32; LANES]);
    for (sims, bias) in lane_chunks(row, score.bias) {
        for k in 0..LANES {
            let dz = z(sims[k], score.scale, bias[k]) - shift;
            let p = exp2(dz);
            // A masked score is −∞: its probability is 0, and 0 · ∞ must not enter.
            sum_score[k] += if p == 0.0 { 0.0 } else { p * sims[k] };
            sum_z[k] += if p == 0.0 { 0.0 } else { p * dz };
        }
    }
    state.sum_score += sum_lanes(sum_score);
    state.sum_z += sum_lanes(sum_z);
}

/// How many negatives of a row score above one of its positives, and how many score the same.
pub(super) type Place = [u64; 2];

/// Counts the row's negatives against one positive.
#[inline(always)]
fn count_place(row: &[f32], positive: f32, place: &mut Place) {
    let (mut above, mut ties) = ([0u32; LANES], [0u32; LANES]);
    for sims in row.as_chunks::<LANES>().0 {
        for k in 0..LANES {
            above[k] += u32::from(sims[k] > positive);
            ties[k] += u32::from(sims[k] == positive);
        }
    }
    for k in 0..LANES {
        place[0] += u64::from(above[k]);
        place[1] += u64::from(ties[k]);
    }
}

/// The places of the positives of a block of rows.
pub(super) struct Places<'a> {
    pub(super) pairs: Pairs<'a>,
    pub(super) first_row: usize,
    /// Similarity of each positive, from the first row's on.
    pub(super) sims: &'a [f32],
    pub(super) counts: &'a mut [Place],
}

impl Places<'_> {
    #[inline(always)]
    fn count(&mut self, r: usize, row: &[f32]) {
        let first = self.pairs.of_row(self.first_row).start;
        for pair in self.pairs.of_row(self.first_row + r) {
            count_place(row, self.sims[pair - first], &mut self.counts[pair - first]);
        }
    }
}

/// A tile of similarities, row after row, `width` apart (a multiple of [`LANES`]). Masked and padded columns are −∞.
pub(super) struct Tile<'a> {
    pub(super) sims: &'a mut [f32],
    pub(super) width: usize,
}

// Each kernel is a struct whose `call` is compiled for the widest instruction set. A closure would be slow: a shim
// between it and the dispatch is not inlined, so its body would be compiled for the baseline, with `mul_add` as a
// library call.

/// Takes a tile into its rows' states: log-sum-exp, on request moments, and into `places`. With `keep`, the tile holds `2^(z − max)` afterwards, and `keep` the factors of [`advance_max`].
pub(super) struct Statistics<'a> {
    pub(super) tile: Tile<'a>,
    pub(super) score: Score<'a>,
    pub(super) states: &'a mut [RowState],
    pub(super) moments: bool,
    pub(super) places: Option<Places<'a>>,
    pub(super) keep: Option<&'a mut [f32]>,
}

impl NullaryFnOnce for Statistics<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        for (r, (row, state)) in self.tile.sims.chunks_exact_mut(self.tile.width).zip(self.states).enumerate() {
            let factor = advance_max(row, self.score, state);
            if self.moments {
                sum_moments(row, self.score, state);
            }
            if let Some(places) = &mut self.places {
                places.count(r, row);
            }
            match &mut self.keep {
                Some(factors) => {
                    factors[r] = factor;
                    sum_exponentials(row, self.score, state, true);
                }
                None => sum_exponentials(row, self.score, state, false),
            }
        }
    }
}

/// Makes the similarities above each row's bound −∞ and takes them off the row's negatives. A NaN stays.
pub(super) struct Filter<'a> {
    pub(super) tile: Tile<'a>,
    pub(super) bounds: &'a [f32],
    pub(super) states: &'a mut [RowState],
}

impl NullaryFnOnce for Filter<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.tile.sims.chunks_exact_mut(self.tile.width).zip(self.bounds);
        for ((row, &bound), state) in rows.zip(self.states) {
            let mut left_out = [0u32; LANES];
            for sims in row.as_chunks_mut::<LANES>().0 {
                for k in 0..LANES {
                    let above = sims[k] > bound;
                    left_out[k] += u32::from(above);
                    sims[k] = if above { f32::NEG_INFINITY } else { sims[k] };
                }
            }
            state.num_negatives -= left_out.iter().map(|&count| u64::from(count)).sum::<u64>();
        }
    }
}

/// Turns a tile of similarities into coefficients `d_lse · 2^(z − lse)`: 0 where masked or above the row's bound.
///
/// `lse` is in units of log 2. A row whose `d_lse` is 0 has coefficients 0 whatever its scores.
pub(super) struct Coefficients<'a> {
    pub(super) tile: Tile<'a>,
    pub(super) score: Score<'a>,
    pub(super) lse: &'a [f32],
    pub(super) d_lse: &'a [f32],
    pub(super) bounds: Option<&'a [f32]>,
}

impl NullaryFnOnce for Coefficients<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (r, row) in self.tile.sims.chunks_exact_mut(self.tile.width).enumerate() {
            let (lse, d_lse) = (self.lse[r], self.d_lse[r]);
            if d_lse == 0.0 {
                row.fill(0.0);
                continue;
            }
            match self.bounds {
                None => coefficients::<false>(row, self.score, lse, d_lse, f32::INFINITY),
                Some(bounds) => coefficients::<true>(row, self.score, lse, d_lse, bounds[r]),
            }
        }
    }
}

#[inline(always)]
fn coefficients<const FILTERED: bool>(row: &mut [f32], score: Score<'_>, lse: f32, d_lse: f32, bound: f32) {
    for (sims, bias) in row.as_chunks_mut::<LANES>().0.iter_mut().zip(score.bias.as_chunks::<LANES>().0) {
        for k in 0..LANES {
            let coefficient = d_lse * exp2(z(sims[k], score.scale, bias[k]) - lse);
            sims[k] = if FILTERED && sims[k] > bound { 0.0 } else { coefficient };
        }
    }
}

/// The coefficient of one pair of a query and a negative of its own, by the arithmetic of [`Coefficients`].
#[inline(always)]
pub(super) fn coefficient(sim: f32, scale: f32, bias: f32, lse: f32, d_lse: f32, bound: f32) -> f32 {
    if d_lse == 0.0 || sim > bound { 0.0 } else { d_lse * exp2(z(sim, scale, bias) - lse) }
}

/// `a · b` in one fixed order of sums. Both passes score a row's own negatives by it.
#[inline(always)]
pub(super) fn row_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((chunks_a, rest_a), (chunks_b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        for k in 0..LANES {
            lanes[k] = a[k].mul_add(b[k], lanes[k]);
        }
    }
    let mut rest = 0.0f32;
    for (a, b) in rest_a.iter().zip(rest_b) {
        rest = a.mul_add(*b, rest);
    }
    fold_lanes(lanes, |a, b| a + b) + rest
}

/// `to[k] = query · rows[k]`
pub(super) struct Dots<'a> {
    pub(super) query: &'a [f32],
    pub(super) rows: &'a [f32],
    pub(super) to: &'a mut [f32],
}

impl NullaryFnOnce for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (to, row) in self.to.iter_mut().zip(self.rows.chunks_exact(self.query.len())) {
            *to = row_dot(self.query, row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_holds_its_bound_and_its_ends() {
        let mut worst = 0.0f64;
        for i in 0..=2_530_000 {
            let x = -126.0 + i as f32 * 1e-4;
            let exact = f64::from(x).exp2();
            worst = worst.max((f64::from(exp2(x)) / exact - 1.0).abs());
        }
        assert!(worst < 1.2e-7, "{worst}");
        assert_eq!((exp2(0.0), exp2(-127.0), exp2(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!((0..=1000).all(|i| (0.0..=f32::MIN_POSITIVE).contains(&exp2(-126.0 - i as f32 * 1e-2))));
        assert!(exp2(1e9).is_finite() && exp2(f32::NAN).is_nan() && exp2(f32::INFINITY - f32::INFINITY).is_nan());
    }
}
