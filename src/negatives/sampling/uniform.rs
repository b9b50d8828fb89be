//! Every item alike.

use super::{Distribution, Inclusion, RandomStream, Sample, check_distinct, check_num_items, past_memory};
use crate::error::Result;
use crate::hash::IdMap;
use crate::memory::reserved;

/// The uniform distribution: `Q = 1/N`.
///
/// ```
/// use catalog_softmax::negatives::{Distribution, RandomStream, Uniform};
/// let sample = Uniform::new(100)?.draw_distinct(25, &mut RandomStream::new(7, 0))?;
/// assert_eq!(sample.log_q, [0.25f32.ln(); 25]);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Uniform {
    num_items: u32,
}

impl Uniform {
    /// Over the items `0..num_items`.
    ///
    /// # Errors
    /// `num_items` of 0 or past 2^32 − 1.
    pub fn new(num_items: u64) -> Result<Self> {
        Ok(Uniform { num_items: check_num_items(num_items)? })
    }
}

impl Distribution for Uniform {
    fn num_items(&self) -> u32 {
        self.num_items
    }

    fn support(&self) -> u32 {
        self.num_items
    }

    fn probability(&self, id: u64) -> f64 {
        if id < u64::from(self.num_items) { 1.0 / f64::from(self.num_items) } else { 0.0 }
    }

    #[inline]
    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64) {
        (u64::from(random.below(self.num_items)), 1.0 / f64::from(self.num_items))
    }

    /// Exactly `count` distinct ids, every set of so many with the same probability: log_q is `log(count / N)`, exactly.
    ///
    /// The first `count` steps of a Fisher-Yates shuffle of the catalogue, of which only the places that moved are held.
    fn draw_distinct(&self, count: usize, random: &mut RandomStream) -> Result<Sample> {
        check_distinct(count, self.num_items)?;
        let share = count as f64 / f64::from(self.num_items);
        let mut sample = Sample::with_room("count", count, count, Inclusion::Always(share))?;
        let mut moved: IdMap<u32, u32> = reserved(count).ok_or_else(|| past_memory("count", count))?;
        for place in 0..count as u32 {
            let other = place + random.below(self.num_items - place);
            let here = moved.get(&place).copied().unwrap_or(place);
            let drawn = moved.insert(other, here).unwrap_or(other);
            sample.push(u64::from(drawn), share);
        }
        Ok(sample)
    }
}
