//! Bulk and tensor copies. Inbound ones (into shared memory) queue in the cluster until their mbarrier is waited
//! for; outbound ones queue in the warp, by lane and group, until wait_group.
use super::super::decode::Address;
use super::super::instr::Row;
use super::super::machine::Machine;
use super::super::traffic::Way;
use super::super::warp::{Flow, Warp};
use super::{barrier, lanes, shared_address, wide_address};
use crate::hopper::reduce::{self, Operation};
use crate::hopper::{ElementType, TensorMap};
use crate::races::{self, Issuer, Kind};
use std::collections::VecDeque;

pub struct Target {
    pub to: Address,
    pub barrier: Address,
    /// CTA mask of a multicast.
    pub mask: Option<Row>,
}

pub enum Instr {
    TensorLoad {
        map: Address,
        coordinates: Vec<Row>,
        target: Target,
    },
    TensorStore {
        map: Address,
        coordinates: Vec<Row>,
        from: Address,
        reduction: Option<Operation>,
    },
    Load {
        from: Address,
        bytes: Row,
        target: Target,
        from_global: bool,
    },
    Store {
        to: Address,
        from: Address,
        bytes: Row,
        reduction: Option<(Operation, ElementType)>,
    },
    /// st.async: registers of 4 or 8 bytes into some CTA's shared memory.
    StoreAsync {
        values: Vec<Row>,
        width: u32,
        target: Target,
    },
    Commit,
    WaitGroup {
        keep: usize,
        read: bool,
    },
}

/// A copy on its way into the shared memory of one CTA.
pub struct Inbound {
    source: Source,
    to: (usize, u32),
    bytes: u32,
    barrier: (usize, u32),
    issuer: Option<Issuer>,
}

enum Source {
    Tensor(Box<TensorMap>, [i32; 5]),
    Global(u64),
    Shared(usize, u32),
    Registers(Vec<u8>),
}

impl Inbound {
    pub fn describe(&self) -> String {
        let what = match &self.source {
            Source::Tensor(map, at) => format!("a tensor copy of the box at {:?}", &at[..map.rank]),
            Source::Global(at) => format!("a bulk copy from global address {at:#x}"),
            Source::Shared(_, at) => format!("a bulk copy from shared address {at:#x}"),
            Source::Registers(_) => "an st.async".into(),
        };
        format!("{what} to shared address {:#x} of CTA {} (mbarrier {:#x})", self.to.1, self.to.0, self.barrier.1)
    }
}

/// A store that has been issued. `runs` holds its data once shared memory has been read.
struct Store {
    from: u32,
    kind: StoreKind,
    runs: Option<Vec<(u64, Vec<u8>)>>,
    issuer: Option<Issuer>,
}

enum StoreKind {
    Tensor(Box<TensorMap>, [i32; 5], Option<Operation>),
    Bulk { to: u64, bytes: u32, reduction: Option<(Operation, ElementType)> },
}

#[derive(Default)]
struct LaneStores {
    lane: usize,
    open: Vec<Store>,
    committed: VecDeque<Vec<Store>>,
}

#[derive(Default)]
pub struct Stores {
    lanes: Vec<LaneStores>,
}

impl Stores {
    fn of(&mut self, lane: usize) -> &mut LaneStores {
        let at = self.lanes.iter().position(|l| l.lane == lane).unwrap_or_else(|| {
            self.lanes.push(LaneStores { lane, ..Default::default() });
            self.lanes.len() - 1
        });
        &mut self.lanes[at]
    }
}

pub fn execute(i: &Instr, m: &mut Machine, w: &mut Warp, mask: u32) -> Result<Flow, String> {
    for lane in lanes(mask) {
        if let Err(what) = execute_lane(i, m, w, lane) {
            w.fault_lane = Some(lane);
            return Err(what);
        }
    }
    Ok(Flow::Next)
}

fn execute_lane(i: &Instr, m: &mut Machine, w: &mut Warp, lane: usize) -> Result<(), String> {
    match i {
        Instr::TensorLoad { map, coordinates, target } => {
            let (map, at) = tensor(m, w, lane, map, coordinates)?;
            let bytes = map.box_bytes();
            let to = shared_address(&target.to, w, lane)?;
            map.check(m.shared_place(to)?.1)?;
            issue(m, w, lane, target, bytes, || Source::Tensor(map.clone(), at))?;
        }
        Instr::Load { from, bytes, target, from_global } => {
            let bytes = w.regs.get32(*bytes, lane);
            check_bulk(bytes, shared_address(&target.to, w, lane)? as u64)?;
            if *from_global {
                let at = wide_address(from, w, lane);
                check_bulk(bytes, at)?;
                issue(m, w, lane, target, bytes, || Source::Global(at))?;
            } else {
                let (block, at) = m.shared_place(shared_address(from, w, lane)?)?;
                check_bulk(bytes, at as u64)?;
                issue(m, w, lane, target, bytes, || Source::Shared(block, at))?;
            }
        }
        Instr::StoreAsync { values, width, target } => {
            let mut data = Vec::new();
            for row in values {
                match width {
                    4 => data.extend(w.regs.get32(*row, lane).to_le_bytes()),
                    _ => data.extend(w.regs.get64(*row, lane).to_le_bytes()),
                }
            }
            let bytes = data.len() as u32;
            if shared_address(&target.to, w, lane)? % bytes != 0 {
                return Err(format!("st.async of {bytes} bytes is not aligned to its size"));
            }
            issue(m, w, lane, target, bytes, || Source::Registers(data.clone()))?;
        }
        Instr::TensorStore { map, coordinates, from, reduction } => {
            let (map, at) = tensor(m, w, lane, map, coordinates)?;
            let from = own_shared(m, shared_address(from, w, lane)?)?;
            map.check(from)?;
            let bytes = map.box_bytes() as usize;
            races::outbound(m, w.id, lane, from, bytes)?;
            m.cluster.blocks[m.block].shared.read_quiet(from, bytes)?;
            let kind = StoreKind::Tensor(map, at, *reduction);
            let issuer = races::issuer(m, w.id, lane);
            w.hopper.stores.of(lane).open.push(Store { from, kind, runs: None, issuer });
        }
        Instr::Store { to, from, bytes, reduction } => {
            let (to, bytes) = (wide_address(to, w, lane), w.regs.get32(*bytes, lane));
            let from = own_shared(m, shared_address(from, w, lane)?)?;
            check_bulk(bytes, to)?;
            check_bulk(bytes, from as u64)?;
            races::outbound(m, w.id, lane, from, bytes as usize)?;
            let kind = StoreKind::Bulk { to, bytes, reduction: *reduction };
            let issuer = races::issuer(m, w.id, lane);
            w.hopper.stores.of(lane).open.push(Store { from, kind, runs: None, issuer });
        }
        Instr::Commit => {
            let stores = w.hopper.stores.of(lane);
            let open = std::mem::take(&mut stores.open);
            stores.committed.push_back(open);
            if let Some(races) = &mut m.cluster.races {
                races.stores_commit(m.block, w.id, lane);
            }
        }
        Instr::WaitGroup { keep, read } => {
            let stores = w.hopper.stores.of(lane);
            let over = stores.committed.len().saturating_sub(*keep);
            let finished: Vec<_> = stores.committed.iter_mut().take(over).flatten().collect();
            for store in finished {
                match read {
                    // Its write may still be on the way: it happens one wait later.
                    true if store.runs.is_none() => store.read(m)?,
                    _ => store.write(m)?,
                }
            }
            let stores = w.hopper.stores.of(lane);
            if !read {
                stores.committed.drain(..over);
            }
            if let Some(races) = &mut m.cluster.races {
                races.stores_wait(m.block, w.id, lane, *keep);
            }
        }
    }
    Ok(())
}

fn own_shared(m: &Machine, address: u32) -> Result<u32, String> {
    let (block, at) = m.shared_place(address)?;
    if block != m.block {
        return Err("a bulk store reads the CTA's own shared memory only".into());
    }
    Ok(at)
}

fn check_bulk(bytes: u32, address: u64) -> Result<(), String> {
    if !bytes.is_multiple_of(16) || !address.is_multiple_of(16) {
        return Err(format!("bulk copy of {bytes} bytes at {address:#x}: both must be multiples of 16"));
    }
    Ok(())
}

fn tensor(
    m: &mut Machine,
    w: &Warp,
    lane: usize,
    map: &Address,
    coordinates: &[Row],
) -> Result<(Box<TensorMap>, [i32; 5]), String> {
    let at = wide_address(map, w, lane);
    if !at.is_multiple_of(64) {
        return Err(format!("tensor map at {at:#x} is not aligned to 64 bytes"));
    }
    let mut bytes = [0u8; 128];
    m.read_generic(at, &mut bytes)?;
    let map = TensorMap::from_bytes(&bytes)?;
    if map.rank != coordinates.len() {
        return Err(format!("a {}d tensor copy with a tensor map of rank {}", coordinates.len(), map.rank));
    }
    let mut start = [0i32; 5];
    for (to, row) in start.iter_mut().zip(coordinates) {
        *to = w.regs.get32(*row, lane) as i32;
    }
    Ok((Box::new(map), start))
}

/// Queues a copy to its target CTAs and spoils the memory it will fill.
fn issue(
    m: &mut Machine,
    w: &Warp,
    lane: usize,
    target: &Target,
    bytes: u32,
    source: impl Fn() -> Source,
) -> Result<(), String> {
    let (to_block, to) = m.shared_place(shared_address(&target.to, w, lane)?)?;
    let (barrier_block, at) = barrier::place(m, shared_address(&target.barrier, w, lane)?)?;
    let queue = |m: &mut Machine, block: usize, barrier_block: usize| -> Result<(), String> {
        barrier::check_alive(m, block)?;
        races::inbound(m, w.id, lane, (block, to), bytes as usize, (barrier_block, at))?;
        let issuer = races::issuer(m, w.id, lane);
        let shared = &mut m.cluster.blocks[block].shared;
        // Fails when another copy into the same bytes is still on its way.
        shared.read_quiet(to, bytes as usize)?;
        shared.mark_in_flight(to, bytes as usize)?;
        m.cluster.hopper.inbound.push(Inbound {
            source: source(),
            to: (block, to),
            bytes,
            barrier: (barrier_block, at),
            issuer,
        });
        Ok(())
    };
    let Some(mask) = target.mask else { return queue(m, to_block, barrier_block) };
    let mask = w.regs.get32(mask, lane) as u16;
    if mask == 0 || (mask as u32) >> m.cluster.blocks.len() != 0 {
        return Err(format!("multicast to CTA mask {mask:#x} in a cluster of {}", m.cluster.blocks.len()));
    }
    (0..m.cluster.blocks.len()).filter(|block| mask >> block & 1 != 0).try_for_each(|block| queue(m, block, block))
}

/// Lands every copy that completes on this mbarrier. True if there was one.
pub fn deliver(m: &mut Machine, barrier: (usize, u32)) -> Result<bool, String> {
    let mut any = false;
    while let Some(next) = m.cluster.hopper.inbound.iter().position(|c| c.barrier == barrier) {
        let copy = m.cluster.hopper.inbound.remove(next);
        land(m, copy)?;
        any = true;
    }
    Ok(any)
}

pub fn deliver_all(m: &mut Machine) -> Result<(), String> {
    for copy in std::mem::take(&mut m.cluster.hopper.inbound) {
        land(m, copy)?;
    }
    Ok(())
}

fn land(m: &mut Machine, copy: Inbound) -> Result<(), String> {
    let (block, to) = copy.to;
    let mut data = vec![0u8; copy.bytes as usize];
    let result = match &copy.source {
        Source::Tensor(map, at) => {
            let mut read = |at: u64, out: &mut [u8]| {
                races::global_by(m, &copy.issuer, at, out.len(), Kind::Read)?;
                m.moves_bulk(Way::Load, at, out.len());
                m.read_global(at, out)
            };
            map.load(at, &mut read).map(|rows| map.scatter(to, &rows, &mut data))
        }
        Source::Global(at) => {
            m.moves_bulk(Way::Load, *at, data.len());
            races::global_by(m, &copy.issuer, *at, data.len(), Kind::Read).and_then(|()| m.read_global(*at, &mut data))
        }
        Source::Shared(from, at) => {
            let shared = &mut m.cluster.blocks[*from].shared;
            shared.check_fenced(*at, copy.bytes as usize)?;
            shared.read(*at, copy.bytes as usize).map(|bytes| data.copy_from_slice(bytes))
        }
        Source::Registers(bytes) => {
            data.copy_from_slice(bytes);
            Ok(())
        }
    };
    result.map_err(|e| format!("{}: {e}", copy.describe()))?;
    m.cluster.blocks[block].shared.deliver(to, &data)?;
    barrier::update(m, copy.barrier, |b| b.complete(copy.bytes)).map_err(|e| format!("{}: {e}", copy.describe()))?;
    Ok(())
}

impl Store {
    fn read(&mut self, m: &mut Machine) -> Result<(), String> {
        let shared = &mut m.cluster.blocks[m.block].shared;
        let bytes = match &self.kind {
            StoreKind::Tensor(map, ..) => map.box_bytes(),
            StoreKind::Bulk { bytes, .. } => *bytes,
        };
        shared.check_fenced(self.from, bytes as usize).map_err(|e| format!("bulk store: {e}"))?;
        self.runs = Some(match &self.kind {
            StoreKind::Tensor(map, at, _) => {
                let source = shared.read(self.from, map.box_bytes() as usize)?;
                map.gather(at, self.from, source)
            }
            StoreKind::Bulk { to, bytes, .. } => vec![(*to, shared.read(self.from, *bytes as usize)?.to_vec())],
        });
        Ok(())
    }

    fn write(&mut self, m: &mut Machine) -> Result<(), String> {
        if self.runs.is_none() {
            self.read(m)?;
        }
        let reduction = match &self.kind {
            StoreKind::Tensor(map, _, op) => op.map(|op| (op, map.element)),
            StoreKind::Bulk { reduction, .. } => *reduction,
        };
        for (at, data) in self.runs.replace(Vec::new()).unwrap_or_default() {
            let kind = if reduction.is_some() { Kind::Atomic } else { Kind::Write };
            races::global_by(m, &self.issuer, at, data.len(), kind)?;
            m.moves_bulk(if reduction.is_some() { Way::Update } else { Way::Store }, at, data.len());
            match reduction {
                None => m.write_global(at, &data).map_err(|e| format!("bulk store: {e}"))?,
                Some((op, kind)) => {
                    m.global_slot(at, data.len()).map_err(|e| format!("bulk reduction: {e}"))?;
                    // SAFETY: the range was checked; boxes and bulk copies are aligned to 16 bytes.
                    unsafe { reduce::apply(op, kind, at, &data)? };
                }
            }
        }
        Ok(())
    }
}

/// Stores still on their way when the threads have ended complete now, as they do on a GPU (DeepGEMM's kernels end
/// like this). No document promises it, so in strict mode it is a fault.
pub fn at_exit(m: &mut Machine, w: &mut Warp) -> Result<(), String> {
    let mut stores = std::mem::take(&mut w.hopper.stores);
    for lane in &mut stores.lanes {
        for store in lane.committed.iter_mut().flatten().chain(&mut lane.open) {
            if store.runs.is_none() && m.launch.strict {
                return Err(format!(
                    "warp {} lane {} ended before its bulk store from shared address {:#x} was waited for (cp.async.bulk.wait_group.read)",
                    w.id, lane.lane, store.from
                ));
            }
            store.write(m)?;
        }
    }
    Ok(())
}
