//! The candidates of a step, as a batch of the crate over the item table: rows of the table where they are, and a queue.

use catalog_softmax::negatives::{NegativeQueue, QueueOptions, RandomStream};
use catalog_softmax::optimizer::TableMut;
use catalog_softmax::{
    Backend, Batch, BatchBuilder, Correction, DType, Embeddings, Gradients, Loss, Output, Pool, Request, RowNegatives,
    Table, TableGradient,
};

use crate::Fallible;
use crate::frequencies::Frequencies;
use crate::model::Model;
use crate::objective::{ItemLists, Objective};
use crate::parameter::{Parameter, RowGradient};
use crate::sampler::Sampler;
use crate::split::Split;
use crate::union::{ByPopularity, Union};

/// What a training step gives to the loss.
pub struct StepInputs<'a> {
    /// (B, D), the query tower's output.
    pub queries: &'a [f32],
    /// Of each row, at least one. The first is the target, by which in-batch and queued negatives come.
    pub positives: &'a ItemLists,
    /// Items that are no negatives of the row.
    pub excluded: &'a ItemLists,
    pub loss: Loss,
}

/// An objective's pools: what they keep from step to step, and the buffers of one.
pub struct Candidates<'a> {
    objective: &'a Objective,
    samplers: Vec<Sampler>,
    queue: Option<NegativeQueue>,
    /// Where a correction needs them.
    frequencies: Option<Frequencies<'a>>,
    random: RandomStream,
    drawn: Drawn,
    output: Output,
    gradients: Gradients,
}

/// The negatives of a step, with the log_q of everything: empty without a correction.
#[derive(Debug, Default)]
struct Drawn {
    /// The targets where negatives are in-batch, and the draws of each sampler. Without any, all items are candidates.
    pools: Vec<Items>,
    /// Those of each row's own.
    row_negatives: Option<Items>,
    positive_log_q: Vec<f32>,
    /// Of the queue's rows, for each of its pools.
    queue_log_q: Vec<Vec<f32>>,
}

/// Rows of the item table.
#[derive(Debug)]
struct Items {
    rows: Vec<u32>,
    log_q: Vec<f32>,
}

impl<'a> Candidates<'a> {
    pub fn new(objective: &'a Objective, split: &'a Split, dim: usize) -> Fallible<Self> {
        let (mut samplers, mut queue) = (Vec::new(), None);
        if let Some(negatives) = &objective.negatives {
            for &sampled in &negatives.sampled {
                samplers.push(Sampler::new(sampled, &split.popularity)?);
            }
            if let Some(capacity) = negatives.queue {
                queue = Some(NegativeQueue::new(QueueOptions::new(capacity, dim, DType::F32).with_ids())?);
            }
        }
        Ok(Candidates {
            objective,
            samplers,
            queue,
            frequencies: Frequencies::new(objective.log_q, &split.log_q)?,
            random: RandomStream::new(0, 0),
            drawn: Drawn::default(),
            output: Output::default(),
            gradients: Gradients::default(),
        })
    }

    /// From here on negatives are drawn from this epoch's stream.
    pub fn start_epoch(&mut self, seed: u64, epoch: usize) {
        self.random = RandomStream::new(seed, epoch as u64);
    }

    /// What steps leave for later ones, for a checkpoint between epochs: the queue and the frequencies, as bytes.
    pub fn save(&self) -> [Vec<u8>; 2] {
        let queue = self.queue.as_ref().map(NegativeQueue::to_bytes);
        let frequencies = self.frequencies.as_ref().map(Frequencies::save);
        [queue.unwrap_or_default(), frequencies.unwrap_or_default()]
    }

    /// Goes on from what [`save`](Candidates::save) returned for the same objective.
    pub fn restore(&mut self, [queue, frequencies]: &[Vec<u8>; 2]) -> Fallible<()> {
        if let Some(own) = &mut self.queue {
            *own = NegativeQueue::from_bytes(queue)?;
        }
        if let Some(own) = &mut self.frequencies {
            own.restore(self.objective.log_q, frequencies)?;
        }
        Ok(())
    }

    /// Computes the loss and takes the item tower's step. The gradients are those of everything else.
    pub fn step(
        &mut self,
        model: &mut Model,
        step: &StepInputs<'_>,
        backend: &mut dyn Backend<Real = f32>,
    ) -> Fallible<(&Output, &Gradients)> {
        let targets = step.positives.firsts();
        self.draw(&targets, step)?;
        if self.queue.is_some() {
            self.compute_beside_queue(&model.items, step, backend)?;
            let gradient = self.item_gradient(&step.positives.items, self.union(targets.len()))?;
            self.enqueue(&model.items, &targets)?;
            model.items.step(&gradient)?;
        } else {
            self.update(&mut model.items, step, backend)?;
        }
        Ok((&self.output, &self.gradients))
    }

    /// Without a queue, the gradient is needed for the step alone: the backend takes it.
    fn update(
        &mut self,
        items: &mut Parameter,
        step: &StepInputs<'_>,
        backend: &mut dyn Backend<Real = f32>,
    ) -> Fallible<()> {
        let Candidates { drawn, output, gradients, .. } = self;
        let Parameter { rows, dim, values, optimizer } = items;
        let table = Table::of_shape(*rows, *dim, DType::F32);
        let batch = drawn.batch(table, step).positives(&step.positives.items).build()?;
        let mut table = TableMut::new(values, *rows, *dim);
        let request = Request::value_and_grad();
        Ok(backend.update(&batch, &step.loss, request, &mut table, optimizer, output, gradients)?)
    }

    /// With a queue, gradients of negatives have weights, because the queue's rows have none, and gradients of positives
    /// have not. Positives are therefore embeddings apart, and the table's gradient is that of the negatives.
    fn compute_beside_queue(
        &mut self,
        items: &Parameter,
        step: &StepInputs<'_>,
        backend: &mut dyn Backend<Real = f32>,
    ) -> Fallible<()> {
        let positives = &step.positives.items;
        let embeddings = items.gather(positives);
        let queued = self.queue.iter().flat_map(NegativeQueue::pools).enumerate();
        // One log_q for the union: the queue keeps none of its own.
        let queued = queued.map(|(p, pool)| match self.drawn.queue_log_q.get(p) {
            Some(log_q) => pool.log_q(log_q),
            None => pool,
        });
        let batch = self
            .drawn
            .batch(items.embeddings().into(), step)
            .positive_embeddings(Embeddings::new(&embeddings, positives.len(), items.dim))
            .positive_ids(positives)
            .pools(queued)
            .build()?;
        let request = Request::value_and_grad().row_sparse();
        Ok(backend.compute(&batch, &step.loss, request, &mut self.output, Some(&mut self.gradients))?)
    }

    /// The item tower's gradient beside a queue. Without a union it has no weights.
    fn item_gradient(&self, positives: &[u32], union: Option<Union<'_>>) -> Fallible<RowGradient> {
        let Gradients { d_table: Some(TableGradient::RowSparse(negatives)), d_positive_embeddings, .. } =
            &self.gradients
        else {
            return Err("the step has no gradient of the items".into());
        };
        let weight = match union {
            Some(union) => union.of(&ids(&negatives.rows)).gradient_weight()?,
            None => Vec::new(),
        };
        let mut gradient = RowGradient::zeros(negatives.rows.iter().chain(positives).copied(), negatives.values.dim);
        for (at, &item) in negatives.rows.iter().enumerate() {
            gradient.add(item as usize, negatives.values.row(at), weight.get(at).copied().unwrap_or(1.0));
        }
        let d_positives = d_positive_embeddings.iter().flat_map(|d| d.values.chunks_exact(d.dim));
        positives.iter().zip(d_positives).for_each(|(&item, d)| gradient.add(item as usize, d, 1.0));
        Ok(gradient)
    }

    fn enqueue(&mut self, items: &Parameter, targets: &[u32]) -> Fallible<()> {
        let embeddings = items.gather(targets);
        let pool = Pool::new(Embeddings::new(&embeddings, targets.len(), items.dim)).ids(targets);
        self.queue.as_mut().map_or(Ok(()), |queue| Ok(queue.enqueue(&pool)?))
    }

    /// This step's negatives, and log_q of all candidates and positives in the union of the pools. The batch is observed
    /// first.
    fn draw(&mut self, targets: &[u32], step: &StepInputs<'_>) -> Fallible<()> {
        let mut drawn = Drawn::default();
        if self.objective.in_batch() {
            drawn.pools.push(Items::new(targets.to_vec()));
        }
        for sampler in &self.samplers {
            let items = Items::new(sampler.draw(targets.len(), &mut self.random)?);
            if sampler.per_row { drawn.row_negatives = Some(items) } else { drawn.pools.push(items) }
        }
        if let Some(frequencies) = &mut self.frequencies {
            frequencies.observe(&ids(targets));
        }
        if let Some(union) = self.union(targets.len()) {
            let log_q = |items: &[u32]| union.of(&ids(items)).log_q();
            for items in drawn.pools.iter_mut().chain(&mut drawn.row_negatives) {
                items.log_q = log_q(&items.rows)?;
            }
            if let Correction::LogQ | Correction::CorrectedLogQ = step.loss.correction {
                drawn.positive_log_q = log_q(&step.positives.items)?;
            }
            let queued = self.queue.iter().flat_map(NegativeQueue::ids);
            drawn.queue_log_q = queued.map(|ids| union.of(ids).log_q()).collect::<Fallible<_>>()?;
        }
        self.drawn = drawn;
        Ok(())
    }

    /// What a row is compared with, where a correction needs it.
    fn union(&self, num_queries: usize) -> Option<Union<'_>> {
        let Candidates { objective, samplers, queue, frequencies, .. } = self;
        let frequencies = frequencies.as_ref()?;
        let in_batch = if objective.in_batch() { num_queries - 1 } else { 0 };
        let queued = queue.as_ref().map_or(0, NegativeQueue::len);
        let by_popularity = ByPopularity { in_batch, queued, frequencies };
        Some(Union {
            by_popularity: (objective.in_batch() || queue.is_some()).then_some(by_popularity),
            samplers,
            counts: objective.log_q_is_of_counts(),
        })
    }
}

impl Drawn {
    /// A batch that lacks its positives, and the queue's pools.
    fn batch<'b>(&'b self, table: Table<'b>, step: &'b StepInputs<'_>) -> BatchBuilder<'b> {
        let StepInputs { queries, positives, excluded, .. } = step;
        let rows = positives.len();
        let mut batch = Batch::of_table(Embeddings::new(*queries, rows, queries.len() / rows), table)
            .positive_offsets(&positives.offsets)
            .excluded_ids(&excluded.offsets, &excluded.items)
            .pools(self.pools.iter().map(Items::pool));
        if let Some(negatives) = &self.row_negatives {
            batch = batch.row_negatives(negatives.row_negatives(rows));
        }
        if self.positive_log_q.is_empty() { batch } else { batch.positive_log_q(&self.positive_log_q) }
    }
}

impl Items {
    fn new(rows: Vec<u32>) -> Self {
        Items { rows, log_q: Vec::new() }
    }

    fn pool(&self) -> Pool<'_> {
        let pool = Pool::rows(&self.rows);
        if self.log_q.is_empty() { pool } else { pool.log_q(&self.log_q) }
    }

    fn row_negatives(&self, num_queries: usize) -> RowNegatives<'_> {
        let negatives = RowNegatives::new(&self.rows, self.rows.len() / num_queries);
        if self.log_q.is_empty() { negatives } else { negatives.log_q(&self.log_q) }
    }
}

/// Items are identified by their rows.
fn ids(rows: &[u32]) -> Vec<u64> {
    rows.iter().map(|&row| u64::from(row)).collect()
}

#[cfg(test)]
mod tests;
