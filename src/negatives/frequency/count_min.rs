//! Counts in fixed memory.

use super::hashes::Hashes;
use super::state::{Kind, Reader, Writer, corrupt, counted};
use super::{FrequencyEstimator, unseen};
use crate::error::Result;

/// A count-min sketch (Cormode and Muthukrishnan, "An Improved Data Stream Summary: The Count-Min Sketch and its Applications",
/// J. Algorithms 2005): `Q(id) = min over rows of the id's cell / n` after n ids. 8 bytes for each of `depth · width` cells.
///
/// Never below the id's share of the stream, and above it by more than `e / width` with a probability of at most `exp(−depth)`
/// over the seeds. Updates are conservative (Estan and Varghese, SIGCOMM 2002): an id's cells are raised no further than its own
/// count needs, so that the estimates are at most those of the plain sketch.
///
/// ```
/// use catalog_softmax::negatives::{CountMin, FrequencyEstimator};
/// let mut sketch = CountMin::new(1 << 16, 4, 7)?;
/// sketch.observe(&[17, 42, 17, 5]);
/// assert_eq!((sketch.probability(17), sketch.probability(42)), (0.5, 0.25));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CountMin {
    hashes: Hashes,
    cells: Vec<u64>,
    draws: u64,
}

impl CountMin {
    /// `width` cells for each of `depth` hash functions, which `seed` gives.
    ///
    /// # Errors
    /// `width` of 0 or past 2^40, `depth` of 0 or past 64, more cells than memory holds.
    pub fn new(width: usize, depth: usize, seed: u64) -> Result<Self> {
        let hashes = Hashes::new(width, depth, seed)?;
        Ok(CountMin { cells: hashes.empty_cells()?, hashes, draws: 0 })
    }

    fn count(&self, id: u64) -> u64 {
        self.hashes.cells(id).map(|cell| self.cells[cell]).min().unwrap_or(0)
    }
}

impl FrequencyEstimator for CountMin {
    fn observe(&mut self, ids: &[u64]) {
        let ids = counted(ids, self.draws);
        for &id in ids {
            let count = self.count(id) + 1;
            for cell in self.hashes.cells(id) {
                self.cells[cell] = self.cells[cell].max(count);
            }
        }
        self.draws += ids.len() as u64;
    }

    fn probability(&self, id: u64) -> f64 {
        match self.count(id) {
            0 => unseen(self.draws),
            count => count as f64 / self.draws as f64,
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(Kind::CountMin, 8 * (4 + self.cells.len()));
        writer.hashes(&self.hashes);
        writer.u64(self.draws);
        self.cells.iter().for_each(|&cell| writer.u64(cell));
        writer.finish()
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(Kind::CountMin, bytes)?;
        let hashes = reader.hashes(8)?;
        let draws = reader.draws()?;
        let mut cells: Vec<u64> = hashes.empty_cells()?;
        for cell in &mut cells {
            *cell = reader.u64()?;
            if *cell > draws {
                return Err(corrupt(format!("a cell of {cell} after {draws} ids")));
            }
        }
        reader.end()?;
        Ok(CountMin { hashes, cells, draws })
    }
}
