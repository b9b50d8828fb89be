//! The two towers as candle variables: the formulas of `examples/train_two_tower/model.rs`.

use candle_core::{Device, Result, Tensor, Var};

use crate::model::{Model, with_weights};
use crate::parameter::Parameter;

pub struct Towers {
    /// (N, D), the item tower.
    pub items: Var,
    /// (N, D), what the query tower pools.
    history: Var,
    /// (D, D) and (1, D), its layer.
    weight: Var,
    bias: Var,
}

impl Towers {
    /// With the weights of `model`.
    pub fn new(model: &Model) -> Result<Self> {
        let var = |parameter: &Parameter| {
            let Parameter { rows, dim, values, .. } = parameter;
            Var::from_slice(values, (*rows, *dim), &Device::Cpu)
        };
        Ok(Towers {
            items: var(&model.items)?,
            history: var(&model.history)?,
            weight: var(&model.weight)?,
            bias: var(&model.bias)?,
        })
    }

    pub fn parameters(&self) -> Vec<Var> {
        [&self.items, &self.history, &self.weight, &self.bias].into_iter().cloned().collect()
    }

    /// (B, D): of each user's last items x = Σ w history[item], then x + tanh(W x + b).
    pub fn queries(&self, histories: &[&[u32]]) -> Result<Tensor> {
        let (b, longest) = (histories.len(), histories.iter().map(|history| history.len()).max().unwrap_or(0));
        // Shorter histories end with items of weight 0.
        let (mut items, mut weights) = (vec![0u32; b * longest], vec![0f32; b * longest]);
        for (row, history) in histories.iter().enumerate() {
            for (place, (item, weight)) in with_weights(history).enumerate() {
                (items[row * longest + place], weights[row * longest + place]) = (item as u32, weight);
            }
        }
        let device = self.history.device();
        let rows = self.history.index_select(&Tensor::from_vec(items, b * longest, device)?, 0)?;
        let rows = rows.reshape((b, longest, rows.dim(1)?))?;
        let pooled = rows.broadcast_mul(&Tensor::from_vec(weights, (b, longest, 1), device)?)?.sum(1)?;
        let layer = pooled.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?.tanh()?;
        pooled + layer
    }

    /// Copies the weights into `model`, which is what the evaluation takes.
    pub fn copy_to(&self, model: &mut Model) -> Result<()> {
        let Model { items, history, weight, bias, .. } = model;
        for (to, var) in [(items, &self.items), (history, &self.history), (weight, &self.weight), (bias, &self.bias)] {
            to.values = var.flatten_all()?.to_vec1()?;
        }
        Ok(())
    }
}
