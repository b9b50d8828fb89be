//! Items drawn from the catalogue: one of the crate's distributions with the items that it is about.

use catalog_softmax::negatives::{Distribution, LogUniform, RandomStream, Uniform, Unigram};

use crate::Fallible;
use crate::negatives::{Sampled, Source};

#[derive(Debug)]
pub struct Sampler {
    distribution: Box<dyn Distribution>,
    /// Where the distribution is over ranks by falling popularity.
    ranking: Option<PopularityRanking>,
    /// That a row is compared with.
    pub draws: usize,
    /// Whether each row has draws of its own.
    pub per_row: bool,
}

/// A catalogue sorted by popularity, both ways.
#[derive(Debug)]
struct PopularityRanking {
    item_of_rank: Vec<u32>,
    rank_of_item: Vec<u32>,
}

impl Sampler {
    /// `popularity` (N) has the training interactions of each item.
    pub fn new(sampled: Sampled, popularity: &[u32]) -> Fallible<Self> {
        let num_items = popularity.len() as u64;
        let distribution: Box<dyn Distribution> = match sampled.from {
            Source::Uniform => Box::new(Uniform::new(num_items)?),
            Source::LogUniform => Box::new(LogUniform::new(num_items)?),
            Source::Unigram { exponent } => {
                let counts: Vec<f64> = popularity.iter().map(|&count| f64::from(count)).collect();
                Box::new(Unigram::new(&counts, exponent)?)
            }
        };
        let ranking = (sampled.from == Source::LogUniform).then(|| PopularityRanking::new(popularity));
        Ok(Sampler { distribution, ranking, draws: sampled.draws, per_row: sampled.per_row })
    }

    /// A step's draws: all rows' together, or those of one row after the other's.
    pub fn draw(&self, num_queries: usize, random: &mut RandomStream) -> Fallible<Vec<u32>> {
        let draws = if self.per_row { num_queries * self.draws } else { self.draws };
        let drawn = self.distribution.draw(draws, random)?.ids.into_iter().map(|id| id as u32);
        Ok(match &self.ranking {
            None => drawn.collect(),
            Some(ranking) => drawn.map(|rank| ranking.item_of_rank[rank as usize]).collect(),
        })
    }

    /// log Q of each item per draw, −∞ for one that is never drawn.
    pub fn log_q(&self, items: &[u64]) -> Vec<f32> {
        match &self.ranking {
            None => self.distribution.log_probabilities(items),
            Some(ranking) => self.distribution.log_probabilities(&ranking.ranks(items)),
        }
    }
}

impl PopularityRanking {
    /// Items of equal popularity in the order of their indices.
    fn new(popularity: &[u32]) -> Self {
        let mut item_of_rank: Vec<u32> = (0..popularity.len() as u32).collect();
        item_of_rank.sort_by_key(|&item| std::cmp::Reverse(popularity[item as usize]));
        let mut rank_of_item = vec![0; popularity.len()];
        item_of_rank.iter().zip(0..).for_each(|(&item, rank)| rank_of_item[item as usize] = rank);
        PopularityRanking { item_of_rank, rank_of_item }
    }

    fn ranks(&self, items: &[u64]) -> Vec<u64> {
        items.iter().map(|&item| u64::from(self.rank_of_item[item as usize])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares of many draws against exp(log_q), within five standard deviations.
    #[test]
    fn items_are_drawn_as_often_as_log_q_says() {
        let popularity = [3, 0, 40, 9, 9];
        let all: Vec<u64> = (0..5).collect();
        for from in [Source::Uniform, Source::Unigram { exponent: 0.5 }, Source::LogUniform] {
            let draws = 200_000;
            let sampler = Sampler::new(Sampled { from, draws, per_row: false }, &popularity).unwrap();
            let mut counts = [0u32; 5];
            let items = sampler.draw(7, &mut RandomStream::new(11, 0)).unwrap();
            assert_eq!(items.len(), draws);
            items.iter().for_each(|&item| counts[item as usize] += 1);
            let q: Vec<f64> = sampler.log_q(&all).iter().map(|&log_q| f64::from(log_q).exp()).collect();
            assert!((q.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{from:?} {q:?}");
            for (&count, &q) in counts.iter().zip(&q) {
                let deviation = (draws as f64 * q * (1.0 - q)).sqrt();
                assert!((f64::from(count) - draws as f64 * q).abs() <= 5.0 * deviation, "{from:?} {counts:?} {q:?}");
            }
            match from {
                Source::Uniform => assert!(q.iter().all(|q| (q - 0.2).abs() < 1e-6)),
                Source::Unigram { .. } => assert!(q[1] == 0.0 && (q[2] / q[3] - (40.0f64 / 9.0).sqrt()).abs() < 1e-6),
                // The most popular item has rank 0: log 2 / log 6.
                Source::LogUniform => assert!((q[2] - 2.0f64.ln() / 6.0f64.ln()).abs() < 1e-6 && q[1] < q[0]),
            }
        }
    }
}
