//! Metrics against their definitions, counted by hand and by enumeration.

use catalog_softmax::evaluation::{Ranking, Recommended};
use catalog_softmax::{Backend, Cpu, DType, Error, Reference, Request, Similarity, TopK};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::topk::{SearchData, Values};

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() < 1e-12
}

/// Lists of the given scores: candidate j of a row has `scores[j]`, by embeddings of one dimension.
fn lists(scores: &[&[f32]], k: usize) -> TopK {
    // Row i sees only the candidates' coordinate i.
    let (b, n) = (scores.len(), scores[0].len());
    let mut data = SearchData::new(b, &[n], b, DType::F32, Values::Whole, false);
    let unit = |row: usize| (0..b).map(move |i| f32::from(i == row));
    data.queries = catalog_softmax_testing::problem::Storage::F32((0..b).flat_map(unit).collect());
    let candidate = |j: usize| scores.iter().map(move |row| row[j]);
    data.pools[0].0 = catalog_softmax_testing::problem::Storage::F32((0..n).flat_map(candidate).collect());
    data.top_k(&mut Cpu::new(), k)
}

#[test]
fn one_relevant_item_by_hand() {
    // Places 0, 2 and none of four.
    let scores: [&[f32]; 3] = [&[9., 1., 2., 3., 4., 5.], &[3., 5., 4., 0., 1., 2.], &[0., 1., 2., 3., 4., 5.]];
    let ranking = Ranking::in_lists(&lists(&scores, 4), &[0, 1, 2, 3], &[0, 0, 0]).unwrap();
    assert_eq!(
        (ranking.recall_at(0).unwrap(), ranking.recall_at(1).unwrap(), ranking.recall_at(2).unwrap()),
        (0.0, 1.0 / 3.0, 1.0 / 3.0)
    );
    assert_eq!((ranking.recall_at(3).unwrap(), ranking.recall_at(4).unwrap()), (2.0 / 3.0, 2.0 / 3.0));
    assert!(near(ranking.mrr(), (1.0 + 1.0 / 3.0) / 3.0));
    // 1 / log2(4) is a half.
    assert!(near(ranking.ndcg_at(4).unwrap(), (1.0 + 0.5) / 3.0) && near(ranking.ndcg_at(2).unwrap(), 1.0 / 3.0));
    assert_eq!(ranking.ndcg_at(0).unwrap(), 0.0);
}

#[test]
fn several_relevant_items_by_hand() {
    let scores: [&[f32]; 3] = [&[6., 5., 4., 3., 2., 1.]; 3];
    // Places 1 and 3, with one given twice and one outside the list; the best two; and no relevant item, a row that
    // does not count.
    let ranking = Ranking::in_lists(&lists(&scores, 5), &[0, 4, 6, 6], &[3, 1, 5, 3, 1, 0]).unwrap();
    assert!(near(ranking.recall_at(2).unwrap(), (1.0 / 3.0 + 1.0) / 2.0));
    assert!(near(ranking.recall_at(5).unwrap(), (2.0 / 3.0 + 1.0) / 2.0));
    assert!(near(ranking.mrr(), (0.5 + 1.0) / 2.0));
    let gain = |place: f64| 1.0 / (place + 2.0).log2();
    let ideal = gain(0.0) + gain(1.0) + gain(2.0);
    assert!(near(ranking.ndcg_at(5).unwrap(), ((gain(1.0) + gain(3.0)) / ideal + 1.0) / 2.0));
    assert_eq!(ranking.len(), 3);
    assert!(ranking.rows().eq([(&[1, 3][..], 3), (&[0, 1], 2), (&[], 0)]));
    // Of two places no list can fill three.
    assert!(near(ranking.ndcg_at(2).unwrap(), (gain(1.0) / (gain(0.0) + gain(1.0)) + 1.0) / 2.0));
}

/// Ties stand in the order that is worst: by enumeration of all orders, no other is worse.
#[test]
fn ties_flatter_nobody() {
    let scores: [&[f32]; 1] = [&[2., 2., 2., 2., 1., 1.]];
    let top = lists(&scores, 6);
    for relevant in [vec![0], vec![0, 1], vec![1, 3, 4], vec![4], vec![0, 5], vec![0, 1, 2, 3, 4, 5]] {
        let ranking = Ranking::in_lists(&top, &[0, relevant.len() as i64], &relevant).unwrap();
        for k in 1..=6 {
            let (mut recall, mut ndcg, mut mrr) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
            for order in orders(&[0, 1, 2, 3]) {
                for tail in [[4, 5], [5, 4]] {
                    let order: Vec<u32> = order.iter().copied().chain(tail).collect();
                    let (r, n, m) = by_definition(&order, &relevant, k);
                    (recall, ndcg, mrr) = (recall.min(r), ndcg.min(n), mrr.min(m));
                }
            }
            assert!(near(ranking.recall_at(k).unwrap(), recall), "{relevant:?}, recall@{k}");
            assert!(near(ranking.ndcg_at(k).unwrap(), ndcg), "{relevant:?}, ndcg@{k}");
            assert!(near(ranking.mrr(), mrr), "{relevant:?}");
        }
    }
}

fn orders(items: &[u32]) -> Vec<Vec<u32>> {
    let [_, _, ..] = items else { return vec![items.to_vec()] };
    let mut all = Vec::new();
    for &first in items {
        let rest: Vec<u32> = items.iter().copied().filter(|&item| item != first).collect();
        all.extend(orders(&rest).into_iter().map(|rest| [&[first], &rest[..]].concat()));
    }
    all
}

/// Recall@K, NDCG@K and MRR of one order.
fn by_definition(order: &[u32], relevant: &[u32], k: usize) -> (f64, f64, f64) {
    let is = |item: &u32| relevant.contains(item);
    let hits = order[..k].iter().filter(|item| is(item)).count() as f64;
    let gain = |place: usize| 1.0 / ((place + 2) as f64).log2();
    let dcg: f64 = (0..k).filter(|&place| is(&order[place])).map(gain).sum();
    let ideal: f64 = (0..k.min(relevant.len())).map(gain).sum();
    let first = order.iter().position(is).expect("a relevant item");
    (hits / relevant.len() as f64, dcg / ideal, 1.0 / (first as f64 + 1.0))
}

/// Exact ranks and a list of the whole catalogue say the same, ties included.
#[test]
fn ranks_and_lists_agree() {
    let (b, n) = (60, 400);
    for masking in [Masking::None, Masking::Ids] {
        let mut problem = Config { masking, similarity: Similarity::Dot, ..Config::new(b, n, 6) }.problem();
        // Whole numbers: exact scores, many of them equal.
        problem.queries = problem.queries.map(|q| q.iter_mut().for_each(|x| *x = x.round()));
        problem.pools[0].candidates = problem.pools[0].candidates.map(|c| c.iter_mut().for_each(|x| *x = x.round()));
        let catalog_softmax_testing::problem::PositiveData::Index(positives) = problem.positives.clone() else {
            panic!("by index")
        };
        // A row's negatives: an accidental hit is none, and a search must leave it out as well, but not the positive.
        let (mut offsets, mut excluded, mut ids) = (vec![0], Vec::new(), (0..n as u64).collect::<Vec<_>>());
        for &positive in &positives {
            if let Some(own) = &problem.pools[0].ids {
                let same = (0..n).filter(|&j| j != positive as usize && own[j] == own[positive as usize]);
                excluded.extend(same.map(|j| j as u64));
            }
            offsets.push(excluded.len() as i64);
        }
        let statistics = Cpu::new()
            .statistics(&problem.batch().unwrap(), &problem.loss, Request::value().with_rank())
            .expect("a loss that fits");
        assert!(statistics.rank.as_ref().unwrap().ties.iter().any(|&ties| ties > 0), "ties to count");
        std::mem::swap(problem.pools[0].ids.get_or_insert_default(), &mut ids);
        problem.excluded = Some((offsets, excluded));
        let top = Cpu::new().top_k(&problem.search().unwrap(), Similarity::Dot, n).unwrap();
        let each: Vec<i64> = (0..=b as i64).collect();
        let (ranks, lists) =
            (Ranking::of_positives(&statistics).unwrap(), Ranking::in_lists(&top, &each, &positives).unwrap());
        assert!(ranks.rows().eq(lists.rows()));
        assert!(ranks.recall_at(100).unwrap() > 0.0 && ranks.recall_at(10).unwrap() < 1.0);
    }
}

#[test]
fn a_positive_that_is_nan_is_not_at_the_top() {
    let mut problem = Config::new(4, 20, 3).problem();
    problem.queries = problem.queries.map(|q| q[3] = f32::NAN);
    let request = Request::value().with_rank();
    let statistics = Cpu::new().statistics(&problem.batch().unwrap(), &problem.loss, request).unwrap();
    let ranking = Ranking::of_positives(&statistics).unwrap();
    assert_eq!(ranking.recall_at(20).unwrap(), 0.75);
}

/// As it is printed, too.
#[test]
fn nothing_is_0_and_not_minus_0() {
    // No relevant item in its list, and none at a K of 0.
    let scores: [&[f32]; 2] = [&[3., 2., 1.], &[3., 2., 1.]];
    let ranking = Ranking::in_lists(&lists(&scores, 1), &[0, 1, 2], &[1, 2]).unwrap();
    let popularity = Recommended::new(3).unwrap().mean_popularity(&[1.0; 3]).unwrap();
    for found in [
        ranking.recall_at(1).unwrap(),
        ranking.ndcg_at(1).unwrap(),
        ranking.ndcg_at(0).unwrap(),
        ranking.mrr(),
        popularity,
    ] {
        assert_eq!(found.to_bits(), 0.0f64.to_bits());
    }
}

#[test]
fn negatives_that_are_nan_flatter_nobody() {
    let statistics_of = |spoil: fn(&mut [f32])| {
        let mut problem = Config { similarity: Similarity::Dot, ..Config::new(1, 4, 2) }.problem();
        problem.queries = problem.queries.map(|q| q.copy_from_slice(&[1.0, 0.0]));
        problem.positives = catalog_softmax_testing::problem::PositiveData::Index(vec![0]);
        problem.pools[0].candidates = problem.pools[0].candidates.map(|c| {
            c.copy_from_slice(&[1.0, 0.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0]);
            spoil(c);
        });
        let request = Request::value().with_rank();
        let (batch, loss) = (problem.batch().unwrap(), &problem.loss);
        let reference = Reference::new().statistics(&batch, loss, request).unwrap();
        let cpu = Cpu::new().statistics(&batch, loss, request).unwrap();
        [Ranking::of_positives(&reference).unwrap(), Ranking::of_positives(&cpu).unwrap()]
    };
    for ranking in statistics_of(|_| ()) {
        assert_eq!(ranking.mrr(), 1.0 / 3.0);
    }
    // All negatives, and one that may have been above.
    for spoil in [|c: &mut [f32]| c[2..].fill(f32::NAN), |c: &mut [f32]| c[4] = f32::NAN] {
        for ranking in statistics_of(spoil) {
            assert_eq!((ranking.mrr(), ranking.recall_at(4).unwrap(), ranking.ndcg_at(4).unwrap()), (0.0, 0.0, 0.0));
        }
    }
}

#[test]
fn blocks_are_one_ranking() {
    let scores: [&[f32]; 2] = [&[3., 2., 1.], &[1., 2., 3.]];
    let both = Ranking::in_lists(&lists(&scores, 3), &[0, 1, 2], &[1, 0]).unwrap();
    let mut blocks = Ranking::default();
    assert!(blocks.mrr().is_nan() && blocks.is_empty());
    blocks.append(Ranking::in_lists(&lists(&scores[..1], 3), &[0, 1], &[1]).unwrap()).unwrap();
    blocks.append(Ranking::in_lists(&lists(&scores[1..], 3), &[0, 1], &[0]).unwrap()).unwrap();
    blocks.append(Ranking::default()).unwrap();
    assert_eq!(blocks, both);
    assert_eq!((blocks.len(), blocks.is_empty()), (2, false));
}

/// Lists of two do not show who is in third place: Recall@3 of them would be Recall@2.
#[test]
fn metrics_past_the_lists_are_errors() {
    let scores: [&[f32]; 1] = [&[3., 2., 1.]];
    let of = |k: usize| Ranking::in_lists(&lists(&scores, k), &[0, 1], &[2]).unwrap();
    let ranking = of(2);
    assert_eq!((ranking.recall_at(2).unwrap(), ranking.ndcg_at(2).unwrap(), ranking.mrr()), (0.0, 0.0, 0.0));
    for error in [ranking.recall_at(3).unwrap_err(), ranking.ndcg_at(3).unwrap_err()] {
        assert_eq!(error.to_string(), "k is 3; rule: at most 2, the K of the lists");
    }
    assert_eq!((ranking.k(), of(3).recall_at(3).unwrap()), (Some(2), 1.0));

    // Blocks of different K have no metrics in common, nor have lists and exact ranks.
    let problem = Config::new(4, 20, 3).problem();
    let statistics = Cpu::new().statistics(&problem.batch().unwrap(), &problem.loss, Request::value().with_rank());
    let exact = Ranking::of_positives(&statistics.unwrap()).unwrap();
    assert_eq!((exact.k(), exact.recall_at(4000).unwrap()), (None, 1.0));
    for (other, named) in [(of(3), "one of lists of K = 3"), (exact, "one of exact places")] {
        let mut both = ranking.clone();
        let error = both.append(other).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("the ranking to append is {named}; rule: one of lists of K = 2, as in the rows before")
        );
        assert_eq!(both, ranking);
    }
    // An empty ranking takes the K of what comes first.
    let mut blocks = Ranking::default();
    blocks.append(of(2)).unwrap();
    assert_eq!(blocks, ranking);
}

/// A relevant item outside the catalogue is one that is not found.
#[test]
fn a_relevant_index_past_the_candidates_is_not_found() {
    let scores: [&[f32]; 1] = [&[3., 2., 1.]];
    let ranking = Ranking::in_lists(&lists(&scores, 3), &[0, 3], &[0, 7, u32::MAX]).unwrap();
    assert!(near(ranking.recall_at(3).unwrap(), 1.0 / 3.0));
    assert!(ranking.rows().eq([(&[0][..], 3)]));
}

#[test]
fn coverage_and_popularity_by_hand() {
    let scores: [&[f32]; 2] = [&[3., 2., 1., 0.], &[3., 0., 2., 1.]];
    assert!(Recommended::new(0).unwrap().coverage().is_nan());
    let mut recommended = Recommended::new(4).unwrap();
    assert_eq!((recommended.coverage(), recommended.mean_popularity(&[1.0; 4]).unwrap()), (0.0, 0.0));
    recommended.add(&lists(&scores, 2)).unwrap();
    assert_eq!(recommended.coverage(), 0.75);
    // Items 0, 1, 0, 2. The one that nobody gets may have the logarithm of no interaction.
    assert_eq!(recommended.mean_popularity(&[10.0, 2.0, 4.0, f64::NEG_INFINITY]).unwrap(), 26.0 / 4.0);
    recommended.add(&lists(&scores[1..], 4)).unwrap();
    assert_eq!(recommended.coverage(), 1.0);
    assert_eq!(recommended.mean_popularity(&[10.0, 2.0, 4.0, 1.0]).unwrap(), (26.0 + 17.0) / 8.0);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let scores: [&[f32]; 2] = [&[3., 2., 1., 0.], &[3., 0., 2., 1.]];
    let top = lists(&scores, 2);
    let error = |offsets: &[i64], relevant: &[u32]| Ranking::in_lists(&top, offsets, relevant).unwrap_err().to_string();
    assert_eq!(error(&[0, 1], &[1]), "offsets has length 2; rule: length 3, one more than there are rows");
    assert!(error(&[1, 1, 1], &[1]).starts_with("offsets[0] is 1; rule: 0"));
    assert!(error(&[0, 1, 0], &[1]).starts_with("offsets[2] is 0; rule: "));
    assert!(error(&[0, 1, 2], &[1]).starts_with("relevant has 1 ids; rule: the last offset, which is 2"));
    let mut small = Recommended::new(2).unwrap();
    assert!(matches!(small.add(&top), Err(Error::Value { value, .. }) if value == "2"));
    assert_eq!(small, Recommended::new(2).unwrap());
    assert!(matches!(small.mean_popularity(&[1.0; 3]), Err(Error::Shape { argument, .. }) if argument == "popularity"));
    let problem = Config::new(4, 20, 3).problem();
    let statistics = Cpu::new().statistics(&problem.batch().unwrap(), &problem.loss, Request::value()).unwrap();
    assert!(
        matches!(Ranking::of_positives(&statistics), Err(Error::Missing { argument, .. }) if argument == "statistics.rank")
    );
}
