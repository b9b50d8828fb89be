//! mma.sync, ldmatrix, stmatrix, movmatrix. Lane l has group g = l / 4 and place t = l % 4; the comments give the
//! element that each register of a lane holds.
use super::access::{addresses, lanes};
use super::float::{self, F16, Half};
use super::instr::{MatrixMove, Mma, MmaType, Ty, Where};
use super::machine::Machine;
use super::warp::{Registers, Warp};
use crate::races::{self, Kind, Touch};

pub fn multiply(i: &Mma, regs: &mut Registers) {
    match i.acc {
        Ty::F64 => doubles(i, regs),
        Ty::S32 => integers(i, regs),
        _ => {
            #[cfg(target_arch = "x86_64")]
            if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                // SAFETY: the features were detected.
                return unsafe { floats_avx2(i, regs) };
            }
            floats(i, regs, |x, y, z| x * y + z)
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn floats_avx2(i: &Mma, regs: &mut Registers) {
    floats(i, regs, |x, y, z| x.mul_add(y, z))
}

#[inline(always)]
fn floats(i: &Mma, regs: &mut Registers, fma: impl Fn(f32, f32, f32) -> f32 + Copy) {
    // Values of the elements of one register.
    let bf16 = |w: u32| [f32::from_bits(w << 16), f32::from_bits(w & 0xFFFF_0000)];
    let f16 = |w: u32| [F16::get(w as u16), F16::get((w >> 16) as u16)];
    // The low 13 bits of a tf32 are not looked at.
    let tf32 = |w: u32| [f32::from_bits(w & 0xFFFF_E000)];
    let e4m3 = |w: u32| w.to_le_bytes().map(float::e4m3_get);
    let e5m2 = |w: u32| w.to_le_bytes().map(float::e5m2_get);
    match (i.a_type, i.b_type, i.k) {
        (MmaType::Bf16, _, 16) => product::<16, 2>(i, regs, bf16, bf16, fma),
        (MmaType::Bf16, ..) => product::<8, 2>(i, regs, bf16, bf16, fma),
        (MmaType::F16, _, 16) => product::<16, 2>(i, regs, f16, f16, fma),
        (MmaType::F16, ..) => product::<8, 2>(i, regs, f16, f16, fma),
        (MmaType::Tf32, _, 8) => product::<8, 1>(i, regs, tf32, tf32, fma),
        (MmaType::Tf32, ..) => product::<4, 1>(i, regs, tf32, tf32, fma),
        (MmaType::E4m3, MmaType::E4m3, _) => product::<32, 4>(i, regs, e4m3, e4m3, fma),
        (MmaType::E4m3, ..) => product::<32, 4>(i, regs, e4m3, e5m2, fma),
        (_, MmaType::E4m3, _) => product::<32, 4>(i, regs, e5m2, e4m3, fma),
        _ => product::<32, 4>(i, regs, e5m2, e5m2, fma),
    }
}

/// A (16 x K) and B (K x 8). With N elements a register: A's registers come in pairs of rows g and g + 8; each next
/// pair is 4N columns further. B's registers hold rows t*N.. of column g, each next 4N rows further.
#[inline(always)]
fn gather<const K: usize, const N: usize, T: Copy + Default>(
    i: &Mma,
    regs: &Registers,
    a_of: impl Fn(u32) -> [T; N],
    b_of: impl Fn(u32) -> [T; N],
) -> ([[T; K]; 16], [[T; 8]; K]) {
    let mut a = [[T::default(); K]; 16];
    let mut b = [[T::default(); 8]; K];
    for (r, row) in i.a.iter().enumerate() {
        let words = regs.row32(*row);
        let column = 4 * N * (r / 2);
        for g in 0..8 {
            let line = &mut a[g + 8 * (r % 2)][column..column + 4 * N];
            for t in 0..4 {
                line[t * N..t * N + N].copy_from_slice(&a_of(words[4 * g + t]));
            }
        }
    }
    for (r, row) in i.b.iter().enumerate() {
        let words = regs.row32(*row);
        for t in 0..4 {
            for g in 0..8 {
                let e = b_of(words[4 * g + t]);
                for n in 0..N {
                    b[t * N + n + 4 * N * r][g] = e[n];
                }
            }
        }
    }
    (a, b)
}

/// Products are exact and sums are made in f32, k by k. The hardware adds several products at once and truncates;
/// tests must allow for either.
#[inline(always)]
fn product<const K: usize, const N: usize>(
    i: &Mma,
    regs: &mut Registers,
    a_of: impl Fn(u32) -> [f32; N],
    b_of: impl Fn(u32) -> [f32; N],
    fma: impl Fn(f32, f32, f32) -> f32,
) {
    let (a, b) = gather::<K, N, f32>(i, regs, a_of, b_of);
    // f32: c0, c1 are (g, 2t) and (g, 2t + 1); c2, c3 the same in row g + 8. f16 packs each pair.
    let narrow = i.acc == Ty::F16;
    let mut acc = [[0f32; 8]; 16];
    for half in 0..2 {
        if narrow {
            let c = regs.row32(i.c[half]);
            for l in 0..32 {
                acc[l / 4 + 8 * half][l % 4 * 2] = F16::get(c[l] as u16);
                acc[l / 4 + 8 * half][l % 4 * 2 + 1] = F16::get((c[l] >> 16) as u16);
            }
        } else {
            let (x, y) = (regs.row32(i.c[2 * half]), regs.row32(i.c[2 * half + 1]));
            for l in 0..32 {
                acc[l / 4 + 8 * half][l % 4 * 2] = f32::from_bits(x[l]);
                acc[l / 4 + 8 * half][l % 4 * 2 + 1] = f32::from_bits(y[l]);
            }
        }
    }
    for m in 0..16 {
        let mut row = acc[m];
        for k in 0..K {
            for n in 0..8 {
                row[n] = fma(a[m][k], b[k][n], row[n]);
            }
        }
        acc[m] = row;
    }
    for half in 0..2 {
        let at = |l: usize, e: usize| acc[l / 4 + 8 * half][l % 4 * 2 + e];
        if narrow {
            *regs.row32_mut(i.d[half]) =
                std::array::from_fn(|l| F16::put(at(l, 0)) as u32 | (F16::put(at(l, 1)) as u32) << 16);
        } else {
            *regs.row32_mut(i.d[2 * half]) = std::array::from_fn(|l| at(l, 0).to_bits());
            *regs.row32_mut(i.d[2 * half + 1]) = std::array::from_fn(|l| at(l, 1).to_bits());
        }
    }
}

fn integers(i: &Mma, regs: &mut Registers) {
    let of =
        |t: MmaType| move |w: u32| w.to_le_bytes().map(|b| if t == MmaType::S8 { b as i8 as i32 } else { b as i32 });
    if i.k == 16 {
        let (a, b) = gather::<16, 4, i32>(i, regs, of(i.a_type), of(i.b_type));
        integer_product(i, regs, &a, &b);
    } else {
        let (a, b) = gather::<32, 4, i32>(i, regs, of(i.a_type), of(i.b_type));
        integer_product(i, regs, &a, &b);
    }
}

fn integer_product<const K: usize>(i: &Mma, regs: &mut Registers, a: &[[i32; K]; 16], b: &[[i32; 8]; K]) {
    for l in 0..32 {
        let (g, t) = (l / 4, l % 4);
        for r in 0..4 {
            let (m, n) = (g + 8 * (r / 2), 2 * t + r % 2);
            let dot: i64 = (0..K).map(|k| a[m][k] as i64 * b[k][n] as i64).sum();
            let sum = regs.get32(i.c[r], l) as i32 as i64 + dot;
            let d = if i.saturate { sum.clamp(i32::MIN as i64, i32::MAX as i64) as i32 } else { sum as i32 };
            regs.set32(i.d[r], l, d as u32);
        }
    }
}

/// m8n8k4: A is (g, t), B is (t, g), C is (g, 2t) and (g, 2t + 1).
fn doubles(i: &Mma, regs: &mut Registers) {
    let (mut a, mut b) = ([[0f64; 4]; 8], [[0f64; 8]; 4]);
    for l in 0..32 {
        a[l / 4][l % 4] = f64::from_bits(regs.get64(i.a[0], l));
        b[l % 4][l / 4] = f64::from_bits(regs.get64(i.b[0], l));
    }
    for l in 0..32 {
        for e in 0..2 {
            let (m, n) = (l / 4, 2 * (l % 4) + e);
            let sum = (0..4).fold(f64::from_bits(regs.get64(i.c[e], l)), |s, k| a[m][k].mul_add(b[k][n], s));
            regs.set64(i.d[e], l, sum.to_bits());
        }
    }
}

/// Row r of matrix m lies at the address that lane 8m + r gives; lane l gets elements 2t and 2t + 1 of row g, or
/// with trans of column g.
pub fn load(m: &mut Machine, w: &mut Warp, i: &MatrixMove) -> Result<(), String> {
    let at = addresses(&w.regs, &i.address);
    touch(m, w, i, &at, Kind::Read)?;
    for (k, row) in i.data.iter().enumerate() {
        let mut tile = [[0u16; 8]; 8];
        for (r, row) in tile.iter_mut().enumerate() {
            let lane = 8 * k + r;
            let line = place(m, at[lane]).and_then(|(block, offset)| {
                let bytes = m.cluster.blocks[block].shared.read(offset, 16)?;
                Ok(std::array::from_fn(|c| u16::from_le_bytes([bytes[2 * c], bytes[2 * c + 1]])))
            });
            match line {
                Ok(line) => *row = line,
                Err(e) => {
                    w.fault_lane = Some(lane);
                    return Err(e);
                }
            }
        }
        let out = w.regs.row32_mut(*row);
        for (l, word) in out.iter_mut().enumerate() {
            let (g, t) = (l / 4, l % 4);
            let (lo, hi) =
                if i.trans { (tile[2 * t][g], tile[2 * t + 1][g]) } else { (tile[g][2 * t], tile[g][2 * t + 1]) };
            *word = lo as u32 | (hi as u32) << 16;
        }
    }
    Ok(())
}

pub fn store(m: &mut Machine, w: &mut Warp, i: &MatrixMove) -> Result<(), String> {
    let at = addresses(&w.regs, &i.address);
    touch(m, w, i, &at, Kind::Write)?;
    for (k, row) in i.data.iter().enumerate() {
        let words = *w.regs.row32(*row);
        let mut tile = [[0u16; 8]; 8];
        for (l, word) in words.iter().enumerate() {
            let (g, t) = (l / 4, l % 4);
            for e in 0..2 {
                let v = (word >> (16 * e)) as u16;
                if i.trans {
                    tile[2 * t + e][g] = v;
                } else {
                    tile[g][2 * t + e] = v;
                }
            }
        }
        for (r, row) in tile.iter().enumerate() {
            let lane = 8 * k + r;
            let mut bytes = [0u8; 16];
            (0..8).for_each(|c| bytes[2 * c..2 * c + 2].copy_from_slice(&row[c].to_le_bytes()));
            let done =
                place(m, at[lane]).and_then(|(block, offset)| m.cluster.blocks[block].shared.write(offset, &bytes));
            if let Err(e) = done {
                w.fault_lane = Some(lane);
                return Err(e);
            }
        }
    }
    Ok(())
}

/// For the race detector: the lane that gives a row's address counts as the one that moves the row.
fn touch(m: &mut Machine, w: &mut Warp, i: &MatrixMove, at: &[u64; 32], kind: Kind) -> Result<(), String> {
    let givers = ((1u64 << (8 * i.data.len())) - 1) as u32;
    let what = Touch { warp: w.id, mask: givers, place: Where::Shared, at, len: 16, kind };
    races::touch(m, what, |_, _| false).map_err(|(lane, what)| {
        w.fault_lane = Some(lane);
        what
    })
}

fn place(m: &Machine, at: u64) -> Result<(usize, u32), String> {
    if at & 15 != 0 {
        return Err(format!("misaligned row address {at:#x}: a multiple of 16 is needed"));
    }
    m.shared_place(at as u32)
}

/// Transposes an 8 x 8 matrix of 16-bit elements that is spread over the warp.
pub fn transpose(regs: &mut Registers, d: u32, a: u32) {
    let words = *regs.row32(a);
    let mut tile = [[0u16; 8]; 8];
    for l in lanes(!0) {
        tile[l / 4][2 * (l % 4)] = words[l] as u16;
        tile[l / 4][2 * (l % 4) + 1] = (words[l] >> 16) as u16;
    }
    let out = regs.row32_mut(d);
    for l in lanes(!0) {
        out[l] = tile[2 * (l % 4)][l / 4] as u32 | (tile[2 * (l % 4) + 1][l / 4] as u32) << 16;
    }
}
