//! Learned matrices, the gradients of their rows, and the optimiser: row-wise Adagrad, the crate's own.
//!
//! Row-wise Adagrad keeps one number per row, the sum of its mean squared gradients. A row that a step does not touch
//! costs nothing and keeps value and state, as a table of many million items needs.

use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::{Embeddings, Error, Matrix};
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

/// A learned (rows, dim) matrix with its optimiser.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub rows: usize,
    pub dim: usize,
    pub values: Vec<f32>,
    pub optimizer: Optimizer,
}

impl Parameter {
    /// The learning rate is 0 until it is set.
    pub fn zeros(rows: usize, dim: usize) -> Result<Self, Error> {
        Ok(Parameter { rows, dim, values: vec![0.0; rows * dim], optimizer: Optimizer::row_adagrad(rows, 0.0)? })
    }

    /// Normal entries such that a row has about unit length.
    pub fn random(rows: usize, dim: usize, rng: &mut StdRng) -> Result<Self, Error> {
        let mut parameter = Parameter::zeros(rows, dim)?;
        let scale = 1.0 / (dim as f32).sqrt();
        parameter.values.fill_with(|| {
            let sample: f32 = StandardNormal.sample(rng);
            scale * sample
        });
        Ok(parameter)
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    pub fn embeddings(&self) -> Embeddings<'_> {
        Embeddings::new(&self.values, self.rows, self.dim)
    }

    /// A copy of some rows, one after the other.
    pub fn gather(&self, rows: &[u32]) -> Vec<f32> {
        rows.iter().flat_map(|&row| self.row(row as usize)).copied().collect()
    }

    /// One step of the optimiser on the rows that `gradient` has.
    pub fn step(&mut self, gradient: &RowGradient) -> Result<(), Error> {
        let mut table = TableMut::new(&mut self.values, self.rows, self.dim);
        self.optimizer.step_rows(&mut table, &gradient.rows, &gradient.values)
    }
}

/// The gradient of a [`Parameter`] in some of its rows, each once, in ascending order.
#[derive(Debug)]
pub struct RowGradient {
    rows: Vec<u32>,
    values: Matrix<f32>,
}

impl RowGradient {
    /// 0 in these rows, which may be named several times.
    pub fn zeros(rows: impl IntoIterator<Item = u32>, dim: usize) -> Self {
        let mut rows: Vec<u32> = rows.into_iter().collect();
        rows.sort_unstable();
        rows.dedup();
        let values = Matrix { values: vec![0.0; rows.len() * dim], rows: rows.len(), dim };
        RowGradient { rows, values }
    }

    /// Adds `scale * d_row` to the gradient of `row`, one of its rows.
    pub fn add(&mut self, row: usize, d_row: &[f32], scale: f32) {
        let at = self.rows.binary_search(&(row as u32)).expect("a row that the gradient was made for");
        let sums = &mut self.values.values[at * d_row.len()..][..d_row.len()];
        for (sum, d) in sums.iter_mut().zip(d_row) {
            *sum += scale * d;
        }
    }
}

#[cfg(test)]
impl RowGradient {
    pub fn iter(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.rows.iter().map(|&row| row as usize).zip(self.values.values.chunks_exact(self.values.dim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_step_moves_touched_rows_and_their_state_alone() {
        let mut before = Parameter::random(5, 3, &mut StdRng::seed_from_u64(1)).unwrap();
        before.optimizer.set_learning_rate(0.1).unwrap();
        let mut after = before.clone();
        let mut gradient = RowGradient::zeros([3, 1, 3], 3);
        gradient.add(3, &[1.0, 0.0, -2.0], 1.0);
        gradient.add(1, &[0.5, 0.5, 0.5], 1.0);
        gradient.add(3, &[1.0, 1.0, 1.0], 2.0);
        assert_eq!(gradient.iter().collect::<Vec<_>>(), [(1, &[0.5; 3][..]), (3, &[3.0, 2.0, 0.0])]);
        after.step(&gradient).unwrap();
        let accumulator = after.optimizer.accumulator().unwrap();
        for row in [0, 2, 4] {
            assert_eq!((after.row(row), accumulator[row]), (before.row(row), 0.0));
        }
        // Row 3 has gradient (3, 2, 0): mean square 13/3.
        assert!((accumulator[3] - 13.0 / 3.0).abs() < 1e-6);
        assert!((after.row(3)[0] - (before.row(3)[0] - 0.1 * 3.0 / (13.0f32 / 3.0).sqrt())).abs() < 1e-6);
        assert_eq!(after.row(3)[2], before.row(3)[2]);
        assert_ne!(after.row(1), before.row(1));
    }
}
