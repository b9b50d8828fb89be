//! Embeddings that a rank received.

use half::{bf16, f16};

use crate::problem::embeddings::{DType, Embeddings};

/// A matrix of embeddings of any element type.
#[derive(Debug)]
pub(super) struct Received {
    elements: OwnedElements,
    rows: usize,
    dim: usize,
}

#[derive(Debug)]
enum OwnedElements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Received {
    /// Of values that the element type represents exactly.
    pub(super) fn from_f32(values: Vec<f32>, dim: usize, dtype: DType) -> Self {
        let rows = values.len() / dim;
        let elements = match dtype {
            DType::F32 => OwnedElements::F32(values),
            DType::F16 => OwnedElements::F16(values.iter().map(|&v| f16::from_f32(v)).collect()),
            DType::Bf16 => OwnedElements::Bf16(values.iter().map(|&v| bf16::from_f32(v)).collect()),
        };
        Received { elements, rows, dim }
    }

    /// Of elements as they lie in memory.
    pub(super) fn from_bytes(bytes: &[u8], dim: usize, dtype: DType) -> Self {
        let rows = bytes.len() / (dim * dtype.size());
        let elements = match dtype {
            DType::F32 => OwnedElements::F32(bytemuck::pod_collect_to_vec(bytes)),
            DType::F16 => OwnedElements::F16(bytemuck::pod_collect_to_vec(bytes)),
            DType::Bf16 => OwnedElements::Bf16(bytemuck::pod_collect_to_vec(bytes)),
        };
        Received { elements, rows, dim }
    }

    pub(super) fn view(&self) -> Embeddings<'_> {
        match &self.elements {
            OwnedElements::F32(v) => Embeddings::new(v, self.rows, self.dim),
            OwnedElements::F16(v) => Embeddings::new(v, self.rows, self.dim),
            OwnedElements::Bf16(v) => Embeddings::new(v, self.rows, self.dim),
        }
    }
}
