//! Negatives for a sampled pool, with the log_q that belongs to them.
//!
//! A [`Distribution`] says with which probability Q each item of a catalogue is drawn; its draws come as a [`Sample`], whose
//! log_q follows from how they were drawn: one by one, deduplicated, or until there are k distinct ones. Nothing is clipped.

mod inclusion;
mod log_uniform;
mod mixture;
mod random;
mod sample;
mod uniform;
mod unigram;
mod without_replacement;

pub(crate) use inclusion::Inclusion;
pub use log_uniform::LogUniform;
pub use mixture::Mixture;
pub use random::RandomStream;
pub use sample::Sample;
pub use uniform::Uniform;
pub use unigram::Unigram;

use crate::error::{Error, Result, value};
use crate::hash::IdSet;
use crate::memory::reserved;

/// A distribution Q over the items `0..N` of a catalogue, and the ways to draw negatives from it.
///
/// An implementation gives the first four methods; the others have defaults. Ids are indices `0..N`. If your items have
/// other ids, translate the indices before you give them to a [`Pool`](crate::Pool).
///
/// | method | draws | log_q |
/// |---|---|---|
/// | [`draw`](Distribution::draw) | n, with repetitions | log Q, per draw |
/// | [`draw_deduplicated`](Distribution::draw_deduplicated) | the distinct ones among n | log(1 − (1 − Q)^n) |
/// | [`draw_distinct`](Distribution::draw_distinct) | exactly k distinct ones | log of the probability to be among them |
///
/// ```
/// use catalog_softmax::negatives::{Distribution, RandomStream, Unigram};
/// use catalog_softmax::{Batch, Correction, Embeddings, Loss, Pool, Similarity};
///
/// let (b, n, d) = (2, 64, 4);
/// let counts = vec![40.0, 9.0, 3.0, 1.0, 1.0];
/// let items: Vec<f32> = (0..counts.len() * d).map(|i| (i as f32).cos()).collect();
/// let popularity = Unigram::new(&counts, 0.75)?;
///
/// let negatives = popularity.draw(n, &mut RandomStream::new(7, 0))?;
/// let rows = |ids: &[u64]| -> Vec<f32> {
///     ids.iter().flat_map(|&id| items[id as usize * d..][..d].iter().copied()).collect()
/// };
/// let (candidates, positive_ids) = (rows(&negatives.ids), vec![0u64, 3]);
/// let pool = Pool::new(Embeddings::new(&candidates, n, d)).ids(&negatives.ids).log_q(&negatives.log_q);
///
/// // The positives' log_q is in the terms of the same sample.
/// let positive_log_q = negatives.log_q_of(&popularity, &positive_ids)?;
/// let (queries, positives) = (vec![0.5f32; b * d], rows(&positive_ids));
/// let batch = Batch::builder(Embeddings::new(&queries, b, d), pool)
///     .positive_embeddings(Embeddings::new(&positives, b, d))
///     .positive_ids(&positive_ids)
///     .positive_log_q(&positive_log_q)
///     .build()?;
/// let loss = Loss::softmax(Similarity::Cosine, 0.05).correction(Correction::LogQ);
/// # use catalog_softmax::{Backend, Cpu};
/// # assert!(Cpu::new().value(&batch, &loss)?.total.is_finite());
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
pub trait Distribution: std::fmt::Debug + Send + Sync {
    /// N: ids are `0..N`. At most 2^32 − 1.
    fn num_items(&self) -> u32;

    /// Number of ids with a probability above 0.
    fn support(&self) -> u32;

    /// Q(id), the probability that one draw is `id`. 0 for an id that is never drawn and for one past N.
    fn probability(&self, id: u64) -> f64;

    /// One draw: an id and its Q, the same as [`probability`](Distribution::probability) gives.
    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64);

    /// As many independent draws as `drawn` is long, each distributed as [`draw_one`](Distribution::draw_one).
    /// Implement it if your distribution is faster at several draws together; it may use the stream's numbers in
    /// another order.
    fn draw_into(&self, drawn: &mut [(u64, f64)], random: &mut RandomStream) {
        drawn.iter_mut().for_each(|drawn| *drawn = self.draw_one(random));
    }

    /// log Q of each id, per draw.
    ///
    /// # Errors
    /// An id past N, and one that is never drawn: its log_q would be −∞.
    fn log_q(&self, ids: &[u64]) -> Result<Vec<f32>> {
        ids.iter().zip(0..).map(|(&id, i)| Ok(checked_probability(self, id, i)?.ln() as f32)).collect()
    }

    /// log Q of each id, per draw, and −∞ for an id that is never drawn or is past N. Give it to
    /// [`union_log_q`](crate::negatives::union_log_q), where another pool may draw such an id. For a single pool take
    /// [`log_q`](Distribution::log_q).
    ///
    /// ```
    /// use catalog_softmax::negatives::{Distribution, Uniform, Unigram, union_log_q};
    /// let (popularity, uniform) = (Unigram::new(&[3.0, 1.0, 0.0, 0.0], 1.0)?, Uniform::new(4)?);
    /// // Draws of both, 8 and 4: expected copies of an item that is popular and of one that was never seen.
    /// let ids = [0, 3];
    /// let mut log_q = [0.0; 2];
    /// union_log_q(&[(8.0, &popularity.log_probabilities(&ids)), (4.0, &uniform.log_probabilities(&ids))], &mut log_q)?;
    /// assert!((log_q[0] - 7.0f32.ln()).abs() < 1e-6 && log_q[1].abs() < 1e-6);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    fn log_probabilities(&self, ids: &[u64]) -> Vec<f32> {
        ids.iter().map(|&id| self.probability(id).ln() as f32).collect()
    }

    /// `draws` independent draws, with repetitions. log_q is log Q.
    ///
    /// # Errors
    /// `draws` past 2^32 − 1, the most rows that a pool has, or more than memory holds.
    fn draw(&self, draws: usize, random: &mut RandomStream) -> Result<Sample> {
        check_draws(draws)?;
        let mut sample = Sample::with_room("draws", draws, draws, Inclusion::PerDraw)?;
        for_each_draw(self, draws, random, |id, probability| sample.push(id, probability));
        Ok(sample)
    }

    /// The distinct ids among `draws` independent draws, in the order in which they first came. log_q is the logarithm of
    /// the probability to be among them, `log(1 − (1 − Q)^draws)`, exactly.
    ///
    /// This is the expected count of an id's appearances in the sample (0 or 1) and not a probability per draw. Every
    /// correction takes it but [`CorrectedLogQ`](crate::Correction::CorrectedLogQ), which needs
    /// [`draw`](Distribution::draw).
    ///
    /// # Errors
    /// `draws` past 2^32 − 1, and more distinct ids than memory holds.
    fn draw_deduplicated(&self, draws: usize, random: &mut RandomStream) -> Result<Sample> {
        check_draws(draws)?;
        let most = draws.min(self.support() as usize);
        let mut sample = Sample::with_room("draws", draws, most, Inclusion::among_draws(draws))?;
        let mut seen: IdSet = reserved(most).ok_or_else(|| past_memory("draws", draws))?;
        for_each_draw(self, draws, random, |id, probability| {
            if seen.insert(id) {
                sample.push(id, probability);
            }
        });
        Ok(sample)
    }

    /// Exactly `count` distinct ids, in the order in which they came: it draws until there are so many. If `count` is
    /// the number of all ids that can be drawn, they come without a draw and in ascending order; [`Uniform`] shuffles
    /// them.
    ///
    /// For a sample of fixed size, the probability that an id is in it has no simple formula. TensorFlow's candidate
    /// samplers take `1 − (1 − Q)^tries` (`range_sampler.cc`), which is an approximation, because the number of tries
    /// depends on what was drawn. Here log_q is the logarithm of a probability that corrects exactly: if each term of a
    /// sum over the sample is divided by it, the expectation is the sum over the catalogue (Cohen and Kaplan,
    /// "Summarizing Data Using Bottom-k Sketches", PODC 2007, rank conditioning). Suppose that draws come at the times
    /// of a Poisson process of rate 1. Each id's first time is then an exponential variable of rate Q, independent of
    /// the others'. Let `t` be the first time of the next id after those that were taken. Given the other ids, an id is
    /// in the sample if its own first time is before t, which has the probability `1 − exp(−Q t)`. If all ids that can
    /// be drawn are taken, it is 1. [`Uniform`] has exactly `count / N`.
    ///
    /// log_q is an expected count, as that of [`draw_deduplicated`](Distribution::draw_deduplicated). The cost is a
    /// draw for each try and, after N tries, one pass over the catalogue.
    ///
    /// # Errors
    /// `count` past the number of ids that can be drawn, or more than memory holds; a wrong
    /// [`support`](Distribution::support), if the sampler notices it.
    fn draw_distinct(&self, count: usize, random: &mut RandomStream) -> Result<Sample> {
        check_distinct(count, self.support())?;
        without_replacement::draw(self, count, random)
    }
}

/// Draws that are made together: enough to wait for many cells of a table at the same time, few enough for the stack.
const BLOCK: usize = 64;

fn for_each_draw<D: Distribution + ?Sized>(
    distribution: &D,
    draws: usize,
    random: &mut RandomStream,
    mut each: impl FnMut(u64, f64),
) {
    let mut block = [(0, 0.0); BLOCK];
    let mut left = draws;
    while left > 0 {
        let drawn = &mut block[..left.min(BLOCK)];
        distribution.draw_into(drawn, random);
        drawn.iter().for_each(|&(id, probability)| each(id, probability));
        left -= drawn.len();
    }
}

/// Q of `ids[i]`, where it has a logarithm.
fn checked_probability<D: Distribution + ?Sized>(distribution: &D, id: u64, i: usize) -> Result<f64> {
    let probability = distribution.probability(id);
    let num_items = distribution.num_items();
    if id >= u64::from(num_items) {
        return Err(value(format!("ids[{i}]"), id, format!("below {num_items} (num_items)")));
    }
    if probability > 0.0 {
        Ok(probability)
    } else {
        Err(value(
            format!("ids[{i}]"),
            id,
            "an id with a probability > 0; this one is never drawn, its log_q would be −∞",
        ))
    }
}

fn check_num_items(num_items: u64) -> Result<u32> {
    match u32::try_from(num_items) {
        Ok(num_items) if num_items > 0 => Ok(num_items),
        _ => Err(value("num_items", num_items, "from 1 to 2^32 - 1")),
    }
}

fn check_draws(draws: usize) -> Result<()> {
    match u32::try_from(draws) {
        Ok(_) => Ok(()),
        Err(_) => Err(value("draws", draws, "at most 2^32 - 1, the most rows that a pool has")),
    }
}

fn past_memory(argument: &str, found: usize) -> Error {
    value(argument, found, "no more ids than memory holds with their log_q")
}

fn check_distinct(count: usize, support: u32) -> Result<()> {
    if count as u64 <= u64::from(support) {
        return Ok(());
    }
    Err(Error::Shape {
        argument: "count".into(),
        found: format!("{count} distinct ids"),
        rule: format!("at most the {support} ids with a probability > 0"),
    })
}
