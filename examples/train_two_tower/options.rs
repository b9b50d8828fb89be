//! The command line.

use std::path::PathBuf;

use catalog_softmax::Correction;

use clap::{Parser, ValueEnum};

use crate::frequencies::LogQ;
use crate::index::HnswOptions;
use crate::negatives::Negatives;
use crate::objective::Objective;
use crate::temperature::{LEARNED_RANGE, Schedule};

/// Trains a two-tower recommender with one or all of the crate's losses and compares them over the whole catalogue.
#[derive(Debug, Clone, Parser)]
pub struct Options {
    /// CSV file of user_id,item_id,timestamp, plain or gzipped; without it, data are generated
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Count lines that hold no interaction instead of stopping at the first
    #[arg(long)]
    pub skip_bad_lines: bool,
    /// Items of the generated data; some hundred MB of tables for a million
    #[arg(long, value_name = "N", default_value = "2000", value_parser = at_least_100, conflicts_with = "data")]
    pub generate_items: usize,
    /// Users of the generated data
    #[arg(long, value_name = "N", default_value = "6000", value_parser = at_least_one, conflicts_with = "data")]
    pub generate_users: usize,
    /// Which loss to train with: names for choices of --negatives, --log-q and --correction
    #[arg(long, value_enum, default_value = "all")]
    pub loss: LossChoice,
    /// Pools of negatives in one loss: a list of in-batch, uniform:N, unigram:N[:EXPONENT], log-uniform:N (items ranked by
    /// frequency) and queue:CAPACITY; give the option several times to compare several lists
    #[arg(long, value_name = "LIST", conflicts_with = "loss")]
    pub negatives: Vec<Negatives>,
    /// Where Q of in-batch and queued negatives comes from, one source or several to compare; none corrects nothing
    #[arg(long, value_enum, value_delimiter = ',', default_value = "exact", requires = "negatives")]
    pub log_q: Vec<LogQ>,
    /// What is done with Q
    #[arg(long, value_enum, default_value = "logq", requires = "negatives")]
    pub correction: CorrectionChoice,
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
    /// Validate and test on the targets of at most so many users; all of them unless it is given
    #[arg(long, value_name = "USERS", value_parser = at_least_one)]
    pub evaluate: Option<usize>,
    /// Retrieve through an approximate index, too, and compare it with the exact search: recall, speed, size. hnsw alone is
    /// hnsw:16:128:128
    #[arg(long, value_name = "hnsw[:M[:EF_CONSTRUCTION[:EF_SEARCH]]]")]
    pub index: Option<HnswOptions>,
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
        if self.learn_temperature && !LEARNED_RANGE.contains(&self.temperature) {
            let (low, high) = (LEARNED_RANGE.start(), LEARNED_RANGE.end());
            return Err(format!(
                "--temperature is {}; rule: from {low} to {high} with --learn-temperature, which keeps it there",
                self.temperature
            ));
        }
        match self.seed.iter().enumerate().find(|(i, seed)| self.seed[..*i].contains(seed)) {
            Some((_, seed)) => Err(format!("--seed names {seed} twice")),
            None => Ok(()),
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
    /// "Correcting the LogQ Correction"
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

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

/// Enough for users who take dozens of them.
fn at_least_100(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n < 100 || n > u32::MAX as usize => Err("must be from 100 to 2^32 - 1".into()),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn names(flags: &[&str]) -> Result<Vec<String>, String> {
        let parsed = Options::try_parse_from(["train_two_tower"].iter().chain(flags)).map_err(|e| e.to_string())?;
        Ok(parsed.objectives()?.into_iter().map(|objective| objective.name).collect())
    }

    #[test]
    fn lists_and_sources_are_compared_in_turn() {
        assert_eq!(names(&[]).unwrap(), ["in-batch", "logq", "corrected-logq", "sampled", "full"]);
        assert_eq!(names(&["--loss", "sampled"]).unwrap(), ["sampled"]);
        let lists = ["--negatives", "in-batch", "--negatives", "uniform:8,in-batch", "--log-q", "exact,streaming"];
        let expected = ["in-batch", "in-batch streaming", "in-batch,uniform:8", "in-batch,uniform:8 streaming"];
        assert_eq!(names(&lists).unwrap(), expected);
        let corrected = ["--negatives", "in-batch", "--correction", "corrected-logq"];
        assert_eq!(names(&corrected).unwrap(), ["in-batch corrected"]);
    }

    #[test]
    fn a_learned_temperature_starts_in_its_range() {
        let check = |temperature: &str, more: &[&str]| {
            let flags = ["train_two_tower", "--temperature", temperature];
            Options::try_parse_from(flags.iter().chain(more)).unwrap().check()
        };
        for temperature in ["0.009", "1.1"] {
            assert!(check(temperature, &[]).is_ok());
            let error = check(temperature, &["--learn-temperature"]).unwrap_err();
            assert!(error.starts_with(&format!("--temperature is {temperature}; rule: from 0.01 to 1")), "{error}");
        }
        for temperature in ["0.01", "1"] {
            assert!(check(temperature, &["--learn-temperature"]).is_ok());
        }
    }

    #[test]
    fn what_contradicts_is_an_error_with_argument_and_rule() {
        for (flags, parts) in [
            (
                &["--negatives", "uniform:0"][..],
                &["invalid value 'uniform:0' for '--negatives <LIST>'", "from 1 to"][..],
            ),
            (&["--negatives", "1024"], &["'--negatives <LIST>'", "\"1024\" is none of the pools; rule: in-batch"]),
            (&["--negatives", "in-batch", "--loss", "full"], &["--negatives <LIST>", "cannot be used with", "--loss"]),
            (&["--log-q", "streaming"], &["--negatives <LIST>"]),
            (&["--correction", "corrected-logq"], &["--negatives <LIST>"]),
            (&["--negatives", "in-batch", "--log-q", "sketch"], &["'sketch'", "--log-q", "count-min"]),
            (&["--negatives", "uniform:8", "--log-q", "count-min"], &["--log-q count-min does nothing for"]),
            (&["--negatives", "in-batch,queue:8", "--negatives", "queue:8,in-batch"], &["in-batch,queue:8 twice"]),
            (&["--generate-items", "99"], &["'99'", "--generate-items", "from 100 to"]),
        ] {
            let error = names(flags).expect_err(&flags.join(" "));
            assert!(parts.iter().all(|part| error.contains(part)), "{flags:?}: {error}");
        }
    }
}
