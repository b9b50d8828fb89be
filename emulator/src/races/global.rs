//! Global memory of a launch: histories by page, and what atomics published.
use super::clock::Knowledge;
use super::shadow::{self, CELL, Cell, Conflict, Probe};
use crate::exec::RaceCheck;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

const PAGE: u64 = 1024;
const SHARDS: usize = 64;
/// Reads and atomics without an order among themselves that are remembered of a place. A launch may have thousands;
/// a write that none of these contradicts may contradict one that was forgotten.
const OTHERS: usize = 6;

type Page = Box<[Cell]>;

pub struct Global {
    /// Whether a shuffle or a vote orders what its lanes have read.
    pub exchanges_order: bool,
    shards: Vec<Mutex<HashMap<u64, Page>>>,
    /// By address: what those told who wrote there by atomics.
    published: Mutex<HashMap<u64, Arc<Knowledge>>>,
    any_published: AtomicBool,
}

impl Global {
    /// None: races are not looked for.
    pub fn of(check: RaceCheck) -> Option<Global> {
        (check != RaceCheck::Off).then(|| Global {
            exchanges_order: check == RaceCheck::On,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            published: Mutex::default(),
            any_published: AtomicBool::new(false),
        })
    }

    fn pages(&self, at: u64, len: usize, mut f: impl FnMut(&mut [Cell], usize, usize)) {
        let (mut from, end) = (at, at + len as u64);
        while from < end {
            let page = from / PAGE;
            let to = end.min((page + 1) * PAGE);
            let mut shard = self.shards[page as usize % SHARDS].lock().unwrap();
            let cells = shard.entry(page).or_insert_with(|| vec![Cell::default(); PAGE as usize / CELL].into());
            f(cells, (from % PAGE) as usize, (to - from) as usize);
            from = to;
        }
    }

    pub fn check(&self, at: u64, len: usize, probe: &Probe) -> Option<Conflict> {
        let mut found = None;
        self.pages(at, len, |cells, at, len| {
            if found.is_none() {
                found = shadow::check(cells, at, len, probe).map(|(_, conflict)| conflict);
            }
        });
        found
    }

    /// Checks and notes at once: other clusters run on other threads. `forgiven` are conflicts that do not count.
    pub fn note(&self, at: u64, len: usize, probe: &Probe, forgiven: impl Fn(&Conflict) -> bool) -> Option<Conflict> {
        let mut found = None;
        self.pages(at, len, |cells, at, len| {
            found =
                found.or(shadow::check(cells, at, len, probe).map(|(_, conflict)| conflict).filter(|c| !forgiven(c)));
            shadow::note(cells, at, len, probe, OTHERS);
        });
        found
    }

    /// An atomic is about to write; one that reads, too, adds to what is there.
    pub fn publish(&self, at: u64, told: Arc<Knowledge>, adds: bool) {
        self.any_published.store(true, Relaxed);
        let mut published = self.published.lock().unwrap();
        let place = published.entry(at).or_default();
        *place = if adds { Knowledge::joined(place, &told) } else { told };
    }

    pub fn published(&self, at: u64) -> Option<Arc<Knowledge>> {
        if !self.any_published.load(Relaxed) {
            return None;
        }
        self.published.lock().unwrap().get(&at).cloned()
    }
}
