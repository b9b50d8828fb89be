//! Steps on the caller's device memory: no copies, no allocation once reserved, nothing waits for the device.

use super::Cuda;
use super::device_batch::DeviceBatch;
use super::device_output::{DeviceGradients, DeviceOutput, DeviceStatistics, DeviceUpstream, GivenPlaces};
use super::driver::Grid;
use super::memory::{Arena, Layout, Part};
use super::params::{
    CORRECTION_CORRECTED, CORRECTION_LOG_Q, CORRECTION_NONE, EpilogueParams, REDUCTION_MEAN, REDUCTION_SUM,
    REDUCTION_WEIGHTED_MEAN, SymmetricParams,
};
use super::passes::{Back, StatisticsOut};
use super::problem::{Problem, ProblemPool, ProblemPositives};
use super::uses::Uses;
use super::workspace::Workspace;
use crate::error::{Result, does_not_apply};
use crate::problem::loss::{Correction, Loss, Reduction};
use crate::problem::plan::Plan;
use crate::problem::statistics::Request;

/// Row results that a step needs in the workspace where the caller wants none of them.
#[derive(Debug)]
struct Rows {
    f64s: [Part; 8],
    num_negatives: Part,
    ranks: [Part; 2],
    expected_negative: Part,
    d_gamma: Part,
    scalars: Part,
}

/// Addresses of everything that one direction of a step writes.
#[derive(Debug)]
struct Places {
    statistics: StatisticsOut,
    loss: u64,
    probability: u64,
    total: u64,
    d_lse: u64,
    d_positive: u64,
    d_gamma: u64,
    d_temperature: u64,
    d_log_temperature: u64,
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
            scalars: layout.part(3, 8),
        }
    }

    /// The caller's places, and the workspace's for what the caller does not want.
    fn places(&self, arena: &Arena, given: &GivenPlaces) -> Places {
        let at = |part: Part| arena.address(part);
        let [lse, positive, loss, probability, expected_score, entropy, d_lse, d_positive] = self.f64s.map(at);
        let scalars = at(self.scalars);
        Places {
            statistics: StatisticsOut {
                lse: given.lse.unwrap_or(lse),
                positive: given.positive.unwrap_or(positive),
                num_negatives: given.num_negatives.unwrap_or_else(|| at(self.num_negatives)),
                expected_score: given.moments.map_or(expected_score, |moments| moments[0]),
                entropy: given.moments.map_or(entropy, |moments| moments[1]),
                above: given.rank.map_or_else(|| at(self.ranks[0]), |rank| rank[0]),
                ties: given.rank.map_or_else(|| at(self.ranks[1]), |rank| rank[1]),
                expected_negative: at(self.expected_negative),
            },
            loss: given.loss.unwrap_or(loss),
            probability: given.probability.unwrap_or(probability),
            total: given.total.unwrap_or(scalars),
            d_lse,
            d_positive,
            d_gamma: at(self.d_gamma),
            d_temperature: given.temperature[0].unwrap_or(scalars + 8),
            d_log_temperature: given.temperature[1].unwrap_or(scalars + 16),
        }
    }
}

/// What the swapped direction of a symmetric loss needs.
#[derive(Debug)]
struct Swapped {
    rows: Rows,
    workspace: Workspace,
    query_of: Part,
    row_weight: Part,
    d_queries: Part,
    d_candidates: Part,
}

/// A step's memory beside what the caller gives.
#[derive(Debug)]
pub(super) struct StepMemory {
    pub(super) layout: Layout,
    rows: Rows,
    workspace: Workspace,
    swapped: Option<Swapped>,
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
    /// What a step on this batch would keep in device memory, before anything is allocated.
    ///
    /// # Errors
    /// As [`step`](Cuda::step).
    pub fn plan_step(&self, batch: &DeviceBatch<'_>, loss: &Loss, request: Request) -> Result<Plan> {
        let problem = batch.checked(loss, self.tf32, &mut Uses::new(&self.driver)?)?;
        let memory = self.lay_out_step(&problem, loss, request);
        let tilings = &memory.workspace.tilings;
        let tilings = if request.gradients { &tilings.expected } else { &tilings.statistics };
        Ok(Plan {
            block_b: tilings[0].block_x,
            block_n: tilings[0].block_y,
            splits: tilings.iter().map(|tiling| tiling.splits).sum(),
            workspace_bytes: memory.layout.bytes(),
        })
    }

    /// Allocates what steps on batches of this size need. Later steps of no larger plan allocate nothing.
    ///
    /// # Errors
    /// As [`step`](Cuda::step).
    pub fn reserve(&mut self, batch: &DeviceBatch<'_>, loss: &Loss, request: Request) -> Result<()> {
        let problem = batch.checked(loss, self.tf32, &mut Uses::new(&self.driver)?)?;
        let memory = self.lay_out_step(&problem, loss, request);
        self.arena.reserve(&self.driver, memory.layout)
    }

    /// Queues a step on the backend's stream: loss, statistics and what else `output` has a place for. Returns before
    /// the device has done it. Memory of other streams is ordered with it ([`DeviceSlice`](super::DeviceSlice)), so
    /// that results can be read on the backend's stream, or on the one that their slice belongs to, with no wait in
    /// between.
    ///
    /// # Errors
    /// Shapes, alignment or devices of views that do not fit; options out of range; a stream that is being captured
    /// ([`capture`](Cuda::capture) makes a graph of a step); too little device memory; a driver that refuses. Nothing
    /// has been submitted then, except in the last case.
    pub fn step(&mut self, batch: &DeviceBatch<'_>, loss: &Loss, output: &mut DeviceOutput<'_>) -> Result<()> {
        let driver = self.driver.clone();
        let mut uses = Uses::new(&driver)?;
        let ready = self.ready(batch, loss, output, self.tf32, &mut uses)?;
        self.arena.reserve(&driver, ready.memory.layout)?;
        uses.start()?;
        uses.finish(self.submit(loss, &ready))
    }

    /// A step as far as nothing is allocated or submitted.
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
        let memory = self.lay_out_step(&problem, loss, request);
        Ok(ReadyStep { given: output.checked(&problem, uses)?, problem, request, memory })
    }

    /// Submits a step for which there is memory.
    pub(super) fn submit(&self, loss: &Loss, ready: &ReadyStep) -> Result<()> {
        let ReadyStep { problem, request, given, memory } = ready;
        let places = memory.rows.places(&self.arena, given);
        let back = given.back.as_ref();
        self.direction(problem, &memory.workspace, loss, *request, &places, back)?;
        match &memory.swapped {
            Some(swapped) => self.other_direction(problem, memory, swapped, loss, &places, back),
            None => Ok(()),
        }
    }

    /// Queues the stream alone: row statistics for an epilogue of the caller's own, as
    /// [`Backend::statistics`](crate::Backend::statistics) on host memory.
    ///
    /// # Errors
    /// As [`step`](Cuda::step); a symmetric loss has an epilogue for each direction, so that its batches are the caller's.
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
        let places = statistics.checked(&problem, &mut uses)?;
        self.arena.reserve(&driver, memory.layout)?;
        uses.start()?;
        let step = self.step_of(&problem, &memory.workspace);
        uses.finish(step.prepare().and_then(|()| step.statistics(request, &places)))
    }

    /// Queues the stream back alone: gradients of any function of the rows' `lse` and `positive`, as
    /// [`Backend::gradients`](crate::Backend::gradients) on host memory.
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
        let (problem, memory) = self.one_direction(batch, loss, Request::value_and_grad(), &mut uses)?;
        let inputs = upstream.checked(&problem, &mut uses)?;
        let (outputs, temperature) = gradients.checked(&problem, &mut uses)?;
        self.arena.reserve(&driver, memory.layout)?;
        let places = memory.rows.places(&self.arena, &GivenPlaces { temperature, ..GivenPlaces::default() });
        let back = Back {
            d_queries: outputs.d_queries,
            d_candidates: outputs.d_candidates,
            d_positive_embeddings: outputs.d_positive_embeddings,
            d_gamma: places.d_gamma,
            ..inputs
        };
        let finish = EpilogueParams {
            d_gamma: places.d_gamma,
            d_temperature: places.d_temperature,
            d_log_temperature: places.d_log_temperature,
            rows: problem.num_queries() as u64,
            gamma: problem.gamma(),
            ..EpilogueParams::default()
        };
        uses.start()?;
        let step = self.step_of(&problem, &memory.workspace);
        let submitted = step.prepare().and_then(|()| step.back(&back)).and_then(|()| step.finish_temperature(&finish));
        uses.finish(submitted)
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

    /// Waits for the backend's stream, and tells whether a step since the last call found input that breaks a rule:
    /// what [`Batch`](crate::Batch) would have rejected and only the device sees.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) with the first such element; results of the steps since are then not to be
    /// used. [`Error::Driver`](crate::Error::Driver) where the device failed.
    pub fn fault(&self) -> Result<()> {
        self.driver.bind()?;
        self.fault.take(&self.driver)
    }

    /// The passes and the epilogue on one batch.
    fn direction(
        &self,
        problem: &Problem,
        workspace: &Workspace,
        loss: &Loss,
        request: Request,
        places: &Places,
        back: Option<&Back>,
    ) -> Result<()> {
        let step = self.step_of(problem, workspace);
        let statistics = &places.statistics;
        step.prepare()?;
        step.statistics(request, statistics)?;
        let epilogue = EpilogueParams {
            lse: statistics.lse,
            positive: statistics.positive,
            num_negatives: statistics.num_negatives,
            row_weight: problem.row_weight,
            loss: places.loss,
            probability: places.probability,
            d_lse: places.d_lse,
            d_positive: places.d_positive,
            total: places.total,
            d_gamma: places.d_gamma,
            d_temperature: places.d_temperature,
            d_log_temperature: places.d_log_temperature,
            fault: self.fault.address(),
            rows: problem.num_queries() as u64,
            gamma: problem.gamma(),
            ..options(loss)
        };
        step.epilogue(&epilogue)?;
        let Some(back) = back else { return Ok(()) };
        step.back(&Back {
            lse: statistics.lse,
            num_negatives: statistics.num_negatives,
            d_lse: places.d_lse,
            d_positive: places.d_positive,
            expected_negative: statistics.expected_negative,
            d_gamma: places.d_gamma,
            ..back.clone()
        })?;
        step.finish_temperature(&epilogue)
    }

    /// The swapped direction of a symmetric loss, and the mean of both.
    fn other_direction(
        &self,
        problem: &Problem,
        memory: &StepMemory,
        swapped: &Swapped,
        loss: &Loss,
        places: &Places,
        back: Option<&Back>,
    ) -> Result<()> {
        let at = |part: Part| self.arena.address(part);
        let (b, elements) = (problem.num_queries(), problem.num_queries() * problem.dim);
        let params = SymmetricParams {
            positives: problem.positive_index(),
            query_of: at(swapped.query_of),
            row_weight: problem.row_weight,
            swapped_weight: at(swapped.row_weight),
            fault: self.fault.address(),
            rows: b as u64,
            ..SymmetricParams::default()
        };
        self.driver.fill(params.query_of, 0xff, b * size_of::<u32>())?;
        self.driver.launch("swap_positives", Grid::threads(b), &params)?;
        if problem.row_weight != 0 {
            self.driver.launch("swap_weights", Grid::threads(b), &params)?;
        }
        let other = self.swapped_problem(problem, memory.workspace.positive_ids, swapped.query_of, swapped.row_weight);
        let other_places = swapped.rows.places(&self.arena, &GivenPlaces::default());
        let other_back = back.map(|_| Back {
            d_queries: at(swapped.d_queries),
            d_candidates: vec![at(swapped.d_candidates)],
            ..Back::default()
        });
        let request = Request { gradients: back.is_some(), ..Request::default() };
        self.direction(&other, &swapped.workspace, loss, request, &other_places, other_back.as_ref())?;

        let rows = SymmetricParams {
            loss: places.loss,
            probability: places.probability,
            swapped_loss: other_places.loss,
            swapped_probability: other_places.probability,
            ..params
        };
        self.driver.launch("average_rows", Grid::threads(b), &rows)?;
        let average = |kernel: &str, values: u64, swapped_values: u64, count: usize| {
            let params = SymmetricParams { values, swapped_values, count: count as u64, ..params };
            self.driver.launch(kernel, Grid::threads(count), &params)
        };
        average("average_f64", places.total, other_places.total, 1)?;
        let (Some(back), Some(other_back)) = (back, &other_back) else { return Ok(()) };
        // A query is a candidate there, and a candidate a query.
        average("average_f32", back.d_queries, other_back.d_candidates[0], elements)?;
        average("average_f32", back.d_candidates[0], other_back.d_queries, elements)?;
        average("average_f64", places.d_temperature, other_places.d_temperature, 1)?;
        average("average_f64", places.d_log_temperature, other_places.d_log_temperature, 1)
    }

    /// The batch with its sides swapped: candidates are queries, and have their queries' weights.
    fn swapped_problem(&self, problem: &Problem, ids: Part, query_of: Part, row_weight: Part) -> Problem {
        let at = |part: Part| self.arena.address(part);
        // As a candidate, query i has its positive's id: a pair is masked in both directions or in neither.
        let pool = ProblemPool { candidates: problem.queries, ids: at(ids), ..problem.pools[0] };
        Problem {
            queries: problem.pools[0].candidates,
            pools: vec![pool],
            positives: ProblemPositives::Index(at(query_of)),
            row_weight: at(row_weight),
            ..problem.clone()
        }
    }

    fn lay_out_step(&self, problem: &Problem, loss: &Loss, request: Request) -> StepMemory {
        let (b, dim) = (problem.num_queries(), problem.dim);
        let mut layout = Layout::default();
        let rows = Rows::lay_out(&mut layout, b, dim, request);
        let workspace = Workspace::lay_out(&mut layout, self.driver.limits, problem, request);
        let swapped = loss.symmetric.then(|| {
            let request = Request { gradients: request.gradients, ..Request::default() };
            let query_of = layout.part(b, 4);
            let row_weight = layout.part_if(problem.row_weight != 0, b, 4);
            let other = self.swapped_problem(problem, workspace.positive_ids, query_of, row_weight);
            Swapped {
                rows: Rows::lay_out(&mut layout, b, dim, request),
                workspace: Workspace::lay_out(&mut layout, self.driver.limits, &other, request),
                query_of,
                row_weight,
                d_queries: layout.part_if(request.gradients, b * dim, 4),
                d_candidates: layout.part_if(request.gradients, b * dim, 4),
            }
        });
        StepMemory { layout, rows, workspace, swapped }
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
