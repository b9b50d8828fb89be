//! What a draw returns.

use super::{Distribution, Inclusion, checked_probability, past_memory};
use crate::error::{Result, value};
use crate::hash::IdSet;
use crate::memory::reserved;

/// Ids that were drawn from a [`Distribution`], and the log_q that belongs to the way in which they were drawn.
///
/// log_q per draw and log-probabilities of being in a sample are different scales. Use the same one for all pools of a
/// batch.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Sample {
    /// Drawn ids, which are indices into the catalogue, in the order in which they came.
    /// [`draw_distinct`](Distribution::draw_distinct) gives the order for a sample of all ids.
    pub ids: Vec<u64>,
    /// Natural logarithm of the sampling probability of each, for [`Pool::log_q`](crate::Pool::log_q). Finite.
    pub log_q: Vec<f32>,
    inclusion: Inclusion,
}

impl Sample {
    /// An empty sample with room for `room` ids. `argument` and `asked` are the caller's, for the error.
    pub(super) fn with_room(argument: &str, asked: usize, room: usize, inclusion: Inclusion) -> Result<Sample> {
        let made = || Some(Sample { ids: reserved(room)?, log_q: reserved(room)?, inclusion });
        made().ok_or_else(|| past_memory(argument, asked))
    }

    #[inline]
    pub(super) fn push(&mut self, id: u64, probability: f64) {
        self.ids.push(id);
        self.log_q.push(self.inclusion.log(probability) as f32);
    }

    /// log_q of any other ids, such as the positives, on the scale of this sample: log Q for a sample with repetitions,
    /// the log-probability of being in the sample for a deduplicated one. `distribution` is the one that was drawn
    /// from.
    ///
    /// For a sample of distinct ids it is the logarithm of the conditional probability that
    /// [`draw_distinct`](Distribution::draw_distinct) describes. An id of the sample has the same value as in `log_q`.
    /// For any other id the probability is `1 − exp(−Q t)`, with t the first time of the last id that was taken,
    /// because the id would have had to come before that one. Averaged over samples, `exp(log_q)` is each id's
    /// probability of being in a sample.
    ///
    /// # Errors
    /// An id past N, one that is never drawn, and any id if the sample has no draws: its log_q would be −∞.
    pub fn log_q_of<D: Distribution + ?Sized>(&self, distribution: &D, ids: &[u64]) -> Result<Vec<f32>> {
        let drawn: IdSet = match self.inclusion {
            Inclusion::Before { .. } => self.ids.iter().copied().collect(),
            // In other samples, ids that were drawn are treated like all others.
            _ => IdSet::default(),
        };
        let log_q = |(i, &id): (usize, &u64)| {
            let probability = checked_probability(distribution, id, i)?;
            let log_q = self.inclusion.log_of(probability, drawn.contains(&id)) as f32;
            if log_q == f32::NEG_INFINITY {
                return Err(value(format!("ids[{i}]"), id, "an id that can be in the sample; this one has no draws"));
            }
            Ok(log_q)
        };
        ids.iter().enumerate().map(log_q).collect()
    }
}
