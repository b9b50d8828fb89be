//! Syntax to decoded instructions: symbols, operands, labels, and device functions, which are decoded anew at each
//! call (so calls cost nothing at run time and need no stack; recursion is an error).
//!
//! `decode_alu`, `decode_memory` and `decode_warp` hold the instructions themselves.
use super::instr::{ALWAYS, CARRY, ClockKind, Fill, Inst, Op, Pred, Program, Row, Special, Ty};
use super::lifetimes::{lifetimes, top_registers};
pub use super::opcode::Opcode;
use super::opcode::special;
use super::shared::SHARED_BASE;
use crate::ptx::{
    Function, Instruction, Kernel, Module, Operand, Space, Statement, Variable, shared_layout, type_size,
};
use std::collections::HashMap;

/// A decoded address: `row` holds 64 bits when `wide`, else 32; `offset` is added.
#[derive(Debug, Clone, Copy)]
pub struct Address {
    pub row: Row,
    pub wide: bool,
    pub offset: i64,
}

#[derive(Debug, Clone)]
pub(super) enum Symbol {
    Register {
        row: Row,
        bits: u32,
    },
    Predicate(u32),
    /// Byte of the lane's local memory.
    Local(u32),
    /// 32-bit shared address.
    Shared(u32),
    /// Host address.
    Global(u64),
    /// Byte of the kernel's parameters.
    Param(u32),
    Label(u32),
    Targets(Vec<String>),
}

/// Decodes one kernel.
pub struct Decoder<'m> {
    module: &'m Module,
    scopes: Vec<HashMap<String, Symbol>>,
    pub(super) code: Vec<Inst>,
    /// Label number to position; branches hold label numbers until the end.
    labels: Vec<u32>,
    rows: u32,
    /// Rows that ended lifetimes left, by size (1, 2, 4 lines).
    free: [Vec<Row>; 3],
    preds: u32,
    constants: HashMap<Fill, Row>,
    pub(super) local_bytes: u32,
    /// Names of the functions being decoded, the kernel first.
    callers: Vec<String>,
    /// Where `ret` goes, for each function being decoded; none in a kernel.
    returns: Vec<u32>,
    sink: Row,
    /// Of the instruction being decoded.
    line: u32,
}

/// Local memory begins here, so that a null local pointer faults.
const LOCAL_BASE: u32 = 16;

pub fn decode_kernel(
    module: &Module,
    kernel: &Kernel,
    globals: &HashMap<String, (u64, u64)>,
) -> Result<Program, String> {
    let mut top = HashMap::new();
    for (name, (at, _)) in globals {
        top.insert(name.clone(), Symbol::Global(*at));
    }
    for (name, offset) in shared_layout(module, kernel).0 {
        top.insert(name, Symbol::Shared(SHARED_BASE + offset));
    }
    for p in &kernel.params {
        top.insert(p.name.clone(), Symbol::Param(p.offset as u32));
    }
    let mut d = Decoder {
        module,
        scopes: vec![top],
        code: vec![],
        labels: vec![],
        rows: 4,
        free: Default::default(),
        preds: CARRY / 2 + 1,
        constants: HashMap::new(),
        local_bytes: LOCAL_BASE,
        callers: vec![kernel.name.clone()],
        returns: vec![],
        sink: 0,
        line: kernel.line,
    };
    d.body(&kernel.body)?;
    d.code.push(Inst { op: Op::Exit, guard: ALWAYS, line: kernel.line });
    d.resolve_labels();
    Ok(Program {
        name: kernel.name.clone(),
        code: d.code,
        rows: d.rows as usize,
        preds: d.preds as usize,
        constants: d.constants.into_iter().map(|(fill, row)| (row, fill)).collect(),
        local_bytes: d.local_bytes as usize,
        static_shared: kernel.static_shared,
        param_bytes: kernel.param_bytes(),
        max_threads: kernel.max_threads,
        exact_threads: kernel.exact_threads,
        cluster: kernel.cluster,
    })
}

impl Decoder<'_> {
    /// Adds a helper instruction before the one being decoded.
    pub(super) fn emit(&mut self, op: Op) {
        self.code.push(Inst { op, guard: ALWAYS, line: self.line });
    }

    pub(super) fn new_row(&mut self, bits: u32) -> Row {
        let lines = bits.div_ceil(32).next_power_of_two();
        let at = self.rows.next_multiple_of(lines);
        self.rows = at + lines;
        at
    }

    /// A row for a register with a lifetime; `release` gives it back.
    fn lend(&mut self, bits: u32) -> Row {
        let class = bits.div_ceil(32).next_power_of_two().trailing_zeros() as usize;
        self.free[class].pop().unwrap_or_else(|| self.new_row(bits))
    }

    fn release(&mut self, row: Row, bits: u32) {
        self.free[bits.div_ceil(32).next_power_of_two().trailing_zeros() as usize].push(row);
    }

    fn new_label(&mut self) -> u32 {
        self.labels.push(u32::MAX);
        self.labels.len() as u32 - 1
    }

    fn place_label(&mut self, label: u32) {
        self.labels[label as usize] = self.code.len() as u32;
    }

    fn resolve_labels(&mut self) {
        let labels = &self.labels;
        for inst in &mut self.code {
            match &mut inst.op {
                Op::Bra { target } => *target = labels[*target as usize],
                Op::Brx { targets, .. } => targets.iter_mut().for_each(|t| *t = labels[*t as usize]),
                _ => {}
            }
        }
    }

    pub(super) fn find(&self, name: &str) -> Option<&Symbol> {
        self.scopes.iter().rev().find_map(|s| s.get(name))
    }

    fn add(&mut self, name: &str, symbol: Symbol) {
        self.scopes.last_mut().expect("a scope is open").insert(name.to_string(), symbol);
    }

    /// Opens a scope: its labels are known from its start, so that branches may go forward.
    fn open(&mut self, rest: &[Statement]) {
        self.scopes.push(HashMap::new());
        let mut depth = 0;
        for s in rest {
            match s {
                Statement::Open => depth += 1,
                Statement::Close if depth == 0 => break,
                Statement::Close => depth -= 1,
                Statement::Label(name) if depth == 0 => {
                    let label = self.new_label();
                    self.add(name, Symbol::Label(label));
                }
                Statement::BranchTargets { name, labels } if depth == 0 => {
                    self.add(name, Symbol::Targets(labels.clone()))
                }
                _ => {}
            }
        }
    }

    fn body(&mut self, statements: &[Statement]) -> Result<(), String> {
        self.open(statements);
        let own = self.scopes.len() - 1;
        let widths = top_registers(statements);
        let lives = lifetimes(statements);
        for (i, s) in statements.iter().enumerate() {
            for name in &lives.begin[i] {
                let bits = widths[name];
                let row = self.lend(bits);
                self.scopes[own].insert(name.clone(), Symbol::Register { row, bits });
            }
            match s {
                Statement::Open => self.open(&statements[i + 1..]),
                Statement::Close => drop(self.scopes.pop()),
                // Registers of the function's own scope get their rows when their lifetimes begin.
                Statement::Declare(v) if v.space == Space::Reg && v.ty != "pred" && self.scopes.len() - 1 == own => {}
                Statement::Declare(v) => self.declare(v)?,
                Statement::Label(name) => {
                    let Some(Symbol::Label(label)) = self.find(name).cloned() else {
                        return Err(format!("label {name} is lost"));
                    };
                    self.place_label(label);
                }
                Statement::BranchTargets { .. } => {}
                Statement::Instruction(inst) => {
                    let words = || inst.opcode.join(".");
                    self.instruction(inst).map_err(|e| format!("ptx line {}: {}: {e}", inst.line, words()))?;
                }
            }
            for name in &lives.end[i] {
                if let Some(Symbol::Register { row, bits }) = self.scopes[own].remove(name) {
                    self.release(row, bits);
                }
            }
        }
        self.scopes.pop();
        Ok(())
    }

    fn declare(&mut self, v: &Variable) -> Result<(), String> {
        match v.space {
            Space::Reg => {
                let bits = (type_size(&v.ty).unwrap_or(4) as u32 * 8).max(16);
                let names: Vec<String> = match v.count {
                    Some(n) => (0..n).map(|i| format!("{}{i}", v.name)).collect(),
                    None => vec![v.name.clone()],
                };
                for name in names {
                    let symbol = if v.ty == "pred" {
                        self.preds += 1;
                        Symbol::Predicate(self.preds - 1)
                    } else {
                        Symbol::Register { row: self.new_row(bits), bits }
                    };
                    self.add(&name, symbol);
                }
            }
            Space::Local | Space::Param => {
                let at = self.local_bytes.next_multiple_of(v.align.max(1) as u32);
                self.local_bytes = at + v.size as u32;
                self.add(&v.name, Symbol::Local(at));
            }
            // Placed by `shared_layout`.
            Space::Shared => {}
            Space::Global | Space::Const => return Err(format!("variable {} inside a function", v.name)),
        }
        Ok(())
    }

    fn instruction(&mut self, inst: &Instruction) -> Result<(), String> {
        let guard = match &inst.guard {
            Some((name, negated)) => self.pred_named(name)? | *negated as u32,
            None => ALWAYS,
        };
        let mut op = Opcode::new(&inst.opcode);
        let o = &inst.operands;
        let line = inst.line;
        self.line = line;
        let decoded = match op.name() {
            "call" => {
                op.has("uni");
                op.finish()?;
                return self.call(o, guard, line);
            }
            "ret" => {
                op.has("uni");
                match self.returns.last() {
                    Some(label) => Op::Bra { target: *label },
                    None => Op::Exit,
                }
            }
            "bra" => {
                op.has("uni");
                Op::Bra { target: self.label(o.first().ok_or("a label is needed")?)? }
            }
            "brx" => {
                op.has("idx");
                op.has("uni");
                self.indexed_branch(o)?
            }
            _ => match super::hopper::decode(self, &mut op, o)? {
                Some(h) => Op::Hopper(Box::new(h)),
                None => {
                    let found = self.decode_alu(&mut op, o)?;
                    let found = if found.is_some() { found } else { self.decode_memory(&mut op, o)? };
                    let found = if found.is_some() { found } else { self.decode_warp(&mut op, o)? };
                    found.ok_or("unknown instruction")?
                }
            },
        };
        op.finish()?;
        self.code.push(Inst { op: decoded, guard, line });
        Ok(())
    }

    fn label(&self, operand: &Operand) -> Result<u32, String> {
        match operand {
            Operand::Name(name) => match self.find(name) {
                Some(Symbol::Label(label)) => Ok(*label),
                _ => Err(format!("no label {name} here")),
            },
            other => Err(format!("a label is needed, found {other:?}")),
        }
    }

    fn indexed_branch(&mut self, o: &[Operand]) -> Result<Op, String> {
        let [index, Operand::Name(list)] = o else { return Err("an index and a list of targets are needed".into()) };
        let Some(Symbol::Targets(names)) = self.find(list).cloned() else {
            return Err(format!("no list of targets {list}"));
        };
        let targets: Result<Box<[u32]>, String> = names.iter().map(|n| self.label(&Operand::Name(n.clone()))).collect();
        Ok(Op::Brx { index: self.src32(index)?, targets: targets? })
    }

    // Calls.

    fn call(&mut self, o: &[Operand], guard: Pred, line: u32) -> Result<(), String> {
        let empty = vec![];
        let (returns, rest) = match o {
            [Operand::List(r), rest @ ..] => (r, rest),
            rest => (&empty, rest),
        };
        let [Operand::Name(name), rest @ ..] = rest else { return Err("a function's name is needed".into()) };
        if self.find(name).is_some() {
            return Err("calls through function pointers are not supported".into());
        }
        let arguments = match rest {
            [Operand::List(a), ..] => a,
            _ => &empty,
        };
        let module = self.module;
        let function =
            module.functions.iter().find(|f| f.name == *name).ok_or_else(|| format!("no function {name}"))?;
        let Some(body) = &function.body else { return self.host_call(function, returns, arguments, guard, line) };
        if self.callers.contains(name) {
            return Err(format!("{name} is recursive, which is not supported"));
        }
        if arguments.len() != function.params.len() || returns.len() != function.returns.len() {
            return Err(format!("{name} is called with {} arguments and {} results", arguments.len(), returns.len()));
        }
        let mut bound = HashMap::new();
        let formals = function.params.iter().zip(arguments).chain(function.returns.iter().zip(returns));
        for (formal, actual) in formals {
            bound.insert(formal.name.clone(), self.bind(formal, actual)?);
        }
        let end = self.new_label();
        // Lanes whose guard fails skip the body.
        if guard != ALWAYS {
            self.code.push(Inst { op: Op::Bra { target: end }, guard: guard ^ 1, line });
        }
        // The callee sees module scope and its parameters, not the caller's names.
        let caller_scopes = std::mem::take(&mut self.scopes);
        self.scopes = vec![caller_scopes[0].clone(), bound];
        self.callers.push(name.clone());
        self.returns.push(end);
        let done = self.body(body);
        self.returns.pop();
        self.callers.pop();
        self.scopes = caller_scopes;
        done?;
        self.place_label(end);
        Ok(())
    }

    /// A parameter of a function stands for the variable or register that the caller passes.
    fn bind(&mut self, formal: &Variable, actual: &Operand) -> Result<Symbol, String> {
        let Operand::Name(name) = actual else { return Err(format!("argument {actual:?} is not supported")) };
        match (self.find(name), formal.space) {
            (Some(s @ Symbol::Local(_)), Space::Param) | (Some(s @ Symbol::Register { .. }), Space::Reg) => {
                Ok(s.clone())
            }
            _ => Err(format!("argument {name} is not a .param variable")),
        }
    }

    fn host_call(
        &mut self,
        f: &Function,
        returns: &[Operand],
        arguments: &[Operand],
        guard: Pred,
        line: u32,
    ) -> Result<(), String> {
        let local = |d: &Decoder, o: &Operand| match o {
            Operand::Name(n) => match d.find(n) {
                Some(Symbol::Local(at)) => Ok(*at),
                _ => Err(format!("{n} is not a .param variable")),
            },
            other => Err(format!("argument {other:?} is not supported")),
        };
        let places: Result<Vec<u32>, String> = arguments.iter().map(|a| local(self, a)).collect();
        let places = places?;
        let op = match (f.name.as_str(), &places[..]) {
            ("vprintf", [format, arguments]) => {
                let result = returns.first().map(|r| local(self, r)).transpose()?;
                Op::Printf { format: *format, arguments: *arguments, result }
            }
            ("__assertfail", _) => Op::AssertFail { parameters: places.into() },
            _ => return Err(format!("function {} has no body", f.name)),
        };
        self.code.push(Inst { op, guard, line });
        Ok(())
    }

    // Operands.

    fn constant(&mut self, fill: Fill, bits: u32) -> Row {
        if let Some(row) = self.constants.get(&fill) {
            return *row;
        }
        let row = self.new_row(bits);
        self.constants.insert(fill, row);
        row
    }

    pub(super) fn constant32(&mut self, value: u32) -> Row {
        self.constant(Fill::Bits32(value), 32)
    }

    pub(super) fn constant64(&mut self, value: u64) -> Row {
        self.constant(Fill::Bits64(value), 64)
    }

    /// The row of a source read as `bits` (16, 32, 64 or 128) bits.
    pub(super) fn src(&mut self, operand: &Operand, bits: u32) -> Result<Row, String> {
        let whole = |v: u64, d: &mut Self| match bits {
            16 => d.constant32(v as u16 as u32),
            32 => d.constant32(v as u32),
            _ => d.constant64(v),
        };
        match operand {
            Operand::Int(v) => Ok(whole(*v as u64, self)),
            Operand::F32(v) if bits == 32 => Ok(self.constant32(*v)),
            Operand::F32(v) if bits == 64 => Ok(self.constant64((f32::from_bits(*v) as f64).to_bits())),
            Operand::F64(v) if bits == 64 => Ok(self.constant64(*v)),
            Operand::F64(v) if bits == 32 => Ok(self.constant32((f64::from_bits(*v) as f32).to_bits())),
            Operand::Name(name) => self.src_named(name, 0, bits),
            Operand::NameOffset(name, offset) => self.src_named(name, *offset, bits),
            other => Err(format!("a {bits}-bit source is needed, found {other:?}")),
        }
    }

    fn src_named(&mut self, name: &str, offset: i64, bits: u32) -> Result<Row, String> {
        if let Some(special) = special(name) {
            let wide = bits == 64;
            let row = self.constant(Fill::Special(special), if wide { 64 } else { 32 });
            let fits = wide == matches!(special, Special::GridId | Special::ParamBase);
            return if fits { Ok(row) } else { Err(format!("{name} as {bits} bits is not supported")) };
        }
        let value = match self.find(name) {
            Some(Symbol::Register { row, bits: have }) if *have == bits => return Ok(*row),
            Some(Symbol::Register { row, bits: have }) if *have <= 32 && bits <= 32 => return Ok(*row),
            Some(Symbol::Register { bits: have, .. }) => {
                return Err(format!("{name} has {have} bits, {bits} are needed"));
            }
            Some(Symbol::Local(at)) => *at as u64,
            Some(Symbol::Shared(at)) => *at as u64,
            Some(Symbol::Global(at)) => *at,
            Some(Symbol::Param(at)) if bits == 64 => return self.param_address(*at as i64 + offset),
            _ => return Err(format!("unknown name {name}")),
        };
        let value = value.wrapping_add(offset as u64);
        Ok(if bits == 64 { self.constant64(value) } else { self.constant32(value as u32) })
    }

    /// Row with the address of a byte of the kernel's parameters.
    fn param_address(&mut self, offset: i64) -> Result<Row, String> {
        let base = self.constant(Fill::Special(Special::ParamBase), 64);
        if offset == 0 {
            return Ok(base);
        }
        let row = self.new_row(64);
        let by = self.constant64(offset as u64);
        let add = super::instr::Alu {
            op: super::instr::AluOp::Add,
            ty: Ty::U64,
            flags: 0,
            imm: 0,
            d: row,
            a: base,
            b: by,
            c: 0,
        };
        self.emit(Op::Alu(add));
        Ok(row)
    }

    pub(super) fn dst(&mut self, operand: &Operand, bits: u32) -> Result<Row, String> {
        match operand {
            Operand::Name(name) if name == "_" => {
                if self.sink == 0 {
                    self.sink = self.new_row(128);
                }
                Ok(self.sink)
            }
            Operand::Name(name) => match self.find(name) {
                Some(Symbol::Register { row, bits: have }) if *have == bits || (*have <= 32 && bits <= 32) => Ok(*row),
                Some(Symbol::Register { bits: have, .. }) => Err(format!("{name} has {have} bits, {bits} are written")),
                _ => Err(format!("unknown register {name}")),
            },
            other => Err(format!("a register is needed, found {other:?}")),
        }
    }

    /// Width of a register; None for anything else.
    pub(super) fn register_bits(&self, operand: &Operand) -> Option<u32> {
        match operand {
            Operand::Name(name) => match self.find(name)? {
                Symbol::Register { bits, .. } => Some(*bits),
                _ => None,
            },
            _ => None,
        }
    }

    /// The row of a source operand read as 32 bits: register, immediate, special register, shared symbol.
    pub fn src32(&mut self, operand: &Operand) -> Result<Row, String> {
        self.src(operand, 32)
    }

    /// The same for 64 bits.
    pub fn src64(&mut self, operand: &Operand) -> Result<Row, String> {
        self.src(operand, 64)
    }

    /// The row of a destination register (`_` gives a row that nobody reads).
    pub fn dst32(&mut self, operand: &Operand) -> Result<Row, String> {
        self.dst(operand, 32)
    }

    pub fn dst64(&mut self, operand: &Operand) -> Result<Row, String> {
        self.dst(operand, 64)
    }

    fn pred_named(&self, name: &str) -> Result<Pred, String> {
        match self.find(name) {
            Some(Symbol::Predicate(n)) => Ok(n << 1),
            _ => Err(format!("unknown predicate {name}")),
        }
    }

    /// A predicate, read (`p`, `!p`, immediate) or written (`_` is a sink).
    pub fn pred(&mut self, operand: &Operand) -> Result<Pred, String> {
        match operand {
            Operand::Name(name) if name == "_" => Ok(ALWAYS),
            Operand::Name(name) => self.pred_named(name),
            Operand::Not(name) => Ok(self.pred_named(name)? | 1),
            Operand::Int(0) => Ok(ALWAYS | 1),
            Operand::Int(_) => Ok(ALWAYS),
            other => Err(format!("a predicate is needed, found {other:?}")),
        }
    }

    /// An immediate integer.
    pub fn int(&self, operand: &Operand) -> Result<i64, String> {
        match operand {
            Operand::Int(v) => Ok(*v as i64),
            other => Err(format!("an immediate integer is needed, found {other:?}")),
        }
    }

    /// The elements of `{a, b}`, or the operand alone.
    pub fn elements<'o>(&self, operand: &'o Operand) -> &'o [Operand] {
        match operand {
            Operand::Vector(v) => v,
            one => std::slice::from_ref(one),
        }
    }

    /// `[base + offset]` in a 32-bit or 64-bit address register (or a symbol).
    pub fn address(&mut self, operand: &Operand) -> Result<Address, String> {
        let Operand::Address { base, offset, .. } = operand else {
            return Err(format!("an address is needed, found {operand:?}"));
        };
        let wide = match &**base {
            Operand::Name(name) => match self.find(name) {
                Some(Symbol::Register { bits, .. }) => *bits == 64,
                Some(Symbol::Global(_) | Symbol::Param(_)) => true,
                _ => false,
            },
            Operand::Int(_) => true,
            other => return Err(format!("unknown address base {other:?}")),
        };
        let row = self.src(base, if wide { 64 } else { 32 })?;
        Ok(Address { row, wide, offset: *offset })
    }

    /// Clock registers, which change: None for others.
    pub(super) fn clock(operand: &Operand) -> Option<ClockKind> {
        let Operand::Name(name) = operand else { return None };
        Some(match name.as_str() {
            "%clock" | "%clock_lo" => ClockKind::Low,
            "%clock_hi" => ClockKind::High,
            "%clock64" => ClockKind::Full,
            "%globaltimer" => ClockKind::Nanoseconds,
            "%globaltimer_lo" => ClockKind::NanosecondsLow,
            "%globaltimer_hi" => ClockKind::NanosecondsHigh,
            _ => return None,
        })
    }
}
