//! What each lane of a cluster knows, and the actors that it knows of.
use super::clock::{Clock, Knowledge, joined};
use std::collections::HashMap;
use std::sync::Arc;

/// Who does something. Numbers are per cluster; warps come first, in the order of CTAs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Actor {
    Warp {
        block: usize,
        warp: u32,
    },
    /// The wgmmas of a warpgroup; an epoch for each.
    Multiplier {
        block: usize,
        group: u32,
    },
    /// The cp.async copies of a warp; each lane counts its own.
    Copies {
        block: usize,
        warp: u32,
    },
    /// Copies that complete on the mbarrier at this offset; an epoch for each of its phases.
    Barrier {
        block: usize,
        offset: u32,
    },
    /// Bulk stores of a thread; an epoch for each group.
    Stores {
        block: usize,
        warp: u32,
        lane: usize,
    },
}

struct Warp {
    /// Grows whenever lanes of the warp tell others something: what they do later is not part of it.
    epoch: u32,
    /// Lanes without a thread: nothing is missed of them.
    absent: u32,
    lanes: [Arc<Knowledge>; 32],
}

pub struct Threads {
    pub cluster: u32,
    warps_per_block: usize,
    warps: Vec<Warp>,
    actors: Vec<Actor>,
    numbers: HashMap<Actor, u16>,
}

impl Threads {
    pub fn new(cluster: u32, blocks: usize, threads: u32) -> Threads {
        let warps_per_block = threads.div_ceil(32);
        let nothing = Arc::new(Knowledge::default());
        let mut made = Threads {
            cluster,
            warps_per_block: warps_per_block as usize,
            warps: vec![],
            actors: vec![],
            numbers: HashMap::new(),
        };
        for block in 0..blocks {
            for warp in 0..warps_per_block {
                made.number(Actor::Warp { block, warp });
                let here = (threads - warp * 32).min(32);
                let absent = !(((1u64 << here) - 1) as u32);
                let lanes = std::array::from_fn(|_| nothing.clone());
                made.warps.push(Warp { epoch: 1, absent, lanes });
            }
        }
        made
    }

    pub fn number(&mut self, actor: Actor) -> u16 {
        *self.numbers.entry(actor).or_insert_with(|| {
            self.actors.push(actor);
            self.actors.len() as u16 - 1
        })
    }

    pub fn actor(&self, number: u16) -> Actor {
        self.actors[number as usize]
    }

    pub fn warp(&self, block: usize, warp: u32) -> u16 {
        (block * self.warps_per_block) as u16 + warp as u16
    }

    /// CTA and warp of a warp's number; the same in every cluster.
    pub fn split(&self, warp: u16) -> (usize, usize) {
        (warp as usize / self.warps_per_block, warp as usize % self.warps_per_block)
    }

    pub fn epoch(&self, warp: u16) -> u32 {
        self.warps[warp as usize].epoch
    }

    pub fn knowledge(&self, warp: u16, lane: usize) -> &Arc<Knowledge> {
        &self.warps[warp as usize].lanes[lane]
    }

    /// What some lanes know together.
    pub fn common(&self, warp: u16, mask: u32) -> Arc<Knowledge> {
        let lanes = &self.warps[warp as usize].lanes;
        let mut all = lanes[mask.trailing_zeros() as usize & 31].clone();
        for lane in lanes_of(mask) {
            if !Arc::ptr_eq(&all, &lanes[lane]) {
                all = Knowledge::joined(&all, &lanes[lane]);
            }
        }
        all
    }

    /// The lanes tell what they know and have done so far.
    pub fn release(&mut self, warp: u16, mask: u32) -> Arc<Knowledge> {
        let mut told = Knowledge::clone(&self.common(warp, mask));
        let cluster = self.cluster;
        let w = &mut self.warps[warp as usize];
        Arc::make_mut(&mut told.seen).raise(cluster, warp, mask | w.absent, w.epoch);
        w.epoch += 1;
        Arc::new(told)
    }

    pub fn acquire(&mut self, warp: u16, mask: u32, told: &Arc<Knowledge>) {
        self.change(warp, mask, |known| Knowledge::joined(known, told));
    }

    /// The lanes learn that an actor has completed an epoch.
    pub fn learn(&mut self, warp: u16, mask: u32, actor: u16, of_lanes: u32, epoch: u32) {
        let cluster = self.cluster;
        self.change(warp, mask, |known| {
            if known.seen.knows(cluster, actor, of_lanes, epoch) {
                return known.clone();
            }
            let mut more = Knowledge::clone(known);
            Arc::make_mut(&mut more.seen).raise(cluster, actor, of_lanes, epoch);
            Arc::new(more)
        });
    }

    /// The lanes have exchanged values (a shuffle, a vote): what they read before, they have.
    pub fn exchange(&mut self, warp: u16, mask: u32) {
        let cluster = self.cluster;
        let mut ended = self.common(warp, mask).ended.clone();
        let w = &mut self.warps[warp as usize];
        Arc::make_mut(&mut ended).raise(cluster, warp, mask, w.epoch);
        w.epoch += 1;
        self.change(warp, mask, |known| Arc::new(Knowledge { ended: ended.clone(), ..Knowledge::clone(known) }));
    }

    /// fence.proxy.async.
    pub fn fence_proxy(&mut self, warp: u16, mask: u32) {
        let seen = self.seen_and_done(warp, mask);
        self.change(warp, mask, |known| {
            Arc::new(Knowledge { proxied: joined(&known.proxied, &seen(known)), ..Knowledge::clone(known) })
        });
        self.warps[warp as usize].epoch += 1;
    }

    /// A fence of the device's scope: it completes what relaxed atomics have read, and what they will publish.
    pub fn fence(&mut self, warp: u16, mask: u32) {
        self.change(warp, mask, |known| {
            if known.relaxed.is_empty() {
                return known.clone();
            }
            Arc::new(Knowledge { seen: joined(&known.seen, &known.relaxed), ..Knowledge::clone(known) })
        });
        let seen = self.seen_and_done(warp, mask);
        self.change(warp, mask, |known| Arc::new(Knowledge { fenced: seen(known), ..Knowledge::clone(known) }));
        self.warps[warp as usize].epoch += 1;
    }

    /// A relaxed atomic has read a value that was published with this.
    pub fn read_relaxed(&mut self, warp: u16, lane: usize, published: &Arc<Knowledge>) {
        self.change(warp, 1 << lane, |known| {
            Arc::new(Knowledge { relaxed: joined(&known.relaxed, &published.seen), ..Knowledge::clone(known) })
        });
    }

    /// Adds what the lanes have done to what they have seen. (That all of them did it is no harm: nobody goes by it
    /// who does not also know, by `seen`, that it happened.)
    fn seen_and_done(&self, warp: u16, mask: u32) -> impl Fn(&Knowledge) -> Arc<Clock> + use<> {
        let (cluster, epoch) = (self.cluster, self.warps[warp as usize].epoch);
        move |known| {
            let mut clock = Clock::clone(&known.seen);
            clock.raise(cluster, warp, mask, epoch);
            Arc::new(clock)
        }
    }

    /// Replaces the lanes' knowledge; lanes that shared it go on sharing it.
    fn change(&mut self, warp: u16, mask: u32, f: impl Fn(&Arc<Knowledge>) -> Arc<Knowledge>) {
        let lanes = &mut self.warps[warp as usize].lanes;
        let mut last: Option<(Arc<Knowledge>, Arc<Knowledge>)> = None;
        for lane in lanes_of(mask) {
            match &last {
                Some((before, after)) if Arc::ptr_eq(before, &lanes[lane]) => lanes[lane] = after.clone(),
                _ => {
                    let after = f(&lanes[lane]);
                    last = Some((std::mem::replace(&mut lanes[lane], after.clone()), after));
                }
            }
        }
    }
}

pub fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..32).filter(move |lane| mask >> lane & 1 != 0)
}
