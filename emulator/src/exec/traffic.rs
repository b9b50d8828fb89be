//! Bytes of global memory that a grid's blocks move, in sectors of 32 bytes, as a device moves them. Counted where somebody asks
//! (CUDA_EMULATOR_COUNT), since each access costs a look.
use super::access::{lanes, resolve};
use super::instr::Where;
use super::machine::Machine;
use std::collections::HashSet;

const SECTOR: u64 = 32;

/// Of one cluster.
#[derive(Default)]
pub struct Traffic {
    pub bytes: Bytes,
    /// Sectors that the cluster has read.
    read: HashSet<u64>,
}

/// What was moved.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Bytes {
    /// Sectors that instructions read. Those of one instruction of a warp count once, whichever of its lanes want them.
    pub loaded: u64,
    /// The same without what the cluster had read before, as a cache of its own that forgets nothing would fetch them.
    pub fetched: u64,
    /// Sectors that instructions wrote.
    pub stored: u64,
}

impl Bytes {
    pub fn add(&mut self, other: Bytes) {
        self.loaded += other.loaded;
        self.fetched += other.fetched;
        self.stored += other.stored;
    }
}

#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    Load,
    Store,
    /// Both.
    Update,
}

impl Traffic {
    /// Of an instruction that moves `len` bytes at each of these addresses.
    fn add(&mut self, way: Way, at: impl Iterator<Item = u64>, len: u64) {
        let mut sectors: Vec<u64> = at.flat_map(|at| at / SECTOR..(at + len.max(1) - 1) / SECTOR + 1).collect();
        sectors.sort_unstable();
        sectors.dedup();
        let moved = sectors.len() as u64 * SECTOR;
        if way != Way::Store {
            self.bytes.loaded += moved;
            let new = sectors.iter().filter(|&&sector| self.read.insert(sector)).count();
            self.bytes.fetched += new as u64 * SECTOR;
        }
        if way != Way::Load {
            self.bytes.stored += moved;
        }
    }
}

impl Machine<'_> {
    /// Tells of an instruction of a warp, whose lanes of `mask` move `len` bytes each.
    #[inline(always)]
    pub fn moves(&mut self, way: Way, place: Where, mask: u32, at: &[u64; 32], len: u64) {
        if let Some(traffic) = &mut self.cluster.traffic {
            let global = lanes(mask).map(|lane| resolve(place, at[lane])).filter(|(place, _)| *place == Where::Global);
            traffic.add(way, global.map(|(_, at)| at), len);
        }
    }

    /// The same of a bulk copy's part.
    pub fn moves_bulk(&mut self, way: Way, at: u64, len: usize) {
        if let (Some(traffic), true) = (&mut self.cluster.traffic, len > 0) {
            traffic.add(way, std::iter::once(at), len as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_of_an_instruction_count_once() {
        let mut traffic = Traffic::default();
        // 32 lanes side by side, the same again, one address for all, and two that lie over a sector's end.
        traffic.add(Way::Load, (0..32).map(|lane| 4 * lane), 4);
        traffic.add(Way::Load, (0..32).map(|lane| 4 * lane), 4);
        traffic.add(Way::Load, (0..32).map(|_| 4096), 4);
        traffic.add(Way::Store, [28, 8192].into_iter(), 8);
        traffic.add(Way::Update, [4096].into_iter(), 8);
        assert_eq!(traffic.bytes, Bytes { loaded: 2 * 128 + 32 + 32, fetched: 128 + 32, stored: 96 + 32 });
    }
}
