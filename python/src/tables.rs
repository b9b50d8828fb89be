//! The functions of `loss.rs` for batches with a `RawExtra`, and the optimiser's step in place of a table's gradient.

use catalog_softmax::{
    Backend, Batch, Cpu, Epilogue, Gradients, Loss, Matrix, Output, Real, Reference, Request, RowStatistics,
    TableGradient, TopK,
};
use numpy::{IntoPyArray, PyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arrays::{RawBatch, RawSlice, slice};
use crate::errors::raise;
use crate::extra::RawExtra;
use crate::loss::{
    Column, GradientsOut, RawLoss, StatisticsOut, TopKOut, gradients_out, matrix, request, similarity_of,
    statistics_out, table, top_k_out, weighted,
};
use crate::optimizer::Optimizer;
use crate::threads;

type Rows<'py, T> = Bound<'py, PyArray2<T>>;
type ForwardOut<'py, T = f32> = (f64, Column<'py, f64>, Rows<'py, f64>, Rows<'py, f64>, Option<Rows<'py, T>>);

/// The loss, forward: (total, loss of each row with its weight, rows (3, B), pairs (2, P), expected negative). Rows are lse,
/// num_negatives and the derivative of the total by lse, pairs positive and the derivative by it. The expected negative (B, D) is there
/// where `gradients` are wanted later.
#[pyfunction]
pub fn table_forward<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    gradients: bool,
    threads: usize,
) -> PyResult<ForwardOut<'py>> {
    let loss = extra.filtered(loss.loss()?)?;
    // SAFETY: the calling Python function holds the arrays until this call returns, and nothing borrowed is in the result.
    let (checked, weight) = unsafe { (batch.batch_with(&extra, false)?, batch.row_weight()?) };
    let found = threads::run(py, threads, |cpu| loss_of(cpu, &checked, &loss, gradients))?;
    forward_out(py, weight, found.map_err(raise)?)
}

/// The same in float64 throughout, for `torch.autograd.gradcheck` in the tests.
#[pyfunction]
pub fn reference_table_forward<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    gradients: bool,
) -> PyResult<ForwardOut<'py, f64>> {
    let loss = extra.filtered(loss.loss()?)?;
    // SAFETY: as in `table_forward`.
    let (checked, weight) = unsafe { (batch.batch_with(&extra, false)?, batch.row_weight()?) };
    let found = loss_of(&mut Reference::new(), &checked, &loss, gradients);
    forward_out(py, weight, found.map_err(raise)?)
}

fn loss_of<B: Backend>(
    backend: &mut B,
    batch: &Batch<'_>,
    whole: &Loss,
    gradients: bool,
) -> catalog_softmax::Result<(RowStatistics<B::Real>, Epilogue)> {
    let request = request(gradients, false, false);
    let mut loss = *whole;
    loss.symmetric = false;
    backend.plan(batch, whole, request)?;
    let statistics = backend.statistics(batch, &loss, request)?;
    let epilogue = loss.epilogue(batch, &statistics)?;
    Ok((statistics, epilogue))
}

fn forward_out<'py, T: numpy::Element>(
    py: Python<'py>,
    weight: Option<&[f32]>,
    (statistics, epilogue): (RowStatistics<T>, Epilogue),
) -> PyResult<ForwardOut<'py, T>> {
    let (b, pairs) = (statistics.lse.len(), statistics.positive.len());
    let counts = statistics.num_negatives.iter().map(|&n| n as f64);
    let rows = statistics.lse.iter().copied().chain(counts).chain(epilogue.d_lse).collect();
    let of_pairs = statistics.positive.into_iter().chain(epilogue.d_positive).collect();
    Ok((
        epilogue.total,
        weighted(epilogue.loss, weight).into_pyarray(py),
        table(py, rows, 3, b)?,
        table(py, of_pairs, 2, pairs)?,
        statistics.expected_negative.map(|o| matrix(py, o)).transpose()?,
    ))
}

/// As `statistics`.
#[pyfunction]
pub fn table_statistics<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    requested: (bool, bool, bool),
    threads: usize,
) -> PyResult<StatisticsOut<'py>> {
    let (loss, (gradients, moments, rank)) = (extra.filtered(loss.loss()?)?, requested);
    // SAFETY: as in `table_forward`.
    let batch = unsafe { batch.batch_with(&extra, false)? };
    let request = request(gradients, moments, rank);
    let found = threads::run(py, threads, |cpu| cpu.statistics(&batch, &loss, request))?;
    statistics_out(py, found.map_err(raise)?)
}

/// As `reference_table_forward`, for statistics.
#[pyfunction]
pub fn reference_table_statistics<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    gradients: bool,
) -> PyResult<StatisticsOut<'py, f64>> {
    let loss = extra.filtered(loss.loss()?)?;
    // SAFETY: as in `table_forward`.
    let batch = unsafe { batch.batch_with(&extra, false)? };
    statistics_out(py, Reference::new().statistics(&batch, &loss, request(gradients, false, false)).map_err(raise)?)
}

/// (M, D), or (rows (U) int64, values (U, D)).
#[derive(IntoPyObject)]
pub enum TableGradientOut<'py, T: numpy::Element> {
    Dense(Rows<'py, T>),
    RowSparse((Column<'py, i64>, Rows<'py, T>)),
}

type WithTable<'py, T = f32> = (GradientsOut<'py, T>, Option<TableGradientOut<'py, T>>);

fn with_table<T: numpy::Element + Real>(py: Python<'_>, mut gradients: Gradients<T>) -> PyResult<WithTable<'_, T>> {
    let d_table = match gradients.d_table.take() {
        None => None,
        Some(TableGradient::Dense(dense)) => Some(TableGradientOut::Dense(matrix(py, dense)?)),
        Some(TableGradient::RowSparse(found)) => {
            let rows: Vec<i64> = found.rows.iter().map(|&row| i64::from(row)).collect();
            Some(TableGradientOut::RowSparse((rows.into_pyarray(py), matrix(py, found.values)?)))
        }
    };
    Ok((gradients_out(py, gradients)?, d_table))
}

fn form(request: Request, row_sparse: bool) -> Request {
    if row_sparse { request.row_sparse() } else { request }
}

/// lse (B), positive (P), num_negatives (B), all float64, and the expected negative (B, D).
#[derive(FromPyObject)]
pub struct RawStatistics(RawSlice, RawSlice, RawSlice, RawSlice);

type Upstream<'a, T> = (RowStatistics<T>, &'a [f64], &'a [f64]);

impl RawStatistics {
    /// Statistics of a batch, and derivatives (B) by lse and (P) by positive.
    ///
    /// # Safety
    /// As [`slice`].
    unsafe fn read<'a, T: Copy + Default>(
        &self,
        batch: &Batch<'_>,
        (d_lse, d_positive): &(RawSlice, RawSlice),
    ) -> PyResult<Upstream<'a, T>> {
        // SAFETY: handed on.
        let (lse, positive, counts, expected, d_lse, d_positive) = unsafe {
            (
                slice::<f64>(&self.0, "lse")?,
                slice::<f64>(&self.1, "positive")?,
                slice::<f64>(&self.2, "num_negatives")?,
                slice::<T>(&self.3, "expected_negative")?,
                slice(d_lse, "d_lse")?,
                slice(d_positive, "d_positive")?,
            )
        };
        let (b, dim) = (batch.num_queries(), batch.dim());
        if expected.len() != b * dim {
            let found = expected.len();
            return Err(PyValueError::new_err(format!(
                "expected_negative has {found} elements; rule: shape ({b}, {dim})"
            )));
        }
        let mut statistics = RowStatistics::default();
        statistics.lse = lse.to_vec();
        statistics.positive = positive.to_vec();
        statistics.num_negatives = counts.iter().map(|&n| n as u64).collect();
        statistics.expected_negative = Some(Matrix { values: expected.to_vec(), rows: b, dim });
        Ok((statistics, d_lse, d_positive))
    }
}

/// The stream back: (what `gradients` returns, d_table).
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "each is one thing that the step takes")]
pub fn table_gradients<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    row_sparse: bool,
    statistics: RawStatistics,
    upstream: (RawSlice, RawSlice),
    threads: usize,
) -> PyResult<WithTable<'py>> {
    let loss = extra.filtered(loss.loss()?)?;
    // SAFETY: as in `table_forward`.
    let batch = unsafe { batch.batch_with(&extra, false)? };
    // SAFETY: the same.
    let (statistics, d_lse, d_positive) = unsafe { statistics.read::<f32>(&batch, &upstream)? };
    let request = form(Request::value_and_grad(), row_sparse);
    let found = threads::run(py, threads, |cpu| {
        let mut found = Gradients::default();
        cpu.gradients_into(&batch, &loss, request, &statistics, d_lse, d_positive, &mut found).map(|()| found)
    })?;
    with_table(py, found.map_err(raise)?)
}

/// As `reference_table_forward`, for the stream back; the expected negative is float64.
#[pyfunction]
pub fn reference_table_gradients<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    row_sparse: bool,
    statistics: RawStatistics,
    upstream: (RawSlice, RawSlice),
) -> PyResult<WithTable<'py, f64>> {
    let loss = extra.filtered(loss.loss()?)?;
    // SAFETY: as in `table_forward`.
    let batch = unsafe { batch.batch_with(&extra, false)? };
    // SAFETY: the same.
    let (statistics, d_lse, d_positive) = unsafe { statistics.read::<f64>(&batch, &upstream)? };
    let (request, mut found) = (form(Request::value_and_grad(), row_sparse), Gradients::default());
    let done = Reference::new().gradients_into(&batch, &loss, request, &statistics, d_lse, d_positive, &mut found);
    done.map_err(raise)?;
    with_table(py, found)
}

type ComputeOut<'py> = (f64, Column<'py, f64>, Column<'py, f64>, StatisticsOut<'py>, Option<WithTable<'py>>);

fn compute_out(py: Python<'_>, output: Output, gradients: Option<Gradients>) -> PyResult<ComputeOut<'_>> {
    Ok((
        output.total,
        output.loss.into_pyarray(py),
        output.probability.into_pyarray(py),
        statistics_out(py, output.statistics)?,
        gradients.map(|gradients| with_table(py, gradients)).transpose()?,
    ))
}

/// The whole step: (total, loss, probability, statistics, (gradients, d_table) or None).
#[pyfunction]
pub fn table_compute<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    row_sparse: bool,
    requested: (bool, bool, bool),
    threads: usize,
) -> PyResult<ComputeOut<'py>> {
    let (loss, (gradients, moments, rank)) = (extra.filtered(loss.loss()?)?, requested);
    // SAFETY: as in `table_forward`.
    let batch = unsafe { batch.batch_with(&extra, false)? };
    let request = form(request(gradients, moments, rank), row_sparse);
    let found = threads::run(py, threads, |cpu| {
        let (mut output, mut found) = (Output::default(), gradients.then(Gradients::default));
        cpu.compute(&batch, &loss, request, &mut output, found.as_mut()).map(|()| (output, found))
    })?;
    let (output, gradients) = found.map_err(raise)?;
    compute_out(py, output, gradients)
}

/// The whole step with the optimiser's on the table: as `table_compute`, without d_table.
#[pyfunction]
pub fn table_update<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    loss: RawLoss,
    requested: (bool, bool),
    mut optimizer: PyRefMut<'py, Optimizer>,
    threads: usize,
) -> PyResult<ComputeOut<'py>> {
    let (loss, (moments, rank)) = (extra.filtered(loss.loss()?)?, requested);
    // SAFETY: as in `table_forward`; the caller has checked that the table's memory may be written.
    let mut table = unsafe { extra.table_mut(&batch)? };
    // SAFETY: as in `table_forward`. The batch has the table's shape alone.
    let batch = unsafe { batch.batch_with(&extra, true)? };
    let (request, optimizer) = (request(true, moments, rank), &mut optimizer.0);
    let found = threads::run(py, threads, |cpu: &mut Cpu| {
        let (mut output, mut found) = (Output::default(), Gradients::default());
        let done = cpu.update(&batch, &loss, request, &mut table, optimizer, &mut output, &mut found);
        done.map(|()| (output, found))
    })?;
    let (output, gradients) = found.map_err(raise)?;
    compute_out(py, output, Some(gradients))
}

/// As `top_k`, among each row's negatives.
#[pyfunction]
pub fn hardest_negatives<'py>(
    py: Python<'py>,
    batch: RawBatch,
    extra: RawExtra,
    similarity: &str,
    k: usize,
    threads: usize,
) -> PyResult<TopKOut<'py>> {
    let similarity = similarity_of(similarity)?;
    // SAFETY: as in `table_forward`.
    let batch = unsafe { batch.batch_with(&extra, false)? };
    let top: TopK = threads::run(py, threads, |cpu| cpu.hardest_negatives(&batch, similarity, k))?.map_err(raise)?;
    top_k_out(py, top)
}
