//! Stochastic rounding to f16 and bf16, by random bits that are a function of (seed, step, row, column).
//!
//! A value between two neighbours of a type is rounded up with the probability `(value − lower) / (upper − lower)`, so
//! its expectation is the value itself, and steps much smaller than the distance of the neighbours still add up (Gupta
//! et al., "Deep Learning with Limited Numerical Precision", ICML 2015, section 3.1).
//!
//! The bits are those of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
//! 2014), whose n-th output is a function of its start and of n alone, so it needs no state:
//!
//! ```text
//! start(step, row) = mix(mix(mix(seed) ^ step) + row)
//! bits(column)     = word column % 2 (the low one first) of mix(start + (column / 2 + 1) γ)      32 bits
//! ```
//!
//! with [`mix`], the finaliser of SplitMix64, and γ its increment. Threads, order, stride and dim have no influence.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::hash::mix;
use crate::problem::embeddings::Real;

/// The increment of SplitMix64: 2^64 over the golden ratio, made odd.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The random bits of one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepBits(u64);

impl StepBits {
    pub(super) fn new(seed: u64, step: u64) -> Self {
        StepBits(mix(mix(seed) ^ step))
    }

    pub(super) fn row(self, row: usize) -> RowBits {
        RowBits(mix(self.0.wrapping_add(row as u64)))
    }
}

/// The random bits of one row in one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowBits(u64);

impl RowBits {
    /// Of columns `2 pair` and `2 pair + 1`.
    #[inline]
    pub(super) fn of_pair(self, pair: usize) -> [u32; 2] {
        let word = mix(self.0.wrapping_add((pair as u64 + 1).wrapping_mul(GAMMA)));
        [word as u32, (word >> 32) as u32]
    }
}

/// Columns that are wide at a time, on the stack; an even number.
pub(super) const COLUMNS: usize = 64;

/// An element type narrower than f32.
pub(super) trait Half: Copy {
    fn widen(from: &[Self], to: &mut [f32]);

    /// Rounds to nearest, ties to even.
    fn narrow(from: &[f32], to: &mut [Self]);

    /// One of the two neighbours of `x` in this type, by 32 random bits; `x` itself where this type has it. Infinity is
    /// the neighbour above the largest number.
    fn neighbour(x: f32, random: u32) -> f32;

    /// [`neighbour`](Half::neighbour) of at most [`COLUMNS`] of the row's elements, from column `first` on, which is
    /// even.
    fn round(from: &mut [f32], to: &mut [Self], random: RowBits, first: usize) {
        // Bits first, so that the second loop is one of vectors.
        let mut bits = [0; COLUMNS];
        for (pair, bits) in (first / 2..).zip(bits[..from.len().next_multiple_of(2)].as_chunks_mut().0) {
            *bits = random.of_pair(pair);
        }
        for (x, random) in from.iter_mut().zip(bits) {
            *x = Self::neighbour(*x, random);
        }
        Self::narrow(from, to);
    }
}

impl Half for bf16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        f32::widen_bf16(from, to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    #[inline]
    fn neighbour(x: f32, random: u32) -> f32 {
        // The exponents are those of f32.
        if x.is_finite() { carry(x, random, 16) } else { x }
    }
}

impl Half for f16 {
    fn widen(from: &[Self], to: &mut [f32]) {
        f32::widen_f16(from, to);
    }

    fn narrow(from: &[f32], to: &mut [Self]) {
        to.convert_from_f32_slice(from);
    }

    #[inline]
    fn neighbour(x: f32, random: u32) -> f32 {
        const LEAST_NORMAL: f32 = 1.0 / (1 << 14) as f32;
        const SPACING_BELOW: f64 = 1.0 / (1 << 24) as f64;
        if !x.is_finite() {
            return x;
        }
        if x.abs() >= LEAST_NORMAL {
            return carry(x, random, 13);
        }
        // Subnormal numbers are equally spaced. All of this is exact, except that the probability is a multiple of
        // 2^-32: numbers below 2^-56 always become 0.
        let places = f64::from(x.abs()) / SPACING_BELOW;
        let lower = places.floor();
        let up = f64::from(random) < ((places - lower) * (1u64 << 32) as f64).floor();
        (((lower + f64::from(u8::from(up))) * SPACING_BELOW) as f32).copysign(x)
    }
}

/// Adds a random number to the lowest `dropped` bits and clears them: they carry with the probability of their share,
/// and towards the same side for both signs.
#[inline]
fn carry(x: f32, random: u32, dropped: u32) -> f32 {
    let mask = (1u32 << dropped) - 1;
    f32::from_bits((x.to_bits() + (random & mask)) & !mask)
}
