//! Candle's memory as views of the core, and the order of both sides' work on it.
//!
//! Candle's `Device::new_cuda` works on the per-thread default stream, which the core refuses: it is another stream on
//! each thread. So the core has a stream of its own there, which waits for candle's before a pass, and for which
//! candle's waits after it. With `Device::new_cuda_with_stream` the core works on candle's stream itself.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda::{CudaDType, CudaStorageSlice, DeviceId, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Storage, Tensor};
use catalog_softmax::cuda::{Cuda, DeviceElement, DeviceEmbeddings, DeviceSlice, DeviceSliceMut};
use catalog_softmax::half::{bf16, f16};

use crate::arguments::row_stride;
use crate::error::{Result, value};
use crate::held::Held;

/// Tensors that a pass reads.
pub(super) struct Reads<'t> {
    held: Held<'t>,
    tensors: Vec<&'t Tensor>,
    stream: Arc<CudaStream>,
}

impl<'t> Reads<'t> {
    /// Makes candle's stream wait for what other streams have written of them.
    pub(super) fn new(tensors: impl IntoIterator<Item = &'t Tensor>, device: &CudaDevice) -> Result<Self> {
        let tensors: Vec<&Tensor> = tensors.into_iter().collect();
        let reads = Reads { held: Held::new(tensors.iter().copied()), tensors, stream: device.cuda_stream() };
        reads.touch()?;
        Ok(reads)
    }

    /// After the pass is queued: has cudarc record that candle's stream has read them.
    pub(super) fn done(self) -> Result<()> {
        self.touch()
    }

    fn touch(&self) -> Result<()> {
        self.tensors.iter().try_for_each(|tensor| self.start(tensor).map(drop))
    }

    /// Where the tensor's memory starts. cudarc waits for recorded writes, and records the read.
    fn start(&self, tensor: &Tensor) -> Result<u64> {
        let Storage::Cuda(storage) = self.held.storage(tensor) else {
            return Err(value("the device of a tensor", format!("{:?}", tensor.device().location()), "a GPU"));
        };
        let stream = &self.stream;
        Ok(match &storage.slice {
            CudaStorageSlice::F32(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F64(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::I64(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(stream).0,
            _ => return Err(value("the type of a tensor", format!("{:?}", tensor.dtype()), "one that a pass reads")),
        })
    }

    /// The address of an element, counted from the tensor's first one. Of a tensor of `new`, whose storage was looked
    /// at there.
    fn address(&self, tensor: &Tensor, element: usize) -> u64 {
        let start = self.start(tensor).expect("the tensors of a pass were checked when it began");
        let element = tensor.layout().start_offset() + element;
        start + (element * tensor.dtype().size_in_bytes()) as u64
    }

    /// A contiguous tensor.
    ///
    /// # Safety
    /// Its elements are of type `T`, or of the signed type of that size with no negative numbers or only compared. Work
    /// on the view is queued before `self` is dropped.
    pub(super) unsafe fn view<T>(&self, tensor: &Tensor) -> DeviceSlice<'_, T> {
        // SAFETY: the tensor has these elements, written in the order of candle's stream, which the backend's work
        // comes after (`with_backend`). What is freed later is freed in that stream's order, after the work.
        unsafe { DeviceSlice::from_raw(self.address(tensor, 0), tensor.elem_count()) }
    }

    /// Rows `first..first + rows` of a row-major matrix.
    ///
    /// # Safety
    /// As [`view`](Reads::view).
    pub(super) unsafe fn embeddings(&self, matrix: &Tensor, first: usize, rows: usize) -> DeviceEmbeddings<'_> {
        // SAFETY: handed on, of the tensor's own type.
        unsafe {
            match matrix.dtype() {
                DType::F16 => self.rows::<f16>(matrix, first, rows),
                DType::BF16 => self.rows::<bf16>(matrix, first, rows),
                _ => self.rows::<f32>(matrix, first, rows),
            }
        }
    }

    /// # Safety
    /// As [`view`](Reads::view).
    unsafe fn rows<'a, T: DeviceElement + 'a>(
        &'a self,
        matrix: &Tensor,
        first: usize,
        rows: usize,
    ) -> DeviceEmbeddings<'a> {
        let (dim, stride) = (matrix.dims()[1], row_stride(matrix.layout()));
        let span = if rows * dim == 0 { 0 } else { (rows - 1) * stride + dim };
        // SAFETY: as in `view`.
        let elements = unsafe { DeviceSlice::<T>::from_raw(self.address(matrix, first * stride), span) };
        DeviceEmbeddings::new(elements, rows, dim).with_stride(stride)
    }
}

/// Memory that a pass writes: a tensor to be.
pub(super) struct Place<T> {
    slice: CudaSlice<T>,
    shape: Vec<usize>,
    device: CudaDevice,
    stream: Arc<CudaStream>,
}

impl<T: DeviceRepr + CudaDType> Place<T> {
    /// Not initialised.
    pub(super) fn new(device: &CudaDevice, shape: &[usize]) -> Result<Self> {
        // SAFETY: nothing reads the memory before a pass has written it: its errors end the call.
        let slice = unsafe { device.alloc::<T>(shape.iter().product())? };
        Ok(Place { slice, shape: shape.to_vec(), device: device.clone(), stream: device.cuda_stream() })
    }

    /// All of it.
    ///
    /// # Safety
    /// As [`part`](Place::part).
    pub(super) unsafe fn view<'a, U>(&mut self) -> DeviceSliceMut<'a, U> {
        // SAFETY: handed on.
        unsafe { self.part(0, self.slice.len()) }
    }

    /// Some elements.
    ///
    /// # Safety
    /// `U` is `T` or its unsigned type. Work on the view is queued while `self` lives. Views do not overlap.
    pub(super) unsafe fn part<'a, U>(&mut self, first: usize, len: usize) -> DeviceSliceMut<'a, U> {
        let start = self.slice.device_ptr_mut(&self.stream).0;
        // SAFETY: the memory was allocated in the order of candle's stream, which the backend's work comes after
        // (`with_backend`), and is freed in that order.
        unsafe { DeviceSliceMut::from_raw(start + (first * size_of::<T>()) as u64, len) }
    }

    /// After the pass is queued: the tensor, with candle's stream recorded as its writer.
    pub(super) fn tensor(mut self) -> Result<Tensor> {
        drop(self.slice.device_ptr_mut(&self.stream));
        let storage = CudaStorage::wrap_cuda_slice(self.slice, self.device);
        Ok(Tensor::from_storage(Storage::Cuda(storage), self.shape, BackpropOp::none(), false))
    }
}

/// One backend for each of candle's devices. It keeps its workspace from step to step.
static BACKENDS: LazyLock<Mutex<HashMap<DeviceId, Arc<Mutex<Cuda>>>>> = LazyLock::new(Mutex::default);

/// The handle of the per-thread default stream, `CU_STREAM_PER_THREAD`.
const PER_THREAD: usize = 2;

fn backend(device: &CudaDevice) -> Result<Arc<Mutex<Cuda>>> {
    let mut kept = BACKENDS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(backend) = kept.get(&device.id()) {
        return Ok(backend.clone());
    }
    let theirs = device.cuda_stream();
    let per_thread = theirs.cu_stream().addr() == PER_THREAD;
    let stream = if per_thread { theirs.context().new_stream().w()? } else { theirs };
    let backend = Arc::new(Mutex::new(Cuda::on_stream(stream)?));
    kept.insert(device.id(), backend.clone());
    Ok(backend)
}

/// Queues `work` after what candle's stream was given, and before what it is given from now on.
pub(super) fn with_backend<R>(
    device: &CudaDevice,
    work: impl FnOnce(&mut Cuda) -> catalog_softmax::Result<R>,
) -> Result<R> {
    let backend = backend(device)?;
    let mut cuda = backend.lock().unwrap_or_else(PoisonError::into_inner);
    let (theirs, own) = (device.cuda_stream(), cuda.stream().clone());
    let apart = theirs.cu_stream() != own.cu_stream();
    if apart {
        own.join(&theirs).w()?;
    }
    let result = work(&mut cuda);
    if apart {
        theirs.join(&own).w()?;
    }
    Ok(result?)
}
