//! Views of the caller's device memory: an address, a number of elements and their type.

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::CudaStream;
use half::{bf16, f16};

use super::device_memory::{DeviceMemory, DeviceMemoryMut, Readable, Writable};
use super::memory::{ALIGNMENT, GivenWorkspace};
use super::problem::Rows;
use super::uses::Uses;
use crate::error::{Argument, Result, shape};
use crate::problem::arrays::check_len;
use crate::problem::embeddings::DType;
use crate::problem::shape::MatrixShape;

/// `len` elements of type `T` in device memory, borrowed for reading. It is made from a cudarc slice or view.
///
/// The backend works on one stream, [`Cuda::stream`](super::Cuda::stream). A cudarc slice belongs to the stream that it
/// was allocated on. If that is the same stream, nothing has to be done. If it is another one, each call that uses the
/// view makes the two streams wait for each other: the backend's work waits for what was queued on the slice's stream
/// before the call, and what is queued there after the call waits for the backend's work. So a slice may be filled on
/// its own stream before a step, read there after it, and dropped right after the call, since cudarc frees it in the
/// order of that stream.
///
/// Work on a third stream is ordered by cudarc's event tracking, which is on unless
/// `CudaContext::disable_event_tracking` was called: the backend's stream waits for such work, and records its own use
/// of the slice for later work to wait for. With event tracking off the caller has to order third streams, as that
/// (unsafe) function says.
///
/// A view is a borrow that ends when the call that uses it returns. The work is then queued, but not yet done.
///
/// ```compile_fail,E0505
/// use catalog_softmax::cuda::DeviceSlice;
/// # fn example(slice: cudarc::driver::CudaSlice<f32>) {
/// let view = DeviceSlice::new(&slice);
/// drop(slice); // the view still borrows it
/// println!("{}", view.len());
/// # }
/// ```
#[derive(Debug, Clone, Copy)]
pub struct DeviceSlice<'a, T> {
    source: Source<'a>,
    len: usize,
    elements: PhantomData<&'a [T]>,
}

/// `len` elements of type `T` in device memory, borrowed for writing. The order of streams is as [`DeviceSlice`] says.
#[derive(Debug)]
pub struct DeviceSliceMut<'a, T> {
    target: Target<'a>,
    len: usize,
    elements: PhantomData<&'a mut [T]>,
}

/// Memory that is read.
#[derive(Clone, Copy)]
enum Source<'a> {
    Cudarc(&'a dyn Readable),
    /// The crate's own memory: its address, and the stream that it is freed on.
    Owned(u64, &'a Arc<CudaStream>),
    Raw(u64),
}

/// Memory that is written.
enum Target<'a> {
    Cudarc(&'a mut dyn Writable),
    Raw(u64),
}

impl std::fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Cudarc(_) => f.write_str("cudarc's"),
            Source::Owned(address, _) | Source::Raw(address) => write!(f, "{address:#x}"),
        }
    }
}

impl std::fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Target::Cudarc(_) => f.write_str("cudarc's"),
            Target::Raw(address) => write!(f, "{address:#x}"),
        }
    }
}

impl<'a> Source<'a> {
    fn address(&self, argument: Argument, uses: &mut Uses<'a>) -> Result<u64> {
        match *self {
            Source::Cudarc(memory) => {
                uses.admit(argument, memory.owner())?;
                Ok(uses.read(memory))
            }
            Source::Owned(address, owner) => {
                uses.admit(argument, owner)?;
                Ok(address)
            }
            Source::Raw(address) => Ok(address),
        }
    }
}

impl<'a, T> DeviceSlice<'a, T> {
    /// A view of all of a cudarc slice or view.
    pub fn new<M: DeviceMemory<T>>(memory: &'a M) -> Self {
        DeviceSlice { source: Source::Cudarc(memory), len: memory.len(), elements: PhantomData }
    }

    /// Memory of another library: PyTorch's `data_ptr()`, for example. Nothing is known about its stream.
    ///
    /// # Safety
    /// From `address` on there are `len` initialised elements of `T`, in memory that the backend's context can use.
    /// They were written in the order of the backend's stream, or that stream was made to wait for the writes. Nothing
    /// frees or writes them before the work that uses this view is done: that is when the stream has executed it, and
    /// not when the call returns.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSlice { source: Source::Raw(address), len, elements: PhantomData }
    }

    /// Memory that is freed in the order of `owner`.
    ///
    /// # Safety
    /// For `'a` there are `len` initialised elements of `T` at `address`, in memory of the owner's context.
    pub(super) unsafe fn owned(address: u64, len: usize, owner: &'a Arc<CudaStream>) -> Self {
        DeviceSlice { source: Source::Owned(address, owner), len, elements: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address. Checks also that the view has `len` elements.
    pub(super) fn checked(&self, argument: impl Into<Argument>, len: usize, uses: &mut Uses<'a>) -> Result<u64> {
        let argument = argument.into();
        check_len(argument, self.len, len, OF_THE_SHAPE)?;
        self.address(argument, uses)
    }

    /// The address. Checks that it is aligned and belongs to the backend's context.
    pub(super) fn address(&self, argument: impl Into<Argument>, uses: &mut Uses<'a>) -> Result<u64> {
        let argument = argument.into();
        check_address(argument, self.source.address(argument, uses)?, size_of::<T>())
    }
}

impl<'a, T> DeviceSliceMut<'a, T> {
    /// A view of all of a cudarc slice or mutable view.
    pub fn new<M: DeviceMemoryMut<T>>(memory: &'a mut M) -> Self {
        let len = memory.len();
        DeviceSliceMut { target: Target::Cudarc(memory), len, elements: PhantomData }
    }

    /// Memory of another library.
    ///
    /// # Safety
    /// As [`DeviceSlice::from_raw`], but the elements need not be initialised, and nothing else reads them either.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        DeviceSliceMut { target: Target::Raw(address), len, elements: PhantomData }
    }

    pub(super) fn checked<'u>(
        &'u mut self,
        argument: impl Into<Argument>,
        len: usize,
        uses: &mut Uses<'u>,
    ) -> Result<u64> {
        let argument = argument.into();
        check_len(argument, self.len, len, OF_THE_SHAPE)?;
        check_address(argument, self.address(argument, uses)?, size_of::<T>())
    }

    fn address<'u>(&'u mut self, argument: Argument, uses: &mut Uses<'u>) -> Result<u64> {
        match &mut self.target {
            Target::Cudarc(memory) => {
                uses.admit(argument, memory.owner())?;
                Ok(uses.write(&mut **memory))
            }
            Target::Raw(address) => Ok(*address),
        }
    }
}

impl DeviceSliceMut<'_, u8> {
    /// As the workspace of a step. Whether it is large enough is checked when the step is laid out.
    pub(super) fn workspace<'u>(&'u mut self, uses: &mut Uses<'u>) -> Result<GivenWorkspace> {
        let (argument, bytes) = (Argument::from("workspace"), self.len);
        let address = check_address(argument, self.address(argument, uses)?, ALIGNMENT)?;
        Ok(GivenWorkspace { address, bytes })
    }
}

/// Why a length is wrong.
const OF_THE_SHAPE: &str = "as the shape of the batch requires";

fn check_address(argument: Argument, address: u64, alignment: usize) -> Result<u64> {
    if address != 0 && address.is_multiple_of(alignment as u64) {
        return Ok(address);
    }
    Err(shape(argument, format!("address {address:#x}"), format!("not null, and a multiple of {alignment} bytes")))
}

/// Element types of embeddings.
pub trait DeviceElement: private::Sealed + Send + Sync {
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
        let DeviceSlice { source, len, .. } = elements;
        let bytes = DeviceSlice { source, len: len * size_of::<T>(), elements: PhantomData };
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

    pub(super) fn shape(&self) -> MatrixShape {
        MatrixShape { rows: self.rows, dim: self.dim, dtype: self.dtype }
    }

    /// Checks that the view lies within its memory.
    pub(super) fn check(&self, argument: impl Into<Argument>) -> Result<()> {
        let argument = argument.into();
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
        Ok(())
    }

    /// The rows with their address. Checks that it is aligned and belongs to the backend's context.
    pub(super) fn address(&self, argument: impl Into<Argument>, uses: &mut Uses<'a>) -> Result<Rows> {
        let argument = argument.into();
        let address = check_address(argument, self.bytes.source.address(argument, uses)?, self.dtype.size())?;
        Ok(Rows { address, rows: self.rows, stride: self.stride, indices: 0 })
    }
}
