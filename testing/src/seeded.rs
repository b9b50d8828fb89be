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
    /// Ids as if candidates were drawn with replacement: most positives have accidental hits.
    pub ids: bool,
    /// Around a uniform draw's, up and down by e; subtracted from negatives and positive.
    pub log_q: bool,
}

pub fn problem(config: &Config) -> Problem {
    let Config { queries: b, candidates: n, dim, dtype, .. } = *config;
    let pool = PoolData {
        candidates: embeddings(dtype, n * dim, 1),
        ids: config.ids.then(|| random(n, 2, |rng| rng.random_range(0..n as u64))),
        log_q: config.log_q.then(|| random(n, 3, |rng| uniform(rng) - (n as f32).ln())),
        gradient: true,
    };
    let correction = if config.log_q { Correction::LogQ } else { Correction::None };
    Problem {
        dim,
        queries: embeddings(dtype, b * dim, 4),
        pools: vec![pool],
        positives: PositiveData::Index(random(b, 5, |rng| rng.random_range(0..n as u32))),
        positive_ids: None,
        positive_log_q: None,
        excluded: None,
        row_weight: None,
        loss: Loss::softmax(config.similarity, config.temperature).correction(correction),
    }
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
