//! `catalog_softmax._core`: the crate behind the Python package. Its users are the package's own modules, and the classes that
//! need no layer above them: samplers, estimators, metrics, schedules.

mod around;
mod arrays;
mod device;
mod device_array;
mod device_extra;
mod errors;
mod extra;
mod frequency;
mod loss;
mod numbers;
mod optimizer;
mod queue;
mod sampling;
mod tables;
mod threads;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::around::{
        Ranking, Recommended, TemperatureSchedule, alignment, uniformity, union_gradient_weight, union_log_q,
    };
    #[pymodule_export]
    use crate::device::{
        device_compute, device_fault, device_gradients, device_hardest_negatives, device_plan,
        device_plan_hardest_negatives, device_plan_top_k, device_top_k,
    };
    #[pymodule_export]
    use crate::device_array::{DeviceArray, device_of, dlpack};
    #[pymodule_export]
    use crate::errors::DeviceUnavailable;
    #[pymodule_export]
    use crate::frequency::{CountMin, ExactCounts, GapEstimator};
    #[pymodule_export]
    use crate::loss::{
        compute, forward, gradients, reference_forward, reference_gradients, reference_statistics, statistics, top_k,
    };
    #[pymodule_export]
    use crate::optimizer::Optimizer;
    #[pymodule_export]
    use crate::queue::Queue;
    #[pymodule_export]
    use crate::sampling::{Distribution, LogUniform, Mixture, RandomStream, Sample, Uniform, Unigram};
    #[pymodule_export]
    use crate::tables::{
        hardest_negatives, reference_table_forward, reference_table_gradients, reference_table_statistics,
        table_compute, table_forward, table_gradients, table_statistics, table_update,
    };
}
