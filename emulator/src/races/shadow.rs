//! Who touched which bytes last: a tree for each 16 bytes, split into 4 and into single bytes only where accesses are
//! that small.
use super::clock::{Clock, Knowledge};

/// Bytes of an undivided cell.
pub const CELL: usize = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    /// Atomics, and loads and stores that are volatile or have an order: none of them races with another.
    Atomic,
    /// By the asynchronous proxy: wgmma, and bulk copies from shared memory.
    AsyncRead,
    /// A bulk copy into shared memory.
    AsyncWrite,
    /// cp.async.
    CopyWrite,
}

impl Kind {
    pub fn writes(self) -> bool {
        matches!(self, Kind::Write | Kind::AsyncWrite | Kind::CopyWrite)
    }

    fn reads(self) -> bool {
        matches!(self, Kind::Read | Kind::AsyncRead)
    }

    /// Whether the order of two such accesses does not matter.
    fn goes_with(self, other: Kind) -> bool {
        self.reads() && other.reads() || self == Kind::Atomic && other == Kind::Atomic
    }
}

/// One access. `epoch` is 0 where there was none.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub cluster: u32,
    pub actor: u16,
    pub kind: Kind,
    /// The lanes of a warp; all for other actors.
    pub lanes: u32,
    pub epoch: u32,
    /// PTX line.
    pub line: u32,
}

const NONE: Access = Access { cluster: 0, actor: 0, kind: Kind::Read, lanes: 0, epoch: 0, line: 0 };

/// An access that is about to happen, and the thread that starts it, which may be another actor than the one that
/// carries it out.
pub struct Probe<'a> {
    pub access: Access,
    pub actor: u16,
    pub lanes: u32,
    pub knowledge: &'a Knowledge,
}

/// What is wrong with an access.
#[derive(Clone, Copy, Debug)]
pub enum Conflict {
    /// No order between it and this one.
    Race(Access),
    /// Ordered after this ordinary write, but the asynchronous proxy may not see it.
    Unfenced(Access),
}

impl Probe<'_> {
    fn after(&self, earlier: &Access) -> bool {
        let mine = earlier.cluster == self.access.cluster && earlier.actor == self.actor;
        let others = if mine { earlier.lanes & !self.lanes } else { earlier.lanes };
        let knows = |clock: &Clock| clock.knows(earlier.cluster, earlier.actor, others, earlier.epoch);
        earlier.epoch == 0
            || others == 0
            || knows(&self.knowledge.seen)
            || earlier.kind == Kind::Read && knows(&self.knowledge.ended)
    }

    fn sees(&self, write: &Access) -> bool {
        write.epoch == 0
            || !matches!(write.kind, Kind::Write | Kind::Atomic)
            || self.knowledge.proxied.knows(write.cluster, write.actor, write.lanes, write.epoch)
    }
}

#[derive(Clone, Default)]
enum Others {
    #[default]
    None,
    One(Access),
    Many(Vec<Access>),
}

impl Others {
    fn slice(&self) -> &[Access] {
        match self {
            Others::None => &[],
            Others::One(one) => std::slice::from_ref(one),
            Others::Many(many) => many,
        }
    }
}

/// The last write of some bytes, and the reads and atomics since that may have no order among themselves.
#[derive(Clone)]
struct Record {
    write: Access,
    others: Others,
}

impl Record {
    fn check(&self, probe: &Probe) -> Option<Conflict> {
        if !probe.after(&self.write) {
            return Some(Conflict::Race(self.write));
        }
        let kind = probe.access.kind;
        if kind == Kind::AsyncRead && !probe.sees(&self.write) {
            return Some(Conflict::Unfenced(self.write));
        }
        let conflicts = |other: &&Access| !kind.goes_with(other.kind) && !probe.after(other);
        self.others.slice().iter().find(conflicts).map(|other| Conflict::Race(*other))
    }

    /// Notes an access that was checked. At most `limit` reads and atomics are kept.
    fn note(&mut self, probe: &Probe, limit: usize) {
        let new = probe.access;
        if new.kind.writes() {
            *self = Record { write: new, others: Others::None };
            return;
        }
        let same = |old: &Access| old.cluster == new.cluster && old.actor == new.actor && old.kind == new.kind;
        // An older one of the same kind may go when whatever comes after the new one comes after it, too. wgmmas and
        // bulk stores end in the order in which they began.
        let replaces =
            |old: &Access| old.kind == new.kind && (probe.after(old) || same(old) && new.kind == Kind::AsyncRead);
        match &mut self.others {
            Others::None => self.others = Others::One(new),
            Others::One(old) if same(old) && old.epoch == new.epoch => old.lanes |= new.lanes,
            Others::One(old) if replaces(old) => *old = new,
            Others::One(old) => self.others = Others::Many(vec![*old, new]),
            Others::Many(many) => {
                if let Some(old) = many.iter_mut().find(|old| same(old) && old.epoch == new.epoch) {
                    old.lanes |= new.lanes;
                    return;
                }
                many.retain(|old| !replaces(old));
                if many.len() < limit {
                    many.push(new);
                }
            }
        }
    }
}

/// The history of 16, 4 or 1 bytes.
#[derive(Clone)]
pub struct Cell {
    record: Record,
    /// Quarters, once some access was smaller; `record` is then out of date.
    parts: Option<Box<[Cell; 4]>>,
}

impl Default for Cell {
    fn default() -> Cell {
        Cell { record: Record { write: NONE, others: Others::None }, parts: None }
    }
}

impl Cell {
    /// `from..to` are bytes of this cell, which has `size`.
    fn check(&self, from: usize, to: usize, size: usize, probe: &Probe) -> Option<Conflict> {
        let Some(parts) = &self.parts else { return self.record.check(probe) };
        let part = size / 4;
        (from / part..to.div_ceil(part)).find_map(|i| {
            let start = i * part;
            parts[i].check(from.max(start) - start, to.min(start + part) - start, part, probe)
        })
    }

    fn note(&mut self, from: usize, to: usize, size: usize, probe: &Probe, limit: usize) {
        let whole = to - from == size;
        if whole && (self.parts.is_none() || probe.access.kind.writes()) {
            self.parts = None;
            self.record.note(probe, limit);
            return;
        }
        let whole_cell = || Cell { record: self.record.clone(), parts: None };
        let parts = self.parts.get_or_insert_with(|| Box::new(std::array::from_fn(|_| whole_cell())));
        let part = size / 4;
        for i in from / part..to.div_ceil(part) {
            let start = i * part;
            parts[i].note(from.max(start) - start, to.min(start + part) - start, part, probe, limit);
        }
    }
}

/// The cells that `len` bytes from `at` on touch, each with the bytes touched.
fn pieces(at: usize, len: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (at / CELL..(at + len).div_ceil(CELL)).map(move |cell| {
        let start = cell * CELL;
        (cell, at.max(start) - start, (at + len).min(start + CELL) - start)
    })
}

/// The first conflict of an access, with the address of its 16 bytes.
pub fn check(cells: &[Cell], at: usize, len: usize, probe: &Probe) -> Option<(usize, Conflict)> {
    pieces(at, len).find_map(|(cell, from, to)| {
        let found = cells.get(cell)?.check(from, to, CELL, probe)?;
        Some((cell * CELL + from, found))
    })
}

pub fn note(cells: &mut [Cell], at: usize, len: usize, probe: &Probe, limit: usize) {
    for (cell, from, to) in pieces(at, len) {
        if let Some(cell) = cells.get_mut(cell) {
            cell.note(from, to, CELL, probe, limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(actor: u16, lane: u32, kind: Kind, epoch: u32) -> Access {
        Access { cluster: 0, actor, kind, lanes: 1 << lane, epoch, line: 1 }
    }

    fn run(cells: &mut [Cell], at: usize, len: usize, access: Access, knowledge: &Knowledge) -> bool {
        let probe = Probe { access, actor: access.actor, lanes: access.lanes, knowledge };
        let fine = check(cells, at, len, &probe).is_none();
        note(cells, at, len, &probe, 8);
        fine
    }

    #[test]
    fn neighbouring_bytes_are_no_conflict() {
        let mut cells = vec![Cell::default(); 4];
        let nothing = Knowledge::default();
        assert!(run(&mut cells, 0, 16, access(0, 0, Kind::Write, 1), &nothing));
        for lane in 0..16 {
            assert!(run(&mut cells, 16 + 2 * lane as usize, 2, access(1, lane, Kind::Write, 1), &nothing));
        }
        assert!(run(&mut cells, 20, 2, access(1, 2, Kind::Read, 1), &nothing));
        assert!(!run(&mut cells, 20, 4, access(1, 2, Kind::Read, 1), &nothing), "the upper half is lane 3's");
        assert!(!run(&mut cells, 12, 8, access(2, 0, Kind::Read, 1), &nothing));
    }

    #[test]
    fn reads_agree_with_reads_and_atomics_with_atomics() {
        let mut cells = vec![Cell::default(); 1];
        let nothing = Knowledge::default();
        for actor in 0..5 {
            assert!(run(&mut cells, 0, 4, access(actor, 0, Kind::Read, 1), &nothing));
            assert!(run(&mut cells, 8, 4, access(actor, 0, Kind::Atomic, 1), &nothing));
        }
        assert!(!run(&mut cells, 0, 4, access(9, 0, Kind::Atomic, 1), &nothing));
        assert!(!run(&mut cells, 8, 4, access(9, 0, Kind::Read, 1), &nothing));
    }

    #[test]
    fn knowledge_of_a_write_orders_it() {
        let mut cells = vec![Cell::default(); 1];
        let mut knowledge = Knowledge::default();
        assert!(run(&mut cells, 0, 16, access(0, 3, Kind::Write, 5), &knowledge));
        std::sync::Arc::make_mut(&mut knowledge.seen).raise(0, 0, 1 << 3, 5);
        assert!(run(&mut cells, 4, 4, access(1, 0, Kind::Read, 1), &knowledge));
        let found = check(
            &cells,
            0,
            16,
            &Probe { access: access(1, 0, Kind::AsyncRead, 1), actor: 1, lanes: 1, knowledge: &knowledge },
        );
        assert!(matches!(found, Some((0, Conflict::Unfenced(_)))));
    }
}
