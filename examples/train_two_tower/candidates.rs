//! The candidates of a step, as a batch of the crate: gathered, scored, and their gradients added up by item.

use catalog_softmax::negatives::{NegativeQueue, QueueOptions, RandomStream};
use catalog_softmax::{Backend, Batch, Correction, DType, Embeddings, Gradients, Loss, Output, Pool, Request};

use crate::Fallible;
use crate::frequencies::Frequencies;
use crate::model::Model;
use crate::objective::{ExcludedItems, Objective};
use crate::parameter::RowGradient;
use crate::sampler::Sampler;
use crate::split::Split;
use crate::union::{ByPopularity, Union};

/// What a training step gives to the loss.
pub struct StepInputs<'a> {
    /// (B, D), the query tower's output.
    pub queries: &'a [f32],
    /// (B) items.
    pub targets: &'a [u32],
    pub excluded: &'a ExcludedItems,
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
    /// The batch's targets: candidates where negatives are in-batch, else positives apart from the pools.
    targets: DrawnRows,
    /// The draws of each sampler; of `full` the whole catalogue.
    drawn: Vec<DrawnRows>,
    /// log_q of the queue's rows, for each of its pools.
    queue_log_q: Vec<Vec<f32>>,
    output: Output,
    gradients: Gradients,
}

/// Items with what a pool has of them.
#[derive(Debug, Default)]
struct DrawnRows {
    items: Vec<u64>,
    /// (items, D)
    embeddings: Vec<f32>,
    /// Empty without a correction.
    log_q: Vec<f32>,
    /// What their gradients are multiplied by for the queue's rows, which have none; empty for 1.
    gradient_weight: Vec<f32>,
}

impl DrawnRows {
    fn embeddings(&self, dim: usize) -> Embeddings<'_> {
        Embeddings::new(&self.embeddings, self.items.len(), dim)
    }

    fn pool(&self, dim: usize) -> Pool<'_> {
        let pool = Pool::new(self.embeddings(dim)).ids(&self.items);
        if self.log_q.is_empty() { pool } else { pool.log_q(&self.log_q) }
    }
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
        let catalogue = || DrawnRows { items: (0..split.num_items() as u64).collect(), ..DrawnRows::default() };
        Ok(Candidates {
            objective,
            drawn: match &objective.negatives {
                Some(_) => samplers.iter().map(|_| DrawnRows::default()).collect(),
                None => vec![catalogue()],
            },
            samplers,
            queue,
            frequencies: Frequencies::new(objective.log_q, &split.log_q)?,
            random: RandomStream::new(0, 0),
            targets: DrawnRows::default(),
            queue_log_q: Vec::new(),
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

    /// Loss and gradients of one step; the item tower's share of the gradient is added to `d_items`.
    pub fn compute(
        &mut self,
        model: &Model,
        step: &StepInputs<'_>,
        backend: &mut dyn Backend<Real = f32>,
        d_items: &mut RowGradient,
    ) -> Fallible<(&Output, &Gradients)> {
        self.score(model, step, backend)?;
        self.scatter(d_items);
        Ok((&self.output, &self.gradients))
    }

    /// The loss and its gradients by row.
    fn score(&mut self, model: &Model, step: &StepInputs<'_>, backend: &mut dyn Backend<Real = f32>) -> Fallible<()> {
        match self.objective.negatives {
            Some(_) => self.pools(model, step, backend),
            None => self.full(model, step, backend),
        }
    }

    /// Every item is a candidate, in place: candidate j is row j of the table.
    fn full(&mut self, model: &Model, step: &StepInputs<'_>, backend: &mut dyn Backend<Real = f32>) -> Fallible<()> {
        let table = Embeddings::new(&model.items.values, model.items.rows, model.dim());
        let batch = Batch::builder(queries(model, step), Pool::new(table).ids(&self.drawn[0].items))
            .positives(step.targets)
            .excluded_ids(&step.excluded.offsets, &step.excluded.ids)
            .build()?;
        Ok(backend.compute(
            &batch,
            &step.loss,
            Request::value_and_grad(),
            &mut self.output,
            Some(&mut self.gradients),
        )?)
    }

    /// Whether positives are apart from the pools: where targets are no negatives, and where negatives' gradients have weights,
    /// which positives' have not. An in-batch candidate is then no negative of its own row by its id.
    fn positives_apart(&self) -> bool {
        !self.objective.in_batch() || self.queue.is_some()
    }

    /// The targets in-batch, then the drawn pools, then the queue, which has no gradient.
    fn pools(&mut self, model: &Model, step: &StepInputs<'_>, backend: &mut dyn Backend<Real = f32>) -> Fallible<()> {
        self.draw(model, step)?;
        self.set_log_q()?;
        let (dim, queries) = (model.dim(), queries(model, step));
        let queued = self.queue.iter().flat_map(NegativeQueue::pools).enumerate();
        // One log_q for the union: the queue keeps none of its own.
        let queued = queued.map(|(p, pool)| match self.queue_log_q.get(p) {
            Some(log_q) => pool.log_q(log_q),
            None => pool,
        });
        let in_batch = self.objective.in_batch().then(|| self.targets.pool(dim));
        let mut pools = in_batch.into_iter().chain(self.drawn.iter().map(|rows| rows.pool(dim))).chain(queued);
        let first = pools.next().ok_or("no pool has a candidate")?;
        let builder = if self.positives_apart() {
            let builder = Batch::builder(queries, first)
                .positive_embeddings(self.targets.embeddings(dim))
                .positive_ids(&self.targets.items);
            match step.loss.correction {
                Correction::LogQ | Correction::CorrectedLogQ => builder.positive_log_q(&self.targets.log_q),
                _ => builder,
            }
        } else {
            Batch::in_batch(queries, first)
        };
        let batch = builder.pools(pools).excluded_ids(&step.excluded.offsets, &step.excluded.ids).build()?;
        backend.compute(&batch, &step.loss, Request::value_and_grad(), &mut self.output, Some(&mut self.gradients))?;
        if let Some(queue) = &mut self.queue {
            queue.enqueue(&self.targets.pool(dim))?;
        }
        Ok(())
    }

    /// Items and embeddings of the targets and of this step's draws.
    fn draw(&mut self, model: &Model, step: &StepInputs<'_>) -> Fallible<()> {
        let Candidates { samplers, random, targets, drawn, .. } = self;
        targets.items.clear();
        targets.items.extend(step.targets.iter().map(|&item| u64::from(item)));
        for (sampler, rows) in samplers.iter().zip(&mut *drawn) {
            rows.items.clear();
            sampler.draw(random, &mut rows.items)?;
        }
        for rows in std::iter::once(targets).chain(drawn) {
            model.items.gather(&rows.items, &mut rows.embeddings);
        }
        Ok(())
    }

    /// log_q of all candidates and positives, in the union of the pools; the batch is observed first.
    fn set_log_q(&mut self) -> Fallible<()> {
        let Candidates { objective, samplers, queue, frequencies, targets, drawn, queue_log_q, .. } = self;
        let Some(frequencies) = frequencies else { return Ok(()) };
        frequencies.observe(&targets.items);
        let in_batch = if objective.in_batch() { targets.items.len() - 1 } else { 0 };
        let queued = queue.as_ref().map_or(0, NegativeQueue::len);
        let by_popularity = ByPopularity { in_batch, queued, frequencies };
        let union = Union {
            by_popularity: (objective.in_batch() || queue.is_some()).then_some(by_popularity),
            samplers,
            counts: objective.log_q_is_of_counts(),
        };
        let copies = union.of(&targets.items);
        targets.log_q = copies.log_q()?;
        // Of a batch of one row, the target is nobody's negative.
        targets.gradient_weight = if in_batch > 0 { copies.gradient_weight()? } else { Vec::new() };
        for rows in drawn {
            let copies = union.of(&rows.items);
            (rows.log_q, rows.gradient_weight) = (copies.log_q()?, copies.gradient_weight()?);
        }
        *queue_log_q =
            queue.iter().flat_map(NegativeQueue::ids).map(|ids| union.of(ids).log_q()).collect::<Fallible<_>>()?;
        Ok(())
    }

    /// Adds up the gradients of candidates and positives by item, in their order: an item may have been several.
    fn scatter(&self, d_items: &mut RowGradient) {
        let gradients = &self.gradients;
        // The queue's pools come last and have no gradient.
        let pools = self
            .objective
            .in_batch()
            .then_some(&self.targets)
            .into_iter()
            .chain(&self.drawn)
            .zip(&gradients.d_candidates);
        for (rows, d_rows) in pools {
            for (row, &item) in rows.items.iter().enumerate() {
                let weight = rows.gradient_weight.get(row).copied().unwrap_or(1.0);
                d_items.add(item as usize, d_rows.row(row), weight);
            }
        }
        let Some(d_positives) = &gradients.d_positive_embeddings else { return };
        for (row, &item) in self.targets.items.iter().enumerate() {
            d_items.add(item as usize, d_positives.row(row), 1.0);
        }
    }
}

fn queries<'a>(model: &Model, step: &StepInputs<'a>) -> Embeddings<'a> {
    Embeddings::new(step.queries, step.targets.len(), model.dim())
}

#[cfg(test)]
mod tests;
