//! What options, tables and gradients have to be.

use super::Optimizer;
use super::rule::Rule;
use super::table_mut::{MOST_ROWS, TableMut};
use crate::error::{Result, does_not_apply, shape, value};
use crate::memory::zeroed;
use crate::problem::arrays::check_len;
use crate::problem::embeddings::{DType, Matrix};

pub(super) fn check_rate(learning_rate: f64) -> Result<()> {
    check_size("learning_rate", learning_rate)
}

pub(super) fn check_decay(weight_decay: f64) -> Result<()> {
    check_size("weight_decay", weight_decay)
}

pub(super) fn check_sum(sum: f32) -> Result<()> {
    check_size("initial_accumulator", f64::from(sum))
}

fn check_size(argument: &str, number: f64) -> Result<()> {
    let right = number >= 0.0 && (number as f32).is_finite();
    if right { Ok(()) } else { Err(value(argument, number, "finite and >= 0, as an f32")) }
}

pub(super) fn check_eps(eps: f64) -> Result<()> {
    let right = eps as f32 > 0.0 && (eps as f32).is_finite();
    if right { Ok(()) } else { Err(value("eps", eps, "finite and > 0, as an f32")) }
}

pub(super) fn check_beta(argument: &str, beta: f64) -> Result<()> {
    let right = beta >= 0.0 && (beta as f32) < 1.0;
    if right { Ok(()) } else { Err(value(argument, beta, "in [0, 1), as an f32")) }
}

/// A shape that a table may have.
pub(super) fn check_shape(rows: usize, dim: usize) -> Result<()> {
    if (1..=MOST_ROWS).contains(&rows) && dim >= 1 {
        return Ok(());
    }
    Err(shape("table", format!("shape ({rows}, {dim})"), "rows from 1 to 2^31 - 1 and dim >= 1"))
}

/// Zeros of a shape that an argument gives.
pub(super) fn state(rows: usize, dim: usize) -> Result<Vec<f32>> {
    check_shape(rows, dim)?;
    let zeros = rows.checked_mul(dim).and_then(zeroed);
    zeros.ok_or_else(|| shape("table", format!("shape ({rows}, {dim})"), "as much state as there is memory for"))
}

/// `rows` and `dim` are what the gradient should have, and `why` says what `rows` is.
pub(super) fn check_gradient(
    argument: &'static str,
    gradient: &Matrix<f32>,
    rows: usize,
    why: &str,
    dim: usize,
) -> Result<()> {
    if (gradient.rows, gradient.dim) != (rows, dim) {
        let found = format!("shape ({}, {})", gradient.rows, gradient.dim);
        return Err(shape(argument, found, format!("shape ({rows}, {dim}): {why}, and its dim")));
    }
    check_len(argument, gradient.values.len(), rows.saturating_mul(dim), "rows times dim")
}

pub(super) fn check_rows(rows: &[u32], table_rows: usize) -> Result<()> {
    if let Some(at) = rows.windows(2).position(|pair| pair[0] >= pair[1]) {
        return Err(value(format!("rows[{}]", at + 1), rows[at + 1], format!("above the one before, {}", rows[at])));
    }
    match rows.last() {
        Some(&last) if last as usize >= table_rows => {
            let at = rows.partition_point(|&row| (row as usize) < table_rows);
            Err(value(format!("rows[{at}]"), rows[at], format!("below the number of rows, {table_rows}")))
        }
        _ => Ok(()),
    }
}

impl Optimizer {
    pub(crate) fn check_table(&self, table: &TableMut<'_>) -> Result<()> {
        table.check("table")?;
        self.check_state(table.rows(), table.dim())?;
        let Some(master) = &self.master else { return Ok(()) };
        if table.dtype() == DType::F32 {
            return Err(does_not_apply("master_copy", "f16 and bf16 tables have one"));
        }
        check_same((table.rows(), table.dim()), (master.rows, master.dim), "the master copy")
    }

    /// Whether the state is that of a table of this shape.
    pub(super) fn check_state(&self, rows: usize, dim: usize) -> Result<()> {
        match &self.rule {
            Rule::Sgd => Ok(()),
            Rule::RowAdagrad { accumulator, .. } => check_same((rows, dim), (accumulator.len(), dim), "the state"),
            Rule::Adam { dim: of_state, m, .. } => {
                check_same((rows, dim), (m.len() / of_state, *of_state), "the state")
            }
        }
    }
}

fn check_same(found: (usize, usize), expected: (usize, usize), whose: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(shape("table", format!("shape {found:?}"), format!("shape {expected:?}, that of {whose}")))
}
