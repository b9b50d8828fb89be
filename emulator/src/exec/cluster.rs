//! CTAs, clusters and the scheduler.
use super::collective::Barrier;
use super::instr::{Fill, Program, Special};
use super::interpret::{self, Failure};
use super::machine::Machine;
use super::shared::Shared;
use super::traffic::{Bytes, Traffic};
use super::warp::{Group, Registers, Warp};
use crate::memory::{Region, View};
use crate::races;
use crate::{Fault, LaunchDims};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Instructions of a warp before the next one's turn.
const QUANTUM: u32 = 512;
/// Instructions of a cluster before it lets another cluster run on this thread: what spins on another CTA's
/// progress must not keep that CTA from running.
const SLICE: u64 = 1 << 21;

/// What all clusters of a launch share.
pub struct Launch<'a> {
    pub view: View,
    pub dims: LaunchDims,
    pub program: &'a Program,
    pub lines: &'a [String],
    /// The kernel's parameters, at an address that is in `view`.
    pub params: u64,
    pub strict: bool,
    pub began: Instant,
    /// After this long the launch counts as hung.
    pub limit: Duration,
    /// Set when some cluster has failed.
    pub stop: AtomicBool,
    /// Instructions that warps have executed; those of a cluster are added at the end of its slice.
    pub instructions: AtomicU64,
    /// There when bytes are counted; those of a cluster are added as its instructions are.
    pub traffic: Option<Mutex<Bytes>>,
    /// None: warps take turns in order. Else the seed of a shuffled order with turns of random length.
    pub seed: Option<u64>,
    /// There when races are looked for: the history of global memory.
    pub races: Option<races::Global>,
}

impl Launch<'_> {
    /// Ticks (of a 1 GHz clock) and nanoseconds.
    pub fn clock(&self) -> (u64, u64) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        (self.began.elapsed().as_nanos() as u64, now.as_nanos() as u64)
    }

    fn fault(&self, f: Failure, block: &Block) -> Fault {
        let linear = f.warp * 32 + f.lane as u32;
        let [x, y, _] = self.dims.block;
        Fault {
            kernel: self.program.name.clone(),
            what: f.what,
            block: block.index,
            thread: [linear % x, linear / x % y, linear / (x * y)],
            line: f.line,
            text: self.text(f.line),
        }
    }

    /// %ctaid of a CTA, by the number of its cluster in the grid (x fastest) and its rank.
    pub fn block_index(&self, cluster: u64, rank: usize) -> [u32; 3] {
        let (c, rank) = (self.dims.cluster, rank as u64);
        let counts: [u64; 3] = std::array::from_fn(|i| (self.dims.grid[i] / c[i]) as u64);
        let at = [cluster % counts[0], cluster / counts[0] % counts[1], cluster / (counts[0] * counts[1])];
        let within = [rank % c[0] as u64, rank / c[0] as u64 % c[1] as u64, rank / (c[0] * c[1]) as u64];
        std::array::from_fn(|i| at[i] as u32 * c[i] + within[i] as u32)
    }

    pub fn text(&self, line: u32) -> String {
        self.lines.get((line as usize).wrapping_sub(1)).cloned().unwrap_or_default()
    }
}

/// CTAs that run together on one OS thread: no locks inside.
pub struct Cluster {
    pub blocks: Vec<Block>,
    /// State of the shuffled schedule.
    random: u64,
    pub hopper: super::hopper::ClusterState,
    /// There when races are looked for.
    pub races: Option<Box<races::Races>>,
    /// There when bytes are counted.
    pub traffic: Option<Box<Traffic>>,
}

pub struct Block {
    pub shared: Shared,
    /// None while a warp executes: it is then in the interpreter's hands.
    pub warps: Vec<Option<Box<Warp>>>,
    /// %ctaid
    pub index: [u32; 3],
    /// %cluster_ctarank
    pub rank: usize,
    pub threads: u32,
    /// Threads that have not exited.
    pub live: u32,
    pub barriers: [Barrier; 16],
    pub hopper: super::hopper::BlockState,
}

/// What became of a cluster's slice of time.
pub enum Slice {
    Finished,
    /// Still running, or waiting for another cluster.
    Unfinished,
}

impl Cluster {
    /// The cluster with the number `n` of the grid, x fastest.
    pub fn new(l: &Launch, n: u64) -> Cluster {
        let c = l.dims.cluster;
        let mut blocks: Vec<Block> = vec![];
        for z in 0..c[2] {
            for y in 0..c[1] {
                for x in 0..c[0] {
                    let within = [x, y, z];
                    let index = l.block_index(n, blocks.len());
                    blocks.push(Block::new(l, index, within, blocks.len()));
                }
            }
        }
        let random = l.seed.unwrap_or(0).wrapping_add(n + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let races = l.races.as_ref().map(|global| {
            Box::new(races::Races::new(global, n, blocks.len(), blocks[0].threads, blocks[0].shared.end()))
        });
        let traffic = l.traffic.as_ref().map(|_| Box::default());
        Cluster { blocks, random, hopper: Default::default(), races, traffic }
    }

    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// All warps as (CTA, warp, instructions of its turn) for one round.
    fn order(&mut self, l: &Launch, out: &mut Vec<(usize, usize, u32)>) {
        out.clear();
        for (b, block) in self.blocks.iter().enumerate() {
            out.extend((0..block.warps.len()).map(|i| (b, i, QUANTUM)));
        }
        if l.seed.is_some() {
            for k in (1..out.len()).rev() {
                out.swap(k, self.draw() as usize % (k + 1));
            }
            // From one instruction to thousands, each magnitude as often.
            out.iter_mut().for_each(|o| o.2 = 1 << (self.draw() % 13));
        }
    }

    /// Runs until all threads have exited or the slice is over.
    pub fn run(&mut self, l: &Launch) -> Result<Slice, Fault> {
        let mut instructions = 0;
        let slice = self.rounds(l, &mut instructions);
        l.instructions.fetch_add(instructions, Relaxed);
        if let (Some(all), Some(mine)) = (&l.traffic, &mut self.traffic) {
            all.lock().unwrap().add(std::mem::take(&mut mine.bytes));
        }
        slice
    }

    fn rounds(&mut self, l: &Launch, instructions: &mut u64) -> Result<Slice, Fault> {
        let mut spent = 0u64;
        let mut order = vec![];
        loop {
            let (mut progress, mut alive) = (0u64, false);
            self.order(l, &mut order);
            for (b, i, quantum) in order.drain(..) {
                let Some(mut w) = self.blocks[b].warps[i].take() else { continue };
                let mut done = Ok(0);
                if !w.groups.is_empty() {
                    self.blocks[b].shared.writer = w.id as u8 + 1;
                    let mut m = Machine { launch: l, cluster: self, block: b, region: Region::NONE, line: 0 };
                    done = interpret::turn(&mut m, &mut w, quantum);
                    self.blocks[b].shared.writer = 0;
                    alive |= !w.groups.is_empty();
                }
                self.blocks[b].warps[i] = Some(w);
                progress += done.map_err(|f| l.fault(f, &self.blocks[b]))? as u64;
            }
            *instructions += progress;
            let block = self.blocks[0].index;
            let whole = |what: String| Fault {
                kernel: l.program.name.clone(),
                what,
                block,
                thread: [0; 3],
                line: 0,
                text: String::new(),
            };
            if !alive {
                super::hopper::at_exit(self, l).map_err(whole)?;
                return Ok(Slice::Finished);
            }
            if progress == 0 && !super::hopper::on_stall(self, l).map_err(whole)? {
                return Err(self.hang(l, "deadlock: no thread can go on"));
            }
            if l.stop.load(Relaxed) {
                return Ok(Slice::Finished);
            }
            spent += progress + 1;
            if spent > SLICE {
                if l.began.elapsed() > l.limit {
                    return Err(
                        self.hang(l, &format!("still running after {} s (CUDA_EMULATOR_TIMEOUT)", l.limit.as_secs()))
                    );
                }
                return Ok(Slice::Unfinished);
            }
        }
    }

    /// A fault that shows where every warp stands.
    fn hang(&self, l: &Launch, what: &str) -> Fault {
        let mut words = what.to_string();
        let mut first = None;
        for b in &self.blocks {
            for (n, barrier) in b.barriers.iter().enumerate() {
                if let Some(state) = barrier.describe() {
                    words += &format!("\n  block {:?} barrier {n}: {state}", b.index);
                }
            }
            for w in b.warps.iter().flatten() {
                for g in &w.groups {
                    let line = l.program.code.get(g.pc as usize).map_or(0, |i| i.line);
                    let why = g.waits.as_ref().map_or("running".to_string(), |w| format!("waits for {w}"));
                    words += &format!(
                        "\n  block {:?} warp {} lanes {:#010x} at ptx line {line}: {} -- {why}",
                        b.index,
                        w.id,
                        g.mask,
                        l.text(line)
                    );
                    first = first.or(Some((b, w.id, g.mask.trailing_zeros() as usize & 31, line)));
                }
            }
        }
        match first {
            Some((block, warp, lane, line)) => l.fault(Failure { what: words, line, warp, lane }, block),
            None => l.fault(Failure { what: words, line: 0, warp: 0, lane: 0 }, &self.blocks[0]),
        }
    }
}

impl Block {
    fn new(l: &Launch, index: [u32; 3], within: [u32; 3], rank: usize) -> Block {
        let threads = l.dims.block.iter().product::<u32>();
        let shared = Shared::new(l.program.static_shared + l.dims.dynamic_shared, l.strict);
        let place = Place { index, within, rank };
        let warps = (0..threads.div_ceil(32)).map(|id| Some(Box::new(new_warp(l, &place, id, threads)))).collect();
        Block {
            shared,
            warps,
            index,
            rank,
            threads,
            live: threads,
            barriers: Default::default(),
            hopper: Default::default(),
        }
    }
}

struct Place {
    index: [u32; 3],
    within: [u32; 3],
    rank: usize,
}

fn new_warp(l: &Launch, place: &Place, id: u32, threads: u32) -> Warp {
    let here = (threads - id * 32).min(32);
    let present = if here == 32 { !0 } else { (1u32 << here) - 1 };
    let mut regs = Registers::new(l.program.rows, l.program.preds);
    for (row, fill) in &l.program.constants {
        match fill {
            Fill::Bits32(v) => *regs.row32_mut(*row) = [*v; 32],
            Fill::Bits64(v) => *regs.row64_mut(*row) = [*v; 32],
            Fill::Special(Special::ParamBase) => *regs.row64_mut(*row) = [l.params; 32],
            Fill::Special(Special::GridId) => *regs.row64_mut(*row) = [1; 32],
            Fill::Special(s) => {
                let s = *s;
                *regs.row32_mut(*row) = std::array::from_fn(|lane| special(l, place, id, threads, lane as u32, s));
            }
        }
    }
    let stride = l.program.local_bytes.next_multiple_of(16);
    Warp {
        regs,
        groups: vec![Group { pc: 0, mask: present, token: 0, waits: None }],
        id,
        present,
        live: present,
        local: vec![crate::memory::POISON; if l.program.local_bytes > 16 { stride * 32 } else { 0 }],
        local_stride: if l.program.local_bytes > 16 { stride } else { 0 },
        copies: Default::default(),
        fault_lane: None,
        sync_arrived: 0,
        sync_released: 0,
        turns: 0,
        hopper: Default::default(),
    }
}

fn special(l: &Launch, place: &Place, warp: u32, threads: u32, lane: u32, s: Special) -> u32 {
    let d = &l.dims;
    let linear = warp * 32 + lane;
    match s {
        Special::Tid(0) => linear % d.block[0],
        Special::Tid(1) => linear / d.block[0] % d.block[1],
        Special::Tid(_) => linear / (d.block[0] * d.block[1]),
        Special::Ntid(i) => d.block[i as usize],
        Special::Ctaid(i) => place.index[i as usize],
        Special::Nctaid(i) => d.grid[i as usize],
        Special::LaneId => lane,
        Special::WarpId => warp,
        Special::NwarpId => threads.div_ceil(32),
        Special::SmId => place.index[0] % 4,
        Special::NsmId => 4,
        Special::MaskEq => 1 << lane,
        Special::MaskLe => ((2u64 << lane) - 1) as u32,
        Special::MaskLt => (1 << lane) - 1,
        Special::MaskGe => !((1u32 << lane) - 1),
        Special::MaskGt => !(((2u64 << lane) - 1) as u32),
        Special::ClusterId(i) => place.index[i as usize] / d.cluster[i as usize],
        Special::NclusterId(i) => d.grid[i as usize] / d.cluster[i as usize],
        Special::ClusterCtaid(i) => place.within[i as usize],
        Special::ClusterNctaid(i) => d.cluster[i as usize],
        Special::ClusterRank => place.rank as u32,
        Special::ClusterSize => d.cluster.iter().product(),
        Special::DynamicShared => d.dynamic_shared,
        Special::TotalShared => l.program.static_shared + d.dynamic_shared,
        Special::GridId | Special::ParamBase => 0,
    }
}
