//! What a backend implements: the streaming pass, the stream back, and the search.

use crate::batch::Batch;
use crate::embeddings::Real;
use crate::error::Result;
use crate::loss::{Loss, Similarity};
use crate::output::Gradients;
use crate::plan::Plan;
use crate::search::{Search, TopK};
use crate::stats::{Request, RowStatistics};

/// The two passes of a backend over batches that were checked against their loss: what can still fail is the device.
///
/// Public in a private module: callers see it as the supertrait that seals [`Backend`](crate::Backend).
pub trait Stream {
    /// The type of gradients.
    type Real: Real;

    /// Tiles, splits and workspace of both passes.
    #[doc(hidden)]
    fn plan_stream(&self, batch: &Batch<'_>, loss: &Loss, request: Request) -> Plan;

    /// Row statistics; `expected_negative` too where the request wants gradients.
    #[doc(hidden)]
    fn stream(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        statistics: &mut RowStatistics<Self::Real>,
    ) -> Result<()>;

    /// Gradients, given each row's derivatives by `lse` and `positive`. Writes every element of `gradients`.
    #[doc(hidden)]
    fn stream_back(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        statistics: &RowStatistics<Self::Real>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<Self::Real>,
    ) -> Result<()>;

    /// Tiles, splits and workspace of a search.
    #[doc(hidden)]
    fn plan_search(&self, search: &Search<'_>, similarity: Similarity, k: usize) -> Plan;

    /// The best `k` candidates of each row; `k` was checked.
    #[doc(hidden)]
    fn search(&mut self, search: &Search<'_>, similarity: Similarity, k: usize) -> Result<TopK<Self::Real>>;
}
