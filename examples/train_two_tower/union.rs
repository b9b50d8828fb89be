//! One Q for all the pools of a step.
//!
//! An item may come from any pool, so that its Q is that of a draw from all of them: with `n_k` draws from `Q_k` in pool k,
//! `Q = Σ_k n_k Q_k / Σ_k n_k`, see [`union_log_q`](catalog_softmax::union_log_q). This probability per draw is what
//! `corrected-logq` needs, and `logq` does not mind a constant factor. `logq-negatives-only` needs the expected number of
//! copies, `Σ_k n_k Q_k`.

use catalog_softmax::union_log_q;

use crate::Fallible;
use crate::frequencies::Frequencies;
use crate::sampler::Sampler;

/// What a step draws.
pub struct Union<'a> {
    /// Draws by the frequency of targets, and that frequency: B − 1 other targets for each row, and the queue's rows now.
    pub by_popularity: Option<(usize, &'a Frequencies<'a>)>,
    pub samplers: &'a [Sampler],
    /// Expected counts in place of probabilities per draw.
    pub counts: bool,
}

impl Union<'_> {
    /// log Q of each item, whichever pool it is in.
    pub fn log_q(&self, items: &[u64]) -> Fallible<Vec<f32>> {
        let by_popularity = self.by_popularity.map(|(draws, frequencies)| (draws, frequencies.log_q(items)));
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
            let union = Union { by_popularity: Some((50, &frequencies)), samplers: &samplers, counts };
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
    }

    /// The old and plain case: in-batch negatives alone have the frequencies themselves, to the bit, and so for one row.
    #[test]
    fn one_pool_has_its_own_q() {
        let exact = [0.3f32.ln(), 0.7f32.ln()];
        let frequencies = Frequencies::new(LogQ::Exact, &exact).unwrap().unwrap();
        for draws in [511, 0] {
            let union = Union { by_popularity: Some((draws, &frequencies)), samplers: &[], counts: false };
            assert_eq!(union.log_q(&[1, 0]).unwrap(), [exact[1], exact[0]]);
        }
    }
}
