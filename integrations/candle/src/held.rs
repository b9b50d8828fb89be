//! The memory of a call's tensors, held for reading while it is used.

use candle_core::{CpuStorage, Storage, StorageRef, Tensor, TensorId, WithDType};
use catalog_softmax::half::{bf16, f16};
use catalog_softmax::{Elements, Embeddings};

use crate::arguments::{Arguments, row_stride};
use crate::error::Result;

/// Storages by the tensors that they are of. What is borrowed from them lives as long as this.
pub(crate) struct Held<'t>(Vec<(TensorId, StorageRef<'t>)>);

impl<'t> Held<'t> {
    pub(crate) fn new(tensors: impl IntoIterator<Item = &'t Tensor>) -> Self {
        Held(tensors.into_iter().map(|tensor| (tensor.id(), tensor.storage_and_layout().0)).collect())
    }

    /// Everything that a batch is made of.
    pub(crate) fn of_batch(arguments: &'t Arguments, queries: &'t Tensor, candidates: &'t Tensor) -> Self {
        Held::new([queries, candidates].into_iter().chain(arguments.vectors()))
    }

    /// The storage of one of the tensors.
    pub(crate) fn storage(&self, tensor: &Tensor) -> &Storage {
        let found = self.0.iter().find(|(id, _)| *id == tensor.id());
        &found.expect("the tensors of a call are held as a whole").1
    }

    fn cpu(&self, tensor: &Tensor) -> Result<&CpuStorage> {
        match self.storage(tensor) {
            Storage::Cpu(storage) => Ok(storage),
            _ => Err(candle_core::Error::Msg("a tensor in host memory was expected".into()).into()),
        }
    }

    /// A contiguous vector in host memory.
    pub(crate) fn slice<T: WithDType>(&self, vector: &Tensor) -> Result<&[T]> {
        let start = vector.layout().start_offset();
        Ok(&self.cpu(vector)?.as_slice::<T>()?[start..start + vector.elem_count()])
    }

    pub(crate) fn optional<T: WithDType>(&self, vector: &Option<Tensor>) -> Result<Option<&[T]>> {
        vector.as_ref().map(|vector| self.slice(vector)).transpose()
    }

    /// Rows `first..first + rows` of a row-major matrix in host memory.
    pub(crate) fn embeddings(&self, matrix: &Tensor, first: usize, rows: usize) -> Result<Embeddings<'_>> {
        let (dim, stride) = (matrix.dims()[1], row_stride(matrix.layout()));
        let start = matrix.layout().start_offset() + first * stride;
        // Of no rows or no numbers there is no memory; the core has the error for these.
        let span = if rows * dim == 0 { 0 } else { (rows - 1) * stride + dim };
        let storage = self.cpu(matrix)?;
        let elements: Elements<'_> = match storage {
            CpuStorage::F16(_) => storage.as_slice::<f16>()?[start..start + span].into(),
            CpuStorage::BF16(_) => storage.as_slice::<bf16>()?[start..start + span].into(),
            _ => storage.as_slice::<f32>()?[start..start + span].into(),
        };
        Ok(Embeddings::new(elements, rows, dim).with_stride(stride))
    }
}
