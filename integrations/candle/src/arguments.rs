//! The arguments of a call, after every check that needs candle alone. Shapes and values are checked by the core, which
//! knows what goes with what.

use candle_core::{DType, Device, Layout, Tensor};
use catalog_softmax::Loss;

use crate::error::{Result, shape, value};
use crate::options::{Options, Temperature};

/// A call's arguments beside the three that get gradients. Vectors are contiguous, integers `i64` and numbers `f32`.
pub(crate) struct Arguments {
    /// `symmetric` is set where the whole loss is; one direction is computed.
    pub(crate) loss: Loss,
    /// B. Rows of the first operand after these are separate positives.
    pub(crate) num_queries: usize,
    pub(crate) separate: bool,
    pub(crate) positives: Option<Tensor>,
    pub(crate) positive_ids: Option<Tensor>,
    pub(crate) positive_log_q: Option<Tensor>,
    pub(crate) positive_offsets: Option<Tensor>,
    pub(crate) positive_weight: Option<Tensor>,
    pub(crate) candidate_ids: Option<Tensor>,
    pub(crate) log_q: Option<Tensor>,
    pub(crate) excluded: Option<(Tensor, Tensor)>,
    pub(crate) row_weight: Option<Tensor>,
    pub(crate) wanted: Wanted,
}

/// Which operands need a gradient.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) queries: bool,
    pub(crate) candidates: bool,
    pub(crate) temperature: bool,
}

impl Wanted {
    pub(crate) fn any(self) -> bool {
        self.queries || self.candidates || self.temperature
    }
}

/// What gets gradients: queries with separate positives below them, candidates, and the temperature where it is a
/// tensor.
pub(crate) struct Operands {
    pub(crate) queries: Tensor,
    pub(crate) candidates: Tensor,
    pub(crate) temperature: Option<Tensor>,
}

impl Arguments {
    pub(crate) fn new(queries: &Tensor, candidates: &Tensor, options: &Options) -> Result<(Self, Operands)> {
        let device = queries.device();
        let num_queries = check_matrix("queries", queries, device)?.0;
        check_matrix("candidates", candidates, device)?;
        let stacked = match &options.positive_embeddings {
            None => queries.clone(),
            Some(positives) => stack(queries, positives)?,
        };
        let (temperature, tensor) = temperature(&options.temperature, device)?;
        let operands =
            Operands { queries: row_major(&stacked)?, candidates: row_major(candidates)?, temperature: tensor };
        let wanted = Wanted {
            queries: operands.queries.track_op(),
            candidates: operands.candidates.track_op(),
            temperature: operands.temperature.as_ref().is_some_and(Tensor::track_op),
        };
        let integers = |name: &str, given: &Option<Tensor>| optional(name, given, DType::I64, device);
        let numbers = |name: &str, given: &Option<Tensor>| optional(name, given, DType::F32, device);
        let excluded = match &options.excluded {
            None => None,
            Some((offsets, ids)) => Some((
                vector("exclude_offsets", offsets, DType::I64, device)?,
                vector("exclude_ids", ids, DType::I64, device)?,
            )),
        };
        let arguments = Arguments {
            loss: loss(options, temperature)?,
            num_queries,
            separate: options.positive_embeddings.is_some(),
            positives: integers("positives", &options.positives)?,
            positive_ids: integers("positive_ids", &options.positive_ids)?,
            positive_log_q: numbers("positive_log_q", &options.positive_log_q)?,
            positive_offsets: integers("positive_offsets", &options.positive_offsets)?,
            positive_weight: numbers("positive_weight", &options.positive_weight)?,
            candidate_ids: integers("candidate_ids", &options.candidate_ids)?,
            log_q: numbers("log_q", &options.log_q)?,
            excluded,
            row_weight: numbers("row_weight", &options.row_weight)?,
            wanted,
        };
        Ok((arguments, operands))
    }

    /// The vectors that were given.
    pub(crate) fn vectors(&self) -> impl Iterator<Item = &Tensor> {
        let one_each = [
            &self.positives,
            &self.positive_ids,
            &self.positive_log_q,
            &self.positive_offsets,
            &self.positive_weight,
            &self.candidate_ids,
            &self.log_q,
            &self.row_weight,
        ];
        let excluded = self.excluded.iter().flat_map(|(offsets, ids)| [offsets, ids]);
        one_each.into_iter().flatten().chain(excluded)
    }

    /// Whether the result is (B).
    pub(crate) fn per_row(&self) -> bool {
        self.loss.reduction == catalog_softmax::Reduction::None
    }

    /// The loss of one direction.
    pub(crate) fn one_direction(&self) -> Loss {
        let mut loss = self.loss;
        loss.symmetric = false;
        loss
    }
}

fn loss(options: &Options, temperature: f64) -> Result<Loss> {
    let loss =
        Loss::softmax(options.similarity, temperature).correction(options.correction).reduction(options.reduction);
    let loss = if options.symmetric { loss.symmetric() } else { loss };
    match (options.false_negative_margin, options.false_negative_ratio) {
        (None, None) => Ok(loss),
        (Some(margin), None) => Ok(loss.false_negative_margin(margin)),
        (None, Some(ratio)) => Ok(loss.false_negative_ratio(ratio)),
        (Some(_), Some(ratio)) => {
            Err(value("false_negative_ratio", format!("{ratio:?}"), "None where there is a false_negative_margin"))
        }
    }
}

/// The value, and the tensor that it is of.
fn temperature(given: &Temperature, device: &Device) -> Result<(f64, Option<Tensor>)> {
    let tensor = match given {
        Temperature::Number(number) => return Ok((*number, None)),
        Temperature::Tensor(tensor) => tensor,
    };
    check_device("temperature", tensor, device)?;
    if tensor.elem_count() != 1 {
        return Err(shape("temperature", tensor.shape(), "one element"));
    }
    if !tensor.dtype().is_float() {
        return Err(value("the type of temperature", format!("{:?}", tensor.dtype()), "a floating-point type"));
    }
    let number = tensor.detach().flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?[0];
    Ok((number, Some(tensor.clone())))
}

/// Queries with the separate positives below them: a copy of few rows, by which one operand holds both.
fn stack(queries: &Tensor, positives: &Tensor) -> Result<Tensor> {
    let dim = queries.dim(1)?;
    check_matrix("positive_embeddings", positives, queries.device())?;
    if positives.dtype() != queries.dtype() {
        let rule = format!("the type of queries, {:?}", queries.dtype());
        return Err(value("the type of positive_embeddings", format!("{:?}", positives.dtype()), &rule));
    }
    if positives.dim(1)? != dim {
        return Err(shape("positive_embeddings", positives.shape(), &format!("(P, D) with the queries' D, {dim}")));
    }
    Ok(Tensor::cat(&[queries, positives], 0)?)
}

/// A matrix whose rows are contiguous, at any distance from each other: the same memory if it is so already, else a
/// copy. Gradients flow through the copy.
fn row_major(matrix: &Tensor) -> Result<Tensor> {
    let (_, dim) = matrix.dims2()?;
    let rows_apart = row_stride(matrix.layout());
    let in_place = rows_apart >= dim && (dim == 1 || matrix.stride()[1] == 1);
    Ok(if in_place { matrix.clone() } else { matrix.contiguous()? })
}

/// Elements between the starts of rows; of one row any number is right.
pub(crate) fn row_stride(layout: &Layout) -> usize {
    if layout.dims()[0] == 1 { layout.dims()[1] } else { layout.stride()[0] }
}

fn check_matrix(name: &str, matrix: &Tensor, device: &Device) -> Result<(usize, usize)> {
    check_device(name, matrix, device)?;
    if !matches!(matrix.dtype(), DType::F32 | DType::F16 | DType::BF16) {
        return Err(value(&format!("the type of {name}"), format!("{:?}", matrix.dtype()), "F32, F16 or BF16"));
    }
    matrix.dims2().map_err(|_| shape(name, matrix.shape(), "two dimensions: rows, and numbers of a row"))
}

fn check_device(name: &str, tensor: &Tensor, device: &Device) -> Result<()> {
    if tensor.device().same_device(device) {
        return Ok(());
    }
    let rule = format!("that of queries, {:?}", device.location());
    Err(value(&format!("the device of {name}"), format!("{:?}", tensor.device().location()), &rule))
}

fn optional(name: &str, given: &Option<Tensor>, to: DType, device: &Device) -> Result<Option<Tensor>> {
    given.as_ref().map(|tensor| vector(name, tensor, to, device)).transpose()
}

/// A constant vector of integers or numbers as the core takes it: `i64` or `f32`, contiguous.
fn vector(name: &str, tensor: &Tensor, to: DType, device: &Device) -> Result<Tensor> {
    check_device(name, tensor, device)?;
    if tensor.rank() != 1 {
        return Err(shape(name, tensor.shape(), "one dimension"));
    }
    let (fits, rule) = match to {
        DType::I64 => (tensor.dtype().is_int(), "an integer type"),
        _ => (tensor.dtype().is_float(), "a floating-point type"),
    };
    if !fits {
        return Err(value(&format!("the type of {name}"), format!("{:?}", tensor.dtype()), rule));
    }
    if tensor.track_op() {
        return Err(value(name, "a tensor that requires a gradient", "a constant: call detach() on it"));
    }
    Ok(tensor.to_dtype(to)?.contiguous()?)
}
