//! Row statistics, which are everything that the streaming pass returns, and the one way to merge partial ones.

use crate::problem::embeddings::Matrix;

/// Statistics of each row's scores over its negatives. Everything has length B unless said otherwise; what belongs to a
/// positive has length P, and P is B unless rows have several.
///
/// With `s` the score, `z = s − log_q` and `q_j = exp(z_j − lse)` the distribution over the row's negatives:
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct RowStatistics<T = f32> {
    /// `log Σ exp(z)`; −∞ with no negatives.
    pub lse: Vec<f64>,
    /// (P) score `s` of each positive, with no log_q.
    pub positive: Vec<f64>,
    /// Number of negatives.
    pub num_negatives: Vec<u64>,
    /// Expected score and entropy, where [`Request::with_moments`] asked for them.
    pub moments: Option<Moments>,
    /// Rank of each positive, where [`Request::with_rank`] asked for it.
    pub rank: Option<Rank>,
    /// (B, D) `O = Σ q_j ĉ_j`, the mean of the negatives under q, each normalised first under cosine: `∂lse/∂q̂ = O /
    /// temperature`.
    /// Present after a request for gradients.
    pub expected_negative: Option<Matrix<T>>,
}

/// Moments of a row's distribution `q` over its negatives. A row with no negatives has 0 in both.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub struct Moments {
    /// `E_q[s]`, with no log_q.
    pub expected_score: Vec<f64>,
    /// `H(q) = lse − E_q[z]`, in nats. With P = P(positive) under a softmax, the entropy of the whole distribution is
    /// `(1 − P) H(q) − P log P − (1 − P) log(1 − P)`.
    pub entropy: Vec<f64>,
}

/// Rank of each positive among its negatives by the score `s`, as at serving time (no log_q).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Rank {
    /// (P) negatives of the row that score strictly above the positive: its best possible place, counted from 0.
    pub above: Vec<u64>,
    /// (P) negatives of the row that score exactly as the positive does. `above + ties` is its worst possible place, which
    /// [`evaluation`](crate::evaluation) counts. Recall@K counts rows with `above + ties < K`.
    pub ties: Vec<u64>,
}

/// What a pass should return beside lse, positive and num_negatives.
///
/// ```
/// use catalog_softmax::Request;
/// let evaluation = Request::value().with_rank();
/// let training = Request::value_and_grad().with_moments();
/// assert!(training.gradients && !evaluation.gradients);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
#[must_use]
pub struct Request {
    /// Gradients, and [`RowStatistics::expected_negative`] on the way.
    pub gradients: bool,
    /// [`RowStatistics::moments`].
    pub moments: bool,
    /// [`RowStatistics::rank`].
    pub rank: bool,
    /// The gradient of a table as its rows that have one, and not as a matrix of the table's shape.
    pub row_sparse: bool,
    /// Gradients are added to what the caller's hold.
    pub accumulate: bool,
}

impl Request {
    /// The loss and the basic statistics.
    pub fn value() -> Self {
        Request::default()
    }

    /// The same with gradients.
    pub fn value_and_grad() -> Self {
        Request { gradients: true, ..Request::default() }
    }

    /// The gradient of a table is [`TableGradient::RowSparse`](crate::TableGradient): the rows that a batch names, and not
    /// (M, D) numbers that are mostly 0.
    pub fn row_sparse(mut self) -> Self {
        self.row_sparse = true;
        self
    }

    /// Adds the gradients to those that [`Gradients`](crate::Gradients) holds, which must have the batch's shapes, as
    /// after an earlier batch of the same step.
    pub fn accumulate(mut self) -> Self {
        self.accumulate = true;
        self
    }

    /// Adds the rank of each positive.
    pub fn with_rank(mut self) -> Self {
        self.rank = true;
        self
    }

    /// Adds expected score and entropy.
    pub fn with_moments(mut self) -> Self {
        self.moments = true;
        self
    }
}

/// A row's statistics over some of its negatives, in the streaming form: sums relative to the largest `z` so far.
///
/// `lse = max + ln(sum)`. Tiles, splits, pools and shards all end as partials, merged by [`Partial::merge_all`] in
/// a fixed order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Partial {
    /// What the sums are relative to: the largest `z`, or a number near it; −∞ with no negatives.
    pub(crate) max: f64,
    /// `Σ exp(z − max)`.
    pub(crate) sum: f64,
    /// `Σ exp(z − max) s`.
    pub(crate) sum_score: f64,
    /// `Σ exp(z − max) (z − max)`, from which the entropy follows, without cancellation where `max` is the largest `z`.
    pub(crate) sum_z: f64,
    pub(crate) num_negatives: u64,
}

impl Partial {
    pub(crate) const EMPTY: Partial =
        Partial { max: f64::NEG_INFINITY, sum: 0.0, sum_score: 0.0, sum_z: 0.0, num_negatives: 0 };

    /// Merges partials in the order in which they come.
    pub(crate) fn merge_all(parts: impl IntoIterator<Item = Partial>) -> Partial {
        parts.into_iter().fold(Partial::EMPTY, Partial::merge)
    }

    fn merge(self, other: Partial) -> Partial {
        // Not `f64::max`, which drops a NaN.
        let max = if other.max > self.max { other.max } else { self.max };
        let (a, b) = (self.rebased(max), other.rebased(max));
        Partial {
            max,
            sum: a.sum + b.sum,
            sum_score: a.sum_score + b.sum_score,
            sum_z: a.sum_z + b.sum_z,
            num_negatives: a.num_negatives + b.num_negatives,
        }
    }

    /// The factor by which sums relative to this partial's maximum, such as the expected negative, become relative to
    /// `max`.
    pub(crate) fn factor(&self, max: f64) -> f64 {
        // A part with no finite score sums to 0, or to NaN where a score was NaN: factor 1 keeps either.
        if self.max == f64::NEG_INFINITY || self.max == max { 1.0 } else { (self.max - max).exp() }
    }

    fn rebased(self, max: f64) -> Partial {
        if self.max == f64::NEG_INFINITY || self.max == max {
            return self;
        }
        let factor = self.factor(max);
        Partial {
            max,
            sum: self.sum * factor,
            sum_score: self.sum_score * factor,
            sum_z: factor * (self.sum_z + (self.max - max) * self.sum),
            ..self
        }
    }

    pub(crate) fn lse(&self) -> f64 {
        if self.sum.is_nan() { f64::NAN } else { self.max + self.sum.ln() }
    }
}

impl<T> RowStatistics<T> {
    /// Makes room for `rows` rows and `pairs` positives, which are then pushed; `request` says which optional fields there
    /// are.
    pub(crate) fn clear(&mut self, request: Request, rows: usize, pairs: usize) {
        self.lse.clear();
        self.lse.reserve_exact(rows);
        self.positive.clear();
        self.positive.reserve_exact(pairs);
        self.num_negatives.clear();
        self.num_negatives.reserve_exact(rows);
        let numbers = || Vec::with_capacity(rows);
        self.moments = request.moments.then(|| Moments { expected_score: numbers(), entropy: numbers() });
        let counts = || Vec::with_capacity(pairs);
        self.rank = request.rank.then(|| Rank { above: counts(), ties: counts() });
        if !request.gradients {
            self.expected_negative = None;
        }
    }

    pub(crate) fn push(&mut self, row: &Partial) {
        let empty = row.num_negatives == 0;
        let lse = if empty { f64::NEG_INFINITY } else { row.lse() };
        self.lse.push(lse);
        self.num_negatives.push(row.num_negatives);
        if let Some(moments) = &mut self.moments {
            moments.expected_score.push(if empty { 0.0 } else { row.sum_score / row.sum });
            moments.entropy.push(if empty { 0.0 } else { row.sum.ln() - row.sum_z / row.sum });
        }
    }
}
