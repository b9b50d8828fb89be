//! Where negatives come from, and the log_q that belongs to them.
//!
//! A negative that is drawn with probability Q enters a corrected loss with the score `s − log Q`. Every source of negatives
//! therefore reports the probability of each item. There are three sources:
//!
//! * **Drawn from a distribution.** [`Uniform`], [`Unigram`] (by counts, raised to a power), [`LogUniform`] (Zipf's law by
//!   rank) and [`Mixture`] draw items. Each returns a [`Sample`]: the ids, and the log_q that belongs to how they were
//!   drawn. [`Distribution`] has the ways of drawing.
//! * **The batch itself.** The positives of the other queries serve as negatives. Their Q follows from the data, and a
//!   [`FrequencyEstimator`] estimates it from the ids of the batches: [`ExactCounts`], [`GapEstimator`], [`CountMin`].
//! * **Past batches.** A [`NegativeQueue`] keeps their candidates, with ids and log_q.
//!
//! A loss with pools of several sources needs one Q for them all: [`union_log_q`]. Rows of a queue receive no gradient;
//! [`union_gradient_weight`] computes weights for the gradients of the other pools that make up for it.
//!
//! ```
//! use catalog_softmax::negatives::{Distribution, RandomStream, Uniform};
//! // 64 of a million items, each as likely as any other.
//! let sample = Uniform::new(1_000_000)?.draw_distinct(64, &mut RandomStream::new(1, 0))?;
//! assert_eq!((sample.ids.len(), sample.log_q.len()), (64, 64));
//! # Ok::<(), catalog_softmax::Error>(())
//! ```

pub(crate) mod frequency;
pub(crate) mod queue;
pub(crate) mod sampling;
mod union;

pub use frequency::{CountMin, ExactCounts, FrequencyEstimator, GapEstimator};
pub use queue::{NegativeQueue, QueueOptions};
pub use sampling::{Distribution, LogUniform, Mixture, RandomStream, Sample, Uniform, Unigram};
pub use union::{union_gradient_weight, union_log_q};
