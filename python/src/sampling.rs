//! Samplers: negatives with the log_q that belongs to how they were drawn.

use std::sync::Arc;

use catalog_softmax::negatives as crate_;
use catalog_softmax::negatives::Distribution as _;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};

use crate::errors::raise;
use crate::numbers::{f64s, signed};

/// A distribution that Python objects share.
#[derive(Debug, Clone)]
struct Shared(Arc<dyn crate_::Distribution>);

impl crate_::Distribution for Shared {
    fn num_items(&self) -> u32 {
        self.0.num_items()
    }
    fn support(&self) -> u32 {
        self.0.support()
    }
    fn probability(&self, id: u64) -> f64 {
        self.0.probability(id)
    }
    fn draw_one(&self, random: &mut crate_::RandomStream) -> (u64, f64) {
        self.0.draw_one(random)
    }
    fn draw_into(&self, drawn: &mut [(u64, f64)], random: &mut crate_::RandomStream) {
        self.0.draw_into(drawn, random);
    }
    // What a distribution may do in a way of its own.
    fn draw_distinct(
        &self,
        count: usize,
        random: &mut crate_::RandomStream,
    ) -> catalog_softmax::Result<crate_::Sample> {
        self.0.draw_distinct(count, random)
    }
}

/// A stream of random numbers: ``seed`` and ``stream`` give the same numbers on every platform, and streams of one seed never
/// overlap. One for each worker.
#[pyclass(module = "catalog_softmax")]
pub struct RandomStream(crate_::RandomStream);

#[pymethods]
impl RandomStream {
    #[new]
    #[pyo3(signature = (seed, stream = 0))]
    fn new(seed: u64, stream: u64) -> Self {
        RandomStream(crate_::RandomStream::new(seed, stream))
    }
}

/// A distribution Q over the items ``0..num_items``, and the ways to draw negatives from it.
#[pyclass(subclass, frozen, module = "catalog_softmax")]
pub struct Distribution {
    distribution: Shared,
    /// The arguments that made it, which pickle needs.
    made_of: Py<PyTuple>,
}

impl Distribution {
    /// An object of a subclass around a distribution of the crate.
    fn initializer<S>(
        distribution: impl crate_::Distribution + 'static,
        made_of: Bound<'_, PyTuple>,
        subclass: S,
    ) -> PyClassInitializer<S>
    where
        S: pyo3::PyClass<BaseType = Distribution>,
    {
        let distribution = Shared(Arc::new(distribution));
        PyClassInitializer::from(Distribution { distribution, made_of: made_of.unbind() }).add_subclass(subclass)
    }
}

#[pymethods]
impl Distribution {
    /// By the arguments that made it.
    fn __reduce__<'py>(this: &Bound<'py, Self>) -> (Bound<'py, PyType>, Py<PyTuple>) {
        (this.get_type(), this.get().made_of.clone_ref(this.py()))
    }

    /// N: ids are below it.
    #[getter]
    fn num_items(&self) -> u32 {
        self.distribution.num_items()
    }

    /// How many ids have a probability above 0.
    #[getter]
    fn support(&self) -> u32 {
        self.distribution.support()
    }

    /// Q of each id, float64.
    fn probability<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let ids = crate::numbers::ids(ids, "ids")?;
        Ok(ids.iter().map(|&id| self.distribution.probability(id)).collect::<Vec<_>>().into_pyarray(py))
    }

    /// log Q of each id, float32. A ValueError for an id that is never drawn.
    fn log_q<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let ids = crate::numbers::ids(ids, "ids")?;
        Ok(self.distribution.log_q(&ids).map_err(raise)?.into_pyarray(py))
    }

    /// log Q of each id, and -inf of one that is never drawn: what `union_log_q` takes.
    fn log_probabilities<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let ids = crate::numbers::ids(ids, "ids")?;
        Ok(self.distribution.log_probabilities(&ids).into_pyarray(py))
    }

    /// ``draws`` independent draws, with repetitions. log_q is log Q.
    fn draw(&self, py: Python<'_>, draws: usize, random: &mut RandomStream) -> PyResult<Sample> {
        py.detach(|| self.distribution.draw(draws, &mut random.0)).map(Sample).map_err(raise)
    }

    /// The distinct ids among ``draws`` draws. log_q is log(1 - (1 - Q)^draws), an expected count: for every correction but
    /// "corrected_logq".
    fn draw_deduplicated(&self, py: Python<'_>, draws: usize, random: &mut RandomStream) -> PyResult<Sample> {
        py.detach(|| self.distribution.draw_deduplicated(draws, &mut random.0)).map(Sample).map_err(raise)
    }

    /// Exactly ``count`` distinct ids. log_q is that of a conditional probability that corrects exactly (Cohen and Kaplan, PODC
    /// 2007), an expected count, too.
    fn draw_distinct(&self, py: Python<'_>, count: usize, random: &mut RandomStream) -> PyResult<Sample> {
        py.detach(|| self.distribution.draw_distinct(count, &mut random.0)).map(Sample).map_err(raise)
    }
}

/// Each of ``num_items`` items with the same probability.
#[pyclass(extends = Distribution, frozen, module = "catalog_softmax")]
pub struct Uniform;

#[pymethods]
impl Uniform {
    #[new]
    fn new(py: Python<'_>, num_items: u64) -> PyResult<PyClassInitializer<Self>> {
        let made = crate_::Uniform::new(num_items).map_err(raise)?;
        Ok(Distribution::initializer(made, (num_items,).into_pyobject(py)?, Uniform))
    }
}

/// Items in proportion to ``counts ** distortion`` (word2vec's unigram at 0.75, uniform at 0). An item of count 0 is never drawn.
#[pyclass(extends = Distribution, frozen, module = "catalog_softmax")]
pub struct Unigram;

#[pymethods]
impl Unigram {
    #[new]
    #[pyo3(signature = (counts, distortion = 1.0))]
    fn new(counts: &Bound<'_, PyAny>, distortion: f64) -> PyResult<PyClassInitializer<Self>> {
        let (py, counts) = (counts.py(), f64s(counts, "counts")?);
        let made = crate_::Unigram::new(&counts, distortion).map_err(raise)?;
        // A copy: the array that was given may change.
        let made_of = (counts.into_pyarray(py), distortion).into_pyobject(py)?;
        Ok(Distribution::initializer(made, made_of, Unigram))
    }
}

/// TensorFlow's log-uniform (Zipf) sampler: items in the order of their popularity, the most popular first.
#[pyclass(extends = Distribution, frozen, module = "catalog_softmax")]
pub struct LogUniform;

#[pymethods]
impl LogUniform {
    #[new]
    fn new(py: Python<'_>, num_items: u64) -> PyResult<PyClassInitializer<Self>> {
        let made = crate_::LogUniform::new(num_items).map_err(raise)?;
        Ok(Distribution::initializer(made, (num_items,).into_pyobject(py)?, LogUniform))
    }
}

/// A draw from one of several distributions of the same items, chosen with the weight of each: ``Mixture([(0.9, popular), (0.1,
/// uniform)])``.
#[pyclass(extends = Distribution, frozen, module = "catalog_softmax")]
pub struct Mixture;

#[pymethods]
impl Mixture {
    #[new]
    fn new(py: Python<'_>, components: Vec<(f64, Bound<'_, Distribution>)>) -> PyResult<PyClassInitializer<Self>> {
        let boxed = components.iter().map(|(weight, distribution)| {
            let distribution: Box<dyn crate_::Distribution> = Box::new(distribution.get().distribution.clone());
            (*weight, distribution)
        });
        let made = crate_::Mixture::new(boxed.collect()).map_err(raise)?;
        Ok(Distribution::initializer(made, (components,).into_pyobject(py)?, Mixture))
    }
}

/// Drawn ids and the log_q of how they were drawn.
#[pyclass(frozen, module = "catalog_softmax")]
pub struct Sample(crate_::Sample);

#[pymethods]
impl Sample {
    /// int64, in the order in which they came.
    #[getter]
    fn ids<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        signed(&self.0.ids).into_pyarray(py)
    }

    /// float32, of each id.
    #[getter]
    fn log_q<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        self.0.log_q.clone().into_pyarray(py)
    }

    fn __len__(&self) -> usize {
        self.0.ids.len()
    }

    /// log_q of any other ids in the same terms: of the positives. ``distribution`` is the one that was drawn from.
    fn log_q_of<'py>(
        &self,
        py: Python<'py>,
        distribution: &Distribution,
        ids: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArray1<f32>>> {
        let ids = crate::numbers::ids(ids, "ids")?;
        Ok(self.0.log_q_of(&distribution.distribution, &ids).map_err(raise)?.into_pyarray(py))
    }
}
