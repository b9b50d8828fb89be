//! The optimiser's step on each rank's shard.

use super::agreement::{Fingerprints, agree};
use super::collective::Collective;
use super::{Sharded, Step};
use crate::backend::{Backend, check_update};
use crate::error::{Result, missing};
use crate::optimizer::{Optimizer, TableMut};
use crate::problem::batch::Batch;
use crate::problem::loss::Loss;
use crate::problem::output::{Gradients, Output, TableGradient};
use crate::problem::pool::Candidates;
use crate::problem::statistics::Request;

impl<B: Backend, C: Collective> Sharded<B, C> {
    /// As [`Backend::update`]: computes the loss over all shards and takes the optimiser's step on this rank's, by its part
    /// of the gradient. All rows are stepped if a pool with gradient is the whole table, otherwise those that the batch
    /// names. The other gradients are written into `gradients`; its `d_table` is `None`.
    ///
    /// Unlike on one machine, the gradient of the rows that are stepped exists for the length of the call: (M_r, D) where
    /// all are. `optimizer` has the state of this rank's rows. With stochastic rounding, give each rank another
    /// [seed](Optimizer::with_rounding_seed): bits are drawn by the row of the shard. A rank without rows gives a table of 0
    /// rows and any optimiser, which is not stepped.
    ///
    /// # Errors
    /// As [`Backend::update`] and [`compute`](Sharded::compute). Where a rank has an error, no rank has stepped its rows,
    /// unless a collective failed.
    #[expect(clippy::too_many_arguments, reason = "a step reads and writes that many things")]
    pub fn update(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        shard: &mut TableMut<'_>,
        optimizer: &mut Optimizer,
        output: &mut Output<B::Real>,
        gradients: &mut Gradients<B::Real>,
    ) -> Result<()> {
        let checked = self.check_shard_update(batch, loss, request, shard, optimizer);
        agree(&mut self.collective, checked.map(|()| Fingerprints::of_batch(batch, loss, request)))?;
        let pools = &batch.matrix.pools;
        let all_rows = pools.iter().any(|pool| pool.gradient && matches!(pool.candidates, Candidates::WholeTable));
        gradients.d_table = None;
        let request = Request { row_sparse: !all_rows, ..request };
        self.step(Step { batch, loss, request }, shard.view(), output, Some(gradients))?;
        match gradients.d_table.take() {
            _ if self.rows().is_empty() => Ok(()),
            Some(TableGradient::Dense(d)) => optimizer.step(shard, &d.to_f32()),
            Some(TableGradient::RowSparse(d)) => optimizer.step_rows(shard, &d.rows, &d.values.to_f32()),
            None => unreachable!("a batch over a table that has a gradient returns one"),
        }
    }

    fn check_shard_update(
        &self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        shard: &TableMut<'_>,
        optimizer: &Optimizer,
    ) -> Result<()> {
        let of_shard = self.check(batch, shard.view().shape(), None, loss)?;
        if !request.gradients {
            return Err(missing("request.gradients", "update computes gradients: Request::value_and_grad()"));
        }
        if self.rows().is_empty() {
            return Ok(());
        }
        check_update(&of_shard, request, shard)?;
        optimizer.check_table(shard)
    }
}
