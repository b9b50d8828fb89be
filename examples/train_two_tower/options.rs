//! The command line.

use std::path::PathBuf;

use catalog_softmax::{Correction, Loss};

use clap::{Parser, ValueEnum};

use crate::data::{Choice, Format, Separator};
use crate::frequencies::LogQ;
use crate::index::HnswOptions;
use crate::negatives::Negatives;
use crate::numbers::{finite, positive, readable, whole};
use crate::objective::Objective;
use crate::temperature::{LEARNED_RANGE, Schedule};

const EXAMPLES: &str = "\
Examples:
  train_two_tower --data ratings.csv --seeds 1,2,3 --out runs/ratings
      each loss on files such as MovieLens', columns found by their names
  train_two_tower --train train.txt --test test.txt --negatives in-batch,uniform:4096 --log-q streaming
      a given split, two pools of negatives in one loss; Recall@20 and NDCG@20 over the whole catalogue

After `cargo run --release --example train_two_tower`, options stand behind `--`.";

/// Schedules that end at another temperature.
const MOVING: [(&str, &str); 3] =
    [("temperature_schedule", "linear"), ("temperature_schedule", "cosine"), ("temperature_schedule", "exponential")];

/// Counts and widths: what fits in 32 bits. Memory is checked when the data are known.
const MOST: u64 = u32::MAX as u64;

/// Trains a two-tower recommender with one or all of the crate's losses and compares them over the whole catalogue.
///
/// Without --data or --train, data are generated.
#[derive(Debug, Clone, Parser)]
#[command(name = "train_two_tower", version, after_help = EXAMPLES, allow_negative_numbers = true)]
pub struct Options {
    /// File of interactions: user, item and time in each line, plain or gzipped. Each user's last item is tested
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    pub data: Option<PathBuf>,
    /// File of all interactions to train on, of a split that is given; times may be missing where lines are in their
    /// order, and lines may be lists: a user and the user's items with spaces between
    #[arg(long, value_name = "FILE", requires = "test", conflicts_with = "data", help_heading = "Data")]
    pub train: Option<PathBuf>,
    /// File of the interactions to test on
    #[arg(long, value_name = "FILE", requires = "train", help_heading = "Data")]
    pub test: Option<PathBuf>,
    /// File of interactions between both, by which the best epoch is chosen; without it the last epoch is tested
    #[arg(long, value_name = "FILE", requires = "train", help_heading = "Data")]
    pub validation: Option<PathBuf>,
    /// user=..,item=..,time=.. with names of the first line or numbers from 1; without time the lines are in its order
    #[arg(long, value_name = "COLUMNS", help_heading = "Data")]
    pub columns: Option<Choice>,
    /// What stands between fields, such as , or ; or :: or \t or space; found in the first line unless it is given
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Data")]
    pub separator: Option<Separator>,
    /// Count lines that hold no interaction instead of stopping at the first; line 1 is never skipped
    #[arg(long, help_heading = "Data")]
    pub skip_bad_lines: bool,
    /// Test, and validate, on the targets of at most so many users; all of them unless it is given
    #[arg(long, value_name = "USERS", value_parser = whole(1, MOST), help_heading = "Data")]
    pub evaluate: Option<usize>,
    /// Users of the generated data
    #[arg(long, value_name = "N", default_value = "6000", value_parser = whole(1, MOST), help_heading = "Data")]
    #[arg(conflicts_with_all = ["data", "train"])]
    pub generate_users: usize,
    /// Items of the generated data; some hundred MB of tables for a million
    #[arg(long, value_name = "N", default_value = "2000", value_parser = whole(100, MOST), help_heading = "Data")]
    #[arg(conflicts_with_all = ["data", "train"])]
    pub generate_items: usize,

    /// Which loss to train with: names for choices of --negatives, --log-q and --correction
    #[arg(long, value_enum, default_value = "all", help_heading = "Loss")]
    pub loss: LossChoice,
    /// Negatives of one loss: a list of in-batch, uniform:N, unigram:N[:EXPONENT], log-uniform:N (items ranked by
    /// frequency) and queue:CAPACITY. N items are drawn for a step, or with row- before the name, as in row-uniform:N, for
    /// each row of its batch; give the option several times to compare several lists
    #[arg(long, value_name = "LIST", conflicts_with = "loss", help_heading = "Loss")]
    pub negatives: Vec<Negatives>,
    /// Where Q of in-batch and queued negatives comes from, one source or several to compare
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "exact",
        requires = "negatives",
        help_heading = "Loss"
    )]
    pub log_q: Vec<LogQ>,
    /// What is done with Q
    #[arg(long, value_enum, default_value = "logq", requires = "negatives", help_heading = "Loss")]
    pub correction: CorrectionChoice,
    /// P, how many of the user's next items an example has as positives. Each has the weight 1/P; at the end of the
    /// user's training items P is what is left
    #[arg(long, value_name = "P", default_value = "1", value_parser = whole(1, MOST), help_heading = "Loss")]
    pub next: usize,
    /// Leave out negatives that score more than X above the positive, where scores are cosine / temperature. They may be
    /// positives that nobody marked
    #[arg(long, value_name = "X", value_parser = finite, help_heading = "Loss")]
    #[arg(conflicts_with = "false_negative_ratio")]
    pub false_negative_margin: Option<f64>,
    /// Leave out negatives whose cosine is above X times the positive's, where that is above 0
    #[arg(long, value_name = "X", value_parser = positive, help_heading = "Loss")]
    pub false_negative_ratio: Option<f64>,
    /// Scores are cosine / temperature; the first value where it is scheduled or learned
    #[arg(long, default_value = "0.07", value_parser = positive, help_heading = "Loss")]
    pub temperature: f64,
    /// How the temperature moves to --final-temperature over all epochs
    #[arg(long, value_enum, default_value = "constant", conflicts_with = "learn_temperature", help_heading = "Loss")]
    pub temperature_schedule: Schedule,
    /// Where a scheduled temperature ends
    #[arg(long, value_parser = positive, help_heading = "Loss", required_if_eq_any = MOVING)]
    pub final_temperature: Option<f64>,
    /// Learn the logarithm of the temperature, kept between 0.01 and 1
    #[arg(long, help_heading = "Loss")]
    pub learn_temperature: bool,

    /// Passes over the training examples
    #[arg(long, default_value = "5", value_parser = whole(1, MOST), help_heading = "Training")]
    pub epochs: usize,
    /// B, examples per step
    #[arg(long, default_value = "512", value_parser = whole(1, MOST), help_heading = "Training")]
    pub batch: usize,
    /// D, width of the embeddings
    #[arg(long, default_value = "64", value_parser = whole(1, MOST), help_heading = "Training")]
    pub dim: usize,
    /// K, how many of the user's last items the query tower pools
    #[arg(long, default_value = "20", value_parser = whole(1, MOST), help_heading = "Training")]
    pub history: usize,
    /// Step size of the optimiser, row-wise Adagrad
    #[arg(long, default_value = "0.2", value_parser = positive, help_heading = "Training")]
    pub learning_rate: f64,
    /// One seed or several, as in 1,2,3: the table then has mean and standard deviation
    #[arg(long, alias = "seed", value_delimiter = ',', default_value = "1", value_parser = seed)]
    #[arg(help_heading = "Training")]
    pub seeds: Vec<u64>,
    /// Where to run; `auto` takes the CPU where there is no GPU, and says why
    #[arg(long, value_enum, default_value = "auto", help_heading = "Training")]
    pub device: DeviceChoice,

    /// Retrieve through an approximate index, too, and compare it with the exact search: recall, speed, size. hnsw alone is
    /// hnsw:16:128:128
    #[arg(long, value_name = "hnsw[:M[:EF_CONSTRUCTION[:EF_SEARCH]]]", help_heading = "Output")]
    pub index: Option<HnswOptions>,
    /// Folder for metrics.json, curves.svg and a checkpoint per loss and seed
    #[arg(long, value_name = "DIR", default_value = "runs", help_heading = "Output")]
    pub out: PathBuf,
    /// Go on from the checkpoints in --out, which an earlier call with the same options and data left there
    #[arg(long, help_heading = "Output")]
    pub resume: bool,
}

impl Options {
    /// Checks what the parser cannot.
    pub fn check(&self) -> Result<(), String> {
        let of_files = [
            ("--columns", self.columns.is_some()),
            ("--separator", self.separator.is_some()),
            ("--skip-bad-lines", self.skip_bad_lines),
        ];
        if let Some((name, _)) =
            of_files.iter().find(|(_, given)| *given && self.data.is_none() && self.train.is_none())
        {
            return Err(format!("{name} is given, but no file; rule: --data, or --train and --test"));
        }
        if self.final_temperature.is_some() && self.temperature_schedule == Schedule::Constant {
            return Err("--final-temperature is given, but --temperature-schedule is constant".into());
        }
        if self.learn_temperature && !LEARNED_RANGE.contains(&self.temperature) {
            let (low, high) = (LEARNED_RANGE.start(), LEARNED_RANGE.end());
            return Err(format!(
                "--temperature is {}; rule: from {low} to {high} with --learn-temperature, which keeps it there",
                readable(self.temperature)
            ));
        }
        match self.seeds.iter().enumerate().find(|(i, seed)| self.seeds[..*i].contains(seed)) {
            Some((_, seed)) => Err(format!("--seeds names {seed} twice")),
            None => Ok(()),
        }
    }

    /// How files are read.
    pub fn format(&self) -> Format {
        let Options { columns, separator, skip_bad_lines, .. } = self.clone();
        Format { columns, separator, skip_bad_lines }
    }

    /// A loss with the filter of false negatives that is asked for.
    pub fn filtered(&self, loss: Loss) -> Loss {
        match (self.false_negative_margin, self.false_negative_ratio) {
            (Some(margin), _) => loss.false_negative_margin(margin),
            (None, Some(ratio)) => loss.false_negative_ratio(ratio),
            (None, None) => loss,
        }
    }

    /// What to train with, each in turn.
    pub fn objectives(&self) -> Result<Vec<Objective>, String> {
        if self.negatives.is_empty() {
            return Ok(self.loss.objectives());
        }
        let mut objectives: Vec<Objective> = Vec::new();
        for list in &self.negatives {
            for &log_q in &self.log_q {
                let objective = Objective::new(list.clone(), log_q, self.correction.into())?;
                if objectives.contains(&objective) {
                    return Err(format!("--negatives and --log-q name {} twice", objective.name));
                }
                objectives.push(objective);
            }
        }
        Ok(objectives)
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
    fn objectives(self) -> Vec<Objective> {
        let [in_batch, logq, corrected_logq, sampled, full] = Objective::presets();
        match self {
            LossChoice::InBatch => vec![in_batch],
            LossChoice::Logq => vec![logq],
            LossChoice::CorrectedLogq => vec![corrected_logq],
            LossChoice::Sampled => vec![sampled],
            LossChoice::Full => vec![full],
            LossChoice::All => vec![in_batch, logq, corrected_logq, sampled, full],
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CorrectionChoice {
    /// log Q is subtracted from negatives and positive
    Logq,
    /// log of the expected number of copies is subtracted from the negatives: an estimate of the full softmax
    LogqNegativesOnly,
    /// "Correcting the LogQ Correction"; it needs a Q below 1, and so --batch above 1 where Q is estimated
    CorrectedLogq,
}

impl From<CorrectionChoice> for Correction {
    fn from(choice: CorrectionChoice) -> Correction {
        match choice {
            CorrectionChoice::Logq => Correction::LogQ,
            CorrectionChoice::LogqNegativesOnly => Correction::LogQNegativesOnly,
            CorrectionChoice::CorrectedLogq => Correction::CorrectedLogQ,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| "rule: a whole number from 0 to 2^64 - 1".into())
}

#[cfg(test)]
mod tests;
