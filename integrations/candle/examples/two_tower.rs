//! Trains a two-tower recommender in candle with each loss, and has the metrics of the Rust example `train_two_tower`.
//!
//! ```text
//! cargo run --profile test --example two_tower                               # generated data, every loss
//! cargo run --profile test --example two_tower -- --data FILE --loss logq
//! cargo run --profile test --example two_tower -- --epochs 1 --compare runs/metrics.json
//! ```
//!
//! Data, split, first weights, order of the batches, draws and metrics are those of `examples/train_two_tower`: their
//! modules are compiled into this example. The towers, the gradients and the optimiser are candle's
//! (`two_tower/towers.rs`, `two_tower/adagrad.rs`), and the loss is one call of `softmax_loss` (`two_tower/losses.rs`).
//! `--compare` reads what the Rust example wrote with the same options, and fails if a metric differs by more than
//! rounding explains.

#[path = "two_tower/adagrad.rs"]
mod adagrad;
#[path = "two_tower/compare.rs"]
mod compare;
#[path = "two_tower/losses.rs"]
mod losses;
#[path = "../../../examples/train_two_tower"]
#[allow(dead_code, unused_imports)]
mod shared {
    pub mod data;
    pub mod evaluate;
    pub mod frequencies;
    pub mod generate;
    pub mod model;
    pub mod negatives;
    pub mod numbers;
    pub mod objective;
    pub mod parameter;
    pub mod split;
}
#[path = "two_tower/towers.rs"]
mod towers;

use std::error::Error;
use std::path::PathBuf;

use catalog_softmax::Cpu;
use catalog_softmax::negatives::RandomStream;
use clap::Parser;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

// The shared modules name each other as modules of the crate.
use shared::{data, evaluate, frequencies, generate, model, negatives, numbers, objective, parameter, split};

use adagrad::RowAdagrad;
use evaluate::{RankingMetrics, Scorer};
use model::Model;
use objective::Objective;
use split::{Example, Split};
use towers::Towers;

/// Any error reaches the user as its message.
type Fallible<T> = Result<T, Box<dyn Error>>;

/// Trains a two-tower recommender in candle. Without --data, data are generated.
#[derive(Debug, Parser)]
#[command(name = "two_tower")]
struct Options {
    /// File of interactions: user, item and time in each line, as train_two_tower reads it
    #[arg(long)]
    data: Option<PathBuf>,
    /// Users of the generated data
    #[arg(long, default_value = "6000", value_parser = numbers::whole(1, u32::MAX.into()))]
    generate_users: usize,
    /// Items of the generated data
    #[arg(long, default_value = "2000", value_parser = numbers::whole(100, u32::MAX.into()))]
    generate_items: usize,
    /// all, in-batch, logq, corrected-logq, sampled or full
    #[arg(long, default_value = "all")]
    loss: String,
    /// Passes over the training examples
    #[arg(long, default_value = "5", value_parser = numbers::whole(1, u32::MAX.into()))]
    epochs: usize,
    /// B, examples per step
    #[arg(long, default_value = "512", value_parser = numbers::whole(1, u32::MAX.into()))]
    batch: usize,
    /// D, width of the embeddings
    #[arg(long, default_value = "64", value_parser = numbers::whole(1, u32::MAX.into()))]
    dim: usize,
    /// How many of the user's last items the query tower pools
    #[arg(long, default_value = "20", value_parser = numbers::whole(1, u32::MAX.into()))]
    history: usize,
    /// Step size of row-wise Adagrad
    #[arg(long, default_value = "0.2", value_parser = numbers::positive)]
    learning_rate: f64,
    /// Scores are cosine / temperature
    #[arg(long, default_value = "0.07", value_parser = numbers::positive)]
    temperature: f64,
    /// Of the first weights, the order of the batches and the draws
    #[arg(long, default_value = "1")]
    seed: u64,
    /// metrics.json of train_two_tower with the same options: fail if metrics differ
    #[arg(long)]
    compare: Option<PathBuf>,
}

fn main() -> Fallible<()> {
    let options = Options::parse();
    let split = Split::new(match &options.data {
        Some(path) => data::read_file(path, &data::Format::default())?.0,
        None => generate::sequences(options.generate_users, options.generate_items),
    })?;
    println!("{} users, {} items, {} training examples", split.num_users(), split.num_items(), split.train.len());
    let objectives = Objective::presets().into_iter().filter(|o| options.loss == "all" || o.name == options.loss);
    let mut tested = Vec::new();
    for objective in objectives {
        let metrics = train(&objective, &split, &options)?;
        tested.push((objective.name, metrics));
    }
    if tested.is_empty() {
        return Err(format!("--loss is {:?}; rule: all, or the name of a loss", options.loss).into());
    }
    compare::print(&tested);
    match &options.compare {
        Some(path) => compare::with_file(path, options.seed, &tested),
        None => Ok(()),
    }
}

/// Trains with one loss, and tests the model of the epoch with the best validation.
fn train(objective: &Objective, split: &Split, options: &Options) -> Fallible<RankingMetrics> {
    let mut model = Model::new(split.num_items(), options.dim, options.temperature, &mut rng(options.seed, 0))?;
    let towers = Towers::new(&model)?;
    let mut optimizer = RowAdagrad::new(towers.parameters(), options.learning_rate)?;
    let mut best: Option<(f64, Model)> = None;
    for epoch in 0..options.epochs {
        let mut examples = split.train.clone();
        examples.shuffle(&mut rng(options.seed, epoch as u64 + 1));
        let mut random = RandomStream::new(options.seed, epoch as u64);
        let mut sum = 0.0;
        for batch in examples.chunks(options.batch) {
            sum += step(batch, objective, split, options, &towers, &mut optimizer, &mut random)?;
        }
        towers.copy_to(&mut model)?;
        let scorer = Scorer::Model(&model, options.history);
        let validation = evaluate::rank(scorer, split, &split.validation, &mut Cpu::new())?;
        println!(
            "{:>14}  epoch {:>2}  loss {:.4}  validation NDCG@10 {:.4}  Recall@10 {:.4}",
            objective.name,
            epoch + 1,
            sum / examples.len() as f64,
            validation.ndcg_at_10,
            validation.recall_at_10,
        );
        if best.as_ref().is_none_or(|(ndcg, _)| validation.ndcg_at_10 > *ndcg) {
            best = Some((validation.ndcg_at_10, model.clone()));
        }
    }
    let tested = best.map_or(model, |(_, model)| model);
    evaluate::rank(Scorer::Model(&tested, options.history), split, &split.test, &mut Cpu::new())
}

/// Towers, loss, way back, optimiser. Returns the loss, summed over the batch.
fn step(
    batch: &[Example],
    objective: &Objective,
    split: &Split,
    options: &Options,
    towers: &Towers,
    optimizer: &mut RowAdagrad,
    random: &mut RandomStream,
) -> Fallible<f64> {
    let histories: Vec<&[u32]> = batch.iter().map(|&example| split.history(example, options.history)).collect();
    let targets: Vec<u32> = batch.iter().map(|&example| split.positives(example, 1)[0]).collect();
    let queries = towers.queries(&histories)?;
    let step = losses::Step { towers, queries: &queries, targets: &targets, excluded: &histories, split };
    let loss = step.loss(objective, options.temperature, random)?;
    optimizer.step(&loss.backward()?)?;
    Ok(f64::from(loss.to_scalar::<f32>()?))
}

/// As train_two_tower has it: stream 0 draws the first weights, stream e + 1 shuffles for epoch e.
fn rng(seed: u64, stream: u64) -> StdRng {
    let mut bytes = [0u8; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(&stream.to_le_bytes());
    StdRng::from_seed(bytes)
}
