//! Batches in shards: every rank's candidates are negatives of all queries.

use std::hash::Hasher;

use super::agreement::{Fingerprints, agree};
use super::collective::{Collective, gather_results};
use super::pools::{GatheredPool, gather_pools};
use crate::backend::stream::CheckedBatch;
use crate::backend::{Backend, average_directions, check_request};
use crate::error::{Result, does_not_apply, missing, shape, value};
use crate::problem::batch::Batch;
use crate::problem::embeddings::{DType, Matrix, Real};
use crate::problem::loss::{Loss, Reduction};
use crate::problem::output::{Gradients, Output};
use crate::problem::positives::Positives;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::statistics::Request;

/// A backend whose batch is spread over ranks: each rank has queries and candidates of its own, and the candidates of all
/// ranks are negatives of every query. A training loop that is data-parallel gets as many in-batch negatives as all its
/// ranks have items.
///
/// All ranks call the same methods in the same order, with the same loss and request. The batch of each is its own, of any
/// size: positives given by index are among the rank's own candidates, and [`Batch::in_batch`] means its own diagonal.
/// Pools are concatenated in the order of ranks, pool by pool, so all ranks have the same number of them. The results are
/// those of one process that has all rows and all candidates:
///
/// * `output.total` is the loss of all rows of all ranks: a mean divides by their number, a weighted mean by the sum of
///   their weights. It is the same on all ranks. Losses and statistics are those of the rank's own rows.
/// * `gradients` are derivatives of that total by what the rank has: its queries, its candidates (with the parts that the
///   rows of all ranks have in them) and its separate positives. Derivatives by the temperature are the same on all ranks.
///
/// So gradients of parameters that all ranks share are summed over ranks, and not averaged.
///
/// A rank gives its candidates to the collective, with their ids and log_q, and its part of d_candidates, N·D numbers with
/// the N of all ranks.
///
/// ```
/// use catalog_softmax::sharded::{Gathered, Threads};
/// use catalog_softmax::{Batch, Cpu, Embeddings, Loss, Similarity};
/// use std::time::Duration;
/// let (b, d) = (6, 8);
/// let users: Vec<f32> = (0..b * d).map(|i| (i as f32).sin()).collect();
/// let items: Vec<f32> = (0..b * d).map(|i| (i as f32).cos()).collect();
/// let loss = Loss::softmax(Similarity::Cosine, 0.1);
/// let ranks = [0..2, 2..6];
/// let losses = std::thread::scope(|scope| {
///     let ranks = Threads::group(2, Duration::from_secs(60))?.into_iter().zip(ranks).map(|(threads, rows)| {
///         let (users, items) = (&users[rows.start * d..rows.end * d], &items[rows.start * d..rows.end * d]);
///         scope.spawn(move || {
///             let own = |values| Embeddings::new(values, rows.len(), d);
///             let batch = Batch::in_batch(own(users), own(items)).build()?;
///             let (output, gradients) = Gathered::new(Cpu::new(), threads).value_and_grad(&batch, &loss)?;
///             assert_eq!(output.statistics.num_negatives, vec![5; rows.len()]);
///             assert_eq!(gradients.d_candidates[0].rows, rows.len());
///             Ok(output.total)
///         })
///     });
///     let ranks: Vec<_> = ranks.collect();
///     ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Result<Vec<f64>, _>>()
/// })?;
/// assert_eq!(losses[0], losses[1]);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug)]
pub struct Gathered<B, C> {
    backend: B,
    collective: C,
}

impl<B: Backend, C: Collective> Gathered<B, C> {
    /// A backend and the ranks that it works with.
    pub fn new(backend: B, collective: C) -> Self {
        Gathered { backend, collective }
    }

    /// The collective.
    pub fn collective(&self) -> &C {
        &self.collective
    }

    /// The backend and the collective.
    pub fn into_parts(self) -> (B, C) {
        (self.backend, self.collective)
    }

    /// As [`Backend::compute`], with the candidates of all ranks.
    ///
    /// # Errors
    /// As [`Backend::compute`], and for a batch over a table. If one rank has an error, all ranks return one:
    /// [`Error::OtherRank`](crate::Error::OtherRank) where it is another's. [`Error::Value`](crate::Error::Value) on all
    /// ranks where they give different losses or requests, or batches of different kinds;
    /// [`Error::Collective`](crate::Error::Collective) where a rank is gone. What has been written by then is
    /// unspecified.
    pub fn compute(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        output: &mut Output<B::Real>,
        gradients: Option<&mut Gradients<B::Real>>,
    ) -> Result<()> {
        let checked = check(batch, loss).and_then(|()| check_request(batch, request, gradients.as_deref()));
        agree(&mut self.collective, checked.map(|()| fingerprints(batch, loss, request)))?;
        let mut fresh = self.one_direction(batch, loss, request, output)?;
        if loss.symmetric {
            let (swapped, mut other) = (batch.swapped()?, Output::default());
            let request = Request { gradients: request.gradients, ..Request::default() };
            let of_other = self.one_direction(&swapped, loss, request, &mut other)?;
            average_directions(batch, output, &other);
            fresh.iter_mut().zip(&of_other).for_each(|(fresh, other)| fresh.average_with_swapped(other));
        }
        if let (Some(gradients), Some(fresh)) = (gradients, fresh) {
            if request.accumulate {
                gradients.add(&fresh);
            } else {
                *gradients = fresh;
            }
        }
        Ok(())
    }

    /// The loss and the basic statistics.
    ///
    /// # Errors
    /// As [`compute`](Gathered::compute).
    pub fn value(&mut self, batch: &Batch<'_>, loss: &Loss) -> Result<Output<B::Real>> {
        let mut output = Output::default();
        self.compute(batch, loss, Request::value(), &mut output, None)?;
        Ok(output)
    }

    /// The loss and its gradients.
    ///
    /// # Errors
    /// As [`compute`](Gathered::compute).
    #[expect(clippy::type_complexity, reason = "a pair is simpler than a name for it")]
    pub fn value_and_grad(&mut self, batch: &Batch<'_>, loss: &Loss) -> Result<(Output<B::Real>, Gradients<B::Real>)> {
        let (mut output, mut gradients) = (Output::default(), Gradients::default());
        self.compute(batch, loss, Request::value_and_grad(), &mut output, Some(&mut gradients))?;
        Ok((output, gradients))
    }

    /// This rank's queries against the candidates of all ranks.
    fn one_direction(
        &mut self,
        batch: &Batch<'_>,
        loss: &Loss,
        request: Request,
        output: &mut Output<B::Real>,
    ) -> Result<Option<Gradients<B::Real>>> {
        let upstream = self.upstream(batch, loss)?;
        let pools = gather_pools(&mut self.collective, batch)?;
        let whole = self.against_all(batch, &pools);
        // A weighted mean and a symmetric loss are made of parts; a part is a sum.
        let part = Loss { reduction: Reduction::Sum, symmetric: false, ..*loss };
        let mut fresh = request.gradients.then(Gradients::default);
        let streamed = whole.as_ref().map_err(Clone::clone).and_then(|whole| {
            self.step(whole, &part, upstream, Request { accumulate: false, ..request }, output, fresh.as_mut())
        });
        self.sum_up(streamed, &pools, output, fresh.as_mut())?;
        Ok(fresh)
    }

    /// What multiplies each weighted row of all ranks.
    fn upstream(&mut self, batch: &Batch<'_>, loss: &Loss) -> Result<f64> {
        let (rows, weight) = (batch.num_queries() as f64, (0..batch.num_queries()).map(|row| batch.weight(row)).sum());
        let [rows, weight] = sums(&mut self.collective, Ok([rows, weight]))?;
        match loss.reduction {
            Reduction::None | Reduction::Sum => Ok(1.0),
            Reduction::Mean => Ok(1.0 / rows),
            Reduction::WeightedMean if weight > 0.0 => Ok(1.0 / weight),
            Reduction::WeightedMean => {
                Err(value("the sum of row_weight", weight, "> 0 over all ranks with Reduction::WeightedMean"))
            }
        }
    }

    /// This rank's batch with the candidates of all ranks in place of its own.
    fn against_all<'p>(&self, batch: &'p Batch<'_>, pools: &'p [GatheredPool]) -> Result<Batch<'p>> {
        let n = pools.iter().map(GatheredPool::len).fold(0, usize::saturating_add);
        if n > u32::MAX as usize {
            return Err(shape("candidates", format!("{n} rows on all ranks"), "at most 2^32 - 1"));
        }
        let rank = self.collective.rank();
        let positives = match &batch.positives {
            Positives::Index(own) => {
                let everywhere = |&index: &u32| {
                    let (pool, at) = batch.matrix.locate(index as usize);
                    let before: usize = pools[..pool].iter().map(GatheredPool::len).sum();
                    (before + pools[pool].start_of(rank) + at) as u32
                };
                Positives::Index(own.iter().map(everywhere).collect())
            }
            Positives::Separate(embeddings) => Positives::Separate(*embeddings),
            Positives::Rows(_) => unreachable!("a batch over a table is rejected"),
        };
        let of_batch = batch.matrix.pools.iter().zip(pools);
        let pools = of_batch.map(|(own, gathered)| gathered.view(own.gradient)).collect();
        let borrowed = batch.clone();
        Ok(Batch { matrix: ScoreMatrix { pools, ..borrowed.matrix }, positives, ..borrowed })
    }

    fn step(
        &mut self,
        whole: &Batch<'_>,
        loss: &Loss,
        upstream: f64,
        request: Request,
        output: &mut Output<B::Real>,
        gradients: Option<&mut Gradients<B::Real>>,
    ) -> Result<()> {
        self.backend.check_support(whole, Some(loss))?;
        let checked = CheckedBatch { batch: whole, loss };
        self.backend.stream(checked, request, &mut output.statistics)?;
        let epilogue = loss.epilogue_times(upstream, whole, &output.statistics);
        if let Some(gradients) = gradients {
            let (d_lse, d_positive) = (&epilogue.d_lse, &epilogue.d_positive);
            self.backend.stream_back(checked, request, &output.statistics, d_lse, d_positive, gradients)?;
        }
        (output.total, output.loss, output.probability) = (epilogue.total, epilogue.loss, epilogue.probability);
        Ok(())
    }

    /// The total and the gradients over all ranks. A rank keeps those of its own candidates.
    fn sum_up(
        &mut self,
        streamed: Result<()>,
        pools: &[GatheredPool],
        output: &mut Output<B::Real>,
        gradients: Option<&mut Gradients<B::Real>>,
    ) -> Result<()> {
        let mut none = Gradients::default();
        let gradients = gradients.unwrap_or(&mut none);
        let own = [output.total, gradients.d_temperature, gradients.d_log_temperature];
        let all = sums(&mut self.collective, streamed.map(|()| own))?;
        [output.total, gradients.d_temperature, gradients.d_log_temperature] = all;
        let rank = self.collective.rank();
        for (d, pool) in gradients.d_candidates.iter_mut().zip(pools) {
            // A pool without gradient has none on any rank.
            if d.rows == 0 {
                continue;
            }
            let lengths: Vec<usize> = pool.lengths.iter().map(|len| len * d.dim).collect();
            self.collective.reduce_scatter(B::Real::numbers(&mut d.values), &lengths)?;
            let start = pool.start_of(rank) * d.dim;
            let values = d.values[start..start + lengths[rank]].to_vec();
            *d = Matrix { values, rows: pool.lengths[rank], dim: d.dim };
        }
        Ok(())
    }
}

/// The rules about a rank's own batch.
fn check(batch: &Batch<'_>, loss: &Loss) -> Result<()> {
    if batch.matrix.table.is_some() {
        return Err(does_not_apply("table", "candidates are gathered: a table in shards is for Sharded"));
    }
    if loss.reduction == Reduction::WeightedMean && batch.row_weight.is_none() {
        return Err(missing("row_weight", "Reduction::WeightedMean divides by its sum"));
    }
    // The weights of one rank may be 0: what counts is the sum over all.
    let reduction = if loss.reduction == Reduction::WeightedMean { Reduction::Sum } else { loss.reduction };
    Loss { reduction, ..*loss }.check(batch)
}

/// Of what batches of all ranks have in common. The sizes of pools are each rank's own.
fn fingerprints(batch: &Batch<'_>, loss: &Loss, request: Request) -> Fingerprints {
    let mut all = Fingerprints::default();
    all.add_options(loss, request);
    let dtype = match batch.dtype() {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
    };
    all.add("the shape of queries", |hash| [batch.dim() as u64, dtype].iter().for_each(|&n| hash.write_u64(n)));
    all.add("the kinds of pools", |hash| {
        for pool in &batch.matrix.pools {
            let kinds = [pool.ids.is_some(), pool.log_q.is_some(), pool.gradient];
            kinds.iter().for_each(|&kind| hash.write_u64(kind.into()));
        }
    });
    all
}

/// Sums of numbers that each rank gives, in the order of ranks.
fn sums<const K: usize>(collective: &mut impl Collective, mine: Result<[f64; K]>) -> Result<[f64; K]> {
    let bytes = mine.map(|numbers| numbers.iter().flat_map(|number| number.to_le_bytes()).collect());
    let all = gather_results(collective, bytes)?;
    let mut sums = [0.0; K];
    for bytes in &all {
        for (sum, number) in sums.iter_mut().zip(bytes.chunks_exact(8)) {
            *sum += f64::from_le_bytes(number.try_into().expect("8 bytes"));
        }
    }
    Ok(sums)
}
