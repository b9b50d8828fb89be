//! Steps on the caller's device memory. They make no copies, allocate nothing once memory is reserved, and do not wait
//! for the device.

use std::borrow::Cow;

use super::Cuda;
use super::accumulate::Fresh;
use super::device_batch::DeviceBatch;
use super::device_output::{DeviceGradients, DeviceOutput, DeviceStatistics, DeviceUpstream, GivenPlaces};
use super::driver::Grid;
use super::finish::{Back, LossOut, StatisticsOut, Totals};
use super::kernels::{AVERAGE_DIRECTIONS, Variant};
use super::memory::{Base, Layout, Part};
use super::params::{
    CORRECTION_CORRECTED, CORRECTION_LOG_Q, CORRECTION_NONE, REDUCTION_MEAN, REDUCTION_SUM, REDUCTION_WEIGHTED_MEAN,
    SymmetricParams,
};
use super::passes::Step;
use super::prepare::Swap;
use super::problem::{Problem, ProblemPool, ProblemPositives};
use super::uses::Uses;
use super::workspace::Workspace;
use crate::error::{Result, does_not_apply};
use crate::problem::loss::{Correction, Loss, Reduction};
use crate::problem::plan::Plan;
use crate::problem::statistics::Request;

/// Addresses of everything that one direction of a step writes beside gradients.
#[derive(Debug)]
struct Places {
    statistics: StatisticsOut,
    loss: LossOut,
    totals: Totals,
}

/// Memory for the swapped direction of a symmetric loss.
#[derive(Debug)]
struct Swapped {
    workspace: Workspace,
    query_of: Part,
    row_weight: Part,
    loss: Part,
    probability: Part,
    /// The total, and gradients by tau and by its logarithm.
    totals: Part,
    d_queries: Part,
    d_candidates: Part,
}

/// The memory of a step that the caller does not give.
#[derive(Debug)]
pub(super) struct StepMemory {
    pub(super) layout: Layout,
    workspace: Workspace,
    swapped: Option<Swapped>,
    /// Where the request is to add gradients.
    fresh: Option<Fresh>,
}

/// A step that was checked: its inputs and the caller's places by their addresses.
#[derive(Debug)]
pub(super) struct ReadyStep {
    pub(super) problem: Problem,
    pub(super) request: Request,
    pub(super) given: GivenPlaces,
    pub(super) memory: StepMemory,
}

impl Cuda {
    /// Tiles, splits and device memory of a step on this batch. Allocates nothing.
    ///
    /// # Errors
    /// As [`compute_on_device`](Cuda::compute_on_device).
    pub fn plan_on_device(&self, batch: &DeviceBatch<'_>, loss: &Loss, request: Request) -> Result<Plan> {
        let problem = batch.checked(loss, self.tf32, &mut Uses::new(&self.driver)?)?;
        let memory = self.lay_out_step(&problem, loss, request);
        let tilings = &memory.workspace.tilings;
        let tilings = if request.gradients { &tilings.expected } else { &tilings.statistics };
        Ok(Plan {
            block_b: tilings.iter().next().map_or(1, |tiling| tiling.block_x),
            block_n: tilings.iter().next().map_or(1, |tiling| tiling.block_y),
            splits: memory.workspace.statistics.splits.max(memory.workspace.expected.splits),
            workspace_bytes: memory.layout.bytes(),
        })
    }

    /// Allocates what steps on batches of this size need. Later steps whose plan is not larger allocate nothing.
    ///
    /// # Errors
    /// As [`compute_on_device`](Cuda::compute_on_device).
    pub fn reserve(&mut self, batch: &DeviceBatch<'_>, loss: &Loss, request: Request) -> Result<()> {
        let problem = batch.checked(loss, self.tf32, &mut Uses::new(&self.driver)?)?;
        let memory = self.lay_out_step(&problem, loss, request);
        self.arena.reserve(&self.driver, memory.layout)
    }

    /// Queues a step on the backend's stream: loss, statistics and whatever else `output` has a place for. Returns
    /// before the device has done it. Other streams that own memory of the step are ordered with it
    /// ([`DeviceSlice`](super::DeviceSlice) says how). You can therefore read results on the backend's stream, or on
    /// the stream that their slice belongs to, without waiting first.
    ///
    /// # Errors
    /// Shapes, alignment or devices of views that do not fit; options out of range; a stream that is being captured
    /// ([`capture`](Cuda::capture) makes a graph of a step); too little device memory; a driver that refuses. Nothing
    /// has been submitted then, except in the last case.
    pub fn compute_on_device(
        &mut self,
        batch: &DeviceBatch<'_>,
        loss: &Loss,
        output: &mut DeviceOutput<'_>,
    ) -> Result<()> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let ready = self.ready(batch, loss, output, self.tf32, &mut uses)?;
        let base = self.arena.place(&driver, ready.memory.layout, ready.given.workspace)?;
        uses.start()?;
        uses.finish(self.submit(loss, &ready, base))
    }

    /// Checks a step and lays out its memory. Allocates and submits nothing.
    pub(super) fn ready<'u>(
        &self,
        batch: &DeviceBatch<'u>,
        loss: &Loss,
        output: &'u mut DeviceOutput<'_>,
        tf32: bool,
        uses: &mut Uses<'u>,
    ) -> Result<ReadyStep> {
        let problem = batch.checked(loss, tf32, uses)?;
        let request = output.request();
        output.check_options(loss)?;
        let memory = self.lay_out_step(&problem, loss, request);
        Ok(ReadyStep { given: output.checked(&problem, uses)?, problem, request, memory })
    }

    /// Submits a step whose workspace begins at `base`.
    pub(super) fn submit(&self, loss: &Loss, ready: &ReadyStep, base: Base) -> Result<()> {
        let ReadyStep { problem, request, given, memory } = ready;
        let fresh = memory.fresh.as_ref().zip(given.back.as_ref());
        let fresh = fresh.map(|(fresh, back)| fresh.places(base, back, &given.totals));
        let (back, totals) = match &fresh {
            Some((back, totals)) => (Some(back), *totals),
            None => (given.back.as_ref(), given.totals),
        };
        let places = Places {
            statistics: given.statistics,
            loss: LossOut {
                loss: given.loss,
                probability: given.probability,
                d_lse: given.d_lse,
                d_positive: given.d_positive,
                ..options(loss)
            },
            totals,
        };
        let query_of = memory.swapped.as_ref().map_or(0, |swapped| base.address(swapped.query_of));
        if query_of != 0 {
            // No candidate has a query yet.
            self.driver.fill(query_of, 0xff, problem.num_queries() * size_of::<u32>())?;
        }
        let swap = Swap { query_of, ..Swap::default() };
        let checked = checked_rows(problem, &memory.workspace, base);
        let step = Step { swap, ..self.step_of(&checked, &memory.workspace, base) };
        direction(&step, *request, &places, back)?;
        if let Some(swapped) = &memory.swapped {
            self.other_direction(problem, memory, base, &places, back, swapped)?;
        }
        match (&memory.fresh, &given.back) {
            (Some(fresh), Some(back)) => step.accumulate(fresh, back, &given.totals),
            _ => Ok(()),
        }
    }

    /// Queues the streaming pass alone: row statistics for an epilogue of your own, as
    /// [`Backend::statistics`](crate::Backend::statistics) does on host memory.
    ///
    /// # Errors
    /// As [`compute_on_device`](Cuda::compute_on_device); also for a symmetric loss. It has an epilogue for each
    /// direction: call this once for each, with a batch of your own.
    pub fn statistics_on_device(
        &mut self,
        batch: &DeviceBatch<'_>,
        loss: &Loss,
        statistics: &mut DeviceStatistics<'_>,
    ) -> Result<()> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let request = statistics.request();
        let (problem, memory) = self.one_direction(batch, loss, request, &mut uses)?;
        let (places, given) = statistics.checked(&problem, &mut uses)?;
        let base = self.arena.place(&driver, memory.layout, given)?;
        uses.start()?;
        let problem = checked_rows(&problem, &memory.workspace, base);
        let step = self.step_of(&problem, &memory.workspace, base);
        uses.finish(step.statistics_alone(request, &places))
    }

    /// Queues the backward pass alone: gradients of any function of the rows' `lse` and `positive`, as
    /// [`Backend::gradients`](crate::Backend::gradients) does on host memory.
    ///
    /// # Errors
    /// As [`statistics_on_device`](Cuda::statistics_on_device).
    pub fn gradients_on_device(
        &mut self,
        batch: &DeviceBatch<'_>,
        loss: &Loss,
        upstream: &DeviceUpstream<'_>,
        gradients: &mut DeviceGradients<'_>,
    ) -> Result<()> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let request = Request { accumulate: gradients.accumulate, ..Request::value_and_grad() };
        let (problem, memory) = self.one_direction(batch, loss, request, &mut uses)?;
        let upstream = upstream.checked(&problem, &mut uses)?;
        let (back, totals, given) = gradients.checked(&problem, &mut uses)?;
        // What is added up from lists reads the derivatives by pairs from here.
        let back = Back { d_positive: upstream.d_positive, ..back };
        let base = self.arena.place(&driver, memory.layout, given)?;
        uses.start()?;
        let problem = checked_rows(&problem, &memory.workspace, base);
        let step = self.step_of(&problem, &memory.workspace, base);
        uses.finish(match &memory.fresh {
            None => step.gradients_alone(&upstream, &back, &totals),
            Some(fresh) => {
                let (places, fresh_totals) = fresh.places(base, &back, &totals);
                let submitted = step.gradients_alone(&upstream, &places, &fresh_totals);
                submitted.and_then(|()| step.accumulate(fresh, &back, &totals))
            }
        })
    }

    fn one_direction<'u>(
        &self,
        batch: &DeviceBatch<'u>,
        loss: &Loss,
        request: Request,
        uses: &mut Uses<'u>,
    ) -> Result<(Problem, StepMemory)> {
        if loss.symmetric {
            let rule = "an epilogue of your own sees one direction; call it for each";
            return Err(does_not_apply("symmetric", rule));
        }
        let problem = batch.checked(loss, self.tf32, uses)?;
        let memory = self.lay_out_step(&problem, loss, request);
        Ok((problem, memory))
    }

    /// Waits for the backend's stream and reports whether a step since the last call found bad input. That is input
    /// which a [`Batch`](crate::Batch) would have rejected but which only the device sees, such as an index past the
    /// candidates.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) with the first such element. Do not use the results of the steps since the
    /// last call then. [`Error::Driver`](crate::Error::Driver) where the device failed.
    pub fn fault(&self) -> Result<()> {
        self.driver.bind()?;
        self.fault.take(&self.driver)
    }

    /// The swapped direction of a symmetric loss, and the mean of both.
    fn other_direction(
        &self,
        problem: &Problem,
        memory: &StepMemory,
        base: Base,
        places: &Places,
        back: Option<&Back>,
        swapped: &Swapped,
    ) -> Result<()> {
        let at = |part: Part| base.address(part);
        let (b, elements) = (problem.num_queries(), problem.num_queries() * problem.dim);
        let totals = at(swapped.totals);
        let other_places = Places {
            statistics: StatisticsOut::default(),
            loss: LossOut { loss: at(swapped.loss), probability: at(swapped.probability), d_lse: 0, ..places.loss },
            totals: Totals { total: totals, d_temperature: totals + 8, d_log_temperature: totals + 16 },
        };
        let other_back = back.map(|_| Back {
            d_queries: at(swapped.d_queries),
            d_candidates: [at(swapped.d_candidates)].into_iter().collect(),
            ..Back::default()
        });
        let other = swapped_problem(problem, at(memory.workspace.positive_ids), at(swapped.query_of));
        let swap = Swap { swapped_weight: at(swapped.row_weight), ..Swap::default() };
        let step = Step { swap, ..self.step_of(&other, &swapped.workspace, base) };
        let request = Request { gradients: back.is_some(), ..Request::default() };
        direction(&step, request, &other_places, other_back.as_ref())?;
        // A query is a candidate there, and a candidate a query.
        let params = SymmetricParams {
            positives: problem.positive_index(),
            loss: places.loss.loss,
            swapped_loss: other_places.loss.loss,
            probability: places.loss.probability,
            swapped_probability: other_places.loss.probability,
            d_queries: back.map_or(0, |back| back.d_queries),
            swapped_d_candidates: at(swapped.d_candidates),
            d_candidates: back.map_or(0, |back| back.d_candidates[0]),
            swapped_d_queries: at(swapped.d_queries),
            total: places.totals.total,
            swapped_total: other_places.totals.total,
            d_temperature: places.totals.d_temperature,
            swapped_d_temperature: other_places.totals.d_temperature,
            d_log_temperature: places.totals.d_log_temperature,
            swapped_d_log_temperature: other_places.totals.d_log_temperature,
            rows: b as u64,
            count: if back.is_some() { elements as u64 } else { 0 },
        };
        let threads = if back.is_some() { elements } else { b };
        self.driver.launch(AVERAGE_DIRECTIONS, Variant::ONLY, Grid::threads(threads), &params)
    }

    fn lay_out_step(&self, problem: &Problem, loss: &Loss, request: Request) -> StepMemory {
        let (b, dim) = (problem.num_queries(), problem.dim);
        let mut layout = Layout::default();
        let workspace = Workspace::lay_out(&mut layout, self.driver.limits, problem, request);
        let swapped = loss.symmetric.then(|| {
            let request = Request { gradients: request.gradients, ..Request::default() };
            let query_of = layout.part(b, 4);
            let row_weight = layout.part_if(problem.row_weight != 0, b, 4);
            let at = |part: Part| Base::PLANNED.address(part);
            let other = swapped_problem(problem, at(workspace.positive_ids), at(query_of));
            Swapped {
                workspace: Workspace::lay_out(&mut layout, self.driver.limits, &other, request),
                query_of,
                row_weight,
                loss: layout.part(b, 8),
                probability: layout.part(b, 8),
                totals: layout.part(3, 8),
                d_queries: layout.part_if(request.gradients, b * dim, 4),
                d_candidates: layout.part_if(request.gradients, b * dim, 4),
            }
        });
        let fresh = request.accumulate.then(|| Fresh::lay_out(&mut layout, problem));
        StepMemory { layout, workspace, swapped, fresh }
    }
}

/// The batch with its sides swapped: candidates are queries. Weights stay those of the queries as they were.
fn swapped_problem(problem: &Problem, ids: u64, query_of: u64) -> Problem {
    // As a candidate, query i has its positive's id: a pair is masked in both directions or in neither.
    let pool = ProblemPool { candidates: problem.queries, ids, ..problem.pools[0] };
    Problem {
        queries: problem.pools[0].candidates,
        pools: [pool].into_iter().collect(),
        positives: ProblemPositives::Index(query_of),
        ..problem.clone()
    }
}

/// The problem that reads copies of the caller's rows of a table, which the step makes first.
pub(super) fn checked_rows<'p>(problem: &'p Problem, workspace: &Workspace, base: Base) -> Cow<'p, Problem> {
    if problem.given_rows.len() == 0 {
        return Cow::Borrowed(problem);
    }
    let copies = || problem.given_rows.iter().zip(workspace.checked_rows.iter());
    let copy_of = |address: u64, allows_none: bool| {
        let copy =
            copies().find(|(rows, _)| (rows.address, rows.allows_none) == (address, allows_none) && address != 0);
        copy.map_or(address, |(_, &copy)| base.address(copy))
    };
    Cow::Owned(problem.with_rows(copy_of))
}

/// The passes and the epilogue on one batch.
fn direction(step: &Step<'_>, request: Request, places: &Places, back: Option<&Back>) -> Result<()> {
    step.prepare(request)?;
    step.stream(request)?;
    step.finish_losses(request, &places.statistics, &places.loss, back)?;
    match back {
        Some(back) => step.back(back, &places.totals),
        None => step.finish_value(&places.totals),
    }
}

fn options(loss: &Loss) -> LossOut {
    LossOut {
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
        ..LossOut::default()
    }
}
