//! Ranking of held-out targets over the whole catalogue, and what is recommended.
//!
//! A target's rank is its place among all items that the user had not taken before. Ties count against it.

use catalog_softmax::{Backend, Batch, Embeddings, Loss, Output, Pool, Request, Similarity};
use rayon::prelude::*;

use crate::Fallible;
use crate::model::{Activations, Model};
use crate::objective::ExcludedItems;
use crate::split::{Example, Split};

/// Rows that are ranked in one call.
const BLOCK: usize = 1024;
/// How many items are recommended to a user.
const TOP: usize = 10;

/// Means over the held-out targets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ranking {
    pub recall_at_10: f64,
    pub recall_at_100: f64,
    pub ndcg_at_10: f64,
    pub mrr: f64,
}

impl Ranking {
    /// `ranks` count from 0, the top.
    fn of(ranks: &[u64]) -> Ranking {
        let mean = |value: fn(f64) -> f64| ranks.iter().map(|&r| value(r as f64)).sum::<f64>() / ranks.len() as f64;
        Ranking {
            recall_at_10: mean(|r| f64::from(r < 10.0)),
            recall_at_100: mean(|r| f64::from(r < 100.0)),
            ndcg_at_10: mean(|r| if r < 10.0 { 1.0 / (r + 2.0).log2() } else { 0.0 }),
            mrr: mean(|r| 1.0 / (r + 1.0)),
        }
    }
}

/// What the users of the held-out targets are recommended: the [`TOP`] items that they had not taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recommended {
    /// Training interactions of a recommended item, on average.
    pub popularity: f64,
    /// Share of the catalogue that is recommended to somebody.
    pub coverage: f64,
}

/// Ranks the targets of `examples` as the model scores them.
pub fn rank(
    model: &Model,
    split: &Split,
    examples: &[Example],
    history: usize,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<Ranking> {
    let mut activations = Activations::default();
    let mut ranks = Vec::with_capacity(examples.len());
    for block in examples.chunks(BLOCK) {
        let histories: Vec<&[u32]> = block.iter().map(|&example| split.history(example, history)).collect();
        model.queries(&histories, &mut activations);
        let queries = Embeddings::new(&activations.queries, block.len(), model.dim());
        let items = Embeddings::new(&model.items.values, model.items.rows, model.dim());
        rank_block(queries, items, Similarity::Cosine, split, block, backend, &mut ranks)?;
    }
    Ok(Ranking::of(&ranks))
}

/// The same for the baseline that ranks by popularity alone: embeddings of one dimension, the training count.
pub fn rank_by_popularity(split: &Split, backend: &mut dyn Backend<Real = f32>) -> Fallible<Ranking> {
    let popularity: Vec<f32> = split.popularity.iter().map(|&count| count as f32).collect();
    let mut ranks = Vec::with_capacity(split.test.len());
    for block in split.test.chunks(BLOCK) {
        let ones = vec![1.0; block.len()];
        let queries = Embeddings::new(&ones, block.len(), 1);
        let items = Embeddings::new(&popularity, popularity.len(), 1);
        rank_block(queries, items, Similarity::Dot, split, block, backend, &mut ranks)?;
    }
    Ok(Ranking::of(&ranks))
}

fn rank_block(
    queries: Embeddings<'_>,
    items: Embeddings<'_>,
    similarity: Similarity,
    split: &Split,
    block: &[Example],
    backend: &mut dyn Backend<Real = f32>,
    ranks: &mut Vec<u64>,
) -> Fallible<()> {
    let ids: Vec<u64> = (0..items.rows() as u64).collect();
    let targets: Vec<u32> = block.iter().map(|&example| split.target(example)).collect();
    let mut taken = ExcludedItems::default();
    taken.set(block.iter().map(|&example| split.before(example)));
    let batch = Batch::builder(queries, Pool::new(items).ids(&ids))
        .positives(&targets)
        .excluded_ids(&taken.offsets, &taken.ids)
        .build()?;
    let mut output = Output::default();
    // Any temperature ranks alike.
    backend.compute(&batch, &Loss::softmax(similarity, 1.0), Request::value().with_rank(), &mut output)?;
    let rank = output.statistics.rank.ok_or("the backend returned no ranks")?;
    ranks.extend(rank.above.iter().zip(&rank.ties).map(|(above, ties)| above + ties));
    Ok(())
}

/// Popularity and coverage of what the model recommends to the users of the test targets.
pub fn recommended(model: &Model, split: &Split, history: usize) -> Recommended {
    let mut activations = Activations::default();
    let histories: Vec<&[u32]> = split.test.iter().map(|&example| split.history(example, history)).collect();
    model.queries(&histories, &mut activations);
    let dim = model.dim();
    let unit_items: Vec<f32> = model.items.values.chunks_exact(dim).flat_map(unit).collect();
    let tops = split.test.par_iter().zip(activations.queries.par_chunks_exact(dim)).map(|(&example, query)| {
        // The query's length is the same for all items of a user.
        let score = |item: &[f32]| query.iter().zip(item).map(|(q, c)| q * c).sum::<f32>();
        top(unit_items.chunks_exact(dim).map(score), split.before(example))
    });
    summarise(tops.collect(), split)
}

/// The same for the baseline.
pub fn recommended_by_popularity(split: &Split) -> Recommended {
    let scores = || split.popularity.iter().map(|&count| count as f32);
    summarise(split.test.iter().map(|&example| top(scores(), split.before(example))).collect(), split)
}

/// Training interactions of a test target, on average: what the popularity of recommendations is to be held against.
pub fn target_popularity(split: &Split) -> f64 {
    let of_target = |&example: &Example| f64::from(split.popularity[split.target(example) as usize]);
    split.test.iter().map(of_target).sum::<f64>() / split.test.len() as f64
}

/// The [`TOP`] best items outside `taken`; equal scores go to the lower index.
fn top(scores: impl Iterator<Item = f32>, taken: &[u32]) -> Vec<u32> {
    let mut scored: Vec<(f32, u32)> = scores.zip(0..).collect();
    for &item in taken {
        scored[item as usize].0 = f32::NEG_INFINITY;
    }
    let best_first = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if scored.len() > TOP {
        scored.select_nth_unstable_by(TOP, best_first);
        scored.truncate(TOP);
    }
    scored.into_iter().filter(|scored| scored.0 > f32::NEG_INFINITY).map(|scored| scored.1).collect()
}

fn summarise(tops: Vec<Vec<u32>>, split: &Split) -> Recommended {
    let mut recommended = vec![false; split.num_items()];
    let (mut interactions, mut count) = (0.0, 0.0);
    for &item in tops.iter().flatten() {
        recommended[item as usize] = true;
        interactions += f64::from(split.popularity[item as usize]);
        count += 1.0;
    }
    let covered = recommended.iter().filter(|&&is| is).count();
    Recommended { popularity: interactions / f64::max(count, 1.0), coverage: covered as f64 / split.num_items() as f64 }
}

fn unit(row: &[f32]) -> impl Iterator<Item = f32> {
    let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
    row.iter().map(move |x| x / norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sequences;
    use catalog_softmax::Cpu;

    #[test]
    fn metrics_of_known_ranks() {
        let ranking = Ranking::of(&[0, 2, 50, 200]);
        assert_eq!((ranking.recall_at_10, ranking.recall_at_100), (0.5, 0.75));
        assert!((ranking.ndcg_at_10 - (1.0 + 0.5) / 4.0).abs() < 1e-12);
        assert!((ranking.mrr - (1.0 + 1.0 / 3.0 + 1.0 / 51.0 + 1.0 / 201.0) / 4.0).abs() < 1e-12);
    }

    #[test]
    fn the_popularity_baseline_leaves_out_what_was_taken() {
        // Training interactions: item 0 three times, 1 twice, 2 and 3 once, 4 never.
        let of_user = vec![vec![0, 1, 4, 2], vec![0, 2], vec![0, 1], vec![3]];
        let item_names = (0..5).map(|i| i.to_string()).collect();
        let split = Split::new(Sequences { of_user, item_names }).unwrap();
        assert_eq!(split.popularity, [3, 2, 1, 1, 0]);
        // The target, item 2, has taken items above it and ties with item 3: second place at its worst.
        let ranking = rank_by_popularity(&split, &mut Cpu::new()).unwrap();
        assert_eq!(ranking.mrr, 0.5);
        // Left to recommend: items 2 and 3.
        assert_eq!(recommended_by_popularity(&split), Recommended { popularity: 1.0, coverage: 0.4 });
    }

    #[test]
    fn top_takes_the_best_and_breaks_ties_by_index() {
        let scores = (0..30).map(|i| if i % 2 == 0 { 1.0 } else { i as f32 });
        let mut best = top(scores, &[29, 27]);
        best.sort_unstable();
        assert_eq!(best, [7, 9, 11, 13, 15, 17, 19, 21, 23, 25]);
    }
}
