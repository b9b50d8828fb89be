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

use super::kernels::{ChainRule, Normalize, add_scaled, coefficient, row_dot};
use super::pairs::PairData;
use super::tile::{BackInputs, CandidateTile, Columns, Scratch, TileJob};
use super::{Borrowed, Cpu, plan, resize, split_off};
use crate::optimizer::Stretch;
use crate::problem::batch::Batch;
use crate::problem::embeddings::Matrix;
use crate::problem::embeddings::prefetch;
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::{RowSparse, TableGradient};
use crate::problem::pool::Candidates;
use crate::problem::positives::Positives;
use crate::problem::statistics::Request;

/// Uses of rows whose queries are asked for ahead: they are scattered over the batch.
const USES_AHEAD: usize = 8;

/// Who names which row of the table. Each list is ascending: the row in the upper 32 bits, and below it which candidate
/// (index over all pools), which negative (place in the (B, K) array), or which pair.
#[derive(Debug, Default)]
pub(super) struct TableUses {
    candidates: Vec<u64>,
    own: Vec<u64>,
    pairs: Vec<u64>,
    /// The rows that are named, each once. Empty where a pool is the whole table.
    rows: Vec<u32>,
    /// Where a list is sorted into.
    sorted: Vec<u64>,
}

fn entry(row: usize, index: usize) -> u64 {
    (row as u64) << 32 | index as u64
}

fn row_of(entry: u64) -> u32 {
    (entry >> 32) as u32
}

impl TableUses {
    pub(super) fn gather(&mut self, batch: &Batch<'_>) {
        let matrix = &batch.matrix;
        self.candidates.clear();
        self.candidates.reserve_exact(batch.num_candidates());
        for (start, pool) in matrix.pools_with_start().filter(|(_, pool)| pool.gradient) {
            if let Candidates::Rows(rows) = pool.candidates {
                self.candidates.extend((0..rows.len()).map(|j| entry(rows.at(j), start + j)));
            }
        }
        self.own.clear();
        if let Some(negatives) = &matrix.row_negatives {
            self.own.reserve_exact(negatives.rows.len());
            let places = 0..negatives.rows.len();
            self.own.extend(places.filter_map(|place| Some(entry(negatives.by_index(place)?, place))));
        }
        self.pairs.clear();
        if let Positives::Rows(rows) = &batch.positives {
            self.pairs.extend(rows.iter().enumerate().map(|(pair, &row)| entry(row as usize, pair)));
        }
        let table_rows = matrix.table.as_ref().map_or(0, |table| table.shape.rows);
        for list in [&mut self.candidates, &mut self.own, &mut self.pairs] {
            sort_by_row(list, &mut self.sorted, table_rows);
        }
        self.rows.clear();
        if !is_whole(batch) {
            self.merge_rows();
        }
    }

    /// The rows that any of the lists names.
    fn merge_rows(&mut self) {
        let mut lists = [&self.candidates[..], &self.own, &self.pairs];
        while let Some(row) = lists.iter().filter_map(|list| list.first()).map(|&first| row_of(first)).min() {
            self.rows.push(row);
            for list in &mut lists {
                let uses = list.iter().take_while(|&&entry| row_of(entry) == row).count();
                *list = &list[uses..];
            }
        }
    }

    /// Bytes of the lists.
    pub(super) fn bytes(batch: &Batch<'_>) -> usize {
        let Some(table) = &batch.matrix.table else { return 0 };
        let uses = Self::most(batch);
        // The list of rows grows while they are counted, and so it doubles. The others are as long as they need to be; one
        // more is what the longest of them is sorted into.
        let rows = uses.min(table.shape.rows).next_power_of_two().max(4);
        2 * uses * size_of::<u64>() + 2 * rows * size_of::<u32>()
    }

    /// Bytes of a row-sparse gradient, at most.
    pub(super) fn gradient_bytes(batch: &Batch<'_>) -> usize {
        let rows = batch.matrix.table.as_ref().map_or(0, |table| table.shape.rows);
        Self::most(batch).min(rows) * (batch.dim() * size_of::<f32>() + size_of::<u32>())
    }

    /// The largest number of uses of rows.
    fn most(batch: &Batch<'_>) -> usize {
        let own = batch.matrix.row_negatives.map_or(0, |negatives| negatives.rows.len());
        batch.num_candidates() + own + batch.num_positives()
    }
}

/// Sorts a list whose lower halves ascend: digit by digit of the row, the least first, so that uses of one row stay in
/// their order (least-significant-digit radix sort).
fn sort_by_row(list: &mut [u64], sorted: &mut Vec<u64>, table_rows: usize) {
    const DIGIT: u32 = 11;
    sorted.clear();
    sorted.resize(list.len(), 0);
    let digit = |entry: u64, shift: u32| (entry >> shift) as usize % (1 << DIGIT);
    let row_bits = table_rows.next_power_of_two().ilog2();
    let (mut from, mut to) = (&mut *list, sorted.as_mut_slice());
    let digits = (32..32 + row_bits).step_by(DIGIT as usize);
    let odd = digits.len() % 2 == 1;
    for shift in digits {
        let mut places = [0usize; 1 << DIGIT];
        from.iter().for_each(|&entry| places[digit(entry, shift)] += 1);
        let mut start = 0;
        for place in &mut places {
            start += std::mem::replace(place, start);
        }
        for &entry in from.iter() {
            let place = &mut places[digit(entry, shift)];
            to[*place] = entry;
            *place += 1;
        }
        std::mem::swap(&mut from, &mut to);
    }
    if odd {
        list.copy_from_slice(sorted);
    }
}

/// Whether a pool with gradient is the whole table: then every row has a gradient.
fn is_whole(batch: &Batch<'_>) -> bool {
    let whole = |pool: &crate::problem::pool::Pool<'_>| matches!(pool.candidates, Candidates::WholeTable);
    batch.matrix.pools.iter().any(|pool| pool.gradient && whole(pool))
}

/// The part of an ascending list that names rows of a stretch.
fn within<'l>(list: &'l [u64], rows: &TableRows<'_>) -> &'l [u64] {
    let from = list.partition_point(|&entry| row_of(entry) < rows.at(0));
    let last = rows.at(rows.len() - 1);
    let to = from + list[from..].partition_point(|&entry| row_of(entry) <= last);
    &list[from..to]
}

/// The rows of a stretch, ascending.
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
    /// (R, D) gradients.
    d: Vec<f32>,
    /// (block_n, D) gradients of one tile's candidates.
    d_tile: Vec<f32>,
    /// Which row each candidate of a tile is.
    positions: Vec<u32>,
}

impl TableScratch {
    pub(super) fn bytes(block_n: usize, dim: usize) -> usize {
        block_n * (3 * dim * size_of::<f32>() + size_of::<f64>() + size_of::<u32>())
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
    uses: &'a TableUses,
}

impl Cpu {
    /// The gradient of the batch's table, from what `prepare`, `row_gradients` and `TableUses::gather` left in the
    /// workspace.
    pub(super) fn table_gradient(&mut self, batch: &Batch<'_>, loss: &Loss, d_positive: &[f64], out: TableOut<'_>) {
        let plan = plan::plan(batch, loss.symmetric, Request::value_and_grad());
        let (tiles, back, scratch) = self.workspace.back(self.arch, batch, loss, plan, d_positive);
        let (pairs, uses) = (&self.workspace.pairs, &self.workspace.table_uses);
        let job = TableJob { tiles, back, batch, pairs, uses };
        let stretches = job.stretches();
        let run = |outs: Vec<StretchOut<'_>>| {
            stretches.par_iter().zip(outs).for_each_init(
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
            return self.uses.rows.chunks(block).map(TableRows::Listed).collect();
        }
        let range = |start: usize| TableRows::Range(start as u32..(start + block).min(m) as u32);
        (0..m).step_by(block).map(range).collect()
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
        let (x, inverse_norm) = (table.units.as_mut_slice(), table.inverse_norm.as_mut_slice());
        self.tiles.arch.dispatch(Normalize { x, dim, similarity: self.tiles.similarity, inverse_norm });
    }

    /// Pools that are the whole table: the stretch is a tile of theirs.
    fn add_whole_pools(&self, scratch: &mut Scratch, table: &mut TableScratch, rows: &TableRows<'_>) {
        let dim = self.batch.dim();
        let mut add = false;
        for (p, (start, pool)) in self.batch.matrix.pools_with_start().enumerate() {
            if !pool.gradient || !matches!(pool.candidates, Candidates::WholeTable) {
                continue;
            }
            let first = rows.at(0) as usize;
            let tile = CandidateTile::new(Columns::Pool { pool: p, first, len: rows.len(), start: start + first });
            let unit = |column: usize| (&table.units[column * dim..(column + 1) * dim], table.inverse_norm[column]);
            self.tiles.load_units(scratch, &tile, unit);
            self.tiles.back_loaded(scratch, &tile, &self.back, &mut table.d, add);
            add = true;
        }
    }

    /// Pools by reference: tiles of the candidates that are rows of the stretch.
    fn add_pools_by_reference(&self, scratch: &mut Scratch, table: &mut TableScratch, rows: &TableRows<'_>) {
        let dim = self.batch.dim();
        for candidates in within(&self.uses.candidates, rows).chunks(self.tiles.plan.block_n) {
            let mut position = 0;
            table.positions.clear();
            table.positions.extend(candidates.iter().map(|&entry| {
                position = rows.position(row_of(entry), position);
                position as u32
            }));
            let tile = CandidateTile::new(Columns::ByRow(candidates));
            let TableScratch { units, inverse_norm, positions, d, d_tile } = &mut *table;
            let at = |column: usize| positions[column] as usize;
            let unit = |column: usize| (&units[at(column) * dim..(at(column) + 1) * dim], inverse_norm[at(column)]);
            self.tiles.load_units(scratch, &tile, unit);
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
        let TableJob { tiles, batch, pairs, uses, back } = self.job;
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
                    let bias = negatives.log_q.map_or(0.0, |log_q| -log_q[place] * std::f32::consts::LOG2_E);
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

#[cfg(test)]
mod tests {
    use super::{entry, sort_by_row};

    #[test]
    fn lists_are_sorted_whatever_the_number_of_rows() {
        for table_rows in [1usize, 2, 3, 2047, 2048, 2049, 1 << 22, (1 << 31) - 1] {
            let row = |i: usize| (i * 0x9e37_79b9) % table_rows;
            let mut list: Vec<u64> = (0..5000).map(|i| entry(row(i), i)).chain([entry(table_rows - 1, 5000)]).collect();
            let mut expected = list.clone();
            expected.sort_unstable();
            sort_by_row(&mut list, &mut Vec::new(), table_rows);
            assert!(list == expected, "{table_rows} rows");
        }
    }
}
