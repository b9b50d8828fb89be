//! Columns of numbers from anything that numpy makes an array of.

use numpy::{PyArrayMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

fn array<'py>(values: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyUntypedArray>> {
    Ok(values.py().import("numpy")?.call_method1("asarray", (values,))?.cast_into::<PyUntypedArray>()?)
}

fn refused(argument: &str, found: &Bound<'_, PyUntypedArray>, rule: &str) -> PyErr {
    let shape = found.getattr("shape").map(|shape| shape.to_string()).unwrap_or_default();
    PyValueError::new_err(format!("{argument} has shape {shape} of {}; rule: {rule}", found.dtype()))
}

/// 64-bit ids, signed ones as their bits: a copy.
pub fn ids(values: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<u64>> {
    let found = array(values)?;
    let empty = found.len() == 0;
    let kind: char = found.dtype().getattr("kind")?.extract()?;
    if found.ndim() != 1 || !(matches!(kind, 'i' | 'u') || empty) {
        return Err(refused(argument, &found, "one axis of integers"));
    }
    if empty {
        return Ok(Vec::new());
    }
    if let Ok(unsigned) = found.extract::<PyReadonlyArray1<'_, u64>>() {
        return Ok(unsigned.as_array().iter().copied().collect());
    }
    let signed: PyReadonlyArray1<'_, i64> = found.call_method1("astype", ("int64",))?.extract()?;
    Ok(signed.as_array().iter().map(|&id| id as u64).collect())
}

/// Floating-point numbers (or integers) as `T`: a copy.
pub fn reals<T: numpy::Element + Copy>(values: &Bound<'_, PyAny>, argument: &str, dtype: &str) -> PyResult<Vec<T>> {
    let found = array(values)?;
    let kind: char = found.dtype().getattr("kind")?.extract()?;
    if found.ndim() != 1 || !matches!(kind, 'f' | 'i' | 'u') {
        return Err(refused(argument, &found, "one axis of numbers"));
    }
    let found = found.call_method1("astype", (dtype,))?;
    let found = found.cast::<numpy::PyArray1<T>>()?.readonly();
    Ok(found.as_array().iter().copied().collect())
}

pub fn f32s(values: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<f32>> {
    reals(values, argument, "float32")
}

pub fn f64s(values: &Bound<'_, PyAny>, argument: &str) -> PyResult<Vec<f64>> {
    reals(values, argument, "float64")
}

/// Unsigned numbers as numpy and PyTorch index with: int64, of the same bits.
pub fn signed(values: &[u64]) -> Vec<i64> {
    values.iter().map(|&value| value as i64).collect()
}
