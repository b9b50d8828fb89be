//! Row-wise Adagrad on candle variables: the rule of `catalog_softmax::optimizer::Optimizer::row_adagrad`.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

/// As the crate's.
const EPS: f64 = 1e-8;

pub struct RowAdagrad {
    /// Each with the sums of its rows' mean squared gradients, (rows, 1).
    parameters: Vec<(Var, Tensor)>,
    learning_rate: f64,
}

impl RowAdagrad {
    /// Of (rows, dim) variables.
    pub fn new(parameters: Vec<Var>, learning_rate: f64) -> Result<Self> {
        let with_sums = |var: Var| {
            let sums = Tensor::zeros((var.dim(0)?, 1), DType::F32, var.device())?;
            Ok((var, sums))
        };
        Ok(RowAdagrad { parameters: parameters.into_iter().map(with_sums).collect::<Result<_>>()?, learning_rate })
    }

    /// `G ← G + mean_d g²`, `w ← w − lr · g / (sqrt(G) + eps)`. A row with gradient 0 stays as it is.
    pub fn step(&mut self, gradients: &GradStore) -> Result<()> {
        for (var, sums) in &mut self.parameters {
            let Some(gradient) = gradients.get(var) else { continue };
            let mean_square = gradient.to_dtype(DType::F64)?.sqr()?.mean_keepdim(1)?;
            *sums = (sums.to_dtype(DType::F64)? + mean_square)?.to_dtype(DType::F32)?;
            let divisor = (sums.sqrt()? + EPS)?;
            let change = (gradient * self.learning_rate)?.broadcast_div(&divisor)?;
            var.set(&(var.as_tensor() - change)?)?;
        }
        Ok(())
    }
}
