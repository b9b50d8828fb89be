//! A queue of past candidates as further negatives. `catalog_softmax/_queue.py` and `catalog_softmax/torch/_queue.py` have the
//! classes that Python's users see.

use catalog_softmax::negatives::{NegativeQueue, QueueOptions};
use catalog_softmax::{DType, Elements};
use numpy::{IntoPyArray, PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::arrays::{RawPool, pool};
use crate::errors::{no_option, raise};
use crate::numbers::signed;

/// Rows as they are in the queue: copies, in the order of its memory.
#[pyclass(module = "catalog_softmax._core")]
pub struct Queue(NegativeQueue);

type Rows<'py> = (Bound<'py, PyAny>, Option<Bound<'py, PyArray1<i64>>>, Option<Bound<'py, PyArray1<f32>>>);

#[pymethods]
impl Queue {
    #[new]
    fn new(capacity: usize, dim: usize, dtype: &str, ids: bool, log_q: bool, max_age: Option<u64>) -> PyResult<Self> {
        let dtype = match dtype {
            "float32" => DType::F32,
            "float16" => DType::F16,
            "bfloat16" => DType::Bf16,
            other => return Err(no_option("dtype", other, &["float32", "float16", "bfloat16"])),
        };
        let mut options = QueueOptions::new(capacity, dim, dtype);
        options = if ids { options.with_ids() } else { options };
        options = if log_q { options.with_log_q() } else { options };
        options = max_age.map_or(options, |age| options.with_max_age(age));
        NegativeQueue::new(options).map(Queue).map_err(raise)
    }

    fn enqueue(&mut self, py: Python<'_>, rows: RawPool) -> PyResult<()> {
        // SAFETY: the calling Python function holds the arrays until this call returns; the queue copies them.
        let rows = unsafe { pool(&rows, 0)? };
        py.detach(|| self.0.enqueue(&rows)).map_err(raise)
    }

    /// (capacity, dim, element type, ids, log_q, max_age)
    fn options(&self) -> (usize, usize, &'static str, bool, bool, Option<u64>) {
        let options = self.0.options();
        let dtype = match options.dtype() {
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
            _ => "float32",
        };
        (options.capacity(), options.dim(), dtype, options.keeps_ids(), options.keeps_log_q(), options.max_age())
    }

    /// (embeddings (L, D), ids (L), log_q (L)) of all rows. Elements of 16 bits come as uint16.
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Rows<'py>> {
        let (options, shape) = (self.0.options(), [self.0.len(), self.0.options().dim()]);
        let (mut single, mut half) = (Vec::new(), Vec::new());
        for pool in self.0.pools() {
            match pool.candidates().map(|candidates| candidates.elements()) {
                Some(Elements::F32(values)) => single.extend_from_slice(values),
                Some(Elements::F16(values)) => half.extend(values.iter().map(|value| value.to_bits())),
                Some(Elements::Bf16(values)) => half.extend(values.iter().map(|value| value.to_bits())),
                // The queue was made with one of those.
                _ => {}
            }
        }
        let embeddings = match options.dtype() {
            DType::F32 => single.into_pyarray(py).reshape(shape)?.into_any(),
            _ => half.into_pyarray(py).reshape(shape)?.into_any(),
        };
        let ids: Vec<i64> = self.0.ids().flat_map(signed).collect();
        let log_q: Vec<f32> = self.0.log_q().flatten().copied().collect();
        Ok((
            embeddings,
            options.keeps_ids().then(|| ids.into_pyarray(py)),
            options.keeps_log_q().then(|| log_q.into_pyarray(py)),
        ))
    }

    fn ages(&self, py: Python<'_>) -> Py<PyArray1<i64>> {
        signed(&self.0.ages().collect::<Vec<_>>()).into_pyarray(py).unbind()
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    #[staticmethod]
    fn from_bytes(bytes: &[u8]) -> PyResult<Self> {
        NegativeQueue::from_bytes(bytes).map(Queue).map_err(raise)
    }
}
