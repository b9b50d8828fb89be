//! What a run is trained with: which items are candidates, where their Q comes from, and what is done with it.
//!
//! `--negatives`, `--log-q` and `--correction` say it; `--loss` has names for common choices:
//!
//! | `--loss` | `--negatives` | `--log-q` | `--correction` |
//! |---|---|---|---|
//! | in-batch | in-batch | none | |
//! | logq | in-batch | exact | logq |
//! | corrected-logq | in-batch | exact | corrected-logq |
//! | sampled | uniform:1024 | exact | logq (of the same Q for every item: it cancels) |
//! | full | the whole catalogue, which `--negatives` has no name for | | |
//!
//! In all of them the items of the query's own history are no negatives: they are positives of the same user, and
//! nothing recommends them again. A candidate that is one of the row's positives is none either (an accidental hit), in
//! whichever pool.

use std::hash::Hasher;

use catalog_softmax::{Correction, Loss, Reduction, Similarity};
use clap::ValueEnum;
use fnv::FnvHasher;

use crate::frequencies::LogQ;
use crate::negatives::{Negatives, Sampled, Source};

/// A file's name has 255 bytes on most systems, with the seed and the suffix.
const LONGEST_STEM: usize = 150;

#[derive(Debug, Clone, PartialEq)]
pub struct Objective {
    pub name: String,
    /// None: the whole catalogue.
    pub negatives: Option<Negatives>,
    pub log_q: LogQ,
    pub correction: Correction,
}

impl Objective {
    /// What `--loss` has names for.
    pub fn presets() -> [Objective; 5] {
        let in_batch = Negatives { in_batch: true, sampled: Vec::new(), queue: None };
        let uniform = Sampled { from: Source::Uniform, draws: 1024, per_row: false };
        let uniform = Negatives { in_batch: false, sampled: vec![uniform], queue: None };
        let preset = |name: &str, negatives: Option<&Negatives>, log_q, correction| Objective {
            name: name.into(),
            negatives: negatives.cloned(),
            log_q,
            correction,
        };
        [
            preset("in-batch", Some(&in_batch), LogQ::None, Correction::None),
            preset("logq", Some(&in_batch), LogQ::Exact, Correction::LogQ),
            preset("corrected-logq", Some(&in_batch), LogQ::Exact, Correction::CorrectedLogQ),
            preset("sampled", Some(&uniform), LogQ::Exact, Correction::LogQ),
            preset("full", None, LogQ::None, Correction::None),
        ]
    }

    /// The pools of `--negatives`. `correction` is not `None`; `log_q` may be, and leaves `LogQ`, which need not be
    /// asked for, with nothing to do.
    pub fn new(negatives: Negatives, log_q: LogQ, correction: Correction) -> Result<Self, String> {
        let estimated = matches!(log_q, LogQ::Streaming | LogQ::CountMin);
        let source = log_q.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default();
        if estimated && !negatives.by_popularity() {
            return Err(format!(
                "--log-q {source} does nothing for --negatives {negatives}; rule: in-batch or queue in it"
            ));
        }
        if log_q == LogQ::None && correction != Correction::LogQ {
            let name = if correction == Correction::CorrectedLogQ { "corrected-logq" } else { "logq-negatives-only" };
            return Err(format!("--correction {name} has no Q with --log-q none; rule: another --log-q"));
        }
        let mut name = negatives.to_string();
        if log_q != LogQ::Exact {
            name += &format!(" {source}");
        }
        match correction {
            Correction::CorrectedLogQ => name += " corrected",
            Correction::LogQNegativesOnly => name += " negatives-only",
            _ => {}
        }
        let correction = if log_q == LogQ::None { Correction::None } else { correction };
        Ok(Objective { name, negatives: Some(negatives), log_q, correction })
    }

    /// The name, as it can be part of a file's name everywhere: of the end of a long one, a hash of it all.
    pub fn file_stem(&self) -> String {
        let stem = self.name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '.', "-");
        if stem.len() <= LONGEST_STEM {
            return stem;
        }
        let mut hasher = FnvHasher::default();
        hasher.write(self.name.as_bytes());
        format!("{}-{:016x}", &stem[..LONGEST_STEM - 17], hasher.finish())
    }

    /// Whether the batch's targets are candidates.
    pub fn in_batch(&self) -> bool {
        self.negatives.as_ref().is_some_and(|negatives| negatives.in_batch)
    }

    /// Whether log_q is that of expected numbers of copies, or that of one draw.
    pub fn log_q_is_of_counts(&self) -> bool {
        self.correction == Correction::LogQNegativesOnly
    }

    /// Summed, not averaged: Adagrad takes its scale from past gradients, and an example of the last, smaller batch of
    /// an epoch must weigh as much as any other. (Averaged, a last batch of one example throws every row of `full`
    /// about.)
    pub fn loss(&self, temperature: f64) -> Loss {
        Loss::softmax(Similarity::Cosine, temperature).correction(self.correction).reduction(Reduction::Sum)
    }
}

/// A list of items for each row of a batch, one after the other: CSR, as the crate takes positives and excluded ids.
#[derive(Debug, Default)]
pub struct ItemLists {
    /// (rows + 1)
    pub offsets: Vec<i64>,
    pub items: Vec<u32>,
}

impl ItemLists {
    pub fn set<'a>(&mut self, rows: impl Iterator<Item = &'a [u32]>) {
        self.offsets.clear();
        self.items.clear();
        self.offsets.push(0);
        for row in rows {
            self.items.extend(row);
            self.offsets.push(self.items.len() as i64);
        }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The first item of each row, of which none is empty.
    pub fn firsts(&self) -> Vec<u32> {
        self.offsets[..self.len()].iter().map(|&start| self.items[start as usize]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_are_names_for_what_the_other_options_say() {
        for preset in Objective::presets() {
            let Some(negatives) = preset.negatives.clone() else { continue };
            let correction = if preset.log_q == LogQ::None { Correction::LogQ } else { preset.correction };
            let spelt_out = Objective::new(negatives, preset.log_q, correction).unwrap();
            assert_eq!(Objective { name: preset.name.clone(), ..spelt_out }, preset);
        }
    }

    #[test]
    fn names_and_contradictions() {
        let new = |list: &str, log_q, correction| Objective::new(list.parse().unwrap(), log_q, correction);
        let all = new("in-batch,unigram:8:0.5,queue:4", LogQ::CountMin, Correction::CorrectedLogQ).unwrap();
        assert_eq!(all.name, "in-batch,unigram:8:0.5,queue:4 count-min corrected");
        assert_eq!(all.file_stem(), "in-batch-unigram-8-0.5-queue-4-count-min-corrected");
        let extreme = new("unigram:8:1e308", LogQ::Exact, Correction::LogQ).unwrap();
        assert_eq!(extreme.file_stem(), "unigram-8-1e308");
        // Long names differ in their files, even where they begin alike.
        let long = |last: &str| {
            let list = ["uniform:1000", "log-uniform:1000"].repeat(20).join(",") + last;
            new(&list, LogQ::Exact, Correction::LogQ).unwrap().file_stem()
        };
        assert!(long(",uniform:1").len() == LONGEST_STEM && long(",uniform:1") != long(",uniform:2"));
        assert_eq!(
            new("uniform:8", LogQ::Exact, Correction::LogQNegativesOnly).unwrap().name,
            "uniform:8 negatives-only"
        );
        let error = new("uniform:8", LogQ::Streaming, Correction::LogQ).unwrap_err();
        assert_eq!(error, "--log-q streaming does nothing for --negatives uniform:8; rule: in-batch or queue in it");
        for (correction, name) in
            [(Correction::CorrectedLogQ, "corrected-logq"), (Correction::LogQNegativesOnly, "logq-negatives-only")]
        {
            let error = new("in-batch", LogQ::None, correction).unwrap_err();
            assert_eq!(error, format!("--correction {name} has no Q with --log-q none; rule: another --log-q"));
        }
    }
}
