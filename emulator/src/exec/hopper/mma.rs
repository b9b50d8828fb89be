//! wgmma in flight. The four warps of a warpgroup issue the same instructions; one of them runs for all four when
//! the first warp waits for its group, and reads shared memory only then. Until its own wait each warp's
//! accumulator registers hold a mark, so that reading them early gives NaN and writing them early is noticed.
//!
//! ptxas repairs kernels that touch those registers early by waits of its own, so they are right on a GPU, if slow.
//! CUDA_EMULATOR_WGMMA=sync lets each wgmma complete when it is issued: what passes only so relies on the repair.
use super::super::instr::{Pred, Row};
use super::super::machine::Machine;
use super::super::warp::{Flow, Warp};
use super::whole_warp;
use crate::hopper::numbers::{f16_to_f32, f32_to_f16};
use crate::hopper::wgmma;
use crate::hopper::{Accumulator, Descriptor, Mma};
use crate::races;
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

/// What accumulator registers hold while a wgmma writes them: NaN as f32 and as a pair of f16.
const MARK: u32 = 0x7fff_7dad;

fn synchronous() -> bool {
    static SYNC: OnceLock<bool> = OnceLock::new();
    *SYNC.get_or_init(|| std::env::var("CUDA_EMULATOR_WGMMA").is_ok_and(|v| v == "sync"))
}

pub enum Instr {
    Fence,
    Commit,
    WaitGroup { keep: usize },
    Multiply(Arc<Multiply>),
}

pub struct Multiply {
    pub mma: Mma,
    pub rows: Vec<Row>,
    pub a: Source,
    /// Row of B's descriptor.
    pub b: Row,
    pub scale_d: Scale,
}

pub enum Source {
    Shared(Row),
    Registers([Row; 4]),
}

pub enum Scale {
    Fixed(bool),
    Predicate(Pred),
}

/// What one warp gave to one wgmma.
struct Issued {
    instruction: Arc<Multiply>,
    a: Operand,
    b: u64,
    scale_d: bool,
    /// Index into the warp's accumulators.
    accumulator: usize,
}

enum Operand {
    Shared(u64),
    Registers(Box<[[u32; 32]; 4]>),
}

/// The values of an accumulator while its registers are marked.
struct Values {
    rows: Vec<Row>,
    /// `[16][n]`, as f32 or as the bits of s32.
    data: Vec<f32>,
    integers: Vec<i32>,
    kind: Accumulator,
    n: usize,
    users: usize,
}

/// One element of an accumulator; with f16 which half of its register it is.
enum Cell<'a> {
    Float(&'a mut f32, Option<u32>),
    Integer(&'a mut i32),
}

impl Values {
    /// Calls `f` with each lane's register of this index and the elements that it holds.
    #[inline(always)]
    fn exchange(&mut self, index: usize, register: &mut [u32; 32], f: impl Fn(&mut u32, Cell)) {
        let halves = if self.kind == Accumulator::F16 { 2 } else { 1 };
        for half in 0..halves {
            let (first_row, first_column) = wgmma::d_position(0, halves * index + half);
            for (eighth, four) in register.chunks_exact_mut(4).enumerate() {
                let at = (first_row + eighth) * self.n + first_column;
                for (lane, register) in four.iter_mut().enumerate() {
                    match self.kind {
                        Accumulator::F32 => f(register, Cell::Float(&mut self.data[at + 2 * lane], None)),
                        Accumulator::F16 => f(register, Cell::Float(&mut self.data[at + 2 * lane], Some(half as u32))),
                        Accumulator::S32 => f(register, Cell::Integer(&mut self.integers[at + 2 * lane])),
                    }
                }
            }
        }
    }
}

#[derive(Default)]
pub struct WarpState {
    fenced: bool,
    /// Issued and not retired; the first has number `retired`.
    issued: VecDeque<Issued>,
    retired: u64,
    /// For each committed group not yet retired, the number after its last wgmma.
    groups: VecDeque<u64>,
    accumulators: Vec<Option<Values>>,
}

impl WarpState {
    fn next(&self) -> u64 {
        self.retired + self.issued.len() as u64
    }

    fn get(&self, number: u64) -> &Issued {
        &self.issued[(number - self.retired) as usize]
    }
}

#[derive(Default)]
pub struct BlockState {
    /// For each warpgroup, how many wgmmas have run.
    done: Vec<u64>,
}

pub fn execute(i: &Instr, m: &mut Machine, w: &mut Warp, mask: u32) -> Result<Flow, String> {
    if !whole_warp(w, mask) {
        return Ok(Flow::Wait("the other lanes of the warp at wgmma".into()));
    }
    if w.live != u32::MAX {
        return Err(format!("wgmma by a warp of which only the lanes {:#x} live", w.live));
    }
    match i {
        Instr::Fence => w.hopper.mma.fenced = true,
        Instr::Commit => {
            let next = w.hopper.mma.next();
            w.hopper.mma.groups.push_back(next);
        }
        Instr::Multiply(multiply) => issue(multiply, m, w)?,
        Instr::WaitGroup { keep } => {
            let state = &w.hopper.mma;
            let over = state.groups.len().saturating_sub(*keep);
            if over == 0 {
                return Ok(Flow::Next);
            }
            let until = state.groups[over - 1];
            if synchronous() {
                w.hopper.mma.groups.drain(..over);
                ended(m, w, until);
                return Ok(Flow::Next);
            }
            if let Some(sibling) = siblings(w).find(|s| with_warp(m, w, *s, |w| w.hopper.mma.next() < until)) {
                return Ok(Flow::Wait(format!(
                    "wgmma.wait_group: warp {sibling} of the warpgroup has not issued its part"
                )));
            }
            run(m, w, until)?;
            w.hopper.mma.groups.drain(..over);
            retire(w, until)?;
            ended(m, w, until);
        }
    }
    Ok(Flow::Next)
}

/// For the race detector: the warp has waited for the warpgroup's wgmmas up to number `until`.
fn ended(m: &mut Machine, w: &Warp, until: u64) {
    if let Some(races) = &mut m.cluster.races {
        races.multiplied(m.block, w.id, until);
    }
}

/// The 16-byte units of shared memory that a wgmma reads.
fn units(mma: &Mma, a: Option<u64>, b: u64) -> Result<Vec<u32>, String> {
    let mut units = vec![];
    let mut read = |at: u32| {
        units.push(at);
        Ok([0; 16])
    };
    let k = mma.k();
    wgmma::b_from_shared(mma, &Descriptor::decode(b)?, &mut read, &mut vec![0.0; k * mma.n])?;
    if let Some(a) = a {
        let descriptor = Descriptor::decode(a)?;
        for warp in 0..4 {
            wgmma::a_from_shared(mma, warp, &descriptor, &mut read, &mut vec![0.0; 16 * k])?;
        }
    }
    units.sort_unstable();
    units.dedup();
    Ok(units)
}

/// The warps of the executing warp's warpgroup, itself included.
fn siblings(w: &Warp) -> std::ops::Range<usize> {
    let first = w.id as usize / 4 * 4;
    first..first + 4
}

/// A warp of the block by number; the executing one is not in its block now. A warp that has left counts as absent.
fn with_warp<R>(m: &mut Machine, w: &mut Warp, id: usize, f: impl FnOnce(&mut Warp) -> R) -> R {
    if id == w.id as usize {
        return f(w);
    }
    f(m.cluster.blocks[m.block].warps[id].as_mut().expect("only the executing warp is taken out"))
}

fn uniform(values: &[u64; 32], what: &str) -> Result<u64, String> {
    match values.iter().position(|v| *v != values[0]) {
        Some(lane) => {
            Err(format!("wgmma with {what} {:#x} in lane 0 and {:#x} in lane {lane}", values[0], values[lane]))
        }
        None => Ok(values[0]),
    }
}

fn issue(i: &Arc<Multiply>, m: &mut Machine, w: &mut Warp) -> Result<(), String> {
    if siblings(w).end > m.cluster.blocks[m.block].warps.len() {
        return Err(format!("wgmma by warp {}: its warpgroup of four warps is not complete", w.id));
    }
    if !w.hopper.mma.fenced {
        return Err("wgmma.mma_async before any wgmma.fence".into());
    }
    let a = match &i.a {
        Source::Shared(row) => Operand::Shared(uniform(w.regs.row64(*row), "descriptor of A")?),
        Source::Registers(rows) => Operand::Registers(Box::new(rows.map(|row| *w.regs.row32(row)))),
    };
    let b = uniform(w.regs.row64(i.b), "descriptor of B")?;
    let scale_d = match &i.scale_d {
        Scale::Fixed(value) => *value,
        Scale::Predicate(p) => match w.regs.pred(*p) {
            0 => false,
            u32::MAX => true,
            mixed => return Err(format!("wgmma with scale-d true in the lanes {mixed:#x} only")),
        },
    };
    if let Operand::Registers(registers) = &a
        && registers.iter().any(|r| r.contains(&MARK))
    {
        return Err("wgmma takes A from registers that another wgmma still writes".into());
    }
    Descriptor::decode(b)?;
    if let Operand::Shared(bits) = a {
        Descriptor::decode(bits)?;
    }
    let number = w.hopper.mma.next();
    let a_in_shared = if let Operand::Shared(bits) = a { Some(bits) } else { None };
    races::multiply(m, w.id, number, || units(&i.mma, a_in_shared, b))?;
    for sibling in siblings(w) {
        if sibling == w.id as usize {
            continue;
        }
        let other = &m.cluster.blocks[m.block].warps[sibling]
            .as_ref()
            .expect("only the executing warp is taken out")
            .hopper
            .mma;
        if number < other.next() && number >= other.retired {
            same(other.get(number), i, &a, b, scale_d)
                .map_err(|what| format!("{what} than warp {sibling} of its warpgroup"))?;
        }
    }
    let accumulator = accumulate_in(i, w, scale_d)?;
    w.hopper.mma.issued.push_back(Issued { instruction: i.clone(), a, b, scale_d, accumulator });
    if synchronous() {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        read_operands(m, w.hopper.mma.get(number), &mut a, &mut b)?;
        let part = 16 * i.mma.k();
        multiply(w, number, &mut a[w.id as usize % 4 * part..][..part], &b, false)?;
        retire(w, number + 1)?;
    }
    Ok(())
}

fn same(other: &Issued, i: &Arc<Multiply>, a: &Operand, b: u64, scale_d: bool) -> Result<(), String> {
    if !Arc::ptr_eq(&other.instruction, i) {
        return Err("the warp executes another wgmma".into());
    }
    if let (Operand::Shared(x), Operand::Shared(y)) = (&other.a, a)
        && x != y
    {
        return Err(format!("wgmma with another descriptor of A ({y:#x}, not {x:#x})"));
    }
    if other.b != b {
        return Err(format!("wgmma with another descriptor of B ({b:#x}, not {:#x})", other.b));
    }
    if other.scale_d != scale_d {
        return Err("wgmma with another scale-d".into());
    }
    Ok(())
}

/// The accumulator that this wgmma adds to: one in flight on the same registers, or a new one that takes over their
/// values and marks them.
fn accumulate_in(i: &Multiply, w: &mut Warp, scale_d: bool) -> Result<usize, String> {
    let Warp { regs, hopper, .. } = w;
    let state = &mut hopper.mma;
    for (index, values) in state.accumulators.iter_mut().enumerate() {
        let Some(values) = values else { continue };
        if values.rows == i.rows && values.kind == i.mma.d {
            values.users += 1;
            return Ok(index);
        }
        if values.rows.iter().any(|row| i.rows.contains(row)) {
            return Err("wgmma on accumulator registers that a wgmma of another shape still writes".into());
        }
    }
    let n = i.mma.n;
    let mut values =
        Values { rows: i.rows.clone(), data: Vec::new(), integers: Vec::new(), kind: i.mma.d, n, users: 1 };
    match i.mma.d {
        Accumulator::S32 => values.integers = vec![0; 16 * n],
        _ => values.data = vec![0.0; 16 * n],
    }
    for (index, row) in i.rows.iter().enumerate() {
        let register = regs.row32_mut(*row);
        if scale_d && register.contains(&MARK) {
            return Err("wgmma adds to a copy of accumulators made while another wgmma was still writing them".into());
        }
        values.exchange(index, register, |register, f| match f {
            Cell::Float(v, half) => {
                *v = half.map_or(f32::from_bits(*register), |h| f16_to_f32((*register >> (16 * h)) as u16))
            }
            Cell::Integer(v) => *v = *register as i32,
        });
        register.fill(MARK);
    }
    let free = state.accumulators.iter().position(Option::is_none).unwrap_or_else(|| {
        state.accumulators.push(None);
        state.accumulators.len() - 1
    });
    state.accumulators[free] = Some(values);
    Ok(free)
}

/// Runs the warpgroup's wgmmas up to number `until`, for its four warps.
fn run(m: &mut Machine, w: &mut Warp, until: u64) -> Result<(), String> {
    let group = w.id as usize / 4;
    let done = &mut m.cluster.blocks[m.block].hopper.mma.done;
    if done.len() <= group {
        done.resize(group + 1, 0);
    }
    let from = done[group];
    done[group] = until.max(from);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for number in from..until {
        let issued = w.hopper.mma.get(number);
        let part = 16 * issued.instruction.mma.k();
        read_operands(m, issued, &mut a, &mut b)?;
        let strict = m.launch.strict;
        for (sibling, rows) in siblings(w).zip(a.chunks_exact_mut(part)) {
            with_warp(m, w, sibling, |w| multiply(w, number, rows, &b, strict))?;
        }
    }
    Ok(())
}

/// The 64 rows of A, if it is in shared memory, and B.
fn read_operands(m: &mut Machine, issued: &Issued, a: &mut Vec<f32>, b: &mut Vec<f32>) -> Result<(), String> {
    let mma = &issued.instruction.mma;
    let k = mma.k();
    let shared = &mut m.cluster.blocks[m.block].shared;
    let mut read = |at: u32| {
        let unit = shared.read_quiet(at, 16)?.try_into().unwrap();
        shared.check_fenced(at, 16).map(|()| unit)
    };
    b.resize(k * mma.n, 0.0);
    wgmma::b_from_shared(mma, &Descriptor::decode(issued.b)?, &mut read, b)
        .map_err(|e| format!("wgmma reads B: {e}"))?;
    a.resize(64 * k, 0.0);
    if let Operand::Shared(bits) = issued.a {
        let descriptor = Descriptor::decode(bits)?;
        for (warp, rows) in a.chunks_exact_mut(16 * k).enumerate() {
            wgmma::a_from_shared(mma, warp, &descriptor, &mut read, rows).map_err(|e| format!("wgmma reads A: {e}"))?;
        }
    }
    Ok(())
}

/// One warp's part of one wgmma.
fn multiply(w: &mut Warp, number: u64, a: &mut [f32], b: &[f32], strict: bool) -> Result<(), String> {
    let state = &mut w.hopper.mma;
    let issued = &state.issued[(number - state.retired) as usize];
    let mma = &issued.instruction.mma;
    if let Operand::Registers(registers) = &issued.a {
        // The values at issue count: ptxas keeps them. Only strict mode insists on the rule.
        if let Source::Registers(rows) = &issued.instruction.a
            && strict
            && rows.iter().zip(registers.iter()).any(|(row, before)| w.regs.row32(*row) != before)
        {
            return Err(format!("warp {} overwrote registers with A of a wgmma before waiting for it", w.id));
        }
        wgmma::a_from_registers(mma, registers, a);
    }
    if mma.negate_a != mma.negate_b {
        a.iter_mut().for_each(|v| *v = -*v);
    }
    let values = state.accumulators[issued.accumulator].as_mut().expect("an accumulator in use");
    if !issued.scale_d {
        values.data.fill(0.0);
        values.integers.fill(0);
    }
    match mma.d {
        Accumulator::S32 => wgmma::multiply_integers(mma, a, b, &mut values.integers),
        Accumulator::F32 => wgmma::multiply(mma.k(), mma.n, a, b, &mut values.data),
        Accumulator::F16 => {
            wgmma::multiply(mma.k(), mma.n, a, b, &mut values.data);
            values.data.iter_mut().for_each(|v| *v = f16_to_f32(f32_to_f16(*v)));
        }
    }
    Ok(())
}

/// Drops the warp's wgmmas up to number `until` and gives accumulators that nothing writes any more back to their
/// registers.
fn retire(w: &mut Warp, until: u64) -> Result<(), String> {
    let Warp { regs, hopper, id, .. } = w;
    let state = &mut hopper.mma;
    while state.retired < until {
        let issued = state.issued.pop_front().expect("issued before committed");
        state.retired += 1;
        let slot = &mut state.accumulators[issued.accumulator];
        let values = slot.as_mut().expect("an accumulator in use");
        values.users -= 1;
        if values.users > 0 {
            continue;
        }
        let mut values = slot.take().expect("an accumulator in use");
        for (index, row) in std::mem::take(&mut values.rows).iter().enumerate() {
            let register = regs.row32_mut(*row);
            if register.iter().any(|bits| *bits != MARK) {
                return Err(format!(
                    "warp {id} wrote accumulator registers of a wgmma before waiting for it (ptxas would insert a wait; see CUDA_EMULATOR_WGMMA)"
                ));
            }
            register.fill(0);
            values.exchange(index, register, |register, f| match f {
                Cell::Float(v, None) => *register = v.to_bits(),
                Cell::Float(v, Some(half)) => *register |= (f32_to_f16(*v) as u32) << (16 * half),
                Cell::Integer(v) => *register = *v as u32,
            });
        }
    }
    Ok(())
}

pub fn at_exit(w: &Warp) -> Result<(), String> {
    match w.hopper.mma.issued.len() {
        0 => Ok(()),
        left => Err(format!("warp {} ended with {left} wgmma.mma_async that nobody waited for", w.id)),
    }
}
