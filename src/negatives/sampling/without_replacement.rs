//! Exactly k distinct ids from any distribution. [`Distribution::draw_distinct`] has the method and its reason.

use super::{BLOCK, Distribution, Inclusion, RandomStream, Sample, past_memory};
use crate::error::{Error, Result, shape};
use crate::hash::IdSet;
use crate::memory::reserved;

/// `count` is at most the distribution's support.
pub(super) fn draw<D: Distribution + ?Sized>(
    distribution: &D,
    count: usize,
    random: &mut RandomStream,
) -> Result<Sample> {
    if count == distribution.support() as usize {
        return all(distribution);
    }
    let Tries { mut first, seen, all, to_last } = tries(distribution, count, random)?;
    // Which ids come does not depend on when: the times between the tries can be drawn afterwards, and only their sums matter.
    let mut last = random.sum_of_exponentials(to_last);
    let mut next = last + random.sum_of_exponentials(all - to_last);
    if first.len() <= count {
        match finish(distribution, next, &seen, count + 1 - first.len(), &mut first, random)?[..] {
            [.., before, end] => (last, next) = (before, end),
            [end] => next = end,
            [] => {}
        }
    }
    if first.len() <= count {
        return Err(other_support(distribution, first.len()));
    }
    let mut sample = Sample::with_room("count", count, count, Inclusion::Before { last, next })?;
    first[..count].iter().for_each(|&(id, probability)| sample.push(id, probability));
    Ok(sample)
}

/// What up to N tries bring.
struct Tries {
    /// Ids with their Q in the order of their first times; the one after the last of the sample only ends it.
    first: Vec<(u64, f64)>,
    /// The same ids.
    seen: IdSet,
    all: usize,
    /// Tries up to the last id of the sample, 0 where that has not come.
    to_last: usize,
}

fn tries<D: Distribution + ?Sized>(distribution: &D, count: usize, random: &mut RandomStream) -> Result<Tries> {
    let empty = || Some(Tries { first: reserved(count + 1)?, seen: reserved(count + 1)?, all: 0, to_last: 0 });
    let mut tries = empty().ok_or_else(|| past_memory("count", count))?;
    let most = distribution.num_items() as usize;
    while tries.all < most {
        let mut block = [(0, 0.0); BLOCK];
        let block = &mut block[..BLOCK.min(most - tries.all)];
        distribution.draw_into(block, random);
        for &(id, probability) in block.iter() {
            tries.all += 1;
            if tries.seen.insert(id) {
                tries.first.push((id, probability));
                match tries.first.len() {
                    found if found == count => tries.to_last = tries.all,
                    // The rest of the block is as if it had not been drawn: where to stop depends on what came before it.
                    found if found > count => return Ok(tries),
                    _ => {}
                }
            }
        }
    }
    Ok(tries)
}

/// A distribution of the caller's own may return a wrong `support`.
fn other_support<D: Distribution + ?Sized>(distribution: &D, found: usize) -> Error {
    let found = format!("{found} of {} ids with a probability > 0", distribution.num_items());
    shape("distribution", found, format!("{}, as its support() says", distribution.support()))
}

/// Every id that can be drawn.
fn all<D: Distribution + ?Sized>(distribution: &D) -> Result<Sample> {
    let count = distribution.support() as usize;
    let mut sample = Sample::with_room("count", count, count, Inclusion::Always(1.0))?;
    for id in 0..u64::from(distribution.num_items()) {
        let probability = distribution.probability(id);
        if probability > 0.0 {
            sample.push(id, probability);
        }
    }
    if sample.ids.len() != count {
        return Err(other_support(distribution, sample.ids.len()));
    }
    Ok(sample)
}

/// Adds the next `missing` ids and returns their times. In the tail of a skewed distribution, tries would take too
/// long. But an exponential variable has no memory: for each id that was not seen until `time`, the wait from there to
/// its first time is an exponential variable of rate Q. The earliest of these first times come next.
fn finish<D: Distribution + ?Sized>(
    distribution: &D,
    time: f64,
    seen: &IdSet,
    missing: usize,
    first: &mut Vec<(u64, f64)>,
    random: &mut RandomStream,
) -> Result<Vec<f64>> {
    let mut waiting: Vec<(f64, u64, f64)> = Vec::new();
    for id in (0..u64::from(distribution.num_items())).filter(|id| !seen.contains(id)) {
        let probability = distribution.probability(id);
        if probability > 0.0 {
            waiting.try_reserve(1).map_err(|_| past_memory("count", seen.len() + missing))?;
            waiting.push((time + random.exponential() / probability, id, probability));
        }
    }
    let order = |a: &(f64, u64, f64), b: &(f64, u64, f64)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    if missing < waiting.len() {
        waiting.select_nth_unstable_by(missing - 1, order);
        waiting.truncate(missing);
    }
    waiting.sort_unstable_by(order);
    first.extend(waiting.iter().map(|&(_, id, probability)| (id, probability)));
    Ok(waiting.iter().map(|&(time, _, _)| time).collect())
}
