//! Finds races: two accesses to the same bytes, not both reads and not both atomic, that nothing orders. Whether they
//! happened to run in the right order here does not matter. On with CUDA_EMULATOR_RACES=1, and by the letter of CUDA's
//! manual with 2.
//!
//! Every lane has a clock of what it knows to have happened (`clock`, `threads`); barriers and waits pass that on
//! (`edges`); memory remembers its last accesses (`shadow`, `global`), and each new one must know of those that it
//! conflicts with. What runs on its own (TMA, wgmma, cp.async, bulk stores) is an actor of its own: it begins when its
//! thread starts it, and others know that it ended only from the wait that covers it.
//!
//! The interpreter calls in here where `Cluster::races` is there; without it nothing of this costs anything.
mod clock;
mod edges;
mod global;
mod shadow;
mod threads;

pub use clock::Knowledge;
pub use edges::exit;
pub use global::Global;
pub use shadow::Kind;

use crate::exec::access::resolve;
use crate::exec::cluster::Launch;
use crate::exec::instr::{Order, Where};
use crate::exec::machine::Machine;
use edges::{Copies, Groups, Mbarrier, Phase};
use shadow::{Access, Cell, Conflict, Probe};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use threads::{Actor, Threads, lanes_of};

/// What is known of a cluster's threads and shared memory.
pub struct Races {
    exchanges_order: bool,
    threads: Threads,
    /// By CTA and by shared address / 16.
    shadows: Vec<Vec<Cell>>,
    barriers: HashMap<(usize, u32), Phase>,
    mbarriers: HashMap<(usize, u32), Mbarrier>,
    cluster_barrier: Phase,
    copies: HashMap<u16, Copies>,
    stores: HashMap<u16, Groups>,
    /// What atomics on shared memory told.
    published: HashMap<(usize, u32), Arc<Knowledge>>,
    /// For each warpgroup, its last wgmmas and the 16-byte units that they read.
    operands: HashMap<(usize, u32), VecDeque<Operands>>,
    /// By CTA: what its ended threads knew, and the last accesses of other CTAs to its shared memory.
    exits: Vec<Arc<Knowledge>>,
    remote: Vec<HashMap<(u16, u32), Access>>,
}

/// A wgmma's number, and the 16-byte units that it reads.
type Operands = (u64, Arc<Vec<u32>>);

/// All reads of shared memory are remembered: there are no more than warps.
const SHARED_OTHERS: usize = usize::MAX;
/// Characters of an instruction in a fault.
const TEXT: usize = 120;
/// wgmmas of which the operands are kept for the other warps of the warpgroup.
const OPERANDS: usize = 256;

impl Races {
    pub fn new(global: &Global, cluster: u64, blocks: usize, threads: u32, shared_end: u32) -> Races {
        let cells = (shared_end as usize).div_ceil(shadow::CELL);
        Races {
            exchanges_order: global.exchanges_order,
            threads: Threads::new(cluster as u32, blocks, threads),
            shadows: vec![vec![Cell::default(); cells]; blocks],
            barriers: HashMap::new(),
            mbarriers: HashMap::new(),
            cluster_barrier: Phase::default(),
            copies: HashMap::new(),
            stores: HashMap::new(),
            published: HashMap::new(),
            operands: HashMap::new(),
            exits: vec![Arc::default(); blocks],
            remote: vec![HashMap::new(); blocks],
        }
    }

    /// Words for an access: who, and where in the program.
    fn describe(&self, launch: &Launch, access: &Access) -> String {
        let verb = match access.kind {
            Kind::Read | Kind::AsyncRead => "read",
            Kind::Write | Kind::AsyncWrite | Kind::CopyWrite => "write",
            Kind::Atomic => "atomic access",
        };
        let index = |block: usize| launch.block_index(access.cluster as u64, block);
        let who = if access.cluster != self.threads.cluster {
            // Only warps touch global memory in their own name.
            let (block, warp) = self.threads.split(access.actor);
            format!("warp {warp} of block {:?}", index(block))
        } else {
            match self.threads.actor(access.actor) {
                Actor::Warp { block, warp } => match access.lanes.count_ones() {
                    1 => format!("warp {warp} lane {} of block {:?}", access.lanes.trailing_zeros(), index(block)),
                    _ => format!("warp {warp} lanes {:#x} of block {:?}", access.lanes, index(block)),
                },
                Actor::Multiplier { block, group } => {
                    format!("wgmma {} of warpgroup {group} of block {:?}", access.epoch - 1, index(block))
                }
                Actor::Copies { block, warp } => {
                    format!(
                        "cp.async of warp {warp} lane {} of block {:?}",
                        access.lanes.trailing_zeros(),
                        index(block)
                    )
                }
                Actor::Barrier { block, offset } => format!(
                    "a bulk copy that completes phase {} of the mbarrier at shared address {offset:#x} of block {:?}",
                    access.epoch - 1,
                    index(block)
                ),
                Actor::Stores { block, warp, lane } => {
                    format!("a bulk store of warp {warp} lane {lane} of block {:?}", index(block))
                }
            }
        };
        // The accumulators of a wgmma would fill the screen.
        let text: String = launch.text(access.line).trim().chars().take(TEXT).collect();
        format!("{verb} by {who} at ptx line {}: {text}", access.line)
    }

    fn finding(&self, launch: &Launch, place: &str, access: &Access, conflict: &Conflict) -> Finding {
        let words = match conflict {
            Conflict::Race(other) => format!(
                "race at {place}: nothing orders the {}\n  and the earlier {}\n ",
                self.describe(launch, access),
                self.describe(launch, other)
            ),
            Conflict::Unfenced(write) => format!(
                "missing fence.proxy.async at {place}: the asynchronous proxy may not see the {}\n  in the {}\n ",
                self.describe(launch, write),
                self.describe(launch, access)
            ),
        };
        Finding { words, between_writes: matches!(conflict, Conflict::Race(other) if other.kind == Kind::Write) }
    }

    /// Checks an access to a CTA's shared memory, and notes it.
    fn shared(
        &mut self,
        launch: &Launch,
        (block, at): (usize, u32),
        len: usize,
        probe: &Probe,
        step: Step,
    ) -> Result<(), Finding> {
        if step != Step::Note
            && let Some((place, conflict)) = shadow::check(&self.shadows[block], at as usize, len, probe)
        {
            let place = format!(
                "shared address {place:#x} of block {:?}",
                launch.block_index(self.threads.cluster as u64, block)
            );
            return Err(self.finding(launch, &place, &probe.access, &conflict));
        }
        if step != Step::Check {
            shadow::note(&mut self.shadows[block], at as usize, len, probe, SHARED_OTHERS);
        }
        Ok(())
    }

    fn global(&self, launch: &Launch, at: u64, len: usize, probe: &Probe, step: Step) -> Result<(), Finding> {
        let Some(global) = &launch.races else { return Ok(()) };
        let new = probe.access;
        // Lanes of one store may write the same place: one of them wins, and all of them were checked before.
        let same_store = |old: &Access| {
            (old.cluster, old.actor, old.epoch, old.line, old.kind)
                == (new.cluster, new.actor, new.epoch, new.line, new.kind)
        };
        let found = match step {
            Step::Check => global.check(at, len, probe),
            _ => global
                .note(at, len, probe, |c| step == Step::Note && matches!(c, Conflict::Race(old) if same_store(old))),
        };
        match found {
            Some(conflict) => {
                let place = format!("global address {at:#x} ({})", launch.view.describe(at));
                Err(self.finding(launch, &place, &new, &conflict))
            }
            None => Ok(()),
        }
    }

    fn access(&self, warp: u16, lanes: u32, kind: Kind, line: u32) -> Access {
        Access { cluster: self.threads.cluster, actor: warp, kind, lanes, epoch: self.threads.epoch(warp), line }
    }

    /// Notes what another CTA of the cluster does to a CTA's shared memory.
    fn visit(&mut self, from: usize, block: usize, access: Access) {
        if from != block {
            self.remote[block].insert((access.actor, access.lanes), access);
        }
    }
}

struct Finding {
    words: String,
    /// The other access is an ordinary write, too.
    between_writes: bool,
}

impl From<Finding> for String {
    fn from(finding: Finding) -> String {
        finding.words
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Check,
    /// What was checked already.
    Note,
    Both,
}

/// Calls `f` with the cluster's state, and the launch.
fn cluster_and(m: &mut Machine, f: impl FnOnce(&mut Races, &Launch) -> Result<(), String>) -> Result<(), String> {
    let launch = m.launch;
    m.cluster.races.as_mut().map_or(Ok(()), |races| f(races, launch))
}

/// Loads, stores and atomics of a warp, before they happen. An Err names the lane. A write over a write does not
/// count where `same` says that it changes nothing.
pub fn touch(m: &mut Machine, what: Touch, same: impl Fn(&mut Machine, usize) -> bool) -> Result<(), (usize, String)> {
    let Some(mut races) = m.cluster.races.take() else { return Ok(()) };
    let result = touch_all(&mut races, m, what, same);
    m.cluster.races = Some(races);
    result
}

/// What a warp's lanes are about to do, each at its own address.
pub struct Touch<'a> {
    pub warp: u32,
    pub mask: u32,
    pub place: Where,
    pub at: &'a [u64; 32],
    /// Bytes of each lane.
    pub len: usize,
    pub kind: Kind,
}

fn touch_all(
    races: &mut Races,
    m: &mut Machine,
    Touch { warp, mask, place, at, len, kind }: Touch,
    same: impl Fn(&mut Machine, usize) -> bool,
) -> Result<(), (usize, String)> {
    let number = races.threads.warp(m.block, warp);
    // All lanes' writes are checked before any is noted: that they meet each other is no race.
    let steps: &[Step] = if kind == Kind::Write { &[Step::Check, Step::Note] } else { &[Step::Both] };
    for step in steps {
        for lane in lanes_of(mask) {
            let access = races.access(number, 1 << lane, kind, m.line);
            let knowledge = races.threads.knowledge(number, lane).clone();
            let probe = Probe { access, actor: number, lanes: 1 << lane, knowledge: &knowledge };
            let done = match resolve(place, at[lane]) {
                (Where::Local | Where::Param, _) => continue,
                (Where::Shared, address) => {
                    let Ok(target) = m.shared_place(address as u32) else { continue };
                    if target.0 != m.block && m.cluster.blocks[target.0].live == 0 {
                        let words =
                            format!("access to the shared memory of CTA {} of the cluster, which has exited", target.0);
                        Err(Finding { words, between_writes: false })
                    } else {
                        races.visit(m.block, target.0, access);
                        races.shared(m.launch, target, len, &probe, *step)
                    }
                }
                (_, address) => races.global(m.launch, address, len, &probe, *step),
            };
            if let Err(finding) = done
                && !(kind == Kind::Write && finding.between_writes && same(m, lane))
            {
                return Err((lane, finding.words));
            }
        }
    }
    Ok(())
}

/// A store or load that has an order, or an atomic. Called before it happens with what it tells others, and
/// afterwards with what it may learn.
pub fn publish(m: &mut Machine, warp: u32, mask: u32, place: Where, at: &[u64; 32], order: Order, adds: bool) {
    let Some(mut races) = m.cluster.races.take() else { return };
    let number = races.threads.warp(m.block, warp);
    for lane in lanes_of(mask) {
        match resolve(place, at[lane]) {
            (Where::Shared, address) => {
                let Ok(target) = m.shared_place(address as u32) else { continue };
                let told = races.threads.release(number, 1 << lane);
                let place = races.published.entry(target).or_default();
                *place = if adds { Knowledge::joined(place, &told) } else { told };
            }
            (Where::Global | Where::Generic, address) => {
                let Some(global) = &m.launch.races else { continue };
                let told = if order.releases() {
                    races.threads.release(number, 1 << lane)
                } else {
                    let fenced = races.threads.knowledge(number, lane).fenced.clone();
                    if fenced.is_empty() && adds {
                        continue;
                    }
                    Arc::new(Knowledge { seen: fenced.clone(), fenced, ..Knowledge::default() })
                };
                global.publish(address, told, adds);
            }
            _ => {}
        }
    }
    m.cluster.races = Some(races);
}

pub fn observe(m: &mut Machine, warp: u32, mask: u32, place: Where, at: &[u64; 32], order: Order) {
    let Some(mut races) = m.cluster.races.take() else { return };
    let number = races.threads.warp(m.block, warp);
    for lane in lanes_of(mask) {
        match resolve(place, at[lane]) {
            (Where::Shared, address) => {
                let Ok(target) = m.shared_place(address as u32) else { continue };
                if let Some(told) = races.published.get(&target) {
                    races.threads.acquire(number, 1 << lane, told);
                }
            }
            (Where::Global | Where::Generic, address) => {
                let Some(told) = m.launch.races.as_ref().and_then(|g| g.published(address)) else { continue };
                if order.acquires() {
                    races.threads.acquire(number, 1 << lane, &told);
                } else {
                    races.threads.read_relaxed(number, lane, &told);
                }
            }
            _ => {}
        }
    }
    m.cluster.races = Some(races);
}

/// An operation on an mbarrier, or another object in shared memory that is there for threads to meet: atomic.
pub fn meet(
    m: &mut Machine,
    warp: u32,
    mask: u32,
    (block, at): (usize, u32),
    len: usize,
    kind: Kind,
) -> Result<(), String> {
    let (line, from) = (m.line, m.block);
    cluster_and(m, |races, launch| {
        let number = races.threads.warp(from, warp);
        let access = races.access(number, mask, kind, line);
        races.visit(from, block, access);
        let knowledge = races.threads.common(number, mask);
        let probe = Probe { access, actor: number, lanes: mask, knowledge: &knowledge };
        Ok(races.shared(launch, (block, at), len, &probe, Step::Both)?)
    })
}

/// The thread that started something, as it was then.
#[derive(Clone)]
pub struct Issuer {
    access: Access,
    knowledge: Arc<Knowledge>,
}

pub fn issuer(m: &mut Machine, warp: u32, lane: usize) -> Option<Issuer> {
    let races = m.cluster.races.as_ref()?;
    let number = races.threads.warp(m.block, warp);
    let access = races.access(number, 1 << lane, Kind::Read, m.line);
    Some(Issuer { access, knowledge: races.threads.knowledge(number, lane).clone() })
}

/// Global memory that something started earlier reads or writes: as if its thread had done so at its start.
pub fn global_by(m: &mut Machine, issuer: &Option<Issuer>, at: u64, len: usize, kind: Kind) -> Result<(), String> {
    let Some(Issuer { access, knowledge }) = issuer else { return Ok(()) };
    let access = Access { kind, ..*access };
    cluster_and(m, |races, launch| {
        let probe = Probe { access, actor: access.actor, lanes: access.lanes, knowledge };
        Ok(races.global(launch, at, len, &probe, Step::Both)?)
    })
}

/// A bulk copy into shared memory begins that will complete on an mbarrier.
pub fn inbound(
    m: &mut Machine,
    warp: u32,
    lane: usize,
    to: (usize, u32),
    len: usize,
    barrier: (usize, u32),
) -> Result<(), String> {
    meet(m, warp, 1 << lane, barrier, 8, Kind::Atomic)?;
    let (line, from) = (m.line, m.block);
    cluster_and(m, |races, launch| {
        let (actor, epoch) = races.mbarrier_now(barrier);
        let access = Access { cluster: races.threads.cluster, actor, kind: Kind::AsyncWrite, lanes: !0, epoch, line };
        races.visit(from, to.0, access);
        races.started(launch, races.threads.warp(from, warp), lane, to, len, access)
    })
}

/// A bulk store from shared memory begins.
pub fn outbound(m: &mut Machine, warp: u32, lane: usize, at: u32, len: usize) -> Result<(), String> {
    let (line, block) = (m.line, m.block);
    cluster_and(m, |races, launch| {
        let (actor, epoch) = races.store_issued(block, warp, lane);
        let access = Access { cluster: races.threads.cluster, actor, kind: Kind::AsyncRead, lanes: !0, epoch, line };
        races.started(launch, races.threads.warp(block, warp), lane, (block, at), len, access)
    })
}

/// A cp.async begins.
pub fn copy_async(
    m: &mut Machine,
    warp: u32,
    lane: usize,
    to: (usize, u32),
    len: usize,
    source: u64,
    read: usize,
) -> Result<(), String> {
    let issuer = issuer(m, warp, lane);
    if read > 0 {
        global_by(m, &issuer, source, read, Kind::Read)?;
    }
    let (line, block) = (m.line, m.block);
    cluster_and(m, |races, launch| {
        let (actor, epoch) = races.copy_issued(block, warp, lane);
        let access =
            Access { cluster: races.threads.cluster, actor, kind: Kind::CopyWrite, lanes: 1 << lane, epoch, line };
        races.started(launch, races.threads.warp(block, warp), lane, to, len, access)
    })
}

/// A warp issues its part of its warpgroup's wgmma with this number. `units` lists the 16-byte units that it reads.
pub fn multiply(
    m: &mut Machine,
    warp: u32,
    number: u64,
    units: impl FnOnce() -> Result<Vec<u32>, String>,
) -> Result<(), String> {
    let (line, block) = (m.line, m.block);
    let launch = m.launch;
    let Some(races) = &mut m.cluster.races else { return Ok(()) };
    let group = warp / 4;
    let actor = races.threads.number(Actor::Multiplier { block, group });
    let list = races.operands.entry((block, group)).or_default();
    let known = list.iter().rev().find(|(n, _)| *n == number).map(|(_, units)| units.clone());
    let first = known.is_none();
    let units = match known {
        Some(units) => units,
        None => {
            let units = Arc::new(units()?);
            list.push_back((number, units.clone()));
            if list.len() > OPERANDS {
                list.pop_front();
            }
            units
        }
    };
    let access = Access {
        cluster: races.threads.cluster,
        actor,
        kind: Kind::AsyncRead,
        lanes: !0,
        epoch: number as u32 + 1,
        line,
    };
    let by = races.threads.warp(block, warp);
    // The warp's lanes act as one: what one of them has waited for, all have.
    let knowledge = races.threads.common(by, !0);
    let probe = Probe { access, actor: by, lanes: !0, knowledge: &knowledge };
    let step = if first { Step::Both } else { Step::Check };
    Ok(units.iter().try_for_each(|at| races.shared(launch, (block, *at), 16, &probe, step))?)
}

impl Races {
    /// Something begins, started by a lane, that `access` stands for.
    fn started(
        &mut self,
        launch: &Launch,
        warp: u16,
        lane: usize,
        at: (usize, u32),
        len: usize,
        access: Access,
    ) -> Result<(), String> {
        let knowledge = self.threads.knowledge(warp, lane).clone();
        let probe = Probe { access, actor: warp, lanes: 1 << lane, knowledge: &knowledge };
        Ok(self.shared(launch, at, len, &probe, Step::Both)?)
    }
}
