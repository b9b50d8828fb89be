//! The passes that a backend implements: the streaming pass, the backward pass (the stream back), and the search.

use crate::error::Result;
use crate::optimizer::{Optimizer, TableMut};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Real;
use crate::problem::loss::{Loss, Similarity};
use crate::problem::output::{Gradients, TableGradient};
use crate::problem::plan::Plan;
use crate::problem::search::{Search, TopK};
use crate::problem::statistics::{Request, RowStatistics};

/// A batch and a loss whose options fit it.
///
/// The passes take this type and not the two parts. Callers of the crate can see the passes as methods of every
/// [`Backend`](crate::Backend), but they cannot make a value of this type, so a pass never runs on unchecked input.
#[derive(Debug, Clone, Copy)]
pub struct CheckedBatch<'a> {
    pub(crate) batch: &'a Batch<'a>,
    pub(crate) loss: &'a Loss,
}

impl<'a> CheckedBatch<'a> {
    pub(crate) fn new(batch: &'a Batch<'a>, loss: &'a Loss) -> Result<Self> {
        batch.check_table_is_here()?;
        loss.check(batch)?;
        Ok(CheckedBatch { batch, loss })
    }
}

/// A search and a K within its bounds. As with [`CheckedBatch`], callers of the crate cannot make one.
#[derive(Debug, Clone, Copy)]
pub struct CheckedSearch<'a> {
    pub(crate) search: &'a Search<'a>,
    pub(crate) similarity: Similarity,
    pub(crate) k: usize,
}

impl<'a> CheckedSearch<'a> {
    pub(crate) fn new(search: &'a Search<'a>, similarity: Similarity, k: usize) -> Result<Self> {
        search.check_k(k)?;
        Ok(CheckedSearch { search, similarity, k })
    }
}

/// The passes of a backend over checked input. Only the device can still fail.
///
/// Public in a private module: callers see it as the supertrait that seals [`Backend`](crate::Backend). Its methods can be
/// named but not called from outside the crate:
///
/// ```compile_fail,E0308
/// use catalog_softmax::{Backend, Search, Similarity};
/// fn unchecked<B: Backend>(backend: &mut B, search: &Search<'_>) {
///     let _ = backend.search(search, Similarity::Dot, 5000);
/// }
/// ```
///
/// ```compile_fail,E0451
/// use catalog_softmax::{Backend, Batch, Loss, RowStatistics};
/// fn unchecked<B: Backend>(backend: &mut B, batch: &Batch<'_>, loss: &Loss, d: &[f64]) {
///     let _ = backend.stream((batch, loss).into(), Default::default(), &mut RowStatistics::default());
/// }
/// ```
pub trait Stream {
    /// The type of gradients.
    type Real: Real;

    /// Fails where the backend does not compute a batch, or a loss of it, that is right in itself.
    #[doc(hidden)]
    fn check_support(&self, _batch: &Batch<'_>, _loss: Option<&Loss>) -> Result<()> {
        Ok(())
    }

    /// Tiles, splits and workspace of both passes.
    #[doc(hidden)]
    fn plan_stream(&self, checked: CheckedBatch<'_>, request: Request) -> Plan;

    /// Row statistics; `expected_negative` too where the request wants gradients.
    #[doc(hidden)]
    fn stream(
        &mut self,
        checked: CheckedBatch<'_>,
        request: Request,
        statistics: &mut RowStatistics<Self::Real>,
    ) -> Result<()>;

    /// Gradients, given each row's derivatives by `lse` and each pair's by `positive`. Writes every element of `gradients`,
    /// or adds to it where the request says so.
    #[doc(hidden)]
    fn stream_back(
        &mut self,
        checked: CheckedBatch<'_>,
        request: Request,
        statistics: &RowStatistics<Self::Real>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<Self::Real>,
    ) -> Result<()>;

    /// Takes the optimiser's step on the table in place of returning its gradient. The batch knows the table's shape
    /// alone. Writes the other gradients. Here: the row-sparse gradient, then the step.
    #[doc(hidden)]
    #[expect(clippy::too_many_arguments, reason = "each is one array of the step")]
    fn stream_back_and_step(
        &mut self,
        CheckedBatch { batch, loss }: CheckedBatch<'_>,
        statistics: &RowStatistics<Self::Real>,
        d_lse: &[f64],
        d_positive: &[f64],
        gradients: &mut Gradients<Self::Real>,
        table: &mut TableMut<'_>,
        optimizer: &mut Optimizer,
    ) -> Result<()> {
        let request = Request::value_and_grad().row_sparse();
        let here = batch.with_table(table.view());
        let checked = CheckedBatch { batch: &here, loss };
        self.stream_back(checked, request, statistics, d_lse, d_positive, gradients)?;
        match gradients.d_table.take() {
            Some(TableGradient::RowSparse(d)) => optimizer.step_rows(table, &d.rows, &d.values.to_f32()),
            _ => unreachable!("a batch over a table that has a gradient returns one"),
        }
    }

    /// Tiles, splits and workspace of a search.
    #[doc(hidden)]
    fn plan_search(&self, checked: CheckedSearch<'_>) -> Plan;

    /// The best K candidates of each row.
    #[doc(hidden)]
    fn search(&mut self, checked: CheckedSearch<'_>) -> Result<TopK<Self::Real>>;
}
