//! The rules: their constants and state, and what each does to a row. The only place where they differ.

use std::ops::Range;

/// A rule with its constants and its state for all rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Rule {
    Sgd,
    RowAdagrad {
        eps: f64,
        /// (M): G of each row.
        accumulator: Vec<f32>,
    },
    Adam {
        betas: [f64; 2],
        eps: f64,
        dim: usize,
        /// (M, D)
        m: Vec<f32>,
        /// (M, D)
        v: Vec<f32>,
    },
}

impl Rule {
    /// The rule at step `step`, counted from 1.
    pub(super) fn at_step(&mut self, step: u64, learning_rate: f64) -> RuleRows<'_> {
        let rate = learning_rate as f32;
        match self {
            Rule::Sgd => RuleRows::Sgd { rate },
            Rule::RowAdagrad { eps, accumulator } => RuleRows::RowAdagrad { rate, eps: *eps as f32, accumulator },
            Rule::Adam { betas, eps, m, v, .. } => {
                RuleRows::Adam { adam: Adam::new(*betas, *eps, step, learning_rate), m, v }
            }
        }
    }
}

/// A rule at one step, with its state of a stretch of rows. Rows are counted from the start of the stretch.
#[derive(Debug)]
pub(super) enum RuleRows<'o> {
    Sgd { rate: f32 },
    RowAdagrad { rate: f32, eps: f32, accumulator: &'o mut [f32] },
    Adam { adam: Adam, m: &'o mut [f32], v: &'o mut [f32] },
}

impl<'o> RuleRows<'o> {
    pub(super) fn split_at(self, row: usize, dim: usize) -> (RuleRows<'o>, RuleRows<'o>) {
        match self {
            RuleRows::Sgd { rate } => (RuleRows::Sgd { rate }, RuleRows::Sgd { rate }),
            RuleRows::RowAdagrad { rate, eps, accumulator } => {
                let (accumulator, below) = accumulator.split_at_mut(row);
                (
                    RuleRows::RowAdagrad { rate, eps, accumulator },
                    RuleRows::RowAdagrad { rate, eps, accumulator: below },
                )
            }
            RuleRows::Adam { adam, m, v } => {
                let ((m, m_below), (v, v_below)) = (m.split_at_mut(row * dim), v.split_at_mut(row * dim));
                (RuleRows::Adam { adam, m, v }, RuleRows::Adam { adam, m: m_below, v: v_below })
            }
        }
    }

    /// Takes in what the rule needs of the whole gradient of `row`.
    pub(super) fn row(&mut self, row: usize, gradient: &[f32]) -> RowRule<'_> {
        let elements = row * gradient.len()..(row + 1) * gradient.len();
        match self {
            RuleRows::Sgd { rate } => RowRule::Gradient { rate: *rate, divisor: 1.0 },
            RuleRows::RowAdagrad { rate, eps, accumulator } => {
                let sum = &mut accumulator[row];
                *sum = (f64::from(*sum) + mean_square(gradient)) as f32;
                RowRule::Gradient { rate: *rate, divisor: sum.sqrt() + *eps }
            }
            RuleRows::Adam { adam, m, v } => {
                RowRule::Moments { adam: *adam, m: &mut m[elements.clone()], v: &mut v[elements] }
            }
        }
    }
}

/// What a step does to the elements of one row.
#[derive(Debug)]
pub(super) enum RowRule<'r> {
    /// `w ← decay · w − rate · g / divisor`
    Gradient { rate: f32, divisor: f32 },
    /// `w ← decay · w − learning_rate · m̂ / (sqrt(v̂) + eps)`
    Moments { adam: Adam, m: &'r mut [f32], v: &'r mut [f32] },
}

impl RowRule<'_> {
    /// Steps the columns `columns` of a row: `w` and `gradient` hold these columns alone. `decay` is
    /// `1 − learning_rate · weight_decay`, so without decay it is exactly 1.
    pub(super) fn step(&mut self, decay: f32, columns: Range<usize>, w: &mut [f32], gradient: &[f32]) {
        match self {
            RowRule::Gradient { rate, divisor } => {
                for (w, g) in w.iter_mut().zip(gradient) {
                    *w = decay * *w - *rate * g / *divisor;
                }
            }
            RowRule::Moments { adam, m, v } => {
                let moments = m[columns.clone()].iter_mut().zip(&mut v[columns]);
                for ((w, g), (m, v)) in w.iter_mut().zip(gradient).zip(moments) {
                    *w = decay * *w - adam.change(m, v, *g);
                }
            }
        }
    }
}

/// Constants of Adam at one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Adam {
    beta1: f32,
    /// `1 − beta1`
    new_m: f32,
    beta2: f32,
    /// `1 − beta2`
    new_v: f32,
    /// `learning_rate / (1 − beta1^t)`
    rate: f32,
    /// `sqrt(1 − beta2^t)`
    correct_v: f32,
    eps: f32,
}

impl Adam {
    fn new([beta1, beta2]: [f64; 2], eps: f64, step: u64, learning_rate: f64) -> Self {
        Adam {
            beta1: beta1 as f32,
            new_m: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            new_v: (1.0 - beta2) as f32,
            rate: (learning_rate / (1.0 - libm::pow(beta1, step as f64))) as f32,
            correct_v: (1.0 - libm::pow(beta2, step as f64)).sqrt() as f32,
            eps: eps as f32,
        }
    }

    /// Takes a gradient into the moments of its element, and returns `learning_rate · m̂ / (sqrt(v̂) + eps)`.
    #[inline]
    fn change(&self, m: &mut f32, v: &mut f32, g: f32) -> f32 {
        // Not `m + (1 − beta1)(g − m)`: where beta1 is small, a small g would be lost in the difference.
        *m = self.beta1 * *m + self.new_m * g;
        *v = self.beta2 * *v + self.new_v * (g * g);
        self.rate * *m / (v.sqrt() / self.correct_v + self.eps)
    }
}

/// In float64, where no square of an f32 overflows or underflows. Lanes of one fixed number, so that the sum is the
/// same everywhere.
fn mean_square(gradient: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0f64; LANES];
    let (whole, rest) = gradient.as_chunks::<LANES>();
    for lanes in whole {
        for (sum, &g) in sums.iter_mut().zip(lanes) {
            *sum += f64::from(g) * f64::from(g);
        }
    }
    for (sum, &g) in sums.iter_mut().zip(rest) {
        *sum += f64::from(g) * f64::from(g);
    }
    sums.iter().sum::<f64>() / gradient.len() as f64
}
