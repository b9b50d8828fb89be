//! The two towers.
//!
//! Item tower: a row of the table `items`. Query tower: the last K items' rows of a second table `history`, pooled with
//! weights that fall with age, and a small learned layer on the pooled row x:
//!
//! ```text
//! x = Σ_a w_a history[item taken a steps before the last],   w_a = DECAY^a / Σ DECAY^a
//! query = x + tanh(W x + b)
//! ```

use catalog_softmax::Error;
use rand::rngs::StdRng;

use crate::parameter::{Parameter, RowGradient};

/// How much less an item counts than the one taken after it.
const DECAY: f32 = 0.9;

#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// (N, D), the item tower.
    pub items: Parameter,
    /// (N, D), what the query tower pools.
    pub history: Parameter,
    /// (D, D) and (1, D), the layer.
    pub weight: Parameter,
    pub bias: Parameter,
    /// (1, 1), moved only with `--learn-temperature`.
    pub log_temperature: Parameter,
}

/// The gradient of the query tower.
pub struct QueryTowerGradient {
    pub history: RowGradient,
    pub weight: RowGradient,
    pub bias: RowGradient,
}

/// What the query tower computed, kept for the way back. All (B, D).
#[derive(Debug, Default)]
pub struct Activations {
    pooled: Vec<f32>,
    /// `tanh(W x + b)`.
    layer: Vec<f32>,
    pub queries: Vec<f32>,
}

impl Model {
    /// Random tables; the layer starts as nothing, so that a query starts as its pooled row.
    pub fn new(num_items: usize, dim: usize, temperature: f64, rng: &mut StdRng) -> Result<Self, Error> {
        let mut model = Model::zeros(num_items, dim)?;
        model.items = Parameter::random(num_items, dim, rng)?;
        model.history = Parameter::random(num_items, dim, rng)?;
        model.log_temperature.values[0] = temperature.ln() as f32;
        Ok(model)
    }

    pub fn zeros(num_items: usize, dim: usize) -> Result<Self, Error> {
        Ok(Model {
            items: Parameter::zeros(num_items, dim)?,
            history: Parameter::zeros(num_items, dim)?,
            weight: Parameter::zeros(dim, dim)?,
            bias: Parameter::zeros(1, dim)?,
            log_temperature: Parameter::zeros(1, 1)?,
        })
    }

    /// Of the steps to come.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<(), Error> {
        self.parameters_mut().into_iter().try_for_each(|(_, p)| p.optimizer.set_learning_rate(learning_rate))
    }

    pub fn dim(&self) -> usize {
        self.items.dim
    }

    /// Whether no parameter is NaN or infinite, and no optimiser's state.
    pub fn is_finite(&self) -> bool {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        self.parameters().iter().all(|(_, Parameter { values, optimizer, .. })| {
            finite(values) && optimizer.accumulator().is_none_or(finite)
        })
    }

    /// The parameters by name, as checkpoints hold them.
    pub fn parameters(&self) -> [(&'static str, &Parameter); 5] {
        let Model { items, history, weight, bias, log_temperature } = self;
        [
            ("items", items),
            ("history", history),
            ("weight", weight),
            ("bias", bias),
            ("log_temperature", log_temperature),
        ]
    }

    pub fn parameters_mut(&mut self) -> [(&'static str, &mut Parameter); 5] {
        let Model { items, history, weight, bias, log_temperature } = self;
        [
            ("items", items),
            ("history", history),
            ("weight", weight),
            ("bias", bias),
            ("log_temperature", log_temperature),
        ]
    }

    /// The query tower. Each history is oldest first and not empty.
    pub fn queries(&self, histories: &[&[u32]], out: &mut Activations) {
        let dim = self.dim();
        let Activations { pooled, layer, queries } = out;
        for buffer in [&mut *pooled, layer, queries] {
            buffer.clear();
            buffer.resize(histories.len() * dim, 0.0);
        }
        for (b, history) in histories.iter().enumerate() {
            let row = b * dim..(b + 1) * dim;
            let (x, t, q) = (&mut pooled[row.clone()], &mut layer[row.clone()], &mut queries[row]);
            for (item, weight) in with_weights(history) {
                axpy(weight, self.history.row(item), x);
            }
            for k in 0..dim {
                t[k] = (dot(self.weight.row(k), x) + self.bias.values[k]).tanh();
                q[k] = x[k] + t[k];
            }
        }
    }

    /// What `d_queries` (B, D) means for the query tower's parameters.
    pub fn queries_back(
        &self,
        histories: &[&[u32]],
        activations: &Activations,
        d_queries: &[f32],
    ) -> QueryTowerGradient {
        let dim = self.dim();
        let mut gradient = QueryTowerGradient {
            history: RowGradient::zeros(histories.iter().copied().flatten().copied(), dim),
            weight: RowGradient::zeros(0..dim as u32, dim),
            bias: RowGradient::zeros([0], dim),
        };
        let (mut d_pre, mut d_x) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        for (b, history) in histories.iter().enumerate() {
            let row = b * dim..(b + 1) * dim;
            let (x, t, d_q) = (&activations.pooled[row.clone()], &activations.layer[row.clone()], &d_queries[row]);
            d_x.copy_from_slice(d_q);
            for k in 0..dim {
                d_pre[k] = d_q[k] * (1.0 - t[k] * t[k]);
                gradient.weight.add(k, x, d_pre[k]);
                axpy(d_pre[k], self.weight.row(k), &mut d_x);
            }
            gradient.bias.add(0, &d_pre, 1.0);
            for (item, weight) in with_weights(history) {
                gradient.history.add(item, &d_x, weight);
            }
        }
        gradient
    }

    /// One step of the optimiser on the query tower.
    pub fn step_query_tower(&mut self, gradient: &QueryTowerGradient) -> Result<(), Error> {
        self.history.step(&gradient.history)?;
        self.weight.step(&gradient.weight)?;
        self.bias.step(&gradient.bias)
    }
}

/// Each item of a history with its weight, latest first.
pub fn with_weights(history: &[u32]) -> impl Iterator<Item = (usize, f32)> {
    let total = (1.0 - DECAY.powi(history.len() as i32)) / (1.0 - DECAY);
    let weights = std::iter::successors(Some(1.0 / total), |weight| Some(weight * DECAY));
    history.iter().rev().map(|&item| item as usize).zip(weights)
}

pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    // Eight sums side by side, in an order that a compiler may vectorise.
    let (a_blocks, b_blocks) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(x, y)| x * y).sum();
    let mut sums = [0.0f32; 8];
    for (x, y) in a_blocks.zip(b_blocks) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn axpy(scale: f32, from: &[f32], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += scale * from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    const HISTORIES: [&[u32]; 3] = [&[0, 1, 2], &[3], &[2, 2, 4, 0]];

    /// A loss that is linear in the queries: Σ direction · query, in float64.
    fn loss(model: &Model, direction: &[f32]) -> f64 {
        let mut activations = Activations::default();
        model.queries(&HISTORIES, &mut activations);
        activations.queries.iter().zip(direction).map(|(q, d)| f64::from(*q) * f64::from(*d)).sum()
    }

    #[test]
    fn the_way_back_agrees_with_finite_differences() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut model = Model::new(5, 9, 0.1, &mut rng).unwrap();
        model.weight = Parameter::random(9, 9, &mut rng).unwrap();
        model.bias = Parameter::random(1, 9, &mut rng).unwrap();
        let direction = Parameter::random(3, 9, &mut rng).unwrap().values;
        let mut activations = Activations::default();
        model.queries(&HISTORIES, &mut activations);
        let gradient = model.queries_back(&HISTORIES, &activations, &direction);

        let gradients = [("history", &gradient.history), ("weight", &gradient.weight), ("bias", &gradient.bias)];
        for (name, gradient) in gradients {
            for (row, d_row) in gradient.iter() {
                for (k, &expected) in d_row.iter().enumerate() {
                    let moved = |by: f32| {
                        let mut model = model.clone();
                        for (_, parameter) in model.parameters_mut().into_iter().filter(|(n, _)| *n == name) {
                            parameter.values[row * 9 + k] += by;
                        }
                        loss(&model, &direction)
                    };
                    let found = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                    assert!((found - f64::from(expected)).abs() < 2e-4, "{name}[{row}][{k}]: {found} {expected}");
                }
            }
        }
        assert_eq!(gradient.history.iter().count(), 5);
        assert_eq!(gradient.weight.iter().count(), 9);
    }

    #[test]
    fn recent_items_weigh_more_and_weights_sum_to_one() {
        let weights: Vec<(usize, f32)> = with_weights(&[5, 6, 7]).collect();
        assert_eq!(weights.iter().map(|w| w.0).collect::<Vec<_>>(), [7, 6, 5]);
        assert!((weights.iter().map(|w| w.1).sum::<f32>() - 1.0).abs() < 1e-6);
        assert!((weights[2].1 / weights[0].1 - DECAY * DECAY).abs() < 1e-6);
    }
}
