//! What ranks do together: the operations that a step over several machines needs.

use crate::error::{Error, Result};
pub use crate::problem::embeddings::Numbers;

/// Operations that all ranks of a group call in the same order, each with its own part: the caller's own communication,
/// of which this crate brings none. [`Threads`](super::Threads) connects the threads of one process, and with the feature
/// `nccl` `Nccl` uses the caller's NCCL communicator.
///
/// Sums must be the same on all ranks, bit for bit. They are reproducible if the operation sums in a fixed order.
///
/// After an error, a group is not used again: some ranks may have had a result of the operation and others none.
pub trait Collective {
    /// This rank, from 0 to `num_ranks() - 1`.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn num_ranks(&self) -> usize;

    /// The bytes of every rank, in the order of ranks. Ranks may give different numbers of bytes, and none.
    ///
    /// # Errors
    /// [`Error::Collective`] where a rank is gone or does not answer; so for the other operations.
    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Replaces each number by its sum over all ranks, which give equally many.
    ///
    /// # Errors
    /// As [`all_gather`](Collective::all_gather), and where the ranks give different numbers of elements.
    fn sum(&mut self, numbers: Numbers<'_>) -> Result<()>;

    /// The same where a rank needs only its own part of the sums: rank r the `lengths[r]` numbers that follow the parts of
    /// the ranks before it. All ranks give the same `lengths`, and as many numbers as they add up to. The other parts
    /// have unspecified values afterwards.
    ///
    /// # Errors
    /// As [`sum`](Collective::sum).
    fn reduce_scatter(&mut self, numbers: Numbers<'_>, lengths: &[usize]) -> Result<()>;
}

impl<C: Collective + ?Sized> Collective for &mut C {
    fn rank(&self) -> usize {
        (**self).rank()
    }
    fn num_ranks(&self) -> usize {
        (**self).num_ranks()
    }
    fn all_gather(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        (**self).all_gather(mine)
    }
    fn sum(&mut self, numbers: Numbers<'_>) -> Result<()> {
        (**self).sum(numbers)
    }
    fn reduce_scatter(&mut self, numbers: Numbers<'_>, lengths: &[usize]) -> Result<()> {
        (**self).reduce_scatter(numbers, lengths)
    }
}

/// Gathers what every rank computed. If a rank has an error in place of it, every rank gets an error: that rank its own,
/// the others [`Error::OtherRank`]. So no rank waits for one that has returned.
pub(super) fn gather_results(collective: &mut impl Collective, mine: Result<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
    let message = match &mine {
        Ok(bytes) => [&[COMPUTED], bytes.as_slice()].concat(),
        Err(error) => [&[FAILED], error.to_string().as_bytes()].concat(),
    };
    let gathered = collective.all_gather(&message);
    mine?;
    let mut gathered = gathered?;
    for (rank, message) in gathered.iter_mut().enumerate() {
        let failed = message.first() != Some(&COMPUTED);
        message.drain(..1.min(message.len()));
        if failed {
            return Err(Error::OtherRank { rank, error: String::from_utf8_lossy(message).into_owned() });
        }
    }
    Ok(gathered)
}

const COMPUTED: u8 = 0;
const FAILED: u8 = 1;
