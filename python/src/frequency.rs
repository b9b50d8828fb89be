//! Estimators of Q of in-batch negatives, from the stream of ids.

use catalog_softmax::negatives as crate_;
use catalog_softmax::negatives::FrequencyEstimator;
use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyType};

use crate::errors::raise;

/// The methods that all estimators have. Each class has its own constructor.
macro_rules! estimator {
    ($name:ident, $doc:expr, ($($argument:ident: $type:ty),*), ($($signature:tt)*), $new:expr) => {
        #[doc = $doc]
        #[pyclass(module = "catalog_softmax")]
        pub struct $name(crate_::$name);

        #[pymethods]
        impl $name {
            #[new]
            #[pyo3(signature = ($($signature)*))]
            fn new($($argument: $type),*) -> PyResult<Self> {
                let made: catalog_softmax::Result<crate_::$name> = $new;
                made.map($name).map_err(raise)
            }

            /// Takes the ids of a batch in, repetitions and all. Before `log_q` of the same batch (Yi et al. 2019).
            fn observe(&mut self, ids: &Bound<'_, PyAny>) -> PyResult<()> {
                self.0.observe(&crate::numbers::ids(ids, "ids")?);
                Ok(())
            }

            /// The estimate of Q of each id, float64 in (0, 1].
            fn probability<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f64>>> {
                let ids = crate::numbers::ids(ids, "ids")?;
                Ok(ids.iter().map(|&id| self.0.probability(id)).collect::<Vec<_>>().into_pyarray(py))
            }

            /// log Q of each id, per draw, float32: for a pool that holds every position of the batch. Never -inf.
            fn log_q<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<f32>>> {
                Ok(self.0.log_q(&crate::numbers::ids(ids, "ids")?).into_pyarray(py))
            }

            /// log of the probability to be in a batch of ``batch_size`` draws: for a pool that holds each distinct id once.
            fn log_q_deduplicated<'py>(
                &self,
                py: Python<'py>,
                ids: &Bound<'py, PyAny>,
                batch_size: usize,
            ) -> PyResult<Bound<'py, PyArray1<f32>>> {
                Ok(self.0.log_q_deduplicated(&crate::numbers::ids(ids, "ids")?, batch_size).into_pyarray(py))
            }

            /// The whole state, for a checkpoint. Pickling and copying use it, too.
            fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
                PyBytes::new(py, &self.0.to_bytes())
            }

            /// An estimator from its state. A ValueError for bytes that are none.
            #[staticmethod]
            fn from_bytes(bytes: &[u8]) -> PyResult<Self> {
                crate_::$name::from_bytes(bytes).map($name).map_err(raise)
            }

            fn __reduce__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
                Ok((PyType::new::<Self>(py).getattr("from_bytes")?, (self.to_bytes(py),)))
            }
        }
    };
}

estimator!(
    ExactCounts,
    "Exact counts of every id: Q is its share of the stream. Memory grows with the distinct ids.",
    (),
    (),
    Ok(crate_::ExactCounts::new())
);
estimator!(
    CountMin,
    "A count-min sketch of ``depth`` rows of ``width`` cells (Cormode and Muthukrishnan 2005): fixed memory, never below the share.",
    (width: usize, depth: usize, seed: u64),
    (width, depth = 4, seed = 0),
    crate_::CountMin::new(width, depth, seed)
);
estimator!(
    GapEstimator,
    "The streaming estimator of Yi et al., RecSys 2019, from the gaps between appearances: fixed memory, follows a drift at the \
     rate ``alpha``.",
    (width: usize, depth: usize, alpha: f64, seed: u64),
    (width, depth = 2, alpha = 0.01, seed = 0),
    crate_::GapEstimator::new(width, depth, alpha, seed)
);
