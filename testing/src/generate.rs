//! Seeded generators of random problems: every combination of options that a batch accepts.

use catalog_softmax::{Correction, DType, Loss, Reduction, Similarity};
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

use super::problem::{PoolData, PositiveData, Problem, Storage};

/// What ids and exclusions a problem has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Masking {
    /// No ids: only the positive itself is masked, by index.
    None,
    /// Candidates have ids, with duplicates: accidental hits.
    Ids,
    /// Rows exclude further ids, some twice, some that no candidate has, some that are the positive's.
    Excluded,
}

/// How log_q is spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogQ {
    /// Order 1, both signs where the loss allows it: large against the scores, so a wrong sign or tile shows.
    OrderOne,
    /// −5 to −18, as popularity in a large catalogue is.
    Realistic,
}

/// Options of a random problem. Those that a loss refuses are left out where [`Config::problem`] builds it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub b: usize,
    /// Candidates of each pool.
    pub pools: Vec<usize>,
    pub dim: usize,
    pub dtype: DType,
    pub similarity: Similarity,
    pub temperature: f64,
    pub correction: Correction,
    pub reduction: Reduction,
    pub symmetric: bool,
    pub separate: bool,
    pub masking: Masking,
    pub log_q: LogQ,
    pub weights: bool,
    /// Bit p: pool p has no gradient.
    pub frozen: u32,
    pub seed: u64,
}

impl Config {
    /// A plain problem; change what matters.
    pub fn new(b: usize, n: usize, dim: usize) -> Config {
        Config {
            b,
            pools: vec![n],
            dim,
            dtype: DType::F32,
            similarity: Similarity::Cosine,
            temperature: 0.1,
            correction: Correction::None,
            reduction: Reduction::Mean,
            symmetric: false,
            separate: false,
            masking: Masking::None,
            log_q: LogQ::OrderOne,
            weights: false,
            frozen: 0,
            seed: 1,
        }
    }

    pub fn num_candidates(&self) -> usize {
        self.pools.iter().sum()
    }

    /// What a symmetric loss refuses is taken away; what a reduction needs is added.
    fn normalized(&self) -> Config {
        let mut config = self.clone();
        if config.symmetric {
            config.pools = vec![config.b];
            config.separate = false;
            config.correction = Correction::None;
            config.frozen = 0;
            if config.masking == Masking::Excluded {
                config.masking = Masking::Ids;
            }
        }
        config.weights |= config.reduction == Reduction::WeightedMean;
        config
    }

    pub fn problem(&self) -> Problem {
        let config = self.normalized();
        let mut rng = StdRng::seed_from_u64(config.seed);
        let (b, n, d) = (config.b, config.num_candidates(), config.dim);
        let loss = Loss::softmax(config.similarity, config.temperature)
            .correction(config.correction)
            .reduction(config.reduction);
        // Under `Dot`, scores of order 1: the temperature says how far apart they are.
        let size = match config.similarity {
            Similarity::Cosine => 1.0,
            _ => (d as f32).powf(-0.25),
        };
        let queries = rows(&mut rng, b, d, size);
        let mut candidates = rows(&mut rng, n, d, size);

        let positives = positive_indices(&mut rng, b, n, config.symmetric);
        // A model that has learned something: positives lean towards their queries, so that probabilities are neither
        // all 0 nor all 1.
        for (i, &j) in positives.iter().enumerate() {
            let lean = rng.random_range(0.0..1.0f32);
            for k in 0..d {
                candidates[j as usize * d + k] += lean * queries[i * d + k];
            }
        }
        let mut separate = rows(&mut rng, b, d, size);
        separate.iter_mut().zip(&queries).for_each(|(p, q)| *p += 0.7 * q);

        let ids = (config.masking != Masking::None).then(|| ids(&mut rng, n));
        let log_q = (config.correction != Correction::None).then(|| log_qs(&mut rng, n, &config));
        let mut pools = Vec::new();
        let mut start = 0;
        for (p, &rows) in config.pools.iter().enumerate() {
            let range = start..start + rows;
            pools.push(PoolData {
                candidates: Storage::new(&candidates[range.start * d..range.end * d], config.dtype),
                rows: None,
                ids: ids.as_ref().map(|ids| ids[range.clone()].to_vec()),
                log_q: log_q.as_ref().map(|log_q| log_q[range.clone()].to_vec()),
                gradient: config.frozen.checked_shr(p as u32).unwrap_or(0) & 1 == 0,
            });
            start = range.end;
        }
        let uses_positive_log_q = matches!(config.correction, Correction::LogQ | Correction::CorrectedLogQ);
        let positive_ids = ids.as_ref().map(|ids| (0..b).map(|_| pick(&mut rng, ids)).collect());
        let positive_log_q = uses_positive_log_q.then(|| log_qs(&mut rng, b, &config));
        let excluded = (config.masking == Masking::Excluded).then(|| {
            let ids = ids.as_deref().unwrap_or_default();
            excluded(&mut rng, ids, &positives)
        });
        Problem {
            dim: d,
            queries: Storage::new(&queries, config.dtype),
            table: None,
            pools,
            row_negatives: None,
            positive_offsets: None,
            positive_weight: None,
            positive_ids: positive_ids.filter(|_| config.separate),
            positive_log_q: positive_log_q.filter(|_| config.separate),
            positives: match config.separate {
                true => PositiveData::Separate(Storage::new(&separate, config.dtype)),
                false => PositiveData::Index(positives),
            },
            excluded,
            row_weight: config.weights.then(|| weights(&mut rng, b)),
            loss: if config.symmetric { loss.symmetric() } else { loss },
        }
    }
}

pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Normal elements in rows whose lengths differ by up to a factor of 4.
pub fn rows(rng: &mut StdRng, rows: usize, dim: usize, size: f32) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * dim);
    for _ in 0..rows {
        let length = size * 2f32.powf(rng.random_range(-1.0..1.0f32));
        for _ in 0..dim {
            let normal: f32 = StandardNormal.sample(rng);
            values.push(length * normal);
        }
    }
    values
}

fn positive_indices(rng: &mut StdRng, b: usize, n: usize, permutation: bool) -> Vec<u32> {
    if !permutation {
        // Several rows may share one positive.
        return (0..b).map(|_| rng.random_range(0..n as u32)).collect();
    }
    let mut order: Vec<u32> = (0..n as u32).collect();
    for i in (1..n).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    order
}

/// Duplicates are common. Ids use all 64 bits, and some differ in the high half alone.
fn ids(rng: &mut StdRng, n: usize) -> Vec<u64> {
    let vocabulary = n as u64 / 2 + 2;
    let id = |k: u64| if k.is_multiple_of(3) { (k << 40) | 7 } else { k.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
    (0..n).map(|_| id(rng.random_range(0..vocabulary))).collect()
}

fn pick(rng: &mut StdRng, ids: &[u64]) -> u64 {
    // Sometimes an id that no candidate has.
    if rng.random_bool(0.2) { 123_456_789 } else { ids[rng.random_range(0..ids.len())] }
}

fn excluded(rng: &mut StdRng, ids: &[u64], positives: &[u32]) -> (Vec<i64>, Vec<u64>) {
    let (mut offsets, mut all) = (vec![0], Vec::new());
    for &positive in positives {
        let mut row: Vec<u64> = (0..rng.random_range(0..5)).map(|_| pick(rng, ids)).collect();
        if rng.random_bool(0.3) {
            row.push(ids[positive as usize]);
        }
        if let Some(&first) = row.first() {
            row.push(first);
        }
        all.extend(row);
        offsets.push(all.len() as i64);
    }
    (offsets, all)
}

fn log_qs(rng: &mut StdRng, n: usize, config: &Config) -> Vec<f32> {
    let probabilities = config.correction == Correction::CorrectedLogQ;
    let range = match config.log_q {
        LogQ::OrderOne if probabilities => -4.0..-0.01f32,
        LogQ::OrderOne => -2.0..2.0,
        LogQ::Realistic => -18.0..-5.0,
    };
    (0..n).map(|_| rng.random_range(range.clone())).collect()
}

fn weights(rng: &mut StdRng, b: usize) -> Vec<f32> {
    let mut weights: Vec<f32> =
        (0..b).map(|_| if rng.random_bool(0.25) { 0.0 } else { rng.random_range(0.1..3.0f32) }).collect();
    // A weighted mean needs one that is not 0.
    weights[b / 2] = 1.25;
    weights
}

/// Any problem with at most `b` queries, `n` candidates in each of up to three pools, and `dim` elements.
pub fn configs(b: usize, n: usize, dim: usize) -> impl Strategy<Value = Config> {
    let shapes = (1..=b, prop::collection::vec(1..=n, 1..=3), 1..=dim);
    let dtype = prop::sample::select(vec![DType::F32, DType::F16, DType::Bf16]);
    let similarity = prop_oneof![
        (Just(Similarity::Cosine), prop::sample::select(vec![0.02, 0.07, 0.3, 1.0, 4.0])),
        (Just(Similarity::Dot), prop::sample::select(vec![0.1, 0.5, 1.0, 3.0])),
    ];
    let correction = prop::sample::select(vec![
        Correction::None,
        Correction::LogQ,
        Correction::LogQNegativesOnly,
        Correction::CorrectedLogQ,
    ]);
    let reduction =
        prop::sample::select(vec![Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean]);
    let masking = prop::sample::select(vec![Masking::None, Masking::Ids, Masking::Excluded]);
    let log_q = prop::sample::select(vec![LogQ::OrderOne, LogQ::Realistic]);
    let flags = (prop::bool::weighted(0.15), any::<bool>(), any::<bool>(), 0u32..4);
    let rest = (correction, reduction, masking, log_q, flags, any::<u64>());
    (shapes, dtype, similarity, rest).prop_map(|((b, pools, dim), dtype, (similarity, temperature), rest)| {
        let (correction, reduction, masking, log_q, (symmetric, separate, weights, frozen), seed) = rest;
        Config {
            b,
            pools,
            dim,
            dtype,
            similarity,
            temperature,
            correction,
            reduction,
            symmetric,
            separate,
            masking,
            log_q,
            weights,
            frozen,
            seed,
        }
    })
}
