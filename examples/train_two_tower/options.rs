//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::objective::Objective;
use crate::temperature::Schedule;

/// Trains a two-tower recommender with one or all of the crate's losses and compares them over the whole catalogue.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// CSV file of user_id,item_id,timestamp, plain or gzipped; without it, data are generated
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Count lines that hold no interaction instead of stopping at the first
    #[arg(long)]
    pub skip_bad_lines: bool,
    /// Which loss to train with
    #[arg(long, value_enum, default_value = "all")]
    pub loss: LossChoice,
    /// Where to run; `auto` takes the CPU where there is no GPU, and says why
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceChoice,
    /// One seed or several, as in 1,2,3: the table then has mean and standard deviation
    #[arg(long, alias = "seeds", value_delimiter = ',', default_value = "1")]
    pub seed: Vec<u64>,
    /// Passes over the training examples
    #[arg(long, default_value = "5", value_parser = at_least_one)]
    pub epochs: usize,
    /// B, examples per step
    #[arg(long, default_value = "512", value_parser = at_least_one)]
    pub batch: usize,
    /// D, width of the embeddings
    #[arg(long, default_value = "64", value_parser = at_least_one)]
    pub dim: usize,
    /// K, how many of the user's last items the query tower pools
    #[arg(long, default_value = "20", value_parser = at_least_one)]
    pub history: usize,
    /// Items drawn per step for `--loss sampled`, uniformly and with replacement
    #[arg(long, default_value = "1024", value_parser = at_least_one)]
    pub negatives: usize,
    /// Of row-wise Adagrad
    #[arg(long, default_value = "0.2", value_parser = positive)]
    pub learning_rate: f64,
    /// Scores are cosine / temperature; the first value where it is scheduled or learned
    #[arg(long, default_value = "0.07", value_parser = positive)]
    pub temperature: f64,
    /// How the temperature moves to --final-temperature over all epochs
    #[arg(long, value_enum, default_value = "constant", conflicts_with = "learn_temperature")]
    pub temperature_schedule: Schedule,
    /// Where a scheduled temperature ends
    #[arg(long, value_parser = positive, required_if_eq_any = [("temperature_schedule", "linear"), ("temperature_schedule", "cosine"), ("temperature_schedule", "exponential")])]
    pub final_temperature: Option<f64>,
    /// Learn the logarithm of the temperature, kept between 0.01 and 1
    #[arg(long)]
    pub learn_temperature: bool,
    /// Folder for metrics.json, curves.svg and a checkpoint per loss and seed
    #[arg(long, value_name = "DIR", default_value = "runs")]
    pub out: PathBuf,
    /// Continue from the checkpoints in --out where there are any
    #[arg(long)]
    pub resume: bool,
}

impl Options {
    /// Checks what the parser cannot.
    pub fn check(&self) -> Result<(), String> {
        if self.final_temperature.is_some() && self.temperature_schedule == Schedule::Constant {
            return Err("--final-temperature is given, but --temperature-schedule is constant".into());
        }
        match self.seed.iter().enumerate().find(|(i, seed)| self.seed[..*i].contains(seed)) {
            Some((_, seed)) => Err(format!("--seed names {seed} twice")),
            None => Ok(()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum LossChoice {
    InBatch,
    Logq,
    CorrectedLogq,
    Sampled,
    Full,
    /// Each of them in turn
    All,
}

impl LossChoice {
    pub fn objectives(self) -> Vec<Objective> {
        match self {
            LossChoice::InBatch => vec![Objective::InBatch],
            LossChoice::Logq => vec![Objective::LogQ],
            LossChoice::CorrectedLogq => vec![Objective::CorrectedLogQ],
            LossChoice::Sampled => vec![Objective::Sampled],
            LossChoice::Full => vec![Objective::Full],
            LossChoice::All => Objective::ALL.to_vec(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        Ok(_) => Err("must be finite and > 0".into()),
        Err(e) => Err(format!("{e}")),
    }
}
