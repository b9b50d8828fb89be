//! Candidates, with what is known about them.

use super::arrays::{Ids, Indices};
use super::embeddings::Embeddings;

/// One pool of candidates (N, D): the whole catalogue, a sampled set, the batch's own positives, a queue.
#[derive(Debug, Clone)]
pub struct Pool<'a> {
    pub(crate) candidates: Candidates<'a>,
    pub(crate) ids: Option<Ids<'a>>,
    pub(crate) log_q: Option<&'a [f32]>,
    pub(crate) gradient: bool,
}

/// Where a pool's candidates are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Candidates<'a> {
    /// A matrix of their own.
    Embeddings(Embeddings<'a>),
    /// (N) rows of the batch's table.
    Rows(Indices<'a>),
    /// Every row of the batch's table, in order.
    WholeTable,
}

impl<'a> Pool<'a> {
    /// A pool with no ids and no sampling probabilities, whose embeddings receive a gradient.
    pub fn new(candidates: Embeddings<'a>) -> Self {
        Pool { candidates: Candidates::Embeddings(candidates), ids: None, log_q: None, gradient: true }
    }

    /// A pool by reference, for a batch over a table ([`Batch::of_table`](crate::Batch::of_table)): candidate j is row
    /// `candidate_rows[j]` of the table. Rows may repeat; each copy counts. The candidates' ids are the table's.
    pub fn rows(candidate_rows: impl Into<Indices<'a>>) -> Self {
        Pool { candidates: Candidates::Rows(candidate_rows.into()), ids: None, log_q: None, gradient: true }
    }

    /// Every row of a batch's table, in order: full softmax over the catalogue.
    pub fn whole_table() -> Self {
        Pool { candidates: Candidates::WholeTable, ids: None, log_q: None, gradient: true }
    }

    /// The pool's own embeddings, such as those that a [queue](crate::negatives::NegativeQueue::pools) holds. `None` for
    /// a pool that names rows of a table.
    pub fn candidates(&self) -> Option<Embeddings<'a>> {
        match self.candidates {
            Candidates::Embeddings(embeddings) => Some(embeddings),
            Candidates::Rows(_) | Candidates::WholeTable => None,
        }
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
}

impl<'a> From<Embeddings<'a>> for Pool<'a> {
    fn from(candidates: Embeddings<'a>) -> Self {
        Pool::new(candidates)
    }
}
