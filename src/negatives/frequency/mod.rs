//! Q of in-batch negatives, estimated from the stream of ids that the batches are made of.
//!
//! In-batch negatives are drawn by the data: item j comes with the probability Q_j that a position of a batch holds it. An
//! estimator observes each batch's ids and says what that probability is.
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
/// Ids are any 64-bit numbers, the items' own; signed ones as their bits. A step of training is
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
/// **First observe, then log_q**, as in Yi et al. 2019. The batch's own ids have then all been seen, and each log_q rests on
/// data; the other way round a new id had none, though it is a candidate now. The price is that an id is looked at because it has
/// just come up: its share of n counts has the expectation `Q + (1 − Q)/n`, about twice Q for an id that is seen once in n, and
/// too high by about 1/k of itself after k appearances. All three have this bias, the gap estimator until it is below alpha.
///
/// **The first batch** has nothing beside it, so that each of its ids has its share of that batch. Where it holds one id, in one row or
/// in all, Q is 1 and log_q 0, which [`CorrectedLogQ`](crate::Correction::CorrectedLogQ) refuses.
///
/// **An id that was never seen** gets the Q that it would have had as the next one in the stream, `1/(n + 1)` after n ids: what
/// `observe` would make of it, and a bound, since an id of a greater Q would likely have been seen. With nothing observed that is
/// 1. So no log_q is ever −∞, and none is clipped.
pub trait FrequencyEstimator {
    /// Takes the ids of a batch in, in their order, repetitions and all. A position is one draw. After 2^62 of them no
    /// more are counted.
    fn observe(&mut self, ids: &[u64]);

    /// The estimate of Q(id), the probability that one draw is `id`: in (0, 1].
    fn probability(&self, id: u64) -> f64;

    /// log Q of each id, per draw: for a pool that holds every position of the batch, repetitions too.
    fn log_q(&self, ids: &[u64]) -> Vec<f32> {
        ids.iter().map(|&id| Inclusion::PerDraw.log(self.probability(id)) as f32).collect()
    }

    /// Logarithm of the probability that an id is in a batch of `batch_size` draws, `log(1 − (1 − Q)^batch_size)`: for a pool
    /// that holds each distinct id of such a batch once. `batch_size` counts the draws before repetitions were removed, and is
    /// at least 1. As an expected count it serves every correction but [`CorrectedLogQ`](crate::Correction::CorrectedLogQ).
    fn log_q_deduplicated(&self, ids: &[u64], batch_size: usize) -> Vec<f32> {
        let inclusion = Inclusion::among_draws(batch_size.max(1));
        ids.iter().map(|&id| inclusion.log(self.probability(id)) as f32).collect()
    }

    /// The whole state. What [`from_bytes`](FrequencyEstimator::from_bytes) makes of it goes on identically, on any platform.
    fn to_bytes(&self) -> Vec<u8>;

    /// An estimator from its state.
    ///
    /// # Errors
    /// Bytes that are not what `to_bytes` of the same type and version returned: cut short, changed, or something else;
    /// where memory does not hold them. Memory is taken in proportion to the bytes.
    fn from_bytes(bytes: &[u8]) -> Result<Self>
    where
        Self: Sized;
}

/// Q of an id that has not come up among `draws`.
fn unseen(draws: u64) -> f64 {
    1.0 / (draws as f64 + 1.0)
}
