//! `catalog_softmax._core`: the crate behind the Python package. Its users are the package's own modules, and the classes that
//! need no layer above them: samplers, estimators, metrics, schedules.

mod arrays;
mod errors;
mod loss;
mod threads;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::errors::DeviceUnavailable;
    #[pymodule_export]
    use crate::loss::{compute, forward, gradients, statistics, top_k};
}
