//! Conversions, comparisons, selections and the other lane-wise instructions that are not arithmetic.
use super::alu::{On, Word};
use super::float::{self, Bf16, F16, Half, flush, round_to};
use super::instr::{ALWAYS, CARRY, Cmp, Compare, Logic, Op, Row, Ty, flag};
use super::warp::Registers;

#[inline(always)]
unsafe fn load<T: Word>(base: *mut u32, row: Row) -> [T; 32] {
    // SAFETY: the caller's promise.
    unsafe { T::load(base, row) }
}

#[inline(always)]
fn bits_where<T: Copy>(a: &[T; 32], b: &[T; 32], f: impl Fn(T, T) -> bool) -> u32 {
    let mut hits = [0u32; 32];
    for l in 0..32 {
        hits[l] = (f(a[l], b[l]) as u32) << l;
    }
    hits.iter().fold(0, |m, h| m | h)
}

// `x != y` would hold for NaN, and "less or greater" does not.
#[allow(clippy::double_comparisons)]
#[inline(always)]
fn ordered<T: PartialOrd + Copy>(cmp: Cmp, a: &[T; 32], b: &[T; 32]) -> u32 {
    match cmp {
        Cmp::Eq => bits_where(a, b, |x, y| x == y),
        Cmp::Ne => bits_where(a, b, |x, y| x < y || x > y),
        Cmp::Lt => bits_where(a, b, |x, y| x < y),
        Cmp::Le => bits_where(a, b, |x, y| x <= y),
        Cmp::Gt => bits_where(a, b, |x, y| x > y),
        Cmp::Ge => bits_where(a, b, |x, y| x >= y),
        // The unordered ones are the opposites' complements.
        Cmp::Equ => !bits_where(a, b, |x, y| x < y || x > y),
        Cmp::Neu => !bits_where(a, b, |x, y| x == y),
        Cmp::Ltu => !bits_where(a, b, |x, y| x >= y),
        Cmp::Leu => !bits_where(a, b, |x, y| x > y),
        Cmp::Gtu => !bits_where(a, b, |x, y| x <= y),
        Cmp::Geu => !bits_where(a, b, |x, y| x < y),
        Cmp::Num => bits_where(a, b, |x, y| x <= y || x >= y),
        Cmp::Nan => !bits_where(a, b, |x, y| x <= y || x >= y),
    }
}

/// Lanes where a comparison holds; for packed types those of the low half, and then of the high half.
fn compare(c: &Compare, base: *mut u32) -> (u32, u32) {
    macro_rules! of {
        ($t:ty) => {{
            // SAFETY: rows of the file.
            let (a, b): ([$t; 32], [$t; 32]) = unsafe { (load(base, c.a), load(base, c.b)) };
            ordered(c.cmp, &a, &b)
        }};
    }
    macro_rules! halves {
        ($h:ty, $shift:expr) => {{
            // SAFETY: rows of the file.
            let (a, b): ([u32; 32], [u32; 32]) = unsafe { (load(base, c.a), load(base, c.b)) };
            let get = |w: u32| <$h>::get((w >> $shift) as u16);
            ordered(c.cmp, &a.map(get), &b.map(get))
        }};
    }
    let low = match c.ty {
        Ty::U8 | Ty::U16 => of!(u16),
        Ty::S8 | Ty::S16 => of!(i16),
        Ty::U64 => of!(u64),
        Ty::S32 => of!(i32),
        Ty::S64 => of!(i64),
        Ty::F32 if c.flags & flag::FTZ != 0 => {
            // SAFETY: rows of the file.
            let (a, b): ([f32; 32], [f32; 32]) = unsafe { (load(base, c.a), load(base, c.b)) };
            ordered(c.cmp, &a.map(flush), &b.map(flush))
        }
        Ty::F32 => of!(f32),
        Ty::F64 => of!(f64),
        Ty::F16 | Ty::F16x2 => halves!(F16, 0),
        Ty::BF16 | Ty::BF16x2 => halves!(Bf16, 0),
        _ => of!(u32),
    };
    let high = match c.ty {
        Ty::F16x2 => halves!(F16, 16),
        Ty::BF16x2 => halves!(Bf16, 16),
        _ => !low,
    };
    (low, high)
}

#[inline(always)]
fn combine(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
        Logic::First => a,
    }
}

/// Runs one of the instructions of this file; false if it is another's.
#[inline]
pub fn run(op: &Op, regs: &mut Registers, mask: u32) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            // SAFETY: the features were detected.
            return unsafe { run_avx2(op, regs, mask) };
        }
    }
    body(op, regs, mask)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
unsafe fn run_avx2(op: &Op, regs: &mut Registers, mask: u32) -> bool {
    body(op, regs, mask)
}

#[inline(always)]
fn body(op: &Op, regs: &mut Registers, mask: u32) -> bool {
    let base = regs.base();
    let on = On { base, mask };
    match op {
        Op::Mov32 { d, a } => on.one(*d, *a, |v: u32| v),
        Op::Mov64 { d, a } => on.one(*d, *a, |v: u64| v),
        Op::Mov128 { d, a } => {
            // Two 64-bit rows side by side are not two halves of a lane, but moving all 512 bytes is right when all
            // lanes are; else lane by lane.
            // SAFETY: rows of the file.
            unsafe {
                let (from, to) = (base.add(*a as usize * 32).cast::<u128>(), base.add(*d as usize * 32).cast::<u128>());
                (0..32).filter(|l| mask >> l & 1 != 0).for_each(|l| *to.add(l) = *from.add(l));
            }
        }
        Op::Pack { d, parts, bits } => pack(base, *d, parts, *bits, mask),
        Op::Unpack { a, parts, bits } => unpack(base, *a, parts, *bits, mask),
        Op::Cvt { d, a, from, to, flags } => convert(on, *d, *a, *from, *to, *flags),
        Op::CvtPack { d, a, b, to, flags } => convert_pack(on, *d, *a, *b, *to, *flags),
        Op::Setp { how, d, d2 } => {
            let c = regs.pred(how.c);
            let (low, high) = compare(how, base);
            regs.set_pred(*d, mask, combine(how.logic, low, c));
            if *d2 != ALWAYS {
                regs.set_pred(*d2, mask, combine(how.logic, high, c));
            }
        }
        Op::Set { how, d, one } => {
            let c = regs.pred(how.c);
            let (low, high) = compare(how, base);
            let (low, high) = (combine(how.logic, low, c), combine(how.logic, high, c));
            let packed = matches!(how.ty, Ty::F16x2 | Ty::BF16x2);
            let out: [u32; 32] = std::array::from_fn(|l| {
                let of = |bits: u32| if bits >> l & 1 != 0 { *one } else { 0 };
                of(low) | if packed { of(high) << 16 } else { 0 }
            });
            // SAFETY: a row of the file.
            unsafe { u32::store(base, *d, mask, &out) };
        }
        Op::Selp { bits, d, a, b, p } => {
            let p = regs.pred(*p);
            // SAFETY: rows of the file.
            unsafe {
                if *bits == 64 {
                    let (a, b): ([u64; 32], [u64; 32]) = (load(base, *a), load(base, *b));
                    u64::store(base, *d, mask, &std::array::from_fn(|l| if p >> l & 1 != 0 { a[l] } else { b[l] }));
                } else {
                    let (a, b): ([u32; 32], [u32; 32]) = (load(base, *a), load(base, *b));
                    u32::store(base, *d, mask, &std::array::from_fn(|l| if p >> l & 1 != 0 { a[l] } else { b[l] }));
                }
            }
        }
        Op::Slct { bits, d, a, b, c, float } => {
            // SAFETY: rows of the file.
            unsafe {
                let c: [u32; 32] = load(base, *c);
                let first = c.map(|v| if *float { f32::from_bits(v) >= 0.0 } else { v as i32 >= 0 });
                if *bits == 64 {
                    let (a, b): ([u64; 32], [u64; 32]) = (load(base, *a), load(base, *b));
                    u64::store(base, *d, mask, &std::array::from_fn(|l| if first[l] { a[l] } else { b[l] }));
                } else {
                    let (a, b): ([u32; 32], [u32; 32]) = (load(base, *a), load(base, *b));
                    u32::store(base, *d, mask, &std::array::from_fn(|l| if first[l] { a[l] } else { b[l] }));
                }
            }
        }
        Op::PredLogic { logic, d, a, b } => {
            let value = combine(*logic, regs.pred(*a), regs.pred(*b));
            regs.set_pred(*d, mask, value);
        }
        Op::Testp { d, a, ty, what } => {
            let test = |v: f64, normal: bool| match what {
                0 => v.is_finite(),
                1 => v.is_infinite(),
                2 => !v.is_nan(),
                3 => v.is_nan(),
                4 => normal,
                _ => v != 0.0 && v.is_finite() && !normal,
            };
            let mut value = 0;
            for l in 0..32 {
                let hit = if *ty == Ty::F64 {
                    let v = f64::from_bits(regs.get64(*a, l));
                    test(v, v.is_normal())
                } else {
                    let v = f32::from_bits(regs.get32(*a, l));
                    test(v as f64, v.is_normal())
                };
                value |= (hit as u32) << l;
            }
            regs.set_pred(*d, mask, value);
        }
        Op::Carry { sub, ty, carry_in, carry_out, d, a, b } => {
            let mut carry = regs.pred(CARRY);
            for l in (0..32).filter(|l| mask >> l & 1 != 0) {
                let c = (*carry_in && carry >> l & 1 != 0) as u64;
                let out = if ty.bits() == 64 {
                    let (a, b) = (regs.get64(*a, l), regs.get64(*b, l));
                    let (r, o1) = if *sub { a.overflowing_sub(b) } else { a.overflowing_add(b) };
                    let (r, o2) = if *sub { r.overflowing_sub(c) } else { r.overflowing_add(c) };
                    regs.set64(*d, l, r);
                    o1 | o2
                } else {
                    let (a, b, c) = (regs.get32(*a, l), regs.get32(*b, l), c as u32);
                    let (r, o1) = if *sub { a.overflowing_sub(b) } else { a.overflowing_add(b) };
                    let (r, o2) = if *sub { r.overflowing_sub(c) } else { r.overflowing_add(c) };
                    regs.set32(*d, l, r);
                    o1 | o2
                };
                carry = carry & !(1 << l) | (out as u32) << l;
            }
            if *carry_out {
                regs.set_pred(CARRY, mask, carry);
            }
        }
        Op::MadCarry { high, ty, carry_in, carry_out, d, a, b, c } => {
            let mut carry = regs.pred(CARRY);
            for l in (0..32).filter(|l| mask >> l & 1 != 0) {
                let cin = *carry_in && carry >> l & 1 != 0;
                let out = if ty.bits() == 64 {
                    let (x, y) = (regs.get64(*a, l), regs.get64(*b, l));
                    let p = if *ty == Ty::S64 {
                        (x as i64 as i128 * y as i64 as i128) as u128
                    } else {
                        x as u128 * y as u128
                    };
                    let (r, o1) = (if *high { (p >> 64) as u64 } else { p as u64 }).overflowing_add(regs.get64(*c, l));
                    let (r, o2) = r.overflowing_add(cin as u64);
                    regs.set64(*d, l, r);
                    o1 | o2
                } else {
                    let (x, y) = (regs.get32(*a, l), regs.get32(*b, l));
                    let p =
                        if *ty == Ty::S32 { (x as i32 as i64 * y as i32 as i64) as u64 } else { x as u64 * y as u64 };
                    let (r, o1) = (if *high { (p >> 32) as u32 } else { p as u32 }).overflowing_add(regs.get32(*c, l));
                    let (r, o2) = r.overflowing_add(cin as u32);
                    regs.set32(*d, l, r);
                    o1 | o2
                };
                carry = carry & !(1 << l) | (out as u32) << l;
            }
            if *carry_out {
                regs.set_pred(CARRY, mask, carry);
            }
        }
        _ => return false,
    }
    true
}

#[inline(always)]
fn pack(base: *mut u32, d: Row, parts: &[Row], bits: u32, mask: u32) {
    // SAFETY: rows of the file.
    unsafe {
        match (bits, parts) {
            (32, [lo, hi]) => {
                let (lo, hi): ([u32; 32], [u32; 32]) = (load(base, *lo), load(base, *hi));
                u64::store(base, d, mask, &std::array::from_fn(|l| (hi[l] as u64) << 32 | lo[l] as u64));
            }
            (16, [lo, hi]) => {
                let (lo, hi): ([u16; 32], [u16; 32]) = (load(base, *lo), load(base, *hi));
                u32::store(base, d, mask, &std::array::from_fn(|l| (hi[l] as u32) << 16 | lo[l] as u32));
            }
            (64, [lo, hi]) => {
                let to = base.add(d as usize * 32).cast::<u128>();
                let (lo, hi): ([u64; 32], [u64; 32]) = (load(base, *lo), load(base, *hi));
                (0..32).filter(|l| mask >> l & 1 != 0).for_each(|l| *to.add(l) = (hi[l] as u128) << 64 | lo[l] as u128);
            }
            _ => {
                let field = (1u64 << bits) - 1;
                let mut out = [0u64; 32];
                for (k, part) in parts.iter().enumerate() {
                    let part: [u32; 32] = load(base, *part);
                    (0..32).for_each(|l| out[l] |= (part[l] as u64 & field) << (bits * k as u32));
                }
                if bits * parts.len() as u32 == 64 {
                    u64::store(base, d, mask, &out);
                } else {
                    u32::store(base, d, mask, &out.map(|v| v as u32));
                }
            }
        }
    }
}

#[inline(always)]
fn unpack(base: *mut u32, a: Row, parts: &[Row], bits: u32, mask: u32) {
    // SAFETY: rows of the file.
    unsafe {
        match (bits, parts) {
            (32, [lo, hi]) => {
                let a: [u64; 32] = load(base, a);
                u32::store(base, *lo, mask, &a.map(|v| v as u32));
                u32::store(base, *hi, mask, &a.map(|v| (v >> 32) as u32));
            }
            (16, [lo, hi]) => {
                let a: [u32; 32] = load(base, a);
                u16::store(base, *lo, mask, &a.map(|v| v as u16));
                u16::store(base, *hi, mask, &a.map(|v| (v >> 16) as u16));
            }
            (64, [lo, hi]) => {
                let from = *base.add(a as usize * 32).cast::<[u128; 32]>();
                u64::store(base, *lo, mask, &from.map(|v| v as u64));
                u64::store(base, *hi, mask, &from.map(|v| (v >> 64) as u64));
            }
            _ => {
                let wide = bits * parts.len() as u32 == 64;
                let from: [u64; 32] = if wide { load(base, a) } else { load::<u32>(base, a).map(|v| v as u64) };
                let field = (1u64 << bits) - 1;
                for (k, part) in parts.iter().enumerate() {
                    u32::store(base, *part, mask, &from.map(|v| (v >> (bits * k as u32) & field) as u32));
                }
            }
        }
    }
}

/// An integer lane of type `ty` out of a register, extended to 64 bits.
#[inline(always)]
fn integer_get(v: u64, ty: Ty) -> i64 {
    match ty {
        Ty::U8 => v as u8 as i64,
        Ty::S8 => v as i8 as i64,
        Ty::U16 => v as u16 as i64,
        Ty::S16 => v as i16 as i64,
        Ty::U32 => v as u32 as i64,
        Ty::S32 => v as i32 as i64,
        _ => v as i64,
    }
}

#[inline(always)]
fn convert(on: On, d: Row, a: Row, from: Ty, to: Ty, flags: u16) {
    let ftz = flags & flag::FTZ != 0;
    match (to, from) {
        // The common ones first, in loops that vectorise.
        (Ty::F32, Ty::S32) if flags & flag::ROUND == 0 => on.one(d, a, |v: i32| v as f32),
        (Ty::F32, Ty::U32) if flags & flag::ROUND == 0 => on.one(d, a, |v: u32| v as f32),
        (Ty::U64, Ty::U32) => on.one(d, a, |v: u32| v as u64),
        (Ty::S64, Ty::S32) => on.one(d, a, |v: i32| v as i64),
        (Ty::U32 | Ty::S32, Ty::U64 | Ty::S64) if flags & flag::SAT == 0 => on.one(d, a, |v: u64| v as u32),
        (Ty::F32, Ty::BF16) => on.one(d, a, |v: u32| v << 16),
        (Ty::F32, Ty::F16) => on.one(d, a, |v: u16| F16::get(v)),
        (Ty::BF16, Ty::F32) if flags == 0 => on.one(d, a, |v: f32| Bf16::put(v)),
        (Ty::F16, Ty::F32) if flags == 0 => on.one(d, a, |v: f32| F16::put(v)),
        (Ty::F16x2, Ty::E4m3x2 | Ty::E5m2x2) => on.slow(d, a, |v: u32| {
            let get = |b: u8| if from == Ty::E4m3x2 { float::e4m3_get(b) } else { float::e5m2_get(b) };
            (F16::put(get((v >> 8) as u8)) as u32) << 16 | F16::put(get(v as u8)) as u32
        }),
        _ => {
            let wide_in = from.bits() == 64;
            for l in (0..32).filter(|l| on.mask >> l & 1 != 0) {
                // SAFETY: rows of the file.
                unsafe {
                    let v = if wide_in {
                        *on.base.add(a as usize * 32).cast::<u64>().add(l)
                    } else {
                        *on.base.add(a as usize * 32 + l) as u64
                    };
                    let r = convert_one(v, from, to, flags, ftz);
                    if to.bits() == 64 {
                        *on.base.add(d as usize * 32).cast::<u64>().add(l) = r;
                    } else {
                        *on.base.add(d as usize * 32 + l) = r as u32;
                    }
                }
            }
        }
    }
}

/// Any conversion of one lane.
fn convert_one(v: u64, from: Ty, to: Ty, flags: u16, ftz: bool) -> u64 {
    let sat = flags & flag::SAT != 0;
    if !from.is_float() && !to.is_float() {
        let x = integer_get(v, from);
        // A value of u64 above i64's range only saturates downwards.
        let x = if !sat {
            x
        } else {
            let x = if from == Ty::U64 { x as u64 as i128 } else { x as i128 };
            let (low, high) = integer_range(to);
            x.clamp(low, high) as i64
        };
        return integer_put(x, to);
    }
    if !from.is_float() {
        // Exact in i128, then one rounding.
        let x = if from == Ty::U64 { v as i128 } else { integer_get(v, from) as i128 };
        return match to {
            Ty::F64 => (x as f64).to_bits(),
            Ty::F32 if flags & flag::ROUND == 0 => (x as f32).to_bits() as u64,
            // A double holds the nearest value; make it sticky where it is not exact.
            _ => float_put(sticky(x), to, flags),
        };
    }
    let x = match from {
        Ty::F32 => {
            let x = f32::from_bits(v as u32);
            (if ftz { flush(x) } else { x }) as f64
        }
        Ty::F64 => f64::from_bits(v),
        Ty::F16 => F16::get(v as u16) as f64,
        _ => Bf16::get(v as u16) as f64,
    };
    let integral = |x: f64| match flags & flag::ROUND {
        flag::RZ => x.trunc(),
        flag::RM => x.floor(),
        flag::RP => x.ceil(),
        _ => x.round_ties_even(),
    };
    if !to.is_float() {
        let (low, high) = integer_range(to);
        if x.is_nan() {
            // The hardware's answer: zero for narrow results, the top bit for 64 bits.
            return if to.bits() == 64 { 1 << 63 } else { 0 };
        }
        return integer_put((integral(x) as i128).clamp(low, high) as i64, to);
    }
    let x = if flags & flag::INTEGRAL != 0 { integral(x).copysign(x) } else { x };
    let flags = if flags & flag::INTEGRAL != 0 { flags & !flag::ROUND } else { flags };
    let r = float_put(x, to, flags);
    if ftz && to == Ty::F32 { flush(f32::from_bits(r as u32)).to_bits() as u64 } else { r }
}

fn sticky(x: i128) -> f64 {
    let near = x as f64;
    let back = near as i128;
    if back == x || near.to_bits() & 1 == 1 {
        return near;
    }
    let away = (x > back) == (near > 0.0);
    f64::from_bits(if away { near.to_bits() + 1 } else { near.to_bits() - 1 })
}

fn integer_range(to: Ty) -> (i128, i128) {
    let n = to.bits();
    if to.is_signed() { (-(1i128 << (n - 1)), (1i128 << (n - 1)) - 1) } else { (0, (1i128 << n) - 1) }
}

/// Narrow results are extended by their type to fill a 32-bit register.
fn integer_put(x: i64, to: Ty) -> u64 {
    match to {
        Ty::U8 => x as u8 as u64,
        Ty::S8 => x as i8 as i32 as u32 as u64,
        Ty::U16 | Ty::S16 => x as u16 as u64,
        Ty::U32 | Ty::S32 => x as u32 as u64,
        _ => x as u64,
    }
}

fn float_put(x: f64, to: Ty, flags: u16) -> u64 {
    let x = if flags & flag::SAT != 0 { if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) } } else { x };
    let relu = flags & flag::RELU != 0;
    let x = if relu && x < 0.0 { 0.0 } else { x };
    match to {
        Ty::F64 => x.to_bits(),
        Ty::F32 if x.is_nan() => 0x7FFF_FFFF,
        Ty::F32 => round_to(x, float::F32, flags).to_bits() as u64,
        Ty::Tf32 if x.is_nan() => 0x7FFF_FFFF,
        Ty::Tf32 => {
            // tf32 from an f32: subnormals keep their (few) bits.
            round_to(x, float::TF32, flags).to_bits() as u64
        }
        Ty::F16 if x.is_nan() => 0x7FFF,
        Ty::F16 => half::f16::from_f32(round_to(x, float::FP16, flags)).to_bits() as u64,
        _ if x.is_nan() => 0x7FFF,
        _ => (round_to(x, float::BF16, flags).to_bits() >> 16) as u64,
    }
}

#[inline(always)]
fn convert_pack(on: On, d: Row, a: Row, b: Row, to: Ty, flags: u16) {
    // SAFETY: rows of the file.
    unsafe {
        let (a, b): ([f32; 32], [f32; 32]) = (load(on.base, a), load(on.base, b));
        let out: [u32; 32] = match to {
            Ty::BF16x2 if flags == 0 => {
                std::array::from_fn(|l| (Bf16::put(a[l]) as u32) << 16 | Bf16::put(b[l]) as u32)
            }
            Ty::F16x2 if flags == 0 => std::array::from_fn(|l| (F16::put(a[l]) as u32) << 16 | F16::put(b[l]) as u32),
            Ty::BF16x2 | Ty::F16x2 => {
                let one = if to == Ty::F16x2 { Ty::F16 } else { Ty::BF16 };
                std::array::from_fn(|l| {
                    (float_put(a[l] as f64, one, flags) as u32) << 16 | float_put(b[l] as f64, one, flags) as u32
                })
            }
            _ => {
                let put = |v: f32| {
                    let v = if flags & flag::RELU != 0 && v < 0.0 { 0.0 } else { v };
                    (if to == Ty::E4m3x2 { float::e4m3_put(v) } else { float::e5m2_put(v) }) as u32
                };
                std::array::from_fn(|l| put(a[l]) << 8 | put(b[l]))
            }
        };
        if to.bits() == 16 {
            u16::store(on.base, d, on.mask, &out.map(|v| v as u16));
        } else {
            u32::store(on.base, d, on.mask, &out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ordered comparisons do not hold for NaN, unordered ones do.
    #[test]
    fn comparisons_of_less_equal_greater_and_nan() {
        let pairs = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0), (f32::NAN, 2.0)];
        let (mut a, mut b) = ([0.0; 32], [0.0; 32]);
        for (lane, (x, y)) in pairs.into_iter().enumerate() {
            (a[lane], b[lane]) = (x, y);
        }
        for (cmp, holds) in [
            (Cmp::Eq, 0b0010),
            (Cmp::Ne, 0b0101),
            (Cmp::Lt, 0b0001),
            (Cmp::Le, 0b0011),
            (Cmp::Gt, 0b0100),
            (Cmp::Ge, 0b0110),
            (Cmp::Equ, 0b1010),
            (Cmp::Neu, 0b1101),
            (Cmp::Ltu, 0b1001),
            (Cmp::Leu, 0b1011),
            (Cmp::Gtu, 0b1100),
            (Cmp::Geu, 0b1110),
            (Cmp::Num, 0b0111),
            (Cmp::Nan, 0b1000),
        ] {
            assert_eq!(ordered(cmp, &a, &b) & 0b1111, holds, "{cmp:?}");
        }
    }
}
