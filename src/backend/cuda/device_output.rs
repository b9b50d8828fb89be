//! Where a step on device memory writes.

use super::device_table::DeviceTableGradient;
use super::few::Few;
use super::finish::{Back, StatisticsOut, TableRows, Totals, Upstream};
use super::memory::GivenWorkspace;
use super::problem::{Problem, ProblemPositives};
use super::uses::Uses;
use super::view::{DeviceSlice, DeviceSliceMut};
use crate::error::{Argument, Result, does_not_apply, missing, shape};
use crate::problem::loss::Loss;
use crate::problem::statistics::Request;

/// The caller's device memory that a step writes. A result whose field is `None` is not computed, or not kept.
///
/// To ask for gradients, moments or ranks, give memory for them.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceOutput<'a> {
    /// (1) the reduced loss.
    pub total: DeviceSliceMut<'a, f64>,
    /// (B) the loss of each row, before weights.
    pub loss: Option<DeviceSliceMut<'a, f64>>,
    /// (P) P(positive) under the loss. Where rows have one positive each, P is B.
    pub probability: Option<DeviceSliceMut<'a, f64>>,
    /// (B) `log Σ exp(z)` over the row's negatives.
    pub lse: Option<DeviceSliceMut<'a, f64>>,
    /// (P) score of the positive.
    pub positive: Option<DeviceSliceMut<'a, f64>>,
    /// (B) number of negatives.
    pub num_negatives: Option<DeviceSliceMut<'a, u64>>,
    /// Expected score and entropy.
    pub moments: Option<DeviceMoments<'a>>,
    /// Rank of the positive.
    pub rank: Option<DeviceRank<'a>>,
    /// Gradients of the total.
    pub gradients: Option<DeviceGradients<'a>>,
    /// (B) derivative of the total by the row's lse, with weight and reduction; that by a row's one positive is its negative. What
    /// [`Cuda::gradients_on_device`](super::Cuda::gradients_on_device) takes later. Not of a symmetric loss, which has one
    /// in each direction.
    pub d_lse: Option<DeviceSliceMut<'a, f64>>,
    /// (P) derivative of the total by each positive's score, for the same purpose.
    pub d_positive: Option<DeviceSliceMut<'a, f64>>,
    /// (B, D) the mean candidate under the row's softmax over negatives, for the same purpose. Not of a symmetric loss.
    pub expected_negative: Option<DeviceSliceMut<'a, f32>>,
    /// Memory to work in, in place of the backend's own.
    ///
    /// It has at least the bytes that [`Cuda::plan_on_device`](super::Cuda::plan_on_device) says for the loss and for this
    /// output's [`request`](DeviceOutput::request), and begins at a multiple of 256. What it held before is not read. A
    /// framework's own allocator can be its source, so that a step allocates nothing that the framework does not know of.
    pub workspace: Option<DeviceSliceMut<'a, u8>>,
}

/// Where a step writes [`Moments`](crate::Moments): (B) each.
#[derive(Debug)]
pub struct DeviceMoments<'a> {
    /// Expected score, with no log_q.
    pub expected_score: DeviceSliceMut<'a, f64>,
    /// Entropy of the distribution over the negatives, in nats.
    pub entropy: DeviceSliceMut<'a, f64>,
}

/// Where a step writes each positive's [`Rank`](crate::Rank): (P) each.
#[derive(Debug)]
pub struct DeviceRank<'a> {
    /// Negatives that score above the positive.
    pub above: DeviceSliceMut<'a, u64>,
    /// Negatives that score exactly as the positive does.
    pub ties: DeviceSliceMut<'a, u64>,
}

/// Where [`Cuda::statistics_on_device`](super::Cuda::statistics_on_device) writes, for an epilogue of your own:
/// statistics of each row, as in [`RowStatistics`](crate::RowStatistics).
#[derive(Debug)]
pub struct DeviceStatistics<'a> {
    /// (B)
    pub lse: DeviceSliceMut<'a, f64>,
    /// (B)
    pub positive: DeviceSliceMut<'a, f64>,
    /// (B)
    pub num_negatives: DeviceSliceMut<'a, u64>,
    /// (B, D). Give it if you want gradients.
    pub expected_negative: Option<DeviceSliceMut<'a, f32>>,
    /// Memory to work in, as [`DeviceOutput::workspace`]; the request is for gradients where `expected_negative` is given.
    pub workspace: Option<DeviceSliceMut<'a, u8>>,
}

/// Input of [`Cuda::gradients_on_device`](super::Cuda::gradients_on_device): statistics, and each row's derivatives by
/// `lse` and `positive`, with weights and reduction multiplied into them.
#[derive(Debug, Clone, Copy)]
pub struct DeviceUpstream<'a> {
    /// (B)
    pub lse: DeviceSlice<'a, f64>,
    /// (B)
    pub num_negatives: DeviceSlice<'a, u64>,
    /// (B, D)
    pub expected_negative: DeviceSlice<'a, f32>,
    /// (B)
    pub d_lse: DeviceSlice<'a, f64>,
    /// (B)
    pub d_positive: DeviceSlice<'a, f64>,
}

/// Where a step writes gradients of the total.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceGradients<'a> {
    /// (B, D)
    pub d_queries: DeviceSliceMut<'a, f32>,
    /// (N, D) for each pool, in order; `None` for a pool without gradient.
    pub d_candidates: Vec<Option<DeviceSliceMut<'a, f32>>>,
    /// (P, D), where the batch has separate positives.
    pub d_positive_embeddings: Option<DeviceSliceMut<'a, f32>>,
    /// Of a batch over a table that has a gradient.
    pub d_table: Option<DeviceTableGradient<'a>>,
    /// (1) `∂total/∂tau`
    pub d_temperature: Option<DeviceSliceMut<'a, f64>>,
    /// (1) `∂total/∂ log tau`
    pub d_log_temperature: Option<DeviceSliceMut<'a, f64>>,
    /// Gradients are added to what all of these places hold, as with [`Request::accumulate`]: in place of x comes x + gradient, by one
    /// addition. They are computed in the workspace, which is larger by as much. Row-sparse gradients of a table name other rows in each
    /// batch, so add them to a dense one.
    pub accumulate: bool,
    /// Memory for [`Cuda::gradients_on_device`](super::Cuda::gradients_on_device) to work in, as
    /// [`DeviceOutput::workspace`], with a request of gradients. Not for gradients of a whole step, whose output has it.
    pub workspace: Option<DeviceSliceMut<'a, u8>>,
}

impl<'a> DeviceOutput<'a> {
    /// An output for the total alone. Set further fields to ask for more.
    pub fn new(total: DeviceSliceMut<'a, f64>) -> Self {
        DeviceOutput {
            total,
            loss: None,
            probability: None,
            lse: None,
            positive: None,
            num_negatives: None,
            moments: None,
            rank: None,
            gradients: None,
            d_lse: None,
            d_positive: None,
            expected_negative: None,
            workspace: None,
        }
    }

    /// The request that this output has places for.
    pub fn request(&self) -> Request {
        let gradients = self.gradients.is_some() || self.expected_negative.is_some();
        let accumulate = self.gradients.as_ref().is_some_and(|gradients| gradients.accumulate);
        let (moments, rank) = (self.moments.is_some(), self.rank.is_some());
        Request { gradients, moments, rank, accumulate, ..Request::default() }
    }

    /// Refuses what the loss has no such result of.
    pub(super) fn check_options(&self, loss: &Loss) -> Result<()> {
        let rule = "a symmetric loss has one in each direction: run these as two losses";
        for (given, argument) in
            [(self.d_lse.is_some(), "d_lse"), (self.expected_negative.is_some(), "expected_negative")]
        {
            if given && loss.symmetric {
                return Err(does_not_apply(argument, rule));
            }
        }
        match &self.gradients {
            Some(DeviceGradients { workspace: Some(_), .. }) => {
                Err(does_not_apply("gradients.workspace", "a step has one workspace, that of its output"))
            }
            _ => Ok(()),
        }
    }
}

impl<'a> DeviceGradients<'a> {
    /// Gradients of queries and of each pool's candidates.
    pub fn new(d_queries: DeviceSliceMut<'a, f32>, d_candidates: Vec<Option<DeviceSliceMut<'a, f32>>>) -> Self {
        DeviceGradients {
            d_queries,
            d_candidates,
            d_positive_embeddings: None,
            d_table: None,
            d_temperature: None,
            d_log_temperature: None,
            accumulate: false,
            workspace: None,
        }
    }
}

/// Addresses of the caller's memory, after it was checked.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct GivenPlaces {
    pub(super) totals: Totals,
    pub(super) loss: u64,
    pub(super) probability: u64,
    pub(super) d_lse: u64,
    pub(super) d_positive: u64,
    pub(super) statistics: StatisticsOut,
    pub(super) back: Option<Back>,
    pub(super) workspace: Option<GivenWorkspace>,
}

impl DeviceOutput<'_> {
    pub(super) fn checked<'u>(&'u mut self, problem: &Problem, uses: &mut Uses<'u>) -> Result<GivenPlaces> {
        let (b, dim) = (problem.num_queries(), problem.dim);
        let pairs = problem.pairs;
        let gradients = self.gradients.as_mut().map(|gradients| gradients.checked(problem, uses)).transpose()?;
        let (mut back, totals) = gradients.map_or_else(Default::default, |(back, totals, _)| (Some(back), totals));
        let d_positive = one(&mut self.d_positive, "d_positive", pairs, uses)?;
        if let Some(back) = &mut back {
            back.d_positive = d_positive;
        }
        let (expected_score, entropy) = match &mut self.moments {
            Some(DeviceMoments { expected_score, entropy }) => {
                (expected_score.checked("expected_score", b, uses)?, entropy.checked("entropy", b, uses)?)
            }
            None => (0, 0),
        };
        let (above, ties) = match &mut self.rank {
            Some(DeviceRank { above, ties }) => {
                (above.checked("above", pairs, uses)?, ties.checked("ties", pairs, uses)?)
            }
            None => (0, 0),
        };
        Ok(GivenPlaces {
            totals: Totals { total: self.total.checked("total", 1, uses)?, ..totals },
            loss: one(&mut self.loss, "loss", b, uses)?,
            probability: one(&mut self.probability, "probability", pairs, uses)?,
            d_lse: one(&mut self.d_lse, "d_lse", b, uses)?,
            d_positive,
            statistics: StatisticsOut {
                lse: one(&mut self.lse, "lse", b, uses)?,
                positive: one(&mut self.positive, "positive", pairs, uses)?,
                num_negatives: one(&mut self.num_negatives, "num_negatives", b, uses)?,
                expected_score,
                entropy,
                above,
                ties,
                expected_negative: one(&mut self.expected_negative, "expected_negative", b * dim, uses)?,
            },
            back,
            workspace: workspace(&mut self.workspace, uses)?,
        })
    }
}

fn one<'u, T>(
    given: &'u mut Option<DeviceSliceMut<'_, T>>,
    name: &'static str,
    len: usize,
    uses: &mut Uses<'u>,
) -> Result<u64> {
    given.as_mut().map_or(Ok(0), |slice| slice.checked(name, len, uses))
}

fn workspace<'u>(given: &'u mut Option<DeviceSliceMut<'_, u8>>, uses: &mut Uses<'u>) -> Result<Option<GivenWorkspace>> {
    given.as_mut().map(|slice| slice.workspace(uses)).transpose()
}

impl DeviceStatistics<'_> {
    pub(super) fn request(&self) -> Request {
        Request { gradients: self.expected_negative.is_some(), ..Request::default() }
    }

    /// The caller's places, and the caller's workspace.
    pub(super) fn checked<'u>(
        &'u mut self,
        problem: &Problem,
        uses: &mut Uses<'u>,
    ) -> Result<(StatisticsOut, Option<GivenWorkspace>)> {
        let (b, dim) = (problem.num_queries(), problem.dim);
        let places = StatisticsOut {
            lse: self.lse.checked("lse", b, uses)?,
            positive: self.positive.checked("positive", problem.pairs, uses)?,
            num_negatives: self.num_negatives.checked("num_negatives", b, uses)?,
            expected_negative: one(&mut self.expected_negative, "expected_negative", b * dim, uses)?,
            ..StatisticsOut::default()
        };
        Ok((places, workspace(&mut self.workspace, uses)?))
    }
}

impl<'a> DeviceUpstream<'a> {
    pub(super) fn checked(&self, problem: &Problem, uses: &mut Uses<'a>) -> Result<Upstream> {
        let (b, dim) = (problem.num_queries(), problem.dim);
        Ok(Upstream {
            lse: self.lse.checked("lse", b, uses)?,
            num_negatives: self.num_negatives.checked("num_negatives", b, uses)?,
            expected_negative: self.expected_negative.checked("expected_negative", b * dim, uses)?,
            d_lse: self.d_lse.checked("d_lse", b, uses)?,
            d_positive: self.d_positive.checked("d_positive", problem.pairs, uses)?,
        })
    }
}

impl DeviceGradients<'_> {
    /// Gradients of embeddings and of the temperature, and a workspace for them alone.
    pub(super) fn checked<'u>(
        &'u mut self,
        problem: &Problem,
        uses: &mut Uses<'u>,
    ) -> Result<(Back, Totals, Option<GivenWorkspace>)> {
        let elements = problem.num_queries() * problem.dim;
        let DeviceGradients {
            d_queries,
            d_candidates,
            d_positive_embeddings,
            d_table,
            d_temperature,
            d_log_temperature,
            accumulate,
            ..
        } = self;
        if let (true, Some(DeviceTableGradient::RowSparse { .. })) = (*accumulate, &d_table) {
            let rule = "a row-sparse gradient names the rows of one batch: accumulate into a dense one";
            return Err(does_not_apply("accumulate", rule));
        }
        let (d_table, table_rows) = checked_table(problem, d_table, uses)?;
        let back = Back {
            d_table,
            table_rows,
            d_candidates: checked_pools(problem, d_candidates, uses)?,
            d_positive_embeddings: checked_positives(problem, d_positive_embeddings, uses)?,
            d_queries: d_queries.checked("d_queries", elements, uses)?,
            accumulate: *accumulate,
            ..Back::default()
        };
        let d_temperature = one(d_temperature, "d_temperature", 1, uses)?;
        let d_log_temperature = one(d_log_temperature, "d_log_temperature", 1, uses)?;
        let given = workspace(&mut self.workspace, uses)?;
        Ok((back, Totals { total: 0, d_temperature, d_log_temperature }, given))
    }
}

fn checked_pools<'u>(
    problem: &Problem,
    d_candidates: &'u mut [Option<DeviceSliceMut<'_, f32>>],
    uses: &mut Uses<'u>,
) -> Result<Few<u64, 2>> {
    if d_candidates.len() != problem.pools.len() {
        let found = format!("{} entries", d_candidates.len());
        return Err(shape("d_candidates", found, format!("one for each of {} pools", problem.pools.len())));
    }
    let pools = problem.pools.iter().zip(d_candidates).enumerate();
    let checked = pools.map(|(p, (pool, d))| {
        let argument = Argument::Element("d_candidates", p);
        match (pool.gradient && !pool.of_table, d) {
            (false, Some(_)) if pool.of_table => Err(does_not_apply(argument, "the pool's gradient is the table's")),
            (true, Some(d)) => d.checked(argument, pool.candidates.rows * problem.dim, uses),
            (true, None) => Err(missing(argument, "the pool has a gradient: give it a place, or without_gradient")),
            (false, Some(_)) => Err(does_not_apply(argument, "the pool is without_gradient")),
            (false, None) => Ok(0),
        }
    });
    checked.collect()
}

fn checked_table<'u>(
    problem: &Problem,
    d_table: &'u mut Option<DeviceTableGradient<'_>>,
    uses: &mut Uses<'u>,
) -> Result<(u64, TableRows)> {
    let (dim, rows) = (problem.dim, problem.table.map_or(0, |table| table.rows));
    match (problem.table_gradient, d_table) {
        (true, Some(DeviceTableGradient::Dense(d))) => Ok((d.checked("d_table", rows * dim, uses)?, TableRows::All)),
        (true, Some(DeviceTableGradient::RowSparse { rows: places, values, num_rows })) => {
            let most = problem.most_table_rows();
            let sparse = TableRows::Sparse {
                rows: places.checked("d_table.rows", most, uses)?,
                num_rows: num_rows.checked("d_table.num_rows", 1, uses)?,
            };
            Ok((values.checked("d_table.values", most * dim, uses)?, sparse))
        }
        (true, None) => Err(missing("d_table", "the table has a gradient: give it a place, or without_gradient")),
        (false, Some(_)) => Err(does_not_apply("d_table", "the batch has no table with a gradient")),
        (false, None) => Ok((0, TableRows::All)),
    }
}

fn checked_positives<'u>(
    problem: &Problem,
    d_positive_embeddings: &'u mut Option<DeviceSliceMut<'_, f32>>,
    uses: &mut Uses<'u>,
) -> Result<u64> {
    let separate = matches!(problem.positives, ProblemPositives::Separate(_)) && !problem.positives_of_table();
    match (separate, d_positive_embeddings) {
        (true, Some(d)) => d.checked("d_positive_embeddings", problem.pairs * problem.dim, uses),
        (true, None) => Err(missing("d_positive_embeddings", "separate positives have a gradient")),
        (false, Some(_)) => Err(does_not_apply("d_positive_embeddings", "positives given by index are candidates")),
        (false, None) => Ok(0),
    }
}
