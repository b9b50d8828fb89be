//! `--log-q`: with which probability Q the training data draw an item, as in-batch negatives and a queue's rows come.

use catalog_softmax::negatives::{CountMin, FrequencyEstimator, GapEstimator};
use clap::ValueEnum;

use crate::Fallible;

/// Where Q comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "kebab-case")]
pub enum LogQ {
    /// Counts over all training examples, made ahead
    Exact,
    /// Gaps between an item's appearances, as batches come (Yi et al. 2019)
    Streaming,
    /// A count-min sketch of the batches so far
    CountMin,
    /// No correction: the loss takes all negatives as they are
    None,
}

/// Cells of each hash function of an estimator: its memory is the same for any catalogue.
const WIDTH: usize = 1 << 16;
/// Weight of the latest gap: log Q has a standard deviation of sqrt(0.01 / 2), 7%.
const ALPHA: f64 = 0.01;
/// Of the hash functions. The estimates are the same in every run; `--seed` is the training's.
const SEED: u64 = 7;

/// Q of targets, known or estimated.
pub enum Frequencies<'a> {
    /// (N) log Q of each item.
    Exact(&'a [f32]),
    Estimated(Box<dyn FrequencyEstimator>),
}

impl<'a> Frequencies<'a> {
    /// `exact` (N) is log Q of each item over all training examples. Nothing without a correction.
    pub fn new(log_q: LogQ, exact: &'a [f32]) -> Fallible<Option<Self>> {
        let estimator: Box<dyn FrequencyEstimator> = match log_q {
            LogQ::None => return Ok(None),
            LogQ::Exact => return Ok(Some(Frequencies::Exact(exact))),
            LogQ::Streaming => Box::new(GapEstimator::new(WIDTH, 2, ALPHA, SEED)?),
            LogQ::CountMin => Box::new(CountMin::new(WIDTH, 4, SEED)?),
        };
        Ok(Some(Frequencies::Estimated(estimator)))
    }

    /// Takes the targets of a batch in, before their log_q is asked for.
    pub fn observe(&mut self, targets: &[u64]) {
        if let Frequencies::Estimated(estimator) = self {
            estimator.observe(targets);
        }
    }

    /// log Q of each item per draw. Exact ones are −∞ for an item that is never a target.
    pub fn log_q(&self, items: &[u64]) -> Vec<f32> {
        match self {
            Frequencies::Exact(log_q) => items.iter().map(|&item| log_q[item as usize]).collect(),
            Frequencies::Estimated(estimator) => estimator.log_q(items),
        }
    }

    /// What the batches so far have left, for a checkpoint: nothing of exact counts.
    pub fn save(&self) -> Vec<u8> {
        match self {
            Frequencies::Exact(_) => Vec::new(),
            Frequencies::Estimated(estimator) => estimator.to_bytes(),
        }
    }

    /// Goes on from what [`save`](Frequencies::save) returned.
    pub fn restore(&mut self, log_q: LogQ, bytes: &[u8]) -> Fallible<()> {
        if let Frequencies::Estimated(estimator) = self {
            *estimator = match log_q {
                LogQ::CountMin => Box::new(CountMin::from_bytes(bytes)?),
                _ => Box::new(GapEstimator::from_bytes(bytes)?),
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream of two batches with known shares: item 0 in every other position, items 1 and 2 in every fourth.
    #[test]
    fn every_source_finds_the_shares_of_a_regular_stream() {
        let exact = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln(), f32::NEG_INFINITY];
        let batch: Vec<u64> = [0u64, 1, 0, 2].repeat(64);
        for (log_q, tolerance) in [(LogQ::Exact, 0.0), (LogQ::CountMin, 1e-6), (LogQ::Streaming, 0.03)] {
            let mut frequencies = Frequencies::new(log_q, &exact).unwrap().unwrap();
            frequencies.observe(&batch);
            let before = frequencies.log_q(&[0, 1, 2]);
            for (found, expected) in before.iter().zip(exact) {
                assert!((found - expected).abs() <= tolerance, "{log_q:?}: {before:?}");
            }
            // Saved and restored it goes on alike.
            let mut restored = Frequencies::new(log_q, &exact).unwrap().unwrap();
            restored.restore(log_q, &frequencies.save()).unwrap();
            [&mut frequencies, &mut restored].into_iter().for_each(|f| f.observe(&[3, 0, 0]));
            assert_eq!(frequencies.log_q(&[0, 1, 2, 3]), restored.log_q(&[0, 1, 2, 3]), "{log_q:?}");
        }
        assert!(Frequencies::new(LogQ::None, &exact).unwrap().is_none());
    }

    #[test]
    fn no_target_of_the_first_batch_is_certain() {
        for log_q in [LogQ::Streaming, LogQ::CountMin] {
            let mut frequencies = Frequencies::new(log_q, &[]).unwrap().unwrap();
            frequencies.observe(&[5, 6, 7]);
            assert_eq!(frequencies.log_q(&[5, 6, 7]), [(1.0f64 / 3.0).ln() as f32; 3], "{log_q:?}");
        }
    }
}
