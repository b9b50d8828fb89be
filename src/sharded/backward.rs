//! The backward pass over shards.
//!
//! The probability of a negative under a row's whole distribution is `p_ij = exp(z_ij − lse_i)`, and a rank's pass computes
//! `exp(z_ij − lse_r,i)` with the log-sum-exp of its own candidates. The quotient of the two is `exp(lse_r,i − lse_i)`, one
//! number of the row. So a rank runs its backend's backward pass with its own statistics and `d_lse_i exp(lse_r,i − lse_i)`,
//! and the sums over ranks are the gradients: O of the whole row is needed by nobody. The gradient by a positive's score
//! belongs to the rank that holds the positive's row, and to no other.

use super::collective::{Collective, gather_results};
use super::part::Part;
use super::{Sharded, Step};
use crate::backend::Backend;
use crate::backend::stream::CheckedBatch;
use crate::error::Result;
use crate::problem::batch::Batch;
use crate::problem::embeddings::{Matrix, Real};
use crate::problem::epilogue::{Epilogue, times};
use crate::problem::merge::share;
use crate::problem::output::{Gradients, RowSparse, TableGradient};
use crate::problem::positives::Positives;
use crate::problem::statistics::RowStatistics;

/// What goes back into the stream.
pub(super) struct Upstream<'a, T> {
    /// Statistics over this rank's candidates.
    pub(super) own: &'a RowStatistics<T>,
    /// Over the candidates of all ranks.
    pub(super) lse: &'a [f64],
    pub(super) epilogue: &'a Epilogue,
}

impl<T> Upstream<'_, T> {
    /// (B): derivatives by the log-sum-exp over this rank's candidates.
    fn d_lse(&self) -> Vec<f64> {
        let lse = self.own.lse.iter().zip(self.lse);
        let of_row = |(&d, (&own, &whole)): (&f64, (&f64, &f64))| match share(own, whole) {
            // A rank without negatives of a row has no part in it, whatever the row's loss is.
            0.0 => 0.0,
            share => times(d, share),
        };
        self.epilogue.d_lse.iter().zip(lse).map(of_row).collect()
    }
}

impl<B: Backend, C: Collective> Sharded<B, C> {
    /// Gradients of a step. `local` is what this rank computes of it; nothing if its shard is empty.
    pub(super) fn backward(
        &mut self,
        step: Step<'_>,
        local: Option<(&Part, &Batch<'_>)>,
        upstream: &Upstream<'_, B::Real>,
        gradients: &mut Gradients<B::Real>,
    ) -> Result<()> {
        let Step { batch, request, .. } = step;
        let (b, dim) = (batch.num_queries(), batch.dim());
        // The table's gradient is this rank's alone, and is written where it stays. Everything else is summed first.
        let mut fresh = Gradients { d_table: gradients.d_table.take(), ..Gradients::default() };
        let streamed = match local {
            Some((_, local)) => self.stream_back(Step { batch: local, ..step }, batch, upstream, &mut fresh),
            None => {
                fresh.d_queries = Matrix::zeros(b, dim);
                fresh.d_table =
                    fresh.d_table.filter(|_| request.accumulate).or_else(|| empty(batch, request.row_sparse));
                Ok(())
            }
        };
        gradients.d_table = fresh.d_table.take();
        let temperature = [fresh.d_temperature, fresh.d_log_temperature];
        let mine = streamed.map(|()| temperature.iter().flat_map(|d| d.to_le_bytes()).collect());
        let [d_temperature, d_log_temperature] = sum_pairs(&gather_results(&mut self.collective, mine)?);
        self.collective.sum(B::Real::numbers(&mut fresh.d_queries.values))?;
        (fresh.d_temperature, fresh.d_log_temperature) = (d_temperature, d_log_temperature);
        self.sum_what_is_in_no_shard(batch, local.map(|(part, _)| part), &mut fresh)?;
        if request.accumulate {
            // Adds all but the table's gradient, to which the pass has added.
            gradients.add(&fresh);
        } else {
            fresh.d_table = gradients.d_table.take();
            *gradients = fresh;
        }
        Ok(())
    }

    /// The backward pass over this rank's candidates; the positives' part of the table's gradient goes to it.
    fn stream_back(
        &mut self,
        Step { batch: local, loss, request }: Step<'_>,
        whole: &Batch<'_>,
        upstream: &Upstream<'_, B::Real>,
        fresh: &mut Gradients<B::Real>,
    ) -> Result<()> {
        if request.accumulate {
            zeros_to_add_to(local, fresh);
        }
        let (rows, home) = (self.rows(), self.collective.rank() == self.home());
        let is_here = |pair: usize| match &whole.positives {
            Positives::Rows(of_table) => rows.contains(&(of_table[pair] as usize)),
            Positives::Separate(_) | Positives::Index(_) => home,
        };
        let d_positive = upstream.epilogue.d_positive.iter().enumerate();
        let d_positive: Vec<f64> = d_positive.map(|(pair, &d)| if is_here(pair) { d } else { 0.0 }).collect();
        let checked = CheckedBatch { batch: local, loss };
        self.backend.stream_back(checked, request, upstream.own, &upstream.d_lse(), &d_positive, fresh)?;
        if let Positives::Rows(of_table) = &whole.positives {
            let d_positives = fresh.d_positive_embeddings.take();
            if let (Some(d_table), Some(d)) = (&mut fresh.d_table, &d_positives) {
                let pairs = (0..of_table.len()).filter(|&pair| is_here(pair));
                let by_row = sums_by_row(pairs.map(|pair| (of_table[pair] - rows.start as u32, pair)).collect(), d);
                match d_table {
                    TableGradient::Dense(dense) => by_row.add_to(dense),
                    TableGradient::RowSparse(sparse) => sparse.add(&by_row),
                }
            }
        }
        Ok(())
    }

    /// Gradients of separate positives and of pools of their own embeddings, which the home rank computed. Where rows of the
    /// table are meant, they are empty.
    fn sum_what_is_in_no_shard(
        &mut self,
        batch: &Batch<'_>,
        part: Option<&Part>,
        fresh: &mut Gradients<B::Real>,
    ) -> Result<()> {
        let dim = batch.dim();
        if let Positives::Separate(embeddings) = &batch.positives {
            let d = fresh.d_positive_embeddings.get_or_insert_with(|| Matrix::zeros(embeddings.rows(), dim));
            self.collective.sum(B::Real::numbers(&mut d.values))?;
        }
        let mut own = std::mem::take(&mut fresh.d_candidates);
        for (of, pool) in batch.matrix.pools.iter().enumerate() {
            let mut d = Matrix::default();
            if let Some(embeddings) = pool.candidates().filter(|_| pool.gradient) {
                d = match part.and_then(|part| part.pool(of)) {
                    Some(pool) => std::mem::take(&mut own[pool]),
                    None => Matrix::zeros(embeddings.rows(), dim),
                };
                self.collective.sum(B::Real::numbers(&mut d.values))?;
            }
            fresh.d_candidates.push(d);
        }
        Ok(())
    }
}

/// The gradient of no rows.
fn empty<T: Real>(batch: &Batch<'_>, row_sparse: bool) -> Option<TableGradient<T>> {
    let dim = batch.dim();
    let with_gradient = batch.matrix.table.as_ref().is_some_and(|table| table.gradient);
    with_gradient.then(|| match row_sparse {
        true => TableGradient::RowSparse(RowSparse { rows: Vec::new(), values: Matrix::zeros(0, dim) }),
        false => TableGradient::Dense(Matrix::zeros(0, dim)),
    })
}

/// Zeros for a backward pass that adds, in all gradients but the table's.
fn zeros_to_add_to<T: Real>(local: &Batch<'_>, fresh: &mut Gradients<T>) {
    let dim = local.dim();
    fresh.d_queries = Matrix::zeros(local.num_queries(), dim);
    let of_pool = |pool: &crate::Pool<'_>| match pool.candidates().filter(|_| pool.gradient) {
        Some(embeddings) => Matrix::zeros(embeddings.rows(), dim),
        None => Matrix::default(),
    };
    fresh.d_candidates = local.matrix.pools.iter().map(of_pool).collect();
    if let Positives::Separate(embeddings) = &local.positives {
        fresh.d_positive_embeddings = Some(Matrix::zeros(embeddings.rows(), dim));
    }
}

/// Sums over the pairs of each row, given as (row, pair): rows ascending, pairs of a row in their order.
fn sums_by_row<T: Real>(mut pairs: Vec<(u32, usize)>, d_positives: &Matrix<T>) -> RowSparse<T> {
    pairs.sort_unstable();
    let dim = d_positives.dim;
    let mut sums = RowSparse { rows: Vec::new(), values: Matrix { values: Vec::new(), rows: 0, dim } };
    for of_row in pairs.chunk_by(|a, b| a.0 == b.0) {
        let mut sum = vec![0f64; dim];
        for &(_, pair) in of_row {
            sum.iter_mut().zip(d_positives.row(pair)).for_each(|(sum, &d)| *sum += d.into());
        }
        sums.rows.push(of_row[0].0);
        sums.values.values.extend(sum.into_iter().map(T::from_f64));
        sums.values.rows += 1;
    }
    sums
}

impl<T: Real> RowSparse<T> {
    /// Adds the rows to a matrix.
    fn add_to(&self, dense: &mut Matrix<T>) {
        let dim = dense.dim;
        for (place, &row) in self.rows.iter().enumerate() {
            let to = &mut dense.values[row as usize * dim..(row as usize + 1) * dim];
            to.iter_mut().zip(self.values.row(place)).for_each(|(to, &d)| *to = T::from_f64((*to).into() + d.into()));
        }
    }
}

/// The sums of two numbers that each rank gave, in the order of ranks.
fn sum_pairs(all: &[Vec<u8>]) -> [f64; 2] {
    let number = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at * 8..at * 8 + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(f64::NAN, f64::from_le_bytes)
    };
    [0, 1].map(|at| all.iter().map(|bytes| number(bytes, at)).sum())
}
