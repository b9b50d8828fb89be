//! Where calls run: a thread pool of the size that the caller names, and backends that keep their workspace.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use catalog_softmax::Cpu;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

struct Kept {
    process: u32,
    threads: usize,
    pool: Arc<ThreadPool>,
}

/// The pool of the last call: threads are made when the number changes, not in each step.
static POOL: Mutex<Option<Kept>> = Mutex::new(None);

/// Backends that no call is using. As many as calls have run at the same time.
static BACKENDS: Mutex<Vec<Cpu>> = Mutex::new(Vec::new());

/// Runs `work` on `threads` threads with a backend, without the GIL.
pub fn run<R: Send>(py: Python<'_>, threads: usize, work: impl FnOnce(&mut Cpu) -> R + Send) -> PyResult<R> {
    let pool = pool(threads.max(1))?;
    Ok(py.detach(|| {
        let mut cpu = locked(&BACKENDS).pop().unwrap_or_default();
        let result = pool.install(|| work(&mut cpu));
        locked(&BACKENDS).push(cpu);
        result
    }))
}

fn pool(threads: usize) -> PyResult<Arc<ThreadPool>> {
    let process = std::process::id();
    let mut kept = locked(&POOL);
    if let Some(kept) = kept.as_ref().filter(|kept| (kept.process, kept.threads) == (process, threads)) {
        return Ok(kept.pool.clone());
    }
    let made = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("catalog-softmax-{i}")).build();
    let pool =
        Arc::new(made.map_err(|error| PyRuntimeError::new_err(format!("no pool of {threads} threads: {error}")))?);
    let old = kept.replace(Kept { process, threads, pool: pool.clone() });
    if let Some(old) = old.filter(|old| old.process != process) {
        // A forked process has the pool's memory but none of its threads: nobody is there to be told to end.
        std::mem::forget(old.pool);
    }
    Ok(pool)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is whole after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
