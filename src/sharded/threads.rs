//! Threads of one process as ranks.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytemuck::Pod;

use super::collective::{Collective, Numbers};
use crate::error::{Error, Result, value};

/// A rank of a group of threads of one process, for tests and for several GPUs of one machine.
///
/// Every operation waits until all ranks have called it. A rank whose handle is dropped, as when its thread panics or
/// returns early, or that does not call within the timeout, ends the group: this operation and all later ones return
/// [`Error::Collective`] on the other ranks, and on the late one, too. Sums are taken in the order of ranks, so they
/// are the same in every run.
///
/// ```
/// use catalog_softmax::sharded::{Collective, Numbers, Threads};
/// use std::time::Duration;
/// let ranks = Threads::group(3, Duration::from_secs(10))?;
/// let sums = std::thread::scope(|scope| {
///     let ranks = ranks.into_iter().map(|mut rank| {
///         scope.spawn(move || {
///             let mut numbers = [rank.rank() as f32, 1.0];
///             rank.sum(Numbers::F32(&mut numbers)).map(|()| numbers)
///         })
///     });
///     let ranks: Vec<_> = ranks.collect();
///     ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Result<Vec<_>, _>>()
/// })?;
/// assert_eq!(sums, [[3.0, 3.0]; 3]);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    group: Arc<Group>,
    bytes_sent: u64,
}

#[derive(Debug)]
struct Group {
    num_ranks: usize,
    timeout: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Operations that all ranks have called.
    rounds: u64,
    /// What ranks have given to the next one: its name and their bytes.
    given: Vec<Option<(&'static str, Vec<u8>)>>,
    /// What they gave to the last one. It stays until the next one is complete, for which every rank has taken this.
    last: Arc<Vec<Vec<u8>>>,
    /// Why there are no further operations.
    failure: Option<String>,
}

impl Threads {
    /// A group of `num_ranks` ranks: give each thread one. An operation fails if a rank is late by `timeout`, so it must
    /// be longer than what the ranks compute between two operations differs.
    ///
    /// # Errors
    /// [`Error::Value`] for a group of no ranks.
    pub fn group(num_ranks: usize, timeout: Duration) -> Result<Vec<Threads>> {
        if num_ranks == 0 {
            return Err(value("num_ranks", num_ranks, "at least 1"));
        }
        let given = (0..num_ranks).map(|_| None).collect();
        let state = State { rounds: 0, given, last: Arc::default(), failure: None };
        let group = Arc::new(Group { num_ranks, timeout, state: Mutex::new(state), changed: Condvar::new() });
        Ok((0..num_ranks).map(|rank| Threads { rank, group: group.clone(), bytes_sent: 0 }).collect())
    }

    /// Bytes that this rank has given to operations so far.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// What all ranks give, in the order of ranks.
    fn exchange(&mut self, collective: &'static str, mine: Vec<u8>) -> Result<Arc<Vec<Vec<u8>>>> {
        let group = &self.group;
        let failed = |reason: &str| Error::Collective { collective, rank: self.rank, reason: reason.to_string() };
        let mut state = group.lock();
        if let Some(reason) = &state.failure {
            return Err(failed(reason));
        }
        self.bytes_sent += mine.len() as u64;
        let round = state.rounds;
        state.given[self.rank] = Some((collective, mine));
        if state.given.iter().all(Option::is_some) {
            state.complete();
            group.changed.notify_all();
        }
        let waits = |state: &mut State| state.rounds == round && state.failure.is_none();
        let waited = group.changed.wait_timeout_while(state, group.timeout, waits);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        // First of all a result: a rank that has it may already have gone.
        if state.rounds != round {
            return Ok(state.last.clone());
        }
        let reason = state.failure.take().unwrap_or_else(|| group.late(&state.given));
        let error = failed(&reason);
        state.failure = Some(reason);
        group.changed.notify_all();
        Err(error)
    }

    /// The sums over ranks of `part` of the numbers.
    fn sum_part<T: Pod + std::ops::Add<Output = T>>(
        &mut self,
        collective: &'static str,
        numbers: &mut [T],
        part: std::ops::Range<usize>,
    ) -> Result<()> {
        let all = self.exchange(collective, bytemuck::cast_slice(numbers).to_vec())?;
        if let Some(other) = all.iter().position(|bytes| bytes.len() != size_of_val(numbers)) {
            let lengths: Vec<usize> = all.iter().map(|bytes| bytes.len() / size_of::<T>()).collect();
            let reason = format!("ranks gave {lengths:?} numbers, rank {other} not as many as rank {}", self.rank);
            self.group.fail(&reason);
            return Err(Error::Collective { collective, rank: self.rank, reason });
        }
        for (rank, bytes) in all.iter().enumerate() {
            let theirs = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned::<T>);
            for (sum, x) in numbers[part.clone()].iter_mut().zip(theirs.skip(part.start)) {
                *sum = if rank == 0 { x } else { *sum + x };
            }
        }
        Ok(())
    }

    fn sum_numbers(
        &mut self,
        collective: &'static str,
        numbers: Numbers<'_>,
        part: std::ops::Range<usize>,
    ) -> Result<()> {
        match numbers {
            Numbers::F32(numbers) => self.sum_part(collective, numbers, part),
            Numbers::F64(numbers) => self.sum_part(collective, numbers, part),
        }
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn num_ranks(&self) -> usize {
        self.group.num_ranks
    }

    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(self.exchange("all_gather", mine.to_vec())?.to_vec())
    }

    fn sum(&mut self, numbers: Numbers<'_>) -> Result<()> {
        let all = 0..numbers.len();
        self.sum_numbers("sum", numbers, all)
    }

    fn reduce_scatter(&mut self, numbers: Numbers<'_>, lengths: &[usize]) -> Result<()> {
        let part = own_part(self.rank, self.num_ranks(), numbers.len(), lengths).inspect_err(|error| {
            self.group.fail(&error.to_string());
        })?;
        self.sum_numbers("reduce_scatter", numbers, part)
    }
}

/// A rank's part of `len` numbers that `lengths` divide among the ranks.
pub(super) fn own_part(rank: usize, ranks: usize, len: usize, lengths: &[usize]) -> Result<std::ops::Range<usize>> {
    if lengths.len() != ranks || lengths.iter().sum::<usize>() != len {
        let reason = format!("{len} numbers cannot be divided into parts of {lengths:?} for {ranks} ranks");
        return Err(Error::Collective { collective: "reduce_scatter", rank, reason });
    }
    let start = lengths[..rank].iter().sum::<usize>();
    Ok(start..start + lengths[rank])
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, reason: &str) {
        self.lock().failure.get_or_insert_with(|| reason.to_string());
        self.changed.notify_all();
    }

    fn late(&self, given: &[Option<(&'static str, Vec<u8>)>]) -> String {
        let late: Vec<usize> = (0..self.num_ranks).filter(|&rank| given[rank].is_none()).collect();
        format!("ranks {late:?} did not call it within {:?}", self.timeout)
    }
}

impl State {
    /// Ends an operation that all ranks have called.
    fn complete(&mut self) {
        let given: Vec<_> = self.given.iter_mut().filter_map(Option::take).collect();
        let first = given[0].0;
        match given.iter().position(|(name, _)| *name != first) {
            Some(other) => {
                let reason = format!("rank 0 called {first} while rank {other} called {}", given[other].0);
                self.failure.get_or_insert(reason);
            }
            None => {
                self.last = Arc::new(given.into_iter().map(|(_, bytes)| bytes).collect());
                self.rounds += 1;
            }
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.group.fail(&format!("rank {} has left the group", self.rank));
    }
}
