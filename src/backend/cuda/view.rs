//! Views of the caller's device memory: an address, a number of elements, a type.

use std::marker::PhantomData;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use half::{bf16, f16};

use super::problem::Rows;
use crate::embeddings::DType;
use crate::error::{Result, shape, value};

/// `len` elements of type `T` in device memory, borrowed.
///
/// Steps read it in the order of the backend's stream: whoever fills it on another stream makes that one wait. In a CUDA
/// graph's capture, switch cudarc's event tracking off (`CudaContext::disable_event_tracking`): a view of a cudarc slice
/// waits for the events that it records, which a capture refuses.
#[derive(Debug, Clone, Copy)]
pub struct DeviceSlice<'a, T> {
    address: u64,
    len: usize,
    ordinal: Option<usize>,
    borrows: PhantomData<&'a [T]>,
}

/// `len` elements of type `T` in device memory, borrowed for writing.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    slice: DeviceSlice<'a, T>,
    borrows: PhantomData<&'a mut [T]>,
}

impl<'a, T> DeviceSlice<'a, T> {
    /// All of a cudarc slice or view.
    pub fn new<S: DevicePtr<T>>(slice: &'a S, stream: &CudaStream) -> Self {
        let (address, _) = slice.device_ptr(stream);
        DeviceSlice { address, len: slice.len(), ordinal: Some(stream.context().ordinal()), borrows: PhantomData }
    }

    /// Memory of another library: PyTorch's `data_ptr()`, for example.
    ///
    /// # Safety
    /// From `address` on there are `len` initialised elements of `T`, in memory of the device that the step runs on, and
    /// nothing frees or writes them before the steps that use this view are done.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSlice { address, len, ordinal: None, borrows: PhantomData }
    }

    /// The same with the device that it is on.
    ///
    /// # Safety
    /// As [`from_raw`](DeviceSlice::from_raw), on that device.
    pub(super) unsafe fn from_raw_on(address: u64, len: usize, ordinal: usize) -> Self {
        DeviceSlice { address, len, ordinal: Some(ordinal), borrows: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address, where the view is right: as long as wanted, aligned, on the device.
    pub(super) fn checked(&self, argument: &str, len: usize, ordinal: usize) -> Result<u64> {
        if self.len != len {
            return Err(shape(argument, format!("length {}", self.len), format!("length {len}")));
        }
        self.check_place(argument, ordinal)?;
        Ok(self.address)
    }

    fn check_place(&self, argument: &str, ordinal: usize) -> Result<()> {
        if self.address == 0 || !self.address.is_multiple_of(size_of::<T>() as u64) {
            let found = format!("address {:#x}", self.address);
            let rule = format!("not null, and a multiple of {} bytes", size_of::<T>());
            return Err(shape(argument, found, rule));
        }
        match self.ordinal {
            Some(found) if found != ordinal => {
                let argument = format!("the device of {argument}");
                Err(value(argument, format!("cuda:{found}"), "the device of the backend's stream"))
            }
            _ => Ok(()),
        }
    }
}

impl<'a, T> DeviceSliceMut<'a, T> {
    /// All of a cudarc slice or view.
    pub fn new<S: DevicePtrMut<T>>(slice: &'a mut S, stream: &CudaStream) -> Self {
        let len = slice.len();
        let (address, _) = slice.device_ptr_mut(stream);
        let ordinal = Some(stream.context().ordinal());
        DeviceSliceMut { slice: DeviceSlice { address, len, ordinal, borrows: PhantomData }, borrows: PhantomData }
    }

    /// Memory of another library.
    ///
    /// # Safety
    /// As [`DeviceSlice::from_raw`], but the elements need not be initialised, and nothing else reads them either.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        // SAFETY: the caller's promise covers reading.
        DeviceSliceMut { slice: unsafe { DeviceSlice::from_raw(address, len) }, borrows: PhantomData }
    }

    pub(super) fn checked(&self, argument: &str, len: usize, ordinal: usize) -> Result<u64> {
        self.slice.checked(argument, len, ordinal)
    }
}

/// Element types of embeddings.
pub trait DeviceElement: private::Sealed {
    #[doc(hidden)]
    const DTYPE: DType;
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

impl DeviceElement for f32 {
    const DTYPE: DType = DType::F32;
}
impl DeviceElement for f16 {
    const DTYPE: DType = DType::F16;
}
impl DeviceElement for bf16 {
    const DTYPE: DType = DType::Bf16;
}

/// `rows` embeddings of `dim` elements in device memory, consecutive rows `stride` elements apart.
///
/// Rows that start at multiples of 16 bytes are copied fastest.
#[derive(Debug, Clone, Copy)]
pub struct DeviceEmbeddings<'a> {
    bytes: DeviceSlice<'a, u8>,
    dtype: DType,
    rows: usize,
    dim: usize,
    stride: usize,
}

impl<'a> DeviceEmbeddings<'a> {
    /// A contiguous matrix: `elements` holds `rows * dim` values.
    pub fn new<T: DeviceElement>(elements: DeviceSlice<'a, T>, rows: usize, dim: usize) -> Self {
        let DeviceSlice { address, len, ordinal, .. } = elements;
        let bytes = DeviceSlice { address, len: len * size_of::<T>(), ordinal, borrows: PhantomData };
        DeviceEmbeddings { bytes, dtype: T::DTYPE, rows, dim, stride: dim }
    }

    /// The same with the starts of consecutive rows `stride >= dim` elements apart.
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.stride = stride;
        self
    }

    /// Number of embeddings.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per embedding.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn checked(&self, argument: &str, ordinal: usize) -> Result<Rows> {
        let (rows, dim, stride, size) = (self.rows, self.dim, self.stride, self.dtype.size());
        if rows == 0 || dim == 0 {
            return Err(shape(argument, format!("shape ({rows}, {dim})"), "rows >= 1 and dim >= 1"));
        }
        if u32::try_from(rows).is_err() || u32::try_from(dim).is_err() {
            return Err(shape(argument, format!("shape ({rows}, {dim})"), "rows and dim below 2^32"));
        }
        if stride < dim {
            let rule = format!("row stride >= dim, which is {dim}");
            return Err(shape(argument, format!("a row stride of {stride} elements"), rule));
        }
        let span = (rows - 1).checked_mul(stride).and_then(|n| n.checked_add(dim));
        let found = self.bytes.len / size;
        if span.is_none_or(|span| span > found) {
            let rule = format!("(rows - 1) * stride + dim elements for rows {rows}, stride {stride}, dim {dim}");
            return Err(shape(argument, format!("{found} elements"), rule));
        }
        self.bytes.check_place(argument, ordinal)?;
        if !self.bytes.address.is_multiple_of(size as u64) {
            let found = format!("address {:#x}", self.bytes.address);
            return Err(shape(argument, found, format!("a multiple of {size} bytes")));
        }
        Ok(Rows { address: self.bytes.address, rows, stride })
    }
}
