//! One training run: epochs of steps, a validation and a checkpoint after each.
//!
//! All randomness of an epoch comes from the seed and the epoch's number. A run that is resumed after an epoch therefore
//! goes on bitwise as if it had never stopped.

use std::path::Path;
use std::time::Instant;

use catalog_softmax::Backend;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Fallible;
use crate::candidates::{Candidates, Step};
use crate::checkpoint::{self, Checkpoint};
use crate::evaluate;
use crate::model::{Activations, Model, ModelGradient};
use crate::objective::{ExcludedItems, Objective};
use crate::options::Options;
use crate::report;
use crate::split::{Example, Split};
use crate::temperature;

/// What an epoch ended with: one point of each curve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EpochPoint {
    /// Mean training loss over the epoch's examples. Those of different objectives are not comparable.
    pub train_loss: f64,
    /// Of the epoch's last step.
    pub temperature: f64,
    pub validation_recall_at_10: f64,
    pub validation_ndcg_at_10: f64,
}

/// What is trained, on what, how.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    pub split: &'a Split,
    pub options: &'a Options,
    pub objective: &'a Objective,
    pub seed: u64,
}

/// The buffers of a step.
struct Buffers {
    activations: Activations,
    excluded: ExcludedItems,
    gradient: ModelGradient,
}

impl Run<'_> {
    /// Trains from scratch, or from the checkpoint at `path` where `--resume` says so and there is one.
    pub fn train(&self, backend: &mut dyn Backend<Real = f32>, path: &Path) -> Fallible<Checkpoint> {
        let Run { split, options, objective, seed } = *self;
        let settings = checkpoint::settings(self);
        let mut state = if options.resume && path.exists() {
            checkpoint::load(path, &settings, split.item_names())?
        } else {
            let model = Model::new(split.num_items(), options.dim, options.temperature, &mut rng(seed, 0));
            Checkpoint { model, curve: Vec::new(), pools: Default::default() }
        };
        let name = format!("{:>14}  seed {seed}", objective.name);
        let done = state.curve.len();
        if done > options.epochs {
            return Err(format!("{} has {done} epochs, --epochs asks for {}", path.display(), options.epochs).into());
        }
        if done > 0 {
            println!("{name}  resumed after epoch {done} from {}", path.display());
        }
        let mut candidates = Candidates::new(objective, split, options.dim)?;
        if done > 0 {
            candidates.restore(&state.pools)?;
        }
        for epoch in done..options.epochs {
            let start = Instant::now();
            let (train_loss, temperature) = self.epoch(epoch, &mut state.model, &mut candidates, backend)?;
            let throughput = split.train.len() as f64 / start.elapsed().as_secs_f64();
            let memory = report::peak_memory().map_or(String::new(), |mib| format!("  peak memory {mib} MiB"));
            let validation = evaluate::rank(&state.model, split, &split.validation, options.history, backend)?;
            println!(
                "{name}  epoch {:>2}  loss {train_loss:.4}  temperature {temperature:.4}  validation NDCG@10 {:.4}  \
                 Recall@10 {:.4}  {throughput:.0} examples/s{memory}",
                epoch + 1,
                validation.ndcg_at_10,
                validation.recall_at_10,
            );
            state.curve.push(EpochPoint {
                train_loss,
                temperature,
                validation_recall_at_10: validation.recall_at_10,
                validation_ndcg_at_10: validation.ndcg_at_10,
            });
            state.pools = candidates.save();
            checkpoint::save(path, &state, &settings, split.item_names())?;
        }
        Ok(state)
    }

    /// One pass over the training examples. Returns the mean loss and the last temperature.
    fn epoch(
        &self,
        epoch: usize,
        model: &mut Model,
        candidates: &mut Candidates<'_>,
        backend: &mut dyn Backend<Real = f32>,
    ) -> Fallible<(f64, f64)> {
        let Run { split, options, objective, seed } = *self;
        let mut rng = rng(seed, epoch as u64 + 1);
        let mut examples = split.train.clone();
        examples.shuffle(&mut rng);
        candidates.start_epoch(seed, epoch);
        let mut buffers = Buffers {
            activations: Activations::default(),
            excluded: ExcludedItems::default(),
            gradient: ModelGradient::of(model),
        };
        let bar = progress_bar(objective, epoch, options.epochs, examples.len());
        let (mut sum, mut temperature) = (0.0, options.temperature);
        let mut done = 0;
        for batch in examples.chunks(options.batch) {
            let progress = (epoch as f64 + done as f64 / examples.len() as f64) / options.epochs as f64;
            temperature = temperature::current(options, model, progress)?;
            let loss = self.step(batch, temperature, model, candidates, &mut buffers, backend)?;
            if !loss.is_finite() {
                let advice = "lower --learning-rate or raise --temperature";
                return Err(format!("{}: the loss is {loss} in epoch {}; {advice}", objective.name, epoch + 1).into());
            }
            sum += loss;
            done += batch.len();
            bar.inc(batch.len() as u64);
            let loss = loss / batch.len() as f64;
            bar.set_message(format!("loss {loss:.3}  temperature {temperature:.4}"));
        }
        bar.finish_and_clear();
        Ok((sum / examples.len() as f64, temperature))
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
        let Buffers { activations, excluded, gradient } = buffers;
        let history = |&example: &Example| self.split.history(example, self.options.history);
        let histories: Vec<&[u32]> = batch.iter().map(history).collect();
        let targets: Vec<u32> = batch.iter().map(|&example| self.split.target(example)).collect();
        excluded.set(histories.iter().copied());
        model.queries(&histories, activations);

        let loss = self.objective.loss(temperature);
        let step = Step { queries: &activations.queries, targets: &targets, excluded, loss };
        let output = candidates.compute(model, &step, backend, &mut gradient.items)?;

        let gradients = output.gradients.as_ref().ok_or("the backend returned no gradients")?;
        model.queries_back(&histories, activations, &gradients.d_queries.values, gradient);
        if self.options.learn_temperature {
            gradient.log_temperature.add(0, &[gradients.d_log_temperature as f32], 1.0);
        }
        model.step(gradient, self.options.learning_rate as f32);
        temperature::clamp(model)?;
        Ok(output.total)
    }
}

fn progress_bar(objective: &Objective, epoch: usize, epochs: usize, examples: usize) -> ProgressBar {
    let bar = ProgressBar::new(examples as u64);
    if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len}  {msg}  {per_sec}  {eta} left") {
        bar.set_style(style);
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
mod tests {
    use super::*;
    use crate::frequencies::LogQ;
    use crate::generate;
    use catalog_softmax::{Correction, Cpu};
    use clap::Parser;

    fn small_split() -> Split {
        Split::new(generate::sequences(60, 2000)).unwrap()
    }

    fn options(flags: &[&str]) -> Options {
        let small = ["train_two_tower", "--dim", "8", "--batch", "64"];
        Options::parse_from(small.iter().chain(flags))
    }

    /// The presets, and two losses that leave something for later steps: a queue that wraps around, an estimator.
    fn objectives() -> Vec<Objective> {
        let new = |list: &str, log_q| Objective::new(list.parse().unwrap(), log_q, Correction::LogQ).unwrap();
        let several = new("in-batch,uniform:32,queue:100", LogQ::Streaming);
        let apart = new("unigram:32:0.5,log-uniform:32,queue:1000", LogQ::CountMin);
        Objective::presets().into_iter().chain([several, apart]).collect()
    }

    #[test]
    fn a_resumed_run_is_bitwise_the_uninterrupted_one() {
        let split = small_split();
        let folder = tempfile::tempdir().unwrap();
        let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
        for objective in &objectives() {
            let train = |flags: &[&str], path: &Path| {
                let options = options(&[&["--learn-temperature"], flags].concat());
                Run { split: &split, options: &options, objective, seed: 5 }.train(&mut Cpu::new(), path)
            };
            let uninterrupted = train(&["--epochs", "3"], &whole).unwrap();
            train(&["--epochs", "1"], &parts).unwrap();
            let resumed = train(&["--epochs", "3", "--resume"], &parts).unwrap();
            assert_eq!(uninterrupted.model, resumed.model, "{}", objective.name);
            assert_eq!(uninterrupted.curve, resumed.curve, "{}", objective.name);
            assert_eq!(std::fs::read(&whole).unwrap(), std::fs::read(&parts).unwrap());
        }
    }

    #[test]
    fn a_checkpoint_of_other_settings_is_refused() {
        let split = small_split();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("checkpoint");
        let train = |flags: &[&str]| {
            let options = options(flags);
            let objective = &options.objectives().unwrap()[0];
            Run { split: &split, options: &options, objective, seed: 5 }.train(&mut Cpu::new(), &path)
        };
        train(&["--loss", "logq", "--epochs", "1"]).unwrap();
        let error =
            train(&["--loss", "logq", "--epochs", "2", "--resume", "--history", "3"]).err().unwrap().to_string();
        assert!(error.contains("history is 20 there and 3 here"), "{error}");
        let other_q = ["--negatives", "in-batch", "--log-q", "count-min", "--epochs", "2", "--resume"];
        let error = train(&other_q).err().unwrap().to_string();
        assert!(error.contains("log_q is Exact there and CountMin here"), "{error}");
        std::fs::write(&path, b"not a checkpoint").unwrap();
        assert!(
            train(&["--loss", "logq", "--epochs", "2", "--resume"]).err().unwrap().to_string().contains("checkpoint")
        );
    }

    #[test]
    fn training_lowers_every_loss() {
        let split = small_split();
        let folder = tempfile::tempdir().unwrap();
        for objective in &objectives() {
            let options = options(&["--epochs", "3"]);
            let run = Run { split: &split, options: &options, objective, seed: 1 };
            let curve = run.train(&mut Cpu::new(), &folder.path().join(objective.file_stem())).unwrap().curve;
            assert!(curve[2].train_loss < curve[0].train_loss, "{}: {curve:?}", objective.name);
        }
    }
}
