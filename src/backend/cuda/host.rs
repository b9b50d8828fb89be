//! Batches in host memory: inputs go up, the passes run, results come down.

use bytemuck::NoUninit;

use super::Cuda;
use super::finish::{Back, StatisticsOut, TableRows, Totals, Upstream};
use super::host_layout::{Inputs, Outputs, SearchInputs, gradient_rows, has_whole_table, several};
use super::memory::{Layout, Part};
use super::problem::{Problem, ProblemPool, ProblemPositives, ProblemRowNegatives, Rows};
use super::workspace::Workspace;
use crate::backend::stream::{CheckedBatch, CheckedSearch, Stream};
use crate::error::Result;
use crate::problem::arrays::Indices;
use crate::problem::batch::Batch;
use crate::problem::embeddings::{Embeddings, Matrix};
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::{Gradients, RowSparse, TableGradient};
use crate::problem::plan::Plan;
use crate::problem::pool::Candidates;
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::search::TopK;
use crate::problem::statistics::{Moments, Rank, Request, RowStatistics};

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
        let pairs = batch.num_positives();
        let problem = self.search_problem(&batch.matrix, loss.similarity, loss.scale_log2(), &inputs.search);
        Problem {
            row_negatives: batch.matrix.row_negatives.map(|own| ProblemRowNegatives {
                rows: at(inputs.row_negatives),
                log_q: at(inputs.row_negatives_log_q),
                per_row: own.per_row,
            }),
            positives: match (&batch.positives, problem.table) {
                (Positives::Index(_), _) => ProblemPositives::Index(at(inputs.positives)),
                (Positives::Separate(rows), _) => ProblemPositives::Separate(self.rows(rows, inputs.positives)),
                (Positives::Rows(_), Some(table)) => {
                    ProblemPositives::Separate(table.by_reference(at(inputs.positives), pairs))
                }
                (Positives::Rows(_), None) => unreachable!("rows are of a table"),
            },
            pairs,
            positive_offsets: at(inputs.positive_offsets),
            filter: loss.false_negatives,
            positive_ids: at(inputs.positive_ids),
            log_q_range: Some(log_q_range(batch)),
            ..problem
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
        let table = matrix.table.as_ref();
        let table_rows = table.and_then(|table| table.embeddings).map(|rows| self.rows(&rows, inputs.table));
        let table_gradient = table.is_some_and(|table| table.gradient);
        let pools = matrix.pools_with_start().zip(&inputs.pools).map(|((start, pool), parts)| {
            let (candidates, of_table) = match (pool.candidates, table_rows) {
                (Candidates::Embeddings(embeddings), _) => (self.rows(&embeddings, parts.candidates), false),
                (Candidates::Rows(rows), Some(table)) => (table.by_reference(at(parts.candidates), rows.len()), true),
                (Candidates::WholeTable, Some(table)) => (table, true),
                (Candidates::Rows(_) | Candidates::WholeTable, None) => unreachable!("rows are of a table"),
            };
            ProblemPool {
                candidates,
                start,
                ids: if of_table { at(inputs.table_ids) } else { at(parts.ids) },
                log_q: at(parts.log_q),
                gradient: pool.gradient && (!of_table || table_gradient),
                of_table,
            }
        });
        Problem {
            dtype: matrix.dtype(),
            tf32: self.tf32,
            dim: matrix.dim(),
            cosine: similarity == Similarity::Cosine,
            scale,
            queries: self.rows(&matrix.queries, inputs.queries),
            pools: pools.collect(),
            table: table_rows,
            table_ids: at(inputs.table_ids),
            table_gradient,
            given_rows: super::few::Few::default(),
            row_negatives: None,
            positives: ProblemPositives::None,
            pairs: 0,
            positive_offsets: 0,
            positive_ids: 0,
            // The epilogue is the host's.
            positive_log_q: 0,
            positive_weight: 0,
            filter: None,
            row_weight: 0,
            exclude_offsets: at(inputs.exclude_offsets),
            exclude_ids: at(inputs.exclude_ids),
            excluded: matrix.excluded.as_ref().map_or(0, |excluded| excluded.ids.0.len()),
            log_q_range: None,
        }
    }

    fn rows(&self, embeddings: &Embeddings<'_>, part: Part) -> Rows {
        Rows { address: self.arena.address(part), rows: embeddings.rows(), stride: embeddings.stride(), indices: 0 }
    }

    /// Makes room and brings the batch up. The caller holds `settled`.
    fn upload(&mut self, batch: &Batch<'_>, layout: Layout, inputs: &Inputs) -> Result<()> {
        self.upload_search(&batch.matrix, layout, &inputs.search)?;
        self.up(inputs.positive_offsets, several(batch).unwrap_or_default())?;
        if let Some(own) = batch.matrix.row_negatives {
            self.up_indices(inputs.row_negatives, own.rows)?;
            self.up(inputs.row_negatives_log_q, own.log_q.unwrap_or_default())?;
        }
        match &batch.positives {
            Positives::Index(indices) | Positives::Rows(indices) => return self.up(inputs.positives, indices.as_ref()),
            Positives::Separate(embeddings) => self.up(inputs.positives, embeddings.bytes())?,
        }
        self.up(inputs.positive_ids, batch.positive_ids.as_deref().unwrap_or_default())
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
        if let Some(table) = &matrix.table {
            self.up(inputs.table, table.embeddings.as_ref().map_or(&[], Embeddings::bytes))?;
            self.up(inputs.table_ids, table.ids.as_ref().map_or(&[], |ids| &*ids.0))?;
        }
        for (pool, parts) in matrix.pools.iter().zip(&inputs.pools) {
            match pool.candidates {
                Candidates::Embeddings(embeddings) => self.up(parts.candidates, embeddings.bytes())?,
                Candidates::Rows(rows) => self.up_indices(parts.candidates, rows)?,
                Candidates::WholeTable => {}
            }
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

    /// As 32 bits each, which indices of negatives and candidates fit. -1, which stands for none, is `u32::MAX` then.
    fn up_indices(&self, part: Part, indices: Indices<'_>) -> Result<()> {
        match indices {
            Indices::U32(indices) => self.up(part, indices),
            Indices::I64(indices) => self.up(part, &indices.iter().map(|&index| index as u32).collect::<Vec<_>>()),
        }
    }

    pub(super) fn down<T: bytemuck::Pod>(&self, part: Part, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        self.arena.download(&self.driver, part, &mut values)?;
        Ok(values)
    }

    /// The gradient of a table of `m` rows, of which the device has those that have one.
    fn down_table(
        &self,
        out: &Outputs,
        rows: Vec<u32>,
        m: usize,
        dim: usize,
        row_sparse: bool,
    ) -> Result<TableGradient> {
        let mut values = Matrix::default();
        self.down_matrix(out.d_table, rows.len(), dim, &mut values)?;
        if row_sparse {
            return Ok(TableGradient::RowSparse(RowSparse { rows, values }));
        }
        if rows.len() == m {
            return Ok(TableGradient::Dense(values));
        }
        let mut dense = Matrix::default();
        dense.set_shape(m, dim);
        dense.values.fill(0.0);
        for (position, &row) in rows.iter().enumerate() {
            dense.values[row as usize * dim..][..dim].copy_from_slice(values.row(position));
        }
        Ok(TableGradient::Dense(dense))
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

    fn plan_stream(&self, CheckedBatch { batch, loss }: CheckedBatch<'_>, request: Request) -> Plan {
        let memory = self.lay_out(batch, loss, request);
        let tilings = &memory.workspace.tilings;
        let tilings = if request.gradients { &tilings.expected } else { &tilings.statistics };
        Plan {
            block_b: tilings.iter().next().map_or(1, |tiling| tiling.block_x),
            block_n: tilings.iter().next().map_or(1, |tiling| tiling.block_y),
            splits: memory.workspace.statistics.splits.max(memory.workspace.expected.splits),
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

        let (b, pairs) = (batch.num_queries(), batch.num_positives());
        statistics.lse = self.down(out.lse, b)?;
        statistics.positive = self.down(out.positive, pairs)?;
        statistics.num_negatives = self.down(out.num_negatives, b)?;
        statistics.moments = match request.moments {
            true => {
                Some(Moments { expected_score: self.down(out.expected_score, b)?, entropy: self.down(out.entropy, b)? })
            }
            false => None,
        };
        statistics.rank = match request.rank {
            true => Some(Rank { above: self.down(out.above, pairs)?, ties: self.down(out.ties, pairs)? }),
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
        let table_rows = if out.most_table_rows == 0 { Vec::new() } else { batch.rows_with_gradient() };
        if !has_whole_table(batch) {
            self.up(out.table_rows, &table_rows)?;
        }
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
            d_table: at(out.d_table),
            table_rows: match at(out.table_rows) {
                0 => TableRows::All,
                address => TableRows::Listed(address, table_rows.len()),
            },
            d_positive: at(out.d_positive),
            accumulate: false,
        };
        let temperature = at(out.temperature);
        let totals = Totals { total: 0, d_temperature: temperature, d_log_temperature: temperature + 8 };
        step.gradients_alone(&upstream, &back, &totals)?;

        let (b, dim) = (batch.num_queries(), batch.dim());
        self.down_matrix(out.d_queries, b, dim, &mut gradients.d_queries)?;
        gradients.d_positive_embeddings = match &batch.positives {
            Positives::Separate(_) => {
                let mut d = gradients.d_positive_embeddings.take().unwrap_or_default();
                self.down_matrix(out.d_positive_embeddings, batch.num_positives(), dim, &mut d)?;
                Some(d)
            }
            Positives::Index(_) | Positives::Rows(_) => None,
        };
        gradients.d_candidates.resize_with(batch.matrix.pools.len(), Matrix::default);
        for ((pool, &part), d_pool) in batch.matrix.pools.iter().zip(&out.d_candidates).zip(&mut gradients.d_candidates)
        {
            match gradient_rows(pool) {
                0 => *d_pool = Matrix::default(),
                rows => self.down_matrix(part, rows, dim, d_pool)?,
            }
        }
        let has_gradient = batch.matrix.table.as_ref().filter(|table| table.gradient);
        gradients.d_table = match has_gradient {
            Some(table) => Some(self.down_table(out, table_rows, table.shape.rows, dim, request.row_sparse)?),
            None => None,
        };
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
