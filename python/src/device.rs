//! Steps on device memory: addresses in, and addresses where results go. Of whom the memory is, these functions do not know: the
//! callers are `catalog_softmax/_device.py` for every array library, and through it `catalog_softmax/torch/_cuda.py`.
//!
//! Calls return before the device has done the work, unless they say otherwise.

use catalog_softmax::cuda::{
    Cuda, DeviceBatch, DeviceElement, DeviceEmbeddings, DeviceGradients, DeviceMoments, DeviceOutput, DevicePool,
    DeviceRank, DeviceSearch, DeviceSlice, DeviceSliceMut, DeviceTableGradient, DeviceTopK, DeviceUpstream,
};
use catalog_softmax::{Loss, Request};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arrays::{RawBatch, RawMatrix, RawPool, RawSlice};
use crate::extra::RawExtra;
use crate::loss::{RawLoss, similarity_of};
use crate::threads::{Place, run_on_device};

/// Where gradients go: d_queries, d_candidates of each pool or None, d_positive_embeddings, float32 each, d_temperature, (1)
/// float64, and d_table.
#[derive(FromPyObject)]
pub struct RawGradients(RawSlice, Vec<Option<RawSlice>>, Option<RawSlice>, Option<RawSlice>, Option<RawTableGradient>);

/// (M, D) float32; or with places for the rows (U), int32, and for their number, (1) int64, the gradients (U, D) of these.
#[derive(FromPyObject)]
pub struct RawTableGradient(RawSlice, Option<(RawSlice, RawSlice)>);

/// Where a step's results go, by name: (B) float64 each, but for `total`, (1), and int64 where it counts. What is None is not
/// computed.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct RawOutput {
    total: RawSlice,
    #[pyo3(default)]
    loss: Option<RawSlice>,
    #[pyo3(default)]
    probability: Option<RawSlice>,
    #[pyo3(default)]
    lse: Option<RawSlice>,
    #[pyo3(default)]
    positive: Option<RawSlice>,
    #[pyo3(default)]
    num_negatives: Option<RawSlice>,
    #[pyo3(default)]
    expected_score: Option<RawSlice>,
    #[pyo3(default)]
    entropy: Option<RawSlice>,
    #[pyo3(default)]
    above: Option<RawSlice>,
    #[pyo3(default)]
    ties: Option<RawSlice>,
    #[pyo3(default)]
    d_lse: Option<RawSlice>,
    /// (P) float64
    #[pyo3(default)]
    d_positive: Option<RawSlice>,
    /// (B, D) float32
    #[pyo3(default)]
    expected_negative: Option<RawSlice>,
    #[pyo3(default)]
    gradients: Option<RawGradients>,
}

// SAFETY (of all the functions that make views of addresses): from Python, the callers hold the arrays until the call returns, have
// checked their types, shapes and devices, and pass the stream that the arrays are used on. Memory that is freed after the call is
// freed in the order of that stream, by PyTorch's allocator or by `DeviceArray`.

/// # Safety
/// As [`DeviceSlice::from_raw`].
pub unsafe fn read<'a, T>(RawSlice(address, len): &RawSlice) -> DeviceSlice<'a, T> {
    // SAFETY: handed on.
    unsafe { DeviceSlice::from_raw(*address as u64, *len) }
}

/// # Safety
/// As [`DeviceSliceMut::from_raw`].
unsafe fn write<'a, T>(RawSlice(address, len): &RawSlice) -> DeviceSliceMut<'a, T> {
    // SAFETY: handed on.
    unsafe { DeviceSliceMut::from_raw(*address as u64, *len) }
}

/// # Safety
/// As [`write`].
unsafe fn place<'a, T>(raw: &Option<RawSlice>) -> Option<DeviceSliceMut<'a, T>> {
    // SAFETY: handed on.
    raw.as_ref().map(|raw| unsafe { write(raw) })
}

/// # Safety
/// As [`read`].
pub unsafe fn matrix<'a>(raw: &RawMatrix, argument: &str) -> PyResult<DeviceEmbeddings<'a>> {
    let RawMatrix(_, rows, dim, stride, dtype) = raw;
    let span = rows.checked_sub(1).map_or(Some(0), |full| full.checked_mul(*stride)?.checked_add(*dim));
    let span = span.filter(|span| *span <= isize::MAX as usize / size_of::<f32>());
    let Some(span) = span else {
        let found = format!("{rows} rows, {stride} elements apart");
        return Err(PyValueError::new_err(format!("{argument} has {found}; rule: no larger than memory")));
    };
    /// # Safety
    /// As [`read`].
    unsafe fn of<'a, T: DeviceElement + 'a>(raw: &RawMatrix, span: usize) -> DeviceEmbeddings<'a> {
        // SAFETY: handed on.
        let elements = unsafe { read::<T>(&RawSlice(raw.0, span)) };
        DeviceEmbeddings::new(elements, raw.1, raw.2).with_stride(raw.3)
    }
    // SAFETY: the caller's promise, of the type that it named.
    unsafe {
        match dtype.as_str() {
            "float32" => Ok(of::<f32>(raw, span)),
            "float16" => Ok(of::<f16>(raw, span)),
            "bfloat16" => Ok(of::<bf16>(raw, span)),
            other => {
                let rule = "float32, float16 or bfloat16";
                Err(PyValueError::new_err(format!("{argument} has elements of type {other}; rule: {rule}")))
            }
        }
    }
}

/// # Safety
/// As [`read`].
pub unsafe fn pool<'a>(RawPool(candidates, ids, log_q, gradient): &RawPool, p: usize) -> PyResult<DevicePool<'a>> {
    // SAFETY: handed on.
    unsafe {
        let mut pool = DevicePool::new(matrix(candidates, &format!("candidates[{p}]"))?);
        if let Some(ids) = ids {
            pool = pool.ids(read(ids));
        }
        if let Some(log_q) = log_q {
            pool = pool.log_q(read(log_q));
        }
        Ok(if *gradient { pool } else { pool.without_gradient() })
    }
}

/// # Safety
/// As [`read`], of all that the batch names.
unsafe fn pools<'a>(raw: &RawBatch) -> PyResult<(DeviceEmbeddings<'a>, DevicePool<'a>, Vec<DevicePool<'a>>)> {
    // SAFETY: handed on.
    let (queries, pools) = unsafe {
        let pools = raw.1.iter().enumerate().map(|(p, raw)| pool(raw, p));
        (matrix(&raw.0, "queries")?, pools.collect::<PyResult<Vec<_>>>()?)
    };
    let mut pools = pools.into_iter();
    let rule = "candidates is a list of no pools; rule: one pool at least";
    let first = pools.next().ok_or_else(|| PyValueError::new_err(rule))?;
    Ok((queries, first, pools.collect()))
}

/// # Safety
/// As [`pools`]. Positives are int32 here.
unsafe fn batch<'a>(raw: &RawBatch, extra: &Option<RawExtra>) -> PyResult<DeviceBatch<'a>> {
    // SAFETY: handed on.
    unsafe {
        let over_table = extra.as_ref().map(|extra| extra.device_batch(raw)).transpose()?.flatten();
        let mut batch = match over_table {
            Some(batch) => batch,
            None => {
                let (queries, first, others) = pools(raw)?;
                DeviceBatch::new(queries, first).pools(others)
            }
        };
        if let Some(extra) = extra {
            batch = extra.with_positives(batch);
        }
        if let Some(positives) = &raw.2 {
            batch = batch.positives(read(positives));
        }
        if let Some(embeddings) = &raw.3 {
            batch = batch.positive_embeddings(matrix(embeddings, "positive_embeddings")?);
        }
        if let Some(ids) = &raw.4 {
            batch = batch.positive_ids(read(ids));
        }
        if let Some(log_q) = &raw.5 {
            batch = batch.positive_log_q(read(log_q));
        }
        if let Some((offsets, ids)) = &raw.6 {
            batch = batch.excluded_ids(read(offsets), read(ids));
        }
        if let Some(weight) = &raw.7 {
            batch = batch.row_weight(read(weight));
        }
        Ok(batch)
    }
}

/// # Safety
/// As [`pools`].
unsafe fn search<'a>(raw: &RawBatch) -> PyResult<DeviceSearch<'a>> {
    // SAFETY: handed on.
    unsafe {
        let (queries, first, others) = pools(raw)?;
        let mut search = DeviceSearch::new(queries, first);
        for pool in others {
            search = search.pool(pool);
        }
        Ok(match &raw.6 {
            Some((offsets, ids)) => search.excluded_ids(read(offsets), read(ids)),
            None => search,
        })
    }
}

impl RawGradients {
    /// # Safety
    /// As [`write`].
    unsafe fn places<'a>(&self) -> DeviceGradients<'a> {
        // SAFETY: handed on.
        unsafe {
            let pools = self.1.iter().map(|raw| place(raw)).collect();
            let mut gradients = DeviceGradients::new(write(&self.0), pools);
            gradients.d_positive_embeddings = place(&self.2);
            gradients.d_temperature = place(&self.3);
            gradients.d_table = self.4.as_ref().map(|RawTableGradient(values, rows)| match rows {
                None => DeviceTableGradient::Dense(write(values)),
                Some((rows, num_rows)) => DeviceTableGradient::RowSparse {
                    rows: write(rows),
                    values: write(values),
                    num_rows: write(num_rows),
                },
            });
            gradients
        }
    }
}

impl RawOutput {
    /// # Safety
    /// As [`write`].
    unsafe fn places<'a>(&self) -> DeviceOutput<'a> {
        // SAFETY: handed on.
        unsafe {
            let mut output = DeviceOutput::new(write(&self.total));
            output.loss = place(&self.loss);
            output.probability = place(&self.probability);
            output.lse = place(&self.lse);
            output.positive = place(&self.positive);
            output.num_negatives = place(&self.num_negatives);
            if let (Some(expected_score), Some(entropy)) = (place(&self.expected_score), place(&self.entropy)) {
                output.moments = Some(DeviceMoments { expected_score, entropy });
            }
            if let (Some(above), Some(ties)) = (place(&self.above), place(&self.ties)) {
                output.rank = Some(DeviceRank { above, ties });
            }
            output.d_lse = place(&self.d_lse);
            output.d_positive = place(&self.d_positive);
            output.expected_negative = place(&self.expected_negative);
            output.gradients = self.gradients.as_ref().map(|gradients| gradients.places());
            output
        }
    }
}

fn filtered(loss: &RawLoss, extra: &Option<RawExtra>) -> PyResult<Loss> {
    let loss = loss.loss()?;
    extra.as_ref().map_or(Ok(loss), |extra| extra.filtered(loss))
}

/// Bytes that `device_compute` and `device_gradients` work in. `requested`: gradients or expected negatives, moments, ranks.
#[pyfunction]
pub fn device_plan(
    py: Python<'_>,
    place: Place,
    raw: RawBatch,
    extra: Option<RawExtra>,
    loss: RawLoss,
    requested: (bool, bool, bool),
) -> PyResult<usize> {
    let (loss, (gradients, moments, rank)) = (filtered(&loss, &extra)?, requested);
    // SAFETY: nothing is read.
    let batch = unsafe { batch(&raw, &extra)? };
    let mut request = if gradients { Request::value_and_grad() } else { Request::value() };
    (request.moments, request.rank) = (moments, rank);
    run_on_device(py, place, |cuda| Ok(cuda.plan_on_device(&batch, &loss, request)?.workspace_bytes))
}

/// A step, in `workspace` or in memory of the package's own.
#[pyfunction]
pub fn device_compute(
    py: Python<'_>,
    place: Place,
    workspace: Option<RawSlice>,
    raw: RawBatch,
    extra: Option<RawExtra>,
    loss: RawLoss,
    output: RawOutput,
) -> PyResult<()> {
    let loss = filtered(&loss, &extra)?;
    // SAFETY: above.
    let (batch, mut output, workspace) = unsafe { (batch(&raw, &extra)?, output.places(), self::place(&workspace)) };
    output.workspace = workspace;
    run_on_device(py, place, |cuda| cuda.compute_on_device(&batch, &loss, &mut output))
}

/// The stream back. `upstream`: lse, num_negatives, expected negatives, derivatives by lse and by positive.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "each is one thing that the step takes")]
pub fn device_gradients(
    py: Python<'_>,
    place: Place,
    workspace: Option<RawSlice>,
    raw: RawBatch,
    extra: Option<RawExtra>,
    loss: RawLoss,
    upstream: (RawSlice, RawSlice, RawSlice, RawSlice, RawSlice),
    gradients: RawGradients,
) -> PyResult<()> {
    let loss = filtered(&loss, &extra)?;
    // SAFETY: above.
    let (batch, mut gradients, workspace, upstream) = unsafe {
        let upstream = DeviceUpstream {
            lse: read(&upstream.0),
            num_negatives: read(&upstream.1),
            expected_negative: read(&upstream.2),
            d_lse: read(&upstream.3),
            d_positive: read(&upstream.4),
        };
        (batch(&raw, &extra)?, gradients.places(), self::place(&workspace), upstream)
    };
    gradients.workspace = workspace;
    run_on_device(py, place, |cuda| cuda.gradients_on_device(&batch, &loss, &upstream, &mut gradients))
}

/// Bytes that `device_top_k` works in.
#[pyfunction]
pub fn device_plan_top_k(py: Python<'_>, place: Place, raw: RawBatch, similarity: &str, k: usize) -> PyResult<usize> {
    let similarity = similarity_of(similarity)?;
    // SAFETY: nothing is read.
    let search = unsafe { search(&raw)? };
    run_on_device(py, place, |cuda| Ok(cuda.plan_top_k_on_device(&search, similarity, k)?.workspace_bytes))
}

/// (B, K) int32 indices, unsigned with all ones for none, and float32 similarities.
#[pyfunction]
pub fn device_top_k(
    py: Python<'_>,
    place: Place,
    workspace: Option<RawSlice>,
    raw: RawBatch,
    similarity: &str,
    k: usize,
    output: (RawSlice, RawSlice),
) -> PyResult<()> {
    let similarity = similarity_of(similarity)?;
    // SAFETY: above.
    let (search, mut top) = unsafe {
        let (indices, scores) = (write(&output.0), write(&output.1));
        (search(&raw)?, DeviceTopK { indices, scores, workspace: self::place(&workspace) })
    };
    run_on_device(py, place, |cuda| cuda.top_k_on_device(&search, similarity, k, &mut top))
}

/// Bytes that `device_hardest_negatives` works in.
#[pyfunction]
pub fn device_plan_hardest_negatives(
    py: Python<'_>,
    place: Place,
    raw: RawBatch,
    extra: Option<RawExtra>,
    similarity: &str,
    k: usize,
) -> PyResult<usize> {
    let similarity = similarity_of(similarity)?;
    // SAFETY: nothing is read.
    let batch = unsafe { batch(&raw, &extra)? };
    let plan = |cuda: &mut Cuda| cuda.plan_hardest_negatives_on_device(&batch, similarity, k);
    run_on_device(py, place, |cuda| Ok(plan(cuda)?.workspace_bytes))
}

/// As `device_top_k`, among each row's negatives.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "each is one thing that the search takes")]
pub fn device_hardest_negatives(
    py: Python<'_>,
    place: Place,
    workspace: Option<RawSlice>,
    raw: RawBatch,
    extra: Option<RawExtra>,
    similarity: &str,
    k: usize,
    output: (RawSlice, RawSlice),
) -> PyResult<()> {
    let similarity = similarity_of(similarity)?;
    // SAFETY: above.
    let (batch, mut top) = unsafe {
        let (indices, scores) = (write(&output.0), write(&output.1));
        (batch(&raw, &extra)?, DeviceTopK { indices, scores, workspace: self::place(&workspace) })
    };
    run_on_device(py, place, |cuda| cuda.hardest_negatives_on_device(&batch, similarity, k, &mut top))
}

/// Waits for the stream. The first bad value since the last call that only the device saw, if there was one, as an error.
#[pyfunction]
pub fn device_fault(py: Python<'_>, place: Place) -> PyResult<()> {
    run_on_device(py, place, |cuda: &mut Cuda| cuda.fault())
}
