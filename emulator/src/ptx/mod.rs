//! PTX text to syntax. `parse` gives a `Module`: its kernels and device functions as statements whose
//! instructions are still names and operands; `exec::LoadedModule::load` decodes them (an instruction that the
//! emulator does not know is an error there, with its line).
//!
//! Interface: `parse(text) -> Result<Module, ParseError>`; `Module::kernels`, `Kernel::{name, params,
//! static_shared, max_threads, cluster, registers, local_bytes}`, `Param::{name, offset, size, align}`.
mod lexer;
mod parser;

pub use parser::parse;

#[derive(Debug, Clone, thiserror::Error)]
#[error("ptx line {line}: {what}")]
pub struct ParseError {
    pub line: u32,
    pub what: String,
}

#[derive(Debug, Clone, Default)]
pub struct Module {
    /// As in `.version 9.0`.
    pub version: String,
    /// As in `.target sm_90a`.
    pub target: String,
    pub kernels: Vec<Kernel>,
    /// Device functions, with and without (extern) a body.
    pub functions: Vec<Function>,
    /// `.global` and `.const` variables of module scope.
    pub globals: Vec<Variable>,
    /// `.shared` variables of module scope.
    pub shared: Vec<Variable>,
    /// The source, for fault messages: line n is `lines[n - 1]`.
    pub lines: std::sync::Arc<Vec<String>>,
}

#[derive(Debug, Clone, Default)]
pub struct Kernel {
    pub name: String,
    /// In order, with the offsets that a packed parameter buffer has.
    pub params: Vec<Param>,
    /// Bytes of shared memory that are not dynamic.
    pub static_shared: u32,
    /// Bytes of `.local` a thread.
    pub local_bytes: u32,
    /// `.maxntid` or `.reqntid`.
    pub max_threads: Option<[u32; 3]>,
    pub exact_threads: bool,
    /// `.reqnctapercluster`.
    pub cluster: Option<[u32; 3]>,
    /// `.maxnreg` if given, else a guess from the declared registers: the real number is ptxas's to choose.
    pub registers: u32,
    pub body: Vec<Statement>,
    pub line: u32,
}

impl Kernel {
    /// Length of the packed parameter buffer.
    pub fn param_bytes(&self) -> usize {
        self.params.iter().map(|p| p.offset + p.size).max().unwrap_or(0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param {
    pub name: String,
    pub offset: usize,
    pub size: usize,
    pub align: usize,
}

#[derive(Debug, Clone, Default)]
pub struct Function {
    pub name: String,
    pub returns: Vec<Variable>,
    pub params: Vec<Variable>,
    /// None for a declaration.
    pub body: Option<Vec<Statement>>,
    pub line: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Space {
    #[default]
    Reg,
    Param,
    Local,
    Shared,
    Global,
    Const,
}

/// A declared variable: `.shared .align 16 .b8 tile[4096];`, a parameter, a register.
#[derive(Debug, Clone, Default)]
pub struct Variable {
    pub name: String,
    pub space: Space,
    /// As written, without the dot: "b32", "f64", "pred".
    pub ty: String,
    pub align: usize,
    /// Bytes in all; 0 for `.extern .shared x[]`.
    pub size: usize,
    /// `%r<12>` declares 12.
    pub count: Option<u32>,
    pub is_extern: bool,
    pub init: Vec<Init>,
}

/// A piece of an initialiser, in order.
#[derive(Debug, Clone)]
pub enum Init {
    /// `bytes` little-endian bytes of an integer or float.
    Bytes(Vec<u8>),
    /// Address of a symbol plus an offset, in 8 bytes.
    Symbol { name: String, offset: i64 },
}

#[derive(Debug, Clone)]
pub enum Statement {
    Instruction(Instruction),
    Label(String),
    Declare(Variable),
    /// `name: .branchtargets a, b;`
    BranchTargets {
        name: String,
        labels: Vec<String>,
    },
    /// `{`: names declared until its `}` are its own.
    Open,
    Close,
}

#[derive(Debug, Clone)]
pub struct Instruction {
    /// `@p` or `@!p` (then true).
    pub guard: Option<(String, bool)>,
    /// The opcode split at its dots: ["ld", "global", "v4", "f32"].
    pub opcode: Vec<String>,
    pub operands: Vec<Operand>,
    pub line: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Operand {
    /// Register, symbol, label or special register (with its `.x`).
    Name(String),
    /// `symbol + 8` outside brackets.
    NameOffset(String, i64),
    Int(i128),
    /// The bits of `0f3F800000`.
    F32(u32),
    /// The bits of `0d3FF0000000000000`.
    F64(u64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `[base + offset]`, and `[base, {x, y}]` with the rest in `extra`.
    Address {
        base: Box<Operand>,
        offset: i64,
        extra: Vec<Operand>,
    },
    /// `!p`
    Not(String),
    /// `p|q`
    Pair(Box<Operand>, Box<Operand>),
    /// `(a, b)` of a call.
    List(Vec<Operand>),
}

/// Bytes of a PTX type's name ("f16x2" is 4); None if it is not a type.
pub fn type_size(ty: &str) -> Option<usize> {
    Some(match ty {
        "b8" | "u8" | "s8" | "e4m3" | "e5m2" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" | "e4m3x2" | "e5m2x2" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" | "tf32" => 4,
        "b64" | "u64" | "s64" | "f64" | "f32x2" => 8,
        "b128" => 16,
        "pred" => 1,
        _ => return None,
    })
}

/// Places the kernel's `.shared` variables: those of its body and of the functions it calls, and those of module
/// scope that they name. Gives offsets from the start of the CTA's memory and the total. Dynamic (extern) ones
/// share the end.
pub fn shared_layout(module: &Module, kernel: &Kernel) -> (std::collections::HashMap<String, u32>, u32) {
    let mut bodies: Vec<&[Statement]> = vec![&kernel.body];
    let mut names = std::collections::HashSet::new();
    let mut next = 0;
    let mut variables: Vec<&Variable> = vec![];
    while next < bodies.len() {
        for s in bodies[next] {
            match s {
                Statement::Declare(v) if v.space == Space::Shared => variables.push(v),
                Statement::Instruction(i) => i.operands.iter().for_each(|o| collect_names(o, &mut names)),
                _ => {}
            }
        }
        next += 1;
        for f in &module.functions {
            let Some(body) = &f.body else { continue };
            if names.contains(f.name.as_str()) && !bodies.iter().any(|b| std::ptr::eq(*b, body.as_slice())) {
                bodies.push(body);
            }
        }
    }
    variables.extend(module.shared.iter().filter(|v| names.contains(v.name.as_str())));
    let mut layout = std::collections::HashMap::new();
    let mut end = 0u32;
    for v in variables.iter().filter(|v| v.size > 0) {
        end = end.next_multiple_of(v.align.max(1) as u32);
        layout.insert(v.name.clone(), end);
        end += v.size as u32;
    }
    let dynamic_align = variables.iter().filter(|v| v.size == 0).map(|v| v.align).max();
    if let Some(align) = dynamic_align {
        let at = end.next_multiple_of(align.max(16) as u32);
        for v in variables.iter().filter(|v| v.size == 0) {
            layout.insert(v.name.clone(), at);
        }
        if end > 0 {
            end = at;
        }
    }
    (layout, end)
}

fn collect_names<'a>(operand: &'a Operand, out: &mut std::collections::HashSet<&'a str>) {
    match operand {
        Operand::Name(n) | Operand::NameOffset(n, _) if !n.starts_with('%') => {
            out.insert(n);
        }
        Operand::Vector(v) | Operand::List(v) => v.iter().for_each(|o| collect_names(o, out)),
        Operand::Address { base, extra, .. } => {
            collect_names(base, out);
            extra.iter().for_each(|o| collect_names(o, out));
        }
        Operand::Pair(a, b) => {
            collect_names(a, out);
            collect_names(b, out);
        }
        _ => {}
    }
}
