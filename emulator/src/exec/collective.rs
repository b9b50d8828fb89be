//! Warp-wide instructions and the barriers of a CTA.
//!
//! A `.sync` instruction needs every live lane of its member mask in the executing group; until then the group
//! waits (with token 0, so that lanes which arrive at the same instruction join it).
use super::access::{apply, lanes};
use super::instr::{AtomOp, Bar, BarKind, Op, Row, ShflMode, Ty, VoteMode};
use super::machine::Machine;
use super::warp::{Flow, Registers, Warp};

/// What a shuffle gives from a lane that does not take part.
const UNDEFINED: u32 = 0xFFFF_FFFF;

/// One of a CTA's 16 barriers.
#[derive(Clone, Copy)]
pub struct Barrier {
    arrived: u32,
    /// Threads that complete it; 0 for all of the CTA.
    expected: u32,
    /// Completed phases plus one.
    phase: u64,
    popc: u32,
    all: bool,
    any: bool,
    /// Results of the last completed phase.
    result: (u32, bool, bool),
}

impl Default for Barrier {
    fn default() -> Barrier {
        Barrier { arrived: 0, expected: 0, phase: 1, popc: 0, all: true, any: false, result: (0, true, false) }
    }
}

impl Barrier {
    fn complete_if_full(&mut self, live: u32) -> Result<(), String> {
        let expected = if self.expected == 0 { live } else { self.expected };
        if self.arrived > expected {
            return Err(format!("{} threads arrived at a barrier for {expected}", self.arrived));
        }
        if self.arrived == expected && self.arrived > 0 {
            *self = Barrier { phase: self.phase + 1, result: (self.popc, self.all, self.any), ..Barrier::default() };
        }
        Ok(())
    }

    /// Words for a deadlock's dump.
    pub fn describe(&self) -> Option<String> {
        (self.arrived > 0).then(|| match self.expected {
            0 => format!("{} threads arrived, all live ones are expected", self.arrived),
            n => format!("{} of {n} threads arrived", self.arrived),
        })
    }
}

pub fn barrier(i: &Bar, m: &mut Machine, w: &mut Warp, mask: u32, token: &mut u64) -> Result<Flow, String> {
    let lane = mask.trailing_zeros() as usize;
    let id = w.regs.get32(i.id, lane);
    let block = &mut m.cluster.blocks[m.block];
    let live = block.live;
    let Some(b) = block.barriers.get_mut(id as usize) else { return Err(format!("barrier {id}: there are 16")) };
    if *token == 0 {
        let count = i.count.map_or(0, |c| w.regs.get32(c, lane));
        if !count.is_multiple_of(32) {
            return Err(format!("barrier {id} for {count} threads: a multiple of 32 is needed"));
        }
        if b.arrived > 0 && b.expected != count {
            return Err(format!("barrier {id} is used for {count} threads while others wait there for {}", b.expected));
        }
        b.expected = count;
        // A count is in whole warps, also when a warp's threads are fewer.
        b.arrived += if count > 0 && mask == w.live { 32 } else { mask.count_ones() };
        let votes = w.regs.pred(i.input) & mask;
        b.popc += votes.count_ones();
        b.all &= votes == mask;
        b.any |= votes != 0;
        *token = b.phase;
        if let Some(races) = &mut m.cluster.races {
            races.block_arrive(m.block, id, w.id, mask);
        }
    }
    let phase = b.phase;
    b.complete_if_full(live)?;
    if let (true, Some(races)) = (b.phase != phase, &mut m.cluster.races) {
        races.block_turn(m.block, id);
    }
    if i.kind != BarKind::Arrive && b.phase == *token {
        return Ok(Flow::Wait(format!("barrier {id}")));
    }
    let (popc, all, any) = b.result;
    if let (true, Some(races)) = (i.kind != BarKind::Arrive, &mut m.cluster.races) {
        races.block_pass(m.block, id, w.id, mask);
    }
    let spread = |on: bool| if on { !0 } else { 0 };
    match i.kind {
        BarKind::RedPopc => lanes(mask).for_each(|l| w.regs.set32(i.output, l, popc)),
        BarKind::RedAnd => w.regs.set_pred(i.output, mask, spread(all)),
        BarKind::RedOr => w.regs.set_pred(i.output, mask, spread(any)),
        _ => {}
    }
    Ok(Flow::Next)
}

pub fn warp_sync(members: Row, m: &mut Machine, w: &mut Warp, mask: u32, token: &mut u64) -> Flow {
    let needed = w.regs.get32(members, mask.trailing_zeros() as usize) & w.live;
    let synchronised = |m: &mut Machine, w: &Warp, lanes: u32| {
        if let Some(races) = &mut m.cluster.races {
            races.warp_sync(m.block, w.id, lanes);
        }
    };
    if needed & !mask == 0 && *token == 0 {
        synchronised(m, w, mask);
        return Flow::Next;
    }
    // Lanes may meet at different bar.warp.sync instructions.
    if *token == 0 {
        *token = 1;
        w.sync_arrived |= mask;
    }
    // All lanes that one bar.warp.sync needs are released together. So lanes that still wait do so at one that has not
    // released any: lanes released from an earlier one do not count, even if they have not moved on yet. (Looked at
    // again while waiting, because the missing ones may have exited meanwhile.)
    if mask & !w.sync_released != 0 && needed & !w.sync_arrived == 0 {
        w.sync_released |= needed;
        w.sync_arrived &= !needed;
        synchronised(m, w, needed);
    }
    if mask & !w.sync_released == 0 {
        w.sync_released &= !mask;
        return Flow::Next;
    }
    Flow::Wait(format!("bar.warp.sync {needed:#x}"))
}

/// Member masks among the executing lanes, each with its lanes; or what is missing.
fn subgroups(regs: &Registers, live: u32, members: Row, mask: u32) -> Result<Vec<(u32, u32)>, Flow> {
    let row = regs.row32(members);
    let mut out = vec![];
    let mut left = mask;
    while left != 0 {
        let all = row[left.trailing_zeros() as usize];
        let mine = lanes(left).filter(|l| row[*l] == all).fold(0, |m, l| m | 1 << l);
        left &= !mine;
        let missing = all & live & !mine;
        if missing != 0 {
            return Err(Flow::Wait(format!("a warp-wide instruction that lanes {missing:#010x} have not reached")));
        }
        out.push((all, mine));
    }
    Ok(out)
}

#[inline(always)]
fn uniform(regs: &Registers, members: Row, mask: u32) -> bool {
    let row = regs.row32(members);
    mask == !0 && row.iter().all(|m| *m == !0)
}

/// Runs a warp-wide instruction.
pub fn run(op: &Op, m: &mut Machine, w: &mut Warp, mask: u32) -> Result<Flow, String> {
    let exchanged = |m: &mut Machine, w: &Warp, lanes: u32| match &mut m.cluster.races {
        Some(races) if !matches!(op, Op::Elect { .. }) => races.warp_exchange(m.block, w.id, lanes),
        _ => {}
    };
    let members = match op {
        Op::Vote { members, .. } | Op::Match { members, .. } | Op::Redux { members, .. } => *members,
        Op::Shfl { members, .. } | Op::Elect { members, .. } => *members,
        _ => unreachable!("not a warp-wide instruction"),
    };
    if uniform(&w.regs, members, mask) {
        each(op, w, !0, !0);
        exchanged(m, w, !0);
        return Ok(Flow::Next);
    }
    let groups = match subgroups(&w.regs, w.live, members, mask) {
        Ok(groups) => groups,
        Err(wait) => return Ok(wait),
    };
    for (all, mine) in groups {
        if mine & !all != 0 {
            w.fault_lane = Some((mine & !all).trailing_zeros() as usize);
            return Err(format!("the lane is not in its own member mask {all:#010x}"));
        }
        each(op, w, mine, all);
        exchanged(m, w, mine);
    }
    Ok(Flow::Next)
}

/// One member mask's share of an instruction; `mine` are the lanes that execute.
#[inline(always)]
fn each(op: &Op, w: &mut Warp, mine: u32, _all: u32) {
    let spread = |on: bool| if on { !0u32 } else { 0 };
    match op {
        Op::Vote { mode, d, p, .. } => {
            let votes = w.regs.pred(*p) & mine;
            match mode {
                VoteMode::Ballot => lanes(mine).for_each(|l| w.regs.set32(*d, l, votes)),
                VoteMode::All => w.regs.set_pred(*d, mine, spread(votes == mine)),
                VoteMode::Any => w.regs.set_pred(*d, mine, spread(votes != 0)),
                VoteMode::Uni => w.regs.set_pred(*d, mine, spread(votes == 0 || votes == mine)),
            }
        }
        Op::Match { all, wide, d, p, a, .. } => {
            let value: [u64; 32] =
                std::array::from_fn(|l| if *wide { w.regs.get64(*a, l) } else { w.regs.get32(*a, l) as u64 });
            let same = |v: u64| lanes(mine).filter(|l| value[*l] == v).fold(0u32, |m, l| m | 1 << l);
            if *all {
                let equal = same(value[mine.trailing_zeros() as usize]) == mine;
                lanes(mine).for_each(|l| w.regs.set32(*d, l, if equal { mine } else { 0 }));
                w.regs.set_pred(*p, mine, spread(equal));
            } else {
                lanes(mine).for_each(|l| w.regs.set32(*d, l, same(value[l])));
            }
        }
        Op::Redux { op, ty, d, a, .. } => {
            let mut values = lanes(mine).map(|l| w.regs.get32(*a, l) as u64);
            let first = values.next().unwrap_or(0);
            let ty = if *op == AtomOp::Add { Ty::U32 } else { *ty };
            let r = values.fold(first, |x, y| apply(*op, ty, false, x, y, 0)) as u32;
            lanes(mine).for_each(|l| w.regs.set32(*d, l, r));
        }
        Op::Shfl { mode, d, p, a, b, c, .. } => {
            let (a, b, c) = (*w.regs.row32(*a), *w.regs.row32(*b), *w.regs.row32(*c));
            let mut inside = 0;
            let mut out = [0u32; 32];
            for l in 0..32u32 {
                let (n, clamp, seg) = (b[l as usize] & 31, c[l as usize] & 31, c[l as usize] >> 8 & 31);
                let max = (l & seg) | (clamp & !seg);
                let (from, ok) = match mode {
                    ShflMode::Up => (l.wrapping_sub(n), (l as i32 - n as i32) >= max as i32),
                    ShflMode::Down => (l + n, l + n <= max),
                    ShflMode::Bfly => (l ^ n, (l ^ n) <= max),
                    ShflMode::Idx => {
                        let from = (l & seg) | (n & !seg);
                        (from, from <= max)
                    }
                };
                let from = if ok { from & 31 } else { l };
                inside |= (ok as u32) << l;
                out[l as usize] = if mine >> from & 1 != 0 { a[from as usize] } else { UNDEFINED };
            }
            let to = w.regs.row32_mut(*d);
            lanes(mine).for_each(|l| to[l] = out[l]);
            w.regs.set_pred(*p, mine, inside);
        }
        Op::Elect { d, p, .. } => {
            let leader = mine.trailing_zeros();
            lanes(mine).for_each(|l| w.regs.set32(*d, l, leader));
            w.regs.set_pred(*p, mine, 1 << leader);
        }
        _ => {}
    }
}
