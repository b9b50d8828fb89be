//! Steps on the caller's device memory: no copies, no allocation once reserved, nothing waits for the device.

use super::Cuda;
use super::device_batch::DeviceBatch;
use super::device_output::{DeviceOutput, check_gradients};
use super::memory::{Layout, Part};
use super::params::{
    CORRECTION_CORRECTED, CORRECTION_LOG_Q, CORRECTION_NONE, EpilogueParams, REDUCTION_MEAN, REDUCTION_SUM,
    REDUCTION_WEIGHTED_MEAN,
};
use super::passes::StatisticsOut;
use super::problem::Problem;
use super::tiling::{BLOCK_X, BLOCK_Y};
use super::view::DeviceSliceMut;
use super::workspace::Workspace;
use crate::error::Result;
use crate::loss::{Correction, Loss, Reduction};
use crate::plan::Plan;
use crate::stats::Request;

/// Row results that a step needs in the workspace where the caller wants none of them.
#[derive(Debug)]
struct Rows {
    f64s: [Part; 9],
    num_negatives: Part,
    ranks: [Part; 2],
    expected_negative: Part,
    d_gamma: Part,
    scalars: Part,
}

impl Rows {
    fn lay_out(layout: &mut Layout, b: usize, dim: usize, request: Request) -> Self {
        let detail = request.moments || request.rank;
        Rows {
            f64s: std::array::from_fn(|_| layout.part(b, 8)),
            num_negatives: layout.part(b, 8),
            ranks: std::array::from_fn(|_| layout.part_if(detail, b, 8)),
            expected_negative: layout.part_if(request.gradients, b * dim, 4),
            d_gamma: layout.part_if(request.gradients, b, 8),
            scalars: layout.part(2, 8),
        }
    }
}

impl Cuda {
    /// What a step on this batch would keep in device memory, before anything is allocated.
    ///
    /// # Errors
    /// As [`step`](Cuda::step).
    pub fn plan_step(&self, batch: &DeviceBatch<'_>, loss: &Loss, request: Request) -> Result<Plan> {
        let problem = batch.checked(loss, self.ordinal(), self.tf32)?;
        let (layout, workspace, _) = self.lay_out_step(&problem, request);
        let tilings = &workspace.tilings;
        let tilings = if request.gradients { &tilings.expected } else { &tilings.statistics };
        Ok(Plan {
            block_b: BLOCK_X,
            block_n: BLOCK_Y,
            splits: tilings.iter().map(|tiling| tiling.splits).sum(),
            workspace_bytes: layout.bytes(),
        })
    }

    /// Allocates what steps on batches of this size need. Later steps of no larger plan allocate nothing, so that they can
    /// be captured in a CUDA graph.
    ///
    /// # Errors
    /// As [`step`](Cuda::step).
    pub fn reserve(&mut self, batch: &DeviceBatch<'_>, loss: &Loss, request: Request) -> Result<()> {
        let problem = batch.checked(loss, self.ordinal(), self.tf32)?;
        let (layout, _, _) = self.lay_out_step(&problem, request);
        self.driver.bind()?;
        self.arena.reserve(&self.driver, layout)
    }

    /// Submits a step to the stream: loss, statistics and what else `output` has a place for. Does not wait for it.
    ///
    /// # Errors
    /// Shapes, alignment or devices of views that do not fit; options out of range; a loss that is not there on device
    /// memory yet ([`Loss::symmetric`]); too little device memory; a driver that refuses. Nothing has been submitted
    /// then, except in the last case.
    pub fn step(&mut self, batch: &DeviceBatch<'_>, loss: &Loss, output: &mut DeviceOutput<'_>) -> Result<()> {
        let problem = batch.checked(loss, self.ordinal(), self.tf32)?;
        let request = output.request();
        let (layout, workspace, rows) = self.lay_out_step(&problem, request);
        let ordinal = self.ordinal();
        let b = problem.num_queries();
        // The caller's place, or the workspace's.
        let place = |given: Option<&DeviceSliceMut<'_, f64>>, name: &str| {
            given.map(|slice| slice.checked(name, b, ordinal)).transpose()
        };
        let given = [
            place(output.lse.as_ref(), "lse")?,
            place(output.positive.as_ref(), "positive")?,
            place(output.loss.as_ref(), "loss")?,
            place(output.probability.as_ref(), "probability")?,
            place(output.moments.as_ref().map(|moments| &moments[0]), "moments[0]")?,
            place(output.moments.as_ref().map(|moments| &moments[1]), "moments[1]")?,
        ];
        let negatives = output.num_negatives.as_ref();
        let negatives = negatives.map(|slice| slice.checked("num_negatives", b, ordinal)).transpose()?;
        let mut ranks = [None; 2];
        if let Some(given) = &output.rank {
            ranks = [Some(given[0].checked("rank[0]", b, ordinal)?), Some(given[1].checked("rank[1]", b, ordinal)?)];
        }
        let total = output.total.checked("total", 1, ordinal)?;
        let mut back = output.gradients.as_ref().map(|g| check_gradients(&problem, g, ordinal)).transpose()?;

        self.driver.bind()?;
        self.arena.reserve(&self.driver, layout)?;
        let at = |part: Part| self.arena.address(part);
        let own = |index: usize| given.get(index).copied().flatten().unwrap_or_else(|| at(rows.f64s[index]));
        let statistics = StatisticsOut {
            lse: own(0),
            positive: own(1),
            num_negatives: negatives.unwrap_or_else(|| at(rows.num_negatives)),
            expected_score: own(4),
            entropy: own(5),
            above: ranks[0].unwrap_or_else(|| at(rows.ranks[0])),
            ties: ranks[1].unwrap_or_else(|| at(rows.ranks[1])),
            expected_negative: at(rows.expected_negative),
        };
        let step = self.step_of(&problem, &workspace);
        step.prepare()?;
        step.statistics(request, &statistics)?;
        let (d_lse, d_positive) = (own(6), own(7));
        let epilogue = EpilogueParams {
            lse: statistics.lse,
            positive: statistics.positive,
            num_negatives: statistics.num_negatives,
            row_weight: problem.row_weight,
            loss: own(2),
            probability: own(3),
            d_lse,
            d_positive,
            total,
            d_gamma: at(rows.d_gamma),
            fault: self.fault.address(),
            rows: b as u64,
            gamma: problem.gamma(),
            ..options(loss)
        };
        step.epilogue(&epilogue)?;
        if let Some((back, d_temperature, d_log_temperature)) = &mut back {
            back.lse = statistics.lse;
            back.num_negatives = statistics.num_negatives;
            (back.d_lse, back.d_positive) = (d_lse, d_positive);
            back.expected_negative = statistics.expected_negative;
            back.d_gamma = at(rows.d_gamma);
            step.back(back)?;
            let scalars = at(rows.scalars);
            let d_temperature = d_temperature.unwrap_or(scalars);
            let d_log_temperature = d_log_temperature.unwrap_or(scalars + 8);
            step.finish_temperature(&EpilogueParams { d_temperature, d_log_temperature, ..epilogue })?;
        }
        Ok(())
    }

    /// Waits for the stream, and tells whether a step since the last call found input that breaks a rule: what
    /// [`Batch`](crate::Batch) would have rejected and only the device sees.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) with the first such element; results of the steps since are then not to be used.
    /// [`Error::Driver`](crate::Error::Driver) where the device failed.
    pub fn fault(&self) -> Result<()> {
        self.driver.bind()?;
        self.fault.take(&self.driver)
    }

    fn ordinal(&self) -> usize {
        self.driver.context.ordinal()
    }

    fn lay_out_step(&self, problem: &Problem, request: Request) -> (Layout, Workspace, Rows) {
        let mut layout = Layout::default();
        let rows = Rows::lay_out(&mut layout, problem.num_queries(), problem.dim, request);
        let workspace = Workspace::lay_out(&mut layout, self.driver.limits, problem, request);
        (layout, workspace, rows)
    }
}

fn options(loss: &Loss) -> EpilogueParams {
    EpilogueParams {
        correction: match loss.correction {
            Correction::None | Correction::LogQNegativesOnly => CORRECTION_NONE,
            Correction::LogQ => CORRECTION_LOG_Q,
            Correction::CorrectedLogQ => CORRECTION_CORRECTED,
        },
        reduction: match loss.reduction {
            Reduction::None | Reduction::Sum => REDUCTION_SUM,
            Reduction::Mean => REDUCTION_MEAN,
            Reduction::WeightedMean => REDUCTION_WEIGHTED_MEAN,
        },
        ..EpilogueParams::default()
    }
}
