//! What holds of batches over a table whatever the scores are.

use catalog_softmax::{RowNegatives, TopK};
use rand::seq::SliceRandom;

use super::*;
use crate::generate_tables::{FilterKind, PoolKind, PositiveKind, TableConfig};
use crate::lowering::{Source, Widened};
use crate::problem::RowNegativesData;

fn rows_of(pool: &PoolData) -> &[u32] {
    match &pool.rows {
        Some(PoolRows::These(rows)) => rows,
        other => panic!("a pool of rows, not {other:?}"),
    }
}

fn positives(problem: &Problem) -> &[u32] {
    let PositiveData::Index(positives) = &problem.positives else { panic!("rows of the table") };
    positives
}

fn d_table(output: &Step) -> &catalog_softmax::Matrix<f32> {
    gradients(output).d_table.as_ref().and_then(TableGradient::dense).expect("a dense gradient of the table")
}

/// Two outputs have the same results, as far as they have the same ones.
fn same_results(expected: &Expected, one: &[Tensor], two: &[Tensor], what: &str) {
    let mut compared = 0;
    for (tensor, tolerances) in expected.tensors.iter().zip(&expected.tolerances) {
        let by_name = |tensors: &[Tensor]| tensors.iter().find(|other| other.name == tensor.name).cloned();
        let (Some(one), Some(two)) = (by_name(one), by_name(two)) else { continue };
        assert_eq!(one.values.len(), two.values.len(), "{what}: {}", tensor.name);
        compare(&[one], &[two], std::slice::from_ref(tolerances), 2.0)
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        compared += 1;
    }
    assert!(compared >= 6, "{what}: only {compared} results compared");
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn assert_bitwise(one: &Step, two: &Step, what: &str) {
    for (one, two) in tensors(one).iter().zip(&tensors(two)) {
        let bits = |tensor: &Tensor| tensor.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert!(one.name == two.name && bits(one) == bits(two), "{what}: {} differs", one.name);
    }
}

pub fn row_negatives_alike_are_a_shared_pool(backend: Subject<'_>, operands: Operands) {
    for (turn, n) in [1, 31, 97, 300].into_iter().enumerate() {
        let config = TableConfig {
            correction: [Correction::LogQ, Correction::None, Correction::CorrectedLogQ][turn % 3],
            pools: vec![PoolKind::Rows(n)],
            positives: PositiveKind::Several,
            filter: if turn % 2 == 0 { FilterKind::MarginAbove } else { FilterKind::None },
            excluded: true,
            ids: turn % 2 == 1,
            seed: n as u64,
            ..TableConfig::new(70, 120, 11)
        };
        let shared = config.problem();
        let mut own = shared.clone();
        let pool = own.pools.pop().expect("asked for");
        own.row_negatives = Some(RowNegativesData {
            rows: rows_of(&pool).repeat(config.b),
            per_row: n,
            log_q: pool.log_q.map(|log_q| log_q.repeat(config.b)),
        });
        let [one, two] = [&shared, &own].map(|problem| tensors(&everything(backend, problem)));
        same_results(&Expected::new(&shared, operands(DType::F32)), &one, &two, &format!("{config:?}"));
    }
}

/// The table's rows copied by the caller, and their gradients summed by the caller, as without a table.
pub fn rows_of_a_table_are_copies(backend: Subject<'_>, operands: Operands) {
    for (n, dtype, filter) in [(1, DType::F32, false), (95, DType::F16, true), (270, DType::Bf16, false)] {
        let config = TableConfig {
            dtype,
            correction: Correction::LogQ,
            pools: vec![PoolKind::Rows(n)],
            positives: PositiveKind::Several,
            filter: if filter { FilterKind::MarginBelow } else { FilterKind::None },
            excluded: true,
            ..TableConfig::new(33, 150, 9)
        };
        let by_rows = config.problem();
        let mut copied = by_rows.clone();
        let table = copied.table.take().expect("asked for").embeddings;
        let values = table.to_f32();
        let copy = |rows: &[u32]| {
            let copied: Vec<f32> = rows.iter().flat_map(|&row| &values[row as usize * 9..][..9]).copied().collect();
            Storage::new(&copied, dtype)
        };
        let ids = |rows: &[u32]| rows.iter().map(|&row| u64::from(row)).collect::<Vec<u64>>();
        let (pool, rows) = (rows_of(&by_rows.pools[0]), positives(&by_rows));
        copied.pools[0].candidates = copy(pool);
        copied.pools[0].ids = Some(ids(pool));
        copied.pools[0].rows = None;
        copied.positive_ids = Some(ids(rows));
        copied.positives = PositiveData::Separate(copy(rows));
        let [one, two] = [&by_rows, &copied].map(|problem| everything(backend, problem));
        let mut summed = vec![0.0; values.len()];
        let copies = gradients(&two);
        let d_positives = copies.d_positive_embeddings.as_ref().expect("separate");
        for (rows, d) in [(pool, &copies.d_candidates[0]), (rows, d_positives)] {
            for (at, &row) in rows.iter().enumerate() {
                let to = &mut summed[row as usize * 9..][..9];
                to.iter_mut().zip(d.row(at)).for_each(|(to, &d)| *to += f64::from(d));
            }
        }
        let mut by_copies = tensors(&two);
        by_copies.retain(|tensor| !tensor.name.starts_with("d_candidates"));
        by_copies.push(Tensor { name: "d_table".to_string(), values: summed, width: 9 });
        let expected = Expected::new(&by_rows, operands(dtype));
        same_results(&expected, &tensors(&one), &by_copies, &format!("{config:?}"));
    }
}

/// A row with several positives is that many rows with one each, where the others are excluded.
pub fn several_positives_are_repeated_rows(backend: Subject<'_>, operands: Operands) {
    for (turn, pools) in
        [vec![], vec![PoolKind::Rows(50)], vec![PoolKind::WholeTable, PoolKind::Own(8)]].iter().enumerate()
    {
        for correction in [Correction::None, Correction::LogQ, Correction::CorrectedLogQ] {
            let config = TableConfig {
                correction,
                reduction: Reduction::Sum,
                pools: pools.clone(),
                per_row: if turn == 2 { 0 } else { 9 },
                positives: PositiveKind::Several,
                positive_weight: true,
                exact_weights: true,
                weights: true,
                excluded: true,
                ids: turn == 1,
                seed: turn as u64,
                ..TableConfig::new(40, 90, 7)
            };
            let several = config.problem();
            let repeated = repeat_rows(&several);
            let [one, two] = [&several, &repeated].map(|problem| everything(backend, problem));
            let mut by_rows = tensors(&two);
            by_rows.retain(|t| {
                t.name == "total" || t.name == "positive" || t.name == "probability" || t.name.starts_with("d_")
            });
            let of_queries = by_rows.iter_mut().find(|tensor| tensor.name == "d_queries").expect("asked for");
            let mut summed = vec![0.0; several.queries.len()];
            for row in 0..config.b {
                for pair in several.pairs(row) {
                    (0..7).for_each(|k| summed[row * 7 + k] += of_queries.values[pair * 7 + k]);
                }
            }
            of_queries.values = summed;
            let expected = Expected::new(&several, operands(DType::F32));
            same_results(&expected, &tensors(&one), &by_rows, &format!("{config:?}"));
            for row in 0..config.b {
                for pair in several.pairs(row) {
                    let lse = [one.statistics.lse[row], two.statistics.lse[pair]];
                    assert!(near(&lse[..1], &lse[1..]), "{config:?}: lse of row {row}: {lse:?}");
                }
            }
        }
    }
}

fn repeat_rows(several: &Problem) -> Problem {
    let (b, d) = (several.num_queries(), several.dim);
    let row_of: Vec<usize> = (0..b).flat_map(|row| several.pairs(row).map(move |_| row)).collect();
    let mut repeated = several.clone();
    repeated.positive_offsets = None;
    let copies = |values: Vec<f32>, width: usize| -> Vec<f32> {
        row_of.iter().flat_map(|&row| values[row * width..(row + 1) * width].to_vec()).collect()
    };
    repeated.queries = Storage::new(&copies(several.queries.to_f32(), d), several.queries.dtype());
    if let Some(own) = &several.row_negatives {
        let k = own.per_row;
        repeated.row_negatives = Some(RowNegativesData {
            rows: row_of.iter().flat_map(|&row| own.rows[row * k..(row + 1) * k].to_vec()).collect(),
            per_row: k,
            log_q: own.log_q.clone().map(|log_q| copies(log_q, k)),
        });
    }
    let table = several.table.as_ref().expect("over a table");
    let (offsets, ids) = several.excluded.as_ref().expect("asked for");
    let (mut new_offsets, mut new_ids) = (vec![0], Vec::new());
    for (pair, &row) in row_of.iter().enumerate() {
        new_ids.extend(&ids[offsets[row] as usize..offsets[row + 1] as usize]);
        let others = several.pairs(row).filter(|&other| other != pair);
        new_ids.extend(others.map(|other| table.id(positives(several)[other] as usize)));
        new_offsets.push(new_ids.len() as i64);
    }
    repeated.excluded = Some((new_offsets, new_ids));
    let weights = several.row_weight.as_ref().expect("asked for");
    let of_pairs = repeated.positive_weight.take().expect("asked for");
    repeated.row_weight = Some(row_of.iter().zip(of_pairs).map(|(&row, weight)| weights[row] * weight).collect());
    repeated
}

pub fn one_positive_by_offsets_is_one_positive(backend: Subject<'_>, _: Operands) {
    for positives in [PositiveKind::One, PositiveKind::Separate] {
        let config = TableConfig {
            positives,
            pools: vec![PoolKind::Rows(300), PoolKind::Own(20)],
            per_row: 20,
            correction: Correction::LogQ,
            filter: FilterKind::MarginAbove,
            weights: true,
            ..TableConfig::new(130, 200, 19)
        };
        let without = config.problem();
        let mut with = without.clone();
        with.positive_offsets = Some((0..=130).collect());
        let [one, two] = [&without, &with].map(|problem| everything(backend, problem));
        assert_bitwise(&one, &two, &format!("{positives:?}"));
        // A positive of weight 1 is one without weight.
        with.positive_weight = Some(vec![1.0; 130]);
        assert_bitwise(&one, &everything(backend, &with), &format!("{positives:?} with weights"));
    }
    // Positives that are candidates by index.
    let config =
        Config { pools: vec![300, 40], correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(130, 1, 9) };
    let without = config.problem();
    let mut with = without.clone();
    with.positive_offsets = Some((0..=130).collect());
    let [one, two] = [&without, &with].map(|problem| everything(backend, problem));
    assert_bitwise(&one, &two, "by index");
}

/// Several positives that are candidates by index, without ids and with them.
pub fn several_positives_by_index_agree(backend: Subject<'_>, operands: Operands) {
    for masking in [Masking::None, Masking::Ids, Masking::Excluded] {
        for correction in [Correction::None, Correction::LogQ, Correction::CorrectedLogQ] {
            for similarity in [Similarity::Cosine, Similarity::Dot] {
                let config = Config {
                    similarity,
                    correction,
                    masking,
                    weights: true,
                    pools: vec![50, 1, 290],
                    ..Config::new(75, 1, 13)
                };
                let mut problem = config.problem();
                let PositiveData::Index(one_each) = &problem.positives else { panic!("by index") };
                let mut random = rng(5);
                let (mut offsets, mut index) = (vec![0], Vec::new());
                for &positive in one_each {
                    let count = random.random_range(0..4usize);
                    let others = [positive, positive, random.random_range(0..341)];
                    index.extend(&others[..count]);
                    offsets.push(index.len() as i64);
                }
                problem.positives = PositiveData::Index(index);
                problem.positive_offsets = Some(offsets);
                let output = everything(backend, &problem);
                let agrees = Expected::new(&problem, operands(DType::F32)).check(&output);
                agrees.unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
            }
        }
    }
}

/// A batch over a table that says nothing of its candidates has all of them.
pub fn the_whole_table_is_the_pool_of_a_batch_without_one(backend: Subject<'_>, _: Operands) {
    let named = TableConfig { positives: PositiveKind::Several, ..TableConfig::new(70, 400, 6) }.problem();
    let mut unnamed = named.clone();
    unnamed.pools.clear();
    let [one, two] = [&named, &unnamed].map(|problem| everything(backend, problem));
    assert!(matches!(named.pools[0].rows, Some(PoolRows::All)));
    assert_bitwise(&one, &two, "the whole table");
}

pub fn a_permuted_table_has_permuted_gradients(backend: Subject<'_>, operands: Operands) {
    let m = 700;
    for (turn, pools) in [vec![PoolKind::Rows(400)], vec![PoolKind::WholeTable], vec![]].into_iter().enumerate() {
        let config = TableConfig {
            pools,
            per_row: if turn == 1 { 0 } else { 30 },
            positives: PositiveKind::Several,
            excluded: true,
            ids: true,
            seed: turn as u64,
            ..TableConfig::new(60, m, 10)
        };
        let plain = config.problem();
        let mut to: Vec<u32> = (0..m as u32).collect();
        to.shuffle(&mut rng(9));
        let mut permuted = plain.clone();
        let map = |rows: &mut Vec<u32>| {
            rows.iter_mut().filter(|row| **row != RowNegatives::NONE).for_each(|row| *row = to[*row as usize]);
        };
        let table = permuted.table.as_mut().expect("asked for");
        let before = plain.table.as_ref().expect("asked for");
        let values = before.embeddings.to_f32();
        table.embeddings = table.embeddings.map(|moved| {
            for (row, from) in values.chunks(10).enumerate() {
                moved[to[row] as usize * 10..][..10].copy_from_slice(from);
            }
        });
        let (old, ids) = (before.ids.as_ref().expect("asked for"), table.ids.as_mut().expect("asked for"));
        (0..m).for_each(|row| ids[to[row] as usize] = old[row]);
        if let PositiveData::Index(rows) = &mut permuted.positives {
            map(rows);
        }
        for pool in &mut permuted.pools {
            if let Some(PoolRows::These(rows)) = &mut pool.rows {
                map(rows);
            }
        }
        if let Some(own) = &mut permuted.row_negatives {
            map(&mut own.rows);
        }
        let [one, two] = [&plain, &permuted].map(|problem| everything(backend, problem));
        let mut back = tensors(&two);
        let d = back.iter_mut().find(|tensor| tensor.name == "d_table").expect("asked for");
        let moved = d.values.clone();
        (0..m).for_each(|row| d.values[row * 10..][..10].copy_from_slice(&moved[to[row] as usize * 10..][..10]));
        let expected = Expected::new(&plain, operands(DType::F32));
        same_results(&expected, &tensors(&one), &back, &format!("{config:?}"));
    }
}

/// Problems that name rows in every way.
fn every_way() -> Vec<Problem> {
    let base = TableConfig {
        pools: vec![PoolKind::Rows(70), PoolKind::Own(30), PoolKind::Rows(300)],
        per_row: 25,
        positives: PositiveKind::Several,
        correction: Correction::LogQ,
        filter: FilterKind::MarginAbove,
        weights: true,
        frozen: 4,
        ..TableConfig::new(150, 2_000, 12)
    };
    let catalogue =
        TableConfig { pools: vec![PoolKind::WholeTable, PoolKind::Rows(40)], frozen: 0, per_row: 0, ..base.clone() };
    let frozen = TableConfig { frozen: 1, ..catalogue.clone() };
    let separate = TableConfig { positives: PositiveKind::SeveralSeparate, dtype: DType::F16, ..base.clone() };
    let own = TableConfig { pools: Vec::new(), frozen: 0, ..base.clone() };
    [base, catalogue, frozen, separate, own].iter().map(TableConfig::problem).collect()
}

/// The rows that a problem names, so that they have a gradient.
fn named(problem: &Problem) -> Vec<u32> {
    let mut rows = Vec::new();
    for pool in problem.pools.iter().filter(|pool| pool.gradient) {
        match &pool.rows {
            Some(PoolRows::These(these)) => rows.extend(these),
            Some(PoolRows::All) => rows.extend(0..problem.table_rows() as u32),
            None => {}
        }
    }
    if let PositiveData::Index(positives) = &problem.positives {
        rows.extend(positives);
    }
    let own = problem.row_negatives.iter().flat_map(|own| &own.rows);
    rows.extend(own.filter(|row| **row != RowNegatives::NONE));
    rows.sort_unstable();
    rows.dedup();
    rows
}

pub fn row_sparse_gradients_are_the_dense_ones_rows(backend: Subject<'_>, _: Operands) {
    for (p, problem) in every_way().iter().enumerate() {
        let dense = compute(backend, problem, Request::value_and_grad());
        let sparse = compute(backend, problem, Request::value_and_grad().row_sparse());
        let rows = gradients(&sparse).d_table.as_ref().and_then(TableGradient::row_sparse).expect("asked for");
        assert_eq!(rows.rows, named(problem), "problem {p}");
        let d = d_table(&dense);
        assert_eq!((d.rows, d.dim), (problem.table_rows(), problem.dim));
        let mut at = 0;
        for row in 0..d.rows {
            if rows.rows.get(at) == Some(&(row as u32)) {
                assert_eq!(bits(d.row(row)), bits(rows.values.row(at)), "problem {p}, row {row}");
                at += 1;
            } else {
                assert!(all_zero(d.row(row)), "problem {p}, row {row}");
            }
        }
        assert_eq!(gradients(&dense).d_queries, gradients(&sparse).d_queries);
    }
}

/// Every gradient of a step as one list, and a row-sparse one as a dense one.
fn flat(gradients: &Gradients<f32>, table_rows: usize) -> Vec<f64> {
    let wide = |values: &[f32]| values.iter().map(|&value| f64::from(value)).collect::<Vec<f64>>();
    let mut all = wide(&gradients.d_queries.values);
    gradients.d_candidates.iter().for_each(|d| all.extend(wide(&d.values)));
    gradients.d_positive_embeddings.iter().for_each(|d| all.extend(wide(&d.values)));
    match &gradients.d_table {
        Some(TableGradient::Dense(d)) => all.extend(wide(&d.values)),
        Some(TableGradient::RowSparse(rows)) => {
            let dim = rows.values.dim;
            let mut dense = vec![0.0; table_rows * dim];
            for (at, &row) in rows.rows.iter().enumerate() {
                dense[row as usize * dim..][..dim].copy_from_slice(&wide(rows.values.row(at)));
            }
            all.extend(dense);
        }
        None => {}
    }
    all.extend([gradients.d_temperature, gradients.d_log_temperature]);
    all
}

fn add_to(backend: Subject<'_>, problem: &Problem, request: Request, to: &mut Gradients<f32>) {
    let batch = problem.batch().expect("a valid problem");
    let mut output = catalog_softmax::Output::default();
    backend.compute(&batch, &problem.loss, request, &mut output, Some(to)).expect("a loss that fits");
}

/// What is added is the gradient that is written otherwise, in one addition.
pub fn accumulated_gradients_are_sums(backend: Subject<'_>, _: Operands) {
    let ordinary = Config { separate: true, pools: vec![300, 20], ..Config::new(90, 1, 12) }.problem();
    let symmetric = Config { symmetric: true, ..Config::new(90, 90, 12) }.problem();
    for (p, problem) in every_way().into_iter().chain([ordinary, symmetric]).enumerate() {
        let mut other = problem.clone();
        other.queries = other.queries.map(|values| values.rotate_left(problem.dim));
        if let Some(own) = &mut other.row_negatives {
            // Other rows of the table.
            own.rows.iter_mut().filter(|row| **row != RowNegatives::NONE).for_each(|row| *row = (*row * 7 + 3) % 2_000);
        }
        for sparse in [false, true] {
            if sparse && problem.table.is_none() {
                continue;
            }
            let request = Request::value_and_grad();
            let request = if sparse { request.row_sparse() } else { request };
            let [mut one, mut two] = [(); 2].map(|()| Gradients::default());
            add_to(backend, &problem, request, &mut one);
            add_to(backend, &other, request, &mut two);
            let m = problem.table_rows();
            let single = |one: f64, two: f64| f64::from(one as f32 + two as f32);
            let sums = |one: &[f64], two: &[f64]| -> Vec<f64> {
                let matrices = one.len() - 2;
                let sum = |(at, (&one, &two))| if at < matrices { single(one, two) } else { one + two };
                one.iter().zip(two).enumerate().map(sum).collect()
            };
            let (first, second) = (flat(&one, m), flat(&two, m));
            let mut twice = one.clone();
            add_to(backend, &problem, request.accumulate(), &mut twice);
            assert!(flat(&twice, m) == sums(&first, &first), "problem {p}, twice");
            add_to(backend, &other, request.accumulate(), &mut one);
            assert!(flat(&one, m) == sums(&first, &second), "problem {p}, another batch");
            assert!(second.iter().any(|&d| d != 0.0));
        }
    }
}

/// Gradients of things that a batch has not stay as they are.
pub fn accumulation_leaves_what_a_batch_has_not(backend: Subject<'_>, _: Operands) {
    let mut of_another = Gradients::default();
    let config =
        TableConfig { pools: vec![PoolKind::Own(20)], positives: PositiveKind::Separate, ..TableConfig::new(9, 30, 5) };
    add_to(backend, &config.problem(), Request::value_and_grad(), &mut of_another);
    let before = of_another.clone();
    let frozen = TableConfig { positives: PositiveKind::One, frozen_table: true, ..config }.problem();
    add_to(backend, &frozen, Request::value_and_grad().accumulate(), &mut of_another);
    assert!(before.d_positive_embeddings.is_some() && before.d_table.is_some());
    assert_eq!(of_another.d_positive_embeddings, before.d_positive_embeddings);
    assert_eq!(of_another.d_table, before.d_table);
}

pub fn what_has_no_gradient_gets_none(backend: Subject<'_>, _: Operands) {
    for (kind, n) in [(PoolKind::Rows(50), 50), (PoolKind::WholeTable, 300)] {
        let config = TableConfig { pools: vec![kind], frozen: 1, ..TableConfig::new(20, 300, 6) };
        let problem = config.problem();
        let output = everything(backend, &problem);
        let d = d_table(&output);
        let of_positives = positives(&problem);
        for row in 0..300 {
            let is_positive = of_positives.contains(&(row as u32));
            assert!(is_positive || all_zero(d.row(row)), "{n} candidates, row {row}");
        }
        assert!(!all_zero(&d.values));
        assert!(gradients(&output).d_candidates[0].values.is_empty());

        let frozen = TableConfig { frozen: 0, frozen_table: true, ..config }.problem();
        let output = everything(backend, &frozen);
        assert!(gradients(&output).d_table.is_none());
        assert!(!all_zero(&gradients(&output).d_queries.values));
    }
}

/// Stale memory of an earlier step shows nowhere: a row that names none of its own has nothing to add.
pub fn rows_that_name_nothing_add_nothing(backend: Subject<'_>, operands: Operands) {
    let config = TableConfig { pools: vec![PoolKind::Rows(40)], per_row: 10, ..TableConfig::new(70, 90, 8) };
    let mut problem = config.problem();
    everything(backend, &problem);
    let own = problem.row_negatives.as_mut().expect("asked for");
    own.rows.iter_mut().enumerate().filter(|(at, _)| (at / 10) % 3 != 0).for_each(|(_, row)| *row = RowNegatives::NONE);
    let output = everything(backend, &problem);
    Expected::new(&problem, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
    // Nobody names anything, and there is no pool.
    problem.pools.clear();
    problem.row_negatives.as_mut().expect("asked for").rows.fill(RowNegatives::NONE);
    let output = everything(backend, &problem);
    assert_eq!((output.total, output.statistics.num_negatives.iter().sum::<u64>()), (0.0, 0));
    assert!(all_zero(&gradients(&output).d_queries.values) && all_zero(&d_table(&output).values));
    assert!(all_zero(&output.statistics.expected_negative.as_ref().expect("asked for").values));
}

pub fn a_positive_of_weight_zero_is_still_no_negative(backend: Subject<'_>, operands: Operands) {
    let config = TableConfig {
        pools: vec![PoolKind::WholeTable],
        positives: PositiveKind::Several,
        positive_weight: true,
        filter: FilterKind::MarginAbove,
        ..TableConfig::new(50, 80, 6)
    };
    let mut problem = config.problem();
    let before = everything(backend, &problem);
    problem.positive_weight.as_mut().expect("asked for").iter_mut().step_by(2).for_each(|weight| *weight = 0.0);
    let after = everything(backend, &problem);
    Expected::new(&problem, operands(DType::F32)).check(&after).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(before.statistics.lse, after.statistics.lse);
    problem.positive_weight.as_mut().expect("asked for").fill(0.0);
    let after = everything(backend, &problem);
    assert_eq!(before.statistics.lse, after.statistics.lse);
    assert_eq!(after.total, 0.0);
    assert!(all_zero(&d_table(&after).values) && all_zero(&gradients(&after).d_queries.values));
}

/// The k hardest negatives are those that plain loops find, and they serve as negatives of the rows' own.
pub fn the_hardest_negatives_are_the_most_similar(backend: Subject<'_>, operands: Operands) {
    let shapes = [(vec![PoolKind::Rows(60)], 7), (vec![PoolKind::Rows(300)], 300), (vec![PoolKind::WholeTable], 20)];
    for (turn, (pools, k)) in shapes.into_iter().enumerate() {
        for positives in [PositiveKind::One, PositiveKind::Several, PositiveKind::SeveralSeparate] {
            let config = TableConfig {
                similarity: if turn == 1 { Similarity::Dot } else { Similarity::Cosine },
                temperature: 1.0,
                pools: pools.clone(),
                positives,
                excluded: true,
                ids: turn == 1,
                seed: turn as u64,
                ..TableConfig::new(65, 200, 5)
            };
            let problem = config.problem();
            let batch = problem.batch().expect("a valid problem");
            let top = backend.hardest_negatives(&batch, config.similarity, k).expect("a valid k");
            assert_eq!(top, backend.hardest_negatives(&batch, config.similarity, k).expect("a valid k"));
            check_hardest(&problem, &top, &format!("{config:?}"));
            let rows: Vec<u32> = match &problem.pools[0].rows {
                Some(PoolRows::These(rows)) => rows.clone(),
                _ => (0..200).collect(),
            };
            let mut step = problem.clone();
            step.pools.clear();
            step.row_negatives = Some(RowNegativesData { rows: top.through(&rows), per_row: k, log_q: None });
            let output = everything(backend, &step);
            let counts: Vec<u64> = (0..65).map(|row| top.row(row).0.len() as u64).collect();
            assert_eq!(output.statistics.num_negatives, counts, "{config:?}: none of them is masked");
            Expected::new(&step, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
        }
    }
    // Without ids, by the index of the candidates.
    let problem = Config::new(30, 70, 6).problem();
    let batch = problem.batch().expect("a valid problem");
    check_hardest(&problem, &backend.hardest_negatives(&batch, Similarity::Cosine, 69).expect("a valid k"), "no ids");
}

fn check_hardest(problem: &Problem, top: &TopK, what: &str) {
    let mut raw = problem.clone();
    raw.loss.temperature = 1.0;
    let widened = Widened::new(&raw);
    let source = |at: usize| match &problem.pools[0].rows {
        None => Source::Pool(0, at),
        Some(PoolRows::All) => Source::Table(at),
        Some(PoolRows::These(rows)) => Source::Table(rows[at] as usize),
    };
    for row in 0..problem.num_queries() {
        let left: Vec<usize> = widened.unmasked_indices(row);
        let (found, scores) = top.row(row);
        assert_eq!(found.len(), left.len().min(top.k), "{what}: row {row}");
        let mut worst = f64::INFINITY;
        for (place, (&index, &score)) in found.iter().zip(scores).enumerate() {
            assert!(left.contains(&(index as usize)), "{what}: row {row} masks {index}");
            let exact = widened.score(row, source(index as usize));
            assert!((f64::from(score) - exact).abs() < 2e-5, "{what}: row {row}: {score} for {exact}");
            if place > 0 {
                let before = (scores[place - 1], found[place - 1]);
                assert!(before.0 > score || before.0 == score && before.1 < index, "{what}: row {row}, place {place}");
            }
            worst = worst.min(exact);
        }
        let missed = left.iter().filter(|index| !found.contains(&(**index as u32)));
        for &index in missed.filter(|_| found.len() == top.k) {
            assert!(widened.score(row, source(index)) < worst + 2e-5, "{what}: row {row} lacks {index}");
        }
    }
}

/// Ranks of each pair. Copies of a row's positive under other ids score as it does, in pools and among the row's own.
pub fn ranks_count_for_each_pair(backend: Subject<'_>, _: Operands) {
    for (turn, dim) in [1, 8, 31, 64, 96, 200, 257].into_iter().enumerate() {
        for (b, n, k) in [(1, 70, 5), (70, 0, 100), (97, 257, 33), (300, 96, 1), (9, 0, 1)] {
            let mut pools = if n > 0 { vec![PoolKind::Rows(n)] } else { Vec::new() };
            if turn % 2 == 1 && n > 0 {
                pools.push(PoolKind::WholeTable);
            }
            let config = TableConfig {
                similarity: if turn % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                dtype: [DType::F32, DType::F16, DType::Bf16][turn % 3],
                temperature: 0.3,
                correction: if turn % 2 == 0 { Correction::LogQ } else { Correction::None },
                pools,
                per_row: k,
                positives: if b == 9 { PositiveKind::One } else { PositiveKind::Several },
                seed: (dim + b) as u64,
                ..TableConfig::new(b, 150, dim)
            };
            check_pair_ranks(backend, &config);
        }
    }
}

fn check_pair_ranks(backend: Subject<'_>, config: &TableConfig) {
    let mut problem = config.problem();
    let dim = problem.dim;
    // Half of the table are copies of positives.
    let of_positives = positives(&problem).to_vec();
    let table = problem.table.as_mut().expect("asked for");
    let mut random = rng(config.seed);
    table.embeddings = table.embeddings.map(|values| {
        for row in 0..config.rows {
            if !of_positives.is_empty() && !of_positives.contains(&(row as u32)) && random.random_bool(0.5) {
                let from = of_positives[random.random_range(0..of_positives.len())] as usize;
                values.copy_within(from * dim..(from + 1) * dim, row * dim);
            }
        }
    });
    let output = compute(backend, &problem, Request::value().with_rank());
    let rank = output.statistics.rank.as_ref().expect("asked for");
    assert_eq!((rank.above.len(), rank.ties.len()), (problem.num_pairs(), problem.num_pairs()));
    let (widened, values) = (Widened::new(&problem), problem.table.as_ref().expect("asked for").embeddings.to_f32());
    let embedding = |row: usize| &values[row * dim..(row + 1) * dim];
    for row in 0..config.b {
        let negatives = widened.unmasked_sources(row);
        for pair in problem.pairs(row) {
            let (Source::Table(positive), _) = widened.positive(pair) else { panic!("a row of the table") };
            let score = widened.score(row, Source::Table(positive));
            let (mut twins, mut above, mut close) = (0, 0, 0);
            for &source in &negatives {
                let Source::Table(at) = source else { panic!("a row of the table") };
                let s = widened.score(row, source);
                if embedding(at) == embedding(positive) {
                    twins += 1;
                } else if (s - score).abs() < 1e-5 * (score.abs() + 1.0 / problem.loss.temperature) {
                    close += 1;
                } else if s > score {
                    above += 1;
                }
            }
            let (found_above, found_ties) = (rank.above[pair], rank.ties[pair]);
            let what = format!("{config:?}, row {row}, pair {pair}");
            assert!((above..=above + close).contains(&found_above), "{what}: above {found_above}, not {above}");
            assert!((twins..=twins + close).contains(&found_ties), "{what}: ties {found_ties}, not {twins}");
            assert!(found_above + found_ties <= above + twins + close, "{what}");
        }
    }
}
