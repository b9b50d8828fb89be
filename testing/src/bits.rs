//! For tests that compare outputs bit by bit.

use catalog_softmax::{Correction, DType, Similarity};

use super::generate::{Config, Masking};
use super::problem::Problem;
use super::step::Step;

/// Problems of many shapes: several blocks, tiles, splits and pools; separate and indexed positives; every element type.
pub fn problems() -> Vec<Problem> {
    let base = Config {
        pools: vec![700, 33, 300],
        correction: Correction::LogQ,
        masking: Masking::Excluded,
        weights: true,
        ..Config::new(530, 1, 24)
    };
    vec![
        base.problem(),
        Config { separate: true, dtype: DType::F16, ..base.clone() }.problem(),
        Config { b: 3, dim: 300, dtype: DType::Bf16, similarity: Similarity::Dot, temperature: 2.0, ..base.clone() }
            .problem(),
        // Rows that start at multiples of 16 bytes, more than 256 elements of them, more than a panel.
        Config { b: 70, dim: 264, dtype: DType::F16, pools: vec![5000, 34], ..base.clone() }.problem(),
        Config { b: 1, dim: 1, pools: vec![5000], masking: Masking::None, ..base.clone() }.problem(),
        Config { b: 300, dim: 7, symmetric: true, ..base.clone() }.problem(),
        Config { b: 40, dim: 130, pools: vec![1; 7], frozen: 0b101, correction: Correction::None, ..base }.problem(),
    ]
}

/// All of an output as bits: −0 is not 0, and NaN is itself.
pub fn bits(output: &Step) -> Vec<u64> {
    let statistics = &output.statistics;
    let moments = statistics.moments.as_ref().expect("asked for");
    let rank = statistics.rank.as_ref().expect("asked for");
    let g = output.gradients.as_ref().expect("asked for");
    let doubles = [&output.loss, &output.probability, &statistics.lse, &statistics.positive];
    let doubles = doubles.into_iter().chain([&moments.expected_score, &moments.entropy]).flatten().copied();
    let doubles = doubles.chain([output.total, g.d_temperature, g.d_log_temperature]).map(f64::to_bits);
    let singles = [&g.d_queries, statistics.expected_negative.as_ref().expect("asked for")];
    let singles = singles.into_iter().chain(&g.d_candidates).chain(&g.d_positive_embeddings);
    let singles = singles.flat_map(|matrix| &matrix.values).map(|v| u64::from(v.to_bits()));
    let counts = [&statistics.num_negatives, &rank.above, &rank.ties].into_iter().flatten().copied();
    doubles.chain(singles).chain(counts).collect()
}
