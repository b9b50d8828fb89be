//! Loads, stores, atomics and cp.async. Each lane's address is checked; an Err is a fault's words, with the lane
//! left in `Warp::fault_lane`.
use super::decode::Address;
use super::float::{Bf16, F16, Half, add_odd, flush};
use super::instr::{Access, Atom, AtomOp, CpAsync, Order, Row, Ty, Where};
use super::machine::{LOCAL_WINDOW, Machine, SHARED_WINDOW, WINDOW_MASK};
use super::traffic::Way;
use super::warp::{Registers, Warp};
use crate::races::{self, Kind, Touch};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering::SeqCst};

/// The lanes' addresses.
#[inline(always)]
pub fn addresses(regs: &Registers, a: &Address) -> [u64; 32] {
    if a.wide {
        let row = regs.row64(a.row);
        std::array::from_fn(|l| row[l].wrapping_add(a.offset as u64))
    } else {
        let row = regs.row32(a.row);
        std::array::from_fn(|l| row[l].wrapping_add(a.offset as u32) as u64)
    }
}

#[inline(always)]
pub fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let lane = left.trailing_zeros() as usize;
        left &= left - 1;
        Some(lane)
    })
}

/// The space and the address within it (local: offset; shared: 32 bits; else as is).
#[inline(always)]
pub fn resolve(place: Where, at: u64) -> (Where, u64) {
    match place {
        Where::Generic => match at & WINDOW_MASK {
            0 => (Where::Global, at),
            SHARED_WINDOW => (Where::Shared, at & 0xFFFF_FFFF),
            LOCAL_WINDOW => (Where::Local, at & 0xFFFF_FFFF),
            _ => (Where::Global, at),
        },
        Where::Shared | Where::Local => (place, at & 0xFFFF_FFFF),
        other => (other, at),
    }
}

#[cold]
fn misaligned(at: u64, bytes: u32) -> String {
    format!("misaligned address {at:#x}: an access of {bytes} bytes needs a multiple of {bytes}")
}

impl Warp {
    /// Bytes of a lane's local memory.
    #[inline(always)]
    fn local_range(&self, lane: usize, at: u64, len: usize) -> Result<std::ops::Range<usize>, String> {
        let from = at as usize;
        if from < 16 || from + len > self.local_stride {
            return Err(format!(
                "{len} bytes at local address {at:#x} lie outside the thread's {} bytes",
                self.local_stride
            ));
        }
        Ok(lane * self.local_stride + from..lane * self.local_stride + from + len)
    }
}

/// Pointer to `len` readable bytes.
#[inline(always)]
fn readable(m: &mut Machine, w: &Warp, lane: usize, place: Where, at: u64, len: usize) -> Result<*const u8, String> {
    match resolve(place, at) {
        (Where::Shared, at) => {
            let (shared, offset) = m.shared(at as u32)?;
            Ok(shared.read(offset, len)?.as_ptr())
        }
        (Where::Local, at) => Ok(w.local[w.local_range(lane, at, len)?].as_ptr()),
        (_, at) => m.readable_global(at, len),
    }
}

/// Tells the race detector of an access that is about to happen. `same` as there.
#[cold]
fn touch(
    m: &mut Machine,
    w: &mut Warp,
    place: Where,
    (mask, at, bytes): (u32, &[u64; 32], u32),
    kind: Kind,
    same: impl Fn(&mut Machine, usize) -> bool,
) -> Result<(), String> {
    races::touch(m, Touch { warp: w.id, mask, place, at, len: bytes as usize, kind }, same).map_err(|(lane, what)| {
        w.fault_lane = Some(lane);
        what
    })
}

fn kind_of(order: Order, weak: Kind) -> Kind {
    if order.is_strong() { Kind::Atomic } else { weak }
}

pub fn load(m: &mut Machine, w: &mut Warp, i: &Access, mask: u32) -> Result<(), String> {
    let at = addresses(&w.regs, &i.address);
    let bytes = i.width * i.data.len() as u32;
    if i.order != Order::Constant {
        m.moves(Way::Load, i.place, mask, &at, bytes as u64);
    }
    if m.cluster.races.is_some() && i.order != Order::Constant {
        touch(m, w, i.place, (mask, &at, bytes), kind_of(i.order, Kind::Read), |_, _| false)?;
        if i.order.is_strong() {
            races::observe(m, w.id, mask, i.place, &at, i.order);
        }
    }
    let mut from = [std::ptr::null::<u8>(); 32];
    for l in lanes(mask) {
        let found = if at[l] & (bytes as u64 - 1) != 0 {
            Err(misaligned(at[l], bytes))
        } else {
            readable(m, w, l, i.place, at[l], bytes as usize)
        };
        match found {
            Ok(p) => from[l] = p,
            Err(e) => {
                w.fault_lane = Some(l);
                return Err(e);
            }
        }
    }
    let base = w.regs.base();
    for (k, row) in i.data.iter().enumerate() {
        // SAFETY: `readable` checked every byte; rows are the file's.
        unsafe {
            let row32 = base.add(*row as usize * 32);
            let row64 = row32.cast::<u64>();
            match (i.width, i.reg_bits) {
                (4, ..=32) => {
                    lanes(mask).for_each(|l| *row32.add(l) = from[l].add(k * 4).cast::<u32>().read_unaligned())
                }
                (8, 64) => lanes(mask).for_each(|l| *row64.add(l) = from[l].add(k * 8).cast::<u64>().read_unaligned()),
                (16, 128) => {
                    let row128 = row32.cast::<u128>();
                    lanes(mask).for_each(|l| *row128.add(l) = from[l].add(k * 16).cast::<u128>().read_unaligned());
                }
                (width, reg_bits) => {
                    for l in lanes(mask) {
                        let p = from[l].add(k * width as usize);
                        let v = match (width, i.signed) {
                            (1, false) => p.read() as u64,
                            (1, true) => p.read() as i8 as i64 as u64,
                            (2, false) => p.cast::<u16>().read_unaligned() as u64,
                            (2, true) => p.cast::<i16>().read_unaligned() as i64 as u64,
                            (4, true) => p.cast::<i32>().read_unaligned() as i64 as u64,
                            (4, false) => p.cast::<u32>().read_unaligned() as u64,
                            _ => p.cast::<u64>().read_unaligned(),
                        };
                        match reg_bits {
                            64 => *row64.add(l) = v,
                            16 => *row32.add(l) = v as u16 as u32,
                            _ => *row32.add(l) = v as u32,
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// The bytes that a lane stores; `base` is the warp's register file.
#[inline(always)]
fn stored(i: &Access, base: *mut u32, lane: usize) -> [u8; 64] {
    let width = i.width as usize;
    let mut data = [0u8; 64];
    for (k, row) in i.data.iter().enumerate() {
        // SAFETY: rows of the file; a register is at least as wide as the element, and little-endian.
        unsafe {
            let row = base.add(*row as usize * 32);
            let from: *const u8 = match i.reg_bits {
                128 => row.cast::<u128>().add(lane).cast(),
                64 => row.cast::<u64>().add(lane).cast(),
                _ => row.add(lane).cast(),
            };
            let to = data.as_mut_ptr().add(k * width);
            match width {
                4 => to.cast::<u32>().write_unaligned(from.cast::<u32>().read()),
                8 => to.cast::<u64>().write_unaligned(from.cast::<u64>().read()),
                _ => std::ptr::copy_nonoverlapping(from, to, width),
            }
        }
    }
    data
}

/// Whether memory holds this already.
fn holds(m: &mut Machine, place: Where, at: u64, data: &[u8]) -> bool {
    let mut now = [0u8; 64];
    let now = &mut now[..data.len()];
    let read = match resolve(place, at) {
        (Where::Shared, at) => m.read_generic(at | SHARED_WINDOW, now),
        (_, at) => m.read_global(at, now),
    };
    read.is_ok() && now == data
}

pub fn store(m: &mut Machine, w: &mut Warp, i: &Access, mask: u32) -> Result<(), String> {
    let at = addresses(&w.regs, &i.address);
    let width = i.width as usize;
    let bytes = width * i.data.len();
    let base = w.regs.base();
    m.moves(Way::Store, i.place, mask, &at, bytes as u64);
    if m.cluster.races.is_some() {
        let unchanged = |m: &mut Machine, l: usize| holds(m, i.place, at[l], &stored(i, base, l)[..bytes]);
        touch(m, w, i.place, (mask, &at, bytes as u32), kind_of(i.order, Kind::Write), unchanged)?;
        if i.order.is_strong() {
            races::publish(m, w.id, mask, i.place, &at, i.order, false);
        }
    }
    for l in lanes(mask) {
        let data = stored(i, base, l);
        let done = if at[l] & (bytes as u64 - 1) != 0 {
            Err(misaligned(at[l], bytes as u32))
        } else {
            match resolve(i.place, at[l]) {
                (Where::Shared, at) => {
                    m.shared(at as u32).and_then(|(shared, offset)| shared.write(offset, &data[..bytes]))
                }
                (Where::Local, at) => w.local_range(l, at, bytes).map(|r| w.local[r].copy_from_slice(&data[..bytes])),
                (_, at) => m.write_global(at, &data[..bytes]),
            }
        };
        if let Err(e) = done {
            w.fault_lane = Some(l);
            return Err(e);
        }
    }
    Ok(())
}

pub fn atomic(m: &mut Machine, w: &mut Warp, i: &Atom, mask: u32) -> Result<(), String> {
    let at = addresses(&w.regs, &i.address);
    let width = i.ty.bits() as u64 / 8;
    let all = width * i.src.len() as u64;
    m.moves(Way::Update, i.place, mask, &at, all);
    if m.cluster.races.is_some() {
        touch(m, w, i.place, (mask, &at, all as u32), Kind::Atomic, |_, _| false)?;
        races::publish(m, w.id, mask, i.place, &at, i.order, true);
    }
    for l in lanes(mask) {
        let place = if at[l] & (all - 1) != 0 {
            Err(misaligned(at[l], all as u32))
        } else {
            match resolve(i.place, at[l]) {
                (Where::Shared, at) => m
                    .shared(at as u32)
                    .and_then(|(shared, offset)| shared.slot(offset, all as usize).map(|s| s.as_mut_ptr())),
                (Where::Local, at) => w.local_range(l, at, all as usize).map(|r| w.local[r].as_mut_ptr()),
                (_, at) => m.global_slot(at, all as usize),
            }
        };
        let place = match place {
            Ok(p) => p,
            Err(e) => {
                w.fault_lane = Some(l);
                return Err(e);
            }
        };
        for (k, row) in i.src.iter().enumerate() {
            let value = get(&w.regs, *row, l, i.ty);
            let new = if i.op == AtomOp::Cas { get(&w.regs, i.new, l, i.ty) } else { 0 };
            // SAFETY: the bytes were checked and are aligned; host memory is shared with other threads only
            // through atomics of this kind.
            let old =
                unsafe { modify(place.add(k * width as usize), i.ty, |old| apply(i.op, i.ty, i.ftz, old, value, new)) };
            if let Some(d) = i.dst.get(k) {
                put(&mut w.regs, *d, l, i.ty, old);
            }
        }
    }
    if m.cluster.races.is_some() && !i.dst.is_empty() {
        races::observe(m, w.id, mask, i.place, &at, i.order);
    }
    Ok(())
}

fn get(regs: &Registers, row: Row, lane: usize, ty: Ty) -> u64 {
    if ty.bits() == 64 { regs.get64(row, lane) } else { regs.get32(row, lane) as u64 }
}

fn put(regs: &mut Registers, row: Row, lane: usize, ty: Ty, value: u64) {
    if ty.bits() == 64 { regs.set64(row, lane, value) } else { regs.set32(row, lane, value as u32) }
}

/// Atomic read-modify-write; the old value.
unsafe fn modify(at: *mut u8, ty: Ty, f: impl Fn(u64) -> u64) -> u64 {
    macro_rules! with {
        ($atomic:ty, $t:ty) => {{
            // SAFETY: the caller's promise: live, aligned memory, which others reach by atomics, too.
            let place = unsafe { <$atomic>::from_ptr(at.cast()) };
            let mut old = place.load(SeqCst);
            loop {
                match place.compare_exchange_weak(old, f(old as u64) as $t, SeqCst, SeqCst) {
                    Ok(old) => return old as u64,
                    Err(seen) => old = seen,
                }
            }
        }};
    }
    match ty.bits() {
        16 => with!(AtomicU16, u16),
        64 => with!(AtomicU64, u64),
        _ => with!(AtomicU32, u32),
    }
}

/// New value of a place.
pub fn apply(op: AtomOp, ty: Ty, ftz: bool, old: u64, b: u64, new: u64) -> u64 {
    let (a32, b32) = (old as u32, b as u32);
    match op {
        AtomOp::Exch => b,
        AtomOp::Cas => {
            if old == b {
                new
            } else {
                old
            }
        }
        AtomOp::And => old & b,
        AtomOp::Or => old | b,
        AtomOp::Xor => old ^ b,
        AtomOp::Inc => {
            if a32 >= b32 {
                0
            } else {
                a32 as u64 + 1
            }
        }
        AtomOp::Dec => {
            if a32 == 0 || a32 > b32 {
                b
            } else {
                a32 as u64 - 1
            }
        }
        AtomOp::Add => match ty {
            Ty::F32 => {
                let (a, b) = (f32::from_bits(a32), f32::from_bits(b32));
                let sum = if ftz { flush(flush(a) + flush(b)) } else { a + b };
                sum.to_bits() as u64
            }
            Ty::F64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
            Ty::F16 | Ty::F16x2 => halves(ty == Ty::F16x2, a32, b32, |a, b| F16::put(F16::get(a) + F16::get(b))),
            Ty::BF16 | Ty::BF16x2 => halves(ty == Ty::BF16x2, a32, b32, |a, b| {
                Bf16::put64(add_odd(Bf16::get(a) as f64, Bf16::get(b) as f64))
            }),
            _ => old.wrapping_add(b),
        },
        AtomOp::Min | AtomOp::Max => {
            let less = match ty {
                Ty::S32 => (a32 as i32) < b32 as i32,
                Ty::S64 => (old as i64) < b as i64,
                Ty::U64 => old < b,
                Ty::F16 | Ty::F16x2 => {
                    return halves(ty == Ty::F16x2, a32, b32, |a, b| pick(a, b, F16::get(a), F16::get(b), op));
                }
                Ty::BF16 | Ty::BF16x2 => {
                    return halves(ty == Ty::BF16x2, a32, b32, |a, b| pick(a, b, Bf16::get(a), Bf16::get(b), op));
                }
                _ => a32 < b32,
            };
            if less == (op == AtomOp::Min) { old } else { b }
        }
    }
}

fn pick(a: u16, b: u16, x: f32, y: f32, op: AtomOp) -> u16 {
    if x.is_nan() || (if op == AtomOp::Min { y < x } else { y > x }) { b } else { a }
}

fn halves(pair: bool, a: u32, b: u32, f: impl Fn(u16, u16) -> u16) -> u64 {
    let high = if pair { (f((a >> 16) as u16, (b >> 16) as u16) as u32) << 16 } else { 0 };
    (high | f(a as u16, b as u16) as u32) as u64
}

/// A cp.async on its way: what it read, and where it will go.
pub struct Copy {
    lane: u8,
    bytes: u8,
    group: u32,
    block: u16,
    offset: u32,
    data: [u8; 16],
}

/// The cp.async state of a warp.
#[derive(Default)]
pub struct Copies {
    pending: Vec<Copy>,
    /// Number of groups each lane has committed.
    committed: [u32; 32],
}

/// Issue: the source is read now, the target becomes unreadable, and the bytes arrive at the wait.
pub fn copy_async(m: &mut Machine, w: &mut Warp, i: &CpAsync, mask: u32) -> Result<(), String> {
    let (dst, src) = (addresses(&w.regs, &i.dst), addresses(&w.regs, &i.src));
    let ignored = i.ignore.map_or(0, |p| w.regs.pred(p));
    // Lanes that copy nothing read nothing, and all others as much.
    let read = lanes(mask & !ignored).filter(|&l| i.source_bytes.is_none_or(|row| w.regs.get32(row, l) > 0));
    let read = read.fold(0, |read, l| read | 1 << l);
    m.moves(Way::Load, Where::Global, read, &src, i.bytes as u64);
    for l in lanes(mask) {
        let done = issue(m, w, i, l, dst[l], src[l], ignored >> l & 1 != 0);
        if let Err(e) = done {
            w.fault_lane = Some(l);
            return Err(e);
        }
    }
    Ok(())
}

fn issue(
    m: &mut Machine,
    w: &mut Warp,
    i: &CpAsync,
    l: usize,
    dst: u64,
    src: u64,
    ignored: bool,
) -> Result<(), String> {
    let n = i.source_bytes.map_or(i.bytes, |row| w.regs.get32(row, l));
    if n > i.bytes {
        return Err(format!("the source's size {n} is above the copy's {}", i.bytes));
    }
    let n = if ignored { 0 } else { n as usize };
    for at in [dst, src] {
        if at & (i.bytes as u64 - 1) != 0 {
            return Err(misaligned(at, i.bytes));
        }
    }
    let mut data = [0u8; 16];
    if n > 0 {
        m.read_global(src, &mut data[..n])?;
    }
    let (block, offset) = m.shared_place(dst as u32)?;
    races::copy_async(m, w.id, l, (block, offset), i.bytes as usize, src, n)?;
    m.cluster.blocks[block].shared.mark_in_flight(offset, i.bytes as usize)?;
    let group = w.copies.committed[l];
    w.copies.pending.push(Copy { lane: l as u8, bytes: i.bytes as u8, group, block: block as u16, offset, data });
    Ok(())
}

pub fn commit(m: &mut Machine, w: &mut Warp, mask: u32) {
    lanes(mask).for_each(|l| w.copies.committed[l] += 1);
    if let Some(races) = &mut m.cluster.races {
        races.copies_commit(m.block, w.id, mask);
    }
}

/// Waits for all but the last `keep` groups of each lane; for everything, committed or not, without `keep`.
pub fn wait(m: &mut Machine, w: &mut Warp, mask: u32, keep: Option<u32>) -> Result<(), String> {
    if let Some(races) = &mut m.cluster.races {
        races.copies_wait(m.block, w.id, mask, keep);
    }
    deliver(m, w, mask, keep)
}

fn deliver(m: &mut Machine, w: &mut Warp, mask: u32, keep: Option<u32>) -> Result<(), String> {
    let Copies { pending, committed } = &mut w.copies;
    if pending.is_empty() {
        return Ok(());
    }
    let mut failed = Ok(());
    pending.retain(|c| {
        let l = c.lane as usize;
        let done = mask >> l & 1 != 0 && keep.is_none_or(|n| c.group + n < committed[l]);
        if done {
            let to = &mut m.cluster.blocks[c.block as usize].shared;
            if let Err(e) = to.deliver(c.offset, &c.data[..c.bytes as usize]) {
                failed = Err(e);
            }
        }
        !done
    });
    failed
}

/// All copies of these lanes, for cp.async.mbarrier.arrive: the lanes themselves do not wait.
pub fn finish_all(m: &mut Machine, w: &mut Warp, mask: u32) -> Result<(), String> {
    deliver(m, w, mask, None)
}
