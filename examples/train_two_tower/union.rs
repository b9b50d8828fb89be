//! One Q for all the pools of a step.
//!
//! An item may come from any pool, so that its Q is that of a draw from all of them: with `n_k` draws from `Q_k` in pool k,
//! `Q = Σ_k n_k Q_k / Σ_k n_k`, see [`union_log_q`](catalog_softmax::negatives::union_log_q). This probability per draw is what
//! `corrected-logq` needs, and `logq` does not mind a constant factor. `logq-negatives-only` needs the expected number of
//! copies, `Σ_k n_k Q_k`.
//!
//! A queue's rows have no gradient, and with one Q they stand for a share of each item's: see
//! [`union_gradient_weight`](catalog_softmax::negatives::union_gradient_weight).

use catalog_softmax::negatives::{union_gradient_weight, union_log_q};

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
    /// What is expected of these items in each pool.
    pub fn of(&self, items: &[u64]) -> Copies {
        let mut pools = Vec::new();
        if let Some(ByPopularity { in_batch, queued, frequencies }) = self.by_popularity {
            let log_q = frequencies.log_q(items);
            if queued > 0 {
                pools.push(Pool { draws: queued, log_q: log_q.clone(), gradient: false });
            }
            pools.push(Pool { draws: in_batch, log_q, gradient: true });
        }
        pools.extend(self.samplers.iter().map(|s| Pool { draws: s.draws, log_q: s.log_q(items), gradient: true }));
        Copies { pools, counts: self.counts, items: items.len() }
    }
}

/// Some items in each of the pools.
pub struct Copies {
    pools: Vec<Pool>,
    counts: bool,
    items: usize,
}

struct Pool {
    draws: usize,
    /// log Q of each item per draw.
    log_q: Vec<f32>,
    gradient: bool,
}

impl Copies {
    /// log Q of each item in the union, whichever pool it is in.
    pub fn log_q(&self) -> Fallible<Vec<f32>> {
        let total: usize = self.pools.iter().map(|pool| pool.draws).sum();
        let share = |draws: usize| match (total, self.counts) {
            // A batch of one row has no in-batch negatives: with no other pool, nothing is drawn. log_q need only be finite.
            (0, _) => 1.0,
            (_, true) => draws as f64,
            (_, false) => draws as f64 / total as f64,
        };
        let pools: Vec<(f64, &[f32])> = self.pools.iter().map(|pool| (share(pool.draws), &pool.log_q[..])).collect();
        let mut out = vec![0.0; self.items];
        union_log_q(&pools, &mut out)?;
        Ok(out)
    }

    /// What the gradients of candidates of these items are to be multiplied by, for what the queue's rows stand for: nothing (an
    /// empty list) without a queue, and where nothing else is drawn, as in-batch for one row.
    pub fn gradient_weight(&self) -> Fallible<Vec<f32>> {
        let nothing_else = self.pools.iter().all(|pool| !pool.gradient || pool.draws == 0);
        if nothing_else || self.pools.iter().all(|pool| pool.gradient) {
            return Ok(Vec::new());
        }
        let pools: Vec<(f64, &[f32], bool)> =
            self.pools.iter().map(|pool| (pool.draws as f64, &pool.log_q[..], pool.gradient)).collect();
        let mut weight = vec![0.0; self.items];
        union_gradient_weight(&pools, &mut weight)?;
        Ok(weight)
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
            union.of(&[0, 1, 2, 3]).log_q().unwrap().iter().map(|&l| f64::from(l).exp()).collect()
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
        for (found, expected) in union.of(&[0, 1, 2, 3]).gradient_weight().unwrap().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
        // A batch of one row draws nothing in-batch.
        let by_popularity = ByPopularity { in_batch: 0, queued: 35, frequencies: &frequencies };
        let union = Union { by_popularity: Some(by_popularity), samplers: &[], counts: false };
        assert!(union.of(&[0]).gradient_weight().unwrap().is_empty());
    }

    /// The old and plain case: in-batch negatives alone have the frequencies themselves, to the bit, and so for one row.
    #[test]
    fn one_pool_has_its_own_q() {
        let exact = [0.3f32.ln(), 0.7f32.ln()];
        let frequencies = Frequencies::new(LogQ::Exact, &exact).unwrap().unwrap();
        for draws in [511, 0] {
            let by_popularity = ByPopularity { in_batch: draws, queued: 0, frequencies: &frequencies };
            let union = Union { by_popularity: Some(by_popularity), samplers: &[], counts: false };
            let copies = union.of(&[1, 0]);
            assert_eq!(copies.log_q().unwrap(), [exact[1], exact[0]]);
            assert!(copies.gradient_weight().unwrap().is_empty());
        }
    }
}
