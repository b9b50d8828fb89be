//! Steps over several machines, or several devices of one: a catalogue in shards, and batches in shards.
//!
//! [`Sharded`] computes a loss over a table of which each rank holds some rows, with the same queries on all ranks.
//! [`Gathered`] computes a loss in which each rank has queries and candidates of its own, and every rank's candidates are
//! negatives of all queries. Both use the caller's own communication through the small trait [`Collective`], and both
//! give the loss and the gradients of one process that has everything.
//!
//! ```
//! use catalog_softmax::sharded::{Collective, Sharded, Threads};
//! use catalog_softmax::{Batch, Cpu, DType, Embeddings, Loss, Similarity, Table};
//! use std::time::Duration;
//!
//! let (b, m, d) = (4, 100, 8);
//! let queries: Vec<f32> = (0..b * d).map(|i| (i as f32).sin()).collect();
//! let table: Vec<f32> = (0..m * d).map(|i| (i as f32).cos()).collect();
//! // All ranks build the same batch. It names rows of the whole table and knows only the table's shape.
//! let batch = Batch::of_table(Embeddings::new(&queries, b, d), Table::of_shape(m, d, DType::F32))
//!     .positives(&[3u32, 14, 15, 92])
//!     .build()?;
//! let loss = Loss::softmax(Similarity::Cosine, 0.05);
//!
//! // Rank 0 holds rows 0 to 29 of the table, rank 1 the others.
//! let shards = [&table[..30 * d], &table[30 * d..]];
//! let totals = std::thread::scope(|scope| {
//!     let ranks = Threads::group(2, Duration::from_secs(60))?.into_iter().zip(shards).map(|(threads, shard)| {
//!         let (batch, loss) = (&batch, &loss);
//!         scope.spawn(move || {
//!             let rows = shard.len() / d;
//!             let mut sharded = Sharded::new(Cpu::new(), threads, rows)?;
//!             let (output, gradients) = sharded.value_and_grad(batch, Embeddings::new(shard, rows, d), loss)?;
//!             let d_shard = gradients.d_table.expect("a batch over a table has its gradient");
//!             assert_eq!(d_shard.dense().expect("dense unless asked otherwise").rows, rows);
//!             Ok(output.total)
//!         })
//!     });
//!     let ranks: Vec<_> = ranks.collect();
//!     ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Result<Vec<f64>, _>>()
//! })?;
//! assert_eq!(totals[0], totals[1]);
//! # Ok::<(), catalog_softmax::Error>(())
//! ```

mod agreement;
mod backward;
mod collective;
mod elements;
mod gathered;
mod message;
#[cfg(feature = "nccl")]
mod nccl;
mod part;
mod pools;
mod threads;
mod top_k;
mod update;

use std::ops::Range;

use crate::backend::stream::CheckedBatch;
use crate::backend::{Backend, check_request};
use crate::error::{Result, does_not_apply, missing, shape};
use crate::problem::batch::Batch;
use crate::problem::embeddings::Embeddings;
use crate::problem::loss::Loss;
use crate::problem::output::{Gradients, Output};
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::shape::MatrixShape;
use crate::problem::statistics::{Request, RowStatistics};
use crate::problem::table::Table;
use agreement::{Fingerprints, agree};
use collective::gather_results;
pub use collective::{Collective, Numbers};
use elements::Received;
pub use gathered::Gathered;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
use part::Part;
pub use threads::Threads;

/// A backend over a table of which each rank holds consecutive rows: rank 0 the first ones, and so on in the order of
/// ranks. Shards may have different sizes, and some may be empty.
///
/// All ranks call the same methods in the same order, with the same batch, loss and request. The batch is built over the
/// shape of the whole table ([`Table::of_shape`]), so its positives, candidates and negatives are rows of the whole
/// table; each rank gives its own shard beside it. The results are those of one process with the whole table:
///
/// * `output` is the same on all ranks, bit for bit. Its `statistics` lack
///   [`expected_negative`](RowStatistics::expected_negative), which no rank has as a whole.
/// * `gradients.d_table` is that of the rank's shard, with rows counted from the shard's first. Everything else in
///   `gradients` is the same on all ranks.
///
/// The numbers that ranks exchange do not depend on M. In a step with gradients, a rank gives the collective
///
/// ```text
/// P·D      f32                    embeddings of the positives (of which it fills those that it holds), summed
/// 2·B      8 bytes each           lse and num_negatives, gathered; with moments 4·B
/// P        8 bytes each           scores of the positives, from one rank; with rank 2·P more from every rank
/// B·D      f32 (f64: Reference)   d_queries, summed
/// ```
///
/// and some dozens of bytes. The mean of the negatives, O, stays where it is: see `docs/design.md`.
///
/// A backend on a GPU computes on host batches here, as [`Backend::compute`] does.
#[derive(Debug)]
pub struct Sharded<B, C> {
    backend: B,
    collective: C,
    /// The first row of each rank's shard, and M.
    starts: Vec<usize>,
}

/// A step that all ranks agreed on.
#[derive(Clone, Copy)]
struct Step<'a> {
    batch: &'a Batch<'a>,
    loss: &'a Loss,
    request: Request,
}

impl<B: Backend, C: Collective> Sharded<B, C> {
    /// Tells all ranks how many rows this one holds; 0 is allowed. All ranks call it.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) where all shards are empty; errors of the collective.
    pub fn new(backend: B, mut collective: C, shard_rows: usize) -> Result<Self> {
        let all = collective.all_gather(&(shard_rows as u64).to_le_bytes())?;
        let mut starts = vec![0];
        for bytes in &all {
            let rows = bytes.iter().rev().fold(0u64, |rows, &byte| rows << 8 | u64::from(byte));
            let end = starts[starts.len() - 1] as u64;
            starts.push(end.saturating_add(rows) as usize);
        }
        if starts[all.len()] == 0 {
            return Err(shape("shard_rows", "0 rows on all ranks", "at least 1 row in the whole table"));
        }
        Ok(Sharded { backend, collective, starts })
    }

    /// The rows of the table that this rank holds.
    pub fn rows(&self) -> Range<usize> {
        self.rows_of(self.collective.rank())
    }

    /// M, the rows of the whole table.
    pub fn table_rows(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// The collective.
    pub fn collective(&self) -> &C {
        &self.collective
    }

    /// The backend and the collective.
    pub fn into_parts(self) -> (B, C) {
        (self.backend, self.collective)
    }

    fn rows_of(&self, rank: usize) -> Range<usize> {
        self.starts[rank]..self.starts[rank + 1]
    }

    /// The first rank that holds rows. It computes what belongs to no shard.
    fn home(&self) -> usize {
        (0..self.starts.len() - 1).find(|&rank| !self.rows_of(rank).is_empty()).unwrap_or(0)
    }

    /// As [`Backend::compute`], over all shards. `shard` (M_r, D) holds the rows [`rows`](Sharded::rows) of the table; an
    /// empty one is `Embeddings::new(&[0f32; 0], 0, dim)`, of the batch's element type.
    ///
    /// # Errors
    /// As [`Backend::compute`]; for a batch that is not over the shape of a table of M rows, and a shard of another size
    /// than [`new`](Sharded::new) was told. If one rank has an error, all ranks return one:
    /// [`Error::OtherRank`](crate::Error::OtherRank) where it is another's. [`Error::Value`](crate::Error::Value) on all
    /// ranks where they give different batches, losses or requests; [`Error::Collective`](crate::Error::Collective)
    /// where a rank is gone. What has been written by then is unspecified.
    pub fn compute(
        &mut self,
        batch: &Batch<'_>,
        shard: Embeddings<'_>,
        loss: &Loss,
        request: Request,
        output: &mut Output<B::Real>,
        gradients: Option<&mut Gradients<B::Real>>,
    ) -> Result<()> {
        let checked = self.check(batch, shard.shape(), Some(shard), loss);
        let checked = checked.and_then(|whole| check_request(&whole, request, gradients.as_deref()));
        agree(&mut self.collective, checked.map(|()| Fingerprints::of_batch(batch, loss, request)))?;
        self.step(Step { batch, loss, request }, shard, output, gradients)
    }

    /// The loss and the basic statistics.
    ///
    /// # Errors
    /// As [`compute`](Sharded::compute).
    pub fn value(&mut self, batch: &Batch<'_>, shard: Embeddings<'_>, loss: &Loss) -> Result<Output<B::Real>> {
        let mut output = Output::default();
        self.compute(batch, shard, loss, Request::value(), &mut output, None)?;
        Ok(output)
    }

    /// The loss and its gradients.
    ///
    /// # Errors
    /// As [`compute`](Sharded::compute).
    #[expect(clippy::type_complexity, reason = "a pair is simpler than a name for it")]
    pub fn value_and_grad(
        &mut self,
        batch: &Batch<'_>,
        shard: Embeddings<'_>,
        loss: &Loss,
    ) -> Result<(Output<B::Real>, Gradients<B::Real>)> {
        let (mut output, mut gradients) = (Output::default(), Gradients::default());
        self.compute(batch, shard, loss, Request::value_and_grad(), &mut output, Some(&mut gradients))?;
        Ok((output, gradients))
    }

    /// The rules about a batch and this rank's shard. Returns the batch with the shard's shape in place of the table's,
    /// which is the shape of the gradients.
    fn check<'a>(
        &self,
        batch: &'a Batch<'_>,
        found: MatrixShape,
        shard: Option<Embeddings<'a>>,
        loss: &Loss,
    ) -> Result<Batch<'a>> {
        const OF_SHAPE: &str = "each rank gives its shard: build the batch by Batch::of_table with Table::of_shape";
        let Some(table) = &batch.matrix.table else { return Err(missing("table", OF_SHAPE)) };
        if table.embeddings.is_some() {
            return Err(does_not_apply("the elements of the batch's table", OF_SHAPE));
        }
        if table.shape.rows != self.table_rows() {
            let rule = format!("{} rows, those of all shards together", self.table_rows());
            return Err(shape("table", format!("{} rows", table.shape.rows), rule));
        }
        let expected = MatrixShape { rows: self.rows().len(), ..table.shape };
        if found != expected {
            let shown = |shape: MatrixShape| format!("shape ({}, {}) of {:?}", shape.rows, shape.dim, shape.dtype);
            return Err(shape("shard", shown(found), format!("{}, this rank's part of the table", shown(expected))));
        }
        if let Some(shard) = shard.filter(|shard| shard.rows() > 0) {
            shard.check("shard")?;
        }
        loss.check(batch)?;
        let table = Table { shape: expected, ..table.clone() };
        Ok(Batch { matrix: ScoreMatrix { table: Some(table), ..batch.matrix.clone() }, ..batch.clone() })
    }

    fn step(
        &mut self,
        step: Step<'_>,
        shard: Embeddings<'_>,
        output: &mut Output<B::Real>,
        gradients: Option<&mut Gradients<B::Real>>,
    ) -> Result<()> {
        let positives = self.positive_embeddings(step.batch, shard)?;
        let (rows, home) = (self.rows(), self.collective.rank() == self.home());
        let part = (!rows.is_empty()).then(|| Part::new(step.batch, rows, home, positives));
        let local = part.as_ref().map(|part| part.batch(step.batch, shard));
        let mut own = RowStatistics::default();
        let streamed = match &local {
            Some(local) => self.stream(Step { batch: local, ..step }, &mut own),
            None => Ok(()),
        };
        output.statistics = self.merged(step, streamed.map(|()| &own))?;
        let epilogue = step.loss.checked_epilogue(step.batch, &output.statistics);
        if let Some(gradients) = gradients {
            let upstream = backward::Upstream { own: &own, lse: &output.statistics.lse, epilogue: &epilogue };
            self.backward(step, part.as_ref().zip(local.as_ref()), &upstream, gradients)?;
        }
        (output.total, output.loss, output.probability) = (epilogue.total, epilogue.loss, epilogue.probability);
        Ok(())
    }

    /// The embeddings of positives that are rows of the table: each rank gives those that it holds and zeros for the
    /// others. A sum of one number and zeros is exact.
    fn positive_embeddings(&mut self, batch: &Batch<'_>, shard: Embeddings<'_>) -> Result<Option<Received>> {
        let Positives::Rows(rows) = &batch.positives else { return Ok(None) };
        if rows.is_empty() {
            return Ok(None);
        }
        let (here, dim) = (self.rows(), batch.dim());
        let mut values = vec![0f32; rows.len() * dim];
        for (&row, value) in rows.iter().zip(values.chunks_exact_mut(dim)) {
            if here.contains(&(row as usize)) {
                shard.widen_row(row as usize - here.start, value);
            }
        }
        self.collective.sum(Numbers::F32(&mut values))?;
        Ok(Some(Received::from_f32(values, dim, batch.dtype())))
    }

    /// The streaming pass over this rank's candidates.
    fn stream(&mut self, step: Step<'_>, own: &mut RowStatistics<B::Real>) -> Result<()> {
        self.backend.check_support(step.batch, Some(step.loss))?;
        self.backend.stream(CheckedBatch { batch: step.batch, loss: step.loss }, step.request, own)
    }

    /// The statistics over the candidates of all ranks.
    fn merged(
        &mut self,
        Step { batch, request, .. }: Step<'_>,
        own: Result<&RowStatistics<B::Real>>,
    ) -> Result<RowStatistics<B::Real>> {
        let (rank, home) = (self.collective.rank(), self.home());
        // A rank without rows has no statistics.
        let mine = own.map(|own| if self.rows().is_empty() { Vec::new() } else { message::encode(own, rank == home) });
        let all = gather_results(&mut self.collective, mine)?;
        let (rows, pairs) = (batch.num_queries(), batch.num_positives());
        let of_home = message::decode(&all[home], request, rows, pairs, None);
        let mut parts: Vec<RowStatistics<B::Real>> = vec![of_home];
        for rank in (home + 1..all.len()).filter(|&rank| !self.rows_of(rank).is_empty()) {
            let part = message::decode(&all[rank], request, rows, pairs, Some(&parts[0].positive));
            parts.push(part);
        }
        RowStatistics::merge(&parts)
    }
}
