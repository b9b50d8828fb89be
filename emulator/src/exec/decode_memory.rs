//! Decoding of loads, stores, atomics, copies and address conversions.
use super::decode::{Decoder, Opcode, Symbol};
use super::decode_alu::exactly;
use super::instr::{Access, Atom, AtomOp, CpAsync, MatrixMove, Op, Order, Ty, Where, Window};
use crate::ptx::Operand;

const ORDERS: [&str; 7] = ["volatile", "relaxed", "acquire", "release", "acq_rel", "weak", "mmio"];
const SCOPES: [&str; 4] = ["cta", "cluster", "gpu", "sys"];

/// Takes the order and the scope. What orders for the own CTA alone counts as relaxed: between CTAs it is no more.
fn order(op: &mut Opcode, default: Order) -> Order {
    let word = op.one_of(&ORDERS);
    let narrow = op.one_of(&SCOPES) == Some("cta");
    match word {
        None => default,
        Some("weak") => Order::Weak,
        Some("acquire") if !narrow => Order::Acquire,
        Some("release") if !narrow => Order::Release,
        Some("acq_rel") if !narrow => Order::AcquireRelease,
        Some(_) => Order::Relaxed,
    }
}

/// Hints that change speed, not results. Says whether a cache policy operand follows.
fn hints(op: &mut Opcode) -> bool {
    let mut policy = false;
    while let Some(hint) = op.take(|p| p.starts_with("L1::") || p.starts_with("L2::")) {
        policy |= hint == "L2::cache_hint";
    }
    policy
}

/// The state space of a load, store or atomic.
fn place(op: &mut Opcode) -> Where {
    match op.take(|p| matches!(p.split("::").next(), Some("global" | "shared" | "local" | "param" | "const"))) {
        Some(p) if p.starts_with("shared") => Where::Shared,
        Some("local") => Where::Local,
        Some("global" | "const") => Where::Global,
        Some(_) => Where::Param,
        None => Where::Generic,
    }
}

impl Decoder<'_> {
    pub(super) fn decode_memory(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Option<Op>, String> {
        Ok(Some(match op.name() {
            "ld" | "ldu" => Op::Ld(self.access(op, o, true)?),
            "st" => Op::St(self.access(op, o, false)?),
            "atom" | "red" => Op::Atom(self.atom(op, o)?),
            "cvta" => self.cvta(op, o)?,
            "isspacep" => {
                let word = op.take(|p| matches!(p, "global" | "shared" | "local" | "shared::cta" | "shared::cluster"));
                let window = match word.ok_or("this space is not supported")? {
                    "global" => Window::Global,
                    "local" => Window::Local,
                    _ => Window::Shared,
                };
                let [d, a] = exactly(o)?;
                Op::Isspacep { window, d: self.pred(d)?, a: self.src64(a)? }
            }
            "prefetch" | "prefetchu" | "discard" | "applypriority" => {
                while op.take(|_| true).is_some() {}
                Op::Nop
            }
            "createpolicy" => {
                while op.take(|_| true).is_some() {}
                let d = o.first().ok_or("a destination is needed")?;
                Op::Mov64 { d: self.dst64(d)?, a: self.constant64(0) }
            }
            "membar" | "fence" => {
                // Within a cluster everything runs in order on one thread; between clusters this orders the host.
                let wide = !op.parts.contains(&"cta");
                while op.take(|_| true).is_some() {}
                Op::Fence { wide }
            }
            "ldmatrix" | "stmatrix" => self.matrix_move(op, o)?,
            "cp" => self.cp_async(op, o)?,
            _ => return Ok(None),
        }))
    }

    fn access(&mut self, op: &mut Opcode, o: &[Operand], load: bool) -> Result<Box<Access>, String> {
        let mut order = order(op, Order::Weak);
        let mut place = place(op);
        op.has("nc");
        // Cache operators.
        op.one_of(&["ca", "cg", "cs", "lu", "cv", "wb", "wt"]);
        let policy = hints(op);
        let count: usize = op.one_of(&["v2", "v4", "v8"]).map_or(1, |v| v[1..].parse().unwrap_or(1));
        let ty = op.ty()?;
        let wanted = 2 + policy as usize;
        if o.len() != wanted {
            return Err(format!("{wanted} operands are needed, found {}", o.len()));
        }
        let (data, at) = if load { (&o[0], &o[1]) } else { (&o[1], &o[0]) };
        if place == Where::Param {
            place = self.param_place(at)?;
            order = Order::Constant;
        }
        let data = self.elements(data).to_vec();
        if data.len() != count {
            return Err(format!("{count} registers are needed, found {}", data.len()));
        }
        let natural = ty.bits().max(16);
        let reg_bits = data.iter().find_map(|e| self.register_bits(e)).unwrap_or(natural).max(natural);
        let rows: Result<Vec<_>, String> =
            data.iter().map(|e| if load { self.dst(e, reg_bits) } else { self.src(e, reg_bits) }).collect();
        let address = self.address(at)?;
        Ok(Box::new(Access {
            place,
            order,
            width: ty.bits() / 8,
            signed: ty.is_signed(),
            reg_bits,
            data: rows?,
            address,
        }))
    }

    /// `.param` is the kernel's parameters or, in calls, local memory.
    fn param_place(&self, at: &Operand) -> Result<Where, String> {
        let Operand::Address { base, .. } = at else { return Err("an address is needed".into()) };
        match &**base {
            Operand::Name(name) if matches!(self.find(name), Some(Symbol::Local(_))) => Ok(Where::Local),
            _ => Ok(Where::Global),
        }
    }

    fn atom(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Box<Atom>, String> {
        let returns = op.name() == "atom";
        if op.has("async") {
            return Err("red.async is not supported here".into());
        }
        let order = order(op, Order::Relaxed);
        let place = place(op);
        let kind = match op.one_of(&["add", "and", "or", "xor", "exch", "cas", "min", "max", "inc", "dec"]) {
            Some("add") => AtomOp::Add,
            Some("and") => AtomOp::And,
            Some("or") => AtomOp::Or,
            Some("xor") => AtomOp::Xor,
            Some("exch") => AtomOp::Exch,
            Some("cas") => AtomOp::Cas,
            Some("min") => AtomOp::Min,
            Some("max") => AtomOp::Max,
            Some("inc") => AtomOp::Inc,
            Some("dec") => AtomOp::Dec,
            _ => return Err("unknown operation".into()),
        };
        op.has("noftz");
        let policy = hints(op);
        let count: usize = op.one_of(&["v2", "v4", "v8"]).map_or(1, |v| v[1..].parse().unwrap_or(1));
        let ty = op.ty()?;
        let ok = match kind {
            AtomOp::Add => ty != Ty::B128,
            AtomOp::Min | AtomOp::Max => !matches!(ty, Ty::F32 | Ty::F64 | Ty::B128),
            AtomOp::Exch | AtomOp::Cas => ty != Ty::B128,
            _ => matches!(ty, Ty::U32 | Ty::U64 | Ty::S32 | Ty::S64),
        };
        if !ok || ty.bits() < 16 {
            return Err(format!("not supported for {ty:?}"));
        }
        let bits = ty.bits();
        let (dst, rest) = if returns { (o.first(), o.get(1..).unwrap_or(&[])) } else { (None, o) };
        let wanted = 2 + (kind == AtomOp::Cas) as usize + policy as usize;
        if rest.len() != wanted {
            return Err(format!("{wanted} sources are needed, found {}", rest.len()));
        }
        let dst: Result<Vec<_>, String> =
            dst.map_or(vec![], |d| self.elements(d).to_vec()).iter().map(|e| self.dst(e, bits)).collect();
        let src: Result<Vec<_>, String> = self.elements(&rest[1]).to_vec().iter().map(|e| self.src(e, bits)).collect();
        let src = src?;
        if src.len() != count {
            return Err(format!("{count} values are needed, found {}", src.len()));
        }
        let new = if kind == AtomOp::Cas { self.src(&rest[2], bits)? } else { 0 };
        let ftz = ty == Ty::F32 && place != Where::Shared;
        Ok(Box::new(Atom { place, order, op: kind, ty, ftz, dst: dst?, src, new, address: self.address(&rest[0])? }))
    }

    fn cvta(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let to_generic = !op.has("to");
        let space = op.take(|p| !matches!(p, "u64" | "u32")).ok_or("a space is needed")?;
        if op.ty()? != Ty::U64 {
            return Err("only 64-bit addresses are supported".into());
        }
        let [d, a] = exactly(o)?;
        let window = match space.split("::").next() {
            Some("shared") => Window::Shared,
            Some("local") => Window::Local,
            Some("global" | "const" | "param") => Window::Global,
            _ => return Err(format!("unknown space {space}")),
        };
        let (d, a) = (self.dst64(d)?, self.src64(a)?);
        Ok(if window == Window::Global {
            Op::Mov64 { d, a }
        } else {
            Op::Cvta { window, to_generic, d, a, wide: true }
        })
    }

    fn matrix_move(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        let load = op.name() == "ldmatrix";
        op.has("sync");
        op.has("aligned");
        if !op.has("m8n8") {
            return Err("only m8n8 is supported".into());
        }
        let count: usize = op.one_of(&["x1", "x2", "x4"]).map_or(1, |v| v[1..].parse().unwrap_or(1));
        let trans = op.has("trans");
        if place(op) != Where::Shared || !op.has("b16") {
            return Err("only shared memory and b16 are supported".into());
        }
        let [first, second] = exactly(o)?;
        let (data, at) = if load { (first, second) } else { (second, first) };
        let rows: Result<Vec<_>, String> =
            self.elements(data).to_vec().iter().map(|e| if load { self.dst32(e) } else { self.src32(e) }).collect();
        let rows = rows?;
        if rows.len() != count {
            return Err(format!("{count} registers are needed, found {}", rows.len()));
        }
        let made = Box::new(MatrixMove { trans, data: rows, address: self.address(at)? });
        Ok(if load { Op::LdMatrix(made) } else { Op::StMatrix(made) })
    }

    /// cp.async without bulk.
    fn cp_async(&mut self, op: &mut Opcode, o: &[Operand]) -> Result<Op, String> {
        if !op.has("async") || op.parts.contains(&"bulk") || op.parts.contains(&"mbarrier") {
            return Err("unknown form of cp".into());
        }
        if op.has("commit_group") {
            return Ok(Op::CpAsyncCommit);
        }
        if op.has("wait_all") {
            return Ok(Op::CpAsyncWait { keep: None });
        }
        if op.has("wait_group") {
            let [n] = exactly(o)?;
            return Ok(Op::CpAsyncWait { keep: Some(self.int(n)? as u32) });
        }
        op.one_of(&["ca", "cg"]).ok_or("ca or cg is needed")?;
        op.take(|p| p.starts_with("shared")).ok_or("the destination must be shared")?;
        op.has("global");
        let policy = hints(op);
        let [dst, src, bytes, rest @ ..] = o else { return Err("operands are missing".into()) };
        let bytes = self.int(bytes)? as u32;
        if !matches!(bytes, 4 | 8 | 16) {
            return Err(format!("{bytes} bytes: only 4, 8 and 16 can be copied"));
        }
        let rest = if policy { rest.split_last().ok_or("a cache policy is needed")?.1 } else { rest };
        let (mut source_bytes, mut ignore) = (None, None);
        match rest {
            [] => {}
            [Operand::Name(name)] if matches!(self.find(name), Some(Symbol::Predicate(_))) => {
                ignore = Some(self.pred(&rest[0])?)
            }
            [Operand::Not(_)] => ignore = Some(self.pred(&rest[0])?),
            [size] => source_bytes = Some(self.src32(size)?),
            _ => return Err("too many operands".into()),
        }
        let (dst, src) = (self.address(dst)?, self.address(src)?);
        Ok(Op::CpAsync(Box::new(CpAsync { bytes, source_bytes, ignore, dst, src })))
    }
}
