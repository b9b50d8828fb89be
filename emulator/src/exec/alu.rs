//! Arithmetic on rows: one loop over 32 lanes for each operation and type. The whole match is compiled twice, for
//! AVX2 with FMA and for the baseline, and chosen at run time.
use super::float::{self, Bf16, F16, Half, canon, flush, saturate};
use super::instr::{Alu, AluOp, Row, Ty, flag};

/// A lane's value in a register row.
pub trait Word: Copy + Default {
    /// # Safety
    /// `base` must be a register file with that row.
    unsafe fn load(base: *const u32, row: Row) -> [Self; 32];
    /// # Safety
    /// As `load`.
    unsafe fn store(base: *mut u32, row: Row, mask: u32, value: &[Self; 32]);
}

macro_rules! word32 {
    ($t:ty, $to:expr, $from:expr) => {
        impl Word for $t {
            #[inline(always)]
            unsafe fn load(base: *const u32, row: Row) -> [Self; 32] {
                // SAFETY: the caller's promise: a row of the file.
                let row = unsafe { &*base.add(row as usize * 32).cast::<[u32; 32]>() };
                std::array::from_fn(|i| $from(row[i]))
            }
            #[inline(always)]
            unsafe fn store(base: *mut u32, row: Row, mask: u32, value: &[Self; 32]) {
                // SAFETY: the caller's promise: a row of the file.
                let row = unsafe { &mut *base.add(row as usize * 32).cast::<[u32; 32]>() };
                if mask == !0 {
                    for i in 0..32 {
                        row[i] = $to(value[i]);
                    }
                } else {
                    for i in 0..32 {
                        let keep = (mask >> i & 1).wrapping_sub(1);
                        row[i] = (row[i] & keep) | ($to(value[i]) & !keep);
                    }
                }
            }
        }
    };
}

macro_rules! word64 {
    ($t:ty, $to:expr, $from:expr) => {
        impl Word for $t {
            #[inline(always)]
            unsafe fn load(base: *const u32, row: Row) -> [Self; 32] {
                // SAFETY: the caller's promise: a row of the file.
                let row = unsafe { &*base.add(row as usize * 32).cast::<[u64; 32]>() };
                std::array::from_fn(|i| $from(row[i]))
            }
            #[inline(always)]
            unsafe fn store(base: *mut u32, row: Row, mask: u32, value: &[Self; 32]) {
                // SAFETY: the caller's promise: a row of the file.
                let row = unsafe { &mut *base.add(row as usize * 32).cast::<[u64; 32]>() };
                for i in 0..32 {
                    let keep = ((mask >> i & 1) as u64).wrapping_sub(1);
                    row[i] = (row[i] & keep) | ($to(value[i]) & !keep);
                }
            }
        }
    };
}

word32!(u32, |v: u32| v, |v: u32| v);
word32!(i32, |v: i32| v as u32, |v: u32| v as i32);
word32!(f32, f32::to_bits, f32::from_bits);
word32!(u16, |v: u16| v as u32, |v: u32| v as u16);
word32!(i16, |v: i16| v as u16 as u32, |v: u32| v as i16);
word64!(u64, |v: u64| v, |v: u64| v);
word64!(i64, |v: i64| v as u64, |v: u64| v as i64);
word64!(f64, f64::to_bits, f64::from_bits);

/// The row file and the active lanes.
#[derive(Clone, Copy)]
pub(super) struct On {
    pub base: *mut u32,
    pub mask: u32,
}

impl On {
    #[inline(always)]
    pub fn one<A: Word, D: Word>(self, d: Row, a: Row, f: impl Fn(A) -> D) {
        // SAFETY: the decoder only makes rows of the file.
        unsafe {
            let a = A::load(self.base, a);
            D::store(self.base, d, self.mask, &std::array::from_fn(|i| f(a[i])));
        }
    }

    #[inline(always)]
    pub fn two<A: Word, B: Word, D: Word>(self, i: &Alu, f: impl Fn(A, B) -> D) {
        // SAFETY: as in `one`.
        unsafe {
            let (a, b) = (A::load(self.base, i.a), B::load(self.base, i.b));
            D::store(self.base, i.d, self.mask, &std::array::from_fn(|l| f(a[l], b[l])));
        }
    }

    #[inline(always)]
    pub fn three<A: Word, B: Word, C: Word, D: Word>(self, i: &Alu, f: impl Fn(A, B, C) -> D) {
        // SAFETY: as in `one`.
        unsafe {
            let (a, b, c) = (A::load(self.base, i.a), B::load(self.base, i.b), C::load(self.base, i.c));
            D::store(self.base, i.d, self.mask, &std::array::from_fn(|l| f(a[l], b[l], c[l])));
        }
    }

    /// Like `one` for functions that cost: only the active lanes.
    #[inline(always)]
    pub fn slow<A: Word, D: Word>(self, d: Row, a: Row, f: impl Fn(A) -> D) {
        // SAFETY: as in `one`.
        unsafe {
            let a = A::load(self.base, a);
            let mut out = [D::default(); 32];
            for l in 0..32 {
                if self.mask >> l & 1 != 0 {
                    out[l] = f(a[l]);
                }
            }
            D::store(self.base, d, self.mask, &out);
        }
    }
}

/// Runs one instruction for the lanes of `mask`.
#[inline]
pub fn run(i: &Alu, base: *mut u32, mask: u32) {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            // SAFETY: the features were detected.
            return unsafe { run_avx2(i, On { base, mask }) };
        }
    }
    run_any(i, On { base, mask })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run_avx2(i: &Alu, on: On) {
    body(i, on)
}

#[inline(never)]
fn run_any(i: &Alu, on: On) {
    body(i, on)
}

#[inline(always)]
fn body(i: &Alu, on: On) {
    match i.ty {
        Ty::F32 => single(i, on),
        Ty::F64 => double(i, on),
        Ty::F16 => halves::<F16>(i, on, false),
        Ty::F16x2 => halves::<F16>(i, on, true),
        Ty::BF16 => halves::<Bf16>(i, on, false),
        Ty::BF16x2 => halves::<Bf16>(i, on, true),
        _ => integer(i, on),
    }
}

#[inline(always)]
fn integer(i: &Alu, on: On) {
    use AluOp::*;
    let ty = i.ty;
    // The same expression at three widths; `s` for signed types only where the sign matters.
    macro_rules! any2 {
        (|$a:ident, $b:ident| $e:expr) => {
            match ty.bits() {
                16 => on.two(i, |$a: u16, $b: u16| $e),
                64 => on.two(i, |$a: u64, $b: u64| $e),
                _ => on.two(i, |$a: u32, $b: u32| $e),
            }
        };
    }
    macro_rules! each2 {
        (|$a:ident, $b:ident| $e:expr) => {
            match ty {
                Ty::U16 => on.two(i, |$a: u16, $b: u16| $e),
                Ty::S16 => on.two(i, |$a: i16, $b: i16| $e),
                Ty::S32 => on.two(i, |$a: i32, $b: i32| $e),
                Ty::U64 => on.two(i, |$a: u64, $b: u64| $e),
                Ty::S64 => on.two(i, |$a: i64, $b: i64| $e),
                _ => on.two(i, |$a: u32, $b: u32| $e),
            }
        };
    }
    macro_rules! any1 {
        (|$a:ident| $e:expr) => {
            match ty.bits() {
                16 => on.one(i.d, i.a, |$a: u16| $e),
                64 => on.one(i.d, i.a, |$a: u64| $e),
                _ => on.one(i.d, i.a, |$a: u32| $e),
            }
        };
    }
    macro_rules! hi {
        ($t:ty, $w:ty, $n:expr) => {{ |a: $t, b: $t| ((a as $w * b as $w) >> $n) as $t }};
    }
    let sat = i.flags & flag::SAT != 0;
    match i.op {
        Add if sat => on.two(i, |a: i32, b: i32| a.saturating_add(b)),
        Sub if sat => on.two(i, |a: i32, b: i32| a.saturating_sub(b)),
        Add => any2!(|a, b| a.wrapping_add(b)),
        Sub => any2!(|a, b| a.wrapping_sub(b)),
        Mul => any2!(|a, b| a.wrapping_mul(b)),
        Mad => match ty.bits() {
            16 => on.three(i, |a: u16, b: u16, c: u16| a.wrapping_mul(b).wrapping_add(c)),
            64 => on.three(i, |a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c)),
            _ => on.three(i, |a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c)),
        },
        MulHi => match ty {
            Ty::U16 => on.two(i, hi!(u16, u32, 16)),
            Ty::S16 => on.two(i, hi!(i16, i32, 16)),
            Ty::S32 => on.two(i, hi!(i32, i64, 32)),
            Ty::U64 => on.two(i, hi!(u64, u128, 64)),
            Ty::S64 => on.two(i, hi!(i64, i128, 64)),
            _ => on.two(i, hi!(u32, u64, 32)),
        },
        MadHi => match ty {
            Ty::U16 => on.three(i, |a, b, c: u16| hi!(u16, u32, 16)(a, b).wrapping_add(c)),
            Ty::S16 => on.three(i, |a, b, c: i16| hi!(i16, i32, 16)(a, b).wrapping_add(c)),
            Ty::S32 => on.three(i, |a, b, c: i32| hi!(i32, i64, 32)(a, b).wrapping_add(c)),
            Ty::U64 => on.three(i, |a, b, c: u64| hi!(u64, u128, 64)(a, b).wrapping_add(c)),
            Ty::S64 => on.three(i, |a, b, c: i64| hi!(i64, i128, 64)(a, b).wrapping_add(c)),
            _ => on.three(i, |a, b, c: u32| hi!(u32, u64, 32)(a, b).wrapping_add(c)),
        },
        MulWide => match ty {
            Ty::U16 => on.two(i, |a: u16, b: u16| a as u32 * b as u32),
            Ty::S16 => on.two(i, |a: i16, b: i16| a as i32 * b as i32),
            Ty::S32 => on.two(i, |a: i32, b: i32| a as i64 * b as i64),
            _ => on.two(i, |a: u32, b: u32| a as u64 * b as u64),
        },
        MadWide => match ty {
            Ty::U16 => on.three(i, |a: u16, b: u16, c: u32| (a as u32 * b as u32).wrapping_add(c)),
            Ty::S16 => on.three(i, |a: i16, b: i16, c: i32| (a as i32 * b as i32).wrapping_add(c)),
            Ty::S32 => on.three(i, |a: i32, b: i32, c: i64| (a as i64 * b as i64).wrapping_add(c)),
            _ => on.three(i, |a: u32, b: u32, c: u64| (a as u64 * b as u64).wrapping_add(c)),
        },
        Mul24 | Mad24 => {
            let add = i.op == Mad24;
            let c_of = |c: u32| if add { c } else { 0 };
            if ty == Ty::S32 {
                let cut = |v: u32| ((v << 8) as i32 >> 8) as u32;
                on.three(i, |a: u32, b: u32, c: u32| cut(a).wrapping_mul(cut(b)).wrapping_add(c_of(c)));
            } else {
                on.three(i, |a: u32, b: u32, c: u32| (a & 0xFF_FFFF).wrapping_mul(b & 0xFF_FFFF).wrapping_add(c_of(c)));
            }
        }
        // Division by zero gives all ones (and the dividend as remainder), as the hardware's routine does.
        Div => match ty {
            Ty::S16 | Ty::S32 | Ty::S64 => each2!(|a, b| if b == 0 { !b } else { a.wrapping_div(b) }),
            _ => each2!(|a, b| if b == 0 { !b } else { a.wrapping_div(b) }),
        },
        Rem => each2!(|a, b| if b == 0 { a } else { a.wrapping_rem(b) }),
        Abs => match ty.bits() {
            16 => on.one(i.d, i.a, |a: i16| a.wrapping_abs()),
            64 => on.one(i.d, i.a, |a: i64| a.wrapping_abs()),
            _ => on.one(i.d, i.a, |a: i32| a.wrapping_abs()),
        },
        Neg => any1!(|a| a.wrapping_neg()),
        Min if i.flags & flag::RELU != 0 => on.two(i, |a: i32, b: i32| a.min(b).max(0)),
        Max if i.flags & flag::RELU != 0 => on.two(i, |a: i32, b: i32| a.max(b).max(0)),
        Min => each2!(|a, b| a.min(b)),
        Max => each2!(|a, b| a.max(b)),
        Min3 if ty == Ty::S32 => on.three(i, |a: i32, b: i32, c: i32| a.min(b).min(c)),
        Max3 if ty == Ty::S32 => on.three(i, |a: i32, b: i32, c: i32| a.max(b).max(c)),
        Min3 => on.three(i, |a: u32, b: u32, c: u32| a.min(b).min(c)),
        Max3 => on.three(i, |a: u32, b: u32, c: u32| a.max(b).max(c)),
        And => any2!(|a, b| a & b),
        Or => any2!(|a, b| a | b),
        Xor => any2!(|a, b| a ^ b),
        Not => any1!(|a| !a),
        Cnot => match ty.bits() {
            16 => on.one(i.d, i.a, |a: u16| (a == 0) as u16),
            64 => on.one(i.d, i.a, |a: u64| (a == 0) as u64),
            _ => on.one(i.d, i.a, |a: u32| (a == 0) as u32),
        },
        Shl => match ty.bits() {
            16 => on.two(i, |a: u16, b: u32| if b > 15 { 0 } else { a << b }),
            64 => on.two(i, |a: u64, b: u32| if b > 63 { 0 } else { a << b }),
            _ => on.two(i, |a: u32, b: u32| if b > 31 { 0 } else { a << (b & 31) }),
        },
        Shr => match ty {
            Ty::U16 => on.two(i, |a: u16, b: u32| if b > 15 { 0 } else { a >> b }),
            Ty::S16 => on.two(i, |a: i16, b: u32| a >> b.min(15)),
            Ty::S32 => on.two(i, |a: i32, b: u32| a >> b.min(31)),
            Ty::U64 => on.two(i, |a: u64, b: u32| if b > 63 { 0 } else { a >> b }),
            Ty::S64 => on.two(i, |a: i64, b: u32| a >> b.min(63)),
            _ => on.two(i, |a: u32, b: u32| if b > 31 { 0 } else { a >> (b & 31) }),
        },
        Sad => match ty {
            Ty::U16 => on.three(i, |a: u16, b: u16, c: u16| c.wrapping_add(a.abs_diff(b))),
            Ty::S16 => on.three(i, |a: i16, b: i16, c: u16| c.wrapping_add(a.abs_diff(b))),
            Ty::S32 => on.three(i, |a: i32, b: i32, c: u32| c.wrapping_add(a.abs_diff(b))),
            Ty::U64 => on.three(i, |a: u64, b: u64, c: u64| c.wrapping_add(a.abs_diff(b))),
            Ty::S64 => on.three(i, |a: i64, b: i64, c: u64| c.wrapping_add(a.abs_diff(b))),
            _ => on.three(i, |a: u32, b: u32, c: u32| c.wrapping_add(a.abs_diff(b))),
        },
        Popc if ty.bits() == 64 => on.one(i.d, i.a, |a: u64| a.count_ones()),
        Popc => on.one(i.d, i.a, |a: u32| a.count_ones()),
        Clz if ty.bits() == 64 => on.one(i.d, i.a, |a: u64| a.leading_zeros()),
        Clz => on.one(i.d, i.a, |a: u32| a.leading_zeros()),
        Brev if ty.bits() == 64 => on.one(i.d, i.a, |a: u64| a.reverse_bits()),
        Brev => on.one(i.d, i.a, |a: u32| a.reverse_bits()),
        Bfind | BfindShift => {
            let shift = i.op == BfindShift;
            if ty.bits() == 64 {
                let s = ty == Ty::S64;
                on.one(i.d, i.a, |a: u64| top_bit(if s && (a as i64) < 0 { !a } else { a }, 64, shift));
            } else {
                let s = ty == Ty::S32;
                on.one(i.d, i.a, |a: u32| top_bit((if s && (a as i32) < 0 { !a } else { a }) as u64, 32, shift));
            }
        }
        Bfe => match ty {
            Ty::U64 | Ty::S64 => on.three(i, |a: u64, b: u32, c: u32| bfe(a, 64, b, c, ty == Ty::S64)),
            Ty::S32 => on.three(i, |a: i32, b: u32, c: u32| bfe(a as i64 as u64, 32, b, c, true) as u32),
            _ => on.three(i, |a: u32, b: u32, c: u32| bfe(a as u64, 32, b, c, false) as u32),
        },
        Bfi => bfi_rows(i, on),
        Lop3 => lop3(i, on),
        ShfL | ShfR => {
            let (right, clamp) = (i.op == ShfR, i.flags & flag::CLAMP != 0);
            on.three(i, |a: u32, b: u32, c: u32| {
                let n = if clamp { c.min(32) } else { c & 31 };
                let both = (b as u64) << 32 | a as u64;
                if right { (both >> n) as u32 } else { ((both << n) >> 32) as u32 }
            });
        }
        Prmt => {
            let mode = i.imm;
            on.three(i, |a: u32, b: u32, c: u32| prmt(a, b, c, mode));
        }
        Dp4a => {
            let signs = i.imm;
            on.three(i, |a: u32, b: u32, c: u32| {
                let pick = |v: u32, k: usize, s: bool| {
                    if s { v.to_le_bytes()[k] as i8 as i32 } else { v.to_le_bytes()[k] as i32 }
                };
                (0..4).fold(c, |sum, k| {
                    sum.wrapping_add((pick(a, k, signs & 1 != 0) * pick(b, k, signs & 2 != 0)) as u32)
                })
            });
        }
        _ => unreachable!("the decoder lets no {:?} of {:?} through", i.op, i.ty),
    }
}

fn top_bit(v: u64, bits: u32, shift: bool) -> u32 {
    if v == 0 {
        return !0;
    }
    let at = 63 - v.leading_zeros();
    if shift { bits - 1 - at } else { at }
}

fn bfe(a: u64, bits: u32, pos: u32, len: u32, signed: bool) -> u64 {
    let (pos, len) = (pos & 0xFF, len & 0xFF);
    if len == 0 {
        return 0;
    }
    // Bits past the top repeat the sign, or are zero; `a` comes extended to 64 bits.
    let shifted = if signed {
        ((a as i64) >> pos.min(63)) as u64
    } else if pos > 63 {
        0
    } else {
        a >> pos
    };
    if len >= bits {
        return shifted;
    }
    let low = shifted & ((1u64 << len) - 1);
    if signed && low >> (len - 1) & 1 != 0 { low | (!0u64 << len) } else { low }
}

/// d = b with `len` bits of a put in at `pos`; the fourth row's number is in `imm`.
fn bfi_rows(i: &Alu, on: On) {
    let put = |a: u64, b: u64, pos: u32, len: u32, bits: u32| {
        let (pos, len) = (pos & 0xFF, (len & 0xFF).min(bits));
        if len == 0 || pos >= bits {
            return b;
        }
        let field = (if len >= 64 { !0u64 } else { (1u64 << len) - 1 }) << pos;
        (b & !field) | (a << pos & field)
    };
    // SAFETY: rows of the file.
    let len: [u32; 32] = unsafe { Word::load(on.base, i.imm) };
    // SAFETY: rows of the file.
    unsafe {
        let pos: [u32; 32] = Word::load(on.base, i.c);
        if i.ty.bits() == 64 {
            let (a, b): ([u64; 32], [u64; 32]) = (Word::load(on.base, i.a), Word::load(on.base, i.b));
            u64::store(on.base, i.d, on.mask, &std::array::from_fn(|l| put(a[l], b[l], pos[l], len[l], 64)));
        } else {
            let (a, b): ([u32; 32], [u32; 32]) = (Word::load(on.base, i.a), Word::load(on.base, i.b));
            u32::store(
                on.base,
                i.d,
                on.mask,
                &std::array::from_fn(|l| put(a[l] as u64, b[l] as u64, pos[l], len[l], 32) as u32),
            );
        }
    }
}

#[inline(always)]
fn lop3(i: &Alu, on: On) {
    let t = i.imm;
    match t {
        0xC0 => on.two(i, |a: u32, b: u32| a & b),
        0x96 => on.three(i, |a: u32, b: u32, c: u32| a ^ b ^ c),
        0xF8 => on.three(i, |a: u32, b: u32, c: u32| a | (b & c)),
        0xEA => on.three(i, |a: u32, b: u32, c: u32| (a & b) | c),
        _ => {
            let m: [u32; 8] = std::array::from_fn(|k| 0u32.wrapping_sub(t >> k & 1));
            on.three(i, |a: u32, b: u32, c: u32| {
                (!a & !b & !c & m[0])
                    | (!a & !b & c & m[1])
                    | (!a & b & !c & m[2])
                    | (!a & b & c & m[3])
                    | (a & !b & !c & m[4])
                    | (a & !b & c & m[5])
                    | (a & b & !c & m[6])
                    | (a & b & c & m[7])
            })
        }
    }
}

fn prmt(a: u32, b: u32, c: u32, mode: u32) -> u32 {
    let bytes = ((b as u64) << 32 | a as u64).to_le_bytes();
    let s = (c & 3) as usize;
    // Which of the eight bytes goes where in the special modes.
    let special: Option<[usize; 4]> = match mode {
        1 => Some([s, s + 1, s + 2, s + 3]),
        2 => Some([s, (s + 7) % 8, (s + 6) % 8, (s + 5) % 8]),
        3 => Some([s; 4]),
        4 => Some([s, 1.max(s), 2.max(s), 3.max(s)]),
        5 => Some([0, 1.min(s), 2.min(s), 3.min(s)]),
        6 => Some(if s & 1 == 0 { [0, 1, 0, 1] } else { [2, 3, 2, 3] }),
        _ => None,
    };
    u32::from_le_bytes(match special {
        Some(from) => from.map(|k| bytes[k]),
        None => std::array::from_fn(|k| {
            let sel = c >> (4 * k) & 0xF;
            let byte = bytes[(sel & 7) as usize];
            if sel & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte }
        }),
    })
}

#[inline(always)]
fn single(i: &Alu, on: On) {
    use AluOp::*;
    let f = i.flags;
    let (ftz, sat) = (f & flag::FTZ != 0, f & flag::SAT != 0);
    macro_rules! wrap {
        ($how:ident, |$($a:ident),+| $e:expr) => {
            if sat {
                on.$how(i, |$($a: f32),+| { $(let $a = if ftz { flush($a) } else { $a };)+ let r: f32 = $e; saturate(if ftz { flush(r) } else { r }) })
            } else if ftz {
                on.$how(i, |$($a: f32),+| { $(let $a = flush($a);)+ flush(canon($e)) })
            } else {
                on.$how(i, |$($a: f32),+| canon($e))
            }
        };
    }
    macro_rules! unary {
        (|$a:ident| $e:expr) => {
            on.slow(i.d, i.a, |$a: f32| {
                let $a = if ftz { flush($a) } else { $a };
                let r: f32 = canon($e);
                let r = if ftz { flush(r) } else { r };
                if sat { saturate(r) } else { r }
            })
        };
    }
    let mode = f & flag::ROUND;
    let nan = f & flag::NAN != 0;
    match i.op {
        Add if mode != 0 => wrap!(two, |a, b| float::fma_directed(a, 1.0, b, mode)),
        Sub if mode != 0 => wrap!(two, |a, b| float::fma_directed(a, 1.0, -b, mode)),
        Mul if mode != 0 => wrap!(two, |a, b| float::fma_directed(a, b, 0.0f32.copysign(a * b), mode)),
        Mad if mode != 0 => wrap!(three, |a, b, c| float::fma_directed(a, b, c, mode)),
        Div if mode != 0 => wrap!(two, |a, b| float::div_directed(a, b, mode)),
        Rcp if mode != 0 => unary!(|a| float::div_directed(1.0, a, mode)),
        Sqrt if mode != 0 => unary!(|a| float::sqrt_directed(a, mode)),
        Add => wrap!(two, |a, b| a + b),
        Sub => wrap!(two, |a, b| a - b),
        Mul => wrap!(two, |a, b| a * b),
        Mad => wrap!(three, |a, b, c| a.mul_add(b, c)),
        Div => wrap!(two, |a, b| a / b),
        Abs => on.one(i.d, i.a, |a: f32| if ftz { flush(a.abs()) } else { a.abs() }),
        Neg => on.one(i.d, i.a, |a: f32| if ftz { flush(-a) } else { -a }),
        Min if f & flag::XORSIGN_ABS != 0 => {
            on.two(i, |a: f32, b: f32| min(a.abs(), b.abs(), nan).copysign(f32::from_bits(a.to_bits() ^ b.to_bits())))
        }
        Max if f & flag::XORSIGN_ABS != 0 => {
            on.two(i, |a: f32, b: f32| max(a.abs(), b.abs(), nan).copysign(f32::from_bits(a.to_bits() ^ b.to_bits())))
        }
        Min => wrap!(two, |a, b| min(a, b, nan)),
        Max => wrap!(two, |a, b| max(a, b, nan)),
        Min3 => wrap!(three, |a, b, c| min(min(a, b, nan), c, nan)),
        Max3 => wrap!(three, |a, b, c| max(max(a, b, nan), c, nan)),
        Rcp => wrap_one(i, on, ftz, |a| 1.0 / a),
        Sqrt => wrap_one(i, on, ftz, f32::sqrt),
        Rsqrt => wrap_one(i, on, ftz, |a| (1.0 / (a as f64).sqrt()) as f32),
        Sin => unary!(|a| (a as f64).sin() as f32),
        Cos => unary!(|a| (a as f64).cos() as f32),
        Lg2 => unary!(|a| (a as f64).log2() as f32),
        Ex2 => wrap_one(i, on, ftz, float::exp2),
        Tanh => unary!(|a| (a as f64).tanh() as f32),
        Copysign => on.two(i, |a: f32, b: f32| a.copysign(b)),
        _ => unreachable!("the decoder lets no {:?} of f32 through", i.op),
    }
}

#[inline(always)]
fn wrap_one(i: &Alu, on: On, ftz: bool, f: impl Fn(f32) -> f32) {
    if ftz {
        on.one(i.d, i.a, |a: f32| flush(canon(f(flush(a)))));
    } else {
        on.one(i.d, i.a, |a: f32| canon(f(a)));
    }
}

/// One NaN loses, unless `nan`; -0 is below +0.
#[inline(always)]
fn min(a: f32, b: f32, nan: bool) -> f32 {
    if a.is_nan() || b.is_nan() {
        return if nan || (a.is_nan() && b.is_nan()) {
            f32::NAN
        } else if a.is_nan() {
            b
        } else {
            a
        };
    }
    if a < b || (a == b && a.is_sign_negative()) { a } else { b }
}

#[inline(always)]
fn max(a: f32, b: f32, nan: bool) -> f32 {
    if a.is_nan() || b.is_nan() {
        return if nan || (a.is_nan() && b.is_nan()) {
            f32::NAN
        } else if a.is_nan() {
            b
        } else {
            a
        };
    }
    if a > b || (a == b && a.is_sign_positive()) { a } else { b }
}

#[inline(always)]
fn double(i: &Alu, on: On) {
    use AluOp::*;
    let mode = i.flags & flag::ROUND;
    match i.op {
        Add if mode != 0 => on.two(i, |a: f64, b: f64| float::add64(a, b, mode)),
        Sub if mode != 0 => on.two(i, |a: f64, b: f64| float::add64(a, -b, mode)),
        Mul if mode != 0 => on.two(i, |a: f64, b: f64| float::mul64(a, b, mode)),
        Div if mode != 0 => on.two(i, |a: f64, b: f64| float::div64(a, b, mode)),
        Add => on.two(i, |a: f64, b: f64| a + b),
        Sub => on.two(i, |a: f64, b: f64| a - b),
        Mul => on.two(i, |a: f64, b: f64| a * b),
        Mad => on.three(i, |a: f64, b: f64, c: f64| a.mul_add(b, c)),
        Div => on.two(i, |a: f64, b: f64| a / b),
        Abs => on.one(i.d, i.a, f64::abs),
        Neg => on.one(i.d, i.a, |a: f64| -a),
        Min => on.two(i, |a: f64, b: f64| {
            if a.is_nan() {
                b
            } else if b.is_nan() || a < b || (a == b && a.is_sign_negative()) {
                a
            } else {
                b
            }
        }),
        Max => on.two(i, |a: f64, b: f64| {
            if a.is_nan() {
                b
            } else if b.is_nan() || a > b || (a == b && a.is_sign_positive()) {
                a
            } else {
                b
            }
        }),
        Rcp => on.one(i.d, i.a, |a: f64| 1.0 / a),
        Sqrt => on.one(i.d, i.a, f64::sqrt),
        Rsqrt => on.one(i.d, i.a, |a: f64| 1.0 / a.sqrt()),
        Copysign => on.two(i, |a: f64, b: f64| a.copysign(b)),
        _ => unreachable!("the decoder lets no {:?} of f64 through", i.op),
    }
}

/// f16 and bf16, alone or in pairs. Sums, differences and products of two round correctly through f32.
#[inline(always)]
fn halves<H: Half>(i: &Alu, on: On, pair: bool) {
    use AluOp::*;
    let f = i.flags;
    let (ftz, sat, relu, nan) = (f & flag::FTZ != 0, f & flag::SAT != 0, f & flag::RELU != 0, f & flag::NAN != 0);
    let get = |bits: u16| {
        let v = H::get(bits);
        // f16's subnormals are normal in f32: flush by f16's exponent.
        if ftz && bits & 0x7C00 == 0 && H::get(0x0400) > 1e-5 { 0f32.copysign(v) } else { v }
    };
    let finish = |bits: u16| {
        let v = H::get(bits);
        if sat {
            return H::put(saturate(v));
        }
        if relu && v < 0.0 { 0 } else { bits }
    };
    let both =
        |w: u32, g: &dyn Fn(u16) -> u16| g(w as u16) as u32 | if pair { (g((w >> 16) as u16) as u32) << 16 } else { 0 };
    let both2 = |a: u32, b: u32, g: &dyn Fn(u16, u16) -> u16| {
        g(a as u16, b as u16) as u32 | if pair { (g((a >> 16) as u16, (b >> 16) as u16) as u32) << 16 } else { 0 }
    };
    macro_rules! two {
        (|$a:ident, $b:ident| $e:expr) => {
            on.two(i, |x: u32, y: u32| {
                both2(x, y, &|p, q| {
                    let ($a, $b) = (get(p), get(q));
                    finish(H::put($e))
                })
            })
        };
    }
    match i.op {
        Add => two!(|a, b| a + b),
        Sub => two!(|a, b| a - b),
        Mul => two!(|a, b| a * b),
        Min => two!(|a, b| min(a, b, nan)),
        Max => two!(|a, b| max(a, b, nan)),
        Mad => on.three(i, |x: u32, y: u32, z: u32| {
            let one = |p: u16, q: u16, r: u16| {
                let exact = float::add_odd(get(p) as f64 * get(q) as f64, get(r) as f64);
                finish(H::put64(exact))
            };
            let high = |w: u32| (w >> 16) as u16;
            one(x as u16, y as u16, z as u16) as u32
                | if pair { (one(high(x), high(y), high(z)) as u32) << 16 } else { 0 }
        }),
        Abs => on.one(i.d, i.a, |x: u32| both(x, &|p| p & 0x7FFF)),
        Neg => on.one(i.d, i.a, |x: u32| both(x, &|p| p ^ 0x8000)),
        Ex2 => on.slow(i.d, i.a, |x: u32| both(x, &|p| H::put(float::exp2(get(p))))),
        Tanh => on.slow(i.d, i.a, |x: u32| both(x, &|p| H::put((get(p) as f64).tanh() as f32))),
        _ => unreachable!("the decoder lets no {:?} of half floats through", i.op),
    }
}
