//! What a batch may have beside the arrays of `RawBatch`: a table with what names its rows, several positives for a row, and the
//! filter of false negatives.

use std::ops::Range;

use catalog_softmax::optimizer::{ElementsMut, TableMut};
use catalog_softmax::{Batch, DType, Loss, Pool, RowNegatives, Table};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arrays::{RawBatch, RawMatrix, RawSlice, matrix, pool, slice};
use crate::errors::raise;

/// By name. Rows are int64, in device memory int32; ids and offsets are int64, and everything else float32.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct RawExtra {
    /// (M, D)
    pub table: Option<RawMatrix>,
    pub table_ids: Option<RawSlice>,
    pub table_gradient: bool,
    /// Pools by reference, each with its log_q. Rows of None are the whole table.
    pub candidate_rows: Vec<(Option<RawSlice>, Option<RawSlice>)>,
    /// (B, K), K, and log_q (B, K).
    pub row_negatives: Option<(RawSlice, usize, Option<RawSlice>)>,
    pub positive_offsets: Option<RawSlice>,
    pub positive_weight: Option<RawSlice>,
    pub false_negative_margin: Option<f64>,
    pub false_negative_ratio: Option<f64>,
}

impl RawExtra {
    /// The loss with the filter.
    pub fn filtered(&self, loss: Loss) -> PyResult<Loss> {
        match (self.false_negative_margin, self.false_negative_ratio) {
            (Some(margin), Some(ratio)) => Err(PyValueError::new_err(format!(
                "false_negative_margin is {margin} and false_negative_ratio is {ratio}; rule: one of them at most"
            ))),
            (Some(margin), None) => Ok(loss.false_negative_margin(margin)),
            (None, Some(ratio)) => Ok(loss.false_negative_ratio(ratio)),
            (None, None) => Ok(loss),
        }
    }

    /// # Safety
    /// As [`slice`], of the table's elements, unless only their shape is wanted.
    unsafe fn table<'a>(&self, shape_only: bool) -> PyResult<Option<Table<'a>>> {
        let Some(raw) = &self.table else { return Ok(None) };
        let mut table = if shape_only {
            Table::of_shape(raw.1, raw.2, dtype(raw)?)
        } else {
            // SAFETY: handed on.
            Table::new(unsafe { matrix(raw, "table")? })
        };
        if let Some(ids) = &self.table_ids {
            // SAFETY: handed on.
            table = table.ids(unsafe { slice::<i64>(ids, "table_ids")? });
        }
        Ok(Some(if self.table_gradient { table } else { table.without_gradient() }))
    }

    /// The table for a step that writes it.
    ///
    /// # Safety
    /// As [`slice`], and nobody reads the table's elements while the result is used. That no array of `batch` lies in the same memory
    /// is checked.
    pub unsafe fn table_mut<'a>(&self, batch: &RawBatch) -> PyResult<TableMut<'a>> {
        let Some(raw) = &self.table else {
            return Err(PyValueError::new_err("table is missing; rule: update steps it"));
        };
        let written = range(raw);
        for (argument, read) in self.ranges(batch) {
            if read.start < written.end && written.start < read.end {
                return Err(PyValueError::new_err(format!(
                    "{argument} is in the memory of table; rule: memory of its own, because the step writes the table"
                )));
            }
        }
        // SAFETY: handed on; no other array of the call is in that memory, as was just checked.
        unsafe { table_mut(raw, "table") }
    }

    /// Where the arrays of a call are, the table aside.
    fn ranges<'r>(&'r self, batch: &'r RawBatch) -> impl Iterator<Item = (&'static str, Range<usize>)> + 'r {
        let pools = batch.1.iter().map(|pool| ("candidates", &pool.0));
        let matrices =
            pools.chain([("queries", &batch.0)]).chain(batch.3.iter().map(|raw| ("positive_embeddings", raw)));
        let of_pools = batch.1.iter().flat_map(|pool| [("candidate_ids", &pool.1, 8), ("log_q", &pool.2, 4)]);
        let of_rows =
            self.candidate_rows.iter().flat_map(|(rows, log_q)| [("candidate_rows", rows, 8), ("log_q", log_q, 4)]);
        let own = [
            ("table_ids", &self.table_ids, 8),
            ("positive_offsets", &self.positive_offsets, 8),
            ("positive_weight", &self.positive_weight, 4),
            ("positives", &batch.2, 8),
            ("positive_ids", &batch.4, 8),
            ("positive_log_q", &batch.5, 4),
            ("row_weight", &batch.7, 4),
        ];
        let slices =
            of_pools.chain(of_rows).chain(own).filter_map(|(name, raw, size)| Some((name, raw.as_ref()?, size)));
        let negatives = self.row_negatives.iter().flat_map(|(rows, _, log_q)| {
            [Some(("row_negatives", rows, 8)), log_q.as_ref().map(|log_q| ("row_negatives_log_q", log_q, 4))]
        });
        let excluded = batch.6.iter().flat_map(|(offsets, ids)| [("excluded[0]", offsets, 8), ("excluded[1]", ids, 8)]);
        let slices = slices.chain(negatives.flatten()).chain(excluded);
        let slices = slices.map(|(name, raw, size)| (name, raw.0..raw.0.saturating_add(raw.1.saturating_mul(size))));
        matrices.map(|(name, raw)| (name, range(raw))).chain(slices)
    }
}

impl RawBatch {
    /// The crate's batch of these arrays and of what there is beside them, which checks everything else. With `shape_only` it has the
    /// shape of its table and not the elements.
    ///
    /// # Safety
    /// As [`slice`], of all that the two name, for the lifetime that the caller chooses.
    pub unsafe fn batch_with<'a>(&self, extra: &RawExtra, shape_only: bool) -> PyResult<Batch<'a>> {
        // SAFETY: handed on.
        unsafe {
            let mut builder = match extra.table(shape_only)? {
                Some(table) => {
                    let builder = Batch::of_table(matrix(&self.0, "queries")?, table);
                    let own = self.1.iter().enumerate().map(|(p, raw)| pool(raw, p)).collect::<PyResult<Vec<_>>>()?;
                    builder.pools(own)
                }
                None => self.builder(self.2.is_none() && self.3.is_none())?,
            };
            for (p, (rows, log_q)) in extra.candidate_rows.iter().enumerate() {
                let mut of_rows = match rows {
                    Some(rows) => Pool::rows(slice::<i64>(rows, &format!("candidate_rows[{p}]"))?),
                    None => Pool::whole_table(),
                };
                if let Some(log_q) = log_q {
                    of_rows = of_rows.log_q(slice(log_q, &format!("log_q[{}]", self.1.len() + p))?);
                }
                builder = builder.pool(of_rows);
            }
            if let Some((rows, per_row, log_q)) = &extra.row_negatives {
                let mut negatives = RowNegatives::new(slice::<i64>(rows, "row_negatives")?, *per_row);
                if let Some(log_q) = log_q {
                    negatives = negatives.log_q(slice(log_q, "row_negatives_log_q")?);
                }
                builder = builder.row_negatives(negatives);
            }
            if let Some(offsets) = &extra.positive_offsets {
                builder = builder.positive_offsets(slice(offsets, "positive_offsets")?);
            }
            if let Some(weight) = &extra.positive_weight {
                builder = builder.positive_weight(slice(weight, "positive_weight")?);
            }
            self.with_columns(builder)?.build().map_err(raise)
        }
    }
}

fn dtype(RawMatrix(.., dtype): &RawMatrix) -> PyResult<DType> {
    match dtype.as_str() {
        "float32" => Ok(DType::F32),
        "float16" => Ok(DType::F16),
        "bfloat16" => Ok(DType::Bf16),
        other => Err(PyValueError::new_err(format!(
            "table has elements of type {other}; rule: float32, float16 or bfloat16"
        ))),
    }
}

/// Elements from the first of a matrix to behind its last.
fn span(RawMatrix(_, rows, dim, stride, _): &RawMatrix) -> usize {
    rows.checked_sub(1).map_or(Some(0), |full| full.checked_mul(*stride)?.checked_add(*dim)).unwrap_or(usize::MAX)
}

fn range(raw: &RawMatrix) -> Range<usize> {
    let size = if raw.4 == "float32" { 4 } else { 2 };
    raw.0..raw.0.saturating_add(span(raw).saturating_mul(size))
}

/// # Safety
/// As [`slice`], and nobody else reads or writes the elements while the result is used.
pub unsafe fn table_mut<'a>(raw: &RawMatrix, argument: &str) -> PyResult<TableMut<'a>> {
    /// # Safety
    /// As [`table_mut`].
    unsafe fn elements<'a, T>(raw: &RawMatrix, argument: &str) -> PyResult<ElementsMut<'a>>
    where
        T: 'a,
        &'a mut [T]: Into<ElementsMut<'a>>,
    {
        // Checks the address.
        // SAFETY: handed on.
        let checked: &[T] = unsafe { slice(&RawSlice(raw.0, span(raw)), argument)? };
        let (address, len) =
            if checked.is_empty() { (std::ptr::dangling_mut(), 0) } else { (raw.0 as *mut T, checked.len()) };
        // SAFETY: not null, aligned, and no larger than memory, as was just checked; `checked` is used no more, and nobody else has a
        // reference to these elements, as the caller promises.
        Ok(unsafe { std::slice::from_raw_parts_mut(address, len) }.into())
    }
    // SAFETY: handed on, of the type that the caller named.
    let elements = unsafe {
        match dtype(raw)? {
            DType::F16 => elements::<f16>(raw, argument)?,
            DType::Bf16 => elements::<bf16>(raw, argument)?,
            _ => elements::<f32>(raw, argument)?,
        }
    };
    Ok(TableMut::new(elements, raw.1, raw.2).with_stride(raw.3))
}
