//! Batches in host memory: inputs go up, the passes run, results come down.

use bytemuck::NoUninit;

use super::Cuda;
use super::device_batch::{NOT_ON_CUDA, check_filter};
use super::finish::{Back, StatisticsOut, Totals, Upstream};
use super::memory::{Layout, Part};
use super::problem::{Problem, ProblemPool, ProblemPositives, Rows};
use super::workspace::Workspace;
use crate::backend::stream::{CheckedBatch, CheckedSearch, Stream};
use crate::error::{Result, does_not_apply};
use crate::problem::batch::Batch;
use crate::problem::embeddings::{Embeddings, Matrix};
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::Gradients;
use crate::problem::plan::Plan;
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::search::TopK;
use crate::problem::statistics::{Moments, Rank, Request, RowStatistics};

/// Where a search's arrays go, and those of a batch that a search has too.
#[derive(Debug)]
pub(super) struct SearchInputs {
    queries: Part,
    pools: Vec<PoolInputs>,
    exclude_offsets: Part,
    exclude_ids: Part,
}

/// Where a batch's arrays go.
#[derive(Debug)]
struct Inputs {
    search: SearchInputs,
    /// Indices, or embeddings.
    positives: Part,
    positive_ids: Part,
}

#[derive(Debug)]
struct PoolInputs {
    candidates: Part,
    ids: Part,
    log_q: Part,
}

/// Where row statistics and gradients are on the device.
#[derive(Debug)]
struct Outputs {
    lse: Part,
    positive: Part,
    num_negatives: Part,
    expected_score: Part,
    entropy: Part,
    above: Part,
    ties: Part,
    expected_negative: Part,
    d_lse: Part,
    d_positive: Part,
    d_queries: Part,
    d_positive_embeddings: Part,
    /// By tau, and by its logarithm.
    temperature: Part,
    d_candidates: Vec<Part>,
}

impl SearchInputs {
    pub(super) fn lay_out(layout: &mut Layout, matrix: &ScoreMatrix<'_>) -> Self {
        let pool = |layout: &mut Layout, pool: &crate::Pool<'_>| {
            let candidates = own_candidates(pool);
            let n = candidates.rows();
            PoolInputs {
                candidates: rows_part(layout, &candidates),
                ids: layout.part_if(pool.ids.is_some(), n, 8),
                log_q: layout.part_if(pool.log_q.is_some(), n, 4),
            }
        };
        SearchInputs {
            queries: rows_part(layout, &matrix.queries),
            pools: matrix.pools.iter().map(|p| pool(layout, p)).collect(),
            exclude_offsets: layout.part_if(matrix.excluded.is_some(), matrix.num_queries() + 1, 8),
            exclude_ids: layout.part(matrix.excluded.as_ref().map_or(0, |excluded| excluded.ids.0.len()), 8),
        }
    }
}

impl Inputs {
    fn lay_out(layout: &mut Layout, batch: &Batch<'_>) -> Self {
        let b = batch.num_queries();
        let separate = matches!(batch.positives, Positives::Separate(_));
        Inputs {
            search: SearchInputs::lay_out(layout, &batch.matrix),
            positives: match &batch.positives {
                Positives::Index(_) => layout.part(b, 4),
                Positives::Separate(embeddings) => rows_part(layout, embeddings),
                Positives::Rows(_) => unreachable!("{CHECKED}"),
            },
            positive_ids: layout.part_if(separate && batch.positive_ids.is_some(), b, 8),
        }
    }
}

/// The embeddings of a pool of a batch that `check_support` has let through.
fn own_candidates<'a>(pool: &crate::Pool<'a>) -> Embeddings<'a> {
    pool.candidates().unwrap_or_else(|| unreachable!("{CHECKED}"))
}

const CHECKED: &str = "check_support lets no batch over a table through";

fn rows_part(layout: &mut Layout, embeddings: &Embeddings<'_>) -> Part {
    layout.part(embeddings.bytes().len(), 1)
}

impl Outputs {
    fn lay_out(layout: &mut Layout, batch: &Batch<'_>, request: Request) -> Self {
        let (b, dim, back) = (batch.num_queries(), batch.dim(), request.gradients);
        let separate = matches!(batch.positives, Positives::Separate(_));
        let detail = request.moments || request.rank;
        Outputs {
            lse: layout.part(b, 8),
            positive: layout.part(b, 8),
            num_negatives: layout.part(b, 8),
            expected_score: layout.part_if(detail, b, 8),
            entropy: layout.part_if(detail, b, 8),
            above: layout.part_if(detail, b, 8),
            ties: layout.part_if(detail, b, 8),
            expected_negative: layout.part_if(back, b * dim, 4),
            d_lse: layout.part_if(back, b, 8),
            d_positive: layout.part_if(back, b, 8),
            d_queries: layout.part_if(back, b * dim, 4),
            d_positive_embeddings: layout.part_if(back && separate, b * dim, 4),
            temperature: layout.part_if(back, 2, 8),
            d_candidates: batch
                .matrix
                .pools
                .iter()
                .map(|pool| layout.part_if(back && pool.gradient, own_candidates(pool).rows() * dim, 4))
                .collect(),
        }
    }
}

/// A step's memory: everything that it has on the device.
#[derive(Debug)]
struct Memory {
    layout: Layout,
    inputs: Inputs,
    outputs: Outputs,
    workspace: Workspace,
}

impl Cuda {
    fn lay_out(&self, batch: &Batch<'_>, loss: &Loss, request: Request) -> Memory {
        let mut layout = Layout::default();
        let inputs = Inputs::lay_out(&mut layout, batch);
        let outputs = Outputs::lay_out(&mut layout, batch, request);
        // Sizes do not depend on addresses.
        let problem = self.problem(batch, loss, &inputs);
        let workspace = Workspace::lay_out(&mut layout, self.driver.limits, &problem, request);
        Memory { layout, inputs, outputs, workspace }
    }

    /// The batch by the addresses that its arrays have, or will have, in the arena.
    fn problem(&self, batch: &Batch<'_>, loss: &Loss, inputs: &Inputs) -> Problem {
        let at = |part: Part| self.arena.address(part);
        Problem {
            positives: match &batch.positives {
                Positives::Index(_) => ProblemPositives::Index(at(inputs.positives)),
                Positives::Separate(rows) => ProblemPositives::Separate(self.rows(rows, inputs.positives)),
                Positives::Rows(_) => unreachable!("{CHECKED}"),
            },
            positive_ids: at(inputs.positive_ids),
            log_q_range: Some(log_q_range(batch)),
            ..self.search_problem(&batch.matrix, loss.similarity, loss.scale_log2(), &inputs.search)
        }
    }

    /// The same without positives: what a search scores. `scale` multiplies similarities.
    pub(super) fn search_problem(
        &self,
        matrix: &ScoreMatrix<'_>,
        similarity: Similarity,
        scale: f32,
        inputs: &SearchInputs,
    ) -> Problem {
        let at = |part: Part| self.arena.address(part);
        let pools = matrix.pools_with_start().zip(&inputs.pools).map(|((start, pool), parts)| ProblemPool {
            candidates: self.rows(&own_candidates(pool), parts.candidates),
            start,
            ids: at(parts.ids),
            log_q: at(parts.log_q),
            gradient: pool.gradient,
        });
        Problem {
            dtype: matrix.dtype(),
            tf32: self.tf32,
            dim: matrix.dim(),
            cosine: similarity == Similarity::Cosine,
            scale,
            queries: self.rows(&matrix.queries, inputs.queries),
            pools: pools.collect(),
            positives: ProblemPositives::None,
            positive_ids: 0,
            // The epilogue is the host's.
            positive_log_q: 0,
            row_weight: 0,
            exclude_offsets: at(inputs.exclude_offsets),
            exclude_ids: at(inputs.exclude_ids),
            excluded: matrix.excluded.as_ref().map_or(0, |excluded| excluded.ids.0.len()),
            log_q_range: None,
        }
    }

    fn rows(&self, embeddings: &Embeddings<'_>, part: Part) -> Rows {
        Rows { address: self.arena.address(part), rows: embeddings.rows(), stride: embeddings.stride() }
    }

    /// Makes room and brings the batch up. The caller holds `settled`.
    fn upload(&mut self, batch: &Batch<'_>, layout: Layout, inputs: &Inputs) -> Result<()> {
        self.upload_search(&batch.matrix, layout, &inputs.search)?;
        match &batch.positives {
            Positives::Index(indices) => self.up(inputs.positives, indices.as_ref()),
            Positives::Separate(embeddings) => {
                self.up(inputs.positives, embeddings.bytes())?;
                self.up(inputs.positive_ids, batch.positive_ids.as_deref().unwrap_or_default())
            }
            Positives::Rows(_) => unreachable!("{CHECKED}"),
        }
    }

    /// The same without positives.
    pub(super) fn upload_search(
        &mut self,
        matrix: &ScoreMatrix<'_>,
        layout: Layout,
        inputs: &SearchInputs,
    ) -> Result<()> {
        self.arena.reserve(&self.driver, layout)?;
        self.up(inputs.queries, matrix.queries.bytes())?;
        for (pool, parts) in matrix.pools.iter().zip(&inputs.pools) {
            self.up(parts.candidates, own_candidates(pool).bytes())?;
            self.up(parts.ids, pool.ids_slice().unwrap_or_default())?;
            self.up(parts.log_q, pool.log_q.unwrap_or_default())?;
        }
        if let Some(excluded) = &matrix.excluded {
            self.up(inputs.exclude_offsets, excluded.offsets)?;
            self.up(inputs.exclude_ids, &excluded.ids.0)?;
        }
        Ok(())
    }

    fn up<T: NoUninit>(&self, part: Part, values: &[T]) -> Result<()> {
        self.arena.upload(&self.driver, part, values)
    }

    pub(super) fn down<T: bytemuck::Pod>(&self, part: Part, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        self.arena.download(&self.driver, part, &mut values)?;
        Ok(values)
    }

    fn down_matrix(&self, part: Part, rows: usize, dim: usize, to: &mut Matrix<f32>) -> Result<()> {
        to.set_shape(rows, dim);
        self.arena.download(&self.driver, part, &mut to.values)
    }
}

/// Bounds of what candidates' biases can be: (0, 0) without log_q.
fn log_q_range(batch: &Batch<'_>) -> (f32, f32) {
    let values = batch.matrix.pools.iter().filter_map(|pool| pool.log_q).flatten();
    let range = values.fold(None, |range, &x| match range {
        None => Some((x, x)),
        Some((low, high)) => Some((f32::min(low, x), f32::max(high, x))),
    });
    range.unwrap_or((0.0, 0.0))
}

impl Stream for Cuda {
    type Real = f32;

    fn check_support(&self, batch: &Batch<'_>, loss: Option<&Loss>) -> Result<()> {
        if batch.matrix.table.is_some() {
            return Err(does_not_apply("table", NOT_ON_CUDA));
        }
        if batch.pairs.offsets.is_some() {
            return Err(does_not_apply("positive_offsets", NOT_ON_CUDA));
        }
        loss.map_or(Ok(()), check_filter)
    }

    fn plan_stream(&self, CheckedBatch { batch, loss }: CheckedBatch<'_>, request: Request) -> Plan {
        let memory = self.lay_out(batch, loss, request);
        let tilings = &memory.workspace.tilings;
        let tilings = if request.gradients { &tilings.expected } else { &tilings.statistics };
        Plan {
            block_b: tilings[0].block_x,
            block_n: tilings[0].block_y,
            splits: tilings.iter().map(|tiling| tiling.splits).sum(),
            workspace_bytes: memory.layout.bytes(),
        }
    }

    fn stream(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        request: Request,
        statistics: &mut RowStatistics<f32>,
    ) -> Result<()> {
        let memory = self.lay_out(batch, loss, request);
        self.problem(batch, loss, &memory.inputs).check_pairs()?;
        let _settled = self.driver.settled()?;
        self.upload(batch, memory.layout, &memory.inputs)?;
        let problem = self.problem(batch, loss, &memory.inputs);
        let out = &memory.outputs;
        let at = |part: Part| self.arena.address(part);
        let step = self.step_of(&problem, &memory.workspace, self.arena.base());
        let results = StatisticsOut {
            lse: at(out.lse),
            positive: at(out.positive),
            num_negatives: at(out.num_negatives),
            expected_score: at(out.expected_score),
            entropy: at(out.entropy),
            above: at(out.above),
            ties: at(out.ties),
            expected_negative: at(out.expected_negative),
        };
        step.statistics_alone(request, &results)?;

        let b = batch.num_queries();
        statistics.lse = self.down(out.lse, b)?;
        statistics.positive = self.down(out.positive, b)?;
        statistics.num_negatives = self.down(out.num_negatives, b)?;
        statistics.moments = match request.moments {
            true => {
                Some(Moments { expected_score: self.down(out.expected_score, b)?, entropy: self.down(out.entropy, b)? })
            }
            false => None,
        };
        statistics.rank = match request.rank {
            true => Some(Rank { above: self.down(out.above, b)?, ties: self.down(out.ties, b)? }),
            false => None,
        };
        if !request.gradients {
            statistics.expected_negative = None;
            return Ok(());
        }
        let to = statistics.expected_negative.get_or_insert_default();
        self.down_matrix(out.expected_negative, b, batch.dim(), to)
    }

    fn stream_back(
        &mut self,
        checked: CheckedBatch<'_>,
        request: Request,
        statistics: &RowStatistics<f32>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<f32>,
    ) -> Result<()> {
        if request.accumulate {
            let (request, mut fresh) = (Request { accumulate: false, ..request }, Gradients::default());
            self.stream_back(checked, request, statistics, d_lse, d_positive, &mut fresh)?;
            gradients.add(&fresh);
            return Ok(());
        }
        let CheckedBatch { batch, loss } = checked;
        let Some(expected_negative) = &statistics.expected_negative else { return Ok(()) };
        let memory = self.lay_out(batch, loss, Request::value_and_grad());
        self.problem(batch, loss, &memory.inputs).check_pairs()?;
        let _settled = self.driver.settled()?;
        self.upload(batch, memory.layout, &memory.inputs)?;
        let out = &memory.outputs;
        self.up(out.lse, &statistics.lse)?;
        self.up(out.num_negatives, &statistics.num_negatives)?;
        self.up(out.expected_negative, &expected_negative.values)?;
        self.up(out.d_lse, d_lse)?;
        self.up(out.d_positive, d_positive)?;
        let problem = self.problem(batch, loss, &memory.inputs);
        let at = |part: Part| self.arena.address(part);
        let step = self.step_of(&problem, &memory.workspace, self.arena.base());
        let upstream = Upstream {
            lse: at(out.lse),
            num_negatives: at(out.num_negatives),
            d_lse: at(out.d_lse),
            d_positive: at(out.d_positive),
            expected_negative: at(out.expected_negative),
        };
        let back = Back {
            d_queries: at(out.d_queries),
            d_positive_embeddings: at(out.d_positive_embeddings),
            d_candidates: out.d_candidates.iter().map(|&part| at(part)).collect(),
        };
        let temperature = at(out.temperature);
        let totals = Totals { total: 0, d_temperature: temperature, d_log_temperature: temperature + 8 };
        step.gradients_alone(&upstream, &back, &totals)?;

        let (b, dim) = (batch.num_queries(), batch.dim());
        self.down_matrix(out.d_queries, b, dim, &mut gradients.d_queries)?;
        gradients.d_positive_embeddings = match &batch.positives {
            Positives::Separate(_) => {
                let mut d = gradients.d_positive_embeddings.take().unwrap_or_default();
                self.down_matrix(out.d_positive_embeddings, b, dim, &mut d)?;
                Some(d)
            }
            Positives::Index(_) | Positives::Rows(_) => None,
        };
        gradients.d_candidates.resize_with(batch.matrix.pools.len(), Matrix::default);
        for ((pool, &part), d_pool) in batch.matrix.pools.iter().zip(&out.d_candidates).zip(&mut gradients.d_candidates)
        {
            match pool.gradient {
                true => self.down_matrix(part, own_candidates(pool).rows(), dim, d_pool)?,
                false => *d_pool = Matrix::default(),
            }
        }
        let mut temperature = [0.0; 2];
        self.arena.download(&self.driver, out.temperature, &mut temperature)?;
        [gradients.d_temperature, gradients.d_log_temperature] = temperature;
        Ok(())
    }

    fn plan_search(&self, CheckedSearch { search, similarity, k }: CheckedSearch<'_>) -> Plan {
        self.plan_host_search(search, similarity, k)
    }

    fn search(&mut self, CheckedSearch { search, similarity, k }: CheckedSearch<'_>) -> Result<TopK> {
        self.search_from_host(search, similarity, k)
    }
}
