//! The CPU backend: tiles of candidates and chunks of queries whose scores stay in cache between a matmul and the vector
//! passes over them.
//!
//! ```text
//! stream       each (block of queries, split of the candidates), in parallel:
//!                for each tile of candidates, for each chunk of queries:
//!                  S = Q̂ Ĉᵀ, mask, z = S·γ − log_q, running shift and sum, O += P Ĉ
//!              merge the splits in order
//! stream back  d_queries from O; each tile of candidates, in parallel:
//!                for each block of queries: S again, P = d_lse·exp(z − lse), dĈ += Pᵀ Q̂
//! ```
//!
//! Negatives of a row's own are tiles of one row, gathered from the table. The gradient of a table is in `table.rs`.
//!
//! The cut into blocks, tiles and splits depends on the problem alone, every sum has one order, and threads share no
//! sums: results are bitwise the same for any number of threads.

mod amx;
mod best;
mod bf16_matmul;
#[cfg(test)]
mod bf16_tests;
mod candidates;
mod gradients;
mod kernels;
mod masks;
mod matmul;
mod pairs;
mod plan;
mod row_kernels;
mod rows;
mod search;
mod table;
mod tile;
mod units;
mod uses;
mod words;

use std::sync::Mutex;

use pulp::Arch;
use rayon::prelude::*;

use crate::backend::Backend;
use crate::backend::stream::{CheckedBatch, CheckedSearch, Stream};
use crate::error::Result;
use crate::optimizer::{Optimizer, TableMut};
use crate::problem::batch::Batch;
use crate::problem::embeddings::DType;
use crate::problem::loss::Loss;
use crate::problem::output::Gradients;
use crate::problem::plan::Plan;
use crate::problem::search::TopK;
use crate::problem::statistics::{Partial, Request, RowStatistics};
use amx::Amx;
use bf16_matmul::Bf16Matmul;
use gradients::PassBack;
use kernels::Place;
use masks::Masks;
use pairs::PairData;
use row_kernels::MergeExpected;
use table::TableOut;
use tile::{PartOut, Scratch, TileJob};
use units::Units;
use uses::TableUses;

/// The CPU backend. Runs on the current rayon pool and keeps its workspace between calls.
///
/// Arithmetic is in `f32`, as a matmul of `f32` inputs would be; `f16` and `bf16` are widened tile by tile. Per-row sums
/// are `f64`. On processors with AMX, the matrix unit of Intel's servers from Sapphire Rapids on, matmuls with `bf16`
/// embeddings run there, with exact products and sums in `f32`, on Linux. The first such step asks the system for the
/// unit, for the whole process; alternate signal stacks (`sigaltstack`) must then have the size that
/// `getauxval(AT_MINSIGSTKSZ)` returns.
#[derive(Debug)]
pub struct Cpu {
    arch: Arch,
    /// Asked for at the first step with bf16 embeddings.
    amx: fn() -> Option<Amx>,
    workspace: Workspace,
}

#[derive(Debug, Default)]
struct Workspace {
    masks: Masks,
    queries: Units,
    pairs: PairData,
    /// One per part and row. Parts are the splits of the pools and, last, the negatives of the rows' own.
    partials: Vec<Partial>,
    /// (D) per part and row: `Σ exp(z − max) ĉ`.
    partial_expected: Vec<f32>,
    /// One per part and pair.
    partial_places: Vec<Place>,
    /// One per row.
    merged: Vec<Partial>,
    /// Per row: what the stream back multiplies by and shifts by.
    coefficients: Vec<f32>,
    lse: Vec<f32>,
    table_uses: Vec<TableUses>,
    scratch: Mutex<Vec<Scratch>>,
    /// (K) per split and row: what a search found there.
    found: Vec<best::Key>,
}

impl Cpu {
    /// A backend with an empty workspace.
    pub fn new() -> Self {
        Cpu { amx: Amx::detect, ..Cpu::without_amx() }
    }

    /// A backend that leaves a processor's matrix unit (AMX) alone. The unit adds in another order, so steps with `bf16`
    /// embeddings differ in their last bits between processors that have one and those that do not. These steps do not.
    ///
    /// ```
    /// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Similarity, half::bf16};
    /// let items: Vec<bf16> = (0..6 * 4).map(|i| bf16::from_f32((i as f32).sin())).collect();
    /// let items = Embeddings::new(&items[..], 6, 4);
    /// let batch = Batch::builder(items, items).positives(&[0u32, 1, 2, 3, 4, 5]).build()?;
    /// let loss = Loss::softmax(Similarity::Cosine, 0.1);
    /// let (with, without) = (Cpu::new().value(&batch, &loss)?, Cpu::without_amx().value(&batch, &loss)?);
    /// assert!((with.total - without.total).abs() < 1e-5);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    pub fn without_amx() -> Self {
        Cpu { arch: Arch::new(), amx: || None, workspace: Workspace::default() }
    }

    /// The matrix unit's matmuls of a step whose embeddings have this type.
    fn bf16_matmul(&self, dtype: DType) -> Option<Bf16Matmul> {
        (dtype == DType::Bf16).then(self.amx).flatten().map(Bf16Matmul::new)
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Cpu::new()
    }
}

impl Backend for Cpu {}

/// `gamma` as this backend applies it: the `f32` factor of similarities in units of log 2, and the same factor in
/// natural units. Rounding is then a tiny change of the temperature, and positive and lse stay consistent.
fn scale(loss: &Loss) -> (f32, f64) {
    let scale = loss.scale_log2();
    (scale, f64::from(scale) * std::f64::consts::LN_2)
}

/// Rows with negatives of their own that one unit of work takes.
const OWN_ROWS_PER_UNIT: usize = 64;
/// Elements that one task of a per-row pass takes, at least: less is sooner done than handed to another thread.
const ELEMENTS_PER_TASK: usize = 1 << 15;

/// Rows of `dim` elements that one task of a per-row pass takes.
fn rows_per_task(dim: usize) -> usize {
    ELEMENTS_PER_TASK.div_ceil(dim)
}

/// Runs `work` on a thread of the current pool, so that its parallel loops begin there: each that begins on another thread
/// costs two hand-offs between threads.
fn in_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

impl Stream for Cpu {
    type Real = f32;

    fn plan_stream(&self, CheckedBatch { batch, loss }: CheckedBatch<'_>, request: Request) -> Plan {
        plan::plan(batch, loss.symmetric, request)
    }

    fn stream(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        request: Request,
        statistics: &mut RowStatistics<f32>,
    ) -> Result<()> {
        in_pool(|| self.statistics(batch, loss, request, statistics));
        Ok(())
    }

    fn stream_back(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        request: Request,
        statistics: &RowStatistics<f32>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<f32>,
    ) -> Result<()> {
        if statistics.expected_negative.is_none() {
            return Ok(());
        }
        in_pool(|| {
            self.side_gradients(PassBack { batch, loss, request, statistics, d_lse, d_positive }, gradients);
            if batch.matrix.table.as_ref().is_some_and(|table| table.gradient) {
                let out = TableOut::Gradient { to: &mut gradients.d_table, request };
                self.table_gradient(batch, loss, d_positive, out);
            } else if !request.accumulate {
                gradients.d_table = None;
            }
        });
        Ok(())
    }

    fn stream_back_and_step(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        statistics: &RowStatistics<f32>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<f32>,
        table: &mut TableMut<'_>,
        optimizer: &mut Optimizer,
    ) -> Result<()> {
        let (here, request) = (batch.with_table(table.view()), Request::value_and_grad());
        let pass = PassBack { batch: &here, loss, request, statistics, d_lse, d_positive };
        in_pool(|| self.side_gradients(pass, gradients));
        gradients.d_table = None;
        // From here on rows of the table are read and written stretch by stretch; the queries and the positives are copies.
        let step = TableOut::Step(optimizer.begin(table)?);
        in_pool(|| self.table_gradient(batch, loss, d_positive, step));
        Ok(())
    }

    fn plan_search(&self, CheckedSearch { search, k, .. }: CheckedSearch<'_>) -> Plan {
        search::plan(search, k)
    }

    fn search(&mut self, CheckedSearch { search, similarity, k }: CheckedSearch<'_>) -> Result<TopK<f32>> {
        Ok(in_pool(|| search::search(self, search, similarity, k)))
    }
}

impl Cpu {
    /// The streaming pass.
    fn statistics(&mut self, batch: &Batch<'_>, loss: &Loss, request: Request, statistics: &mut RowStatistics<f32>) {
        let plan = plan::plan(batch, loss.symmetric, request);
        self.prepare(batch, loss);
        let parts = plan::parts(batch, &plan);
        let (b, pairs, dim) = (batch.num_queries(), batch.num_positives(), batch.dim());
        let workspace = &mut self.workspace;
        workspace.partials.clear();
        workspace.partials.resize(parts * b, Partial::EMPTY);
        resize(&mut workspace.partial_expected, if request.gradients { parts * b * dim } else { 0 });
        workspace.partial_places.clear();
        workspace.partial_places.resize(if request.rank { parts * pairs } else { 0 }, Place::default());
        self.stream_parts(batch, loss, plan, request);
        self.merge(batch, loss, request, parts, statistics);
    }

    /// Queries, positives and masks, as both passes use them.
    fn prepare(&mut self, batch: &Batch<'_>, loss: &Loss) {
        let matmul = self.bf16_matmul(batch.dtype());
        let Workspace { masks, queries, pairs, .. } = &mut self.workspace;
        masks.of_batch(batch);
        queries.load(self.arch, matmul, &batch.matrix.queries, loss.similarity);
        pairs.prepare(self.arch, matmul, batch, loss, queries);
    }

    /// Streams every part past every block of queries. Slots of parts are in the order (part, row).
    fn stream_parts(&mut self, batch: &Batch<'_>, loss: &Loss, plan: Plan, request: Request) {
        let (matrix, b, dim) = (&batch.matrix, batch.num_queries(), batch.dim());
        let matmul = self.bf16_matmul(batch.dtype());
        let Workspace { masks, queries, pairs, partials, partial_expected, partial_places, scratch, .. } =
            &mut self.workspace;
        let (arch, similarity) = (self.arch, loss.similarity);
        let job = TileJob { arch, matmul, matrix, similarity, scale: scale(loss), plan, masks, queries };
        let [of_pools, of_own] = pairs.detail(batch.pairs, request.moments);
        let mut units = Vec::with_capacity(plan::units(batch, &plan));
        let mut expected = partial_expected.as_mut_slice();
        let mut places = partial_places.as_mut_slice();
        let mut slots = partials.as_mut_slice();
        for part in 0..plan::parts(batch, &plan) {
            // A unit is one block of queries in one part.
            let block = if part < plan.splits { plan.block_b } else { OWN_ROWS_PER_UNIT };
            for start in (0..b).step_by(block) {
                let rows = start..(start + block).min(b);
                let num_pairs = batch.pairs.of_row(rows.end - 1).end - batch.pairs.of_row(start).start;
                let out = PartOut {
                    slots: split_off(&mut slots, rows.len()),
                    expected: request.gradients.then(|| split_off(&mut expected, rows.len() * dim)),
                    places: request.rank.then(|| split_off(&mut places, num_pairs)),
                };
                units.push((part, rows, out));
            }
        }
        units.into_par_iter().with_max_len(1).for_each_init(
            || Borrowed::take(scratch),
            |Borrowed(scratch, _), (part, rows, out)| match part < plan.splits {
                true => job.stream_tiles(scratch, rows, job.tiles(part), &of_pools, out),
                false => job.stream_own(scratch, rows, &of_own, out),
            },
        );
    }

    /// Merges the parts of each row in order.
    fn merge(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        parts: usize,
        statistics: &mut RowStatistics<f32>,
    ) {
        let (b, dim, (_, gamma)) = (batch.num_queries(), batch.dim(), scale(loss));
        let Workspace { partials, partial_expected, partial_places, pairs, merged, scratch, .. } = &mut self.workspace;
        let scratch = &*scratch;
        let slots = |row: usize| (0..parts).map(move |part| part * b + row);
        (0..b)
            .into_par_iter()
            .with_min_len(ELEMENTS_PER_TASK.div_ceil(parts))
            .map(|row| Partial::merge_all(slots(row).map(|slot| partials[slot])))
            .collect_into_vec(merged);

        statistics.clear(request, b, pairs.sims.len());
        merged.iter().for_each(|row| statistics.push(row));
        statistics.positive.extend(pairs.sims.iter().map(|&sim| gamma * f64::from(sim)));
        if let Some(rank) = &mut statistics.rank {
            for pair in 0..pairs.sims.len() {
                let places = partial_places.iter().skip(pair).step_by(pairs.sims.len());
                let [above, ties] = places.fold([0; 2], |sum, place| [sum[0] + place[0], sum[1] + place[1]]);
                rank.above.push(above);
                rank.ties.push(ties);
            }
        }
        if !request.gradients {
            return;
        }
        let expected_negative = statistics.expected_negative.get_or_insert_default();
        expected_negative.set_shape(b, dim);
        let rows = rows_per_task(dim);
        let tasks = expected_negative.values.par_chunks_mut(rows * dim).zip(merged.par_chunks(rows)).enumerate();
        tasks.for_each_init(
            || Borrowed::take(scratch),
            |Borrowed(scratch, _), (task, (o, merged))| {
                let sum = &mut scratch.sums;
                resize(sum, dim);
                for (row, (o, merged)) in o.chunks_exact_mut(dim).zip(merged).enumerate() {
                    let part = |slot: usize| &partial_expected[slot * dim..(slot + 1) * dim];
                    let parts = slots(task * rows + row).map(|slot| (partials[slot].factor(merged.max), part(slot)));
                    // Without negatives nothing is expected.
                    let share = if merged.num_negatives == 0 { 0.0 } else { 1.0 / merged.sum };
                    self.arch.dispatch(MergeExpected { parts, share, sum, o });
                }
            },
        );
    }
}

/// Takes the first `len` elements off a slice.
fn split_off<'a, T>(slice: &mut &'a mut [T], len: usize) -> &'a mut [T] {
    let (head, tail) = std::mem::take(slice).split_at_mut(len);
    *slice = tail;
    head
}

/// Gives `values` a length. What they hold is unspecified. They never take more memory than the longest needs, as a plan
/// counts it.
fn resize<T: Clone + Default>(values: &mut Vec<T>, len: usize) {
    if values.len() == len {
        return;
    }
    values.clear();
    if values.capacity() < len {
        // The old memory goes before the new one comes.
        *values = Vec::new();
        values.reserve_exact(len);
    }
    values.resize(len, T::default());
}

/// A thread's scratch, taken from the workspace and put back.
struct Borrowed<'a>(Scratch, &'a Mutex<Vec<Scratch>>);

impl<'a> Borrowed<'a> {
    fn take(from: &'a Mutex<Vec<Scratch>>) -> Self {
        // A panic elsewhere leaves the list whole: it only holds buffers.
        let scratch = from.lock().unwrap_or_else(std::sync::PoisonError::into_inner).pop();
        Borrowed(scratch.unwrap_or_default(), from)
    }
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let scratch = std::mem::take(&mut self.0);
        self.1.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(scratch);
    }
}
