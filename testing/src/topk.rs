//! The properties of a top-K search that every backend has.

use catalog_softmax::{Backend, DType, Pool, Reference, Search, Similarity, TopK};
use rand::RngExt;

use super::generate::{rng, rows};
use super::problem::Storage;
use super::properties::Subject;

/// Candidates, and their ids.
pub type PoolOfIds = (Storage, Option<Vec<u64>>);

/// What a search borrows.
#[derive(Debug, Clone)]
pub struct SearchData {
    pub dim: usize,
    pub similarity: Similarity,
    pub queries: Storage,
    pub pools: Vec<PoolOfIds>,
    /// Offsets and ids.
    pub excluded: Option<(Vec<i64>, Vec<u64>)>,
}

/// What elements are drawn from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values {
    /// Normal: no two scores are equal.
    Normal,
    /// −2 to 2: dot products are exact in every type, and many are equal.
    Whole,
}

impl SearchData {
    /// `pools` has the number of candidates of each pool. With `masked`, rows exclude up to five ids that candidates have,
    /// several each, one of them twice, and one that no candidate has.
    pub fn new(b: usize, pools: &[usize], dim: usize, dtype: DType, values: Values, masked: bool) -> SearchData {
        let mut rng = rng((b * 31 + dim) as u64);
        let mut draw = |count: usize| match values {
            Values::Normal => rows(&mut rng, count, dim, 1.0),
            Values::Whole => (0..count * dim).map(|_| rng.random_range(-2..=2) as f32).collect(),
        };
        let queries = Storage::new(&draw(b), dtype);
        let candidates: Vec<Storage> = pools.iter().map(|&rows| Storage::new(&draw(rows), dtype)).collect();
        let vocabulary = pools.iter().sum::<usize>() as u64 / 2 + 2;
        let mut id = || rng.random_range(0..vocabulary).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let pools = candidates.into_iter().map(|candidates| {
            let ids = masked.then(|| (0..candidates.len() / dim).map(|_| id()).collect());
            (candidates, ids)
        });
        let pools = pools.collect();
        let excluded = masked.then(|| {
            let (mut offsets, mut ids) = (vec![0], Vec::new());
            for row in 0..b {
                ids.extend((0..row % 6).map(|_| id()));
                ids.extend(ids.last().copied());
                ids.push(123_456_789);
                offsets.push(ids.len() as i64);
            }
            (offsets, ids)
        });
        let similarity = if values == Values::Whole { Similarity::Dot } else { Similarity::Cosine };
        SearchData { dim, similarity, queries, pools, excluded }
    }

    pub fn search(&self) -> Search<'_> {
        let mut pools = self.pools.iter().map(|(candidates, ids)| {
            let pool = Pool::new(candidates.view(self.dim));
            match ids {
                Some(ids) => pool.ids(ids),
                None => pool,
            }
        });
        let mut builder = Search::builder(self.queries.view(self.dim), pools.next().expect("a pool"));
        for pool in pools {
            builder = builder.pool(pool);
        }
        if let Some((offsets, ids)) = &self.excluded {
            builder = builder.excluded_ids(offsets, ids);
        }
        builder.build().expect("a valid search")
    }

    pub fn top_k(&self, backend: Subject<'_>, k: usize) -> TopK {
        backend.top_k(&self.search(), self.similarity, k).expect("a valid k")
    }

    /// Every score that may be returned, best first, by the definition: (score, index) for each row.
    pub fn ranked(&self) -> Vec<Vec<(f64, u32)>> {
        let queries = self.queries.to_f32();
        queries.chunks(self.dim).enumerate().map(|(row, query)| self.ranked_row(row, query)).collect()
    }

    fn ranked_row(&self, row: usize, query: &[f32]) -> Vec<(f64, u32)> {
        let excluded = match &self.excluded {
            Some((offsets, ids)) => &ids[offsets[row] as usize..offsets[row + 1] as usize],
            None => &[],
        };
        let mut scored = Vec::new();
        let mut index = 0;
        for (candidates, ids) in &self.pools {
            for (j, candidate) in candidates.to_f32().chunks(self.dim).enumerate() {
                let finite = query.iter().chain(candidate).all(|x| x.is_finite());
                if finite && !ids.as_ref().is_some_and(|ids| excluded.contains(&ids[j])) {
                    scored.push((similarity(self.similarity, query, candidate), index));
                }
                index += 1;
            }
        }
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        scored
    }
}

fn similarity(similarity: Similarity, a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    // + 0 makes a −0 positive, as equal scores should have equal bits here.
    match similarity {
        Similarity::Dot => dot(a, b) + 0.0,
        Similarity::Cosine => dot(a, b) / (dot(a, a) * dot(b, b)).sqrt() + 0.0,
        other => panic!("no formula for {other:?}"),
    }
}

/// Bit for bit the definition's list, where scores are exact.
pub fn is_exact<T: Copy + Into<f64> + catalog_softmax::Real>(top: &TopK<T>, ranked: &[Vec<(f64, u32)>], k: usize) {
    assert_eq!((top.k, top.indices.len(), top.scores.len()), (k, ranked.len() * k, ranked.len() * k));
    for (row, ranked) in ranked.iter().enumerate() {
        let (indices, scores) = top.row(row);
        let found: Vec<(f64, u32)> = scores.iter().map(|&s| s.into()).zip(indices.iter().copied()).collect();
        assert_eq!(found, ranked[..k.min(ranked.len())], "row {row} of {}, k {k}", top.indices.len() / k);
        assert!(top.indices[row * k + found.len()..(row + 1) * k].iter().all(|&index| index == TopK::NONE));
        let rest = &top.scores[row * k + found.len()..(row + 1) * k];
        assert!(rest.iter().all(|&score| score.into() == f64::NEG_INFINITY));
    }
}

/// The definition's list up to rounding: at each place a score within `tolerance` of the score that belongs there and of
/// the score that its candidate has; no candidate twice; in order.
fn is_near(top: &TopK, ranked: &[Vec<(f64, u32)>], k: usize, tolerance: f64) {
    for (row, ranked) in ranked.iter().enumerate() {
        let (indices, scores) = top.row(row);
        assert_eq!(indices.len(), k.min(ranked.len()), "row {row}");
        let exact: std::collections::HashMap<u32, f64> = ranked.iter().map(|&(score, index)| (index, score)).collect();
        for (place, (index, &score)) in indices.iter().zip(scores).enumerate() {
            let own = exact.get(index).unwrap_or_else(|| panic!("row {row} returns {index}, which it excludes"));
            let (score, wanted) = (f64::from(score), ranked[place].0);
            assert!((score - own).abs() <= tolerance, "row {row}, {index}: {score}, float64 {own}");
            assert!((score - wanted).abs() <= tolerance, "row {row}, place {place}: {score}, float64 {wanted}");
        }
        let ordered = |i: usize| scores[i - 1] > scores[i] || scores[i - 1] == scores[i] && indices[i - 1] < indices[i];
        assert!((1..indices.len()).all(ordered), "row {row} is out of order");
        let mut distinct = indices.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), indices.len(), "row {row} has a candidate twice");
    }
}

/// Of unit vectors: D products and sums in `f32`, each relative to at most 1, and the rounding of both lengths. Products of
/// `f32` from three tf32 ones lose a bit more; plain ones are multiply-adds, as here.
fn cosine_tolerance(dim: usize) -> f64 {
    (dim + 16) as f64 * f64::from(f32::EPSILON)
}

/// Tile sizes of a backend.
fn tiles(backend: Subject<'_>) -> (usize, usize) {
    let data = SearchData::new(600, &[1200], 8, DType::F32, Values::Normal, false);
    let plan = backend.plan_top_k(&data.search(), data.similarity, 1).expect("a valid k");
    (plan.block_b, plan.block_n)
}

fn edges(tile: usize) -> [usize; 5] {
    [1, tile - 1, tile, tile + 1, 2 * tile + 3]
}

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// Exact scores, many of them equal, at the edges of tiles: the very list, ties by index.
pub fn top_k_is_exact_at_the_edges_of_tiles(backend: Subject<'_>) {
    let (block_b, block_n) = tiles(backend);
    for (x, b) in edges(block_b).into_iter().enumerate() {
        for (y, n) in edges(block_n).into_iter().enumerate() {
            let i = 5 * x + y;
            let data = SearchData::new(b, &[n], [5, 1, 8, 33][i % 4], DTYPES[i % 3], Values::Whole, i % 2 == 1);
            let ranked = data.ranked();
            for k in [1, 2, 100, n / 2, n].into_iter().filter(|k| (1..=n.min(1024)).contains(k)) {
                is_exact(&data.top_k(backend, k), &ranked, k);
            }
        }
    }
}

/// Over many tiles and splits, with every K, in one pool and in three.
pub fn top_k_is_exact_over_many_tiles(backend: Subject<'_>) {
    for (i, pools) in [vec![5000], vec![1030, 1, 2500]].into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let data = SearchData::new(3 + i * 10, &pools, [6, 64][i], dtype, Values::Whole, j != 1);
            let ranked = data.ranked();
            for k in [1, 2, 100, 1024] {
                is_exact(&data.top_k(backend, k), &ranked, k);
            }
        }
    }
}

/// Real-valued embeddings under cosine, within the rounding of their scores.
pub fn top_k_agrees_within_rounding(backend: Subject<'_>) {
    for (i, (b, n, dim)) in [(40, 3000, 64), (7, 2000, 129), (130, 1500, 16), (2, 1100, 300)].into_iter().enumerate() {
        for dtype in DTYPES {
            let data = SearchData::new(b, &[n / 3, n - n / 3], dim, dtype, Values::Normal, i % 2 == 0);
            let ranked = data.ranked();
            for k in [1, 10, 100, 1024] {
                is_near(&data.top_k(backend, k), &ranked, k, cosine_tolerance(dim));
            }
        }
    }
}

/// All candidates alike: the first K, in the order of their indices, in whichever order they were found.
pub fn top_k_breaks_ties_by_index(backend: Subject<'_>) {
    let n = 3000;
    for dtype in DTYPES {
        let mut data = SearchData::new(5, &[n], 4, dtype, Values::Whole, true);
        data.pools[0].0 = Storage::new(&vec![1.0; n * 4], dtype);
        let ranked = data.ranked();
        for k in [1, 7, 1024] {
            is_exact(&data.top_k(backend, k), &ranked, k);
        }
        // In ascending and in descending order of score, where a threshold never and always filters.
        for sign in [1.0, -1.0] {
            let ladder: Vec<f32> = (0..n).flat_map(|j| [sign * (j / 2) as f32, 0.0, 0.0, 0.0]).collect();
            let mut data = SearchData::new(3, &[n], 4, DType::F32, Values::Whole, true);
            (data.pools[0].0, data.queries) =
                (Storage::F32(ladder), Storage::F32(vec![1.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0]));
            let ranked = data.ranked();
            for k in [1, 64, 1024] {
                is_exact(&data.top_k(backend, k), &ranked, k);
            }
        }
    }
}

/// Exclusions that leave fewer than K, and none.
pub fn top_k_has_fewer_where_there_are_fewer(backend: Subject<'_>) {
    let n = 300;
    let mut data = SearchData::new(4, &[200, 100], 8, DType::F32, Values::Whole, true);
    let mut start = 0;
    for (candidates, ids) in &mut data.pools {
        let rows = (candidates.len() / 8) as u64;
        *ids = Some((start..start + rows).collect());
        start += rows;
    }
    let all: Vec<u64> = (0..n).collect();
    let but_three: Vec<u64> = all.iter().copied().filter(|j| ![0, 199, 299].contains(j)).collect();
    let ids = [&all[..], &but_three[..], &[], &[5]].concat();
    let offsets = vec![0, 300, 597, 597, 598];
    data.excluded = Some((offsets, ids));
    let ranked = data.ranked();
    assert_eq!(ranked.iter().map(Vec::len).collect::<Vec<_>>(), [0, 3, 300, 299]);
    for k in [1, 3, 4, 300] {
        is_exact(&data.top_k(backend, k), &ranked, k);
    }
}

/// NaN and infinities in a row or in candidates are never returned, and spoil nothing else.
pub fn top_k_leaves_out_what_is_not_finite(backend: Subject<'_>) {
    for similarity in [Similarity::Dot, Similarity::Cosine] {
        for dtype in DTYPES {
            let mut data = SearchData::new(6, &[700], 16, dtype, Values::Normal, false);
            data.similarity = similarity;
            data.queries = data.queries.map(|q| q[2 * 16 + 3] = f32::NAN).map(|q| q[4 * 16 + 15] = f32::INFINITY);
            data.pools[0].0 = data.pools[0].0.map(|c| {
                c[16 + 1] = f32::INFINITY;
                c[500 * 16] = f32::NEG_INFINITY;
                c[699 * 16 + 7] = f32::NAN;
            });
            let ranked = data.ranked();
            assert_eq!(ranked.iter().map(Vec::len).collect::<Vec<_>>(), [697, 697, 0, 697, 0, 697]);
            // Rows under `Dot` are up to twice as long as their elements' spread.
            let tolerance = cosine_tolerance(16) * if similarity == Similarity::Dot { 400.0 } else { 1.0 };
            for k in [1, 50, 700] {
                is_near(&data.top_k(backend, k), &ranked, k, tolerance);
            }
        }
    }
}

/// Rows too short to have a direction have similarity 0 with everything: ties, all of them.
pub fn top_k_of_rows_of_length_zero(backend: Subject<'_>) {
    let mut data = SearchData::new(3, &[600], 8, DType::F32, Values::Normal, false);
    data.queries = data.queries.map(|q| q[8..16].fill(0.0));
    let top = data.top_k(backend, 20);
    assert_eq!(top.row(1), (&(0..20).collect::<Vec<u32>>()[..], &[0.0; 20][..]));
}

/// The same list twice, after other shapes have used the workspace, and with another K as its beginning.
pub fn top_k_is_the_same_again(backend: Subject<'_>) {
    let data = SearchData::new(70, &[2500, 700], 40, DType::F32, Values::Normal, true);
    let first = data.top_k(backend, 100);
    let other = SearchData::new(3, &[400], 7, DType::Bf16, Values::Normal, false);
    other.top_k(backend, 3);
    assert_eq!(data.top_k(backend, 100), first);
    let short = data.top_k(backend, 10);
    for row in 0..70 {
        let (indices, scores) = first.row(row);
        assert_eq!(short.row(row), (&indices[..10], &scores[..10]));
    }
}

/// A property of a backend's search.
pub type TopKProperty = fn(Subject<'_>);

pub const TOP_K: &[(&str, TopKProperty)] = &[
    ("is_exact_at_the_edges_of_tiles", top_k_is_exact_at_the_edges_of_tiles),
    ("is_exact_over_many_tiles", top_k_is_exact_over_many_tiles),
    ("agrees_within_rounding", top_k_agrees_within_rounding),
    ("breaks_ties_by_index", top_k_breaks_ties_by_index),
    ("has_fewer_where_there_are_fewer", top_k_has_fewer_where_there_are_fewer),
    ("leaves_out_what_is_not_finite", top_k_leaves_out_what_is_not_finite),
    ("of_rows_of_length_zero", top_k_of_rows_of_length_zero),
    ("is_the_same_again", top_k_is_the_same_again),
];

/// The reference's lists are the definition's.
pub fn the_reference_is_the_definition() {
    for (i, values) in [Values::Whole, Values::Normal].into_iter().enumerate() {
        for masked in [false, true] {
            let data = SearchData::new(9, &[40, 300], [6, 20][i], DTYPES[i], values, masked);
            let ranked = data.ranked();
            for k in [1, 33, 340] {
                let top = Reference::new().top_k(&data.search(), data.similarity, k).expect("a valid k");
                if values == Values::Whole {
                    is_exact(&top, &ranked, k);
                }
                for (row, ranked) in ranked.iter().enumerate() {
                    let (indices, scores) = top.row(row);
                    let wanted: Vec<u32> = ranked.iter().take(k).map(|&(_, index)| index).collect();
                    assert_eq!(indices, wanted, "row {row}, k {k}");
                    assert!(scores.iter().zip(ranked).all(|(found, wanted)| (found - wanted.0).abs() < 1e-13));
                }
            }
        }
    }
}
