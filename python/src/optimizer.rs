//! Optimisers of a table in memory: `catalog_softmax.Optimizer` is around them.

use catalog_softmax::{Matrix, optimizer};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::arrays::{RawMatrix, RawSlice, matrix, slice};
use crate::errors::{no_option, raise};
use crate::extra::table_mut;
use crate::threads;

#[pyclass(module = "catalog_softmax._core")]
pub struct Optimizer(pub optimizer::Optimizer);

/// What a rule has beside its learning rate; None is the crate's own number.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct RawOptions {
    eps: Option<f64>,
    betas: Option<(f64, f64)>,
    weight_decay: Option<f64>,
    initial_accumulator: Option<f32>,
    rounding_seed: Option<u64>,
    /// (M, D): the embeddings that a master copy begins with.
    master_copy: Option<RawMatrix>,
}

#[pymethods]
impl Optimizer {
    #[new]
    fn new(rule: &str, rows: usize, dim: usize, learning_rate: f64, options: RawOptions) -> PyResult<Self> {
        let mut made = match rule {
            "sgd" => optimizer::Optimizer::sgd(learning_rate),
            "row_adagrad" => optimizer::Optimizer::row_adagrad(rows, learning_rate),
            "adam" => optimizer::Optimizer::adam(rows, dim, learning_rate),
            other => return Err(no_option("rule", other, &["sgd", "row_adagrad", "adam"])),
        }
        .map_err(raise)?;
        if let Some(eps) = options.eps {
            made = made.with_eps(eps).map_err(raise)?;
        }
        if let Some((beta1, beta2)) = options.betas {
            made = made.with_betas(beta1, beta2).map_err(raise)?;
        }
        if let Some(decay) = options.weight_decay {
            made = made.with_weight_decay(decay).map_err(raise)?;
        }
        if let Some(sum) = options.initial_accumulator {
            made = made.with_initial_accumulator(sum).map_err(raise)?;
        }
        if let Some(seed) = options.rounding_seed {
            made = made.with_rounding_seed(seed);
        }
        if let Some(raw) = &options.master_copy {
            // SAFETY: the calling Python function holds the array until this call returns; the optimiser copies it.
            made = made.with_master_copy(unsafe { matrix(raw, "master_copy")? }).map_err(raise)?;
        }
        Ok(Optimizer(made))
    }

    /// A step on all rows by a gradient (M, D), float32 and contiguous.
    fn step(&mut self, py: Python<'_>, table: RawMatrix, gradient: RawMatrix, threads: usize) -> PyResult<()> {
        let gradient = dense(&gradient, "gradient")?;
        // SAFETY: the calling Python function holds the table, which is writable, and nobody else uses it meanwhile; the gradient has
        // been copied.
        let mut table = unsafe { table_mut(&table, "table")? };
        let optimizer = &mut self.0;
        threads::run(py, threads, |_| optimizer.step(&mut table, &gradient))?.map_err(raise)
    }

    /// A step on the rows `rows` (U) int64 by their gradients (U, D), float32 and contiguous.
    fn step_rows(
        &mut self,
        py: Python<'_>,
        table: RawMatrix,
        rows: RawSlice,
        values: RawMatrix,
        threads: usize,
    ) -> PyResult<()> {
        let values = dense(&values, "values")?;
        // SAFETY: as in `step`; the rows are copied.
        let rows = unsafe { slice::<i64>(&rows, "rows")? };
        // What has no 32 bits is no row of a table either.
        let rows: Vec<u32> = rows.iter().map(|&row| u32::try_from(row).unwrap_or(u32::MAX)).collect();
        // SAFETY: as in `step`.
        let mut table = unsafe { table_mut(&table, "table")? };
        let optimizer = &mut self.0;
        threads::run(py, threads, |_| optimizer.step_rows(&mut table, &rows, &values))?.map_err(raise)
    }

    #[getter]
    fn learning_rate(&self) -> f64 {
        self.0.learning_rate()
    }

    #[setter]
    fn set_learning_rate(&mut self, learning_rate: f64) -> PyResult<()> {
        self.0.set_learning_rate(learning_rate).map_err(raise)
    }

    #[getter]
    fn steps(&self) -> u64 {
        self.0.steps()
    }

    /// G (M) of row-wise Adagrad, a copy.
    fn accumulator<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyArray1<f32>>> {
        Some(self.0.accumulator()?.to_vec().into_pyarray(py))
    }

    /// The master copy (M, D), copied.
    fn master_copy<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyArray2<f32>>>> {
        let master = self.0.master_copy();
        master.map(|master| master.values.clone().into_pyarray(py).reshape([master.rows, master.dim])).transpose()
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    #[staticmethod]
    fn from_bytes(bytes: &[u8]) -> PyResult<Self> {
        optimizer::Optimizer::from_bytes(bytes).map(Optimizer).map_err(raise)
    }
}

/// A copy of a contiguous float32 matrix.
fn dense(raw: &RawMatrix, argument: &str) -> PyResult<Matrix<f32>> {
    let RawMatrix(address, rows, dim, ..) = raw;
    // SAFETY: the calling Python function holds the array, of float32 and contiguous, until this call returns.
    let values = unsafe { slice::<f32>(&RawSlice(*address, rows.saturating_mul(*dim)), argument)? }.to_vec();
    Ok(Matrix { values, rows: *rows, dim: *dim })
}
