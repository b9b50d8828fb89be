//! The passes on tensors on a GPU: in candle's memory, in the order of candle's stream, without a wait of the host.
//!
//! CI checks its types; it has not run on a GPU.

mod memory;

use candle_core::{CudaDevice, DType, Device, Tensor};
use catalog_softmax::cuda::{
    DeviceBatch, DeviceEmbeddings, DeviceGradients, DeviceOutput, DevicePool, DeviceSlice, DeviceUpstream,
};
use catalog_softmax::{Error as Core, Request};

use crate::arguments::{Arguments, Operands, Wanted};
use crate::error::{Result, value};
use crate::op::{Forward, Found, State};
use memory::{Place, Reads, with_backend};

/// What the way back needs of the forward pass: (B) `f64` or `i64`, (B, D) `f32`, and (P) `f64` of the positives.
pub(crate) struct DeviceState {
    lse: Tensor,
    num_negatives: Tensor,
    expected_negative: Tensor,
    d_lse: Tensor,
    d_positive: Tensor,
}

pub(crate) fn forward(arguments: &Arguments, operands: &Operands) -> Result<Forward> {
    let Operands { queries, candidates, .. } = operands;
    let device = cuda_device(queries)?;
    let positives = positives(arguments, queries, candidates)?;
    let reads = Reads::new(arguments.vectors().chain([queries, candidates]).chain(&positives), device)?;
    // SAFETY: `reads` holds the tensors until the work is queued, and has made candle's stream wait for who wrote them.
    let batch = unsafe { batch(arguments, &positives, queries, candidates, &reads, true)? };

    let (b, dim) = (arguments.num_queries, queries.dims()[1]);
    let pairs = positives.as_ref().map_or(queries.dims()[0] - b, Tensor::elem_count);
    let mut total = Place::<f64>::new(device, &[])?;
    let mut losses = Place::<f64>::new(device, &[b])?;
    let mut lse = Place::<f64>::new(device, &[b])?;
    // Candle has no unsigned integers of 64 bits, and counts fit into signed ones.
    let mut num_negatives = Place::<i64>::new(device, &[b])?;
    let mut d_lse = Place::<f64>::new(device, &[b])?;
    let mut d_positive = Place::<f64>::new(device, &[pairs])?;
    let mut expected_negative = Place::<f32>::new(device, &[b, dim])?;
    // SAFETY: the places live until the work is queued, and are freed in the order of candle's stream.
    let mut output = unsafe {
        let mut output = DeviceOutput::new(total.view());
        output.loss = Some(losses.view());
        if arguments.wanted.any() {
            output.lse = Some(lse.view());
            output.num_negatives = Some(num_negatives.view());
            output.d_lse = Some(d_lse.view());
            output.d_positive = Some(d_positive.view());
            output.expected_negative = Some(expected_negative.view());
        }
        output
    };
    let loss = arguments.one_direction();
    with_backend(device, |cuda| {
        // Of a symmetric loss, this checks that both directions exist.
        cuda.plan_on_device(&batch, &arguments.loss, Request::value())?;
        cuda.compute_on_device(&batch, &loss, &mut output)
    })?;
    reads.done()?;
    let (total, losses) = (total.tensor()?, losses.tensor()?);
    let value = if arguments.per_row() { weighted(&losses, arguments.row_weight.as_ref())? } else { total };
    let state = DeviceState {
        lse: lse.tensor()?,
        num_negatives: num_negatives.tensor()?,
        expected_negative: expected_negative.tensor()?,
        d_lse: d_lse.tensor()?,
        d_positive: d_positive.tensor()?,
    };
    Ok(Forward { value: value.to_dtype(DType::F32)?, state: State::Device(state) })
}

/// Gradients of Σ upstream · loss, given `upstream` () or (B).
pub(crate) fn backward(
    arguments: &Arguments,
    state: &DeviceState,
    queries: &Tensor,
    candidates: &Tensor,
    upstream: &Tensor,
) -> Result<Found> {
    let device = cuda_device(queries)?;
    let Wanted { candidates: wanted, .. } = arguments.wanted;
    let upstream = upstream.to_dtype(DType::F64)?;
    let d_lse = state.d_lse.broadcast_mul(&upstream)?;
    let d_positive = state.d_positive.broadcast_mul(&of_pairs(&upstream, arguments)?)?;
    let positives = positives(arguments, queries, candidates)?;
    let of_state = [&state.lse, &state.num_negatives, &state.expected_negative, &d_lse, &d_positive];
    let tensors = arguments.vectors().chain([queries, candidates]).chain(&positives).chain(of_state);
    let reads = Reads::new(tensors, device)?;
    // SAFETY: as in `forward`. Counts are not negative.
    let (batch, upstream) = unsafe {
        let upstream = DeviceUpstream {
            lse: reads.view(&state.lse),
            num_negatives: reads.view(&state.num_negatives),
            expected_negative: reads.view(&state.expected_negative),
            d_lse: reads.view(&d_lse),
            d_positive: reads.view(&d_positive),
        };
        (batch(arguments, &positives, queries, candidates, &reads, wanted)?, upstream)
    };
    let (b, dim) = (arguments.num_queries, queries.dims()[1]);
    // Separate positives are rows of the first operand, and so are their gradients.
    let mut d_queries = Place::<f32>::new(device, queries.dims())?;
    let mut d_candidates = wanted.then(|| Place::<f32>::new(device, candidates.dims())).transpose()?;
    let mut d_temperature = Place::<f64>::new(device, &[])?;
    // SAFETY: as in `forward`. The two parts of `d_queries` do not overlap.
    let mut gradients = unsafe {
        let of_candidates = d_candidates.as_mut().map(|place| place.view());
        let mut gradients = DeviceGradients::new(d_queries.part(0, b * dim), vec![of_candidates]);
        gradients.d_temperature = Some(d_temperature.view());
        gradients.d_positive_embeddings =
            arguments.separate.then(|| d_queries.part(b * dim, (queries.dims()[0] - b) * dim));
        gradients
    };
    let loss = arguments.one_direction();
    with_backend(device, |cuda| cuda.gradients_on_device(&batch, &loss, &upstream, &mut gradients))?;
    reads.done()?;
    Ok(Found {
        queries: d_queries.tensor()?,
        candidates: d_candidates.map(Place::tensor).transpose()?,
        temperature: d_temperature.tensor()?,
    })
}

/// The batch of the core, as addresses.
///
/// # Safety
/// As [`Reads::view`], until the work on the batch is queued.
unsafe fn batch<'a>(
    arguments: &Arguments,
    positives: &Option<Tensor>,
    queries: &Tensor,
    candidates: &Tensor,
    reads: &'a Reads<'_>,
    gradient: bool,
) -> Result<DeviceBatch<'a>> {
    // SAFETY: handed on.
    unsafe {
        let mut pool = DevicePool::new(reads.embeddings(candidates, 0, candidates.dims()[0]));
        if let Some(ids) = &arguments.candidate_ids {
            pool = pool.ids(reads.view(ids));
        }
        if let Some(log_q) = &arguments.log_q {
            pool = pool.log_q(reads.view(log_q));
        }
        if !gradient {
            pool = pool.without_gradient();
        }
        let b = arguments.num_queries;
        let mut batch = DeviceBatch::new(reads.embeddings(queries, 0, b), pool);
        if let Some(positives) = positives {
            batch = batch.positives(reads.view(positives));
        }
        if arguments.separate {
            let embeddings: DeviceEmbeddings<'a> = reads.embeddings(queries, b, queries.dims()[0] - b);
            batch = batch.positive_embeddings(embeddings);
        }
        if let Some(ids) = &arguments.positive_ids {
            batch = batch.positive_ids(reads.view(ids));
        }
        if let Some(log_q) = &arguments.positive_log_q {
            batch = batch.positive_log_q(reads.view(log_q));
        }
        if let Some(offsets) = &arguments.positive_offsets {
            batch = batch.positive_offsets(reads.view(offsets));
        }
        if let Some(weight) = &arguments.positive_weight {
            batch = batch.positive_weight(reads.view(weight));
        }
        if let Some((offsets, ids)) = &arguments.excluded {
            let ids: DeviceSlice<'a, u64> = reads.view(ids);
            batch = batch.excluded_ids(reads.view(offsets), ids);
        }
        if let Some(weight) = &arguments.row_weight {
            batch = batch.row_weight(reads.view(weight));
        }
        Ok(batch)
    }
}

/// Indices of the positives as `u32`, of a batch whose positives are candidates. One that does not fit becomes one that
/// the device finds to be past the candidates.
fn positives(arguments: &Arguments, queries: &Tensor, candidates: &Tensor) -> Result<Option<Tensor>> {
    let (b, n) = (arguments.num_queries, candidates.dims()[0]);
    match &arguments.positives {
        Some(_) if arguments.separate => Err(value("positives", "given beside positive_embeddings", "one of the two")),
        None if arguments.separate => Ok(None),
        None if n < b => {
            let rule = format!("in_batch needs a candidate for each of {b} queries in the first pool");
            Err(Core::Shape { argument: "candidates".into(), found: format!("{n} rows"), rule }.into())
        }
        None => Ok(Some(Tensor::arange(0, b as u32, queries.device())?)),
        Some(positives) => {
            let outside = positives.lt(0i64)?;
            let last = positives.ones_like()?.affine(f64::from(u32::MAX), 0.0)?;
            Ok(Some(outside.where_cond(&last, positives)?.minimum(&last)?.to_dtype(DType::U32)?))
        }
    }
}

/// `upstream` for each positive: one number for all, or that of its row.
fn of_pairs(upstream: &Tensor, arguments: &Arguments) -> Result<Tensor> {
    match &arguments.positive_offsets {
        // The host waits for these offsets: of losses by rows with several positives alone.
        Some(offsets) if arguments.per_row() => {
            let offsets = offsets.to_vec1::<i64>()?;
            let rows = offsets.windows(2).enumerate();
            let rows: Vec<u32> = rows.flat_map(|(row, ends)| (ends[0]..ends[1]).map(move |_| row as u32)).collect();
            Ok(upstream.index_select(&Tensor::new(rows, upstream.device())?, 0)?)
        }
        _ => Ok(upstream.clone()),
    }
}

/// The losses of rows times their weights. A row of weight 0 is absent, whatever its loss.
fn weighted(losses: &Tensor, weight: Option<&Tensor>) -> Result<Tensor> {
    let Some(weight) = weight else { return Ok(losses.clone()) };
    let weight = weight.to_dtype(DType::F64)?;
    Ok(weight.eq(0f64)?.where_cond(&losses.zeros_like()?, &(losses * weight)?)?)
}

/// The first bad value that a device has seen since the last call.
pub(crate) fn check(device: &CudaDevice) -> Result<()> {
    with_backend(device, |cuda| cuda.fault())
}

fn cuda_device(tensor: &Tensor) -> Result<&CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        other => Err(value("the device of a tensor", format!("{:?}", other.location()), "a GPU")),
    }
}
