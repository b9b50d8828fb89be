//! A step on a stretch of rows: the one place where rows, their state and their master copy change. Dense and
//! row-sparse gradients go through it, and so does a backend that steps tile by tile.

use std::ops::Range;

use super::rounding::{COLUMNS, Half, RowBits, StepBits};
use super::rule::RuleRows;
use super::table_mut::{ElementsMut, TableMut};

/// Rows `rows()` of a table with their state, borrowed for one step. Two stretches share nothing, so threads can step
/// them at the same time. Rows are counted from the start of the table.
#[derive(Debug)]
pub(crate) struct Stretch<'o> {
    pub(super) first: usize,
    pub(super) table: TableMut<'o>,
    pub(super) rule: RuleRows<'o>,
    /// (rows, D)
    pub(super) master: Option<&'o mut [f32]>,
    /// `1 − learning_rate · weight_decay`
    pub(super) decay: f32,
    pub(super) bits: StepBits,
}

impl<'o> Stretch<'o> {
    /// The rows of this stretch.
    #[cfg(test)]
    pub(crate) fn rows(&self) -> Range<usize> {
        self.first..self.first + self.table.rows()
    }

    /// The rows before `row` and those from `row` on, which is one of `rows()` or their end.
    pub(crate) fn split_at(self, row: usize) -> (Stretch<'o>, Stretch<'o>) {
        let Stretch { first, table, rule, master, decay, bits } = self;
        let (dim, here) = (table.dim(), row - first);
        let (table, table_below) = table.split_at_row(here);
        let (rule, rule_below) = rule.split_at(here, dim);
        let (master, master_below) = master.map(|master| master.split_at_mut(here * dim)).unzip();
        (
            Stretch { first, table, rule, master, decay, bits },
            Stretch { first: row, table: table_below, rule: rule_below, master: master_below, decay, bits },
        )
    }

    /// Copies `row` into `out`, widened: what a batch sees of it, and not its master copy.
    pub(crate) fn widen_row(&self, row: usize, out: &mut [f32]) {
        self.table.view().widen_row(row - self.first, out);
    }

    /// Steps one row by its gradient (D), once in a step at most.
    pub(crate) fn step_row(&mut self, row: usize, gradient: &[f32]) {
        let Stretch { first, table, rule, master, decay, bits } = self;
        let here = row - *first;
        let (stride, dim) = (table.stride(), table.dim());
        let elements = here * stride..here * stride + dim;
        let master = master.as_deref_mut().map(|master| &mut master[here * dim..(here + 1) * dim]);
        let mut rule = rule.row(here, gradient);
        let mut step = |columns: Range<usize>, w: &mut [f32]| {
            rule.step(*decay, columns.clone(), w, &gradient[columns]);
        };
        match &mut table.elements {
            ElementsMut::F32(v) => step(0..dim, &mut v[elements]),
            ElementsMut::F16(v) => step_half(&mut v[elements], master, bits.row(row), step),
            ElementsMut::Bf16(v) => step_half(&mut v[elements], master, bits.row(row), step),
        }
    }
}

fn step_half<H: Half>(
    row: &mut [H],
    master: Option<&mut [f32]>,
    random: RowBits,
    mut step: impl FnMut(Range<usize>, &mut [f32]),
) {
    if let Some(master) = master {
        step(0..row.len(), master);
        return H::narrow(master, row);
    }
    let mut wide = [0f32; COLUMNS];
    for first in (0..row.len()).step_by(COLUMNS) {
        let columns = first..row.len().min(first + COLUMNS);
        let (row, wide) = (&mut row[columns.clone()], &mut wide[..columns.len()]);
        H::widen(row, wide);
        step(columns, wide);
        H::round(wide, row, random, first);
    }
}
