//! Vector loops over rows of D elements, compiled as those of `kernels.rs` are.

use pulp::NullaryFnOnce;

use super::kernels::{LANES, WIDE, fold_lanes, sum_wide};
use super::words::Bf16RowsMut;
use crate::problem::loss::Similarity;

/// `to += factor · x`
#[inline(always)]
pub(super) fn add_scaled(to: &mut [f32], factor: f32, x: &[f32]) {
    for (to, &x) in to.iter_mut().zip(x) {
        *to = factor.mul_add(x, *to);
    }
}

/// `row *= factor`
pub(super) fn scale_row(row: &mut [f32], factor: f32) {
    row.iter_mut().for_each(|x| *x *= factor);
}

/// Dot product in f64 lanes.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; WIDE];
    let ((chunks_a, rest_a), (chunks_b, rest_b)) = (a.as_chunks::<WIDE>(), b.as_chunks::<WIDE>());
    for (a, b) in chunks_a.iter().zip(chunks_b) {
        for k in 0..WIDE {
            lanes[k] = f64::from(a[k]).mul_add(f64::from(b[k]), lanes[k]);
        }
    }
    let mut sum = 0.0;
    for k in 0..rest_a.len() {
        sum += f64::from(rest_a[k]) * f64::from(rest_b[k]);
    }
    sum + sum_wide(lanes)
}

/// 0 if all elements are finite, otherwise NaN.
#[inline(always)]
fn nan_unless_finite(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for x in chunks {
        for k in 0..LANES {
            lanes[k] = x[k].mul_add(0.0, lanes[k]);
        }
    }
    fold_lanes(lanes, |a, b| a + b) + rest.iter().map(|x| x * 0.0).sum::<f32>()
}

/// Under cosine, scales each row of `x` to unit length and writes 1 / length; a row that is too short becomes 0, as does
/// its inverse. Under dot, rows stay and 1 is written. In f64, so that no length overflows or loses bits on its way.
///
/// A row with a NaN or ∞ becomes 0, and its inverse NaN. All of its scores are then NaN. But where the row is
/// multiplied by 0, as in a masked pair, the product is 0 and not NaN.
pub(super) struct Normalize<'a> {
    pub(super) x: &'a mut [f32],
    pub(super) dim: usize,
    pub(super) similarity: Similarity,
    pub(super) inverse_norm: &'a mut [f64],
    /// The rows before they are scaled, for the matrix unit.
    pub(super) bf16: Option<Bf16RowsMut<'a>>,
    /// Whether `x` is needed afterwards.
    pub(super) keep: bool,
}

impl NullaryFnOnce for Normalize<'_> {
    type Output = ();

    #[inline(always)]
    fn call(mut self) {
        for (r, (row, inverse)) in self.x.chunks_exact_mut(self.dim).zip(self.inverse_norm).enumerate() {
            // No sum of squares of single precision overflows f64, so the two tests for finite rows are the same.
            let norm = match self.similarity {
                Similarity::Dot if self.bf16.is_none() => f64::from(nan_unless_finite(row)),
                Similarity::Cosine | Similarity::Dot => dot(row, row).sqrt(),
            };
            if !norm.is_finite() {
                *inverse = f64::NAN;
                row.fill(0.0);
            } else if self.similarity == Similarity::Dot {
                *inverse = 1.0;
            } else {
                *inverse = if norm < Similarity::MIN_NORM { 0.0 } else { 1.0 / norm };
            }
            if let Some(bf16) = &mut self.bf16 {
                bf16.write(r, row, norm, *inverse);
            }
            if self.keep && self.similarity == Similarity::Cosine && norm.is_finite() {
                for x in row {
                    *x = (f64::from(*x) * *inverse) as f32;
                }
            }
        }
    }
}

/// The cosine's chain rule on each row: `d ← (d − x̂ (x̂·d)) / |x|`.
pub(super) struct ChainRule<'a> {
    pub(super) d: &'a mut [f32],
    pub(super) unit: &'a [f32],
    pub(super) dim: usize,
    pub(super) inverse_norm: &'a [f64],
}

impl NullaryFnOnce for ChainRule<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.d.chunks_exact_mut(self.dim).zip(self.unit.chunks_exact(self.dim));
        for ((d, unit), &inverse) in rows.zip(self.inverse_norm) {
            let along = dot(unit, d);
            for (d, unit) in d.iter_mut().zip(unit) {
                *d = ((f64::from(*d) - f64::from(*unit) * along) * inverse) as f32;
            }
        }
    }
}

/// One row's expected negatives from those of its parts, each with its factor: `o = share · Σ factor · part`, or 0 where
/// `share` is 0.
pub(super) struct MergeExpected<'a, P> {
    pub(super) parts: P,
    pub(super) share: f64,
    pub(super) sum: &'a mut [f64],
    pub(super) o: &'a mut [f32],
}

impl<'p, P: Iterator<Item = (f64, &'p [f32])>> NullaryFnOnce for MergeExpected<'_, P> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.sum.fill(0.0);
        for (factor, part) in self.parts {
            for (sum, &part) in self.sum.iter_mut().zip(part) {
                *sum += factor * f64::from(part);
            }
        }
        for (o, &sum) in self.o.iter_mut().zip(&*self.sum) {
            *o = if self.share == 0.0 { 0.0 } else { (sum * self.share) as f32 };
        }
    }
}

/// `to = [to +] d · x`, and 0 where d is 0: a row without weight is absent, whatever its values.
pub(super) struct Times<'a> {
    pub(super) d: f64,
    pub(super) x: &'a [f32],
    pub(super) to: &'a mut [f64],
    pub(super) add: bool,
}

impl NullaryFnOnce for Times<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        if !self.add {
            self.to.fill(0.0);
        }
        if self.d != 0.0 {
            for (to, &x) in self.to.iter_mut().zip(self.x) {
                *to += self.d * f64::from(x);
            }
        }
    }
}

/// `a · b` in `f64`.
pub(super) struct WideDot<'a> {
    pub(super) a: &'a [f32],
    pub(super) b: &'a [f32],
}

impl NullaryFnOnce for WideDot<'_> {
    type Output = f64;

    #[inline(always)]
    fn call(self) -> f64 {
        dot(self.a, self.b)
    }
}
