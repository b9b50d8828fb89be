//! One Q for all the pools of a step.
//!
//! An item may come from any pool, so that its Q is that of a draw from all of them: with `n_k` draws from `Q_k` in pool k,
//! `Q = Σ_k n_k Q_k / Σ_k n_k`, see [`union_log_q`](catalog_softmax::union_log_q). This probability per draw is what
//! `corrected-logq` needs, and `logq` does not mind a constant factor. `logq-negatives-only` needs the expected number of
//! copies, `Σ_k n_k Q_k`.
//!
//! A queue's rows have no gradient, and with one Q they stand for a share of each item's: see
//! [`union_gradient_weight`](catalog_softmax::union_gradient_weight).

use catalog_softmax::{union_gradient_weight, union_log_q};

use crate::Fallible;
use crate::frequencies::Frequencies;
use crate::sampler::Sampler;

/// What a step draws.
pub struct Union<'a> {
    pub by_popularity: Option<ByPopularity<'a>>,
    pub samplers: &'a [Sampler],
    /// Expected counts in place of probabilities per draw.
    pub counts: bool,
}

/// Draws by the frequency of targets.
#[derive(Clone, Copy)]
pub struct ByPopularity<'a> {
    /// The other targets, for each row.
    pub in_batch: usize,
    /// The queue's rows now.
    pub queued: usize,
    pub frequencies: &'a Frequencies<'a>,
}

impl Union<'_> {
    /// What the gradients of candidates of these items are to be multiplied by, for what the queue's rows stand for: nothing (an
    /// empty list) without a queue.
    pub fn gradient_weight(&self, items: &[u64]) -> Fallible<Vec<f32>> {
        let Some(ByPopularity { in_batch, queued, frequencies }) = self.by_popularity else { return Ok(Vec::new()) };
        if queued == 0 {
            return Ok(Vec::new());
        }
        let popularity = frequencies.log_q(items);
        let sampled: Vec<(usize, Vec<f32>)> =
            self.samplers.iter().map(|sampler| (sampler.draws, sampler.log_q(items))).collect();
        let mut pools = vec![(in_batch as f64, &popularity[..], true), (queued as f64, &popularity, false)];
        pools.extend(sampled.iter().map(|(draws, log_q)| (*draws as f64, &log_q[..], true)));
        let mut weight = vec![0.0; items.len()];
        union_gradient_weight(&pools, &mut weight)?;
        Ok(weight)
    }

    /// log Q of each item, whichever pool it is in.
    pub fn log_q(&self, items: &[u64]) -> Fallible<Vec<f32>> {
        let by_popularity = self
            .by_popularity
            .map(|ByPopularity { in_batch, queued, frequencies }| (in_batch + queued, frequencies.log_q(items)));
        let sampled = self.samplers.iter().map(|sampler| (sampler.draws, sampler.log_q(items)));
        let pools: Vec<(usize, Vec<f32>)> = by_popularity.into_iter().chain(sampled).collect();
        let total: usize = pools.iter().map(|&(draws, _)| draws).sum();
        let share = |draws: usize| match (total, self.counts) {
            // A batch of one row has no in-batch negatives: with no other pool, nothing is drawn. log_q need only be finite.
            (0, _) => 1.0,
            (_, true) => draws as f64,
            (_, false) => draws as f64 / total as f64,
        };
        let pools: Vec<(f64, &[f32])> = pools.iter().map(|(draws, log_q)| (share(*draws), &log_q[..])).collect();
        let mut out = vec![0.0; items.len()];
        union_log_q(&pools, &mut out)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frequencies::LogQ;
    use crate::negatives::Negatives;

    #[test]
    fn q_is_the_share_of_all_draws() {
        let popularity = [6u32, 3, 1, 0];
        let exact = popularity.map(|count| (count as f32 / 10.0).ln());
        let frequencies = Frequencies::new(LogQ::Exact, &exact).unwrap().unwrap();
        let list: Negatives = "uniform:20,unigram:30:0".parse().unwrap();
        let samplers: Vec<Sampler> =
            list.sampled.iter().map(|&sampled| Sampler::new(sampled, &popularity).unwrap()).collect();
        let q_of = |counts| -> Vec<f64> {
            let by_popularity = ByPopularity { in_batch: 15, queued: 35, frequencies: &frequencies };
            let union = Union { by_popularity: Some(by_popularity), samplers: &samplers, counts };
            union.log_q(&[0, 1, 2, 3]).unwrap().iter().map(|&l| f64::from(l).exp()).collect()
        };
        let (q, copies) = (q_of(false), q_of(true));
        // Of 100 draws: 50 by popularity, 20 of all four items alike, 30 of the three that are ever taken.
        for (found, expected) in q.iter().zip([0.3 + 0.05 + 0.1, 0.15 + 0.05 + 0.1, 0.05 + 0.05 + 0.1, 0.05]) {
            assert!((found - expected).abs() < 1e-6, "{q:?}");
        }
        for (q, copies) in q.iter().zip(&copies) {
            assert!((copies - 100.0 * q).abs() < 1e-4, "{copies} {q}");
        }
        let by_popularity = ByPopularity { in_batch: 15, queued: 35, frequencies: &frequencies };
        let union = Union { by_popularity: Some(by_popularity), samplers: &samplers, counts: false };
        // Of the 45, 30, 20 and 5 copies of each item, 21, 10.5, 3.5 and 0 are in the queue.
        let expected = [45.0 / 24.0, 30.0 / 19.5, 20.0 / 16.5, 1.0];
        for (found, expected) in union.gradient_weight(&[0, 1, 2, 3]).unwrap().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    /// The old and plain case: in-batch negatives alone have the frequencies themselves, to the bit, and so for one row.
    #[test]
    fn one_pool_has_its_own_q() {
        let exact = [0.3f32.ln(), 0.7f32.ln()];
        let frequencies = Frequencies::new(LogQ::Exact, &exact).unwrap().unwrap();
        for draws in [511, 0] {
            let by_popularity = ByPopularity { in_batch: draws, queued: 0, frequencies: &frequencies };
            let union = Union { by_popularity: Some(by_popularity), samplers: &[], counts: false };
            assert!(union.gradient_weight(&[1, 0]).unwrap().is_empty());
            assert_eq!(union.log_q(&[1, 0]).unwrap(), [exact[1], exact[0]]);
        }
    }
}
