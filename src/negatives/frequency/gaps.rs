//! Frequencies from the gaps between appearances of an id. Memory is fixed, and estimates follow a drift.

use bytemuck::Zeroable;

use super::hashes::Hashes;
use super::state::{Kind, Reader, Writer, corrupt, counted};
use super::{FrequencyEstimator, unseen};
use crate::error::{Result, value};

/// The streaming frequency estimator of Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
/// Recommendations", RecSys 2019, with several hash functions. With `t` the number of ids so far, each id that comes up
/// updates
///
/// ```text
/// B[h(id)] ← (1 − α) B[h(id)] + α (t − A[h(id)])        the mean gap between appearances
/// A[h(id)] ← t                                          the last appearance
/// ```
///
/// for each of several hash functions h, each with arrays of its own, and `Q(id) = 1 / max_h B[h(id)]`: an id that shares a
/// cell shortens the gaps there, so that the longest mean is the one with the fewest collisions. 16 bytes for each of
/// `depth · width` cells.
///
/// Three things are not as in the paper:
/// 1. A step is one id, not one batch. `1/B` is then Q per draw for any batch size, and an id that comes up once in
///    every batch differs from one that comes up many times. The paper's own quantity, the probability to be in a
///    batch, is [`log_q_deduplicated`](FrequencyEstimator::log_q_deduplicated).
/// 2. The rate is `max(α, 1/k)` at a cell's k-th appearance, so that the first `1/α` gaps have equal weights. The first
///    gap is counted from the start of the stream, so the initial value of B does not matter.
/// 3. While `k <= 1/α`, Q is the share of the ids so far, in place of `1/B = k/A`:
///
///    ```text
///    Q(id) = min_h k[h(id)] / n        after n ids
///    ```
///
///    Apart from collisions, this is what [`ExactCounts`](super::ExactCounts) gives. It includes the gap since the last
///    appearance and does not depend on the order within a batch. With k/A, the ids of a first batch of distinct ids
///    would get 1, 1/2, 1/3, ...
///
/// After `1/α` appearances the order matters, and ids are assumed to come in a random one. In a sorted batch, for
/// example, the repetitions of an id are gaps of 1.
///
/// The noise of an estimate after many appearances: the mean gap has a relative variance of `α/2 · (1 − Q)`, so log Q
/// has a standard deviation of `sqrt(α/2)` (7% at α = 0.01) and a bias of `+α/4`; after k < 1/α appearances it is
/// `sqrt(1/k)`. When Q changes, a mature estimate's distance to the new mean gap falls by `1 − α` at each appearance:
/// the time constant is `1/α` appearances, `1/(α Q)` ids. If an id does not come up any more, a mature estimate stays
/// as it is, while a share falls as `1/n`.
///
/// ```
/// use catalog_softmax::negatives::{FrequencyEstimator, GapEstimator};
/// let mut gaps = GapEstimator::new(1 << 16, 2, 0.01, 7)?;
/// for _ in 0..1000 {
///     gaps.observe(&[17, 42, 17, 5]);
/// }
/// assert!((gaps.probability(17) - 0.5).abs() < 0.001 && (gaps.probability(42) - 0.25).abs() < 0.001);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct GapEstimator {
    hashes: Hashes,
    alpha: f64,
    cells: Vec<Cell>,
    draws: u64,
}

#[derive(Debug, Clone, Copy, Zeroable)]
#[repr(C)]
struct Cell {
    /// A: the last appearance, counted from 1.
    last: u64,
    /// B: the mean gap.
    gap: f32,
    /// Appearances, as far as u32 counts: none means that B has no meaning yet.
    appearances: u32,
}

/// From here on f32 holds the mean gap's changes to a relative 1e-3.
const LEAST_ALPHA: f64 = 1e-4;

impl GapEstimator {
    /// `width` cells for each of `depth` hash functions, which `seed` gives, and the learning rate `alpha`.
    ///
    /// # Errors
    /// `width` of 0 or past 2^40, `depth` of 0 or past 64, more cells than memory holds, `alpha` outside 1e-4 to 1.
    pub fn new(width: usize, depth: usize, alpha: f64, seed: u64) -> Result<Self> {
        let hashes = Hashes::new(width, depth, seed)?;
        check_alpha(alpha)?;
        Ok(GapEstimator { cells: hashes.empty_cells()?, hashes, alpha, draws: 0 })
    }

    /// Q of the ids that share a cell, where there are any.
    fn probability_of(&self, cell: &Cell) -> f64 {
        let appearances = f64::from(cell.appearances);
        if 1.0 / appearances >= self.alpha { appearances / self.draws as f64 } else { 1.0 / f64::from(cell.gap) }
    }
}

fn check_alpha(alpha: f64) -> Result<()> {
    if (LEAST_ALPHA..=1.0).contains(&alpha) { Ok(()) } else { Err(value("alpha", alpha, "from 1e-4 to 1")) }
}

impl FrequencyEstimator for GapEstimator {
    fn observe(&mut self, ids: &[u64]) {
        for &id in counted(ids, self.draws) {
            self.draws += 1;
            for index in self.hashes.cells(id) {
                let cell = &mut self.cells[index];
                cell.appearances = cell.appearances.saturating_add(1);
                let rate = self.alpha.max(1.0 / f64::from(cell.appearances));
                let (gap, mean) = ((self.draws - cell.last) as f64, f64::from(cell.gap));
                // A mean of gaps is 1 at least. From 2^53 on the difference above may have been rounded by more than
                // that.
                cell.gap = ((mean + rate * (gap - mean)) as f32).max(1.0);
                cell.last = self.draws;
            }
        }
    }

    fn probability(&self, id: u64) -> f64 {
        let mut least = 1.0f64;
        for index in self.hashes.cells(id) {
            let cell = &self.cells[index];
            if cell.appearances == 0 {
                return unseen(self.draws);
            }
            least = least.min(self.probability_of(cell));
        }
        least
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut writer = Writer::new(Kind::Gaps, 8 * 5 + 16 * self.cells.len());
        writer.hashes(&self.hashes);
        writer.u64(self.draws);
        writer.u64(self.alpha.to_bits());
        for cell in &self.cells {
            writer.u64(cell.last);
            writer.u64(u64::from(cell.gap.to_bits()) << 32 | u64::from(cell.appearances));
        }
        writer.finish()
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(Kind::Gaps, bytes)?;
        let hashes = reader.hashes(16)?;
        let draws = reader.draws()?;
        let alpha = f64::from_bits(reader.u64()?);
        check_alpha(alpha).map_err(|_| corrupt(format!("alpha {alpha:?}")))?;
        let mut cells: Vec<Cell> = hashes.empty_cells()?;
        for cell in &mut cells {
            *cell = read_cell(&mut reader, draws)?;
        }
        reader.end()?;
        Ok(GapEstimator { hashes, alpha, cells, draws })
    }
}

fn read_cell(reader: &mut Reader<'_>, draws: u64) -> Result<Cell> {
    let (last, rest) = (reader.u64()?, reader.u64()?);
    let cell = Cell { last, gap: f32::from_bits((rest >> 32) as u32), appearances: rest as u32 };
    let possible = match cell.appearances {
        0 => last == 0 && rest == 0,
        // One appearance at a time; a mean of gaps, from 1 to the whole stream, rounded.
        appearances => {
            (u64::from(appearances)..=draws).contains(&last)
                && cell.gap >= 1.0
                && f64::from(cell.gap) <= 1.001 * draws as f64
        }
    };
    if possible { Ok(cell) } else { Err(corrupt(format!("a cell of {cell:?} after {draws} ids"))) }
}
