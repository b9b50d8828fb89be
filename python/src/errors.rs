//! The crate's errors as Python's: names of arguments and options as the Python functions have them.

use catalog_softmax::Error;
use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

create_exception!(
    catalog_softmax,
    DeviceUnavailable,
    PyRuntimeError,
    "A device that this build cannot compute on, and why."
);

/// What the crate calls an argument or an option, and what Python does.
const NAMES: [(&str, &str); 23] = [
    ("Correction::CorrectedLogQ", "correction=\"corrected_logq\""),
    ("Correction::LogQNegativesOnly", "correction=\"logq_negatives_only\""),
    ("Correction::LogQ", "correction=\"logq\""),
    ("Correction::None", "correction=\"none\""),
    ("Reduction::WeightedMean", "reduction=\"weighted_mean\""),
    ("exclude_offsets", "excluded[0]"),
    ("exclude_ids", "excluded[1]"),
    ("excluded_ids", "excluded"),
    ("table ids", "table_ids"),
    ("row_negatives.per_row", "row_negatives.shape[1]"),
    ("table.without_gradient", "table_gradient=False"),
    ("request.row_sparse", "row_sparse"),
    ("-1 (u32::MAX)", "-1"),
    ("Pool::rows and Pool::whole_table name its rows", "candidate_rows are rows of it"),
    ("use Batch::of_table", "give one"),
    ("loss.false_negatives", "the filter of false negatives"),
    ("in_batch needs", "positives=None needs"),
    ("the diagonal of in_batch", "positives=None"),
    ("F32", "float32"),
    ("Bf16", "bfloat16"),
    ("F16", "float16"),
    ("Request::with_rank()", "rank=True"),
    ("pools[", "candidates["),
];

/// `ValueError` for input that breaks a rule, with argument, value and rule; `DeviceUnavailable` for a device.
pub fn raise(error: Error) -> PyErr {
    let message = NAMES.iter().fold(error.to_string(), |message, (rust, python)| message.replace(rust, python));
    match error {
        Error::Shape { .. } | Error::Value { .. } | Error::Missing { .. } | Error::DoesNotApply { .. } => {
            PyValueError::new_err(per_pool(message))
        }
        Error::DeviceUnavailable { .. } => DeviceUnavailable::new_err(message),
        _ => PyRuntimeError::new_err(message),
    }
}

/// `candidates[1].log_q` of the crate's pools is `log_q[1]` of Python's lists.
fn per_pool(message: String) -> String {
    let Some(rest) = message.strip_prefix("candidates[") else { return message };
    let Some((index, rest)) = rest.split_once("].") else { return message };
    for field in ["candidate_ids", "candidate_rows", "log_q", "candidates"] {
        if let Some(rest) = rest.strip_prefix(field) {
            return format!("{field}[{index}]{rest}");
        }
    }
    message
}

/// An option that has another value than those that it may have.
pub fn no_option(argument: &str, found: &str, allowed: &[&str]) -> PyErr {
    PyValueError::new_err(format!("{argument} is {found:?}; rule: one of {}", allowed.join(", ")))
}
