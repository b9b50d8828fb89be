//! Runs kernels. `LoadedModule::load` places a module's variables in `Memory` and decodes its kernels;
//! `launch` runs one grid and returns when every thread has exited, or at the first fault.
//!
//! Files: `instr` (decoded instructions), `decode*` (syntax to instructions), `warp` (registers, groups of lanes),
//! `interpret` (the loop), `cluster` (CTAs and the scheduler), `shared` (shared memory with its shadow),
//! `machine` (what an instruction may reach: memory, own CTA, cluster peers), `alu`, `float`, `convert`, `access`
//! (loads, stores, atomics, cp.async), `collective` (shuffles, votes, barriers), `matrix` (mma, ldmatrix),
//! `hopper` (mbarrier, bulk copies, wgmma, clusters), `traffic` (bytes that are moved).
//!
//! Addresses. Global: host addresses. 32-bit shared addresses: byte offset in the low 24 bits; high 8 bits 0 for
//! the thread's own CTA, else 1 + CTA rank in the cluster (what mapa gives). Generic windows: see `machine`.
//!
//! Environment: CUDA_EMULATOR_STRICT=1 (reads of unwritten bytes fault), CUDA_EMULATOR_TIMEOUT=seconds (a launch
//! that runs longer is a fault with a dump of its warps; 600 if unset), CUDA_EMULATOR_SEED=number (warps take turns in
//! a shuffled order and for random lengths, the same for the same seed: shows missing barriers that the even
//! schedule hides), CUDA_EMULATOR_RACES=1 or 2 (accesses that nothing orders are faults, see `RaceCheck`
//! and `races`).
pub mod access;
mod alu;
pub mod cluster;
mod collective;
mod convert;
pub mod decode;
mod decode_alu;
mod decode_memory;
mod decode_warp;
mod float;
pub mod hopper;
mod host_calls;
pub mod instr;
mod interpret;
mod lifetimes;
pub mod machine;
mod matrix;
mod opcode;
pub mod shared;
pub mod traffic;
pub mod warp;

use crate::memory::Memory;
use crate::ptx::{self, Init};
use crate::races;
use crate::{Fault, LaunchDims};
use cluster::{Cluster, Launch, Slice};
use rayon::prelude::*;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Most shared memory of a CTA (an H100's 227 KiB).
const SHARED_LIMIT: u64 = 227 << 10;
/// Clusters that may be under way at once; more wait for their turn.
const RESIDENT: usize = 2048;

/// A module with the addresses of its `__device__` and `__constant__` variables and its kernels decoded.
pub struct LoadedModule {
    module: Arc<ptx::Module>,
    globals: HashMap<String, (u64, u64)>,
    programs: Arc<HashMap<String, instr::Program>>,
}

impl LoadedModule {
    /// Fails on an instruction that the emulator does not know (the message names its line) and when memory is out.
    pub fn load(memory: &Memory, mut module: ptx::Module) -> Result<Self, String> {
        let mut globals = HashMap::new();
        let made = place_globals(memory, &module, &mut globals);
        let programs = made.and_then(|()| decode_kernels(&module, &globals));
        // The syntax is not needed any more.
        module.kernels.iter_mut().for_each(|k| k.body = vec![]);
        module.functions.clear();
        let mut loaded = LoadedModule { module: Arc::new(module), globals, programs: Arc::default() };
        match programs {
            Ok(programs) => loaded.programs = Arc::new(programs),
            Err(e) => {
                loaded.unload(memory);
                return Err(e);
            }
        }
        Ok(loaded)
    }

    /// The same module once more, without decoding it again. None where it has variables: each module has its own, and
    /// programs hold their addresses.
    pub fn again(&self) -> Option<Self> {
        let has_none = self.globals.is_empty();
        has_none.then(|| LoadedModule {
            module: self.module.clone(),
            globals: HashMap::new(),
            programs: self.programs.clone(),
        })
    }

    pub fn kernel(&self, name: &str) -> Option<&ptx::Kernel> {
        self.module.kernels.iter().find(|k| k.name == name)
    }

    pub fn kernels(&self) -> impl Iterator<Item = &ptx::Kernel> {
        self.module.kernels.iter()
    }

    /// Address and size of a variable of module scope.
    pub fn global(&self, name: &str) -> Option<(u64, u64)> {
        self.globals.get(name).copied()
    }

    pub fn target(&self) -> &str {
        &self.module.target
    }

    /// Decoded instructions of a kernel, and bytes of its register file a warp.
    pub fn cost(&self, kernel: &str) -> Option<(usize, usize)> {
        self.programs.get(kernel).map(|p| (p.code.len(), p.rows * 128))
    }

    /// Frees the module's variables.
    pub fn unload(&self, memory: &Memory) {
        for (at, _) in self.globals.values() {
            memory.free(*at);
        }
    }
}

/// By name, several at a time. Of several errors the first kernel's.
fn decode_kernels(
    module: &ptx::Module,
    globals: &HashMap<String, (u64, u64)>,
) -> Result<HashMap<String, instr::Program>, String> {
    let decode = |kernel: &ptx::Kernel| {
        let program = decode::decode_kernel(module, kernel, globals);
        program.map(|p| (kernel.name.clone(), p)).map_err(|e| format!("kernel {}: {e}", kernel.name))
    };
    let programs: Vec<_> = module.kernels.par_iter().map(decode).collect();
    programs.into_iter().collect()
}

/// Allocates and initialises the variables of module scope; what is not initialised is zero, as CUDA promises.
fn place_globals(
    memory: &Memory,
    module: &ptx::Module,
    globals: &mut HashMap<String, (u64, u64)>,
) -> Result<(), String> {
    for v in &module.globals {
        let at = memory.alloc(v.size as u64).ok_or_else(|| format!("no memory for the variable {}", v.name))?;
        memory.fill(at, &[0], v.size as u64)?;
        globals.insert(v.name.clone(), (at, v.size as u64));
    }
    for v in &module.globals {
        let mut at = globals[&v.name].0;
        for piece in &v.init {
            let bytes = match piece {
                Init::Bytes(b) => b.clone(),
                Init::Symbol { name, offset } => {
                    let (to, _) = globals.get(name).ok_or_else(|| format!("{}: no variable {name}", v.name))?;
                    to.wrapping_add(*offset as u64).to_le_bytes().to_vec()
                }
            };
            memory.write(at, &bytes)?;
            at += bytes.len() as u64;
        }
    }
    Ok(())
}

/// 128 bytes of parameters, aligned as tensor maps need it.
#[derive(Clone, Copy)]
#[repr(align(128))]
struct ParamLine([u8; 128]);

/// How a grid is run.
#[derive(Clone, Copy, Default)]
pub struct Options {
    /// CUDA_EMULATOR_SEED
    pub seed: Option<u64>,
    /// CUDA_EMULATOR_RACES
    pub races: RaceCheck,
    /// Whether bytes are counted.
    pub traffic: bool,
}

/// What the race detector takes for an order.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum RaceCheck {
    /// Races are not looked for.
    #[default]
    Off,
    /// A shuffle or a vote orders what its lanes have read before it.
    On,
    /// Shuffles and votes order nothing, as CUDA's manual says.
    ByTheLetter,
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|v| v.parse().ok())
}

impl Options {
    pub fn from_environment() -> Options {
        let races = match number("CUDA_EMULATOR_RACES") {
            None | Some(0) => RaceCheck::Off,
            Some(1) => RaceCheck::On,
            Some(_) => RaceCheck::ByTheLetter,
        };
        Options { seed: number("CUDA_EMULATOR_SEED"), races, traffic: false }
    }
}

/// What a grid has done.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Work {
    /// PTX instructions, each counted once for a warp's lanes that executed it together, lanes whose guard was false
    /// included, as a multiprocessor issues them. One that waits counts when it is done, not each time it is looked at.
    pub instructions: u64,
    /// Of global memory; 0 where nobody asked.
    pub bytes: traffic::Bytes,
}

/// Runs a grid as the environment says. `params` is packed by the offsets of `Kernel::params`.
pub fn launch(
    memory: &Memory,
    module: &LoadedModule,
    kernel: &str,
    dims: LaunchDims,
    params: &[u8],
) -> Result<Work, Fault> {
    launch_with(memory, module, kernel, dims, params, Options::from_environment())
}

pub fn launch_with(
    memory: &Memory,
    module: &LoadedModule,
    kernel: &str,
    dims: LaunchDims,
    params: &[u8],
    options: Options,
) -> Result<Work, Fault> {
    let fail = |what: String| Fault {
        kernel: kernel.into(),
        what,
        block: [0; 3],
        thread: [0; 3],
        line: 0,
        text: String::new(),
    };
    let program = module.programs.get(kernel).ok_or_else(|| fail("the module has no such kernel".into()))?;
    let dims = checked(program, dims, params).map_err(fail)?;
    let mut copy = vec![ParamLine([0; 128]); params.len().div_ceil(128).max(1)];
    for (line, chunk) in copy.iter_mut().zip(params.chunks(128)) {
        line.0[..chunk.len()].copy_from_slice(chunk);
    }
    let mut view = memory.view();
    let at = copy.as_ptr() as u64;
    view.add(at, params.len() as u64);
    let seconds = number("CUDA_EMULATOR_TIMEOUT").unwrap_or(600);
    let launch = Launch {
        view,
        dims,
        program,
        lines: &module.module.lines,
        params: at,
        strict: memory.is_strict(),
        began: Instant::now(),
        limit: Duration::from_secs(seconds),
        stop: AtomicBool::new(false),
        instructions: AtomicU64::new(0),
        traffic: options.traffic.then(Mutex::default),
        seed: options.seed,
        races: races::Global::of(options.races),
    };
    run_all(&launch)?;
    let bytes = launch.traffic.map(|bytes| bytes.into_inner().unwrap()).unwrap_or_default();
    Ok(Work { instructions: launch.instructions.load(Relaxed), bytes })
}

/// The launch's geometry if the kernel can have it.
fn checked(program: &instr::Program, mut dims: LaunchDims, params: &[u8]) -> Result<LaunchDims, String> {
    if let Some(cluster) = program.cluster {
        if dims.cluster != [1; 3] && dims.cluster != cluster {
            return Err(format!("the launch asks for clusters of {:?}, the kernel for {cluster:?}", dims.cluster));
        }
        dims.cluster = cluster;
    }
    let threads: u64 = dims.block.iter().map(|n| *n as u64).product();
    if threads == 0 || threads > 1024 || dims.grid.contains(&0) || dims.cluster.contains(&0) {
        return Err(format!(
            "invalid launch: grid {:?}, block {:?}, cluster {:?}",
            dims.grid, dims.block, dims.cluster
        ));
    }
    if let Some(max) = program.max_threads {
        let limit: u64 = max.iter().map(|n| *n as u64).product();
        if threads > limit || program.exact_threads && max != dims.block {
            return Err(format!("a block of {:?} threads, but the kernel was compiled for {max:?}", dims.block));
        }
    }
    if (0..3).any(|i| !dims.grid[i].is_multiple_of(dims.cluster[i])) {
        return Err(format!("a grid of {:?} does not divide into clusters of {:?}", dims.grid, dims.cluster));
    }
    let shared = program.static_shared as u64 + dims.dynamic_shared as u64;
    if shared > SHARED_LIMIT {
        return Err(format!("{shared} bytes of shared memory, the most is {SHARED_LIMIT}"));
    }
    if params.len() < program.param_bytes {
        return Err(format!("{} bytes of parameters, the kernel takes {}", params.len(), program.param_bytes));
    }
    Ok(dims)
}

/// Spreads the clusters over the CPU's threads. A cluster that has used up its slice goes to the end of the queue.
fn run_all(launch: &Launch) -> Result<(), Fault> {
    let d = &launch.dims;
    let total: u64 = (0..3).map(|i| (d.grid[i] / d.cluster[i]) as u64).product();
    let next = AtomicU64::new(0);
    let waiting: Mutex<VecDeque<Cluster>> = Mutex::default();
    let failed: Mutex<Option<Fault>> = Mutex::new(None);
    let work = || {
        while !launch.stop.load(Relaxed) {
            let room = waiting.lock().unwrap().len() < RESIDENT;
            let fresh = room.then(|| next.fetch_add(1, Relaxed)).filter(|n| *n < total);
            let cluster = match fresh {
                Some(n) => Some(Cluster::new(launch, n)),
                None => waiting.lock().unwrap().pop_front(),
            };
            let Some(mut cluster) = cluster else { return };
            match cluster.run(launch) {
                Ok(Slice::Finished) => {}
                Ok(Slice::Unfinished) => waiting.lock().unwrap().push_back(cluster),
                Err(fault) => {
                    launch.stop.store(true, Relaxed);
                    failed.lock().unwrap().get_or_insert(fault);
                }
            }
        }
    };
    let workers = (rayon::current_num_threads() as u64).min(total);
    if workers <= 1 {
        work();
    } else {
        rayon::scope(|s| (0..workers).for_each(|_| s.spawn(|_| work())));
    }
    match failed.into_inner().unwrap() {
        Some(fault) => Err(fault),
        None => Ok(()),
    }
}
