//! Learned matrices, their sparse gradients, and the optimiser: row-wise Adagrad.
//!
//! Row-wise Adagrad keeps one number per row, the sum of its mean squared gradients. A row that a step does not touch
//! costs nothing and keeps value and state, as a table of many million items needs.

use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

/// A learned (rows, dim) matrix with its optimiser state.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub rows: usize,
    pub dim: usize,
    pub values: Vec<f32>,
    /// (rows) sum over steps of the mean squared gradient.
    pub accumulator: Vec<f32>,
}

impl Parameter {
    pub fn zeros(rows: usize, dim: usize) -> Self {
        Parameter { rows, dim, values: vec![0.0; rows * dim], accumulator: vec![0.0; rows] }
    }

    /// Normal entries such that a row has about unit length.
    pub fn random(rows: usize, dim: usize, rng: &mut StdRng) -> Self {
        let mut parameter = Parameter::zeros(rows, dim);
        let scale = 1.0 / (dim as f32).sqrt();
        parameter.values.fill_with(|| {
            let sample: f32 = StandardNormal.sample(rng);
            scale * sample
        });
        parameter
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    /// Copies `rows` into `out`, one after the other.
    pub fn gather(&self, rows: &[u64], out: &mut Vec<f32>) {
        out.clear();
        for &row in rows {
            out.extend_from_slice(self.row(row as usize));
        }
    }

    /// One step of row-wise Adagrad on the rows that `gradient` touches, which is then empty again.
    pub fn step(&mut self, gradient: &mut RowGradient, learning_rate: f32) {
        const EPSILON: f32 = 1e-8;
        for (row, d_row) in gradient.iter() {
            let squares: f32 = d_row.iter().map(|d| d * d).sum();
            self.accumulator[row] += squares / self.dim as f32;
            let rate = learning_rate / (self.accumulator[row].sqrt() + EPSILON);
            for (value, d) in self.values[row * self.dim..(row + 1) * self.dim].iter_mut().zip(d_row) {
                *value -= rate * d;
            }
        }
        gradient.clear();
    }
}

/// The gradient of a [`Parameter`] in the rows that a step touches. Sums are in the order of the calls.
#[derive(Debug)]
pub struct RowGradient {
    dim: usize,
    /// Place of each row in `touched`, or `UNTOUCHED`.
    slot_of_row: Vec<u32>,
    touched: Vec<u32>,
    /// (touched, dim)
    values: Vec<f32>,
}

impl RowGradient {
    const UNTOUCHED: u32 = u32::MAX;

    pub fn of(parameter: &Parameter) -> Self {
        RowGradient {
            dim: parameter.dim,
            slot_of_row: vec![Self::UNTOUCHED; parameter.rows],
            touched: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Adds `scale * d_row` to the gradient of `row`.
    pub fn add(&mut self, row: usize, d_row: &[f32], scale: f32) {
        if self.slot_of_row[row] == Self::UNTOUCHED {
            self.slot_of_row[row] = self.touched.len() as u32;
            self.touched.push(row as u32);
            self.values.resize(self.values.len() + self.dim, 0.0);
        }
        let start = self.slot_of_row[row] as usize * self.dim;
        for (sum, d) in self.values[start..start + self.dim].iter_mut().zip(d_row) {
            *sum += scale * d;
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.touched.iter().map(|&row| row as usize).zip(self.values.chunks_exact(self.dim))
    }

    fn clear(&mut self) {
        for &row in &self.touched {
            self.slot_of_row[row as usize] = Self::UNTOUCHED;
        }
        self.touched.clear();
        self.values.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_step_moves_touched_rows_and_their_state_alone() {
        let before = Parameter::random(5, 3, &mut StdRng::seed_from_u64(1));
        let mut after = before.clone();
        let mut gradient = RowGradient::of(&after);
        gradient.add(3, &[1.0, 0.0, -2.0], 1.0);
        gradient.add(1, &[0.5, 0.5, 0.5], 1.0);
        gradient.add(3, &[1.0, 1.0, 1.0], 2.0);
        after.step(&mut gradient, 0.1);
        for row in [0, 2, 4] {
            assert_eq!((after.row(row), after.accumulator[row]), (before.row(row), 0.0));
        }
        // Row 3 has gradient (3, 2, 0): mean square 13/3.
        assert!((after.accumulator[3] - 13.0 / 3.0).abs() < 1e-6);
        assert!((after.row(3)[0] - (before.row(3)[0] - 0.1 * 3.0 / (13.0f32 / 3.0).sqrt())).abs() < 1e-6);
        assert_eq!(after.row(3)[2], before.row(3)[2]);
        assert_ne!(after.row(1), before.row(1));
        assert_eq!(gradient.iter().count(), 0);
        // The next step starts from nothing.
        let once = after.clone();
        after.step(&mut gradient, 0.1);
        assert_eq!(after, once);
    }
}
