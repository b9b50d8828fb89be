//! Batches in the caller's device memory, and everything about them that the host can check.

use super::device_search::{DevicePool, DeviceSearch};
use super::problem::{Problem, ProblemPositives};
use super::uses::Uses;
use super::view::{DeviceEmbeddings, DeviceSlice};
use crate::error::{Result, does_not_apply, value};
use crate::problem::loss::{GivenArrays, Loss};
use crate::problem::shape::{BatchShape, PositivesShape, check_batch, check_symmetric, given_positives};

#[derive(Debug, Clone, Copy)]
enum Positives<'a> {
    Index(DeviceSlice<'a, u32>),
    Separate(DeviceEmbeddings<'a>),
}

/// A batch in device memory, with the names and shapes of a [`Batch`](crate::Batch) in host memory.
///
/// Shapes, alignment and devices of the views are checked when a step is planned or run. Values that only the device
/// can see (indices, offsets, log_q, weights) are checked there. A step with bad values stays in bounds, and
/// [`Cuda::fault`](super::Cuda::fault) reports them.
///
/// A batch borrows its memory and may be used for several steps. A step reads the memory when the device executes the
/// step: after everything that was queued earlier on the backend's stream and on the streams that the memory belongs
/// to, and before everything that is queued on them later ([`DeviceSlice`] has the details).
#[derive(Debug, Clone)]
#[must_use]
pub struct DeviceBatch<'a> {
    /// Queries, pools and exclusions.
    search: DeviceSearch<'a>,
    positives: Option<Positives<'a>>,
    positives_given_twice: bool,
    positive_ids: Option<DeviceSlice<'a, u64>>,
    positive_log_q: Option<DeviceSlice<'a, f32>>,
    row_weight: Option<DeviceSlice<'a, f32>>,
    log_q_bounds: Option<(f32, f32)>,
}

impl<'a> DeviceBatch<'a> {
    /// `queries` (B, D) against `pool` (N, D). Say next where the positives are.
    pub fn new(queries: DeviceEmbeddings<'a>, pool: DevicePool<'a>) -> Self {
        DeviceBatch {
            search: DeviceSearch::new(queries, pool),
            positives: None,
            positives_given_twice: false,
            positive_ids: None,
            positive_log_q: None,
            row_weight: None,
            log_q_bounds: None,
        }
    }

    /// (B): the positive of row i is candidate `positives[i]`, counted over all pools. For in-batch negatives give 0,
    /// 1, ... B − 1.
    pub fn positives(self, positives: DeviceSlice<'a, u32>) -> Self {
        self.with(Positives::Index(positives))
    }

    /// (B, D): positives that are not among the candidates. They are not negatives of any row.
    pub fn positive_embeddings(self, positive_embeddings: DeviceEmbeddings<'a>) -> Self {
        self.with(Positives::Separate(positive_embeddings))
    }

    fn with(mut self, positives: Positives<'a>) -> Self {
        self.positives_given_twice |= self.positives.is_some();
        self.positives = Some(positives);
        self
    }

    /// A further pool of candidates.
    pub fn pool(mut self, pool: DevicePool<'a>) -> Self {
        self.search = self.search.pool(pool);
        self
    }

    /// Further pools of candidates, such as those of a [queue](super::DeviceQueue::pools).
    pub fn pools(self, pools: impl IntoIterator<Item = DevicePool<'a>>) -> Self {
        pools.into_iter().fold(self, Self::pool)
    }

    /// (B) ids of separate positives.
    pub fn positive_ids(mut self, positive_ids: DeviceSlice<'a, u64>) -> Self {
        self.positive_ids = Some(positive_ids);
        self
    }

    /// (B) log_q of separate positives.
    pub fn positive_log_q(mut self, positive_log_q: DeviceSlice<'a, f32>) -> Self {
        self.positive_log_q = Some(positive_log_q);
        self
    }

    /// Per row, ids that are not negatives, as CSR: row i has `ids[offsets[i]..offsets[i + 1]]`.
    pub fn excluded_ids(mut self, offsets: DeviceSlice<'a, i64>, ids: DeviceSlice<'a, u64>) -> Self {
        self.search = self.search.excluded_ids(offsets, ids);
        self
    }

    /// (B) sample weights, finite and >= 0.
    pub fn row_weight(mut self, row_weight: DeviceSlice<'a, f32>) -> Self {
        self.row_weight = Some(row_weight);
        self
    }

    /// The caller's promise that `low <= log_q <= high` for all candidates. Under cosine, scores are then bounded, and
    /// if the bounds are near enough the pass does without a running maximum. If the promise is broken, sums may
    /// overflow.
    pub fn log_q_bounds(mut self, low: f32, high: f32) -> Self {
        self.log_q_bounds = Some((low, high));
        self
    }
}

impl<'a> DeviceBatch<'a> {
    /// Checks the batch and returns its addresses.
    pub(super) fn checked(&self, loss: &Loss, tf32: bool, uses: &mut Uses<'a>) -> Result<Problem> {
        check_filter(loss)?;
        let have_log_q = self.search.pools[0].log_q.is_some();
        let positives = given_positives(self.positives, self.positives_given_twice)?;
        let separate = matches!(positives, Positives::Separate(_));
        loss.check_options(&GivenArrays {
            log_q: have_log_q,
            positive_log_q: if separate { self.positive_log_q.is_some() } else { have_log_q },
            positives_by_index: !separate,
            row_weight: self.row_weight.is_some(),
        })?;
        self.search.check_views()?;
        if let Positives::Separate(embeddings) = positives {
            embeddings.check("positive_embeddings")?;
        }
        let described = Described { batch: self, positives };
        check_batch(&described)?;
        if loss.symmetric {
            check_symmetric(&described)?;
        }
        let problem = self.search.problem(loss.similarity, loss.scale_log2(), tf32, uses)?;
        let mut floats = |slice: &Option<DeviceSlice<'a, f32>>, name: &'static str| {
            slice.as_ref().map_or(Ok(0), |slice| slice.address(name, uses))
        };
        let problem = Problem {
            positive_log_q: floats(&self.positive_log_q, "positive_log_q")?,
            row_weight: floats(&self.row_weight, "row_weight")?,
            positives: positives.checked(uses)?,
            positive_ids: self.positive_ids.map_or(Ok(0), |ids| ids.address("positive_ids", uses))?,
            log_q_range: if have_log_q { checked_bounds(self)? } else { Some((0.0, 0.0)) },
            ..problem
        };
        problem.check_pairs()?;
        Ok(problem)
    }
}

impl<'a> Positives<'a> {
    fn checked(&self, uses: &mut Uses<'a>) -> Result<ProblemPositives> {
        Ok(match self {
            Positives::Index(index) => ProblemPositives::Index(index.address("positives", uses)?),
            Positives::Separate(rows) => ProblemPositives::Separate(rows.address("positive_embeddings", uses)?),
        })
    }
}

/// A batch with its positives, as [`check_batch`] reads it.
struct Described<'b, 'a> {
    batch: &'b DeviceBatch<'a>,
    positives: Positives<'a>,
}

impl<'a> BatchShape for Described<'_, 'a> {
    type Matrix = DeviceSearch<'a>;

    fn matrix(&self) -> &DeviceSearch<'a> {
        &self.batch.search
    }
    fn positives(&self) -> PositivesShape {
        match self.positives {
            Positives::Index(index) => PositivesShape::Index(index.len()),
            Positives::Separate(embeddings) => PositivesShape::Separate(embeddings.shape()),
        }
    }
    fn positive_ids(&self) -> Option<usize> {
        self.batch.positive_ids.map(|ids| ids.len())
    }
    fn positive_log_q(&self) -> Option<usize> {
        self.batch.positive_log_q.map(|log_q| log_q.len())
    }
    fn row_weight(&self) -> Option<usize> {
        self.batch.row_weight.map(|weights| weights.len())
    }
}

/// The false-negative filter has no kernels yet.
pub(super) fn check_filter(loss: &Loss) -> Result<()> {
    match loss.false_negatives {
        Some(_) => Err(does_not_apply("loss.false_negatives", NOT_ON_CUDA)),
        None => Ok(()),
    }
}

/// The rule of arguments that have no kernels yet.
pub(super) const NOT_ON_CUDA: &str = "the CUDA backend has no kernels for it yet: use the CPU backend";

fn checked_bounds(batch: &DeviceBatch<'_>) -> Result<Option<(f32, f32)>> {
    match batch.log_q_bounds {
        Some((low, high)) if !(low <= high && low.is_finite() && high.is_finite()) => {
            Err(value("log_q_bounds", format!("({low:?}, {high:?})"), "finite, the lower one first"))
        }
        bounds => Ok(bounds),
    }
}
