//! When each virtual register of a function is needed, so that registers can share rows: PTX names thousands, and a
//! register file of megabytes a warp would not fit the cache.
//!
//! A lifetime is a range of statements. It is the span from the first to the last mention if control enters that
//! span only at its first statement and that one sets the register; otherwise every loop that the span touches
//! is added whole. Each lane walks forwards except over back edges, so this is safe for diverged warps too.
use crate::ptx::{Instruction, Operand, Statement};
use std::collections::HashMap;

/// Registers (declared at the top of the function) by first and by last statement.
pub struct Lifetimes {
    pub begin: Vec<Vec<String>>,
    pub end: Vec<Vec<String>>,
}

struct Span {
    first: usize,
    last: usize,
    /// The first mention sets it whatever the guards say.
    set_first: bool,
    /// wgmma writes its registers when it is waited for: they are never shared.
    always: bool,
}

pub fn lifetimes(statements: &[Statement]) -> Lifetimes {
    let declared = top_registers(statements);
    let mut spans: HashMap<&str, Span> = HashMap::new();
    for (at, s) in statements.iter().enumerate() {
        let Statement::Instruction(i) = s else { continue };
        let target = sets(i);
        let mut mention = |name: &str| {
            let Some((name, _)) = declared.get_key_value(name) else { return };
            let fresh =
                Span { first: at, last: at, set_first: target.is_some_and(|t| only_target(i, t, name)), always: false };
            let span = spans.entry(name).or_insert(fresh);
            span.last = at;
            span.always |= i.opcode[0] == "wgmma";
        };
        i.operands.iter().for_each(|o| names(o, &mut mention));
    }
    let jumps = jumps(statements);
    let loops: Vec<(usize, usize)> =
        jumps.iter().filter(|(from, to)| to <= from).map(|(from, to)| (*to, *from)).collect();
    let mut out = Lifetimes { begin: vec![vec![]; statements.len()], end: vec![vec![]; statements.len()] };
    for (name, span) in spans {
        let (mut first, mut last) = (span.first, span.last);
        let entered_elsewhere =
            |(from, to): &(usize, usize)| *to > first && *to <= last && (*from < first || *from > last);
        if span.always {
            (first, last) = (0, statements.len() - 1);
        } else if !span.set_first || jumps.iter().any(entered_elsewhere) {
            loop {
                let before = (first, last);
                for (from, to) in &loops {
                    if *from <= last && *to >= first {
                        (first, last) = (first.min(*from), last.max(*to));
                    }
                }
                if (first, last) == before {
                    break;
                }
            }
        }
        out.begin[first].push(name.to_string());
        out.end[last].push(name.to_string());
    }
    // The order of a hash map must not decide where registers lie.
    out.begin.iter_mut().chain(&mut out.end).for_each(|v| v.sort_unstable());
    out
}

/// Names and bits of the registers that the function's own scope declares.
pub fn top_registers(statements: &[Statement]) -> HashMap<String, u32> {
    let mut depth = 0;
    let mut out = HashMap::new();
    for s in statements {
        match s {
            Statement::Open => depth += 1,
            Statement::Close => depth -= 1,
            Statement::Declare(v) if depth == 0 && v.space == crate::ptx::Space::Reg && v.ty != "pred" => {
                let bits = (crate::ptx::type_size(&v.ty).unwrap_or(4) as u32 * 8).max(16);
                match v.count {
                    Some(n) => out.extend((0..n).map(|k| (format!("{}{k}", v.name), bits))),
                    None => drop(out.insert(v.name.clone(), bits)),
                }
            }
            _ => {}
        }
    }
    out
}

/// The operand that an unguarded instruction certainly writes in full.
fn sets(i: &Instruction) -> Option<&Operand> {
    let simple = matches!(
        i.opcode[0].as_str(),
        "mov"
            | "cvt"
            | "cvta"
            | "ld"
            | "add"
            | "sub"
            | "mul"
            | "mad"
            | "fma"
            | "div"
            | "rem"
            | "abs"
            | "neg"
            | "min"
            | "max"
            | "and"
            | "or"
            | "xor"
            | "not"
            | "shl"
            | "shr"
            | "shf"
            | "selp"
            | "set"
            | "lop3"
            | "prmt"
            | "bfe"
            | "bfi"
            | "popc"
            | "clz"
            | "brev"
            | "bfind"
            | "rcp"
            | "sqrt"
            | "rsqrt"
            | "sin"
            | "cos"
            | "lg2"
            | "ex2"
            | "tanh"
            | "copysign"
            | "ldmatrix"
            | "movmatrix"
            | "mma"
            | "shfl"
            | "atom"
            | "mul24"
            | "mad24"
            | "sad"
            | "dp4a"
            | "slct"
            | "cnot"
            | "activemask"
            | "addc"
            | "subc"
            | "madc"
            | "mapa"
    );
    if simple && i.guard.is_none() { i.operands.first() } else { None }
}

/// Whether `name` is written by the target operand and not read elsewhere in the instruction.
fn only_target(i: &Instruction, target: &Operand, name: &str) -> bool {
    let count = |o: &Operand| {
        let mut n = 0;
        names(o, &mut |other| n += (other == name) as u32);
        n
    };
    count(target) == 1 && i.operands[1..].iter().all(|o| count(o) == 0)
}

fn names<'a>(operand: &'a Operand, f: &mut impl FnMut(&'a str)) {
    match operand {
        Operand::Name(n) | Operand::NameOffset(n, _) | Operand::Not(n) => f(n),
        Operand::Vector(v) | Operand::List(v) => v.iter().for_each(|o| names(o, &mut *f)),
        Operand::Address { base, extra, .. } => {
            names(base, &mut *f);
            extra.iter().for_each(|o| names(o, &mut *f));
        }
        Operand::Pair(a, b) => {
            names(a, &mut *f);
            names(b, &mut *f);
        }
        _ => {}
    }
}

/// All branches as (from, to) statement numbers; a label is looked up from the branch's scope outwards.
fn jumps(statements: &[Statement]) -> Vec<(usize, usize)> {
    let mut parent = vec![0usize];
    let mut scope_of = Vec::with_capacity(statements.len());
    let mut scope = 0;
    let mut labels: HashMap<(usize, &str), usize> = HashMap::new();
    let mut lists: HashMap<&str, &[String]> = HashMap::new();
    for (at, s) in statements.iter().enumerate() {
        match s {
            Statement::Open => {
                parent.push(scope);
                scope = parent.len() - 1;
            }
            Statement::Close => scope = parent[scope],
            Statement::Label(name) => drop(labels.insert((scope, name), at)),
            Statement::BranchTargets { name, labels } => drop(lists.insert(name, labels)),
            _ => {}
        }
        scope_of.push(scope);
    }
    let find = |mut scope: usize, name: &str| loop {
        match labels.get(&(scope, name)) {
            Some(at) => return Some(*at),
            None if scope == 0 => return None,
            None => scope = parent[scope],
        }
    };
    let mut out = vec![];
    for (at, s) in statements.iter().enumerate() {
        let Statement::Instruction(i) = s else { continue };
        match (i.opcode[0].as_str(), &i.operands[..]) {
            ("bra", [Operand::Name(label)]) => out.extend(find(scope_of[at], label).map(|to| (at, to))),
            ("brx", [_, Operand::Name(list)]) => {
                for label in lists.get(list.as_str()).copied().unwrap_or(&[]) {
                    out.extend(find(scope_of[at], label).map(|to| (at, to)));
                }
            }
            _ => {}
        }
    }
    out
}
