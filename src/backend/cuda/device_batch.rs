//! Batches in the caller's device memory, and everything about them that the host can check.

use super::problem::{Problem, ProblemPool, ProblemPositives};
use super::view::{DeviceEmbeddings, DeviceSlice};
use crate::error::{Result, does_not_apply, missing, shape, value};
use crate::loss::{Given, Loss, Similarity};

/// Candidates in device memory, as [`Pool`](crate::Pool) in host memory.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct DevicePool<'a> {
    pub(super) candidates: DeviceEmbeddings<'a>,
    pub(super) ids: Option<DeviceSlice<'a, u64>>,
    pub(super) log_q: Option<DeviceSlice<'a, f32>>,
    gradient: bool,
}

impl<'a> DevicePool<'a> {
    /// (N, D) candidates.
    pub fn new(candidates: DeviceEmbeddings<'a>) -> Self {
        DevicePool { candidates, ids: None, log_q: None, gradient: true }
    }

    /// (N) item ids.
    pub fn ids(mut self, candidate_ids: DeviceSlice<'a, u64>) -> Self {
        self.ids = Some(candidate_ids);
        self
    }

    /// (N) log of each candidate's sampling probability.
    pub fn log_q(mut self, log_q: DeviceSlice<'a, f32>) -> Self {
        self.log_q = Some(log_q);
        self
    }

    /// Candidates that get no gradient.
    pub fn without_gradient(mut self) -> Self {
        self.gradient = false;
        self
    }
}

#[derive(Debug, Clone, Copy)]
enum Positives<'a> {
    Index(DeviceSlice<'a, u32>),
    Separate(DeviceEmbeddings<'a>),
}

/// A batch in device memory, as [`Batch`](crate::Batch) in host memory; the same names and shapes.
///
/// Shapes, alignment and devices of the views are checked when a step is planned or run. What only the device can see
/// (indices, offsets, log_q, weights) is checked there: the step stays in bounds, and [`Cuda::fault`](super::Cuda::fault) tells.
#[derive(Debug, Clone)]
#[must_use]
pub struct DeviceBatch<'a> {
    queries: DeviceEmbeddings<'a>,
    pools: Vec<DevicePool<'a>>,
    positives: Positives<'a>,
    positive_ids: Option<DeviceSlice<'a, u64>>,
    positive_log_q: Option<DeviceSlice<'a, f32>>,
    excluded: Option<(DeviceSlice<'a, i64>, DeviceSlice<'a, u64>)>,
    row_weight: Option<DeviceSlice<'a, f32>>,
    log_q_bounds: Option<(f32, f32)>,
}

impl<'a> DeviceBatch<'a> {
    /// Positives as (B) indices over the candidates of all pools.
    pub fn new(queries: DeviceEmbeddings<'a>, pool: DevicePool<'a>, positives: DeviceSlice<'a, u32>) -> Self {
        Self::with_positives(queries, pool, Positives::Index(positives))
    }

    /// Positives as (B, D) embeddings of their own.
    pub fn with_positive_embeddings(
        queries: DeviceEmbeddings<'a>,
        pool: DevicePool<'a>,
        positive_embeddings: DeviceEmbeddings<'a>,
    ) -> Self {
        Self::with_positives(queries, pool, Positives::Separate(positive_embeddings))
    }

    fn with_positives(queries: DeviceEmbeddings<'a>, pool: DevicePool<'a>, positives: Positives<'a>) -> Self {
        DeviceBatch {
            queries,
            pools: vec![pool],
            positives,
            positive_ids: None,
            positive_log_q: None,
            excluded: None,
            row_weight: None,
            log_q_bounds: None,
        }
    }

    /// A further pool of candidates.
    pub fn pool(mut self, pool: DevicePool<'a>) -> Self {
        self.pools.push(pool);
        self
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

    /// Per row, ids that are no negatives: CSR with `offsets` (B + 1) into `ids`.
    pub fn excluded_ids(mut self, offsets: DeviceSlice<'a, i64>, ids: DeviceSlice<'a, u64>) -> Self {
        self.excluded = Some((offsets, ids));
        self
    }

    /// (B) sample weights, finite and >= 0.
    pub fn row_weight(mut self, row_weight: DeviceSlice<'a, f32>) -> Self {
        self.row_weight = Some(row_weight);
        self
    }

    /// The caller's promise that `low <= log_q <= high` for all candidates. Under cosine, scores are then bounded, and
    /// where the bounds are near enough the pass needs no running maximum. A broken promise may overflow.
    pub fn log_q_bounds(mut self, low: f32, high: f32) -> Self {
        self.log_q_bounds = Some((low, high));
        self
    }
}

impl DeviceBatch<'_> {
    /// The batch by its addresses, where all of it fits.
    pub(super) fn checked(&self, loss: &Loss, ordinal: usize, tf32: bool) -> Result<Problem> {
        let batch = self;
        let have_log_q = batch.pools[0].log_q.is_some();
        let separate = matches!(batch.positives, Positives::Separate(_));
        loss.check_options(&Given {
            log_q: have_log_q,
            positive_log_q: if separate { batch.positive_log_q.is_some() } else { have_log_q },
            separate_positives: separate,
            row_weight: batch.row_weight.is_some(),
        })?;
        if loss.symmetric {
            check_symmetric(batch)?;
        }
        let queries = batch.queries.checked("queries", ordinal)?;
        let pools = checked_pools(batch, ordinal)?;
        let b = queries.rows;
        let array = |slice: &Option<DeviceSlice<'_, f32>>, name: &str| {
            slice.as_ref().map_or(Ok(0), |slice| slice.checked(name, b, ordinal))
        };
        let excluded = checked_excluded(batch, b, ordinal)?;
        Ok(Problem {
            dtype: batch.queries.dtype(),
            tf32,
            dim: batch.queries.dim(),
            cosine: loss.similarity == Similarity::Cosine,
            scale: (loss.scale() * std::f64::consts::LOG2_E) as f32,
            queries,
            pools,
            positives: checked_positives(batch, b, ordinal)?,
            positive_ids: checked_positive_ids(batch, b, ordinal)?,
            positive_log_q: array(&batch.positive_log_q, "positive_log_q")?,
            row_weight: array(&batch.row_weight, "row_weight")?,
            exclude_offsets: excluded.0,
            exclude_ids: excluded.1,
            excluded: excluded.2,
            log_q_range: if have_log_q { checked_bounds(batch)? } else { Some((0.0, 0.0)) },
        })
    }
}

/// What [`Batch`](crate::Batch) asks of a symmetric loss, but for what only the device sees.
fn check_symmetric(batch: &DeviceBatch<'_>) -> Result<()> {
    const RULE: &str = "a symmetric loss needs one pool in which each candidate is the positive of one query";
    if matches!(batch.positives, Positives::Separate(_)) {
        return Err(does_not_apply("positive_embeddings", RULE));
    }
    let [pool] = batch.pools.as_slice() else {
        return Err(shape("candidates", format!("{} pools", batch.pools.len()), RULE));
    };
    if !pool.gradient {
        return Err(does_not_apply("candidates.without_gradient", "a symmetric loss has a gradient for both sides"));
    }
    if batch.excluded.is_some() {
        let rule = "they name candidates; in a symmetric loss queries are candidates";
        return Err(does_not_apply("excluded_ids", rule));
    }
    let (b, n) = (batch.queries.rows(), pool.candidates.rows());
    if b == n { Ok(()) } else { Err(shape("candidates", format!("{n} rows for {b} queries"), RULE)) }
}

fn checked_pools(batch: &DeviceBatch<'_>, ordinal: usize) -> Result<Vec<ProblemPool>> {
    let (first, mut start) = (&batch.pools[0], 0);
    let mut pools = Vec::with_capacity(batch.pools.len());
    for (p, pool) in batch.pools.iter().enumerate() {
        let name = |field: &str| if p == 0 { field.to_owned() } else { format!("pools[{p}].{field}") };
        let candidates = pool.candidates.checked(&name("candidates"), ordinal)?;
        let (found, wanted) = (pool.candidates, batch.queries);
        if (found.dim(), found.dtype()) != (wanted.dim(), wanted.dtype()) {
            let found = format!("dim {} of {:?}", found.dim(), found.dtype());
            let rule = format!("dim {} of {:?}, as the queries", wanted.dim(), wanted.dtype());
            return Err(shape(name("candidates"), found, rule));
        }
        for (field, here, there) in [
            ("candidate_ids", pool.ids.is_some(), first.ids.is_some()),
            ("log_q", pool.log_q.is_some(), first.log_q.is_some()),
        ] {
            if here != there {
                return Err(missing(name(field), "all pools have them or none has"));
            }
        }
        let n = candidates.rows;
        pools.push(ProblemPool {
            candidates,
            start,
            ids: pool.ids.map_or(Ok(0), |ids| ids.checked(&name("candidate_ids"), n, ordinal))?,
            log_q: pool.log_q.map_or(Ok(0), |log_q| log_q.checked(&name("log_q"), n, ordinal))?,
            gradient: pool.gradient,
        });
        start += n;
    }
    if u32::try_from(start).is_err() {
        return Err(shape("candidates", format!("{start} rows in all pools"), "fewer than 2^32"));
    }
    Ok(pools)
}

fn checked_positives(batch: &DeviceBatch<'_>, b: usize, ordinal: usize) -> Result<ProblemPositives> {
    match &batch.positives {
        Positives::Index(index) => Ok(ProblemPositives::Index(index.checked("positives", b, ordinal)?)),
        Positives::Separate(embeddings) => {
            let rows = embeddings.checked("positive_embeddings", ordinal)?;
            let (found, wanted) = (embeddings, batch.queries);
            if (rows.rows, found.dim(), found.dtype()) != (b, wanted.dim(), wanted.dtype()) {
                let found = format!("shape ({}, {}) of {:?}", rows.rows, found.dim(), found.dtype());
                let rule = format!("shape ({b}, {}) of {:?}, as the queries", wanted.dim(), wanted.dtype());
                return Err(shape("positive_embeddings", found, rule));
            }
            Ok(ProblemPositives::Separate(rows))
        }
    }
}

fn checked_positive_ids(batch: &DeviceBatch<'_>, b: usize, ordinal: usize) -> Result<u64> {
    let have_ids = batch.pools[0].ids.is_some();
    if !have_ids && (batch.positive_ids.is_some() || batch.excluded.is_some()) {
        return Err(missing("candidate_ids", "positive_ids and excluded_ids are compared with them"));
    }
    match (&batch.positives, &batch.positive_ids) {
        (Positives::Index(_), Some(_)) => {
            Err(does_not_apply("positive_ids", "positives given by index have the ids of their candidates"))
        }
        (Positives::Index(_), None) if batch.positive_log_q.is_some() => {
            Err(does_not_apply("positive_log_q", "positives given by index have the log_q of their candidates"))
        }
        (Positives::Separate(_), None) if have_ids => {
            Err(missing("positive_ids", "separate positives need ids where candidates have them"))
        }
        (_, None) => Ok(0),
        (Positives::Separate(_), Some(ids)) => ids.checked("positive_ids", b, ordinal),
    }
}

fn checked_excluded(batch: &DeviceBatch<'_>, b: usize, ordinal: usize) -> Result<(u64, u64, usize)> {
    let Some((offsets, ids)) = &batch.excluded else { return Ok((0, 0, 0)) };
    let count = ids.len();
    if u32::try_from(2 * (count + b)).is_err() {
        return Err(shape("exclude_ids", format!("length {count}"), "with the number of queries below 2^31"));
    }
    let ids = if count == 0 { 0 } else { ids.checked("exclude_ids", count, ordinal)? };
    Ok((offsets.checked("exclude_offsets", b + 1, ordinal)?, ids, count))
}

fn checked_bounds(batch: &DeviceBatch<'_>) -> Result<Option<(f32, f32)>> {
    match batch.log_q_bounds {
        Some((low, high)) if !(low <= high && low.is_finite() && high.is_finite()) => {
            Err(value("log_q_bounds", format!("({low}, {high})"), "finite, the lower one first"))
        }
        bounds => Ok(bounds),
    }
}
