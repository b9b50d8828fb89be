//! Q of in-batch negatives, estimated from the stream of ids that the batches are made of.
//!
//! For in-batch negatives, Q_j is the probability that one position of a batch holds item j. An estimator observes the
//! ids of each batch and estimates that probability.
//!
//! | estimator | memory | accuracy | follows a drift |
//! |---|---|---|---|
//! | [`ExactCounts`] | grows with the distinct ids | exact counts | no |
//! | [`CountMin`] | fixed | counts too high by collisions, within a bound | no |
//! | [`GapEstimator`] | fixed | relative noise sqrt(alpha/2), and Q too high by collisions | within 1/alpha appearances of an id |

mod count_min;
mod counts;
mod gaps;
mod hashes;
mod state;

pub use count_min::CountMin;
pub use counts::ExactCounts;
pub use gaps::GapEstimator;

use crate::error::Result;
use crate::negatives::sampling::Inclusion;

/// Estimates the probability Q with which each id comes up in a stream of ids.
///
/// Ids are any 64-bit numbers that name items; cast signed ones by `as u64`. A step of training looks like this:
///
/// ```
/// use catalog_softmax::negatives::{FrequencyEstimator, GapEstimator};
/// use catalog_softmax::{Batch, Embeddings, Pool};
/// let mut frequency = GapEstimator::new(1 << 16, 2, 0.01, 7)?;
/// let (queries, items) = (vec![1.0f32; 3 * 4], vec![0.5f32; 3 * 4]);
/// for ids in [[17u64, 42, 17], [5, 17, 99]] {
///     frequency.observe(&ids);
///     let log_q = frequency.log_q(&ids);
///     let pool = Pool::new(Embeddings::new(&items, 3, 4)).ids(&ids[..]).log_q(&log_q);
///     let batch = Batch::in_batch(Embeddings::new(&queries, 3, 4), pool).build()?;
/// }
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
///
/// **Call `observe` first and `log_q` second**, as Yi et al. 2019 do. All ids of the batch have then been counted. In
/// the other order, a new id would have no data although it is a candidate now. The price is a bias: an id is looked up
/// because it has just come up, so the expectation of its share of n counts is `Q + (1 − Q)/n`. That is about twice Q
/// for an id that is seen once in n, and too high by about 1/k of itself after k appearances. All three estimators have
/// this bias; the gap estimator has it until 1/k is below alpha.
///
/// **In the first batch**, Q of an id is its share of that batch. If the batch holds only one distinct id, Q is 1 and
/// log_q is 0, which [`CorrectedLogQ`](crate::Correction::CorrectedLogQ) rejects.
///
/// **An id that was never seen** gets `1/(n + 1)` after n ids, its share if it came next. This is also a bound, since an
/// id of a greater Q would likely have been seen. Before anything is observed, Q is 1. log_q is therefore never −∞ and
/// never clipped.
pub trait FrequencyEstimator {
    /// Counts the ids of a batch, in their order and with their repetitions. Each position is one draw. After 2^62
    /// draws no more are counted.
    fn observe(&mut self, ids: &[u64]);

    /// The estimate of Q(id), the probability that one draw is `id`: in (0, 1].
    fn probability(&self, id: u64) -> f64;

    /// log Q of each id, per draw. Use it for a pool that holds every position of the batch, with repetitions.
    fn log_q(&self, ids: &[u64]) -> Vec<f32> {
        ids.iter().map(|&id| Inclusion::PerDraw.log(self.probability(id)) as f32).collect()
    }

    /// Logarithm of the probability that an id is in a batch of `batch_size` draws, `log(1 − (1 − Q)^batch_size)`. Use
    /// it for a pool that holds each distinct id of such a batch once. `batch_size` counts the draws before repetitions
    /// were removed, and is at least 1. It is an expected count, which every correction takes but
    /// [`CorrectedLogQ`](crate::Correction::CorrectedLogQ).
    fn log_q_deduplicated(&self, ids: &[u64], batch_size: usize) -> Vec<f32> {
        let inclusion = Inclusion::among_draws(batch_size.max(1));
        ids.iter().map(|&id| inclusion.log(self.probability(id)) as f32).collect()
    }

    /// The whole state. An estimator that [`from_bytes`](FrequencyEstimator::from_bytes) makes from it goes on
    /// identically, on any platform.
    fn to_bytes(&self) -> Vec<u8>;

    /// An estimator from its state.
    ///
    /// # Errors
    /// Bytes that are not what `to_bytes` of the same type and version returned: cut short, changed, or something else;
    /// or too little memory. Memory is taken in proportion to the bytes.
    fn from_bytes(bytes: &[u8]) -> Result<Self>
    where
        Self: Sized;
}

/// Q of an id that has not come up among `draws`.
fn unseen(draws: u64) -> f64 {
    1.0 / (draws as f64 + 1.0)
}
