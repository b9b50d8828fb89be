//! The five losses, as batches of the crate: which items are candidates, and what corrects for how they were drawn.
//!
//! | objective | candidates | correction |
//! |---|---|---|
//! | in-batch | the batch's own targets | none |
//! | logq | the same | log_q on positive and negatives |
//! | corrected-logq | the same | "Correcting the LogQ Correction" |
//! | sampled | uniform draws, positives apart | log_q, the same for every item: it cancels |
//! | full | the whole catalogue | none |
//!
//! In all of them the items of the query's own history are no negatives: they are positives of the same user, and
//! nothing recommends them again. A candidate with the target's id is none either (an accidental hit).

use catalog_softmax::{Backend, Batch, Correction, Embeddings, Loss, Output, Pool, Reduction, Request, Similarity};
use rand::RngExt;
use rand::rngs::StdRng;

use crate::Fallible;
use crate::model::Model;
use crate::parameter::RowGradient;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    InBatch,
    LogQ,
    CorrectedLogQ,
    Sampled,
    Full,
}

impl Objective {
    pub const ALL: [Objective; 5] =
        [Objective::InBatch, Objective::LogQ, Objective::CorrectedLogQ, Objective::Sampled, Objective::Full];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Objective::InBatch => "in-batch",
            Objective::LogQ => "logq",
            Objective::CorrectedLogQ => "corrected-logq",
            Objective::Sampled => "sampled",
            Objective::Full => "full",
        }
    }

    fn correction(self) -> Correction {
        match self {
            Objective::InBatch | Objective::Full => Correction::None,
            Objective::LogQ | Objective::Sampled => Correction::LogQ,
            Objective::CorrectedLogQ => Correction::CorrectedLogQ,
        }
    }

    /// Summed, not averaged: Adagrad takes its scale from past gradients, and an example of the last, smaller batch of an
    /// epoch must weigh as much as any other. (Averaged, a last batch of one example throws every row of `full` about.)
    pub fn loss(self, temperature: f64) -> Loss {
        Loss::softmax(Similarity::Cosine, temperature).correction(self.correction()).reduction(Reduction::Sum)
    }
}

/// Per row of a batch, items that are no negatives, as the crate takes them: CSR.
#[derive(Debug, Default)]
pub struct ExcludedItems {
    pub offsets: Vec<i64>,
    pub ids: Vec<u64>,
}

impl ExcludedItems {
    pub fn set<'a>(&mut self, rows: impl Iterator<Item = &'a [u32]>) {
        self.offsets.clear();
        self.ids.clear();
        self.offsets.push(0);
        for row in rows {
            self.ids.extend(row.iter().map(|&item| u64::from(item)));
            self.offsets.push(self.ids.len() as i64);
        }
    }
}

/// What a training step gives to the loss.
pub struct Step<'a> {
    /// (B, D), the query tower's output.
    pub queries: &'a [f32],
    /// (B) item indices.
    pub targets: &'a [u32],
    pub excluded: &'a ExcludedItems,
    pub loss: Loss,
}

/// An objective with its drawn items and its buffers, which steps reuse.
pub struct Candidates<'a> {
    objective: Objective,
    backend: &'a mut dyn Backend<Real = f32>,
    /// (N) log_q of every item as an in-batch negative.
    log_q_of_item: &'a [f32],
    num_negatives: usize,
    /// Item of each candidate.
    items: Vec<u32>,
    embeddings: Vec<f32>,
    positive_embeddings: Vec<f32>,
    ids: Vec<u64>,
    positive_ids: Vec<u64>,
    log_q: Vec<f32>,
    positive_log_q: Vec<f32>,
    output: Output,
}

impl<'a> Candidates<'a> {
    pub fn new(
        objective: Objective,
        backend: &'a mut dyn Backend<Real = f32>,
        log_q_of_item: &'a [f32],
        num_negatives: usize,
    ) -> Self {
        Candidates {
            objective,
            backend,
            log_q_of_item,
            num_negatives,
            items: Vec::new(),
            embeddings: Vec::new(),
            positive_embeddings: Vec::new(),
            ids: Vec::new(),
            positive_ids: Vec::new(),
            log_q: Vec::new(),
            positive_log_q: Vec::new(),
            output: Output::default(),
        }
    }

    /// Loss and gradients of one step; the item tower's share of the gradient is added to `d_items`.
    pub fn compute(
        &mut self,
        model: &Model,
        step: &Step<'_>,
        rng: &mut StdRng,
        d_items: &mut RowGradient,
    ) -> Fallible<&Output> {
        match self.objective {
            Objective::InBatch | Objective::LogQ | Objective::CorrectedLogQ => self.in_batch(model, step)?,
            Objective::Sampled => self.sampled(model, step, rng)?,
            Objective::Full => self.full(model, step)?,
        }
        self.scatter(step.targets, d_items);
        Ok(&self.output)
    }

    /// Row i's positive is candidate i, the target of row i; the other targets are its negatives.
    fn in_batch(&mut self, model: &Model, step: &Step<'_>) -> Fallible<()> {
        self.items.clear();
        self.items.extend_from_slice(step.targets);
        self.set_candidates(model);
        let candidates = Embeddings::new(&self.embeddings, self.items.len(), model.dim());
        let mut pool = Pool::new(candidates).ids(&self.ids);
        if self.objective != Objective::InBatch {
            self.log_q.clear();
            self.log_q.extend(self.items.iter().map(|&item| self.log_q_of_item[item as usize]));
            pool = pool.log_q(&self.log_q);
        }
        let batch = Batch::in_batch(queries(model, step), pool)
            .excluded_ids(&step.excluded.offsets, &step.excluded.ids)
            .build()?;
        Ok(self.backend.compute(&batch, &step.loss, Request::value_and_grad(), &mut self.output)?)
    }

    /// Candidates are drawn uniformly; the positives stand apart from them.
    fn sampled(&mut self, model: &Model, step: &Step<'_>, rng: &mut StdRng) -> Fallible<()> {
        let num_items = model.items.rows as u32;
        self.items.clear();
        self.items.extend((0..self.num_negatives).map(|_| rng.random_range(0..num_items)));
        self.set_candidates(model);
        model.items.gather(step.targets, &mut self.positive_embeddings);
        self.positive_ids.clear();
        self.positive_ids.extend(step.targets.iter().map(|&item| u64::from(item)));
        let log_uniform = -f64::from(num_items).ln() as f32;
        self.log_q.resize(self.items.len(), log_uniform);
        self.positive_log_q.clear();
        self.positive_log_q.resize(step.targets.len(), log_uniform);
        let drawn = Embeddings::new(&self.embeddings, self.items.len(), model.dim());
        let positives = Embeddings::new(&self.positive_embeddings, step.targets.len(), model.dim());
        let batch = Batch::builder(queries(model, step), Pool::new(drawn).ids(&self.ids).log_q(&self.log_q))
            .positive_embeddings(positives)
            .positive_ids(&self.positive_ids)
            .positive_log_q(&self.positive_log_q)
            .excluded_ids(&step.excluded.offsets, &step.excluded.ids)
            .build()?;
        Ok(self.backend.compute(&batch, &step.loss, Request::value_and_grad(), &mut self.output)?)
    }

    /// Every item is a candidate, in place: candidate j is row j of the table.
    fn full(&mut self, model: &Model, step: &Step<'_>) -> Fallible<()> {
        if self.items.is_empty() {
            self.items.extend(0..model.items.rows as u32);
            self.ids.extend(0..model.items.rows as u64);
        }
        let table = Embeddings::new(&model.items.values, model.items.rows, model.dim());
        let batch = Batch::builder(queries(model, step), Pool::new(table).ids(&self.ids))
            .positives(step.targets)
            .excluded_ids(&step.excluded.offsets, &step.excluded.ids)
            .build()?;
        Ok(self.backend.compute(&batch, &step.loss, Request::value_and_grad(), &mut self.output)?)
    }

    /// The embeddings and ids of `self.items`.
    fn set_candidates(&mut self, model: &Model) {
        model.items.gather(&self.items, &mut self.embeddings);
        self.ids.clear();
        self.ids.extend(self.items.iter().map(|&item| u64::from(item)));
    }

    /// Adds up the candidates' gradients by item, in the order of the candidates: an item may have been several.
    fn scatter(&self, targets: &[u32], d_items: &mut RowGradient) {
        let Some(gradients) = &self.output.gradients else { return };
        for (candidate, &item) in self.items.iter().enumerate() {
            d_items.add(item as usize, gradients.d_candidates[0].row(candidate), 1.0);
        }
        if let Some(d_positives) = &gradients.d_positive_embeddings {
            for (row, &item) in targets.iter().enumerate() {
                d_items.add(item as usize, d_positives.row(row), 1.0);
            }
        }
    }
}

fn queries<'a>(model: &Model, step: &Step<'a>) -> Embeddings<'a> {
    Embeddings::new(step.queries, step.targets.len(), model.dim())
}

#[cfg(test)]
mod tests {
    use super::*;
    use catalog_softmax::Cpu;
    use rand::SeedableRng;

    const TARGETS: [u32; 3] = [1, 4, 1];

    /// Loss and item gradient of one step in which item 1 is a target twice.
    fn step(objective: Objective, model: &Model, queries: &[f32], d_items: &mut RowGradient) -> f64 {
        let log_q: Vec<f32> = (1..=6).map(|rank| (0.3 / rank as f32).ln()).collect();
        let mut excluded = ExcludedItems::default();
        excluded.set([&[0u32, 4][..], &[2], &[]].into_iter());
        let mut backend = Cpu::new();
        let mut candidates = Candidates::new(objective, &mut backend, &log_q, 7);
        let step = Step { queries, targets: &TARGETS, excluded: &excluded, loss: objective.loss(0.5) };
        candidates.compute(model, &step, &mut StdRng::seed_from_u64(3), d_items).unwrap().total
    }

    #[test]
    fn the_item_gradient_agrees_with_finite_differences() {
        let mut rng = StdRng::seed_from_u64(9);
        let model = Model::new(6, 4, 0.5, &mut rng);
        let queries = Model::new(3, 4, 0.5, &mut rng).items.values;
        // Not corrected-logq: its weight is a constant of the step, so its gradient is not the loss's slope.
        for objective in [Objective::InBatch, Objective::LogQ, Objective::Sampled, Objective::Full] {
            let mut d_items = RowGradient::of(&model.items);
            step(objective, &model, &queries, &mut d_items);
            let mut gradient = [0.0f32; 24];
            for (row, d_row) in d_items.iter() {
                gradient[row * 4..row * 4 + 4].copy_from_slice(d_row);
            }
            for (at, &expected) in gradient.iter().enumerate() {
                let moved = |by: f32| {
                    let mut model = model.clone();
                    model.items.values[at] += by;
                    step(objective, &model, &queries, &mut RowGradient::of(&model.items))
                };
                let found = (moved(5e-3) - moved(-5e-3)) / 1e-2;
                assert!((found - f64::from(expected)).abs() < 2e-3, "{objective:?} [{at}]: {found} {expected}");
            }
        }
    }
}
