//! The operator: what connects a loss with its operands in candle's graph.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, CustomOp3, Layout, Shape, Storage, Tensor};

use crate::arguments::{Arguments, Operands};
use crate::error::Result;
use crate::host::{self, HostState};

/// The result of a forward pass, with what the way back needs of it.
pub(crate) struct Forward {
    /// () or (B), `f32`.
    pub(crate) value: Tensor,
    pub(crate) state: State,
}

pub(crate) enum State {
    Host(Box<HostState>),
    #[cfg(feature = "cuda")]
    Device(crate::device::DeviceState),
}

/// Gradients as the core computes them: `f32` of the queries, with separate positives below, and of the candidates if
/// they need it; `f64` of the temperature.
pub(crate) struct Found {
    pub(crate) queries: Tensor,
    pub(crate) candidates: Option<Tensor>,
    pub(crate) temperature: Tensor,
}

/// Runs the forward pass, and connects its value with the operands.
///
/// The pass runs before candle's operator, which then hands its value over: so its errors keep their type.
pub(crate) fn apply(
    arguments: Arguments,
    operands: Operands,
    forward: impl FnOnce(&Arguments, &Operands) -> Result<Forward>,
) -> Result<Tensor> {
    let Forward { value, state } = forward(&arguments, &operands)?;
    if !arguments.wanted.any() {
        return Ok(value);
    }
    let Operands { queries, candidates, temperature } = operands;
    let op = SoftmaxLoss { arguments, value, state };
    Ok(match temperature {
        None => queries.apply_op2(&candidates, op)?,
        Some(temperature) => queries.apply_op3(&candidates, &temperature, op)?,
    })
}

struct SoftmaxLoss {
    arguments: Arguments,
    value: Tensor,
    state: State,
}

impl SoftmaxLoss {
    fn gradients(&self, queries: &Tensor, candidates: &Tensor, upstream: &Tensor) -> Result<Found> {
        match &self.state {
            State::Host(state) => host::backward(&self.arguments, state, queries, candidates, upstream),
            #[cfg(feature = "cuda")]
            State::Device(state) => crate::device::backward(&self.arguments, state, queries, candidates, upstream),
        }
    }

    fn value_on_cpu(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("{NAME}: operands in host memory, and a value that is elsewhere"),
        }
    }

    fn value_on_device(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => candle_core::bail!("{NAME}: operands on a GPU, and a value that is elsewhere"),
        }
    }
}

const NAME: &str = "catalog_softmax_loss";

/// A gradient in its operand's type, where the operand needs one.
fn of_operand(found: Option<Tensor>, operand: &Tensor, wanted: bool) -> candle_core::Result<Option<Tensor>> {
    found.filter(|_| wanted).map(|d| d.to_dtype(operand.dtype())).transpose()
}

impl CustomOp2 for SoftmaxLoss {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.value_on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.value_on_device()
    }

    fn bwd(
        &self,
        queries: &Tensor,
        candidates: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let found = self.gradients(queries, candidates, upstream)?;
        let wanted = self.arguments.wanted;
        Ok((
            of_operand(Some(found.queries), queries, wanted.queries)?,
            of_operand(found.candidates, candidates, wanted.candidates)?,
        ))
    }
}

impl CustomOp3 for SoftmaxLoss {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.value_on_cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.value_on_device()
    }

    fn bwd(
        &self,
        queries: &Tensor,
        candidates: &Tensor,
        temperature: &Tensor,
        _: &Tensor,
        upstream: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let found = self.gradients(queries, candidates, upstream)?;
        let wanted = self.arguments.wanted;
        let d_temperature = found.temperature.reshape(temperature.shape())?;
        Ok((
            of_operand(Some(found.queries), queries, wanted.queries)?,
            of_operand(found.candidates, candidates, wanted.candidates)?,
            of_operand(Some(d_temperature), temperature, wanted.temperature)?,
        ))
    }
}
