//! What orders: barriers of every kind, and waits for what works on its own.
use super::clock::Knowledge;
use super::threads::Actor;
use super::{Races, cluster_and};
use crate::exec::machine::Machine;
use std::collections::VecDeque;
use std::sync::Arc;

/// Something that threads arrive at and that completes: what was told in the phase under way, and in those that are
/// over.
#[derive(Default)]
pub struct Phase {
    pending: Option<Arc<Knowledge>>,
    over: Option<Arc<Knowledge>>,
}

impl Phase {
    pub fn arrive(&mut self, told: &Arc<Knowledge>) {
        self.pending = Some(match &self.pending {
            Some(pending) => Knowledge::joined(pending, told),
            None => told.clone(),
        });
    }

    pub fn turn(&mut self) {
        if let Some(pending) = self.pending.take() {
            self.over = Some(match &self.over {
                Some(over) => Knowledge::joined(over, &pending),
                None => pending,
            });
        }
    }

    pub fn over(&self) -> Option<&Arc<Knowledge>> {
        self.over.as_ref()
    }
}

#[derive(Default)]
pub struct Mbarrier {
    phase: Phase,
    /// Completed phases.
    completed: u32,
}

/// The cp.async copies of a warp: how many each lane has issued, and how many at each commit not yet waited for.
#[derive(Default)]
pub struct Copies {
    issued: [u32; 32],
    commits: [VecDeque<u32>; 32],
}

/// Bulk store groups of a thread.
#[derive(Default)]
pub struct Groups {
    committed: u32,
}

impl Races {
    /// bar and barrier.
    pub fn block_arrive(&mut self, block: usize, id: u32, warp: u32, mask: u32) {
        let told = self.threads.release(self.threads.warp(block, warp), mask);
        self.barriers.entry((block, id)).or_default().arrive(&told);
    }

    pub fn block_turn(&mut self, block: usize, id: u32) {
        self.barriers.entry((block, id)).or_default().turn();
    }

    pub fn block_pass(&mut self, block: usize, id: u32, warp: u32, mask: u32) {
        if let Some(told) = self.barriers.get(&(block, id)).and_then(Phase::over) {
            self.threads.acquire(self.threads.warp(block, warp), mask, told);
        }
    }

    /// bar.warp.sync of these lanes is complete.
    pub fn warp_sync(&mut self, block: usize, warp: u32, mask: u32) {
        let warp = self.threads.warp(block, warp);
        let told = self.threads.release(warp, mask);
        self.threads.acquire(warp, mask, &told);
    }

    /// Lanes have executed a shuffle, a vote or the like together. By the letter that orders nothing.
    pub fn warp_exchange(&mut self, block: usize, warp: u32, mask: u32) {
        if self.exchanges_order {
            self.threads.exchange(self.threads.warp(block, warp), mask);
        }
    }

    pub fn cluster_arrive(&mut self, block: usize, warp: u32, mask: u32, relaxed: bool) {
        if !relaxed {
            let told = self.threads.release(self.threads.warp(block, warp), mask);
            self.cluster_barrier.arrive(&told);
        }
    }

    pub fn cluster_turn(&mut self) {
        self.cluster_barrier.turn();
    }

    pub fn cluster_pass(&mut self, block: usize, warp: u32, mask: u32) {
        if let Some(told) = self.cluster_barrier.over() {
            self.threads.acquire(self.threads.warp(block, warp), mask, told);
        }
    }

    /// What lanes tell that are about to arrive at an mbarrier; `copies`: with the end of their cp.async copies.
    pub fn mbarrier_told(&mut self, block: usize, warp: u32, mask: u32, copies: bool) -> Arc<Knowledge> {
        let number = self.threads.warp(block, warp);
        let mut told = self.threads.release(number, mask);
        if copies {
            let actor = self.threads.number(Actor::Copies { block, warp });
            if let Some(copies) = self.copies.get(&number) {
                let more = Arc::make_mut(&mut told);
                let clock = Arc::make_mut(&mut more.seen);
                super::threads::lanes_of(mask)
                    .for_each(|l| clock.raise(self.threads.cluster, actor, 1 << l, copies.issued[l]));
            }
        }
        told
    }

    pub fn mbarrier_arrive(&mut self, at: (usize, u32), told: &Arc<Knowledge>) {
        self.mbarriers.entry(at).or_default().phase.arrive(told);
    }

    /// A phase has ended: with it, all copies that complete on the barrier in that phase.
    pub fn mbarrier_turn(&mut self, at: (usize, u32)) {
        let actor = self.threads.number(Actor::Barrier { block: at.0, offset: at.1 });
        let barrier = self.mbarriers.entry(at).or_default();
        barrier.completed += 1;
        let mut copies = Knowledge::default();
        Arc::make_mut(&mut copies.seen).raise(self.threads.cluster, actor, !0, barrier.completed);
        barrier.phase.arrive(&Arc::new(copies));
        barrier.phase.turn();
    }

    pub fn mbarrier_pass(&mut self, at: (usize, u32), block: usize, warp: u32, mask: u32) {
        if let Some(told) = self.mbarriers.get(&at).and_then(|b| b.phase.over()) {
            self.threads.acquire(self.threads.warp(block, warp), mask, told);
        }
    }

    /// The actor and the epoch of copies that will complete in the barrier's present phase.
    pub fn mbarrier_now(&mut self, at: (usize, u32)) -> (u16, u32) {
        let actor = self.threads.number(Actor::Barrier { block: at.0, offset: at.1 });
        (actor, self.mbarriers.entry(at).or_default().completed + 1)
    }

    /// wgmma.wait_group: the warpgroup's first `until` ones have ended.
    pub fn multiplied(&mut self, block: usize, warp: u32, until: u64) {
        let actor = self.threads.number(Actor::Multiplier { block, group: warp / 4 });
        let warp = self.threads.warp(block, warp);
        self.threads.learn(warp, !0, actor, !0, until as u32);
    }

    /// The actor and the epoch of a lane's next cp.async.
    pub fn copy_issued(&mut self, block: usize, warp: u32, lane: usize) -> (u16, u32) {
        let number = self.threads.warp(block, warp);
        let copies = self.copies.entry(number).or_default();
        copies.issued[lane] += 1;
        (self.threads.number(Actor::Copies { block, warp }), copies.issued[lane])
    }

    pub fn copies_commit(&mut self, block: usize, warp: u32, mask: u32) {
        let copies = self.copies.entry(self.threads.warp(block, warp)).or_default();
        super::threads::lanes_of(mask).for_each(|l| copies.commits[l].push_back(copies.issued[l]));
    }

    /// cp.async.wait_group; None: wait_all.
    pub fn copies_wait(&mut self, block: usize, warp: u32, mask: u32, keep: Option<u32>) {
        let actor = self.threads.number(Actor::Copies { block, warp });
        let warp = self.threads.warp(block, warp);
        let Some(copies) = self.copies.get_mut(&warp) else { return };
        // By number of copies, since lanes mostly have as many.
        let mut ends: Vec<(u32, u32)> = vec![];
        for lane in super::threads::lanes_of(mask) {
            let commits = &mut copies.commits[lane];
            let end = match keep {
                None => {
                    commits.clear();
                    Some(copies.issued[lane])
                }
                Some(keep) => {
                    let over = commits.len().saturating_sub(keep as usize);
                    commits.drain(..over).next_back()
                }
            };
            let Some(end) = end else { continue };
            match ends.iter_mut().find(|(n, _)| *n == end) {
                Some((_, lanes)) => *lanes |= 1 << lane,
                None => ends.push((end, 1 << lane)),
            }
        }
        for (end, lanes) in ends {
            // Each lane learns of its own copies only.
            for lane in super::threads::lanes_of(lanes) {
                self.threads.learn(warp, 1 << lane, actor, 1 << lane, end);
            }
        }
    }

    /// The actor and the epoch of a thread's bulk stores before the next commit.
    pub fn store_issued(&mut self, block: usize, warp: u32, lane: usize) -> (u16, u32) {
        let actor = self.threads.number(Actor::Stores { block, warp, lane });
        (actor, self.stores.entry(actor).or_default().committed + 1)
    }

    pub fn stores_commit(&mut self, block: usize, warp: u32, lane: usize) {
        let actor = self.threads.number(Actor::Stores { block, warp, lane });
        self.stores.entry(actor).or_default().committed += 1;
    }

    /// cp.async.bulk.wait_group, with or without .read.
    pub fn stores_wait(&mut self, block: usize, warp: u32, lane: usize, keep: usize) {
        let actor = self.threads.number(Actor::Stores { block, warp, lane });
        let over = self.stores.entry(actor).or_default().committed.saturating_sub(keep as u32);
        let warp = self.threads.warp(block, warp);
        self.threads.learn(warp, 1 << lane, actor, !0, over);
    }

    /// fence.proxy.async.
    pub fn fence_proxy(&mut self, block: usize, warp: u32, mask: u32) {
        self.threads.fence_proxy(self.threads.warp(block, warp), mask);
    }

    /// membar.gl and the like.
    pub fn fence(&mut self, block: usize, warp: u32, mask: u32) {
        self.threads.fence(self.threads.warp(block, warp), mask);
    }
}

/// Lanes of a warp end. When they were a CTA's last, its shared memory goes: whatever other CTAs did there must be
/// known to have happened.
pub fn exit(m: &mut Machine, warp: u32, mask: u32) -> Result<(), String> {
    let (block, left) = (m.block, m.cluster.blocks[m.block].live);
    cluster_and(m, |races, launch| {
        let told = races.threads.release(races.threads.warp(block, warp), mask);
        races.exits[block] = Knowledge::joined(&races.exits[block], &told);
        if left > 0 {
            return Ok(());
        }
        let known = &races.exits[block].seen;
        match races.remote[block].values().find(|a| !known.knows(a.cluster, a.actor, a.lanes, a.epoch)) {
            Some(access) => Err(format!(
                "race: CTA {block} of the cluster may end, and its shared memory go, before the {}",
                races.describe(launch, access)
            )),
            None => Ok(()),
        }
    })
}
