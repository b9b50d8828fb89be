//! Statistics of the same rows over several sets of candidates, as those of all candidates together.

use super::embeddings::{Matrix, Real};
use super::statistics::{Partial, Request, RowStatistics};
use crate::error::{Result, does_not_apply, missing, shape};

impl<T: Real> RowStatistics<T> {
    /// Merges statistics of the same queries and positives over disjoint sets of candidates, such as the shards of a
    /// table, in the order given. The result is that of one pass over all candidates, to rounding in float64 (in `T` for
    /// [`expected_negative`](RowStatistics::expected_negative)):
    ///
    /// ```text
    /// lse = log Σ_r exp(lse_r)     num_negatives = Σ_r num_negatives_r     O = Σ_r exp(lse_r − lse) O_r
    /// ```
    ///
    /// Expected score and entropy are merged alike; places in the rank add up. A part without negatives changes nothing,
    /// and a NaN stays. A positive's score is the same in all parts, up to the rounding of the machines that computed it:
    /// the first part's is taken.
    ///
    /// ```
    /// use catalog_softmax::{Backend, Batch, Cpu, Embeddings, Loss, Request, RowStatistics, Similarity};
    /// let (queries, positive) = ([1.0f32, 0.5], [0.3f32, 0.3]);
    /// let items = [0.9f32, 0.1, 0.5, 0.5, 0.1, 0.9];
    /// let loss = Loss::softmax(Similarity::Dot, 1.0);
    /// let over = |items: &[f32]| {
    ///     let batch = Batch::builder(Embeddings::new(&queries, 1, 2), Embeddings::new(items, items.len() / 2, 2))
    ///         .positive_embeddings(Embeddings::new(&positive, 1, 2))
    ///         .build()?;
    ///     Cpu::new().statistics(&batch, &loss, Request::value())
    /// };
    /// let merged = RowStatistics::merge(&[over(&items[..2])?, over(&items[2..])?])?;
    /// let whole = over(&items)?;
    /// assert_eq!(merged.num_negatives, whole.num_negatives);
    /// assert!((merged.lse[0] - whole.lse[0]).abs() < 1e-6);
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) where there are no parts, or where one lacks an optional field that the
    /// first has; [`Error::DoesNotApply`](crate::Error::DoesNotApply) where one has a field that the first lacks;
    /// [`Error::Shape`](crate::Error::Shape) where lengths disagree.
    pub fn merge(parts: &[RowStatistics<T>]) -> Result<RowStatistics<T>> {
        let Some(first) = parts.first() else { return Err(missing("parts", "there is at least one to merge")) };
        let (rows, pairs) = (first.lse.len(), first.positive.len());
        for (part, statistics) in parts.iter().enumerate() {
            statistics.check_as(part, first)?;
        }
        let dim = first.expected_negative.as_ref().map(|o| o.dim);
        let request = Request {
            gradients: dim.is_some(),
            moments: first.moments.is_some(),
            rank: first.rank.is_some(),
            ..Request::default()
        };
        let mut merged = RowStatistics::default();
        merged.clear(request, rows, pairs);
        let mut expected_negative = dim.map(|dim| Matrix::zeros(rows, dim));
        for row in 0..rows {
            let whole = Partial::merge_all(parts.iter().map(|part| part.partial(row)));
            merged.push(&whole);
            if let Some(o) = &mut expected_negative {
                merge_expected_negatives(parts, row, merged.lse[row], o);
            }
        }
        merged.expected_negative = expected_negative;
        merged.positive.clone_from(&first.positive);
        if let Some(rank) = &mut merged.rank {
            let ranks = || parts.iter().filter_map(|part| part.rank.as_ref());
            rank.above.extend((0..pairs).map(|pair| ranks().map(|rank| rank.above[pair]).sum::<u64>()));
            rank.ties.extend((0..pairs).map(|pair| ranks().map(|rank| rank.ties[pair]).sum::<u64>()));
        }
        Ok(merged)
    }

    /// A row in the streaming form, relative to its lse.
    fn partial(&self, row: usize) -> Partial {
        let (lse, num_negatives) = (self.lse[row], self.num_negatives[row]);
        if num_negatives == 0 {
            return Partial::EMPTY;
        }
        // Σ exp(z − lse) is 1; it is 0 where every score is −∞.
        let sum = if lse == f64::NEG_INFINITY { 0.0 } else { 1.0 };
        let (score, entropy) = match &self.moments {
            Some(moments) => (moments.expected_score[row], moments.entropy[row]),
            None => (0.0, 0.0),
        };
        // E[z − lse] = −H
        Partial { max: lse, sum, sum_score: score, sum_z: -entropy, num_negatives }
    }

    /// Checks that part `part` has the lengths and the optional fields of the first one.
    fn check_as(&self, part: usize, first: &RowStatistics<T>) -> Result<()> {
        let (rows, pairs) = (first.lse.len(), first.positive.len());
        let name = |field: &str| format!("parts[{part}].{field}");
        let len = |field, found, expected| match found == expected {
            true => Ok(()),
            false => Err(shape(name(field), format!("length {found}"), format!("length {expected}, as in parts[0]"))),
        };
        let as_first = |field, found, expected| match (found, expected) {
            (false, true) => Err(missing(name(field), "parts[0] has it, so all parts do")),
            (true, false) => Err(does_not_apply(name(field), "parts[0] lacks it, so all parts do")),
            _ => Ok(()),
        };
        len("lse", self.lse.len(), rows)?;
        len("num_negatives", self.num_negatives.len(), rows)?;
        len("positive", self.positive.len(), pairs)?;
        as_first("moments", self.moments.is_some(), first.moments.is_some())?;
        as_first("rank", self.rank.is_some(), first.rank.is_some())?;
        as_first("expected_negative", self.expected_negative.is_some(), first.expected_negative.is_some())?;
        if let Some(moments) = &self.moments {
            len("moments.expected_score", moments.expected_score.len(), rows)?;
            len("moments.entropy", moments.entropy.len(), rows)?;
        }
        if let Some(rank) = &self.rank {
            len("rank.above", rank.above.len(), pairs)?;
            len("rank.ties", rank.ties.len(), pairs)?;
        }
        if let (Some(o), Some(first)) = (&self.expected_negative, &first.expected_negative)
            && (o.rows, o.dim, o.values.len()) != (rows, first.dim, rows * first.dim)
        {
            let found = format!("shape ({}, {}) and {} values", o.rows, o.dim, o.values.len());
            return Err(shape(name("expected_negative"), found, format!("shape ({rows}, {})", first.dim)));
        }
        Ok(())
    }
}

/// `O = Σ_r exp(lse_r − lse) O_r` of a row.
fn merge_expected_negatives<T: Real>(parts: &[RowStatistics<T>], row: usize, lse: f64, to: &mut Matrix<T>) {
    let dim = to.dim;
    let mut sum = vec![0f64; dim];
    for part in parts.iter().filter(|part| part.num_negatives[row] > 0) {
        let factor = share(part.lse[row], lse);
        let Some(o) = part.expected_negative.as_ref().filter(|_| factor != 0.0) else { continue };
        for (sum, &o) in sum.iter_mut().zip(o.row(row)) {
            *sum += factor * o.into();
        }
    }
    for (to, sum) in to.values[row * dim..(row + 1) * dim].iter_mut().zip(sum) {
        *to = T::from_f64(sum);
    }
}

/// The share that a part with log-sum-exp `part` has in the whole of `whole`: `exp(part − whole)`.
pub(crate) fn share(part: f64, whole: f64) -> f64 {
    if part == f64::NEG_INFINITY { 0.0 } else { (part - whole).exp() }
}
