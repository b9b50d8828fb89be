//! Hopper's instructions inside the interpreter: mbarrier, cp.async.bulk, tensor maps, wgmma, clusters.
//! Owned by HOPPER; CORE calls `decode`, `execute`, `on_stall` and `at_exit`.
//!
//! Everything asynchronous happens as late as a correct program can tell. A copy into shared memory lands when
//! somebody waits on its mbarrier (until then its target faults when read); a store reads its shared memory at
//! the wait of its group; a wgmma reads its matrices at the wait of its group.
mod barrier;
mod copy;
mod copy_decode;
mod cta;
mod mma;
mod mma_decode;

use super::cluster::{Cluster, Launch};
use super::decode::{Address, Decoder, Opcode};
use super::machine::{Machine, SHARED_WINDOW, WINDOW_MASK};
use super::warp::{Flow, Warp};
use crate::memory::Region;
use crate::ptx::Operand;

/// A decoded instruction of this file.
pub enum Instr {
    Barrier(barrier::Instr),
    Copy(copy::Instr),
    Mma(mma::Instr),
    Cta(cta::Instr),
    /// fence.proxy.async: matters in strict mode, where writes that it must order are noted.
    ProxyFence,
    /// Other fences, prefetches and hints: nothing here runs out of order.
    Nothing,
}

/// State of a cluster: copies on their way into its shared memories, its barrier, its stalls.
#[derive(Default)]
pub struct ClusterState {
    inbound: Vec<copy::Inbound>,
    /// Completed phases of barrier.cluster.
    phase: u64,
    /// Grows when a stall makes the pending try_waits give up.
    timeouts: u64,
    /// Arrivals and transactions so far: a sign of progress.
    events: u64,
    events_at_stall: u64,
    idle_stalls: u32,
}

#[derive(Default)]
pub struct BlockState {
    mma: mma::BlockState,
    cta: cta::BlockState,
}

#[derive(Default)]
pub struct WarpState {
    mma: mma::WarpState,
    stores: copy::Stores,
    cta: cta::WarpState,
}

/// How often the try_waits of a stalled cluster may give up with no barrier moving in between before the stall
/// counts as a deadlock.
const IDLE_STALLS: u32 = 32;

/// None when the opcode is not one of Hopper's. `Opcode::finish` is called by the caller.
pub fn decode(d: &mut Decoder, op: &mut Opcode, operands: &[Operand]) -> Result<Option<Instr>, String> {
    let part = |i: usize| op.parts.get(i).copied().unwrap_or("");
    match (op.name(), part(1), part(2)) {
        ("mbarrier", ..) | ("cp", "async", "mbarrier") => {
            barrier::decode(d, op, operands).map(|i| Some(Instr::Barrier(i)))
        }
        ("cp", "async", "bulk") | ("cp", "reduce", "async") => copy_decode::decode(d, op, operands).map(Some),
        ("st", "async", _) => copy_decode::decode_store(d, op, operands).map(Some),
        ("wgmma", ..) => mma_decode::decode(d, op, operands).map(|i| Some(Instr::Mma(i))),
        ("mapa" | "getctarank" | "setmaxnreg", ..) | ("barrier", "cluster", _) => {
            cta::decode(d, op, operands).map(|i| Some(Instr::Cta(i)))
        }
        ("griddepcontrol", "launch_dependents" | "wait", _) => {
            op.one_of(&["launch_dependents", "wait"]);
            Ok(Some(Instr::Nothing))
        }
        ("fence", "mbarrier_init", _) => {
            for known in ["mbarrier_init", "release", "cluster"] {
                op.has(known);
            }
            Ok(Some(Instr::Nothing))
        }
        ("fence", "proxy", _) => {
            op.has("proxy");
            let kinds = ["async", "alias", "tensormap::generic", "async::generic"];
            let kind = op.one_of(&kinds).ok_or("unknown kind of fence.proxy")?;
            for known in
                ["release", "acquire", "cta", "cluster", "gpu", "sys", "global", "shared::cta", "shared::cluster"]
            {
                op.has(known);
            }
            Ok(Some(if kind == "async" { Instr::ProxyFence } else { Instr::Nothing }))
        }
        ("prefetch", ..) if op.parts.contains(&"tensormap") => {
            for known in ["tensormap", "param", "const"] {
                op.has(known);
            }
            Ok(Some(Instr::Nothing))
        }
        _ => Ok(None),
    }
}

/// Executes for the lanes of `mask` (never 0). `token` is 0 at the first try and keeps its value between retries
/// after `Flow::Wait`. An Err is a fault's words.
pub fn execute(i: &Instr, m: &mut Machine, w: &mut Warp, mask: u32, token: &mut u64) -> Result<Flow, String> {
    match i {
        Instr::Barrier(i) => barrier::execute(i, m, w, mask, token),
        Instr::Copy(i) => copy::execute(i, m, w, mask),
        Instr::Mma(i) => mma::execute(i, m, w, mask),
        Instr::Cta(i) => cta::execute(i, m, w, mask),
        Instr::ProxyFence => {
            m.cluster.blocks[m.block].shared.fence(w.id);
            if let Some(races) = &mut m.cluster.races {
                races.fence_proxy(m.block, w.id, mask);
            }
            Ok(Flow::Next)
        }
        Instr::Nothing => Ok(Flow::Next),
    }
}

/// Called when every warp of the cluster waits: completes asynchronous work. True if anything changed.
pub fn on_stall(c: &mut Cluster, l: &Launch) -> Result<bool, String> {
    if !c.hopper.inbound.is_empty() {
        copy::deliver_all(&mut machine(c, l, 0))?;
        return Ok(true);
    }
    let state = &mut c.hopper;
    if state.events != state.events_at_stall {
        state.events_at_stall = state.events;
        state.idle_stalls = 0;
    }
    state.idle_stalls += 1;
    state.timeouts += 1;
    Ok(state.idle_stalls <= IDLE_STALLS)
}

/// Called when all threads of the cluster have exited: leftovers that are a bug.
pub fn at_exit(c: &mut Cluster, l: &Launch) -> Result<(), String> {
    if let Some(copy) = c.hopper.inbound.first() {
        return Err(format!(
            "the kernel ended while {} was in flight: nobody waited for its mbarrier",
            copy.describe()
        ));
    }
    for block in 0..c.blocks.len() {
        for index in 0..c.blocks[block].warps.len() {
            let Some(mut warp) = c.blocks[block].warps[index].take() else { continue };
            let result = mma::at_exit(&warp).and_then(|_| copy::at_exit(&mut machine(c, l, block), &mut warp));
            c.blocks[block].warps[index] = Some(warp);
            result?;
        }
    }
    Ok(())
}

fn machine<'a>(cluster: &'a mut Cluster, launch: &'a Launch<'a>, block: usize) -> Machine<'a> {
    Machine { launch, cluster, block, region: Region::NONE, line: 0 }
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}

/// A 32-bit shared address, also from a 64-bit register that holds one or a generic address of it.
fn shared_address(a: &Address, w: &Warp, lane: usize) -> Result<u32, String> {
    if !a.wide {
        return Ok(w.regs.get32(a.row, lane).wrapping_add(a.offset as u32));
    }
    let at = w.regs.get64(a.row, lane).wrapping_add(a.offset as u64);
    match at & WINDOW_MASK {
        SHARED_WINDOW => Ok(at as u32),
        0 if at >> 32 == 0 => Ok(at as u32),
        _ => Err(format!("address {at:#x} is not in shared memory")),
    }
}

fn wide_address(a: &Address, w: &Warp, lane: usize) -> u64 {
    let at = if a.wide { w.regs.get64(a.row, lane) } else { w.regs.get32(a.row, lane) as u64 };
    at.wrapping_add(a.offset as u64)
}

fn operand(operands: &[Operand], index: usize) -> Result<&Operand, String> {
    operands.get(index).ok_or_else(|| format!("operand {} is missing", index + 1))
}

/// Whether the group holds every thread of the warp; `.aligned` instructions wait for the others to arrive.
fn whole_warp(w: &Warp, mask: u32) -> bool {
    mask == w.live
}
