//! Seeded inputs of any size, made where they stay: no second copy at any time. For examples and benches.

use catalog_softmax::{Correction, DType, Loss, Similarity};
use half::{bf16, f16};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rayon::prelude::*;

use super::problem::{PoolData, PositiveData, Problem, Storage};

/// One pool, positives by index.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    pub queries: usize,
    pub candidates: usize,
    pub dim: usize,
    pub dtype: DType,
    pub similarity: Similarity,
    pub temperature: f64,
    pub ids: Ids,
    /// Excluded ids of each row, drawn as Zipf ids are: popular items are in many rows' lists. Needs ids.
    pub history: usize,
    /// Subtracted from negatives and positive: for Zipf ids that of their draw, else around a uniform draw's, up and down by e.
    pub log_q: bool,
}

/// Which items the candidates are; there are as many items as candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    None,
    /// Each item once, in an order that has nothing to do with its popularity.
    Unique,
    /// Drawn with replacement, item k with a probability of about 1 / (k + 1): most positives have accidental hits, and few
    /// items have most of them. benches/peers/common.py draws by the same rule.
    Zipf,
    /// All are the same item: nobody has a negative.
    Equal,
}

pub fn problem(config: &Config) -> Problem {
    let Config { queries: b, candidates: n, dim, dtype, history, .. } = *config;
    let ids = ids(config.ids, n);
    let log_q = config.log_q.then(|| match &ids {
        Some(ids) if config.ids == Ids::Zipf => ids.par_iter().map(|&id| zipf_log_q(id, n)).collect(),
        _ => random(n, 3, |rng| uniform(rng) - (n as f32).ln()),
    });
    let pool = PoolData { candidates: embeddings(dtype, n * dim, 1), rows: None, ids, log_q, gradient: true };
    let correction = if config.log_q { Correction::LogQ } else { Correction::None };
    Problem {
        dim,
        queries: embeddings(dtype, b * dim, 4),
        table: None,
        pools: vec![pool],
        row_negatives: None,
        positive_offsets: None,
        positive_weight: None,
        positives: PositiveData::Index(random(b, 5, |rng| rng.random_range(0..n as u32))),
        positive_ids: None,
        positive_log_q: None,
        excluded: (history > 0).then(|| {
            let offsets = (0..=b).map(|row| (row * history) as i64).collect();
            (offsets, random(b * history, 6, |rng| zipf(rng, n)))
        }),
        row_weight: None,
        loss: Loss::softmax(config.similarity, config.temperature).correction(correction),
    }
}

fn ids(kind: Ids, n: usize) -> Option<Vec<u64>> {
    match kind {
        Ids::None => None,
        Ids::Unique => {
            // Steps of a number that has no divisor in common with n reach each item once.
            let step = (n as u64 * 5 / 8).max(1);
            let step = (step..).find(|&step| gcd(step, n as u64) == 1).expect("a prime number comes");
            Some((0..n as u64).map(|i| i * step % n as u64).collect())
        }
        Ids::Zipf => Some(random(n, 2, |rng| zipf(rng, n))),
        Ids::Equal => Some(vec![0; n]),
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The logarithm of id + 1 is uniform up to that of items + 1.
fn zipf(rng: &mut SmallRng, items: usize) -> u64 {
    let rank = (rng.random::<f64>() * (items as f64 + 1.0).ln()).exp() as u64;
    rank.clamp(1, items as u64) - 1
}

/// ln(ln((id + 2) / (id + 1)) / ln(items + 1)): the probability by which `zipf` draws an id.
fn zipf_log_q(id: u64, items: usize) -> f32 {
    ((1.0 / (id as f64 + 1.0)).ln_1p() / (items as f64 + 1.0).ln()).ln() as f32
}

/// The least and the largest log_q, where there are any.
pub fn log_q_bounds(problem: &Problem) -> Option<(f32, f32)> {
    let mut values = problem.pools.iter().filter_map(|pool| pool.log_q.as_ref()).flatten().copied();
    let first = values.next()?;
    Some(values.fold((first, first), |(low, high), x| (f32::min(low, x), f32::max(high, x))))
}

fn embeddings(dtype: DType, len: usize, seed: u64) -> Storage {
    match dtype {
        DType::F16 => Storage::F16(random(len, seed, |rng| f16::from_f32(uniform(rng)))),
        DType::Bf16 => Storage::Bf16(random(len, seed, |rng| bf16::from_f32(uniform(rng)))),
        _ => Storage::F32(random(len, seed, uniform)),
    }
}

fn uniform(rng: &mut SmallRng) -> f32 {
    rng.random::<f32>() * 2.0 - 1.0
}

/// The same for any number of threads: each chunk has a generator of its own.
fn random<T: Default + Clone + Send>(len: usize, seed: u64, draw: impl Fn(&mut SmallRng) -> T + Sync) -> Vec<T> {
    const CHUNK: usize = 1 << 16;
    let mut values = vec![T::default(); len];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let mut rng = SmallRng::seed_from_u64((seed << 32) + chunk as u64);
        values.iter_mut().for_each(|value| *value = draw(&mut rng));
    });
    values
}
