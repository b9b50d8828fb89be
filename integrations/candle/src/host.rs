//! The passes on tensors in host memory.

use std::sync::{Mutex, PoisonError};

use candle_core::{DType, Device, Tensor};
use catalog_softmax::{Backend, Batch, Cpu, Matrix, Pool, Request, RowStatistics};

use crate::arguments::{Arguments, Operands, Wanted};
use crate::error::Result;
use crate::held::Held;
use crate::op::{Forward, Found, State};

/// What the way back needs of the forward pass.
pub(crate) struct HostState {
    statistics: RowStatistics,
    /// (B) and (P): the total's derivatives by each row's lse and by each positive.
    d_lse: Vec<f64>,
    d_positive: Vec<f64>,
}

pub(crate) fn forward(arguments: &Arguments, operands: &Operands) -> Result<Forward> {
    let held = Held::of_batch(arguments, &operands.queries, &operands.candidates);
    let batch = batch(arguments, &operands.queries, &operands.candidates, &held, true)?;
    let request = if arguments.wanted.any() { Request::value_and_grad() } else { Request::value() };
    let loss = arguments.one_direction();
    let (statistics, epilogue) = with_backend(|cpu| {
        // Of a symmetric loss, this checks that both directions exist.
        cpu.plan(&batch, &arguments.loss, request)?;
        let statistics = cpu.statistics(&batch, &loss, request)?;
        loss.epilogue(&batch, &statistics).map(|epilogue| (statistics, epilogue))
    })?;
    let value = if arguments.per_row() {
        let weights = held.optional::<f32>(&arguments.row_weight)?;
        Tensor::new(weighted(&epilogue.loss, weights), &Device::Cpu)?
    } else {
        Tensor::new(epilogue.total as f32, &Device::Cpu)?
    };
    let state = HostState { statistics, d_lse: epilogue.d_lse, d_positive: epilogue.d_positive };
    Ok(Forward { value, state: State::Host(Box::new(state)) })
}

/// Gradients of Σ upstream · loss, given `upstream` () or (B).
pub(crate) fn backward(
    arguments: &Arguments,
    state: &HostState,
    queries: &Tensor,
    candidates: &Tensor,
    upstream: &Tensor,
) -> Result<Found> {
    let held = Held::of_batch(arguments, queries, candidates);
    let Wanted { candidates: wanted, .. } = arguments.wanted;
    let batch = batch(arguments, queries, candidates, &held, wanted)?;
    let upstream: Vec<f64> = upstream.flatten_all()?.to_dtype(DType::F64)?.to_vec1()?;
    let d_lse: Vec<f64> = state.d_lse.iter().enumerate().map(|(row, d)| d * of_row(&upstream, row)).collect();
    let offsets = held.optional::<i64>(&arguments.positive_offsets)?;
    let d_positive = times_of_rows(&state.d_positive, offsets, &upstream);
    let loss = arguments.one_direction();
    let gradients = with_backend(|cpu| cpu.gradients(&batch, &loss, &state.statistics, &d_lse, &d_positive))?;

    let mut d_queries = gradients.d_queries;
    if let Some(positives) = gradients.d_positive_embeddings {
        d_queries.rows += positives.rows;
        d_queries.values.extend(positives.values);
    }
    let d_candidates = gradients.d_candidates.into_iter().next().filter(|_| wanted);
    Ok(Found {
        queries: tensor(d_queries)?,
        candidates: d_candidates.map(tensor).transpose()?,
        temperature: Tensor::new(gradients.d_temperature, &Device::Cpu)?,
    })
}

/// The batch of the core. It borrows everything from `held`.
fn batch<'h>(
    arguments: &Arguments,
    queries: &Tensor,
    candidates: &Tensor,
    held: &'h Held<'_>,
    gradient: bool,
) -> Result<Batch<'h>> {
    let mut pool = Pool::new(held.embeddings(candidates, 0, candidates.dims()[0])?);
    if let Some(ids) = held.optional::<i64>(&arguments.candidate_ids)? {
        pool = pool.ids(ids);
    }
    if let Some(log_q) = held.optional(&arguments.log_q)? {
        pool = pool.log_q(log_q);
    }
    if !gradient {
        pool = pool.without_gradient();
    }
    let b = arguments.num_queries;
    let in_batch = arguments.positives.is_none() && !arguments.separate;
    let rows = held.embeddings(queries, 0, b)?;
    let mut batch = if in_batch { Batch::in_batch(rows, pool) } else { Batch::builder(rows, pool) };
    if let Some(positives) = held.optional::<i64>(&arguments.positives)? {
        batch = batch.positives(positives);
    }
    if arguments.separate {
        batch = batch.positive_embeddings(held.embeddings(queries, b, queries.dims()[0] - b)?);
    }
    if let Some(ids) = held.optional::<i64>(&arguments.positive_ids)? {
        batch = batch.positive_ids(ids);
    }
    if let Some(log_q) = held.optional(&arguments.positive_log_q)? {
        batch = batch.positive_log_q(log_q);
    }
    if let Some(offsets) = held.optional(&arguments.positive_offsets)? {
        batch = batch.positive_offsets(offsets);
    }
    if let Some(weight) = held.optional(&arguments.positive_weight)? {
        batch = batch.positive_weight(weight);
    }
    if let Some((offsets, ids)) = &arguments.excluded {
        batch = batch.excluded_ids(held.slice(offsets)?, held.slice::<i64>(ids)?);
    }
    if let Some(weight) = held.optional(&arguments.row_weight)? {
        batch = batch.row_weight(weight);
    }
    Ok(batch.build()?)
}

/// Backends that no call is using. They keep their workspace from step to step.
static BACKENDS: Mutex<Vec<Cpu>> = Mutex::new(Vec::new());

fn with_backend<R>(work: impl FnOnce(&mut Cpu) -> R) -> R {
    let kept = || BACKENDS.lock().unwrap_or_else(PoisonError::into_inner);
    let mut cpu = kept().pop().unwrap_or_default();
    let result = work(&mut cpu);
    kept().push(cpu);
    result
}

fn tensor(matrix: Matrix<f32>) -> Result<Tensor> {
    Ok(Tensor::from_vec(matrix.values, (matrix.rows, matrix.dim), &Device::Cpu)?)
}

/// The losses of rows times their weights.
fn weighted(losses: &[f64], weights: Option<&[f32]>) -> Vec<f32> {
    let weight = |row: usize| weights.map_or(1.0, |weights| f64::from(weights[row]));
    // A row of weight 0 is absent, whatever its loss.
    let times = |(row, &loss): (usize, &f64)| if weight(row) == 0.0 { 0.0 } else { (weight(row) * loss) as f32 };
    losses.iter().enumerate().map(times).collect()
}

/// `upstream` is one number for all rows, or one for each.
fn of_row(upstream: &[f64], row: usize) -> f64 {
    if upstream.len() == 1 { upstream[0] } else { upstream[row] }
}

/// Multiplies what belongs to positives by the number of their row.
fn times_of_rows(of_positives: &[f64], offsets: Option<&[i64]>, upstream: &[f64]) -> Vec<f64> {
    let Some(offsets) = offsets else {
        return of_positives.iter().enumerate().map(|(row, d)| d * of_row(upstream, row)).collect();
    };
    let rows = offsets.windows(2).enumerate();
    rows.flat_map(|(row, ends)| {
        of_positives[ends[0] as usize..ends[1] as usize].iter().map(move |d| d * of_row(upstream, row))
    })
    .collect()
}
