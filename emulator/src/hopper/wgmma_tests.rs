use super::super::descriptor::Swizzle;
use super::*;

fn mma(n: usize, a: Input, major_a: Major, major_b: Major) -> Mma {
    Mma { n, a, b: a, d: Accumulator::F32, major_a, major_b, negate_a: false, negate_b: false, saturate: false }
}

/// Places a matrix in shared memory by writing the canonical layout from its definition: a K-major atom
/// is 8 rows of W units, an MN-major atom W units of 8 K slices.
fn place(shared: &mut [u8], d: &Descriptor, major: Major, rows: usize, value: impl Fn(usize, usize) -> f32) {
    let width = d.swizzle.units() as usize;
    for row in 0..rows {
        for k in 0..16 {
            let plain = match major {
                Major::K if width == 1 => {
                    (row / 8) * d.stride as usize + (row % 8) * 16 + (k / 8) * d.leading as usize + 2 * (k % 8)
                }
                Major::K => (row / 8) * d.stride as usize + (row % 8) * width * 16 + 2 * k,
                Major::Mn if width == 1 => {
                    (row / 8) * d.stride as usize + (k % 8) * 16 + (k / 8) * d.leading as usize + 2 * (row % 8)
                }
                Major::Mn => {
                    let span = width * 8;
                    (row / span) * d.leading as usize
                        + 2 * (row % span)
                        + (k % 8) * width * 16
                        + (k / 8) * d.stride as usize
                }
            };
            let at = d.swizzle.apply(d.start + plain as u32) as usize;
            shared[at..at + 2].copy_from_slice(&f32_to_bf16(value(row, k)).to_le_bytes());
        }
    }
}

#[test]
fn every_swizzle_and_major_reads_back_the_matrix_that_was_placed() {
    for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        for major in [Major::K, Major::Mn] {
            let d = Descriptor { start: 2048, leading: 4096, stride: 1024, base: 0, swizzle };
            let d = if swizzle == Swizzle::None && major == Major::K {
                Descriptor { leading: 128, stride: 256, ..d }
            } else {
                d
            };
            let d = if swizzle == Swizzle::None && major == Major::Mn {
                Descriptor { leading: 128, stride: 256, ..d }
            } else {
                d
            };
            let mut shared = vec![0xffu8; 65536];
            let value = |row: usize, k: usize| (row * 16 + k) as f32 % 251.0;
            place(&mut shared, &d, major, 64, value);
            let mma = mma(64, Input::Bf16, major, major);
            let mut read = |at: u32| Ok(shared[at as usize..at as usize + 16].try_into().unwrap());
            let mut b = vec![0f32; 16 * 64];
            b_from_shared(&mma, &d, &mut read, &mut b).unwrap();
            for row in 0..64 {
                for k in 0..16 {
                    assert_eq!(b[k * 64 + row], value(row, k), "{swizzle:?} {major:?} row {row} k {k}");
                }
            }
            for warp in 0..4 {
                let mut a = vec![0f32; 256];
                a_from_shared(&mma, warp, &d, &mut read, &mut a).unwrap();
                for row in 0..16 {
                    for k in 0..16 {
                        assert_eq!(a[row * 16 + k], value(16 * warp + row, k));
                    }
                }
            }
        }
    }
}

#[test]
fn the_accumulator_fragment_covers_every_element_once() {
    for n in (8..=256).step_by(8) {
        let mut seen = vec![false; 16 * n];
        for lane in 0..32 {
            for value in 0..n / 2 {
                let (row, column) = d_position(lane, value);
                assert!(!std::mem::replace(&mut seen[row * n + column], true));
            }
        }
        assert!(seen.into_iter().all(|s| s));
    }
    assert_eq!(d_position(5, 2), (9, 2));
    assert_eq!(d_position(31, 7), (15, 15));
}

#[test]
fn a_in_registers_covers_the_rows_as_the_tensor_core_reads_them() {
    let m = mma(8, Input::F16, Major::K, Major::K);
    let mut registers = [[0u32; 32]; 4];
    for (index, register) in registers.iter_mut().enumerate() {
        for (lane, bits) in register.iter_mut().enumerate() {
            let row = lane / 4 + 8 * (index & 1);
            let k = 2 * (lane % 4) + 8 * (index >> 1);
            let half = |k: usize| f32_to_f16((row * 16 + k) as f32) as u32;
            *bits = half(k) | half(k + 1) << 16;
        }
    }
    let mut a = vec![0f32; 256];
    a_from_registers(&m, &registers, &mut a);
    assert!(a.iter().enumerate().all(|(i, &v)| v == i as f32));
}

#[test]
fn multiply_adds_the_product_onto_the_accumulator() {
    let (k, n) = (16, 24);
    let a: Vec<f32> = (0..16 * k).map(|i| (i % 7) as f32 - 3.0).collect();
    let b: Vec<f32> = (0..k * n).map(|i| (i % 5) as f32 - 2.0).collect();
    let mut d = vec![1f32; 16 * n];
    multiply(k, n, &a, &b, &mut d);
    for row in 0..16 {
        for column in 0..n {
            let sum: f32 = (0..k).map(|i| a[row * k + i] * b[i * n + column]).sum();
            assert_eq!(d[row * n + column], 1.0 + sum);
        }
    }
}
