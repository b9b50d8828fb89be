//! All that a step returns, in one value.

use std::ops::{Deref, DerefMut};

use catalog_softmax::{Backend, Batch, Gradients, Loss, Output, Request, Result};

/// An [`Output`] and, after a request for them, gradients.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step<T = f32> {
    pub output: Output<T>,
    pub gradients: Option<Gradients<T>>,
}

impl<T: Default> Step<T> {
    /// Computes into this step, whose memory is reused.
    pub fn compute<B: Backend<Real = T> + ?Sized>(
        &mut self,
        backend: &mut B,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
    ) -> Result<()> {
        match request.gradients {
            true => _ = self.gradients.get_or_insert_default(),
            false => self.gradients = None,
        }
        backend.compute(batch, loss, request, &mut self.output, self.gradients.as_mut())
    }
}

impl<T> From<(Output<T>, Gradients<T>)> for Step<T> {
    fn from((output, gradients): (Output<T>, Gradients<T>)) -> Self {
        Step { output, gradients: Some(gradients) }
    }
}

impl<T> Deref for Step<T> {
    type Target = Output<T>;

    fn deref(&self) -> &Output<T> {
        &self.output
    }
}

impl<T> DerefMut for Step<T> {
    fn deref_mut(&mut self) -> &mut Output<T> {
        &mut self.output
    }
}
