//! Where calls run: a thread pool of the size that the caller names, and backends that keep their workspace; or a device, in the order
//! of the caller's stream.
//!
//! A forked process has the memory of its parent and one of its threads. A pool there has nobody who works, and a lock that another
//! thread held at the fork is never let go. So everything that is kept belongs to one process, and a process that finds what another
//! one kept begins with its own. Nothing of the parent's is locked, dropped or otherwise looked at, and it is found without a lock.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalog_softmax::cuda::cudarc::driver::sys::CUstream;
use catalog_softmax::{Cpu, Cuda, Error};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

/// What one process keeps between calls.
struct Kept {
    process: u32,
    /// The pool of the last call and its number of threads: threads are made when the number changes, not in each step.
    pool: Mutex<Option<(usize, Arc<ThreadPool>)>>,
    /// Backends that no call is using. As many as calls have run at the same time.
    backends: Mutex<Vec<Cpu>>,
    /// By ordinal, and by whether workspaces are given.
    devices: Mutex<BTreeMap<(usize, bool), Backend>>,
}

/// One for all threads: it only queues work.
type Backend = Arc<Mutex<Cuda>>;

/// (ordinal, stream, whether all workspaces are given): a device, and the stream of the caller's that work is queued on.
///
/// A backend that is given all workspaces holds no memory that steps use, so that the caller may capture its stream as a graph. The
/// other one allocates and frees in the order of the stream.
#[derive(FromPyObject, Clone, Copy)]
pub struct Place(pub usize, pub usize, pub bool);

/// Null before the first call. What is stored here is never freed.
static KEPT: AtomicPtr<Kept> = AtomicPtr::new(ptr::null_mut());

/// Runs `work` on `threads` threads with a backend, without the GIL.
pub fn run<R: Send>(py: Python<'_>, threads: usize, work: impl FnOnce(&mut Cpu) -> R + Send) -> PyResult<R> {
    let kept = of_this_process();
    let pool = kept.pool(threads.max(1))?;
    Ok(py.detach(|| {
        let mut cpu = locked(&kept.backends).pop().unwrap_or_default();
        let result = pool.install(|| work(&mut cpu));
        locked(&kept.backends).push(cpu);
        result
    }))
}

/// Runs `work` with the backend of a device, on the caller's stream, without the GIL.
pub fn run_on_device<R: Send>(
    py: Python<'_>,
    Place(ordinal, stream, given): Place,
    work: impl FnOnce(&mut Cuda) -> Result<R, Error> + Send,
) -> PyResult<R> {
    let kept = of_this_process();
    let result = py.detach(|| {
        let backend = kept.device(ordinal, given)?;
        let mut cuda = locked(&backend);
        let home = cuda.stream().clone();
        // SAFETY: the caller names a stream of that device, live until this call returns: the backend goes home before. Who wrote the
        // memory that `work` uses did it in the order of this stream, or made it wait.
        let theirs = unsafe { home.context().wrap_borrowed_stream(stream as CUstream) };
        cuda.move_to(theirs)?;
        let result = work(&mut cuda);
        cuda.move_to(home).and(result)
    });
    result.map_err(crate::errors::raise)
}

fn of_this_process() -> &'static Kept {
    let process = std::process::id();
    let mut found = KEPT.load(Ordering::Acquire);
    loop {
        // SAFETY: null, or from `Box::into_raw` below and never freed; only shared references are made of it.
        if let Some(kept) = unsafe { found.as_ref() }.filter(|kept| kept.process == process) {
            return kept;
        }
        let new = Kept { process, pool: Mutex::new(None), backends: Mutex::new(Vec::new()), devices: Mutex::default() };
        let new = Box::into_raw(Box::new(new));
        match KEPT.compare_exchange(found, new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just made, and from here on never freed.
            Ok(_) => return unsafe { &*new },
            Err(of_another_thread) => {
                // SAFETY: just made, and not stored: nobody else has it.
                drop(unsafe { Box::from_raw(new) });
                found = of_another_thread;
            }
        }
    }
}

impl Kept {
    /// Opened by the first call. That waits for the device once, and a capture refuses it.
    fn device(&self, ordinal: usize, given: bool) -> Result<Backend, Error> {
        let mut devices = locked(&self.devices);
        if let Some(backend) = devices.get(&(ordinal, given)) {
            return Ok(backend.clone());
        }
        let mut cuda = Cuda::new(ordinal)?;
        if given {
            // SAFETY: the backend lives as long as the process, and holds no workspace. The memory that a captured step names is the
            // caller's, and a graph of PyTorch's keeps what was allocated while it was captured.
            unsafe { cuda.allow_capture() };
        }
        // Other streams write to what was made on this one: the record of bad values.
        cuda.fault()?;
        let backend = Arc::new(Mutex::new(cuda));
        devices.insert((ordinal, given), backend.clone());
        Ok(backend)
    }

    fn pool(&self, threads: usize) -> PyResult<Arc<ThreadPool>> {
        let mut kept = locked(&self.pool);
        if let Some((_, pool)) = kept.as_ref().filter(|(number, _)| *number == threads) {
            return Ok(pool.clone());
        }
        let made =
            ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("catalog-softmax-{i}")).build();
        let made = made.map_err(|error| PyRuntimeError::new_err(format!("no pool of {threads} threads: {error}")))?;
        let pool = Arc::new(made);
        *kept = Some((threads, pool.clone()));
        Ok(pool)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is whole after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
