//! Zipf's law over a catalogue that is sorted by popularity, with no table.

use super::{Distribution, RandomStream, check_num_items};
use crate::error::Result;

/// The log-uniform distribution over ids sorted by falling popularity, the most popular one first:
///
/// ```text
/// Q(k) = log((k + 2) / (k + 1)) / log(N + 1)
/// ```
///
/// which is close to Zipf's law, `1/(k + 1)`. That of TensorFlow's `log_uniform_candidate_sampler`: with `u` uniform on
/// [0, 1), a draw is `floor((N + 1)^u) − 1`. Draws are of 53 bits, which moves the probability of the rarest item by a
/// relative 1e-7 at most at N = 1e7 and 1e-4 at N = 2^32.
///
/// ```
/// use catalog_softmax::negatives::{Distribution, LogUniform};
/// let ranked = LogUniform::new(3)?;
/// assert_eq!(ranked.log_q(&[0])?, [0.5f32.ln()]); // log 2 / log 4
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct LogUniform {
    num_items: u32,
    /// log(N + 1).
    log_end: f64,
}

impl LogUniform {
    /// Over the items `0..num_items`, item 0 the most popular one.
    ///
    /// # Errors
    /// `num_items` of 0 or past 2^32 − 1.
    pub fn new(num_items: u64) -> Result<Self> {
        let num_items = check_num_items(num_items)?;
        Ok(LogUniform { num_items, log_end: libm::log(f64::from(num_items) + 1.0) })
    }
}

impl Distribution for LogUniform {
    fn num_items(&self) -> u32 {
        self.num_items
    }

    fn support(&self) -> u32 {
        self.num_items
    }

    #[inline]
    fn probability(&self, id: u64) -> f64 {
        if id < u64::from(self.num_items) { (1.0 / (id as f64 + 1.0)).ln_1p() / self.log_end } else { 0.0 }
    }

    #[inline]
    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64) {
        let power = libm::exp(random.unit() * self.log_end);
        // Rounding may reach N + 1, and in no case passes below exp(0) = 1.
        let id = (power as u64).clamp(1, u64::from(self.num_items)) - 1;
        (id, self.probability(id))
    }
}
