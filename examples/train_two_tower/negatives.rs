//! `--negatives`: from which pools a step's negatives come.
//!
//! | part | candidates | drawn with the probability |
//! |---|---|---|
//! | `in-batch` | the batch's own targets | that a training example has the item as its target |
//! | `queue:CAPACITY` | the last CAPACITY targets of earlier steps, as they were embedded then | the same |
//! | `uniform:N` | N draws per step | 1 / items |
//! | `unigram:N[:EXPONENT]` | N draws per step | count^EXPONENT / its sum; the exponent is 1 unless it is given |
//! | `log-uniform:N` | N draws per step | about 1 / (rank by count + 1), Zipf's law |

use std::fmt;
use std::str::FromStr;

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

/// A pool that each step draws anew, with repetitions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    pub from: Source,
    pub draws: usize,
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

const PARTS: &str = "in-batch, uniform:N, unigram:N[:EXPONENT], log-uniform:N or queue:CAPACITY";

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
                ["queue", capacity] => negatives.queue = Some(count(part, "CAPACITY", capacity)?),
                [source @ ("uniform" | "unigram" | "log-uniform"), draws, ref rest @ ..] => {
                    negatives
                        .sampled
                        .push(Sampled { from: source_of(part, source, rest)?, draws: count(part, "N", draws)? });
                }
                ["full"] => {
                    return Err(format!("{part:?} is not a pool; the whole catalogue is --loss full; rule: {PARTS}"));
                }
                _ => return Err(format!("{part:?} is none of the pools; rule: {PARTS}")),
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

fn source_of(part: &str, source: &str, rest: &[&str]) -> Result<Source, String> {
    match (source, rest) {
        ("uniform", []) => Ok(Source::Uniform),
        ("log-uniform", []) => Ok(Source::LogUniform),
        ("unigram", []) => Ok(Source::Unigram { exponent: 1.0 }),
        ("unigram", [exponent]) => match exponent.parse::<f64>() {
            Ok(exponent) if exponent.is_finite() => Ok(Source::Unigram { exponent }),
            _ => Err(format!("EXPONENT of {part} is {exponent:?}; rule: a finite number")),
        },
        _ => Err(format!("{part} has too many fields; rule: {PARTS}")),
    }
}

/// Ids, and a queue's rows, are counted in 32 bits.
fn count(part: &str, name: &str, text: &str) -> Result<usize, String> {
    match text.parse::<u32>() {
        Ok(count) if count > 0 => Ok(count as usize),
        _ => Err(format!("{name} of {part} is {text:?}; rule: a whole number from 1 to 2^32 - 1")),
    }
}

/// As on the command line, in one order: equal pools have equal names.
impl fmt::Display for Negatives {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_batch = self.in_batch.then(|| "in-batch".to_string());
        let sampled = self.sampled.iter().map(|Sampled { from, draws }| match from {
            Source::Uniform => format!("uniform:{draws}"),
            Source::LogUniform => format!("log-uniform:{draws}"),
            Source::Unigram { exponent: 1.0 } => format!("unigram:{draws}"),
            Source::Unigram { exponent } => format!("unigram:{draws}:{}", readable(*exponent)),
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
            "queue:16384,uniform:4096,in-batch,unigram:8:0.75,log-uniform:3,unigram:5".parse().unwrap();
        let sampled = [
            (Source::Uniform, 4096),
            (Source::Unigram { exponent: 0.75 }, 8),
            (Source::LogUniform, 3),
            (Source::Unigram { exponent: 1.0 }, 5),
        ];
        let sampled = sampled.map(|(from, draws)| Sampled { from, draws }).to_vec();
        assert_eq!(all, Negatives { in_batch: true, sampled, queue: Some(16384) });
        assert_eq!(all.to_string(), "in-batch,uniform:4096,unigram:8:0.75,log-uniform:3,unigram:5,queue:16384");
        assert_eq!(all.to_string().parse(), Ok(all));
        let uniform: Negatives = "uniform:7".parse().unwrap();
        assert!(!uniform.by_popularity() && !uniform.in_batch && uniform.queue.is_none());
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
            ("uniform:0", "N of uniform:0 is \"0\"; rule: a whole number from 1 to 2^32 - 1"),
            ("uniform:-1", "N of uniform:-1 is \"-1\""),
            ("in-batch,queue:x", "CAPACITY of queue:x is \"x\"; rule"),
            ("log-uniform:4294967296", "N of log-uniform:4294967296 is"),
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
