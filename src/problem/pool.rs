//! Candidates, with what is known about them.

use super::arrays::Ids;
use super::embeddings::Embeddings;
use super::shape::PoolShape;

/// One pool of candidates (N, D): the whole catalogue, a sampled set, the batch's own positives, a queue.
#[derive(Debug, Clone)]
pub struct Pool<'a> {
    pub(crate) candidates: Embeddings<'a>,
    pub(crate) ids: Option<Ids<'a>>,
    pub(crate) log_q: Option<&'a [f32]>,
    pub(crate) gradient: bool,
}

impl<'a> Pool<'a> {
    /// A pool with no ids and no sampling probabilities, whose embeddings receive a gradient.
    pub fn new(candidates: Embeddings<'a>) -> Self {
        Pool { candidates, ids: None, log_q: None, gradient: true }
    }

    /// The embeddings, such as those that a [queue](crate::negatives::NegativeQueue::pools) holds.
    pub fn candidates(&self) -> Embeddings<'a> {
        self.candidates
    }

    /// `candidate_ids` (N): candidates that carry the positive's id (accidental hits) or an id that the row excludes
    /// are not negatives of that row.
    pub fn ids(mut self, candidate_ids: impl Into<Ids<'a>>) -> Self {
        self.ids = Some(candidate_ids.into());
        self
    }

    /// `log_q` (N): natural logarithm of the probability that one draw is this candidate. It is never clipped. All
    /// corrections but [`Correction::CorrectedLogQ`](crate::Correction) also accept the logarithm of an expected count:
    /// n·q copies in n draws. If a loss has pools from several sources, compute their log_q with
    /// [`union_log_q`](crate::negatives::union_log_q).
    pub fn log_q(mut self, log_q: &'a [f32]) -> Self {
        self.log_q = Some(log_q);
        self
    }

    /// The pool's embeddings are constants (a queue, a frozen table): no gradient is computed for them.
    pub fn without_gradient(mut self) -> Self {
        self.gradient = false;
        self
    }

    pub(crate) fn ids_slice(&self) -> Option<&[u64]> {
        self.ids.as_ref().map(|ids| &*ids.0)
    }

    pub(crate) fn shape(&self) -> PoolShape {
        PoolShape {
            candidates: self.candidates.shape(),
            ids: self.ids_slice().map(<[u64]>::len),
            log_q: self.log_q.map(<[f32]>::len),
            gradient: self.gradient,
        }
    }
}

impl<'a> From<Embeddings<'a>> for Pool<'a> {
    fn from(candidates: Embeddings<'a>) -> Self {
        Pool::new(candidates)
    }
}
