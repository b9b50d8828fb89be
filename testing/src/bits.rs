//! For tests that compare outputs bit by bit.

use catalog_softmax::{Correction, DType, Similarity, TableGradient};

use super::generate::{Config, Masking};
use super::generate_tables::{FilterKind, PoolKind, PositiveKind, TableConfig};
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

/// Problems over a table, with several positives and filters.
pub fn table_problems() -> Vec<Problem> {
    let base = TableConfig {
        pools: vec![PoolKind::Rows(700), PoolKind::Own(33), PoolKind::Rows(300)],
        per_row: 70,
        positives: PositiveKind::Several,
        correction: Correction::LogQ,
        filter: FilterKind::MarginAbove,
        excluded: true,
        weights: true,
        ..TableConfig::new(530, 3_000, 24)
    };
    let catalogue = TableConfig { pools: vec![PoolKind::WholeTable], per_row: 0, ids: true, ..base.clone() };
    let own =
        TableConfig { pools: Vec::new(), per_row: 300, dtype: DType::F16, filter: FilterKind::Ratio, ..base.clone() };
    let separate =
        TableConfig { b: 3, dim: 300, positives: PositiveKind::SeveralSeparate, dtype: DType::Bf16, ..base.clone() };
    let one = TableConfig { b: 1, dim: 1, positives: PositiveKind::One, similarity: Similarity::Dot, ..base.clone() };
    // Few rows of a table in many places.
    let few = TableConfig { rows: 7, frozen: 1, ..base.clone() };
    [base, catalogue, own, separate, one, few].iter().map(TableConfig::problem).collect()
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
    let (dense, row_sparse) = match &g.d_table {
        Some(TableGradient::Dense(d)) => (Some(d), None),
        Some(TableGradient::RowSparse(rows)) => (Some(&rows.values), Some(&rows.rows)),
        None => (None, None),
    };
    let singles = singles.chain(dense);
    let singles = singles.flat_map(|matrix| &matrix.values).map(|v| u64::from(v.to_bits()));
    let counts = [&statistics.num_negatives, &rank.above, &rank.ties].into_iter().flatten().copied();
    let rows = row_sparse.into_iter().flatten().map(|&row| u64::from(row));
    doubles.chain(singles).chain(counts).chain(rows).collect()
}
