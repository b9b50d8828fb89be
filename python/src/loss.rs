//! Losses, statistics, gradients and searches.

use catalog_softmax::{
    Backend, Batch, Correction, Epilogue, Gradients, Loss, Matrix, Output, Reduction, Reference, Request,
    RowStatistics, Similarity, TopK,
};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arrays::{RawBatch, RawSlice, slice};
use crate::errors::{no_option, raise};
use crate::numbers::signed;
use crate::threads;

/// (similarity, temperature, correction, reduction, symmetric)
#[derive(FromPyObject)]
pub struct RawLoss(String, f64, String, String, bool);

impl RawLoss {
    pub fn loss(&self) -> PyResult<Loss> {
        let RawLoss(similarity, temperature, correction, reduction, symmetric) = self;
        let correction = match correction.as_str() {
            "none" => Correction::None,
            "logq" => Correction::LogQ,
            "logq_negatives_only" => Correction::LogQNegativesOnly,
            "corrected_logq" => Correction::CorrectedLogQ,
            other => {
                return Err(no_option("correction", other, &["none", "logq", "logq_negatives_only", "corrected_logq"]));
            }
        };
        let reduction = match reduction.as_str() {
            "none" => Reduction::None,
            "mean" => Reduction::Mean,
            "sum" => Reduction::Sum,
            "weighted_mean" => Reduction::WeightedMean,
            other => return Err(no_option("reduction", other, &["none", "mean", "sum", "weighted_mean"])),
        };
        let loss = Loss::softmax(similarity_of(similarity)?, *temperature).correction(correction).reduction(reduction);
        Ok(if *symmetric { loss.symmetric() } else { loss })
    }
}

pub fn similarity_of(name: &str) -> PyResult<Similarity> {
    match name {
        "cosine" => Ok(Similarity::Cosine),
        "dot" => Ok(Similarity::Dot),
        other => Err(no_option("similarity", other, &["cosine", "dot"])),
    }
}

pub type Column<'py, T> = Bound<'py, PyArray1<T>>;
pub type Table<'py, T> = Bound<'py, PyArray2<T>>;

pub fn table<'py, T: numpy::Element>(
    py: Python<'py>,
    values: Vec<T>,
    rows: usize,
    dim: usize,
) -> PyResult<Table<'py, T>> {
    values.into_pyarray(py).reshape([rows, dim])
}

pub fn matrix<T: numpy::Element>(py: Python<'_>, matrix: Matrix<T>) -> PyResult<Table<'_, T>> {
    table(py, matrix.values, matrix.rows, matrix.dim)
}

type ForwardOut<'py, T = f32> = (f64, Column<'py, f64>, Table<'py, f64>, Option<Table<'py, T>>);

/// One direction of the loss, forward: (total, loss of each row with its weight, rows, expected negative). `rows` (4, B) are
/// lse, positive, num_negatives and the derivative of the total by lse; that by the positive is its negative. The expected
/// negative (B, D) is there where `gradients` are wanted later.
///
/// A symmetric loss is checked here as a whole; the caller asks for each direction.
#[pyfunction]
pub fn forward<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    gradients: bool,
    threads: usize,
) -> PyResult<ForwardOut<'py>> {
    // SAFETY: the calling Python function holds the arrays until this call returns, and nothing borrowed is in the result.
    let (checked, weight) = unsafe { (batch.batch()?, batch.row_weight()?) };
    let loss = loss.loss()?;
    let result = threads::run(py, threads, |cpu| loss_of(cpu, &checked, &loss, gradients))?;
    forward_out(py, weight, result.map_err(raise)?)
}

/// The same in float64 throughout: for `torch.autograd.gradcheck` of the operators' formula, in the tests.
#[pyfunction]
pub fn reference_forward<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    gradients: bool,
) -> PyResult<ForwardOut<'py, f64>> {
    // SAFETY: as in `forward`.
    let (checked, weight) = unsafe { (batch.batch()?, batch.row_weight()?) };
    let result = loss_of(&mut Reference::new(), &checked, &loss.loss()?, gradients);
    forward_out(py, weight, result.map_err(raise)?)
}

/// Statistics and epilogue of one direction. The loss is checked as a whole.
fn loss_of<B: Backend>(
    backend: &mut B,
    batch: &Batch<'_>,
    whole: &Loss,
    gradients: bool,
) -> catalog_softmax::Result<(RowStatistics<B::Real>, Epilogue)> {
    let request = if gradients { Request::value_and_grad() } else { Request::value() };
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
    let b = statistics.lse.len();
    let mut rows = Vec::with_capacity(4 * b);
    rows.extend(statistics.lse);
    rows.extend(statistics.positive);
    rows.extend(statistics.num_negatives.iter().map(|&n| n as f64));
    rows.extend(epilogue.d_lse);
    let expected = statistics.expected_negative.map(|o| matrix(py, o)).transpose()?;
    Ok((epilogue.total, weighted(epilogue.loss, weight).into_pyarray(py), table(py, rows, 4, b)?, expected))
}

/// Losses of rows times their weights.
pub fn weighted(mut losses: Vec<f64>, weight: Option<&[f32]>) -> Vec<f64> {
    for (loss, &weight) in losses.iter_mut().zip(weight.unwrap_or_default()) {
        // A row of weight 0 is absent, whatever its loss.
        *loss = if weight == 0.0 { 0.0 } else { *loss * f64::from(weight) };
    }
    losses
}

pub type StatisticsOut<'py, T = f32> = (
    Column<'py, f64>,
    Column<'py, f64>,
    Column<'py, i64>,
    Option<(Column<'py, f64>, Column<'py, f64>)>,
    Option<(Column<'py, i64>, Column<'py, i64>)>,
    Option<Table<'py, T>>,
);

pub fn statistics_out<T: numpy::Element>(
    py: Python<'_>,
    statistics: RowStatistics<T>,
) -> PyResult<StatisticsOut<'_, T>> {
    let moments = statistics.moments.map(|m| (m.expected_score.into_pyarray(py), m.entropy.into_pyarray(py)));
    let rank = statistics.rank.map(|r| (signed(&r.above).into_pyarray(py), signed(&r.ties).into_pyarray(py)));
    Ok((
        statistics.lse.into_pyarray(py),
        statistics.positive.into_pyarray(py),
        signed(&statistics.num_negatives).into_pyarray(py),
        moments,
        rank,
        statistics.expected_negative.map(|o| matrix(py, o)).transpose()?,
    ))
}

pub fn request(gradients: bool, moments: bool, rank: bool) -> Request {
    let mut request = if gradients { Request::value_and_grad() } else { Request::value() };
    request.moments = moments;
    request.rank = rank;
    request
}

/// (lse, positive, num_negatives, (expected score, entropy), (above, ties), expected negative).
#[pyfunction]
pub fn statistics<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    requested: (bool, bool, bool),
    threads: usize,
) -> PyResult<StatisticsOut<'py>> {
    let (loss, (gradients, moments, rank)) = (loss.loss()?, requested);
    // SAFETY: as in `forward`.
    let batch = unsafe { batch.batch()? };
    let request = request(gradients, moments, rank);
    let statistics = threads::run(py, threads, |cpu| cpu.statistics(&batch, &loss, request))?;
    statistics_out(py, statistics.map_err(raise)?)
}

/// As `reference_forward`, for statistics.
#[pyfunction]
pub fn reference_statistics<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    gradients: bool,
) -> PyResult<StatisticsOut<'py, f64>> {
    // SAFETY: as in `forward`.
    let batch = unsafe { batch.batch()? };
    let statistics = Reference::new().statistics(&batch, &loss.loss()?, request(gradients, false, false));
    statistics_out(py, statistics.map_err(raise)?)
}

pub type GradientsOut<'py, T = f32> = (Table<'py, T>, Vec<Option<Table<'py, T>>>, Option<Table<'py, T>>, f64);

pub fn gradients_out<T: numpy::Element>(py: Python<'_>, gradients: Gradients<T>) -> PyResult<GradientsOut<'_, T>> {
    let pools = gradients.d_candidates.into_iter();
    let pools = pools.map(|d| if d.rows == 0 { Ok(None) } else { matrix(py, d).map(Some) });
    Ok((
        matrix(py, gradients.d_queries)?,
        pools.collect::<PyResult<_>>()?,
        gradients.d_positive_embeddings.map(|d| matrix(py, d)).transpose()?,
        gradients.d_temperature,
    ))
}

/// The stream back: (d_queries, d_candidates of each pool or None, d_positive_embeddings, d_temperature). `rows` are the first
/// three rows of what `forward` returned, `expected` its expected negative, and (B) float64 `d_lse` and `d_positive`.
#[pyfunction]
pub fn gradients<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    rows: RawSlice,
    expected: RawSlice,
    upstream: (RawSlice, RawSlice),
    threads: usize,
) -> PyResult<GradientsOut<'py>> {
    let loss = loss.loss()?;
    // SAFETY: as in `forward`.
    let (batch, statistics, d_lse, d_positive) = unsafe { upstream_of::<f32>(&batch, &rows, &expected, &upstream)? };
    let gradients = threads::run(py, threads, |cpu| cpu.gradients(&batch, &loss, &statistics, d_lse, d_positive))?;
    gradients_out(py, gradients.map_err(raise)?)
}

/// As `reference_forward`, for the stream back; `expected` is float64.
#[pyfunction]
pub fn reference_gradients<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    rows: RawSlice,
    expected: RawSlice,
    upstream: (RawSlice, RawSlice),
) -> PyResult<GradientsOut<'py, f64>> {
    // SAFETY: as in `forward`.
    let (batch, statistics, d_lse, d_positive) = unsafe { upstream_of::<f64>(&batch, &rows, &expected, &upstream)? };
    let gradients = Reference::new().gradients(&batch, &loss.loss()?, &statistics, d_lse, d_positive);
    gradients_out(py, gradients.map_err(raise)?)
}

type UpstreamOf<'a, T> = (Batch<'a>, RowStatistics<T>, &'a [f64], &'a [f64]);

/// What the stream back takes.
///
/// # Safety
/// As [`slice`], of everything that is named.
unsafe fn upstream_of<'a, T: Copy + Default>(
    batch: &RawBatch,
    rows: &RawSlice,
    expected: &RawSlice,
    (d_lse, d_positive): &(RawSlice, RawSlice),
) -> PyResult<UpstreamOf<'a, T>> {
    // SAFETY: handed on.
    let (batch, rows, expected, d_lse, d_positive) = unsafe {
        let (d_lse, d_positive) = (slice(d_lse, "d_lse")?, slice(d_positive, "d_positive")?);
        (batch.batch()?, slice::<f64>(rows, "rows")?, slice::<T>(expected, "expected")?, d_lse, d_positive)
    };
    let (b, dim) = (batch.num_queries(), batch.dim());
    if rows.len() < 3 * b || expected.len() != b * dim {
        let found = format!("{} and {} elements", rows.len(), expected.len());
        return Err(PyValueError::new_err(format!("statistics have {found}; rule: (3, {b}) and ({b}, {dim})")));
    }
    let mut statistics = RowStatistics::default();
    statistics.lse = rows[..b].to_vec();
    statistics.positive = rows[b..2 * b].to_vec();
    statistics.num_negatives = rows[2 * b..3 * b].iter().map(|&n| n as u64).collect();
    statistics.expected_negative = Some(Matrix { values: expected.to_vec(), rows: b, dim });
    Ok((batch, statistics, d_lse, d_positive))
}

type ComputeOut<'py> = (f64, Column<'py, f64>, Column<'py, f64>, StatisticsOut<'py>, Option<GradientsOut<'py>>);

/// The whole step: (total, loss, probability, statistics, gradients or None).
#[pyfunction]
pub fn compute<'py>(
    py: Python<'py>,
    batch: RawBatch,
    loss: RawLoss,
    requested: (bool, bool, bool),
    threads: usize,
) -> PyResult<ComputeOut<'py>> {
    let (loss, (gradients, moments, rank)) = (loss.loss()?, requested);
    // SAFETY: as in `forward`.
    let batch = unsafe { batch.batch()? };
    let request = request(gradients, moments, rank);
    let output = threads::run(py, threads, |cpu| {
        let (mut output, mut found) = (Output::default(), gradients.then(Gradients::default));
        cpu.compute(&batch, &loss, request, &mut output, found.as_mut()).map(|()| (output, found))
    })?;
    let (output, gradients) = output.map_err(raise)?;
    Ok((
        output.total,
        output.loss.into_pyarray(py),
        output.probability.into_pyarray(py),
        statistics_out(py, output.statistics)?,
        gradients.map(|gradients| gradients_out(py, gradients)).transpose()?,
    ))
}

pub type TopKOut<'py> = (Table<'py, i64>, Table<'py, f32>);

/// (indices int64, similarities), each (B, K): -1 and -inf where a row has fewer than K.
#[pyfunction]
pub fn top_k<'py>(
    py: Python<'py>,
    batch: RawBatch,
    similarity: &str,
    k: usize,
    threads: usize,
) -> PyResult<TopKOut<'py>> {
    let similarity = similarity_of(similarity)?;
    // SAFETY: as in `forward`.
    let search = unsafe { batch.search()? };
    top_k_out(py, threads::run(py, threads, |cpu| cpu.top_k(&search, similarity, k))?.map_err(raise)?)
}

pub fn top_k_out(py: Python<'_>, top: TopK) -> PyResult<TopKOut<'_>> {
    let (b, k) = (top.num_rows(), top.k);
    let index = |&index: &u32| if index == TopK::NONE { -1 } else { i64::from(index) };
    let indices = top.indices.iter().map(index).collect();
    Ok((table(py, indices, b, k)?, table(py, top.scores, b, k)?))
}
