//! Optimisers of an embedding table: what a step does to the rows, in place and in parallel.
//!
//! A [`TableMut`] is the table to train, (M, D) in f32, f16 or bf16, and an [`Optimizer`] has a rule with its state.
//! [`Optimizer::step`] takes a dense gradient (M, D), and [`Optimizer::step_rows`] gradients of single rows.
//!
//! # Rules
//!
//! With `g` the gradient of a row `w`, all elementwise but for G, and `t` the number of the step, counted from 1:
//!
//! | rule | state, f32 | step |
//! |---|---|---|
//! | [`sgd`](Optimizer::sgd) | none | `w ← (1 − lr·λ) w − lr·g` |
//! | [`row_adagrad`](Optimizer::row_adagrad) | G (M) | `G ← G + mean_d g²`, `w ← (1 − lr·λ) w − lr·g / (sqrt(G) + eps)` |
//! | [`adam`](Optimizer::adam) | m, v (M, D) | `m ← β₁m + (1 − β₁)g`, `v ← β₂v + (1 − β₂)g²`, `w ← (1 − lr·λ) w − lr·m̂ / (sqrt(v̂) + eps)` with `m̂ = m / (1 − β₁ᵗ)`, `v̂ = v / (1 − β₂ᵗ)` |
//!
//! `lr` is the learning rate, and λ the [weight decay](Optimizer::with_weight_decay), which is decoupled: it does not
//! go through G, m or v. λ is 0 unless you set it.
//!
//! Sources: Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
//! JMLR 2011 (Adagrad); Mudigere et al., "Software-Hardware Co-design for Fast and Scalable Training of Deep Learning
//! Recommendation Models", ISCA 2022 (one G for each row, as DLRM's tables have it); Kingma and Ba, "Adam: A Method for
//! Stochastic Optimization", ICLR 2015, algorithm 1; Loshchilov and Hutter, "Decoupled Weight Decay Regularization",
//! ICLR 2019 (AdamW).
//!
//! # Row-sparse steps
//!
//! A row that [`step_rows`](Optimizer::step_rows) does not name keeps its embedding and its state: its m and v do not
//! fade and its weights do not decay, as in PyTorch's `SparseAdam`. The bias correction counts all steps of the
//! optimiser, those that left a row out included. A dense step of a zero gradient is therefore not the same as no step,
//! except for SGD and row-wise Adagrad without weight decay.
//!
//! # f16 and bf16 tables
//!
//! A step is computed in f32 and has to be rounded. The nearest number would often be the old one, and the step lost.
//! There are two ways out:
//!
//! * **Stochastic rounding**, unless you choose the other. An element becomes one of its two neighbours in the table's
//!   type, each with the probability that makes the expectation exact. The random bits are a function of
//!   [the seed](Optimizer::with_rounding_seed), the step, the row and the column alone. It takes no memory.
//! * **A master copy** in f32 ([`with_master_copy`](Optimizer::with_master_copy)), which takes the steps. The table is the
//!   copy rounded to nearest. It takes 4 bytes for each element.
//!
//! # Promises
//!
//! The same steps give bitwise the same table and state on the same machine, for any number of threads.
//!
//! Numbers that are not finite propagate, and reach no other row. A NaN in a gradient makes its element NaN, and with
//! row-wise Adagrad the row, by its G. An infinity makes its element infinite with SGD and NaN with the others;
//! row-wise Adagrad does not move that row again, because its G is infinite.
//!
//! ```
//! use catalog_softmax::optimizer::{Optimizer, TableMut};
//! use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Pool, Similarity};
//!
//! let (b, m, d) = (4, 100, 8);
//! let queries: Vec<f32> = (0..b * d).map(|i| (i as f32).sin()).collect();
//! let mut table: Vec<f32> = (0..m * d).map(|i| (i as f32).cos()).collect();
//! let (mut cpu, loss) = (Cpu::new(), Loss::softmax(Similarity::Cosine, 0.1));
//! let mut optimizer = Optimizer::row_adagrad(m, 0.1)?;
//! let mut losses = Vec::new();
//! for _step in 0..3 {
//!     let pool = Pool::new(Embeddings::new(&table, m, d));
//!     let batch = Batch::builder(Embeddings::new(&queries, b, d), pool).positives(&[3u32, 14, 15, 92]).build()?;
//!     let (output, gradients) = cpu.value_and_grad(&batch, &loss)?;
//!     losses.push(output.total);
//!     optimizer.step(&mut TableMut::new(&mut table, m, d), &gradients.d_candidates[0])?;
//! }
//! assert!(losses[2] < losses[1] && losses[1] < losses[0]);
//! # Ok::<(), catalog_softmax::Error>(())
//! ```

mod check;
mod rounding;
mod rule;
mod saved;
mod stretch;
mod table_mut;
#[cfg(test)]
mod tests;

use crate::error::{Result, does_not_apply};
use crate::problem::embeddings::{Embeddings, Matrix};
use check::{check_decay, check_eps, check_gradient, check_rate, check_rows, check_shape, check_sum, state};
use rounding::StepBits;
use rule::Rule;
pub(crate) use stretch::Stretch;
pub use table_mut::{ElementsMut, TableMut};

/// A rule with its options and its state. The module [`optimizer`](self) has the formulas.
///
/// ```
/// use catalog_softmax::Matrix;
/// use catalog_softmax::half::bf16;
/// use catalog_softmax::optimizer::{Optimizer, TableMut};
///
/// let (m, d) = (1000, 4);
/// let mut table = vec![bf16::ONE; m * d];
/// let mut adam = Optimizer::adam(m, d, 0.01)?.with_betas(0.9, 0.98)?.with_weight_decay(0.1)?;
/// for step in 1..=3 {
///     adam.set_learning_rate(0.01 / f64::from(step))?;
///     let gradient = Matrix { values: vec![0.5; 2 * d], rows: 2, dim: d };
///     adam.step_rows(&mut TableMut::new(&mut table, m, d), &[17, 42], &gradient)?;
/// }
/// assert!(table[17 * d] < bf16::ONE && table[18 * d] == bf16::ONE);
///
/// let restored = Optimizer::from_bytes(&adam.to_bytes())?;
/// assert_eq!((restored.steps(), restored), (3, adam));
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Optimizer {
    rule: Rule,
    learning_rate: f64,
    weight_decay: f64,
    rounding_seed: u64,
    steps: u64,
    master: Option<Matrix<f32>>,
}

impl Optimizer {
    /// Stochastic gradient descent. It has no state, so it takes tables of every shape.
    ///
    /// `learning_rate` is finite and >= 0 in f32, here and below. At 0, where many a warm-up begins, a step changes the
    /// state alone.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for the learning rate.
    pub fn sgd(learning_rate: f64) -> Result<Self> {
        check_rate(learning_rate)?;
        Ok(Self::new(Rule::Sgd, learning_rate))
    }

    /// Row-wise Adagrad for tables of `rows` rows, with `G = 0` and `eps = 1e-8` to begin with. 4 bytes of state for
    /// each row.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) for the learning rate; [`Error::Shape`](crate::Error::Shape) for `rows` of
    /// 0 or past 2^31 - 1, and if there is not enough memory.
    pub fn row_adagrad(rows: usize, learning_rate: f64) -> Result<Self> {
        check_rate(learning_rate)?;
        Ok(Self::new(Rule::RowAdagrad { eps: EPS, accumulator: state(rows, 1)? }, learning_rate))
    }

    /// Adam for tables of shape (`rows`, `dim`), with `β = (0.9, 0.999)` and `eps = 1e-8`. 8 bytes of state for each
    /// element; the system provides them as rows are first stepped.
    ///
    /// # Errors
    /// As [`row_adagrad`](Optimizer::row_adagrad), and for a `dim` of 0.
    pub fn adam(rows: usize, dim: usize, learning_rate: f64) -> Result<Self> {
        check_rate(learning_rate)?;
        let (m, v) = (state(rows, dim)?, state(rows, dim)?);
        Ok(Self::new(Rule::Adam { betas: [0.9, 0.999], eps: EPS, dim, m, v }, learning_rate))
    }

    fn new(rule: Rule, learning_rate: f64) -> Self {
        Optimizer { rule, learning_rate, weight_decay: 0.0, rounding_seed: 0, steps: 0, master: None }
    }

    /// Sets eps of Adagrad and Adam, which is added to the root and keeps the quotient finite.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) unless it is finite and > 0 in f32;
    /// [`Error::DoesNotApply`](crate::Error::DoesNotApply) for SGD.
    pub fn with_eps(mut self, new: f64) -> Result<Self> {
        check_eps(new)?;
        match &mut self.rule {
            Rule::Sgd => return Err(does_not_apply("eps", "Adagrad and Adam have one")),
            Rule::RowAdagrad { eps, .. } | Rule::Adam { eps, .. } => *eps = new,
        }
        Ok(self)
    }

    /// Sets β₁ and β₂ of Adam: what m and v keep of themselves in a step.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) unless both are in [0, 1), in f32, too;
    /// [`Error::DoesNotApply`](crate::Error::DoesNotApply) for other rules.
    pub fn with_betas(mut self, beta1: f64, beta2: f64) -> Result<Self> {
        check::check_beta("beta1", beta1)?;
        check::check_beta("beta2", beta2)?;
        let Rule::Adam { betas, .. } = &mut self.rule else {
            return Err(does_not_apply("betas", "Adam has them"));
        };
        *betas = [beta1, beta2];
        Ok(self)
    }

    /// Sets λ: a step multiplies the rows that it changes by `1 − learning_rate · λ`.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) unless it is finite and >= 0 in f32.
    pub fn with_weight_decay(mut self, weight_decay: f64) -> Result<Self> {
        check_decay(weight_decay)?;
        self.weight_decay = weight_decay;
        Ok(self)
    }

    /// Sets G of every row, before the first step. A larger G makes the first steps smaller.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) unless it is finite and >= 0;
    /// [`Error::DoesNotApply`](crate::Error::DoesNotApply) for rules other than Adagrad, and after a step.
    pub fn with_initial_accumulator(mut self, sum: f32) -> Result<Self> {
        check_sum(sum)?;
        let (0, Rule::RowAdagrad { accumulator, .. }) = (self.steps, &mut self.rule) else {
            return Err(does_not_apply("initial_accumulator", "Adagrad has one, before its first step"));
        };
        accumulator.fill(sum);
        Ok(self)
    }

    /// Sets the seed of the stochastic rounding of f16 and bf16 tables, 0 otherwise. f32 tables and those with a master
    /// copy are not rounded by chance.
    pub fn with_rounding_seed(mut self, seed: u64) -> Self {
        self.rounding_seed = seed;
        self
    }

    /// Keeps a master copy in f32 of an f16 or bf16 table; from now on, steps are taken by the copy, and each row that
    /// changes is rounded from it to nearest. `table` is the table (`TableMut::view`), or the f32 embeddings of which
    /// it is the rounding. If you change the table by other means, give the copy anew.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for embeddings that do not fill their shape, a shape other than that of
    /// the state, and if there is not enough memory.
    pub fn with_master_copy(mut self, table: Embeddings<'_>) -> Result<Self> {
        table.check("table")?;
        let (rows, dim) = (table.rows(), table.dim());
        check_shape(rows, dim)?;
        self.check_state(rows, dim)?;
        let mut master = Matrix { values: state(rows, dim)?, rows, dim };
        for (row, wide) in master.values.chunks_exact_mut(dim).enumerate() {
            table.widen_row(row, wide);
        }
        self.master = Some(master);
        Ok(self)
    }

    /// Sets the learning rate of the steps that follow, for a schedule.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) as for [`sgd`](Optimizer::sgd); the rate then stays as it was.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        check_rate(learning_rate)?;
        self.learning_rate = learning_rate;
        Ok(())
    }

    /// The learning rate of the next step.
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// G of each row (M), of row-wise Adagrad.
    pub fn accumulator(&self) -> Option<&[f32]> {
        if let Rule::RowAdagrad { accumulator, .. } = &self.rule { Some(accumulator) } else { None }
    }

    /// m and v, both (M, D) row-major, of Adam.
    pub fn moments(&self) -> Option<[&[f32]; 2]> {
        if let Rule::Adam { m, v, .. } = &self.rule { Some([m, v]) } else { None }
    }

    /// The master copy (M, D), if there is one.
    pub fn master_copy(&self) -> Option<&Matrix<f32>> {
        self.master.as_ref()
    }

    /// Takes a step on all rows, by the gradient (M, D).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a table that does not fill its shape or has more than 2^31 - 1 rows,
    /// for one of another shape than state or master copy, and for a gradient of another shape than the table;
    /// [`Error::DoesNotApply`](crate::Error::DoesNotApply) for an f32 table where there is a master copy. An error
    /// leaves table, state and number of steps as they were.
    pub fn step(&mut self, table: &mut TableMut<'_>, gradient: &Matrix<f32>) -> Result<()> {
        check_gradient("gradient", gradient, table.rows(), "the rows of the table", table.dim())?;
        let stretch = self.begin(table)?;
        step_in_parallel(stretch, 0..gradient.rows, &|i| i, gradient);
        Ok(())
    }

    /// Takes a step on the rows `rows` (U) alone, by their gradients `values` (U, D). With none of them, it is a step
    /// that is counted and changes nothing.
    ///
    /// # Errors
    /// As [`step`](Optimizer::step); [`Error::Value`](crate::Error::Value) for a row that is not above the one before
    /// it, or not below M.
    pub fn step_rows(&mut self, table: &mut TableMut<'_>, rows: &[u32], values: &Matrix<f32>) -> Result<()> {
        check_gradient("values", values, rows.len(), "the length of rows", table.dim())?;
        check_rows(rows, table.rows())?;
        let stretch = self.begin(table)?;
        step_in_parallel(stretch, 0..rows.len(), &|i| rows[i] as usize, values);
        Ok(())
    }

    /// Checks the table, counts a step, and hands out all rows with their state. Each row can then be stepped once; one
    /// that is not stays as it is. After an error, nothing has changed.
    pub(crate) fn begin<'o>(&'o mut self, table: &'o mut TableMut<'_>) -> Result<Stretch<'o>> {
        self.check_table(table)?;
        // A number that no training reaches, but a saved state may have.
        self.steps = self.steps.saturating_add(1);
        Ok(Stretch {
            first: 0,
            table: table.reborrow(),
            rule: self.rule.at_step(self.steps, self.learning_rate),
            master: self.master.as_mut().map(|master| &mut master.values[..]),
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            bits: StepBits::new(self.rounding_seed, self.steps),
        })
    }
}

const EPS: f64 = 1e-8;

/// Elements of a task: 64 KiB of f32, thousands of times the work of handing it to a thread.
const ELEMENTS_PER_TASK: usize = 1 << 14;

/// Steps the rows `row_of(i)`, ascending, by row i of the gradient, for all i of `range`.
fn step_in_parallel(
    mut stretch: Stretch<'_>,
    range: std::ops::Range<usize>,
    row_of: &(impl Fn(usize) -> usize + Sync),
    gradient: &Matrix<f32>,
) {
    if range.len() <= (ELEMENTS_PER_TASK / gradient.dim).max(1) {
        return range.for_each(|i| stretch.step_row(row_of(i), gradient.row(i)));
    }
    let middle = range.start + range.len() / 2;
    let (above, below) = stretch.split_at(row_of(middle));
    rayon::join(
        || step_in_parallel(above, range.start..middle, row_of, gradient),
        || step_in_parallel(below, middle..range.end, row_of, gradient),
    );
}
