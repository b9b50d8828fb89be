//! The types of cudarc's device memory that views are made of.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, SyncOnDrop};

/// cudarc's device memory of elements `T`: `CudaSlice`, `CudaView` and `CudaViewMut`.
///
/// This trait is sealed, since cudarc's own traits are safe to implement: a type of your own could name any address.
///
/// ```compile_fail,E0277
/// use catalog_softmax::cuda::DeviceSlice;
/// use cudarc::driver::{CudaStream, DevicePtr, SyncOnDrop};
/// # use std::sync::Arc;
/// struct Nowhere(Arc<CudaStream>);
/// impl cudarc::driver::DeviceSlice<f32> for Nowhere {
///     fn len(&self) -> usize { 4096 }
///     fn stream(&self) -> &Arc<CudaStream> { &self.0 }
/// }
/// impl DevicePtr<f32> for Nowhere {
///     fn device_ptr<'a>(&'a self, _: &'a CudaStream) -> (u64, SyncOnDrop<'a>) { (0x1000, SyncOnDrop::Sync(None)) }
/// }
/// fn view(nowhere: &Nowhere) -> DeviceSlice<'_, f32> {
///     DeviceSlice::new(nowhere)
/// }
/// ```
pub trait DeviceMemory<T>: Readable {}

/// cudarc's device memory that can be written: `CudaSlice` and `CudaViewMut`. Sealed, as [`DeviceMemory`].
pub trait DeviceMemoryMut<T>: Writable {}

/// What [`DeviceMemory`] is, whatever its elements. In a private module: it seals that trait.
pub trait Readable: Sync {
    #[doc(hidden)]
    fn len(&self) -> usize;
    /// The stream that the memory was allocated on, and is freed on.
    #[doc(hidden)]
    fn owner(&self) -> &Arc<CudaStream>;
    /// The address, and what records the use when it is dropped. Makes `stream` wait for recorded writes.
    #[doc(hidden)]
    fn read<'a>(&'a self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>);
}

/// The same of [`DeviceMemoryMut`].
pub trait Writable: Readable + Send {
    /// As [`read`](Readable::read), for a use that writes: waits for recorded reads, too.
    #[doc(hidden)]
    fn write<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>);
}

macro_rules! readable {
    ($($memory:ty),*) => { $(
        impl<T: Send + Sync> DeviceMemory<T> for $memory {}
        impl<T: Send + Sync> Readable for $memory {
            fn len(&self) -> usize {
                cudarc::driver::DeviceSlice::len(self)
            }
            fn owner(&self) -> &Arc<CudaStream> {
                cudarc::driver::DeviceSlice::stream(self)
            }
            fn read<'a>(&'a self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
                self.device_ptr(stream)
            }
        }
    )* };
}

macro_rules! writable {
    ($($memory:ty),*) => { $(
        impl<T: Send + Sync> DeviceMemoryMut<T> for $memory {}
        impl<T: Send + Sync> Writable for $memory {
            fn write<'a>(&'a mut self, stream: &'a CudaStream) -> (u64, SyncOnDrop<'a>) {
                self.device_ptr_mut(stream)
            }
        }
    )* };
}

readable!(CudaSlice<T>, CudaView<'_, T>, CudaViewMut<'_, T>);
writable!(CudaSlice<T>, CudaViewMut<'_, T>);
