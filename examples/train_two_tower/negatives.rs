//! `--negatives`: from which pools a step's negatives come.
//!
//! | part | candidates | drawn with the probability |
//! |---|---|---|
//! | `in-batch` | the batch's own targets | that a training example has the item as its target |
//! | `queue:CAPACITY` | the last CAPACITY targets of earlier steps, as they were embedded then | the same |
//! | `uniform:N` | N draws per step | 1 / items |
//! | `unigram:N[:EXPONENT]` | N draws per step | count^EXPONENT / its sum; the exponent is 1 unless it is given |
//! | `log-uniform:N` | N draws per step | about 1 / (rank by count + 1), Zipf's law |
//! | `row-uniform:N`, `row-unigram:N[:EXPONENT]`, `row-log-uniform:N` | N draws of each row's own | as above |

use std::fmt;
use std::str::FromStr;

use catalog_softmax::RowNegatives;

use crate::numbers::readable;

/// The pools of one loss.
#[derive(Debug, Clone, PartialEq)]
pub struct Negatives {
    pub in_batch: bool,
    /// Draws from the catalogue, in the order of the command line.
    pub sampled: Vec<Sampled>,
    /// Capacity of the queue.
    pub queue: Option<usize>,
}

/// What each step draws anew, with repetitions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    pub from: Source,
    pub draws: usize,
    /// Whether each row has draws of its own.
    pub per_row: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Source {
    Uniform,
    Unigram { exponent: f64 },
    LogUniform,
}

impl Negatives {
    /// Whether some pool is drawn by the popularity of targets, which `--log-q` is about.
    pub fn by_popularity(&self) -> bool {
        self.in_batch || self.queue.is_some()
    }
}

const PARTS: &str =
    "in-batch, uniform:N, unigram:N[:EXPONENT], log-uniform:N, the same three behind row-, or queue:CAPACITY";

impl FromStr for Negatives {
    type Err = String;

    /// The message names the part, what is wrong and the rule; the parser of the command line adds the argument.
    fn from_str(list: &str) -> Result<Self, String> {
        let mut negatives = Negatives { in_batch: false, sampled: Vec::new(), queue: None };
        for part in list.split(',') {
            let fields: Vec<&str> = part.split(':').collect();
            match fields[..] {
                ["in-batch"] if negatives.in_batch => return Err("in-batch is named twice; rule: once at most".into()),
                ["in-batch"] => negatives.in_batch = true,
                ["queue", _] if negatives.queue.is_some() => {
                    return Err("queue is named twice; rule: once at most".into());
                }
                ["queue", capacity] => negatives.queue = Some(count(part, "CAPACITY", capacity, MOST)?),
                ["full"] => {
                    return Err(format!("{part:?} is not a pool; the whole catalogue is --loss full; rule: {PARTS}"));
                }
                [source, draws, ref rest @ ..] => {
                    let sampled = sampled(part, source, draws, rest)?;
                    if sampled.per_row && negatives.sampled.iter().any(|other| other.per_row) {
                        return Err(format!("{part} is a second part of a row's own; rule: once at most"));
                    }
                    negatives.sampled.push(sampled);
                }
                _ => return Err(none_of_the_pools(part)),
            }
        }
        if !negatives.in_batch && negatives.sampled.is_empty() {
            return Err(format!(
                "{list} is a queue alone, which is empty in the first step; rule: another pool beside it"
            ));
        }
        Ok(negatives)
    }
}

fn sampled(part: &str, source: &str, draws: &str, rest: &[&str]) -> Result<Sampled, String> {
    let (source, per_row) = source.strip_prefix("row-").map_or((source, false), |source| (source, true));
    let from = match (source, rest) {
        ("uniform", []) => Source::Uniform,
        ("log-uniform", []) => Source::LogUniform,
        ("unigram", []) => Source::Unigram { exponent: 1.0 },
        ("unigram", [exponent]) => match exponent.parse::<f64>() {
            Ok(exponent) if exponent.is_finite() => Source::Unigram { exponent },
            _ => return Err(format!("EXPONENT of {part} is {exponent:?}; rule: a finite number")),
        },
        ("uniform" | "log-uniform" | "unigram", _) => return Err(format!("{part} has too many fields; rule: {PARTS}")),
        _ => return Err(none_of_the_pools(part)),
    };
    let most = if per_row { RowNegatives::MAX_PER_ROW as u32 } else { MOST };
    Ok(Sampled { from, draws: count(part, "N", draws, most)?, per_row })
}

fn none_of_the_pools(part: &str) -> String {
    format!("{part:?} is none of the pools; rule: {PARTS}")
}

/// Ids, and a queue's rows, are counted in 32 bits.
const MOST: u32 = u32::MAX;

fn count(part: &str, name: &str, text: &str, most: u32) -> Result<usize, String> {
    match text.parse::<u32>() {
        Ok(count) if (1..=most).contains(&count) => Ok(count as usize),
        _ => Err(format!("{name} of {part} is {text:?}; rule: a whole number from 1 to {most}")),
    }
}

/// As on the command line, in one order: equal pools have equal names.
impl fmt::Display for Negatives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_batch = self.in_batch.then(|| "in-batch".to_string());
        let sampled = self.sampled.iter().map(|&Sampled { from, draws, per_row }| {
            let row = if per_row { "row-" } else { "" };
            match from {
                Source::Uniform => format!("{row}uniform:{draws}"),
                Source::LogUniform => format!("{row}log-uniform:{draws}"),
                Source::Unigram { exponent: 1.0 } => format!("{row}unigram:{draws}"),
                Source::Unigram { exponent } => format!("{row}unigram:{draws}:{}", readable(exponent)),
            }
        });
        let queue = self.queue.map(|capacity| format!("queue:{capacity}"));
        f.write_str(&in_batch.into_iter().chain(sampled).chain(queue).collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_its_pools() {
        let all: Negatives =
            "queue:16384,uniform:4096,in-batch,row-unigram:8:0.75,log-uniform:3,unigram:5".parse().unwrap();
        let sampled = [
            (Source::Uniform, 4096, false),
            (Source::Unigram { exponent: 0.75 }, 8, true),
            (Source::LogUniform, 3, false),
            (Source::Unigram { exponent: 1.0 }, 5, false),
        ];
        let sampled = sampled.map(|(from, draws, per_row)| Sampled { from, draws, per_row }).to_vec();
        assert_eq!(all, Negatives { in_batch: true, sampled, queue: Some(16384) });
        assert_eq!(all.to_string(), "in-batch,uniform:4096,row-unigram:8:0.75,log-uniform:3,unigram:5,queue:16384");
        assert_eq!(all.to_string().parse(), Ok(all));
        let uniform: Negatives = "uniform:7".parse().unwrap();
        assert!(!uniform.by_popularity() && !uniform.in_batch && uniform.queue.is_none());
        for own in ["row-uniform:4096", "row-log-uniform:3", "row-unigram:2"] {
            let parsed: Negatives = own.parse().unwrap();
            assert!(parsed.sampled[0].per_row && parsed.to_string() == own);
        }
    }

    #[test]
    fn a_bad_list_is_an_error_with_part_and_rule() {
        for (list, message) in [
            ("", "\"\" is none of the pools; rule: in-batch, uniform:N,"),
            ("1024", "\"1024\" is none of the pools; rule: in-batch"),
            ("in-batch,", "\"\" is none of the pools"),
            ("in-batch:4", "\"in-batch:4\" is none of the pools"),
            ("uniform", "\"uniform\" is none of the pools"),
            ("in-batch,in-batch", "in-batch is named twice; rule: once at most"),
            ("in-batch,queue:4,queue:4", "queue is named twice"),
            ("queue:4", "queue:4 is a queue alone, which is empty in the first step; rule: another pool beside it"),
            ("uniform:0", "N of uniform:0 is \"0\"; rule: a whole number from 1 to 4294967295"),
            ("uniform:-1", "N of uniform:-1 is \"-1\""),
            ("in-batch,queue:x", "CAPACITY of queue:x is \"x\"; rule"),
            ("log-uniform:4294967296", "N of log-uniform:4294967296 is"),
            ("row-uniform:4097", "N of row-uniform:4097 is \"4097\"; rule: a whole number from 1 to 4096"),
            ("row-uniform:0", "N of row-uniform:0 is \"0\"; rule"),
            ("row-uniform:4,row-unigram:4", "row-unigram:4 is a second part of a row's own; rule: once at most"),
            ("row-in-batch:4", "\"row-in-batch:4\" is none of the pools"),
            ("row:4", "\"row:4\" is none of the pools; rule: in-batch, uniform:N,"),
            ("row-log-uniform:4:1", "row-log-uniform:4:1 has too many fields"),
            ("uniform:4:1", "uniform:4:1 has too many fields"),
            ("unigram:4:1:2", "unigram:4:1:2 has too many fields"),
            ("unigram:4:inf", "EXPONENT of unigram:4:inf is \"inf\"; rule: a finite number"),
            ("unigram:4:", "EXPONENT of unigram:4: is \"\"; rule: a finite number"),
        ] {
            let error = list.parse::<Negatives>().expect_err(list);
            assert!(error.starts_with(message), "{error}");
        }
    }
}
