//! What a loss is computed with, beside queries and candidates.

use candle_core::Tensor;
use catalog_softmax::{Correction, Reduction, Similarity};

/// Options of [`softmax_loss`](crate::softmax_loss), with the names that Python's `catalog_softmax.torch.softmax_loss`
/// has.
///
/// Tensors are on the device of the queries. All but `positive_embeddings` and `temperature` are constants, so a tensor
/// that requires a gradient is refused: call `detach()` on it. Integers are `u32`, `i64` or of another integer type,
/// floating-point numbers of any type; they are converted to 64 bits and to `f32`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use catalog_softmax::Correction;
/// use catalog_softmax_candle::Options;
///
/// let log_q = Tensor::new(&[-3.0f32, -5.0], &Device::Cpu)?;
/// let options = Options { correction: Correction::LogQ, log_q: Some(log_q), ..Options::default() };
/// # let _ = options;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Options {
    /// How a query and a candidate are compared. Cosine by default. Embeddings need not be normalised for it.
    pub similarity: Similarity,
    /// Scores are similarities divided by it. A number, by default 0.05; or a tensor of one element, which gets a
    /// gradient.
    pub temperature: Temperature,
    /// How the sampling probability of the candidates is corrected for. `None` by default.
    pub correction: Correction,
    /// How the losses of the rows become one number. The mean by default. With `Reduction::None` the result is (B): the
    /// loss of each row times its weight.
    pub reduction: Reduction,
    /// The mean of the loss and of the loss with queries and candidates exchanged (CLIP). Each candidate is then the
    /// positive of one query.
    pub symmetric: bool,
    /// (P) the index of each positive among the candidates. Without it, and without `positive_embeddings`, candidate i
    /// is the positive of query i (in-batch negatives). P is B, unless there are `positive_offsets`.
    pub positives: Option<Tensor>,
    /// (P, D) positives that are not among the candidates, of the type of the queries. They get a gradient.
    pub positive_embeddings: Option<Tensor>,
    /// (P) item ids of `positive_embeddings`, where candidates have ids.
    pub positive_ids: Option<Tensor>,
    /// (P) log_q of `positive_embeddings`. Positives that are candidates have the log_q of these.
    pub positive_log_q: Option<Tensor>,
    /// (B + 1) several positives for a row: those of row i are `positives[offsets[i]..offsets[i + 1]]`.
    pub positive_offsets: Option<Tensor>,
    /// (P) what the loss of each positive is multiplied by; by default 1 / (number of the row's positives).
    pub positive_weight: Option<Tensor>,
    /// (N) item ids. A candidate with the id of a row's positive is no negative of that row (an accidental hit).
    pub candidate_ids: Option<Tensor>,
    /// (N) natural logarithm of each candidate's sampling probability. Corrections need it.
    pub log_q: Option<Tensor>,
    /// (offsets (B + 1), ids): row i has no negatives with the ids `ids[offsets[i]..offsets[i + 1]]`, such as the
    /// user's other items. Errors call the two `exclude_offsets` and `exclude_ids`.
    pub excluded: Option<(Tensor, Tensor)>,
    /// (B) sample weights, finite and >= 0.
    pub row_weight: Option<Tensor>,
    /// Leaves out candidates whose score is above the row's best positive's by more than that.
    pub false_negative_margin: Option<f64>,
    /// Leaves out candidates whose cosine is above that of the row's best positive times this.
    pub false_negative_ratio: Option<f64>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            similarity: Similarity::Cosine,
            temperature: Temperature::Number(0.05),
            correction: Correction::None,
            reduction: Reduction::Mean,
            symmetric: false,
            positives: None,
            positive_embeddings: None,
            positive_ids: None,
            positive_log_q: None,
            positive_offsets: None,
            positive_weight: None,
            candidate_ids: None,
            log_q: None,
            excluded: None,
            row_weight: None,
            false_negative_margin: None,
            false_negative_ratio: None,
        }
    }
}

/// What scores are divided by: a number, or a tensor of one element that may be learned. `into()` makes one of either.
#[derive(Debug, Clone)]
pub enum Temperature {
    /// A constant.
    Number(f64),
    /// A tensor of one element, of a floating-point type. Of a learned logarithm, give `log.exp()?`. A step reads its
    /// value on the host, so on a GPU the host waits for it.
    Tensor(Tensor),
}

impl From<f64> for Temperature {
    fn from(temperature: f64) -> Self {
        Temperature::Number(temperature)
    }
}

impl From<Tensor> for Temperature {
    fn from(temperature: Tensor) -> Self {
        Temperature::Tensor(temperature)
    }
}

impl From<&Tensor> for Temperature {
    fn from(temperature: &Tensor) -> Self {
        Temperature::Tensor(temperature.clone())
    }
}
