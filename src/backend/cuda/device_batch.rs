//! Batches in the caller's device memory, and everything about them that the host can check.

use super::device_search::{DevicePool, DeviceSearch, FAULT_POSITIVE_ROWS};
use super::device_table::{DeviceRowNegatives, DeviceTable};
use super::few::Few;
use super::problem::{GivenRows, Problem, ProblemPool, ProblemPositives};
use super::uses::Uses;
use super::view::{DeviceEmbeddings, DeviceSlice};
use crate::error::{Result, missing, value};
use crate::problem::loss::{GivenArrays, Loss, Similarity};
use crate::problem::search::check_k;
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
    positive_offsets: Option<DeviceSlice<'a, i64>>,
    positive_weight: Option<DeviceSlice<'a, f32>>,
    positive_ids: Option<DeviceSlice<'a, u64>>,
    positive_log_q: Option<DeviceSlice<'a, f32>>,
    row_weight: Option<DeviceSlice<'a, f32>>,
    log_q_bounds: Option<(f32, f32)>,
}

impl<'a> DeviceBatch<'a> {
    /// `queries` (B, D) against `pool` (N, D). Say next where the positives are.
    pub fn new(queries: DeviceEmbeddings<'a>, pool: DevicePool<'a>) -> Self {
        Self::of(DeviceSearch::new(queries, pool))
    }

    /// `queries` (B, D) against rows of a `table` (M, D). Positives are rows of the table, and so are the candidates of
    /// [`DevicePool::rows`] and of [`row_negatives`](DeviceBatch::row_negatives). With neither pools nor row_negatives,
    /// every row of the table is a candidate.
    pub fn of_table(queries: DeviceEmbeddings<'a>, table: DeviceTable<'a>) -> Self {
        Self::of(DeviceSearch { table: Some(table), ..DeviceSearch::of_queries(queries) })
    }

    fn of(search: DeviceSearch<'a>) -> Self {
        DeviceBatch {
            search,
            positives: None,
            positives_given_twice: false,
            positive_offsets: None,
            positive_weight: None,
            positive_ids: None,
            positive_log_q: None,
            row_weight: None,
            log_q_bounds: None,
        }
    }

    /// (B): the positive of row i is candidate `positives[i]`, counted over all pools. For in-batch negatives give 0,
    /// 1, ... B − 1. In a batch over a table it is row `positives[i]` of the table.
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

    /// Several positives for a row, as CSR: (B + 1) offsets, as
    /// [`BatchBuilder::positive_offsets`](crate::BatchBuilder::positive_offsets). There are P positives then.
    pub fn positive_offsets(mut self, offsets: DeviceSlice<'a, i64>) -> Self {
        self.positive_offsets = Some(offsets);
        self
    }

    /// (P): what the loss of each positive is multiplied by; 1 / (positives of the row) where it is not given.
    pub fn positive_weight(mut self, positive_weight: DeviceSlice<'a, f32>) -> Self {
        self.positive_weight = Some(positive_weight);
        self
    }

    /// Negatives of each row's own: rows of the table.
    pub fn row_negatives(mut self, row_negatives: DeviceRowNegatives<'a>) -> Self {
        self.search.row_negatives = Some(row_negatives);
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

    /// (P) ids of separate positives.
    pub fn positive_ids(mut self, positive_ids: DeviceSlice<'a, u64>) -> Self {
        self.positive_ids = Some(positive_ids);
        self
    }

    /// (P) log_q of positives that are separate, or rows of a table.
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
        let search = &self.search;
        if search.table.is_some() && search.pools.len() == 0 && search.row_negatives.is_none() {
            let search = search.clone().pool(DevicePool::whole_table());
            return DeviceBatch { search, ..self.clone() }.checked_with_pools(loss, tf32, uses);
        }
        self.checked_with_pools(loss, tf32, uses)
    }

    fn checked_with_pools(&self, loss: &Loss, tf32: bool, uses: &mut Uses<'a>) -> Result<Problem> {
        let own_log_q = self.search.row_negatives.is_some_and(|own| own.log_q.is_some());
        let have_log_q = own_log_q || self.search.pools.iter().any(|pool| pool.log_q.is_some());
        let positives = given_positives(self.positives, self.positives_given_twice)?;
        let of_table = self.search.table.is_some();
        let separate = of_table || matches!(positives, Positives::Separate(_));
        loss.check_options(&GivenArrays {
            log_q: have_log_q,
            positive_log_q: if separate { self.positive_log_q.is_some() } else { have_log_q },
            positives_by_index: !separate,
            row_weight: self.row_weight.is_some(),
        })?;
        let problem = self.problem(positives, loss.similarity, loss.scale_log2(), tf32, uses)?;
        if loss.symmetric {
            check_symmetric(&Described { batch: self, positives })?;
        }
        let mut floats = |slice: &Option<DeviceSlice<'a, f32>>, name: &'static str| {
            slice.as_ref().map_or(Ok(0), |slice| slice.address(name, uses))
        };
        let problem = Problem {
            positive_log_q: floats(&self.positive_log_q, "positive_log_q")?,
            row_weight: floats(&self.row_weight, "row_weight")?,
            positive_weight: floats(&self.positive_weight, "positive_weight")?,
            filter: loss.false_negatives,
            log_q_range: if have_log_q { checked_bounds(self)? } else { Some((0.0, 0.0)) },
            ..problem
        };
        Ok(problem)
    }

    /// What a search among the batch's negatives scores: the candidates of its pools, with the batch's masks.
    pub(super) fn negatives(
        &self,
        similarity: Similarity,
        k: usize,
        tf32: bool,
        uses: &mut Uses<'a>,
    ) -> Result<Problem> {
        if self.search.pools.len() == 0 && self.search.row_negatives.is_some() {
            return Err(missing("candidates", "negatives are searched among the candidates of pools"));
        }
        if self.search.pools.len() == 0 && self.search.table.is_some() {
            let search = self.search.clone().pool(DevicePool::whole_table());
            return DeviceBatch { search, ..self.clone() }.negatives(similarity, k, tf32, uses);
        }
        let positives = given_positives(self.positives, self.positives_given_twice)?;
        let mut problem = self.problem(positives, similarity, 1.0, tf32, uses)?;
        check_k(k, problem.num_candidates())?;
        let pools = problem.pools.drain().map(|pool| ProblemPool { log_q: 0, ..pool });
        problem.pools = pools.collect::<Few<_, 2>>();
        let given_rows = problem.given_rows.drain().filter(|rows| !rows.allows_none);
        problem.given_rows = given_rows.collect::<Few<_, 4>>();
        Ok(Problem { row_negatives: None, ..problem })
    }

    /// The batch by its addresses, without what only a loss reads. `scale` multiplies similarities.
    fn problem(
        &self,
        positives: Positives<'a>,
        similarity: Similarity,
        scale: f32,
        tf32: bool,
        uses: &mut Uses<'a>,
    ) -> Result<Problem> {
        self.search.check_views()?;
        if let Positives::Separate(embeddings) = positives {
            embeddings.check("positive_embeddings")?;
        }
        check_batch(&Described { batch: self, positives })?;
        // Queries first: where all memory is of another context or stream, the error names them.
        let problem = self.search.problem(similarity, scale, tf32, uses)?;
        let mut problem = Problem {
            pairs: positives.len(),
            positive_ids: self.positive_ids.map_or(Ok(0), |ids| ids.address("positive_ids", uses))?,
            positive_offsets: self
                .positive_offsets
                .map_or(Ok(0), |offsets| offsets.address("positive_offsets", uses))?,
            positives: positives.checked(uses)?,
            ..problem
        };
        if let (ProblemPositives::Index(address), Some(table)) = (problem.positives, problem.table) {
            let count = positives.len();
            problem.positives = ProblemPositives::Separate(table.by_reference(address, count));
            problem.given_rows.push(GivenRows { address, count, kind: FAULT_POSITIVE_ROWS, allows_none: false });
        }
        problem.check_pairs()?;
        Ok(problem)
    }
}

impl<'a> Positives<'a> {
    fn len(&self) -> usize {
        match self {
            Positives::Index(index) => index.len(),
            Positives::Separate(rows) => rows.rows(),
        }
    }

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
            Positives::Index(index) if self.batch.search.table.is_some() => PositivesShape::Rows(index.len()),
            Positives::Index(index) => PositivesShape::Index(index.len()),
            Positives::Separate(embeddings) => PositivesShape::Separate(embeddings.shape()),
        }
    }
    fn positive_offsets(&self) -> Option<usize> {
        self.batch.positive_offsets.map(|offsets| offsets.len())
    }
    fn positive_weight(&self) -> Option<usize> {
        self.batch.positive_weight.map(|weights| weights.len())
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

fn checked_bounds(batch: &DeviceBatch<'_>) -> Result<Option<(f32, f32)>> {
    match batch.log_q_bounds {
        Some((low, high)) if !(low <= high && low.is_finite() && high.is_finite()) => {
            Err(value("log_q_bounds", format!("({low:?}, {high:?})"), "finite, the lower one first"))
        }
        bounds => Ok(bounds),
    }
}
