//! Ranking of held-out targets over the whole catalogue, and what is recommended.
//!
//! A target's rank is its place among all items that the user had not taken before. Ties count against it.

use catalog_softmax::{Backend, Batch, Embeddings, Loss, Output, Pool, Request, Similarity, TopK, metrics};

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
    fn of(ranks: &metrics::Ranking) -> Ranking {
        Ranking {
            recall_at_10: ranks.recall_at(10),
            recall_at_100: ranks.recall_at(100),
            ndcg_at_10: ranks.ndcg_at(10),
            mrr: ranks.mrr(),
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
    let mut ranks = metrics::Ranking::default();
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
    let mut ranks = metrics::Ranking::default();
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
    ranks: &mut metrics::Ranking,
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
    ranks.append(metrics::Ranking::of_positives(&output.statistics)?);
    Ok(())
}

/// Popularity and coverage of what the model recommends to the users of the test targets.
pub fn recommended(
    model: &Model,
    split: &Split,
    history: usize,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<Recommended> {
    let mut activations = Activations::default();
    let mut counts = metrics::Recommended::new(split.num_items())?;
    for block in split.test.chunks(BLOCK) {
        let histories: Vec<&[u32]> = block.iter().map(|&example| split.history(example, history)).collect();
        model.queries(&histories, &mut activations);
        let queries = Embeddings::new(&activations.queries, block.len(), model.dim());
        let items = Embeddings::new(&model.items.values, model.items.rows, model.dim());
        counts.add(&top(queries, items, Similarity::Cosine, split, block, backend)?)?;
    }
    summarise(&counts, split)
}

/// The same for the baseline.
pub fn recommended_by_popularity(split: &Split, backend: &mut dyn Backend<Real = f32>) -> Fallible<Recommended> {
    let popularity: Vec<f32> = split.popularity.iter().map(|&count| count as f32).collect();
    let mut counts = metrics::Recommended::new(split.num_items())?;
    for block in split.test.chunks(BLOCK) {
        let ones = vec![1.0; block.len()];
        let queries = Embeddings::new(&ones, block.len(), 1);
        let items = Embeddings::new(&popularity, popularity.len(), 1);
        counts.add(&top(queries, items, Similarity::Dot, split, block, backend)?)?;
    }
    summarise(&counts, split)
}

/// Training interactions of a test target, on average: what the popularity of recommendations is to be held against.
pub fn target_popularity(split: &Split) -> f64 {
    let of_target = |&example: &Example| f64::from(split.popularity[split.target(example) as usize]);
    split.test.iter().map(of_target).sum::<f64>() / split.test.len() as f64
}

/// The [`TOP`] best items that each user has not taken.
fn top(
    queries: Embeddings<'_>,
    items: Embeddings<'_>,
    similarity: Similarity,
    split: &Split,
    block: &[Example],
    backend: &mut dyn Backend<Real = f32>,
) -> catalog_softmax::Result<TopK> {
    let ids: Vec<u64> = (0..items.rows() as u64).collect();
    let mut taken = ExcludedItems::default();
    taken.set(block.iter().map(|&example| split.before(example)));
    let search =
        Batch::builder(queries, Pool::new(items).ids(&ids)).excluded_ids(&taken.offsets, &taken.ids).search()?;
    backend.top_k(&search, similarity, TOP.min(items.rows()))
}

fn summarise(counts: &metrics::Recommended, split: &Split) -> Fallible<Recommended> {
    let popularity: Vec<f64> = split.popularity.iter().map(|&count| f64::from(count)).collect();
    Ok(Recommended { popularity: counts.mean_popularity(&popularity)?, coverage: counts.coverage() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sequences;
    use catalog_softmax::Cpu;

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
        let recommended = recommended_by_popularity(&split, &mut Cpu::new()).unwrap();
        assert_eq!(recommended, Recommended { popularity: 1.0, coverage: 0.4 });
    }
}
