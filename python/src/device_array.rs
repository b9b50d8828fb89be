//! Device memory of the package's own, for results that no array library has made room for; and what others say of theirs.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use catalog_softmax::cuda::cudarc::driver::{CudaContext, DriverError, result, sys};
use catalog_softmax::{Cuda, Error};
use numpy::PyArray1;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyDict, PyTuple};

use crate::threads::{Place, run_on_device};

/// An array in device memory, contiguous. Other libraries read it where it is, by ``__cuda_array_interface__``.
#[pyclass(module = "catalog_softmax", frozen)]
pub struct DeviceArray {
    memory: Memory,
    shape: Vec<usize>,
    /// As numpy names it: "float32".
    #[pyo3(get)]
    dtype: String,
    /// The device's ordinal.
    #[pyo3(get)]
    device: usize,
    /// The handle of the stream that it is written on.
    #[pyo3(get)]
    stream: usize,
}

/// Allocated and freed by calls that wait for the device: so it need not know on which streams it is used.
struct Memory {
    context: Arc<CudaContext>,
    address: u64,
    bytes: usize,
}

impl Memory {
    fn new(cuda: &Cuda, bytes: usize) -> Result<Self, DriverError> {
        let context = cuda.stream().context().clone();
        bind(&context)?;
        // SAFETY: the size is not 0.
        let address = unsafe { result::malloc_sync(bytes.max(1))? };
        Ok(Memory { context, address, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if bind(&self.context).is_ok() {
            // An error in what follows is that of a device that has failed, with all its memory.
            let _ = result::ctx::synchronize();
            // SAFETY: from `malloc_sync`, freed once, after all work that uses it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

fn bind(context: &CudaContext) -> Result<(), DriverError> {
    // SAFETY: the context is live.
    unsafe { result::ctx::set_current(context.cu_ctx()) }
}

/// A driver call's error as the crate's own.
fn driver<T>(call: &'static str, result: Result<T, DriverError>) -> Result<T, Error> {
    result.map_err(|DriverError(code)| Error::Driver { call, code: code as i32 })
}

const DTYPES: [(&str, &str, usize); 8] = [
    ("float64", "<f8", 8),
    ("float32", "<f4", 4),
    ("float16", "<f2", 2),
    ("int64", "<i8", 8),
    ("uint64", "<u8", 8),
    ("int32", "<i4", 4),
    ("uint32", "<u4", 4),
    ("uint8", "|u1", 1),
];

fn of(dtype: &str) -> PyResult<(&'static str, usize)> {
    let found = DTYPES.iter().find(|(name, ..)| *name == dtype);
    let names = DTYPES.map(|(name, ..)| name);
    found.map(|(_, typestr, size)| (*typestr, *size)).ok_or_else(|| crate::errors::no_option("dtype", dtype, &names))
}

#[pymethods]
impl DeviceArray {
    /// Not initialised.
    #[new]
    fn new(py: Python<'_>, place: Place, shape: Vec<usize>, dtype: &str) -> PyResult<Self> {
        let (_, size) = of(dtype)?;
        let bytes = shape.iter().try_fold(size, |bytes, &n| bytes.checked_mul(n)).filter(|&n| n <= isize::MAX as usize);
        let Some(bytes) = bytes else {
            return Err(PyValueError::new_err(format!("shape is {shape:?}; rule: no larger than memory")));
        };
        let memory = run_on_device(py, place, |cuda| driver("cuMemAlloc", Memory::new(cuda, bytes)))?;
        Ok(DeviceArray { memory, shape, dtype: dtype.to_owned(), device: place.0, stream: place.1 })
    }

    /// A copy of bytes of host memory. Waits for it.
    #[staticmethod]
    fn of_bytes(py: Python<'_>, place: Place, shape: Vec<usize>, dtype: &str, bytes: &[u8]) -> PyResult<Self> {
        let array = DeviceArray::new(py, place, shape, dtype)?;
        if bytes.len() != array.memory.bytes {
            let rule = format!("{} bytes, as shape and dtype have", array.memory.bytes);
            return Err(PyValueError::new_err(format!("bytes has length {}; rule: {rule}", bytes.len())));
        }
        run_on_device(py, place, |cuda| {
            let copied = bind(cuda.stream().context()).and_then(|()| {
                // SAFETY: the array has as many bytes, and no one else has it yet.
                unsafe { result::memcpy_htod_sync(array.memory.address, bytes) }?;
                // Of memory that is not pinned, the call may return before the device has it.
                result::ctx::synchronize()
            });
            driver("cuMemcpyHtoD", copied)
        })?;
        Ok(array)
    }

    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// The address.
    #[getter]
    fn address(&self) -> u64 {
        self.memory.address
    }

    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let interface = PyDict::new(py);
        interface.set_item("shape", self.shape(py)?)?;
        interface.set_item("typestr", of(&self.dtype)?.0)?;
        interface.set_item("data", (self.memory.address, false))?;
        interface.set_item("version", 3)?;
        interface.set_item("strides", py.None())?;
        // 0 is no stream of this interface: 1 is the legacy default one.
        interface.set_item("stream", self.stream.max(1))?;
        Ok(interface)
    }

    /// A copy in host memory, as a numpy array. Waits for all work of the device.
    fn numpy<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let mut bytes = vec![0u8; self.memory.bytes];
        let copied = py.detach(|| {
            bind(&self.memory.context)?;
            result::ctx::synchronize()?;
            // SAFETY: the array has as many bytes, and what writes them is done.
            unsafe { result::memcpy_dtoh_sync(&mut bytes, self.memory.address) }
        });
        driver("cuMemcpyDtoH", copied).map_err(crate::errors::raise)?;
        let bytes = PyArray1::from_vec(py, bytes);
        bytes.call_method1("view", (&self.dtype,))?.call_method1("reshape", (self.shape(py)?,))
    }

    fn __len__(&self) -> PyResult<usize> {
        self.shape
            .first()
            .copied()
            .ok_or_else(|| pyo3::exceptions::PyTypeError::new_err("an array of no axes has no length"))
    }

    fn __repr__(&self) -> String {
        format!("DeviceArray(shape={:?}, dtype={:?}, device={})", self.shape, self.dtype, self.device)
    }
}

/// `DLTensor` of dlpack.h, version 0 and 1: what a capsule of that name points to begins with it.
#[repr(C)]
struct DlTensor {
    data: *const c_void,
    device_type: i32,
    device_id: i32,
    ndim: i32,
    code: u8,
    bits: u8,
    lanes: u16,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

const DLTENSOR: &CStr = c"dltensor";

type Described = (usize, i32, i32, Vec<i64>, Option<Vec<i64>>, String);

/// (address, device type, device id, shape, strides in elements or None, dtype) of what ``__dlpack__()`` returned. The capsule stays
/// the caller's: keep it for as long as the memory is used.
#[pyfunction]
pub fn dlpack(capsule: &Bound<'_, PyCapsule>) -> PyResult<Described> {
    let pointer = capsule.pointer_checked(Some(DLTENSOR))?.cast::<DlTensor>();
    // SAFETY: a capsule of this name that nobody has consumed points to a DLManagedTensor, which begins with a DLTensor, and keeps it
    // alive: that is DLPack's protocol. The GIL is held, so that nobody consumes it now.
    let tensor = unsafe { pointer.as_ref() };
    let axes =
        usize::try_from(tensor.ndim).map_err(|_| PyValueError::new_err("a DLPack capsule has less than no axes"))?;
    // SAFETY: as above; both arrays have an element for each axis, where they are there.
    let column = |values: *const i64| (0..axes).map(|axis| unsafe { *values.add(axis) }).collect::<Vec<i64>>();
    let kind = match tensor.code {
        0 => "int",
        1 => "uint",
        2 => "float",
        4 => "bfloat",
        6 => "bool",
        _ => return Err(PyValueError::new_err("a DLPack capsule has elements of an unknown type; rule: numbers")),
    };
    if tensor.lanes != 1 {
        return Err(PyRuntimeError::new_err("a DLPack capsule has vectors as elements; rule: numbers"));
    }
    let address = tensor.data as usize + tensor.byte_offset as usize;
    let strides = (!tensor.strides.is_null()).then(|| column(tensor.strides));
    let dtype = format!("{kind}{}", tensor.bits);
    Ok((address, tensor.device_type, tensor.device_id, column(tensor.shape), strides, dtype))
}

/// The ordinal of the device that an address belongs to.
#[pyfunction]
pub fn device_of(py: Python<'_>, address: u64) -> PyResult<usize> {
    let mut ordinal = 0i32;
    run_on_device(py, Place(0, 0, false), |cuda| {
        let found = bind(cuda.stream().context()).and_then(|()| {
            let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
            // SAFETY: the attribute is an int, for which there is room; any address may be asked about.
            unsafe { sys::cuPointerGetAttribute((&raw mut ordinal).cast(), attribute, address).result() }
        });
        driver("cuPointerGetAttribute", found)
    })?;
    Ok(usize::try_from(ordinal).unwrap_or_default())
}
