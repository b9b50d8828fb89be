//! The losses of [`catalog_softmax`] for [candle](candle_core): [`softmax_loss`] is an operator on tensors, with
//! gradients by `backward()`. The scores of B queries against N candidates are never in memory.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use catalog_softmax::Correction;
//! use catalog_softmax_candle::{Options, softmax_loss};
//!
//! let device = Device::Cpu;
//! // What two towers return: item i is the positive of user i.
//! let users = Var::randn(0f32, 1., (32, 16), &device)?;
//! let items = Var::randn(0f32, 1., (32, 16), &device)?;
//! let options = Options {
//!     temperature: 0.1.into(),
//!     correction: Correction::LogQ,
//!     log_q: Some(Tensor::full(-5f32, 32, &device)?),
//!     candidate_ids: Some(Tensor::arange(0u32, 32, &device)?),
//!     ..Options::default()
//! };
//! let loss = softmax_loss(&users, &items, &options)?;
//! let gradients = loss.backward()?;
//! assert_eq!(gradients.get(&users).map(|d| (d.dims2(), d.dtype())).unwrap().1, DType::F32);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # What is computed when
//!
//! The forward pass streams the candidates once and keeps each row's statistics: log-sum-exp, the number of negatives,
//! the coefficients of the gradient, and (B, D) numbers, the row's mean negative. `backward()` streams the candidates
//! once more for the gradients. Gradients of (N, D) numbers therefore exist only from `backward()` on, and a loss of
//! which nobody asks for gradients costs the first pass alone: if no operand is a variable or depends on one, nothing
//! is kept.
//!
//! # Layouts and types
//!
//! Embeddings are `f32`, `f16` or `bf16`, and gradients have their type. A matrix whose rows are contiguous is read
//! where it is, at any distance between rows, so `narrow` copies nothing. Others, such as `t()`, are copied first.
//! `positive_embeddings` are copied below the queries. The loss itself is `f32`.
//!
//! # CUDA
//!
//! With the feature `cuda`, tensors on a GPU are computed there: memory of candle's, in the order of candle's stream.
//! The host does not wait, so values that break a rule are not seen: [`check_device`] asks for them. CI
//! checks the types of this path, which **has not run on a GPU**.

mod arguments;
#[cfg(feature = "cuda")]
mod device;
mod error;
mod held;
mod host;
mod op;
mod options;

use candle_core::{DType, Device, Tensor};

pub use catalog_softmax;
pub use catalog_softmax::{Correction, Reduction, Similarity};
pub use error::{Error, Result};
pub use options::{Options, Temperature};

use arguments::Arguments;

/// Softmax cross-entropy of each query's positive against its negatives.
///
/// `queries` are (B, D) and `candidates` (N, D), of one type. The result is a scalar, `f32`, or (B) with
/// [`Reduction::None`]. It has gradients to both, to [`Options::positive_embeddings`], and to [`Options::temperature`]
/// where that is a tensor. Formulas of the losses are at [`catalog_softmax::Loss`].
///
/// There is no derivative of the gradient: gradients are constants.
///
/// # Errors
/// [`Error::Loss`] names the argument, its value and the rule that it breaks. Nothing has been computed then.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use catalog_softmax_candle::{Options, softmax_loss};
///
/// let device = Device::Cpu;
/// let (queries, table) = (Var::randn(0f32, 1., (4, 8), &device)?, Var::randn(0f32, 1., (100, 8), &device)?);
/// let log_temperature = Var::new(0.07f32.ln(), &device)?;
/// // Full softmax over a catalogue, with a learned temperature.
/// let options = Options {
///     temperature: log_temperature.exp()?.into(),
///     positives: Some(Tensor::new(&[3u32, 14, 15, 92], &device)?),
///     ..Options::default()
/// };
/// let gradients = softmax_loss(&queries, &table, &options)?.backward()?;
/// assert!(gradients.get(&log_temperature).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn softmax_loss(queries: &Tensor, candidates: &Tensor, options: &Options) -> Result<Tensor> {
    let loss = one_direction(queries, candidates, options)?;
    if !options.symmetric {
        return Ok(loss);
    }
    // The first direction has checked that each candidate is the positive of one query.
    let order = options.positives.as_ref().map(|positives| positives.to_dtype(DType::I64)).transpose()?;
    let in_order = |tensor: &Tensor| match &order {
        Some(order) => tensor.index_select(order, 0),
        None => Ok(tensor.clone()),
    };
    let swapped = Options {
        symmetric: false,
        positives: None,
        candidate_ids: options.candidate_ids.as_ref().map(in_order).transpose()?,
        ..options.clone()
    };
    let back = one_direction(&in_order(candidates)?, queries, &swapped)?;
    Ok(((loss + back)? * 0.5)?)
}

fn one_direction(queries: &Tensor, candidates: &Tensor, options: &Options) -> Result<Tensor> {
    let (arguments, operands) = Arguments::new(queries, candidates, options)?;
    match queries.device() {
        Device::Cpu => op::apply(arguments, operands, host::forward),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => op::apply(arguments, operands, device::forward),
        other => {
            let rule = "the CPU, or a GPU of NVIDIA's with the feature `cuda`";
            Err(error::value("the device of queries", format!("{:?}", other.location()), rule))
        }
    }
}

/// Waits for the device, and returns the first value since the last call that only the device saw and that breaks a
/// rule: an index past the candidates, log_q that is not finite. On the CPU there is none, because losses check their
/// values there.
///
/// # Errors
/// As [`softmax_loss`] on the CPU.
pub fn check_device(device: &Device) -> Result<()> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => device::check(device),
        _ => Ok(()),
    }
}

/// Compiles and runs the examples of the README and of the guide's chapter.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    struct ReadMe;
    #[doc = include_str!("../../../docs/guide/src/candle.md")]
    struct Candle;
}
