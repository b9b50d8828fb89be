//! Decoding of moves, arithmetic, logic, comparisons and conversions.
use super::decode::{Decoder, Opcode, Symbol};
use super::instr::{ALWAYS, Alu, AluOp, ClockKind, Cmp, Compare, Logic, Op, Ty, flag};
use crate::ptx::Operand;

/// Operands by count, or an error that says how many are needed.
pub(super) fn exactly<const N: usize>(o: &[Operand]) -> Result<&[Operand; N], String> {
    o.try_into().map_err(|_| format!("{N} operands are needed, found {}", o.len()))
}

pub(super) fn rounding(op: &mut Opcode) -> u16 {
    match op.one_of(&["rn", "rz", "rm", "rp"]) {
        Some("rz") => flag::RZ,
        Some("rm") => flag::RM,
        Some("rp") => flag::RP,
        _ => flag::RN,
    }
}

fn common_flags(op: &mut Opcode) -> u16 {
    let mut flags = 0;
    for (word, bit) in [
        ("ftz", flag::FTZ),
        ("sat", flag::SAT),
        ("NaN", flag::NAN),
        ("relu", flag::RELU),
        ("satfinite", flag::SATFINITE),
        ("approx", flag::APPROX),
        ("full", flag::APPROX),
    ] {
        if op.has(word) {
            flags |= bit;
        }
    }
    if op.has("xorsign") && op.has("abs") {
        flags |= flag::XORSIGN_ABS;
    }
    flags
}

impl Decoder<'_> {
    pub(super) fn decode_alu(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Option<Op>, String> {
        Ok(Some(match op.name() {
            "mov" => self.mov(op, o)?,
            "cvt" => self.cvt(op, o)?,
            "setp" => self.setp(op, o)?,
            "set" => self.set(op, o)?,
            "selp" => {
                let bits = op.ty()?.bits().max(16);
                let [d, a, b, p] = exactly(o)?;
                Op::Selp { bits, d: self.dst(d, bits)?, a: self.src(a, bits)?, b: self.src(b, bits)?, p: self.pred(p)? }
            }
            "slct" => {
                op.has("ftz");
                let bits = op.ty()?.bits();
                let float = op.ty()? == Ty::F32;
                let [d, a, b, c] = exactly(o)?;
                Op::Slct {
                    bits,
                    d: self.dst(d, bits)?,
                    a: self.src(a, bits)?,
                    b: self.src(b, bits)?,
                    c: self.src32(c)?,
                    float,
                }
            }
            "testp" => {
                let words = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"];
                let word = op.one_of(&words).ok_or("unknown test")?;
                let what = words.iter().position(|w| *w == word).unwrap_or(0) as u8;
                let ty = op.ty()?;
                let [d, a] = exactly(o)?;
                Op::Testp { d: self.pred(d)?, a: self.src(a, ty.bits())?, ty, what }
            }
            "and" | "or" | "xor" | "not" if op.parts.get(1) == Some(&"pred") => {
                op.has("pred");
                if op.name() == "not" {
                    let [d, a] = exactly(o)?;
                    return Ok(Some(Op::PredLogic {
                        logic: Logic::First,
                        d: self.pred(d)?,
                        a: self.pred(a)? ^ 1,
                        b: ALWAYS,
                    }));
                }
                let logic = logic(op.name())?;
                let [d, a, b] = exactly(o)?;
                Op::PredLogic { logic, d: self.pred(d)?, a: self.pred(a)?, b: self.pred(b)? }
            }
            "add" | "sub" | "addc" | "subc" | "mad" | "madc" if self.carries(op) => self.with_carry(op, o)?,
            _ => return self.plain(op, o),
        }))
    }

    fn carries(&self, op: &Opcode) -> bool {
        op.name().ends_with('c') || op.parts.contains(&"cc")
    }

    fn with_carry(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let carry_in = op.name().ends_with('c');
        let carry_out = op.has("cc");
        let high = op.has("hi");
        op.has("lo");
        let ty = op.ty()?;
        let bits = ty.bits();
        if op.name().starts_with("mad") {
            let [d, a, b, c] = exactly(o)?;
            let (d, a, b, c) = (self.dst(d, bits)?, self.src(a, bits)?, self.src(b, bits)?, self.src(c, bits)?);
            return Ok(Op::MadCarry { high, ty, carry_in, carry_out, d, a, b, c });
        }
        let sub = op.name().starts_with("sub");
        let [d, a, b] = exactly(o)?;
        Ok(Op::Carry {
            sub,
            ty,
            carry_in,
            carry_out,
            d: self.dst(d, bits)?,
            a: self.src(a, bits)?,
            b: self.src(b, bits)?,
        })
    }

    fn mov(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let ty = op.ty()?;
        let [d, a] = exactly(o)?;
        if ty == Ty::Pred {
            return Ok(Op::PredLogic { logic: Logic::First, d: self.pred(d)?, a: self.pred(a)?, b: ALWAYS });
        }
        let bits = ty.bits();
        if let Operand::Vector(parts) = a {
            let each = bits / parts.len().max(1) as u32;
            let parts: Result<Box<[_]>, String> = parts.iter().map(|p| self.src(p, each)).collect();
            return Ok(Op::Pack { d: self.dst(d, bits)?, parts: parts?, bits: each });
        }
        if let Operand::Vector(parts) = d {
            let each = bits / parts.len().max(1) as u32;
            let a = self.src(a, bits)?;
            let parts: Result<Box<[_]>, String> = parts.iter().map(|p| self.dst(p, each)).collect();
            return Ok(Op::Unpack { a, parts: parts?, bits: each });
        }
        if let Some(kind) = Decoder::clock(a) {
            let wide = matches!(kind, ClockKind::Full | ClockKind::Nanoseconds);
            return Ok(Op::Clock { d: self.dst(d, if wide { 64 } else { 32 })?, kind });
        }
        if let (Operand::Name(name), 64) = (a, bits) {
            // A kernel parameter's address, or a 32-bit special register in a 64-bit register.
            if let Some(Symbol::Param(_)) = self.find(name) {
                return Ok(Op::Mov64 { d: self.dst64(d)?, a: self.src64(a)? });
            }
        }
        Ok(match bits {
            64 => Op::Mov64 { d: self.dst(d, 64)?, a: self.src(a, 64)? },
            128 => Op::Mov128 { d: self.dst(d, 128)?, a: self.src(a, 128)? },
            _ => Op::Mov32 { d: self.dst(d, bits)?, a: self.src(a, bits)? },
        })
    }

    fn cvt(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let mut flags = 0;
        if op.has("pack") {
            return Err("cvt.pack is not supported".into());
        }
        match op.one_of(&["rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"]) {
            Some("rz") => flags |= flag::RZ,
            Some("rm") => flags |= flag::RM,
            Some("rp") => flags |= flag::RP,
            Some("rna") => flags |= flag::RNA,
            Some("rni") => flags |= flag::INTEGRAL,
            Some("rzi") => flags |= flag::INTEGRAL | flag::RZ,
            Some("rmi") => flags |= flag::INTEGRAL | flag::RM,
            Some("rpi") => flags |= flag::INTEGRAL | flag::RP,
            _ => {}
        }
        flags |= common_flags(op);
        let (to, from) = (op.ty()?, op.ty()?);
        if let [d, a, b] = o {
            if from != Ty::F32 || !matches!(to, Ty::F16x2 | Ty::BF16x2 | Ty::E4m3x2 | Ty::E5m2x2) {
                return Err("this packing conversion is not supported".into());
            }
            return Ok(Op::CvtPack { d: self.dst(d, to.bits())?, a: self.src32(a)?, b: self.src32(b)?, to, flags });
        }
        let [d, a] = exactly(o)?;
        // Registers may be wider than an integer type: the low bits count, and results fill the register.
        let from_bits = self.register_bits(a).filter(|_| !from.is_float()).unwrap_or(from.bits().max(16));
        let to_bits = self.register_bits(d).filter(|_| !to.is_float()).unwrap_or(to.bits().max(16));
        if matches!((to, from), (Ty::F16x2, Ty::E4m3x2 | Ty::E5m2x2)) {
            return Ok(Op::Cvt { d: self.dst32(d)?, a: self.src(a, 16)?, from, to, flags });
        }
        let (d, mut a) = (self.dst(d, to_bits)?, self.src(a, from_bits)?);
        if from_bits == 64 && from.bits() <= 32 {
            let low = self.new_row(32);
            self.emit(Op::Cvt { d: low, a, from: Ty::U64, to: Ty::U32, flags: 0 });
            a = low;
        }
        if to_bits == 64 && to.bits() <= 32 {
            let low = self.new_row(32);
            self.emit(Op::Cvt { d: low, a, from, to, flags });
            let (from, to) = if to.is_signed() { (Ty::S32, Ty::S64) } else { (Ty::U32, Ty::U64) };
            return Ok(Op::Cvt { d, a: low, from, to, flags: 0 });
        }
        Ok(Op::Cvt { d, a, from, to, flags })
    }

    fn compare(&mut self, op: &mut Opcode) -> Result<(Cmp, Logic, u16), String> {
        let word = op.take(|p| comparison(p).is_some()).ok_or("unknown comparison")?;
        let logic = match op.one_of(&["and", "or", "xor"]) {
            Some(word) => logic(word)?,
            None => Logic::First,
        };
        let flags = if op.has("ftz") { flag::FTZ } else { 0 };
        // lo, ls, hi, hs are unsigned comparisons of integers.
        Ok((comparison(word).ok_or("unknown comparison")?, logic, flags))
    }

    fn setp(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let (cmp, logic, flags) = self.compare(op)?;
        let ty = op.ty()?;
        let (d, d2) = match o.first() {
            Some(Operand::Pair(a, b)) => (self.pred(a)?, self.pred(b)?),
            Some(d) => (self.pred(d)?, ALWAYS),
            None => return Err("operands are missing".into()),
        };
        let how = self.compared(cmp, ty, flags, logic, &o[1..])?;
        Ok(Op::Setp { how, d, d2 })
    }

    fn compared(&mut self, cmp: Cmp, ty: Ty, flags: u16, logic: Logic, o: &[Operand]) -> Result<Compare, String> {
        let (a, b, c) = match (o, logic) {
            ([a, b], Logic::First) => (a, b, ALWAYS),
            ([a, b, c], Logic::And | Logic::Or | Logic::Xor) => (a, b, self.pred(c)?),
            _ => return Err("wrong number of operands".into()),
        };
        Ok(Compare { cmp, ty, flags, a: self.src(a, ty.bits())?, b: self.src(b, ty.bits())?, logic, c })
    }

    fn set(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let (cmp, logic, flags) = self.compare(op)?;
        let (to, ty) = (op.ty()?, op.ty()?);
        let packed = matches!(ty, Ty::F16x2 | Ty::BF16x2);
        let ok = matches!(to, Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::F16 | Ty::BF16) || to == ty;
        if !ok || packed && to.bits() != 32 || packed && to == Ty::F32 {
            return Err("this form of set is not supported".into());
        }
        let how = self.compared(cmp, ty, flags, logic, o.get(1..).unwrap_or(&[]))?;
        // What true is in (the low half of) the destination.
        let one = match to {
            Ty::F32 => 0x3F80_0000,
            Ty::F16 | Ty::F16x2 => 0x3C00,
            Ty::BF16 | Ty::BF16x2 => 0x3F80,
            Ty::U16 | Ty::S16 => 0xFFFF,
            _ if packed => 0xFFFF,
            _ => !0,
        };
        Ok(Op::Set { how, d: self.dst(&o[0], to.bits())?, one })
    }

    /// One destination, one to three sources, all of the instruction's type.
    fn plain(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Option<Op>, String> {
        use AluOp::*;
        let name = op.name();
        let (kind, sources) = match name {
            "add" => (Add, 2),
            "sub" => (Sub, 2),
            "mul" => (Mul, 2),
            "mad" | "fma" => (Mad, 3),
            "mul24" => (Mul24, 2),
            "mad24" => (Mad24, 3),
            "div" => (Div, 2),
            "rem" => (Rem, 2),
            "abs" => (Abs, 1),
            "neg" => (Neg, 1),
            "min" => (Min, 2),
            "max" => (Max, 2),
            "and" => (And, 2),
            "or" => (Or, 2),
            "xor" => (Xor, 2),
            "not" => (Not, 1),
            "cnot" => (Cnot, 1),
            "shl" => (Shl, 2),
            "shr" => (Shr, 2),
            "sad" => (Sad, 3),
            "popc" => (Popc, 1),
            "clz" => (Clz, 1),
            "brev" => (Brev, 1),
            "bfind" => (Bfind, 1),
            "bfe" => (Bfe, 3),
            "bfi" => (Bfi, 4),
            "lop3" => (Lop3, 3),
            "shf" => (ShfL, 3),
            "prmt" => (Prmt, 3),
            "dp4a" => (Dp4a, 3),
            "rcp" => (Rcp, 1),
            "sqrt" => (Sqrt, 1),
            "rsqrt" => (Rsqrt, 1),
            "sin" => (Sin, 1),
            "cos" => (Cos, 1),
            "lg2" => (Lg2, 1),
            "ex2" => (Ex2, 1),
            "tanh" => (Tanh, 1),
            "copysign" => (Copysign, 2),
            _ => return Ok(None),
        };
        let mut i =
            Alu { op: kind, ty: Ty::U32, flags: rounding(op) | common_flags(op), imm: 0, d: 0, a: 0, b: 0, c: 0 };
        let mut o: Vec<Operand> = o.to_vec();
        match kind {
            Mul | Mad if op.has("wide") => i.op = if kind == Mul { MulWide } else { MadWide },
            Mul | Mad if op.has("hi") => i.op = if kind == Mul { MulHi } else { MadHi },
            Mul | Mad => drop(op.has("lo")),
            Mul24 | Mad24 => {
                if op.has("hi") {
                    return Err("the high form is not supported".into());
                }
                op.has("lo");
            }
            Bfind if op.has("shiftamt") => i.op = BfindShift,
            Lop3 => {
                if o.len() != 5 {
                    return Err("only the form d, a, b, c, table is supported".into());
                }
                i.imm = self.int(&o[4])? as u32 & 0xFF;
                o.truncate(4);
            }
            ShfL => {
                if op.has("r") {
                    i.op = ShfR;
                } else {
                    op.has("l");
                }
                if op.has("clamp") {
                    i.flags |= flag::CLAMP;
                } else {
                    op.has("wrap");
                }
            }
            Prmt => {
                let modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"];
                i.imm = op.one_of(&modes).map_or(0, |m| 1 + modes.iter().position(|x| *x == m).unwrap_or(0) as u32);
            }
            _ => {}
        }
        if i.op == Copysign {
            // PTX gives the sign first.
            o.swap(1, 2);
        }
        i.ty = op.ty()?;
        let mut sources = sources;
        if matches!(kind, Min | Max) && o.len() == 4 {
            i.op = if kind == Min { Min3 } else { Max3 };
            sources = 3;
        }
        if kind == Dp4a {
            let second = op.ty()?;
            i.imm = i.ty.is_signed() as u32 | (second.is_signed() as u32) << 1;
            i.ty = Ty::U32;
        }
        // fma.rn.f32 with f16 inputs and the like would name a second type, which `finish` reports.
        if o.len() != sources + 1 {
            return Err(format!("{} operands are needed, found {}", sources + 1, o.len()));
        }
        let directed = i.flags & flag::ROUND != 0;
        let doubles = i.ty == Ty::F64 && matches!(i.op, Add | Sub | Mul | Div);
        if directed && i.ty != Ty::F32 && i.ty.is_float() && !doubles {
            return Err("only round-to-nearest is supported here".into());
        }
        if directed && i.ty == Ty::F32 && !matches!(i.op, Add | Sub | Mul | Mad | Div | Rcp | Sqrt) {
            return Err("this rounding is not supported here".into());
        }
        let bits = i.ty.bits();
        let mut widths = [bits; 4];
        let mut dst_bits = bits;
        match i.op {
            MulWide => dst_bits = bits * 2,
            MadWide => {
                dst_bits = bits * 2;
                widths[2] = bits * 2;
            }
            Shl | Shr | ShfL | ShfR => widths[if matches!(i.op, Shl | Shr) { 1 } else { 2 }] = 32,
            Popc | Clz | Bfind | BfindShift => dst_bits = 32,
            Bfe => (widths[1], widths[2]) = (32, 32),
            Bfi => (widths[2], widths[3]) = (32, 32),
            _ => {}
        }
        i.d = self.dst(&o[0], dst_bits)?;
        let mut rows = [0; 4];
        for s in 0..sources {
            rows[s] = self.src(&o[s + 1], widths[s])?;
        }
        [i.a, i.b, i.c, _] = rows;
        if i.op == Bfi {
            i.imm = rows[3];
        }
        if !supported(&i) {
            return Err(format!("not supported for {:?}", i.ty));
        }
        Ok(Some(Op::Alu(i)))
    }
}

/// Which operations exist for which types: the interpreter relies on it.
fn supported(i: &Alu) -> bool {
    use AluOp::*;
    let (int, wide_int) = (
        matches!(i.ty, Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64),
        matches!(i.ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64),
    );
    let half = matches!(i.ty, Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2);
    let real = matches!(i.ty, Ty::F32 | Ty::F64);
    let word = matches!(i.ty, Ty::U32 | Ty::S32);
    match i.op {
        Add | Sub | Mul | Mad => int || half || real,
        Div => int || real,
        MulHi | MadHi | Rem | Cnot | Sad => int,
        MulWide | MadWide => matches!(i.ty, Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32),
        Mul24 | Mad24 | ShfL | ShfR | Prmt | Dp4a | Lop3 | Fns | Szext => word,
        Abs | Neg | Min | Max => int || half || real,
        Min3 | Max3 => i.ty == Ty::F32 || word,
        And | Or | Xor | Not | Shl | Shr => int,
        Popc | Clz | Brev | Bfind | BfindShift | Bfe | Bfi => wide_int,
        Rcp | Sqrt | Rsqrt => real,
        Sin | Cos | Lg2 => i.ty == Ty::F32,
        Ex2 | Tanh => i.ty == Ty::F32 || half,
        Copysign => real,
    }
}

fn logic(word: &str) -> Result<Logic, String> {
    Ok(match word {
        "and" => Logic::And,
        "or" => Logic::Or,
        "xor" => Logic::Xor,
        _ => return Err(format!("unknown combination {word}")),
    })
}

fn comparison(word: &str) -> Option<Cmp> {
    Some(match word {
        "eq" => Cmp::Eq,
        "ne" => Cmp::Ne,
        "lt" | "lo" => Cmp::Lt,
        "le" | "ls" => Cmp::Le,
        "gt" | "hi" => Cmp::Gt,
        "ge" | "hs" => Cmp::Ge,
        "equ" => Cmp::Equ,
        "neu" => Cmp::Neu,
        "ltu" => Cmp::Ltu,
        "leu" => Cmp::Leu,
        "gtu" => Cmp::Gtu,
        "geu" => Cmp::Geu,
        "num" => Cmp::Num,
        "nan" => Cmp::Nan,
        _ => return None,
    })
}
