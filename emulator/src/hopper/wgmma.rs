//! wgmma arithmetic for one warp: 16 of the 64 rows of D, since no warp needs another's registers.
use super::descriptor::{Descriptor, Major};
use super::numbers::*;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

impl Input {
    pub fn bytes(self) -> u32 {
        match self {
            Input::F16 | Input::Bf16 => 2,
            Input::Tf32 => 4,
            _ => 1,
        }
    }

    /// K of one instruction: always 32 bytes.
    pub fn k(self) -> usize {
        32 / self.bytes() as usize
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulator {
    F32,
    F16,
    S32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mma {
    pub n: usize,
    pub a: Input,
    pub b: Input,
    pub d: Accumulator,
    pub major_a: Major,
    pub major_b: Major,
    pub negate_a: bool,
    pub negate_b: bool,
    pub saturate: bool,
}

impl Mma {
    pub fn k(&self) -> usize {
        self.a.k()
    }

    /// 32-bit registers per thread of the accumulator fragment.
    pub fn d_registers(&self) -> usize {
        if self.d == Accumulator::F16 { self.n / 4 } else { self.n / 2 }
    }
}

/// Widens 16 bytes of shared or register memory into f32.
fn widen(kind: Input, unit: &[u8], out: &mut [f32]) {
    match kind {
        Input::Bf16 => {
            for (o, p) in out.iter_mut().zip(unit.chunks_exact(2)) {
                *o = bf16_to_f32(u16::from_le_bytes([p[0], p[1]]));
            }
        }
        Input::F16 => {
            for (o, p) in out.iter_mut().zip(unit.chunks_exact(2)) {
                *o = f16_to_f32(u16::from_le_bytes([p[0], p[1]]));
            }
        }
        Input::Tf32 => {
            for (o, p) in out.iter_mut().zip(unit.chunks_exact(4)) {
                *o = tf32_to_f32(u32::from_le_bytes([p[0], p[1], p[2], p[3]]));
            }
        }
        Input::E4m3 => out.iter_mut().zip(unit).for_each(|(o, &b)| *o = e4m3_to_f32(b)),
        Input::E5m2 => out.iter_mut().zip(unit).for_each(|(o, &b)| *o = e5m2_to_f32(b)),
        Input::S8 => out.iter_mut().zip(unit).for_each(|(o, &b)| *o = b as i8 as f32),
        Input::U8 => out.iter_mut().zip(unit).for_each(|(o, &b)| *o = b as f32),
    }
}

/// Gives the 16 bytes at a shared window offset; an error is a fault.
pub type ReadUnit<'a> = dyn FnMut(u32) -> Result<[u8; 16], String> + 'a;

/// Rows `rows` of the matrix (its M or N index) as `out[k][row]` if `k_outer`, else `out[row][k]`.
fn read_matrix(
    kind: Input,
    descriptor: &Descriptor,
    major: Major,
    rows: std::ops::Range<usize>,
    k_outer: bool,
    read: &mut ReadUnit,
    out: &mut [f32],
) -> Result<(), String> {
    let k = kind.k();
    let per_unit = 16 / kind.bytes() as usize;
    let count = rows.len();
    let mut wide = [0f32; 16];
    let at = |row: usize, kk: usize| if k_outer { kk * count + row } else { row * k + kk };
    match major {
        Major::K => {
            for row in rows.clone() {
                for unit in 0..2 {
                    widen(kind, &read(descriptor.k_major_unit(row as u32, unit))?, &mut wide);
                    for (i, &value) in wide[..per_unit].iter().enumerate() {
                        out[at(row - rows.start, unit as usize * per_unit + i)] = value;
                    }
                }
            }
        }
        Major::Mn => {
            for kk in 0..k {
                for unit in rows.start / per_unit..rows.end.div_ceil(per_unit) {
                    widen(kind, &read(descriptor.mn_major_unit(unit as u32, kk as u32))?, &mut wide);
                    for (i, &value) in wide[..per_unit].iter().enumerate() {
                        out[at(unit * per_unit + i - rows.start, kk)] = value;
                    }
                }
            }
        }
    }
    Ok(())
}

/// The warp's 16 rows of A from shared memory, as `out[row][k]`.
pub fn a_from_shared(
    mma: &Mma,
    warp: usize,
    d: &Descriptor,
    read: &mut ReadUnit,
    out: &mut [f32],
) -> Result<(), String> {
    read_matrix(mma.a, d, mma.major_a, 16 * warp..16 * warp + 16, false, read, out)
}

/// All of B, as `out[k][n]`.
pub fn b_from_shared(mma: &Mma, d: &Descriptor, read: &mut ReadUnit, out: &mut [f32]) -> Result<(), String> {
    read_matrix(mma.b, d, mma.major_b, 0..mma.n, true, read, out)
}

/// The warp's 16 rows of A from its four 32-bit registers per lane, as `out[row][k]`.
pub fn a_from_registers(mma: &Mma, registers: &[[u32; 32]; 4], out: &mut [f32]) {
    let k = mma.k();
    let packed = 4 / mma.a.bytes() as usize;
    let mut wide = [0f32; 16];
    for (index, register) in registers.iter().enumerate() {
        for (lane, &bits) in register.iter().enumerate() {
            let mut unit = [0u8; 16];
            unit[..4].copy_from_slice(&bits.to_le_bytes());
            widen(mma.a, &unit, &mut wide);
            let row = lane / 4 + 8 * (index & 1);
            let column = packed * (lane % 4) + (k / 2) * (index >> 1);
            out[row * k + column..][..packed].copy_from_slice(&wide[..packed]);
        }
    }
}

/// Row (0..16 within the warp) and column of D of the value with this index in a lane's accumulator.
/// With f16 accumulators two values share a register: value `2 r + h` is half `h` of register `r`.
pub fn d_position(lane: usize, value: usize) -> (usize, usize) {
    (lane / 4 + 8 * ((value >> 1) & 1), 8 * (value >> 2) + 2 * (lane % 4) + (value & 1))
}

/// `d[16][n] += a[16][k] * b[k][n]`, signs of A and B already in the operands. Products of the inputs' formats are
/// exact in f32, so fusing the addition changes nothing; sums round at every step, in the order of K.
pub fn multiply(k: usize, n: usize, a: &[f32], b: &[f32], d: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has what the function needs.
        return unsafe { multiply_fused(k, n, a, b, d) };
    }
    for (row_a, row_d) in a.chunks_exact(k).zip(d.chunks_exact_mut(n)).take(16) {
        for (&value, row_b) in row_a.iter().zip(b.chunks_exact(n)) {
            for (sum, &factor) in row_d.iter_mut().zip(row_b) {
                *sum += value * factor;
            }
        }
    }
}

/// Four steps of K at a time, so that sums stay in registers between them (K is 8, 16 or 32).
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_fused(k: usize, n: usize, a: &[f32], b: &[f32], d: &mut [f32]) {
    for (row_a, row_d) in a.chunks_exact(k).zip(d.chunks_exact_mut(n)).take(16) {
        for (four_a, four_b) in row_a.chunks_exact(4).zip(b.chunks_exact(4 * n)) {
            let (b0, rest) = four_b.split_at(n);
            let (b1, rest) = rest.split_at(n);
            let (b2, b3) = rest.split_at(n);
            for ((((sum, &b0), &b1), &b2), &b3) in row_d.iter_mut().zip(b0).zip(b1).zip(b2).zip(b3) {
                let s = four_a[0].mul_add(b0, *sum);
                let s = four_a[1].mul_add(b1, s);
                let s = four_a[2].mul_add(b2, s);
                *sum = four_a[3].mul_add(b3, s);
            }
        }
    }
}

/// The same with 32-bit integers; operands are small integers held in f32.
pub fn multiply_integers(mma: &Mma, a: &[f32], b: &[f32], d: &mut [i32]) {
    let (k, n) = (mma.k(), mma.n);
    for (row_a, row_d) in a.chunks_exact(k).zip(d.chunks_exact_mut(n)).take(16) {
        for column in 0..n {
            let sum =
                (0..k).map(|i| (row_a[i] as i64) * (b[i * n + column] as i64)).sum::<i64>() + row_d[column] as i64;
            row_d[column] = if mma.saturate { sum.clamp(i32::MIN as i64, i32::MAX as i64) as i32 } else { sum as i32 };
        }
    }
}

#[cfg(test)]
#[path = "wgmma_tests.rs"]
mod tests;
