//! Global memory of the emulated device. A device address IS the host address of the byte, so that host code
//! that peeks at managed or pinned memory works; every access of a kernel is still checked against the list of
//! allocations, byte by byte.
//!
//! Interface: `Memory::{new, alloc, free, write, read, fill, find, used, total}` for the driver; `view()` gives
//! a launch its own sorted snapshot (`View`), which also keeps the pages alive until the launch ends.
//!
//! New memory holds 0xFF bytes (a NaN in every float format), because a GPU's leftovers are rarely zero and a
//! kernel that relies on zeroes should not pass here. With CUDA_EMULATOR_STRICT=1 each byte has a shadow that
//! tells whether anything wrote it.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};

/// Inaccessible bytes on both sides of each allocation.
const GUARD: u64 = 64 << 10;
const PAGE: u64 = 4096;
/// Larger allocations stay lazily zero: touching every page of a 10 GB buffer would take longer than the test.
const POISON_LIMIT: u64 = 256 << 20;
pub const POISON: u8 = 0xFF;

/// True when CUDA_EMULATOR_STRICT=1: reads of bytes that nothing wrote are faults.
pub fn strict() -> bool {
    static STRICT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *STRICT.get_or_init(|| std::env::var("CUDA_EMULATOR_STRICT").is_ok_and(|v| v != "0" && !v.is_empty()))
}

pub struct Allocation {
    base: u64,
    len: u64,
    mapping: u64,
    mapping_len: u64,
    /// One byte for each byte: 1 once written. Only in strict mode.
    shadow: Option<Box<[AtomicU8]>>,
}

impl Allocation {
    fn new(len: u64, shadowed: bool) -> Option<Allocation> {
        let inner = len.max(1).checked_next_multiple_of(PAGE)?;
        let mapping_len = inner.checked_add(2 * GUARD)?;
        // SAFETY: a fresh anonymous mapping; nothing else refers to it. Only its middle is made accessible.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let at = libc::mmap(std::ptr::null_mut(), mapping_len as usize, libc::PROT_NONE, flags, -1, 0);
            if at == libc::MAP_FAILED {
                return None;
            }
            let middle = at.cast::<u8>().add(GUARD as usize);
            if libc::mprotect(middle.cast(), inner as usize, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                libc::munmap(at, mapping_len as usize);
                return None;
            }
            if len <= POISON_LIMIT {
                std::ptr::write_bytes(middle, POISON, len as usize);
            }
            at as u64
        };
        let shadow = shadowed.then(|| zeros(len as usize));
        Some(Allocation { base: mapping + GUARD, len, mapping, mapping_len, shadow })
    }
}

/// Zeros that take no memory before somebody writes them.
fn zeros(len: usize) -> Box<[AtomicU8]> {
    let bytes = Box::into_raw(vec![0u8; len].into_boxed_slice());
    // SAFETY: the box just taken apart; AtomicU8 has the layout of u8.
    unsafe { Box::from_raw(bytes as *mut [AtomicU8]) }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` and this is its only owner.
        unsafe { libc::munmap(self.mapping as *mut libc::c_void, self.mapping_len as usize) };
    }
}

/// Global device memory; shared by all streams.
pub struct Memory {
    live: RwLock<BTreeMap<u64, Arc<Allocation>>>,
    used: AtomicU64,
    total: u64,
    strict: bool,
}

impl Memory {
    pub fn new(total_bytes: u64) -> Memory {
        Memory { live: RwLock::default(), used: AtomicU64::new(0), total: total_bytes, strict: strict() }
    }

    /// As `new`, with the shadow of strict mode whatever the environment says (for tests).
    pub fn new_strict(total_bytes: u64) -> Memory {
        Memory { strict: true, ..Memory::new(total_bytes) }
    }

    /// At least 256-byte aligned, guard zones on both sides, contents marked unwritten.
    /// None when the device's memory is used up. Zero bytes give a distinct address that nothing may touch.
    pub fn alloc(&self, bytes: u64) -> Option<u64> {
        let taken = self.used.fetch_add(bytes, Relaxed);
        let made = match taken.checked_add(bytes) {
            Some(sum) if sum <= self.total => Allocation::new(bytes, self.strict),
            _ => None,
        };
        let Some(made) = made else {
            self.used.fetch_sub(bytes, Relaxed);
            return None;
        };
        let base = made.base;
        self.live.write().unwrap().insert(base, Arc::new(made));
        Some(base)
    }

    /// False when `ptr` is not the start of a live allocation. Pages stay mapped while a launch still uses them.
    pub fn free(&self, ptr: u64) -> bool {
        let gone = self.live.write().unwrap().remove(&ptr);
        if let Some(gone) = &gone {
            self.used.fetch_sub(gone.len, Relaxed);
        }
        gone.is_some()
    }

    pub fn write(&self, dst: u64, src: &[u8]) -> Result<(), String> {
        let to = self.holding(dst, src.len() as u64, "write")?;
        // SAFETY: `holding` checked the range; races with kernels are the program's own, as on a GPU.
        unsafe { std::ptr::copy(src.as_ptr(), dst as *mut u8, src.len()) };
        mark(&to, dst, src.len() as u64);
        Ok(())
    }

    pub fn read(&self, src: u64, dst: &mut [u8]) -> Result<(), String> {
        self.holding(src, dst.len() as u64, "read")?;
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy(src as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }

    /// Writes `pattern` `count` times, one after the other.
    pub fn fill(&self, dst: u64, pattern: &[u8], count: u64) -> Result<(), String> {
        let bytes = (pattern.len() as u64).checked_mul(count).ok_or("fill: size overflows")?;
        let to = self.holding(dst, bytes, "fill")?;
        // SAFETY: as in `write`.
        unsafe {
            if let [byte] = pattern {
                std::ptr::write_bytes(dst as *mut u8, *byte, bytes as usize);
            } else {
                for i in 0..count {
                    let at = (dst as *mut u8).add(i as usize * pattern.len());
                    std::ptr::copy(pattern.as_ptr(), at, pattern.len());
                }
            }
        }
        mark(&to, dst, bytes);
        Ok(())
    }

    /// Device to device; overlapping ranges are copied as if through a buffer.
    pub fn copy(&self, dst: u64, src: u64, bytes: u64) -> Result<(), String> {
        let to = self.holding(dst, bytes, "copy to")?;
        let from = self.holding(src, bytes, "copy from")?;
        // SAFETY: both ranges were checked.
        unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes as usize) };
        if let (Some(to_shadow), Some(from_shadow)) = (&to.shadow, &from.shadow) {
            for i in 0..bytes {
                let written = from_shadow[(src - from.base + i) as usize].load(Relaxed);
                to_shadow[(dst - to.base + i) as usize].store(written, Relaxed);
            }
        }
        Ok(())
    }

    /// Base and length of the allocation that holds `ptr` (its end address excluded).
    pub fn find(&self, ptr: u64) -> Option<(u64, u64)> {
        let live = self.live.read().unwrap();
        let (base, found) = live.range(..=ptr).next_back()?;
        (ptr == *base || ptr < base + found.len).then_some((*base, found.len))
    }

    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    pub fn is_strict(&self) -> bool {
        self.strict
    }

    /// What a launch sees: the allocations that live now.
    pub fn view(&self) -> View {
        let kept: Vec<_> = self.live.read().unwrap().values().cloned().collect();
        let regions = kept.iter().map(|a| Region { base: a.base, end: a.base + a.len, shadow: shadow_of(a) }).collect();
        View { regions, _kept: kept }
    }

    fn holding(&self, at: u64, bytes: u64, verb: &str) -> Result<Arc<Allocation>, String> {
        let live = self.live.read().unwrap();
        let near = live.range(..=at).next_back().map(|(_, a)| a);
        match near {
            Some(a) if at.checked_add(bytes).is_some_and(|end| end <= a.base + a.len) => Ok(a.clone()),
            Some(a) => Err(format!(
                "{verb} {bytes} bytes at {at:#x}: the nearest allocation below is {:#x}, {} bytes long, and ends {} bytes earlier",
                a.base,
                a.len,
                at.wrapping_add(bytes).wrapping_sub(a.base + a.len)
            )),
            None => Err(format!("{verb} {bytes} bytes at {at:#x}: no allocation there")),
        }
    }
}

fn shadow_of(a: &Allocation) -> *const AtomicU8 {
    a.shadow.as_ref().map_or(std::ptr::null(), |s| s.as_ptr())
}

fn mark(a: &Allocation, at: u64, bytes: u64) {
    if let Some(shadow) = &a.shadow {
        let from = (at - a.base) as usize;
        shadow[from..from + bytes as usize].iter().for_each(|s| s.store(1, Relaxed));
    }
}

/// One allocation as a launch sees it.
#[derive(Clone, Copy)]
pub struct Region {
    pub base: u64,
    pub end: u64,
    /// Null unless strict.
    shadow: *const AtomicU8,
}

impl Region {
    pub const NONE: Region = Region { base: 1, end: 0, shadow: std::ptr::null() };

    #[inline(always)]
    pub fn holds(&self, at: u64, bytes: u64) -> bool {
        at >= self.base && at.wrapping_add(bytes) <= self.end && at.wrapping_add(bytes) >= at
    }

    #[inline(always)]
    pub fn shadowed(&self) -> bool {
        !self.shadow.is_null()
    }

    /// Whether every byte of a range inside the region was written (true without a shadow).
    #[inline]
    pub fn written(&self, at: u64, bytes: u64) -> bool {
        // SAFETY: the shadow is as long as the region and the caller checked `holds`.
        !self.shadowed()
            || (0..bytes).all(|i| unsafe { (*self.shadow.add((at - self.base + i) as usize)).load(Relaxed) != 0 })
    }

    #[inline]
    pub fn mark_written(&self, at: u64, bytes: u64) {
        if self.shadowed() {
            for i in 0..bytes {
                // SAFETY: as in `written`.
                unsafe { (*self.shadow.add((at - self.base + i) as usize)).store(1, Relaxed) };
            }
        }
    }
}

/// The allocations that lived when a launch began.
pub struct View {
    regions: Vec<Region>,
    _kept: Vec<Arc<Allocation>>,
}

// SAFETY: the raw shadow pointers point into allocations that `_kept` holds; the shadows are atomics.
unsafe impl Send for View {}
// SAFETY: as for Send.
unsafe impl Sync for View {}

impl View {
    /// Adds memory that the caller keeps alive (kernel parameters).
    pub fn add(&mut self, base: u64, len: u64) {
        let at = self.regions.partition_point(|r| r.base < base);
        self.regions.insert(at, Region { base, end: base + len, shadow: std::ptr::null() });
    }

    /// The region that holds the whole range.
    pub fn locate(&self, at: u64, bytes: u64) -> Option<Region> {
        let i = self.regions.partition_point(|r| r.base <= at);
        self.regions[..i].last().copied().filter(|r| r.holds(at, bytes))
    }

    /// Words for a fault: where the nearest allocation lies.
    pub fn describe(&self, at: u64) -> String {
        let i = self.regions.partition_point(|r| r.base <= at);
        let below = self.regions[..i].last();
        let above = self.regions.get(i);
        let near_above = above.filter(|r| below.is_none_or(|b| r.base - at < at.saturating_sub(b.end)));
        match (below, near_above) {
            (_, Some(r)) => {
                format!("{} bytes before the allocation {:#x} ({} bytes long)", r.base - at, r.base, r.end - r.base)
            }
            (Some(r), _) if at >= r.end => {
                format!(
                    "{} bytes past the end of the allocation {:#x} ({} bytes long)",
                    at - r.end,
                    r.base,
                    r.end - r.base
                )
            }
            (Some(r), _) => {
                format!("at byte {} of the allocation {:#x} ({} bytes long)", at - r.base, r.base, r.end - r.base)
            }
            _ => "there are no allocations".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of this process that are in memory.
    fn resident() -> u64 {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE
    }

    /// Strict mode remembers each byte, but only of what is touched: a test may take all the memory that a device has.
    #[test]
    fn what_nobody_touches_takes_no_memory() {
        let memory = Memory::new_strict(4 << 30);
        let before = resident();
        let large = memory.alloc(2 << 30).unwrap();
        memory.write(large + (1 << 30), &[1, 2, 3]).unwrap();
        assert!(resident() - before < 256 << 20, "{} MiB", (resident() - before) >> 20);
        assert!(memory.free(large));
    }
}
