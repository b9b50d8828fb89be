//! Batches over a table agree with the reference: pools by reference, negatives of rows' own, several positives, filters.

use super::*;
use crate::generate_tables::{
    CORRECTIONS, FILTERS, FilterKind, PoolKind, PositiveKind, REDUCTIONS, TableConfig, filtered, table_configs,
};
use crate::tolerance::epsilon;

fn agrees(backend: Subject<'_>, config: &TableConfig, operands: Operands) -> Result<(), String> {
    let problem = config.problem();
    Expected::new(&problem, operands(config.dtype)).check(&everything(backend, &problem))
}

fn must_agree(backend: Subject<'_>, config: &TableConfig, operands: Operands) {
    agrees(backend, config, operands).unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
}

pub fn tables_agree_on_random_problems(backend: Subject<'_>, operands: Operands) {
    for_random(300, &table_configs(30, 50, 20), |config| agrees(backend, config, operands));
}

pub fn tables_agree_on_wide_random_problems(backend: Subject<'_>, operands: Operands) {
    for_random(20, &table_configs(300, 400, 70), |config| agrees(backend, config, operands));
}

pub fn tables_agree_at_the_edges_of_tiles(backend: Subject<'_>, operands: Operands) {
    let plan = tiles(backend, 8);
    // Tasks of 64 rows, the least width of a product, and what a tile holds.
    let heights = [1, 63, 65, plan.block_b + 1];
    let widths: Vec<usize> = [32, 64, 96].into_iter().flat_map(|width| [width - 1, width, width + 1]).collect();
    let widths = [vec![1], widths, edges(plan.block_n)[1..].to_vec()].concat();
    for (y, &n) in widths.iter().enumerate() {
        for (x, &b) in heights.iter().enumerate() {
            let turn = x + y;
            if b * n > 40_000 && turn % 2 == 1 {
                continue;
            }
            let base = TableConfig {
                dim: [8, 3, 17, 33, 5][turn % 5],
                similarity: if turn % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                temperature: if turn % 2 == 0 { 0.1 } else { 1.0 },
                correction: CORRECTIONS[turn % 4],
                positives: [PositiveKind::Several, PositiveKind::One, PositiveKind::SeveralSeparate][turn % 3],
                excluded: turn % 2 == 0,
                weights: x % 2 == 1,
                seed: (7 * x + y) as u64,
                ..TableConfig::new(b, n + 9, 8)
            };
            must_agree(backend, &TableConfig { pools: vec![PoolKind::Rows(n)], ..base.clone() }, operands);
            must_agree(backend, &TableConfig { per_row: n, rows: n.min(70) + 9, ..base.clone() }, operands);
            must_agree(backend, &TableConfig { rows: n, pools: vec![PoolKind::WholeTable], ..base }, operands);
        }
    }
    // As many for each query as there may be.
    let most = catalog_softmax::RowNegatives::MAX_PER_ROW;
    must_agree(backend, &TableConfig { per_row: most, ..TableConfig::new(2, 300, 5) }, operands);
    // Many negatives of few rows; more rows of the table than a stretch holds, few of them named.
    let many = TableConfig {
        per_row: 5 * plan.block_n + 1,
        correction: Correction::LogQ,
        filter: FilterKind::MarginAbove,
        ..TableConfig::new(3, 40, 12)
    };
    must_agree(backend, &many, operands);
    let rows = 6 * plan.block_n;
    let few = TableConfig {
        rows,
        pools: vec![PoolKind::Rows(rows / 2), PoolKind::Own(plan.block_n + 1), PoolKind::Rows(3)],
        per_row: 40,
        ..many
    };
    must_agree(backend, &few, operands);
}

pub fn tables_agree_on_strided_views(backend: Subject<'_>, operands: Operands) {
    for (padding, dtype) in [(1, DType::F32), (5, DType::F16), (3, DType::Bf16)] {
        let config = TableConfig {
            dtype,
            pools: vec![PoolKind::Rows(90), PoolKind::Own(30), PoolKind::WholeTable],
            per_row: 12,
            positives: if padding == 1 { PositiveKind::Several } else { PositiveKind::SeveralSeparate },
            filter: FilterKind::MarginBelow,
            ..TableConfig::new(21, 110, 7)
        };
        let problem = config.problem();
        let expected = Expected::new(&problem, operands(dtype));
        let padded = problem.padded(padding);
        let batch = padded.strided_batch(padding).expect("a valid problem");
        let mut step = Step::default();
        let request = Request::value_and_grad().with_moments();
        step.compute(backend, &batch, &problem.loss, request).expect("a loss that fits");
        expected.check(&step).unwrap_or_else(|error| panic!("{error}\nin {config:?}, padding {padding}"));
    }
}

/// What a batch may be made of, every one with every other.
pub fn tables_agree_for_every_combination_of_options(backend: Subject<'_>, operands: Operands) {
    let pools = [
        (vec![], 7),
        (vec![], 0),
        (vec![PoolKind::Rows(20)], 0),
        (vec![PoolKind::Rows(20)], 7),
        (vec![PoolKind::WholeTable, PoolKind::Own(5)], 0),
        (vec![PoolKind::Own(13)], 5),
        (vec![PoolKind::Rows(9), PoolKind::Own(5), PoolKind::WholeTable, PoolKind::Rows(4)], 3),
    ];
    let positives = [PositiveKind::One, PositiveKind::Several, PositiveKind::Separate, PositiveKind::SeveralSeparate];
    let (mut seed, mut left_out) = (0, [0; 4]);
    for (pools, per_row) in &pools {
        for positives in positives {
            for filter in FILTERS {
                for correction in CORRECTIONS {
                    for similarity in [Similarity::Cosine, Similarity::Dot] {
                        seed += 1;
                        let config = TableConfig {
                            dtype: [DType::F32, DType::F16, DType::Bf16][seed % 3],
                            similarity,
                            temperature: [0.05, 0.2, 1.0][seed % 3],
                            correction,
                            reduction: REDUCTIONS[(seed / 3) % 4],
                            pools: pools.clone(),
                            per_row: *per_row,
                            positives,
                            positive_weight: seed % 5 < 3,
                            filter,
                            excluded: seed % 7 < 4,
                            ids: seed % 11 < 5,
                            weights: seed % 2 == 0,
                            frozen: if seed % 3 == 0 { seed as u32 % 16 } else { 0 },
                            frozen_table: seed % 17 == 0,
                            seed: seed as u64,
                            ..TableConfig::new(9, 31, 10)
                        };
                        must_agree(backend, &config, operands);
                        left_out[filter as usize] += left_out_by_the_filter(&config.problem());
                    }
                }
            }
        }
    }
    assert!(left_out[0] == 0 && left_out[1..].iter().all(|&count| count > 500), "a case for the test: {left_out:?}");
}

fn left_out_by_the_filter(problem: &Problem) -> u64 {
    let mut unfiltered = problem.clone();
    unfiltered.loss.false_negatives = None;
    let [with, without] =
        [problem, &unfiltered].map(|problem| reference(problem).statistics.num_negatives.iter().sum::<u64>());
    without - with
}

/// A filter needs no table: in pools of embeddings, with positives by index and separate ones, and in both directions.
pub fn filters_agree_without_a_table(backend: Subject<'_>, operands: Operands) {
    let mut left_out = 0;
    for (turn, correction) in CORRECTIONS.into_iter().enumerate() {
        for filter in FILTERS {
            for (masking, separate, symmetric) in [
                (Masking::None, false, false),
                (Masking::Excluded, true, false),
                (Masking::Ids, false, true),
                (Masking::None, false, true),
            ] {
                let config = Config {
                    similarity: if turn % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                    dtype: [DType::F32, DType::F16, DType::Bf16][turn % 3],
                    temperature: 0.3,
                    correction,
                    masking,
                    separate,
                    symmetric,
                    pools: vec![90, 1, 260],
                    weights: true,
                    seed: turn as u64,
                    ..Config::new(70, 1, 9)
                };
                let mut problem = config.problem();
                problem.loss = filtered(&problem, filter);
                let agrees = Expected::new(&problem, operands(config.dtype)).check(&everything(backend, &problem));
                agrees.unwrap_or_else(|error| panic!("{error}\nwith {:?} in {config:?}", problem.loss));
                left_out += left_out_by_the_filter(&problem);
            }
        }
    }
    assert!(left_out > 10_000, "a case for the test: {left_out}");
}

/// Each row's bound is what one of its candidates scores, to the bit. The candidate is a negative in both passes or in
/// neither: all that the gradients of a table's rows are sums of cancels, whoever is left out.
pub fn a_score_at_the_bound_is_a_negative_in_both_passes(backend: Subject<'_>, operands: Operands) {
    let plan = tiles(backend, 8);
    for (turn, dim) in [1, 8, 31, 64, 96, 200, 300].into_iter().enumerate() {
        for (b, copies) in [(1, 40), (9, 3), (70, 2), (plan.block_b + 1, 1)] {
            for (pools, per_row) in [
                (vec![PoolKind::Rows(60)], 0),
                (vec![], 9),
                (vec![PoolKind::WholeTable], 5),
                (vec![PoolKind::Own(9)], 4),
            ] {
                let config = TableConfig {
                    similarity: Similarity::Dot,
                    temperature: 0.7,
                    dtype: [DType::F32, DType::F16, DType::Bf16][turn % 3],
                    reduction: Reduction::Sum,
                    pools,
                    per_row,
                    seed: (dim * b) as u64,
                    ..TableConfig::new(b, 100, dim)
                };
                at_the_bound(backend, operands, &config, copies);
            }
        }
    }
}

fn at_the_bound(backend: Subject<'_>, operands: Operands, config: &TableConfig, copies: usize) {
    let mut problem = config.problem();
    let (b, m, dim) = (config.b, config.rows, config.dim);
    let twin = |row: usize, copy: usize| (m + row * copies + copy) as u32;
    let PositiveData::Index(positives) = &problem.positives else { panic!("rows of the table") };
    let table = problem.table.as_mut().expect("asked for");
    // Each row's positive again, under rows of their own at the table's end.
    table.embeddings = table.embeddings.map(|values| {
        for &positive in positives {
            let positive = positive as usize * dim..(positive as usize + 1) * dim;
            (0..copies).for_each(|_| values.extend_from_within(positive.clone()));
        }
    });
    for pool in &mut problem.pools {
        if let Some(PoolRows::These(rows)) = &mut pool.rows {
            rows.extend((0..b).flat_map(|row| (0..copies).map(move |copy| twin(row, copy))));
        }
    }
    if let Some(own) = &mut problem.row_negatives {
        for row in 0..b {
            own.rows[row * own.per_row..][..copies.min(own.per_row)]
                .iter_mut()
                .enumerate()
                .for_each(|(copy, to)| *to = twin(row, copy));
        }
    }
    problem.loss = problem.loss.false_negative_margin(0.0);
    let output = everything(backend, &problem);
    let d_table = gradients(&output).d_table.as_ref().and_then(TableGradient::dense).expect("over a table");
    let of_pool = |k: usize| {
        let own = gradients(&output).d_candidates.iter().filter(|d| d.rows > 0);
        own.flat_map(|d| (0..d.rows).map(|row| f64::from(d.row(row)[k])).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    // Coefficients may be rounded to the operands' type before they multiply queries.
    let share = f64::max(3e-5, 2.0 * epsilon(operands(config.dtype)));
    for k in 0..dim {
        let terms = (0..d_table.rows).map(|row| f64::from(d_table.row(row)[k])).chain(of_pool(k));
        let (sum, size) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
        assert!(sum.abs() <= share * size + 1e-30, "{config:?}: {sum:e} of {size:e} is left in element {k}");
    }
    // What scores as the positive does is not above it.
    let exact = reference(&problem);
    for row in 0..b {
        let least = match (&problem.row_negatives, problem.pools.iter().any(|pool| pool.rows.is_some())) {
            (_, true) => copies,
            (Some(own), false) => copies.min(own.per_row),
            (None, false) => 0,
        };
        let found = output.statistics.num_negatives[row];
        assert!(found >= least as u64, "{config:?}: row {row} has {found} negatives");
        // Others are near a bound by chance alone.
        if dim > 2 {
            assert_eq!(found, exact.statistics.num_negatives[row], "{config:?}: row {row}");
        }
    }
}

/// NaN and infinities in the table, in queries and in other pools spoil what depends on them. The reference says what.
pub fn nan_in_a_table_spoils_what_names_it(backend: Subject<'_>, operands: Operands) {
    let shapes = [
        (vec![PoolKind::Rows(40)], 0),
        (vec![], 11),
        (vec![PoolKind::Rows(12), PoolKind::Own(30)], 6),
        (vec![PoolKind::WholeTable], 0),
    ];
    for (turn, (pools, per_row)) in shapes.into_iter().enumerate() {
        for (similarity, dtype) in [(Similarity::Cosine, DType::F32), (Similarity::Dot, DType::F16)] {
            for (filter, positives) in
                [(FilterKind::None, PositiveKind::Several), (FilterKind::MarginBelow, PositiveKind::One)]
            {
                let config = TableConfig {
                    similarity,
                    dtype,
                    temperature: 0.5,
                    pools: pools.clone(),
                    per_row,
                    positives,
                    filter,
                    excluded: true,
                    seed: turn as u64,
                    ..TableConfig::new(70, 150, 6)
                };
                let clean = config.problem();
                let before = everything(backend, &clean);
                // A dot product with ∞ may have a limit, which the reference finds and others need not.
                let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
                for &value in &values[..if similarity == Similarity::Cosine { 3 } else { 1 }] {
                    let set = |storage: &Storage, row: usize| storage.map(|values| values[row * 6 + 2] = value);
                    for row in [0, 3, 100] {
                        let mut problem = clean.clone();
                        let table = problem.table.as_mut().expect("asked for");
                        table.embeddings = set(&table.embeddings, row);
                        must_spoil(backend, &problem, &before, operands, &format!("{value} in row {row}, {config:?}"));
                    }
                    let mut problem = clean.clone();
                    problem.queries = set(&problem.queries, 65);
                    must_spoil(backend, &problem, &before, operands, &format!("{value} in a query, {config:?}"));
                }
            }
        }
    }
}

fn must_spoil(backend: Subject<'_>, problem: &Problem, before: &Step, operands: Operands, what: &str) {
    let after = everything(backend, problem);
    // A NaN where the reference has one, and only there.
    let expected = Expected::measure(problem, operands(problem.queries.dtype()));
    expected.check(&after).unwrap_or_else(|error| panic!("{error}\nwith {what}"));
    for (row, lse) in expected.output.statistics.lse.iter().enumerate() {
        let same = after.statistics.lse[row].to_bits() == before.statistics.lse[row].to_bits();
        // A spoiled positive has no bound, so its row may have other negatives.
        let positives = problem.pairs(row).all(|pair| expected.output.statistics.positive[pair].is_finite());
        assert!(same || !lse.is_finite() || !positives, "{what}: lse of row {row} changed");
    }
}
