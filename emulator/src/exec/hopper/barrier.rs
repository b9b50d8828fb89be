//! mbarrier instructions. The object lives in shared memory (see `crate::hopper::mbarrier`).
use super::super::access;
use super::super::decode::{Address, Decoder, Opcode};
use super::super::instr::{Pred, Row};
use super::super::machine::Machine;
use super::super::warp::{Flow, Warp};
use super::{copy, lanes, operand, shared_address};
use crate::hopper::Barrier;
use crate::ptx::Operand;
use crate::races::{self, Kind, Knowledge};
use std::sync::Arc;

pub enum Instr {
    Init {
        at: Address,
        count: Row,
    },
    Invalidate {
        at: Address,
    },
    ExpectTx {
        at: Address,
        bytes: Row,
    },
    CompleteTx {
        at: Address,
        bytes: Row,
    },
    Arrive {
        at: Address,
        state: Option<Row>,
        count: Option<Row>,
        expect: Option<Row>,
        kind: Arrival,
    },
    /// `state` for the form with a state, else `parity`.
    Wait {
        at: Address,
        done: Pred,
        state: Option<Row>,
        parity: Option<Row>,
    },
    PendingCount {
        to: Row,
        state: Row,
    },
    /// cp.async.mbarrier.arrive
    AfterCopies {
        at: Address,
        noinc: bool,
    },
}

impl Instr {
    /// Of the barrier, where the instruction touches one.
    fn address(&self) -> Option<&Address> {
        match self {
            Instr::Init { at, .. }
            | Instr::Invalidate { at }
            | Instr::ExpectTx { at, .. }
            | Instr::CompleteTx { at, .. }
            | Instr::Arrive { at, .. }
            | Instr::Wait { at, .. }
            | Instr::AfterCopies { at, .. } => Some(at),
            Instr::PendingCount { .. } => None,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    Plain,
    NoComplete,
    Drop,
}

pub fn decode(d: &mut Decoder, op: &mut Opcode, operands: &[Operand]) -> Result<Instr, String> {
    if op.name() == "cp" {
        for known in ["async", "mbarrier", "arrive"] {
            op.has(known);
        }
        let noinc = op.has("noinc");
        spaces(op);
        return Ok(Instr::AfterCopies { at: d.address(operand(operands, 0)?)?, noinc });
    }
    let kinds = [
        "init",
        "inval",
        "expect_tx",
        "complete_tx",
        "arrive",
        "arrive_drop",
        "test_wait",
        "try_wait",
        "pending_count",
    ];
    let first = op.parts.get(1).copied().unwrap_or("");
    let kind = kinds.iter().copied().find(|k| *k == first).ok_or(format!("unknown mbarrier.{first}"))?;
    op.has(kind);
    let with_expect = op.has("expect_tx");
    let no_complete = op.has("noComplete");
    let parity = op.has("parity");
    spaces(op);
    for known in ["release", "acquire", "relaxed", "cta", "cluster"] {
        op.has(known);
    }
    Ok(match kind {
        "init" => Instr::Init { at: d.address(operand(operands, 0)?)?, count: d.src32(operand(operands, 1)?)? },
        "inval" => Instr::Invalidate { at: d.address(operand(operands, 0)?)? },
        "expect_tx" | "complete_tx" => {
            let (at, bytes) = (d.address(operand(operands, 0)?)?, d.src32(operand(operands, 1)?)?);
            if kind == "expect_tx" { Instr::ExpectTx { at, bytes } } else { Instr::CompleteTx { at, bytes } }
        }
        "arrive" | "arrive_drop" => {
            let bare = matches!(operand(operands, 0)?, Operand::Address { .. });
            let sink = matches!(operand(operands, 0)?, Operand::Name(n) if n == "_");
            let state = if bare || sink { None } else { Some(d.dst64(&operands[0])?) };
            let rest = &operands[if bare { 0 } else { 1 }..];
            let number = rest.get(1).map(|o| d.src32(o)).transpose()?;
            let (count, expect) = if with_expect { (None, number) } else { (number, None) };
            let kind = match (kind, no_complete) {
                ("arrive_drop", _) => Arrival::Drop,
                (_, true) => Arrival::NoComplete,
                _ => Arrival::Plain,
            };
            Instr::Arrive { at: d.address(operand(rest, 0)?)?, state, count, expect, kind }
        }
        "test_wait" | "try_wait" => {
            let (done, at) = (d.pred(operand(operands, 0)?)?, d.address(operand(operands, 1)?)?);
            let third = operand(operands, 2)?;
            if parity {
                Instr::Wait { at, done, state: None, parity: Some(d.src32(third)?) }
            } else {
                Instr::Wait { at, done, state: Some(d.src64(third)?), parity: None }
            }
        }
        _ => Instr::PendingCount { to: d.dst32(operand(operands, 0)?)?, state: d.src64(operand(operands, 1)?)? },
    })
}

fn spaces(op: &mut Opcode) {
    for known in ["shared", "shared::cta", "shared::cluster", "b64"] {
        op.has(known);
    }
}

/// The barrier at a shared address, as CTA and offset.
pub fn place(m: &Machine, address: u32) -> Result<(usize, u32), String> {
    let (block, offset) = m.shared_place(address)?;
    if offset % 8 != 0 {
        return Err(format!("mbarrier at shared address {offset:#x} is not aligned to 8 bytes"));
    }
    check_alive(m, block)?;
    Ok((block, offset))
}

/// The shared memory of a CTA is gone when its threads are.
pub fn check_alive(m: &Machine, block: usize) -> Result<(), String> {
    if block != m.block && m.cluster.blocks[block].live == 0 {
        return Err(format!("access to the shared memory of CTA {block} of the cluster, which has exited"));
    }
    Ok(())
}

fn load(m: &mut Machine, (block, offset): (usize, u32)) -> Result<Barrier, String> {
    let bytes = m.cluster.blocks[block].shared.read(offset, 8)?;
    Barrier::decode(u64::from_le_bytes(bytes.try_into().unwrap()))
        .map_err(|e| format!("shared address {offset:#x}: {e}"))
}

fn store(m: &mut Machine, (block, offset): (usize, u32), barrier: Barrier) -> Result<(), String> {
    m.cluster.hopper.events += 1;
    m.cluster.blocks[block].shared.write(offset, &barrier.encode().to_le_bytes())
}

pub fn update(
    m: &mut Machine,
    at: (usize, u32),
    f: impl FnOnce(&mut Barrier) -> Result<(), String>,
) -> Result<Barrier, String> {
    let before = load(m, at)?;
    let mut barrier = before;
    f(&mut barrier).map_err(|e| format!("mbarrier at shared address {:#x}: {e}", at.1))?;
    store(m, at, barrier)?;
    if let (true, Some(races)) = (barrier.parity != before.parity, &mut m.cluster.races) {
        races.mbarrier_turn(at);
    }
    Ok(before)
}

pub fn execute(i: &Instr, m: &mut Machine, w: &mut Warp, mask: u32, token: &mut u64) -> Result<Flow, String> {
    match i {
        Instr::Wait { at, done, state, parity } => return wait(m, w, mask, token, at, *done, *state, *parity),
        Instr::PendingCount { to, state } => {
            for lane in lanes(mask) {
                let pending = Barrier::decode(w.regs.get64(*state, lane))?.pending;
                w.regs.set32(*to, lane, pending);
            }
            return Ok(Flow::Next);
        }
        // The thread's cp.async copies count as done when it asks for an arrival after them.
        Instr::AfterCopies { .. } => access::finish_all(m, w, mask)?,
        _ => {}
    }
    let arrives = matches!(i, Instr::Arrive { .. } | Instr::AfterCopies { .. });
    let copies = matches!(i, Instr::AfterCopies { .. });
    let told = match &mut m.cluster.races {
        Some(races) if arrives => Some(races.mbarrier_told(m.block, w.id, mask, copies)),
        _ => None,
    };
    for lane in lanes(mask) {
        if let Err(what) = execute_lane(i, m, w, lane, told.as_ref()) {
            w.fault_lane = Some(lane);
            return Err(what);
        }
    }
    Ok(Flow::Next)
}

/// `told`: what arriving threads pass on to those that wait, when races are looked for.
fn execute_lane(
    i: &Instr,
    m: &mut Machine,
    w: &mut Warp,
    lane: usize,
    told: Option<&Arc<Knowledge>>,
) -> Result<(), String> {
    if let Some(at) = i.address() {
        let at = place(m, shared_address(at, w, lane)?)?;
        let kind = if matches!(i, Instr::Init { .. } | Instr::Invalidate { .. }) { Kind::Write } else { Kind::Atomic };
        races::meet(m, w.id, 1 << lane, at, 8, kind)?;
        if let (Some(told), Some(races)) = (told, &mut m.cluster.races) {
            races.mbarrier_arrive(at, told);
        }
    }
    match i {
        Instr::Init { at, count } => {
            let at = place(m, shared_address(at, w, lane)?)?;
            store(m, at, Barrier::new(w.regs.get32(*count, lane))?)?;
        }
        Instr::Invalidate { at } => {
            let at = place(m, shared_address(at, w, lane)?)?;
            load(m, at)?;
            m.cluster.blocks[at.0].shared.write(at.1, &[0; 8])?;
        }
        Instr::ExpectTx { at, bytes } => {
            let at = place(m, shared_address(at, w, lane)?)?;
            let bytes = w.regs.get32(*bytes, lane);
            update(m, at, |b| b.expect(bytes))?;
        }
        Instr::CompleteTx { at, bytes } => {
            let at = place(m, shared_address(at, w, lane)?)?;
            let bytes = w.regs.get32(*bytes, lane);
            update(m, at, |b| b.complete(bytes))?;
        }
        Instr::Arrive { at, state, count, expect, kind } => {
            let at = place(m, shared_address(at, w, lane)?)?;
            let count = count.map_or(1, |row| w.regs.get32(row, lane));
            let expect = expect.map(|row| w.regs.get32(row, lane));
            let before = update(m, at, |b| {
                if let Some(bytes) = expect {
                    b.expect(bytes)?;
                }
                match kind {
                    Arrival::Plain => b.arrive(count),
                    Arrival::NoComplete => b.arrive_no_complete(count),
                    Arrival::Drop => b.arrive_drop(count),
                }
            })?;
            if let Some(row) = state {
                w.regs.set64(*row, lane, before.encode());
            }
        }
        Instr::AfterCopies { at, noinc } => {
            let at = place(m, shared_address(at, w, lane)?)?;
            update(m, at, |b| {
                if !noinc {
                    b.raise_pending()?;
                }
                b.arrive(1)
            })?;
        }
        Instr::Wait { .. } | Instr::PendingCount { .. } => unreachable!(),
    }
    Ok(())
}

/// A barrier by its CTA and shared address, and the lanes that name it.
type Named = ((usize, u32), u32);

fn places(m: &Machine, w: &Warp, mask: u32, at: &Address) -> Result<Vec<Named>, String> {
    let mut out: Vec<Named> = vec![];
    for lane in lanes(mask) {
        let at = place(m, shared_address(at, w, lane)?)?;
        match out.iter_mut().find(|(place, _)| *place == at) {
            Some((_, lanes)) => *lanes |= 1 << lane,
            None => out.push((at, 1 << lane)),
        }
    }
    Ok(out)
}

/// test_wait and try_wait both suspend until the phase is over: an earlier "not yet" tells a program nothing.
/// When the whole cluster stalls they give up and answer false, for programs that poll one barrier and then
/// serve another.
#[allow(clippy::too_many_arguments)]
fn wait(
    m: &mut Machine,
    w: &mut Warp,
    mask: u32,
    token: &mut u64,
    at: &Address,
    done: Pred,
    state: Option<Row>,
    parity: Option<Row>,
) -> Result<Flow, String> {
    if *token == 0 {
        *token = m.cluster.hopper.timeouts + 1;
    }
    let mut over = 0u32;
    let mut why = None;
    for lane in lanes(mask) {
        let at = place(m, shared_address(at, w, lane)?)?;
        if at.0 != m.block {
            return Err("mbarrier test_wait and try_wait work on the CTA's own shared memory only".into());
        }
        let parity = match (state, parity) {
            (Some(row), _) => {
                Barrier::decode(w.regs.get64(row, lane)).map_err(|e| format!("the state operand: {e}"))?.parity
            }
            (_, Some(row)) => w.regs.get32(row, lane) & 1 != 0,
            _ => unreachable!(),
        };
        let mut barrier = load(m, at)?;
        if !barrier.completed(parity) && copy::deliver(m, at)? {
            barrier = load(m, at)?;
        }
        if barrier.completed(parity) {
            over |= 1 << lane;
        } else if why.is_none() {
            why = Some((at.1, parity, barrier));
        }
    }
    if let Some((at, parity, b)) = why
        && *token == m.cluster.hopper.timeouts + 1
    {
        return Ok(Flow::Wait(format!(
            "phase with parity {} of the mbarrier at shared address {at:#x} ({} of {} arrivals and {} bytes missing)",
            parity as u32, b.pending, b.expected, b.transactions
        )));
    }
    w.regs.set_pred(done, mask, over);
    if m.cluster.races.is_some() {
        for (at, mask) in places(m, w, mask, at)? {
            races::meet(m, w.id, mask, at, 8, Kind::Atomic)?;
            if let (true, Some(races)) = (over & mask != 0, &mut m.cluster.races) {
                races.mbarrier_pass(at, m.block, w.id, over & mask);
            }
        }
    }
    Ok(Flow::Next)
}
