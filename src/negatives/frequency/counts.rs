//! Every id's count.

use super::state::{Kind, MOST_DRAWS, Reader, Writer, corrupt, counted};
use super::{FrequencyEstimator, unseen};
use crate::error::Result;
use crate::hash::IdMap;
use crate::memory::reserved;

/// Exact counts: `Q(id) = count(id) / n` after n ids. Every id that has been seen takes about 20 to 40 bytes.
///
/// ```
/// use catalog_softmax::negatives::{ExactCounts, FrequencyEstimator};
/// let mut counts = ExactCounts::new();
/// counts.observe(&[17, 42, 17, 5]);
/// assert_eq!((counts.probability(17), counts.probability(42)), (0.5, 0.25));
/// assert_eq!(counts.probability(99), 0.2, "as if it came next");
/// ```
#[derive(Debug, Clone, Default)]
pub struct ExactCounts {
    counts: IdMap<u64, u64>,
    draws: u64,
}

/// Bytes of a state for each id.
const ENTRY: usize = 16;

impl ExactCounts {
    /// An estimator that has not observed anything yet.
    pub fn new() -> Self {
        ExactCounts::default()
    }
}

impl FrequencyEstimator for ExactCounts {
    fn observe(&mut self, ids: &[u64]) {
        let ids = counted(ids, self.draws);
        for &id in ids {
            *self.counts.entry(id).or_insert(0) += 1;
        }
        self.draws += ids.len() as u64;
    }

    fn probability(&self, id: u64) -> f64 {
        self.counts.get(&id).map_or(unseen(self.draws), |&count| count as f64 / self.draws as f64)
    }

    /// Ids in ascending order, so that equal states have equal bytes.
    fn to_bytes(&self) -> Vec<u8> {
        let mut entries: Vec<(u64, u64)> = self.counts.iter().map(|(&id, &count)| (id, count)).collect();
        entries.sort_unstable();
        let mut writer = Writer::new(Kind::ExactCounts, ENTRY * entries.len());
        for (id, count) in entries {
            writer.u64(id);
            writer.u64(count);
        }
        writer.finish()
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(Kind::ExactCounts, bytes)?;
        let entries = reader.left() / ENTRY;
        let counts = reserved(entries).ok_or_else(|| corrupt(format!("{entries} ids, more than memory holds")))?;
        let mut counts = ExactCounts { counts, draws: 0 };
        let mut previous = None;
        while reader.left() > 0 {
            let (id, count) = (reader.u64()?, reader.u64()?);
            counts.draws = match counts.draws.checked_add(count) {
                Some(draws) if count > 0 && draws <= MOST_DRAWS && Some(id) > previous => draws,
                _ => return Err(corrupt(format!("id {id} with count {count}"))),
            };
            counts.counts.insert(id, count);
            previous = Some(id);
        }
        Ok(counts)
    }
}
