//! Ranking of held-out targets over the whole catalogue, and what is recommended.
//!
//! A target's rank is its place among all items that the user had not taken before. Ties count against it.
//!
//! Metrics are means over queries. A query of one target has its exact rank, however far down. Where queries have
//! several, places come from lists of the best [`LISTED`] items: Recall@K is the share of a query's targets among the
//! first K, and NDCG@K divides by the gain of a list that begins with the targets, as published tables of given splits
//! do; MRR then counts a query without a target in its list as 0.

use catalog_softmax::{Backend, Batch, Embeddings, Loss, Output, Pool, Request, Search, Similarity, TopK, evaluation};

use crate::Fallible;
use crate::model::{Activations, Model};
use crate::objective::ItemLists;
use crate::split::{Example, HeldOut, Split};

/// Rows that are ranked in one call.
pub const BLOCK: usize = 1024;
/// How many items are recommended to a user.
pub const TOP: usize = 10;
/// The length of lists for metrics: more than any metric's K, so that few ties are cut off at their end.
const LISTED: usize = 200;

/// Means over held-out queries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankingMetrics {
    pub recall_at_10: f64,
    pub recall_at_20: f64,
    pub recall_at_100: f64,
    pub ndcg_at_10: f64,
    pub ndcg_at_20: f64,
    pub mrr: f64,
}

impl RankingMetrics {
    /// A catalogue of fewer than K items has no places past its end.
    fn of(ranks: &evaluation::Ranking, num_items: usize) -> catalog_softmax::Result<RankingMetrics> {
        let recall = |k: usize| ranks.recall_at(k.min(num_items));
        let ndcg = |k: usize| ranks.ndcg_at(k.min(num_items));
        Ok(RankingMetrics {
            recall_at_10: recall(10)?,
            recall_at_20: recall(20)?,
            recall_at_100: recall(100)?,
            ndcg_at_10: ndcg(10)?,
            ndcg_at_20: ndcg(20)?,
            mrr: ranks.mrr(),
        })
    }
}

/// What the users of the held-out targets are recommended: the [`TOP`] items that they had not taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecommendedMetrics {
    /// Training interactions of a recommended item, on average.
    pub popularity: f64,
    /// Share of the catalogue that is recommended to somebody.
    pub coverage: f64,
}

/// What items are ranked by.
#[derive(Clone, Copy)]
pub enum Scorer<'a> {
    /// Cosine of the towers, of which the query tower sees so many of the user's last items.
    Model(&'a Model, usize),
    /// The number of training interactions, alike for every user.
    Popularity,
}

/// Queries and items as the crate scores them.
struct Towers {
    scored: Similarity,
    dim: usize,
    /// (queries, dim), of one block.
    queries: Vec<f32>,
    /// (N, dim) where they are not the model's.
    popularity: Vec<f32>,
}

impl Scorer<'_> {
    fn towers(&self, split: &Split) -> Towers {
        let (scored, dim, popularity) = match self {
            Scorer::Model(model, _) => (Similarity::Cosine, model.dim(), Vec::new()),
            Scorer::Popularity => (Similarity::Dot, 1, split.popularity.iter().map(|&count| count as f32).collect()),
        };
        Towers { scored, dim, queries: Vec::new(), popularity }
    }

    /// Queries and items of a block.
    fn embed<'t>(&'t self, split: &Split, block: &[Example], towers: &'t mut Towers) -> [Embeddings<'t>; 2] {
        let (items, num_items) = match self {
            Scorer::Model(model, history) => {
                let histories: Vec<&[u32]> = block.iter().map(|&query| split.history(query, *history)).collect();
                let mut activations = Activations::default();
                model.queries(&histories, &mut activations);
                towers.queries = activations.queries;
                (&model.items.values, model.items.rows)
            }
            Scorer::Popularity => {
                towers.queries = vec![1.0; block.len()];
                (&towers.popularity, split.num_items())
            }
        };
        [Embeddings::new(&towers.queries, block.len(), towers.dim), Embeddings::new(items, num_items, towers.dim)]
    }
}

/// Ranks the targets.
pub fn rank(
    scorer: Scorer<'_>,
    split: &Split,
    held_out: &HeldOut,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<RankingMetrics> {
    let mut towers = scorer.towers(split);
    let mut ranks = evaluation::Ranking::default();
    for (block, queries) in held_out.queries.chunks(BLOCK).enumerate() {
        let similarity = towers.scored;
        let embeddings = scorer.embed(split, queries, &mut towers);
        let offsets = &held_out.offsets[block * BLOCK..][..queries.len() + 1];
        let targets = &held_out.targets[offsets[0]..offsets[queries.len()]];
        ranks.append(if held_out.one_each() {
            exact_ranks(embeddings, similarity, split, queries, targets, backend)?
        } else {
            let top = top(embeddings, similarity, split, queries, LISTED, backend)?;
            let offsets: Vec<i64> = offsets.iter().map(|offset| (offset - offsets[0]) as i64).collect();
            evaluation::Ranking::in_lists(&top, &offsets, targets)?
        })?;
    }
    Ok(RankingMetrics::of(&ranks, split.num_items())?)
}

fn exact_ranks(
    [queries, items]: [Embeddings<'_>; 2],
    similarity: Similarity,
    split: &Split,
    block: &[Example],
    targets: &[u32],
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<evaluation::Ranking> {
    let mut taken = ItemLists::default();
    taken.set(block.iter().map(|&query| split.before(query)));
    let batch =
        Batch::of_table(queries, items).positives(targets).excluded_ids(&taken.offsets, &taken.items).build()?;
    let mut output = Output::default();
    // Any temperature ranks alike.
    backend.compute(&batch, &Loss::softmax(similarity, 1.0), Request::value().with_rank(), &mut output, None)?;
    Ok(evaluation::Ranking::of_positives(&output.statistics)?)
}

/// Popularity and coverage of what is recommended to the users of the test targets.
pub fn recommended(
    scorer: Scorer<'_>,
    split: &Split,
    backend: &mut dyn Backend<Real = f32>,
) -> Fallible<RecommendedMetrics> {
    let mut towers = scorer.towers(split);
    let mut counts = evaluation::Recommended::new(split.num_items())?;
    for block in split.test.queries.chunks(BLOCK) {
        let similarity = towers.scored;
        let embeddings = scorer.embed(split, block, &mut towers);
        counts.add(&top(embeddings, similarity, split, block, TOP, backend)?)?;
    }
    let popularity: Vec<f64> = split.popularity.iter().map(|&count| f64::from(count)).collect();
    Ok(RecommendedMetrics { popularity: counts.mean_popularity(&popularity)?, coverage: counts.coverage() })
}

/// Training interactions of a test target, on average: what the popularity of recommendations is to be held against.
pub fn target_popularity(split: &Split) -> f64 {
    let of_target = |&target: &u32| f64::from(split.popularity[target as usize]);
    split.test.targets.iter().map(of_target).sum::<f64>() / split.test.targets.len() as f64
}

/// The `k` best items that each user has not taken.
pub fn top(
    [queries, items]: [Embeddings<'_>; 2],
    similarity: Similarity,
    split: &Split,
    block: &[Example],
    k: usize,
    backend: &mut dyn Backend<Real = f32>,
) -> catalog_softmax::Result<TopK> {
    let ids: Vec<u64> = (0..items.rows() as u64).collect();
    let mut taken = ItemLists::default();
    taken.set(block.iter().map(|&query| split.before(query)));
    let search =
        Search::builder(queries, Pool::new(items).ids(&ids)).excluded_ids(&taken.offsets, &taken.items).build()?;
    backend.top_k(&search, similarity, k.min(items.rows()).min(Search::MAX_K))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Given, Sequences};
    use catalog_softmax::Cpu;

    fn sequences(of_user: Vec<Vec<u32>>, num_items: usize) -> Sequences {
        Sequences { of_user, item_names: (0..num_items).map(|i| i.to_string()).collect() }
    }

    #[test]
    fn the_popularity_baseline_leaves_out_what_was_taken() {
        // Training interactions: item 0 three times, 1 twice, 2 and 3 once, 4 never.
        let of_user = vec![vec![0, 1, 4, 2], vec![0, 2], vec![0, 1], vec![3]];
        let split = Split::new(sequences(of_user, 5)).unwrap();
        assert_eq!(split.popularity, [3, 2, 1, 1, 0]);
        // The target, item 2, has taken items above it and ties with item 3: second place at its worst.
        let ranking = rank(Scorer::Popularity, &split, &split.test, &mut Cpu::new()).unwrap();
        assert_eq!(ranking.mrr, 0.5);
        // Left to recommend: items 2 and 3.
        let recommended = recommended(Scorer::Popularity, &split, &mut Cpu::new()).unwrap();
        assert_eq!(recommended, RecommendedMetrics { popularity: 1.0, coverage: 0.4 });
    }

    /// Recall@20 and NDCG@20 of several targets for each user, by hand.
    #[test]
    fn a_given_split_is_measured_as_its_tables_do() {
        // 60 items. Item j from 1 to 40 is taken by 41 - j of the users 2 to 41; so that popularity ranks them 1, 2,
        // ..., 40. User 0 took items 1 and 2, user 1 took item 50: they add one to items 1, 2 and 50.
        let filler = (2..42).map(|user: u32| (1..=40).filter(|item| user - 2 < 41 - item).collect::<Vec<u32>>());
        let mut of_user = vec![vec![2, 1], vec![50]];
        of_user.extend(filler);
        let trained: Vec<usize> = of_user.iter().map(Vec::len).collect();
        let mut test = vec![Vec::new(); of_user.len()];
        // Without items 1 and 2, user 0's list is 3, 4, ..., 22: items 3 and 22 are its first and twentieth, 23 is past
        // it, and 55 is an item that nobody took.
        test[0] = vec![22, 3, 23, 55];
        // User 1's list is 1, 2, ..., 20: item 2 is second.
        test[1] = vec![2];
        let split = Split::given(Given { sequences: sequences(of_user, 60), trained, test }).unwrap();
        let ranking = rank(Scorer::Popularity, &split, &split.test, &mut Cpu::new()).unwrap();
        assert_eq!(ranking.recall_at_20, (2.0 / 4.0 + 1.0) / 2.0);
        let gain = |place: f64| 1.0 / place.log2();
        let ideal = gain(2.0) + gain(3.0) + gain(4.0) + gain(5.0);
        let expected = ((gain(2.0) + gain(21.0)) / ideal + gain(3.0)) / 2.0;
        assert!((ranking.ndcg_at_20 - expected).abs() < 1e-12, "{ranking:?} {expected}");
        assert_eq!(ranking.recall_at_10, (1.0 / 4.0 + 1.0) / 2.0);
        assert_eq!(ranking.mrr, (1.0 + 0.5) / 2.0);
        // The whole list is 57 long and has item 55 in it.
        assert_eq!(ranking.recall_at_100, 1.0);
    }

    #[test]
    fn blocks_of_queries_keep_their_targets() {
        // More users than a block. All take items 0 and 4, and user 0 takes item 1, which is so before 2 and 3, a tie.
        let n = BLOCK + 300;
        let of_user = (0..n).map(|user| if user == 0 { vec![4, 0, 1] } else { vec![4, 0] });
        let test = |user: usize| match user {
            BLOCK.. => vec![1],
            _ if user.is_multiple_of(2) => vec![2, 3],
            _ => vec![3],
        };
        let sequences = sequences(of_user.collect(), 5);
        let trained = sequences.of_user.iter().map(Vec::len).collect();
        let split = Split::given(Given { sequences, trained, test: (0..n).map(test).collect() }).unwrap();
        let ranking = rank(Scorer::Popularity, &split, &split.test, &mut Cpu::new()).unwrap();
        assert_eq!((ranking.recall_at_10, ranking.recall_at_20), (1.0, 1.0));
        // First of all for user 0 and for the users after the first block. In the tie the worst order counts: second and
        // third place, or third alone.
        let half = (BLOCK / 2) as f64;
        let sum = 1.0 + (half - 1.0) / 2.0 + half / 3.0 + 300.0;
        assert!((ranking.mrr - sum / n as f64).abs() < 1e-12, "{ranking:?}");
    }
}
