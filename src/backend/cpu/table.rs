//! The gradient of a table: everything that names a row is summed there, in one fixed order.
//!
//! ```text
//! gather   which pools' candidates, negatives of a row's own, and positives name which row of the table, by row
//! each stretch of rows, in parallel:
//!   load the rows; sum their gradients by the unit vectors: tiles of the pools, then own negatives, then positives
//!   chain rule; write, add, or take the optimiser's step
//! ```
//!
//! A row belongs to one stretch, so threads share no sums, and nothing of the table's shape is needed beside what the
//! caller asked for.

use std::ops::Range;

use pulp::NullaryFnOnce;
use rayon::prelude::*;

use super::candidates::{CandidateTile, Columns, UnitRows};
use super::kernels::{bias, coefficient, row_dot};
use super::pairs::PairData;
use super::row_kernels::{ChainRule, Normalize, add_scaled};
use super::tile::{BackInputs, Scratch, TileJob};
use super::uses::{TableUses, is_whole, row_of};
use super::words::Bf16Rows;
use super::{Borrowed, Cpu, plan, resize, split_off};
use crate::optimizer::Stretch;
use crate::problem::batch::Batch;
use crate::problem::embeddings::prefetch;
use crate::problem::embeddings::{DType, Matrix};
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::{RowSparse, TableGradient};
use crate::problem::pool::Candidates;
use crate::problem::statistics::Request;

/// Uses of rows whose queries are asked for ahead: they are scattered over the batch.
const USES_AHEAD: usize = 8;

/// The part of an ascending list that names rows of a stretch.
fn within<'l>(list: &'l [u64], rows: &TableRows<'_>) -> &'l [u64] {
    let from = list.partition_point(|&entry| row_of(entry) < rows.at(0));
    let last = rows.at(rows.len() - 1);
    let to = from + list[from..].partition_point(|&entry| row_of(entry) <= last);
    &list[from..to]
}

/// The rows of a stretch, ascending. They are in one part of the table.
#[derive(Clone)]
enum TableRows<'a> {
    Range(Range<u32>),
    Listed(&'a [u32]),
}

impl TableRows<'_> {
    fn len(&self) -> usize {
        match self {
            TableRows::Range(range) => range.len(),
            TableRows::Listed(rows) => rows.len(),
        }
    }

    fn at(&self, position: usize) -> u32 {
        match self {
            TableRows::Range(range) => range.start + position as u32,
            TableRows::Listed(rows) => rows[position],
        }
    }

    /// The position of a row, searched from an earlier row's position on.
    fn position(&self, row: u32, from: usize) -> usize {
        match self {
            TableRows::Range(range) => (row - range.start) as usize,
            TableRows::Listed(rows) => from + rows[from..].iter().take_while(|&&other| other < row).count(),
        }
    }
}

/// A thread's rows of a table.
#[derive(Debug, Default)]
pub(super) struct TableScratch {
    /// (R, D) rows of unit length, and 1 / length.
    units: Vec<f32>,
    inverse_norm: Vec<f64>,
    /// The rows for the matrix unit, where it is used.
    bf16: Bf16Rows,
    /// (R, D) gradients.
    d: Vec<f32>,
    /// (block_n, D) gradients of one tile's candidates.
    d_tile: Vec<f32>,
    /// Which row each candidate of a tile is.
    positions: Vec<u32>,
}

impl TableScratch {
    pub(super) fn bytes(block_n: usize, dim: usize, dtype: DType) -> usize {
        let row = 3 * dim * size_of::<f32>() + size_of::<f64>() + size_of::<u32>();
        block_n * row + if dtype == DType::Bf16 { Bf16Rows::bytes(block_n, dim) } else { 0 }
    }
}

/// What becomes of the gradient.
pub(super) enum TableOut<'o> {
    Gradient {
        to: &'o mut Option<TableGradient<f32>>,
        request: Request,
    },
    /// The optimiser's step on the rows of the table.
    Step(Stretch<'o>),
}

/// Where one stretch writes.
enum StretchOut<'o> {
    /// The stretch's rows of the table, or more, which are stepped.
    Step(Stretch<'o>),
    /// Rows of a dense gradient, from `first` on.
    Dense { values: &'o mut [f32], first: u32, add: bool },
    /// The stretch's rows alone.
    Sparse(&'o mut [f32]),
}

/// What all stretches read.
#[derive(Clone, Copy)]
struct TableJob<'a> {
    tiles: TileJob<'a>,
    back: BackInputs<'a>,
    batch: &'a Batch<'a>,
    pairs: &'a PairData,
    /// Of each part of the table.
    uses: &'a [TableUses],
}

impl Cpu {
    /// The gradient of the batch's table, from what `prepare` and `row_gradients` left in the workspace.
    pub(super) fn table_gradient(&mut self, batch: &Batch<'_>, loss: &Loss, d_positive: &[f64], out: TableOut<'_>) {
        let plan = plan::plan(batch, loss.symmetric, Request::value_and_grad());
        TableUses::gather(&mut self.workspace.table_uses, batch, plan.block_n);
        let matmul = self.bf16_matmul(batch.dtype());
        let (tiles, back, scratch) = self.workspace.back(self.arch, matmul, batch, loss, plan, d_positive);
        let (pairs, uses) = (&self.workspace.pairs, &self.workspace.table_uses);
        let job = TableJob { tiles, back, batch, pairs, uses };
        let stretches = job.stretches();
        let run = |outs: Vec<StretchOut<'_>>| {
            stretches.par_iter().zip(outs).with_max_len(1).for_each_init(
                || Borrowed::take(scratch),
                |Borrowed(scratch, _), (rows, out)| job.stretch(scratch, rows, out),
            );
        };
        match out {
            TableOut::Gradient { to, request } if request.row_sparse => {
                job.sparse(to, request.accumulate, &stretches, run);
            }
            TableOut::Gradient { to, request } => job.dense(to, request.accumulate, &stretches, run),
            TableOut::Step(mut rest) => {
                let mut steps = Vec::with_capacity(stretches.len());
                for rows in &stretches {
                    let (step, below) = rest.split_at(rows.at(rows.len() - 1) as usize + 1);
                    steps.push(StretchOut::Step(step));
                    rest = below;
                }
                run(steps);
            }
        }
    }
}

impl<'a> TableJob<'a> {
    fn table_rows(&self) -> usize {
        self.batch.matrix.table.as_ref().map_or(0, |table| table.shape.rows)
    }

    /// The cut of the rows with a gradient. It depends on the batch alone.
    fn stretches(&self) -> Vec<TableRows<'a>> {
        let (block, m) = (self.tiles.plan.block_n, self.table_rows());
        if !is_whole(self.batch) {
            return self.uses.iter().flat_map(|part| part.rows.chunks(block)).map(TableRows::Listed).collect();
        }
        let range = |start: usize| TableRows::Range(start as u32..(start + block).min(m) as u32);
        (0..m).step_by(block).map(range).collect()
    }

    /// The uses of the part that a stretch is in.
    fn uses_of(&self, rows: &TableRows<'_>) -> &'a TableUses {
        let part = self.uses.iter().find(|uses| uses.part.contains(&(rows.at(0) as usize)));
        part.expect("a stretch is a piece of a part")
    }

    fn dense<'o>(
        &self,
        to: &'o mut Option<TableGradient<f32>>,
        accumulate: bool,
        stretches: &[TableRows<'_>],
        run: impl FnOnce(Vec<StretchOut<'o>>),
    ) {
        if !matches!(to, Some(TableGradient::Dense(_))) {
            *to = Some(TableGradient::Dense(Matrix::default()));
        }
        let Some(TableGradient::Dense(matrix)) = to else { return };
        let dim = self.batch.dim();
        if !accumulate {
            matrix.set_shape(self.table_rows(), dim);
            if !is_whole(self.batch) {
                matrix.values.par_chunks_mut(1 << 16).for_each(|values| values.fill(0.0));
            }
        }
        let (mut rest, mut first) = (matrix.values.as_mut_slice(), 0);
        let outs = stretches.iter().map(|rows| {
            // Rows between two stretches have no gradient.
            let end = rows.at(rows.len() - 1) + 1;
            let values = split_off(&mut rest, (end - first) as usize * dim);
            StretchOut::Dense { values, first: std::mem::replace(&mut first, end), add: accumulate }
        });
        run(outs.collect());
    }

    fn sparse(
        &self,
        to: &mut Option<TableGradient<f32>>,
        accumulate: bool,
        stretches: &[TableRows<'_>],
        run: impl FnOnce(Vec<StretchOut<'_>>),
    ) {
        let (before, mut fresh) = match to.take() {
            Some(TableGradient::RowSparse(held)) if accumulate => (Some(held), RowSparse::default()),
            Some(TableGradient::RowSparse(held)) => (None, held),
            _ => (None, RowSparse::default()),
        };
        let dim = self.batch.dim();
        fresh.rows.clear();
        fresh.rows.reserve_exact(stretches.iter().map(TableRows::len).sum());
        fresh.rows.extend(stretches.iter().flat_map(|rows| (0..rows.len()).map(|position| rows.at(position))));
        fresh.values.set_shape(fresh.rows.len(), dim);
        let mut rest = fresh.values.values.as_mut_slice();
        let outs = stretches.iter().map(|rows| StretchOut::Sparse(split_off(&mut rest, rows.len() * dim)));
        run(outs.collect());
        *to = Some(TableGradient::RowSparse(match before {
            Some(mut before) => {
                before.add(&fresh);
                before
            }
            None => fresh,
        }));
    }

    /// Computes the gradient of the rows of one stretch.
    fn stretch(&self, scratch: &mut Scratch, rows: &TableRows<'_>, out: StretchOut<'_>) {
        let (arch, dim) = (self.tiles.arch, self.batch.dim());
        let mut table = std::mem::take(&mut scratch.table);
        self.load_rows(&mut table, rows, &out);
        resize(&mut table.d, rows.len() * dim);
        table.d.fill(0.0);
        self.add_whole_pools(scratch, &mut table, rows);
        self.add_pools_by_reference(scratch, &mut table, rows);
        arch.dispatch(NamedRows { job: *self, rows, table: &mut table });
        if self.tiles.similarity == Similarity::Cosine {
            let (d, unit) = (&mut table.d, &table.units);
            arch.dispatch(ChainRule { d, unit, dim, inverse_norm: &table.inverse_norm });
        }
        out.write(rows, &table.d, dim);
        scratch.table = table;
    }

    fn load_rows(&self, table: &mut TableScratch, rows: &TableRows<'_>, out: &StretchOut<'_>) {
        let dim = self.batch.dim();
        resize(&mut table.units, rows.len() * dim);
        resize(&mut table.inverse_norm, rows.len());
        for (position, unit) in table.units.chunks_exact_mut(dim).enumerate() {
            let row = rows.at(position) as usize;
            match out {
                StretchOut::Step(table) => table.widen_row(row, unit),
                StretchOut::Dense { .. } | StretchOut::Sparse(_) => self.batch.table_embeddings().widen_row(row, unit),
            }
        }
        let TableScratch { units: x, inverse_norm, bf16, .. } = table;
        let bf16 = self.tiles.matmul.map(|_| {
            bf16.resize(rows.len(), dim);
            bf16.rows_mut()
        });
        let similarity = self.tiles.similarity;
        self.tiles.arch.dispatch(Normalize { x, dim, similarity, inverse_norm, bf16, keep: true });
    }

    /// Pools that are the whole table: the stretch is a tile of theirs.
    fn add_whole_pools(&self, scratch: &mut Scratch, table: &mut TableScratch, rows: &TableRows<'_>) {
        let mut add = false;
        for (p, (start, pool)) in self.batch.matrix.pools_with_start().enumerate() {
            if !pool.gradient || !matches!(pool.candidates, Candidates::WholeTable) {
                continue;
            }
            let first = rows.at(0) as usize;
            let tile = CandidateTile::new(Columns::Pool { pool: p, first, len: rows.len(), start: start + first });
            let TableScratch { units: values, inverse_norm, bf16, .. } = &*table;
            let units = UnitRows { values, inverse_norm, bf16 };
            self.tiles.load_units(&mut scratch.candidates, &tile, &units, |column| column);
            self.tiles.back_loaded(scratch, &tile, &self.back, &mut table.d, add);
            add = true;
        }
    }

    /// Pools by reference: tiles of the candidates that are rows of the stretch.
    fn add_pools_by_reference(&self, scratch: &mut Scratch, table: &mut TableScratch, rows: &TableRows<'_>) {
        let dim = self.batch.dim();
        for candidates in within(&self.uses_of(rows).candidates, rows).chunks(self.tiles.plan.block_n) {
            let mut position = 0;
            table.positions.clear();
            table.positions.extend(candidates.iter().map(|&entry| {
                position = rows.position(row_of(entry), position);
                position as u32
            }));
            let tile = CandidateTile::new(Columns::ByRow(candidates));
            let TableScratch { units: values, inverse_norm, bf16, positions, d, d_tile } = &mut *table;
            let (units, at) = (UnitRows { values, inverse_norm, bf16 }, |column: usize| positions[column] as usize);
            self.tiles.load_units(&mut scratch.candidates, &tile, &units, at);
            resize(d_tile, candidates.len() * dim);
            self.tiles.back_loaded(scratch, &tile, &self.back, d_tile, false);
            for (column, d_candidate) in d_tile.chunks_exact(dim).enumerate() {
                add_scaled(&mut d[at(column) * dim..(at(column) + 1) * dim], 1.0, d_candidate);
            }
        }
    }
}

impl StretchOut<'_> {
    fn write(self, rows: &TableRows<'_>, d: &[f32], dim: usize) {
        match self {
            StretchOut::Sparse(values) => values.copy_from_slice(d),
            StretchOut::Step(mut table) => {
                for (position, d) in d.chunks_exact(dim).enumerate() {
                    table.step_row(rows.at(position) as usize, d);
                }
            }
            StretchOut::Dense { values, first, add } => {
                for (position, d) in d.chunks_exact(dim).enumerate() {
                    let to = &mut values[(rows.at(position) - first) as usize * dim..][..dim];
                    match add {
                        true => add_scaled(to, 1.0, d),
                        false => to.copy_from_slice(d),
                    }
                }
            }
        }
    }
}

/// Adds the gradients of the negatives of rows' own and of the positives that a stretch's rows are. Each is scored again
/// beside its row, which is in cache.
struct NamedRows<'a, 't> {
    job: TableJob<'a>,
    rows: &'t TableRows<'a>,
    table: &'t mut TableScratch,
}

impl NullaryFnOnce for NamedRows<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let TableJob { tiles, batch, pairs, back, .. } = self.job;
        let uses = self.job.uses_of(self.rows);
        let (dim, gamma) = (batch.dim(), tiles.scale.1 as f32);
        let TableScratch { units, inverse_norm, d, .. } = self.table;
        let mut position = 0;
        if let (Some(negatives), Some(table)) = (&batch.matrix.row_negatives, &batch.matrix.table) {
            let own = within(&uses.own, self.rows);
            let mut ahead = own.iter().skip(USES_AHEAD);
            for of_row in own.chunk_by(|&a, &b| row_of(a) == row_of(b)) {
                let row = row_of(of_row[0]);
                position = self.rows.position(row, position);
                let unit = &units[position * dim..(position + 1) * dim];
                let rejecting = tiles.masks.rejecting(table.id(row as usize));
                for &entry in of_row {
                    if let Some(&entry) = ahead.next() {
                        let place = entry as u32;
                        tiles.queries.prefetch((place / negatives.per_row as u32) as usize);
                        negatives.log_q.inspect(|log_q| prefetch(&log_q[place as usize..=place as usize]));
                    }
                    let place = entry as u32 as usize;
                    let query = (entry as u32 / negatives.per_row as u32) as usize;
                    if rejecting.binary_search(&(query as u32)).is_ok() {
                        continue;
                    }
                    let spoiled = inverse_norm[position].is_nan() || tiles.queries.inverse_norm(query).is_nan();
                    let q = tiles.queries.row(query);
                    let sim = if spoiled { f32::NAN } else { row_dot(q, unit) };
                    let bias = negatives.log_q.map_or(0.0, |log_q| bias(log_q[place]));
                    let bound = pairs.own_bounds.get(query).copied().unwrap_or(f32::INFINITY);
                    let (lse, d_lse) = (back.lse[query], back.coefficients[query]);
                    let factor = coefficient(sim, tiles.scale.0, bias, lse, d_lse, bound);
                    if factor != 0.0 {
                        add_scaled(&mut d[position * dim..(position + 1) * dim], gamma * factor, q);
                    }
                }
            }
        }
        position = 0;
        for &entry in within(&uses.pairs, self.rows) {
            position = self.rows.position(row_of(entry), position);
            let pair = entry as u32 as usize;
            if back.d_positive[pair] != 0.0 {
                let q = tiles.queries.row(pairs.rows[pair] as usize);
                add_scaled(&mut d[position * dim..(position + 1) * dim], gamma * back.d_positive[pair] as f32, q);
            }
        }
    }
}
