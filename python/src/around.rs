//! What else a training loop needs: one log_q for several pools, schedules, metrics, geometry.

use catalog_softmax::{Rank, RowStatistics, TopK};
use catalog_softmax::{evaluation, negatives, temperature};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::arrays::{RawMatrix, matrix};
use crate::errors::{no_option, raise};
use crate::numbers::{f32s, f64s, ids, signed};
use crate::threads;

/// One log_q for candidates of several pools: ``log sum over pools of draws * exp(log_q)``.
///
/// ``pools`` has, for each pool, how many draws it makes and log Q of the candidates in its distribution (-inf for one that it never
/// draws). Returns float32, an expected count; subtract the logarithm of all draws for a probability per draw.
#[pyfunction]
pub fn union_log_q<'py>(py: Python<'py>, pools: Vec<(f64, Bound<'py, PyAny>)>) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let pools =
        pools.iter().enumerate().map(|(k, (draws, log_q))| Ok((*draws, f32s(log_q, &format!("pools[{k}].log_q"))?)));
    let pools = pools.collect::<PyResult<Vec<_>>>()?;
    let mut out = vec![0.0; pools.first().map_or(0, |(_, log_q)| log_q.len())];
    let pools: Vec<(f64, &[f32])> = pools.iter().map(|(draws, log_q)| (*draws, &log_q[..])).collect();
    negatives::union_log_q(&pools, &mut out).map_err(raise)?;
    Ok(out.into_pyarray(py))
}

/// What to multiply the gradients of candidates by where some pools of a union (a queue) have none: ``pools`` as in `union_log_q`,
/// with whether each has a gradient.
#[pyfunction]
pub fn union_gradient_weight<'py>(
    py: Python<'py>,
    pools: Vec<(f64, Bound<'py, PyAny>, bool)>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let pools = pools.iter().enumerate();
    let pools = pools.map(|(k, (n, log_q, gradient))| Ok((*n, f32s(log_q, &format!("pools[{k}].log_q"))?, *gradient)));
    let pools = pools.collect::<PyResult<Vec<_>>>()?;
    let mut out = vec![0.0; pools.first().map_or(0, |pool| pool.1.len())];
    let pools: Vec<(f64, &[f32], bool)> =
        pools.iter().map(|(n, log_q, gradient)| (*n, &log_q[..], *gradient)).collect();
    negatives::union_gradient_weight(&pools, &mut out).map_err(raise)?;
    Ok(out.into_pyarray(py))
}

/// A temperature that moves from one value to another in the course of the training: ``kind`` is "constant", "linear", "cosine" or
/// "exponential".
#[pyclass(frozen, module = "catalog_softmax")]
pub struct TemperatureSchedule {
    schedule: temperature::TemperatureSchedule,
    made_of: (String, f64, Option<f64>),
}

#[pymethods]
impl TemperatureSchedule {
    #[new]
    #[pyo3(signature = (kind, start, end = None))]
    fn new(kind: &str, start: f64, end: Option<f64>) -> PyResult<Self> {
        let made = match (kind, end) {
            ("constant", None) => temperature::TemperatureSchedule::constant(start),
            ("constant", Some(end)) => {
                let rule = "a constant temperature has a start alone";
                return Err(PyValueError::new_err(format!("end is {end} but does not apply; rule: {rule}")));
            }
            ("linear", Some(end)) => temperature::TemperatureSchedule::linear(start, end),
            ("cosine", Some(end)) => temperature::TemperatureSchedule::cosine(start, end),
            ("exponential", Some(end)) => temperature::TemperatureSchedule::exponential(start, end),
            ("linear" | "cosine" | "exponential", None) => {
                return Err(PyValueError::new_err("end is missing; rule: the temperature at the end of the training"));
            }
            _ => return Err(no_option("kind", kind, &["constant", "linear", "cosine", "exponential"])),
        };
        let made_of = (kind.to_owned(), start, end);
        made.map(|schedule| TemperatureSchedule { schedule, made_of }).map_err(|error| {
            let message = error.to_string();
            PyValueError::new_err(message.replacen("from is", "start is", 1).replacen("to is", "end is", 1))
        })
    }

    /// The temperature of step ``step``, counted from 0, of ``steps``.
    fn at(&self, step: u64, steps: u64) -> f64 {
        self.schedule.at(step, steps)
    }

    /// The temperature when ``progress`` of the training, 0 to 1, is done.
    fn at_progress(&self, progress: f64) -> f64 {
        self.schedule.at_progress(progress)
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, (String, f64, Option<f64>)) {
        (PyType::new::<Self>(py), self.made_of.clone())
    }
}

/// Places of relevant items, and the metrics of them. Rows without a relevant item are left out of means.
#[pyclass(module = "catalog_softmax")]
pub struct Ranking(evaluation::Ranking);

#[pymethods]
impl Ranking {
    /// Of the positive of each row over the whole catalogue: ``above`` and ``ties`` as `statistics(..., rank=True)` counts them, and
    /// its ``lse`` and ``positive``: a row where these are NaN has no place.
    #[staticmethod]
    fn of_positives(
        above: &Bound<'_, PyAny>,
        ties: &Bound<'_, PyAny>,
        lse: &Bound<'_, PyAny>,
        positive: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let (above, ties) = (ids(above, "above")?, ids(ties, "ties")?);
        let (lse, positive) = (f64s(lse, "lse")?, f64s(positive, "positive")?);
        for (argument, length) in [("ties", ties.len()), ("lse", lse.len()), ("positive", positive.len())] {
            if length != above.len() {
                let rule = format!("length {}, as above", above.len());
                return Err(PyValueError::new_err(format!("{argument} has length {length}; rule: {rule}")));
            }
        }
        let mut rank = Rank::default();
        (rank.above, rank.ties) = (above, ties);
        let mut statistics = RowStatistics::<f32>::default();
        (statistics.lse, statistics.positive, statistics.rank) = (lse, positive, Some(rank));
        evaluation::Ranking::of_positives(&statistics).map(Ranking).map_err(raise)
    }

    /// Of relevant items in lists, as `top_k` returns them: those of row i are ``relevant[offsets[i]:offsets[i + 1]]``.
    #[staticmethod]
    fn in_lists(
        indices: PyReadonlyArray2<'_, i64>,
        scores: PyReadonlyArray2<'_, f32>,
        offsets: &Bound<'_, PyAny>,
        relevant: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let top = lists(&indices, Some(&scores))?;
        let relevant = ids(relevant, "relevant")?;
        let past = relevant.iter().position(|&index| index >= u64::from(u32::MAX));
        if let Some(at) = past {
            let found = relevant[at] as i64;
            return Err(PyValueError::new_err(format!(
                "relevant[{at}] is {found}; rule: an index, from 0 to 2^32 - 2"
            )));
        }
        let relevant: Vec<u32> = relevant.iter().map(|&index| index as u32).collect();
        let offsets = signed(&ids(offsets, "offsets")?);
        evaluation::Ranking::in_lists(&top, &offsets, &relevant).map(Ranking).map_err(raise)
    }

    /// Adds the rows of another ranking, of the next block of queries.
    fn append(&mut self, other: &Ranking) -> PyResult<()> {
        self.0.append(other.0.clone()).map_err(raise)
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// K of the lists that the places come from. None where places are exact, over the whole catalogue.
    #[getter]
    fn k(&self) -> Option<usize> {
        self.0.k()
    }

    /// Of each row, the places of its relevant items that have one, ascending from 0, and how many relevant items there are: for
    /// metrics of single rows.
    fn rows(&self) -> Vec<(Vec<u64>, usize)> {
        self.0.rows().map(|(places, relevant)| (places.to_vec(), relevant)).collect()
    }

    /// The share of a row's relevant items among the first ``k``, the mean over rows.
    fn recall_at(&self, k: usize) -> PyResult<f64> {
        self.0.recall_at(k).map_err(raise)
    }

    /// NDCG of the first ``k`` with relevance 0 or 1 (Jaervelin and Kekaelaeinen 2002).
    fn ndcg_at(&self, k: usize) -> PyResult<f64> {
        self.0.ndcg_at(k).map_err(raise)
    }

    /// The mean of 1 / (1 + place) of the first relevant item.
    fn mrr(&self) -> f64 {
        self.0.mrr()
    }
}

/// See `catalog_softmax.alignment`, which is around this.
#[pyfunction]
pub fn alignment(x: RawMatrix, y: RawMatrix, alpha: f64) -> PyResult<f64> {
    // SAFETY: the calling Python function holds the arrays until this call returns.
    let (x, y) = unsafe { (matrix(&x, "x")?, matrix(&y, "y")?) };
    evaluation::alignment(x, y, alpha).map_err(raise)
}

/// See `catalog_softmax.uniformity`, which is around this.
#[pyfunction]
pub fn uniformity(py: Python<'_>, x: RawMatrix, t: f64, threads: usize) -> PyResult<f64> {
    // SAFETY: as in `alignment`.
    let x = unsafe { matrix(&x, "x")? };
    threads::run(py, threads, |cpu| evaluation::uniformity(cpu, x, t))?.map_err(raise)
}

/// How often each item is in the lists that were added.
#[pyclass(module = "catalog_softmax")]
pub struct Recommended(evaluation::Recommended);

#[pymethods]
impl Recommended {
    #[new]
    fn new(num_items: usize) -> PyResult<Self> {
        evaluation::Recommended::new(num_items).map(Recommended).map_err(raise)
    }

    /// Counts the items of lists (B, K), as `top_k` returns them.
    fn add(&mut self, indices: PyReadonlyArray2<'_, i64>) -> PyResult<()> {
        self.0.add(&lists(&indices, None)?).map_err(raise)
    }

    /// The share of all items that are in some list.
    fn coverage(&self) -> f64 {
        self.0.coverage()
    }

    /// The mean of ``popularity`` (num_items) over all places of all lists.
    fn mean_popularity(&self, popularity: &Bound<'_, PyAny>) -> PyResult<f64> {
        self.0.mean_popularity(&f64s(popularity, "popularity")?).map_err(raise)
    }
}

fn lists(indices: &PyReadonlyArray2<'_, i64>, scores: Option<&PyReadonlyArray2<'_, f32>>) -> PyResult<TopK> {
    let indices = indices.as_array();
    let (rows, k) = indices.dim();
    let mut top = TopK::default();
    top.k = k;
    for (at, &index) in indices.iter().enumerate() {
        let index = match index {
            -1 => TopK::NONE,
            index => u32::try_from(index).map_err(|_| {
                PyValueError::new_err(format!("indices[{}, {}] is {index}; rule: an index, or -1", at / k, at % k))
            })?,
        };
        top.indices.push(index);
    }
    top.scores = match scores {
        None => vec![0.0; rows * k],
        Some(scores) if scores.as_array().dim() == (rows, k) => scores.as_array().iter().copied().collect(),
        Some(scores) => {
            let found = scores.as_array().dim();
            return Err(PyValueError::new_err(format!("scores has shape {found:?}; rule: ({rows}, {k}), as indices")));
        }
    };
    Ok(top)
}
