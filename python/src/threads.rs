//! Where calls run: a thread pool of the size that the caller names, and backends that keep their workspace.
//!
//! A forked process has the memory of its parent and one of its threads. A pool there has nobody who works, and a lock that another
//! thread held at the fork is never let go. So everything that is kept belongs to one process, and a process that finds what another
//! one kept begins with its own. Nothing of the parent's is locked, dropped or otherwise looked at, and it is found without a lock.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalog_softmax::Cpu;
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
}

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

fn of_this_process() -> &'static Kept {
    let process = std::process::id();
    let mut found = KEPT.load(Ordering::Acquire);
    loop {
        // SAFETY: null, or from `Box::into_raw` below and never freed; only shared references are made of it.
        if let Some(kept) = unsafe { found.as_ref() }.filter(|kept| kept.process == process) {
            return kept;
        }
        let new = Kept { process, pool: Mutex::new(None), backends: Mutex::new(Vec::new()) };
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
