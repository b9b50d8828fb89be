//! One training run: epochs of steps, a validation and a checkpoint after each.
//!
//! All randomness of an epoch comes from the seed and the epoch's number. A run that is resumed after an epoch
//! therefore goes on bitwise as if it had never stopped.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use catalog_softmax::Backend;
use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Fallible;
use crate::candidates::{Candidates, StepInputs};
use crate::checkpoint::{self, Checkpoint, Settings};
use crate::evaluate::{self, Scorer};
use crate::interrupt::Interrupted;
use crate::memory;
use crate::model::{Activations, Model};
use crate::objective::{ItemLists, Objective};
use crate::options::Options;
use crate::parameter::RowGradient;
use crate::split::{Example, Split};
use crate::temperature;

/// What an epoch ended with: one point of each curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpochPoint {
    /// Mean training loss over the epoch's examples. Those of different objectives are not comparable.
    pub train_loss: f64,
    /// Of the epoch's last step.
    pub temperature: f64,
    /// None where the split has no validation targets.
    pub validation: Option<Validation>,
}

/// How the validation targets are ranked after an epoch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validation {
    pub recall_at_10: f64,
    pub ndcg_at_10: f64,
}

/// The epoch, from 0, whose model is tested: that of the highest validation NDCG@10, the first of equal ones, or the
/// last epoch where there is no validation.
pub fn best_epoch(curve: &[EpochPoint]) -> usize {
    let mut best = (curve.len().saturating_sub(1), f64::NEG_INFINITY);
    for (epoch, point) in curve.iter().enumerate() {
        if let Some(validation) = point.validation.filter(|validation| validation.ndcg_at_10 > best.1) {
            best = (epoch, validation.ndcg_at_10);
        }
    }
    best.0
}

/// What is trained, on what, how.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub split: &'a Split,
    pub options: &'a Options,
    pub objective: &'a Objective,
    pub seed: u64,
    /// Whether the user asked to stop.
    pub interrupt: &'a AtomicBool,
}

/// The buffers of a step.
#[derive(Default)]
struct Buffers {
    activations: Activations,
    positives: ItemLists,
    excluded: ItemLists,
}

impl Run<'_> {
    /// Trains from scratch, or from the checkpoint at `path` where `--resume` says so and there is one.
    pub fn train(&self, backend: &mut dyn Backend<Real = f32>, path: &Path) -> Fallible<Checkpoint> {
        let Run { split, options, objective, seed, .. } = *self;
        let name = format!("{:>14}  seed {seed}", objective.name);
        let settings = checkpoint::settings(self);
        let mut state = self.start(&settings, path)?;
        let done = state.curve.len();
        let mut candidates = Candidates::new(objective, split, options.dim)?;
        if done > 0 {
            println!("{name}  resumed after epoch {done} from {}", path.display());
            candidates.restore(&state.pools)?;
        }
        for epoch in done..options.epochs {
            let start = Instant::now();
            // The model that would be tested if this epoch were not better.
            let validated = epoch > 0 && !split.validation.is_empty();
            let best = validated.then(|| state.best.take().unwrap_or_else(|| state.model.clone()));
            let Some((train_loss, temperature)) = self.epoch(epoch, &mut state.model, &mut candidates, backend)? else {
                return Err(self.interrupted(epoch, path).into());
            };
            let throughput = split.train.len() as f64 / start.elapsed().as_secs_f64();
            let validation = self.validate(&state.model, backend)?;
            state.curve.push(EpochPoint { train_loss, temperature, validation });
            state.best = best.filter(|_| best_epoch(&state.curve) != epoch);
            let validated = validation.map_or(String::new(), |validation| {
                let Validation { recall_at_10, ndcg_at_10 } = validation;
                format!("  validation NDCG@10 {ndcg_at_10:.4}  Recall@10 {recall_at_10:.4}")
            });
            let memory = memory::peak().map_or(String::new(), |bytes| format!("  peak memory {} MiB", bytes >> 20));
            println!(
                "{name}  epoch {:>2}  loss {train_loss:.4}  temperature {temperature:.4}{validated}  \
                 {throughput:.0} examples/s{memory}",
                epoch + 1,
            );
            state.pools = candidates.save();
            checkpoint::save(path, &state, &settings, split.item_names())?;
        }
        Ok(state)
    }

    /// What an epoch goes on from.
    fn start(&self, settings: &Settings, path: &Path) -> Fallible<Checkpoint> {
        let Run { split, options, seed, .. } = *self;
        if !(options.resume && path.exists()) {
            let mut model = Model::new(split.num_items(), options.dim, options.temperature, &mut rng(seed, 0))?;
            model.set_learning_rate(options.learning_rate)?;
            return Ok(Checkpoint { model, best: None, curve: Vec::new(), pools: Default::default() });
        }
        let state = checkpoint::load(path, settings, split.num_items(), options.dim)?;
        let (done, epochs) = (state.curve.len(), options.epochs);
        if done > epochs {
            let rule = format!("at least the {done} that checkpoint {} has, with --resume", path.display());
            return Err(format!("--epochs is {epochs}; rule: {rule}").into());
        }
        Ok(state)
    }

    /// Ranks the validation targets. A model that is not finite is an error instead: every rank would count as none.
    fn validate(&self, model: &Model, backend: &mut dyn Backend<Real = f32>) -> Fallible<Option<Validation>> {
        if !model.is_finite() {
            return Err(self.diverged("the model has parameters that are not finite").into());
        }
        if self.split.validation.is_empty() {
            return Ok(None);
        }
        let scorer = Scorer::Model(model, self.options.history);
        let ranking = evaluate::rank(scorer, self.split, &self.split.validation, backend)?;
        Ok(Some(Validation { recall_at_10: ranking.recall_at_10, ndcg_at_10: ranking.ndcg_at_10 }))
    }

    fn diverged(&self, what: &str) -> String {
        format!("{}: {what}; lower --learning-rate or raise --temperature", self.objective.name)
    }

    fn interrupted(&self, epoch: usize, path: &Path) -> Interrupted {
        let kept = match epoch {
            0 => "no epoch was finished".to_string(),
            _ => format!("{} has the epochs before", path.display()),
        };
        let Run { objective, seed, .. } = self;
        let stopped = format!("{}, seed {seed}: stopped in epoch {}", objective.name, epoch + 1);
        Interrupted(format!("{stopped}; {kept}; the same command with --resume goes on from there"))
    }

    /// One pass over the training examples. Returns the mean loss and the last temperature, or nothing where the user
    /// asked to stop.
    fn epoch(
        &self,
        epoch: usize,
        model: &mut Model,
        candidates: &mut Candidates<'_>,
        backend: &mut dyn Backend<Real = f32>,
    ) -> Fallible<Option<(f64, f64)>> {
        let Run { split, options, objective, seed, interrupt } = *self;
        let mut rng = rng(seed, epoch as u64 + 1);
        let mut examples = split.train.clone();
        examples.shuffle(&mut rng);
        candidates.start_epoch(seed, epoch);
        let mut buffers = Buffers::default();
        let bar = progress_bar(objective, epoch, options.epochs, examples.len());
        let (mut sum, mut temperature) = (0.0, options.temperature);
        let mut done = 0;
        for batch in examples.chunks(options.batch) {
            let progress = (epoch as f64 + done as f64 / examples.len() as f64) / options.epochs as f64;
            temperature = temperature::current(options, model, progress)?;
            let loss = self.step(batch, temperature, model, candidates, &mut buffers, backend)?;
            if !loss.is_finite() {
                return Err(self.diverged(&format!("the loss is {loss} in epoch {}", epoch + 1)).into());
            }
            sum += loss;
            done += batch.len();
            bar.inc(batch.len() as u64);
            let loss = loss / batch.len() as f64;
            bar.set_message(format!("loss {loss:.3}  temperature {temperature:.4}"));
            if interrupt.load(Ordering::Relaxed) {
                bar.finish_and_clear();
                return Ok(None);
            }
        }
        bar.finish_and_clear();
        Ok(Some((sum / examples.len() as f64, temperature)))
    }

    /// Query tower, loss, way back, optimiser. Returns the loss, summed over the batch.
    fn step(
        &self,
        batch: &[Example],
        temperature: f64,
        model: &mut Model,
        candidates: &mut Candidates<'_>,
        buffers: &mut Buffers,
        backend: &mut dyn Backend<Real = f32>,
    ) -> Fallible<f64> {
        let Options { history, next, learn_temperature, .. } = *self.options;
        let Buffers { activations, positives, excluded } = buffers;
        let histories: Vec<&[u32]> = batch.iter().map(|&example| self.split.history(example, history)).collect();
        positives.set(batch.iter().map(|&example| self.split.positives(example, next)));
        excluded.set(histories.iter().copied());
        model.queries(&histories, activations);

        let loss = self.options.filtered(self.objective.loss(temperature));
        let step = StepInputs { queries: &activations.queries, positives, excluded, loss };
        let (output, gradients) = candidates.step(model, &step, backend)?;

        let gradient = model.queries_back(&histories, activations, &gradients.d_queries.values);
        model.step_query_tower(&gradient)?;
        if learn_temperature {
            let mut gradient = RowGradient::zeros([0], 1);
            gradient.add(0, &[gradients.d_log_temperature as f32], 1.0);
            model.log_temperature.step(&gradient)?;
        }
        temperature::clamp(model)?;
        Ok(output.total)
    }
}

fn progress_bar(objective: &Objective, epoch: usize, epochs: usize, examples: usize) -> ProgressBar {
    let bar = ProgressBar::new(examples as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len}  {msg}  {speed}  {eta} left") {
        // Its own `per_sec` has four digits after the point.
        let speed = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = write!(out, "{:.0} examples/s", state.per_sec());
        };
        bar.set_style(style.with_key("speed", speed));
    }
    bar.set_prefix(format!("{:>14} {}/{epochs}", objective.name, epoch + 1));
    bar
}

/// A generator of its own for each purpose: stream 0 draws the first weights, stream e + 1 shuffles for epoch e.
fn rng(seed: u64, stream: u64) -> StdRng {
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&stream.to_le_bytes());
    StdRng::from_seed(bytes)
}

#[cfg(test)]
mod tests;
