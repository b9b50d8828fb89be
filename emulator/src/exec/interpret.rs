//! The interpreter's loop: one warp's turn.
//!
//! Lanes that share a pc form a group. The group with the smallest pc goes first and runs until it branches apart,
//! waits, or comes to another group's pc, where the two become one: since compilers lay out code forwards, lanes
//! meet again right after an if or a loop.
use super::instr::{ClockKind, Op, Window};
use super::machine::{LOCAL_WINDOW, Machine, SHARED_WINDOW, WINDOW_MASK};
use super::warp::{Flow, Group, Warp};
use super::{access, alu, collective, convert, host_calls, matrix};
use crate::races;

/// A fault before it knows its kernel.
pub struct Failure {
    pub what: String,
    pub line: u32,
    pub warp: u32,
    pub lane: usize,
}

enum Stop {
    /// The group still stands where its `pc` says.
    Pause,
    /// Groups were added or removed.
    Changed,
}

/// Every so many turns a group other than the first one goes first, so that lanes which spin until other lanes of
/// the same warp do something do not spin for ever.
const UNFAIR_TURNS: u32 = 16;

/// Runs up to `quantum` instructions; how many were done (0: everything waits).
pub fn turn(m: &mut Machine, w: &mut Warp, quantum: u32) -> Result<u32, Failure> {
    let mut done = 0;
    w.turns = w.turns.wrapping_add(1);
    w.groups.iter_mut().for_each(|g| g.waits = None);
    let mut last_first = w.turns.is_multiple_of(UNFAIR_TURNS);
    while done < quantum {
        if w.groups.len() > 1 {
            merge(&mut w.groups);
        }
        let able = w.groups.iter().enumerate().filter(|(_, g)| g.waits.is_none());
        let chosen = if last_first { able.max_by_key(|(_, g)| g.pc) } else { able.min_by_key(|(_, g)| g.pc) };
        let Some((index, group)) = chosen else { break };
        last_first = false;
        let here = group.pc;
        let limit = w.groups.iter().map(|g| g.pc).filter(|pc| *pc > here).min().unwrap_or(u32::MAX);
        let before = done;
        run_group(m, w, index, limit, quantum, &mut done)?;
        if done > before && w.groups.len() > 1 {
            // Lanes that wait for others may have got them.
            w.groups.iter_mut().filter(|g| g.token == 0).for_each(|g| g.waits = None);
        }
    }
    Ok(done)
}

/// Groups at the same pc become one, unless they are in the middle of waiting for something of their own.
fn merge(groups: &mut Vec<Group>) {
    let mut i = 0;
    while i < groups.len() {
        let mut j = i + 1;
        while j < groups.len() {
            if groups[j].pc == groups[i].pc && groups[i].token == 0 && groups[j].token == 0 {
                groups[i].mask |= groups[j].mask;
                groups[i].waits = None;
                groups.swap_remove(j);
            } else {
                j += 1;
            }
        }
        i += 1;
    }
}

fn run_group(
    m: &mut Machine,
    w: &mut Warp,
    index: usize,
    limit: u32,
    quantum: u32,
    done: &mut u32,
) -> Result<Stop, Failure> {
    let launch = m.launch;
    let code = &launch.program.code[..];
    let Group { mut pc, mask: mut group, mut token, .. } = w.groups[index];
    let mut left = quantum - *done;
    macro_rules! pause {
        () => {{
            *done = quantum - left;
            let g = &mut w.groups[index];
            (g.pc, g.mask, g.token) = (pc, group, token);
            return Ok(Stop::Pause);
        }};
    }
    while left > 0 {
        if pc >= limit {
            pause!();
        }
        let inst = &code[pc as usize];
        let mask = group & w.regs.pred(inst.guard);
        // Errors carry the instruction's line and a lane.
        macro_rules! check {
            ($e:expr) => {
                match $e {
                    Ok(v) => v,
                    Err(what) => {
                        let lane = w.fault_lane.unwrap_or(mask.trailing_zeros() as usize & 31);
                        return Err(Failure { what, line: inst.line, warp: w.id, lane });
                    }
                }
            };
        }
        macro_rules! flow {
            ($e:expr) => {
                match check!($e) {
                    Flow::Next => token = 0,
                    Flow::Wait(why) => {
                        w.groups[index].waits = Some(why);
                        pause!();
                    }
                }
            };
        }
        // Instructions of the whole warp wait for the lanes that are elsewhere.
        macro_rules! whole_warp {
            () => {
                if mask != w.live {
                    let missing = w.live & !mask;
                    w.groups[index].waits =
                        Some(format!("an instruction of the whole warp that lanes {missing:#010x} have not reached"));
                    pause!();
                }
                if w.live != !0 {
                    check!(Err(format!("an instruction of the whole warp, but only lanes {:#010x} exist", w.live)))
                }
            };
        }
        if mask == 0 {
            pc += 1;
            left -= 1;
            continue;
        }
        m.line = inst.line;
        match &inst.op {
            Op::Alu(i) => alu::run(i, w.regs.base(), mask),
            Op::Bra { target } => {
                left -= 1;
                if mask == group {
                    pc = *target;
                    continue;
                }
                *done = quantum - left;
                w.groups[index] = Group { pc: pc + 1, mask: group & !mask, token: 0, waits: None };
                w.groups.push(Group { pc: *target, mask, token: 0, waits: None });
                return Ok(Stop::Changed);
            }
            Op::Ld(i) => check!(access::load(m, w, i, mask)),
            Op::St(i) => check!(access::store(m, w, i, mask)),
            Op::Mma(i) => {
                whole_warp!();
                matrix::multiply(i, &mut w.regs);
            }
            Op::LdMatrix(i) => {
                whole_warp!();
                check!(matrix::load(m, w, i));
            }
            Op::StMatrix(i) => {
                whole_warp!();
                check!(matrix::store(m, w, i));
            }
            Op::MovMatrix { d, a } => {
                whole_warp!();
                matrix::transpose(&mut w.regs, *d, *a);
            }
            Op::Atom(i) => check!(access::atomic(m, w, i, mask)),
            Op::CpAsync(i) => check!(access::copy_async(m, w, i, mask)),
            Op::CpAsyncCommit => access::commit(m, w, mask),
            Op::CpAsyncWait { keep } => check!(access::wait(m, w, mask, *keep)),
            Op::Hopper(i) => flow!(super::hopper::execute(i, m, w, mask, &mut token)),
            Op::Bar(i) => flow!(collective::barrier(i, m, w, mask, &mut token)),
            Op::WarpSync { members } => {
                let flow: Result<Flow, String> = Ok(collective::warp_sync(*members, m, w, mask, &mut token));
                flow!(flow)
            }
            Op::Vote { .. } | Op::Match { .. } | Op::Redux { .. } | Op::Shfl { .. } | Op::Elect { .. } => {
                flow!(collective::run(&inst.op, m, w, mask))
            }
            Op::ActiveMask { d } => access::lanes(mask).for_each(|l| w.regs.set32(*d, l, mask)),
            Op::Brx { index: row, targets } => {
                left -= 1;
                *done = quantum - left;
                let row = *w.regs.row32(*row);
                let stay = group & !mask;
                w.groups.swap_remove(index);
                if stay != 0 {
                    w.groups.push(Group { pc: pc + 1, mask: stay, token: 0, waits: None });
                }
                for l in access::lanes(mask) {
                    let Some(target) = targets.get(row[l] as usize) else {
                        let what = format!("branch index {} of {} targets", row[l], targets.len());
                        return Err(Failure { what, line: inst.line, warp: w.id, lane: l });
                    };
                    match w.groups.iter_mut().find(|g| g.pc == *target && g.token == 0 && g.waits.is_none()) {
                        Some(g) => g.mask |= 1 << l,
                        None => w.groups.push(Group { pc: *target, mask: 1 << l, token: 0, waits: None }),
                    }
                }
                return Ok(Stop::Changed);
            }
            Op::Exit => {
                left -= 1;
                w.live &= !mask;
                m.cluster.blocks[m.block].live -= mask.count_ones();
                check!(races::exit(m, w.id, mask));
                group &= !mask;
                if group == 0 {
                    *done = quantum - left;
                    w.groups.swap_remove(index);
                    return Ok(Stop::Changed);
                }
                pc += 1;
                continue;
            }
            Op::Trap => check!(Err("trap".to_string())),
            Op::Nop => {}
            Op::Fence { wide } => {
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                if let (true, Some(races)) = (wide, &mut m.cluster.races) {
                    races.fence(m.block, w.id, mask);
                }
            }
            Op::Clock { d, kind } => {
                let (ticks, nanos) = launch.clock();
                let value = match kind {
                    ClockKind::Full => ticks,
                    ClockKind::Low => ticks as u32 as u64,
                    ClockKind::High => ticks >> 32,
                    ClockKind::Nanoseconds => nanos,
                    ClockKind::NanosecondsLow => nanos as u32 as u64,
                    ClockKind::NanosecondsHigh => nanos >> 32,
                };
                let wide = matches!(kind, ClockKind::Full | ClockKind::Nanoseconds);
                access::lanes(mask)
                    .for_each(|l| if wide { w.regs.set64(*d, l, value) } else { w.regs.set32(*d, l, value as u32) });
            }
            Op::Cvta { window, to_generic, d, a, .. } => {
                let window = if *window == Window::Shared { SHARED_WINDOW } else { LOCAL_WINDOW };
                for l in access::lanes(mask) {
                    let at = w.regs.get64(*a, l);
                    w.regs.set64(*d, l, if *to_generic { at | window } else { at & 0xFFFF_FFFF });
                }
            }
            Op::Isspacep { window, d, a } => {
                let wanted = match window {
                    Window::Shared => SHARED_WINDOW,
                    Window::Local => LOCAL_WINDOW,
                    Window::Global => 0,
                };
                let hits = access::lanes(mask)
                    .filter(|l| w.regs.get64(*a, *l) & WINDOW_MASK == wanted)
                    .fold(0, |m, l| m | 1 << l);
                w.regs.set_pred(*d, mask, hits);
            }
            Op::Printf { format, arguments, result } => {
                check!(host_calls::printf(m, w, *format, *arguments, *result, mask))
            }
            Op::AssertFail { parameters } => check!(host_calls::assert_fail(m, w, parameters, mask)),
            other => {
                if !convert::run(other, &mut w.regs, mask) {
                    check!(Err("the interpreter does not know this instruction".to_string()));
                }
            }
        }
        pc += 1;
        left -= 1;
    }
    pause!();
}
