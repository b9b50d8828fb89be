//! The reference on batches over a table against itself on ordinary ones: each row lowered to a problem of copies, which
//! knows no table, no pairs and no filter. What is lowered shares no code with the crate.

use catalog_softmax::{
    Backend, Correction, DType, Gradients, Output, Reduction, Reference, Request, Similarity, TableGradient,
};
use catalog_softmax_testing::generate_tables::{CORRECTIONS, FILTERS, PoolKind, PositiveKind, REDUCTIONS, TableConfig};
use catalog_softmax_testing::lowering::{Lift, lower};
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::tolerance::{Expected, compare, reference, tensors};

/// The largest error, as a share of the terms of an element.
const FLOAT64: f64 = 1e-9;

fn check(config: &TableConfig) {
    let problem = config.problem();
    let expected = Expected::new(&problem, DType::F32);
    let lowered = by_lowering(&problem);
    for (tensor, scales) in expected.tensors.iter().zip(&expected.scales) {
        let mut copied = tensor.clone();
        copied.values =
            lowered.results.get(&tensor.name).unwrap_or_else(|| panic!("{} of {config:?}", tensor.name)).clone();
        assert_eq!(copied.values.len(), tensor.values.len(), "{} of {config:?}", tensor.name);
        let tolerances: Vec<f64> = scales.iter().map(|scale| FLOAT64 * scale.terms).collect();
        compare(std::slice::from_ref(tensor), &[copied], &[tolerances], 1.0)
            .unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
    }
}

fn by_lowering(problem: &Problem) -> Lift<'_, f64> {
    let mut lift = Lift::new(problem, problem.dim);
    (0..problem.pools.len()).for_each(|pool| lift.reserve_pool(pool));
    for name in ["positive", "probability", "d_positive_embeddings", "d_table"] {
        lift.reserve(name);
    }
    for row in lower(problem) {
        for tensor in tensors(&reference(&row.problem)) {
            lift.add(&row, &tensor.name, &tensor.values);
        }
    }
    lift
}

/// Every weight is exact in the `f32` in which the lowered problems have it, so all that is left is float64's rounding.
fn exact() -> TableConfig {
    TableConfig { exact_weights: true, temperature: 0.3, ..TableConfig::new(16, 23, 6) }
}

#[test]
fn the_reference_agrees_with_itself_on_copies() {
    let pools = [
        (vec![], 5),
        (vec![], 0),
        (vec![PoolKind::Rows(13)], 4),
        (vec![PoolKind::Own(7), PoolKind::Rows(6)], 0),
        (vec![PoolKind::WholeTable, PoolKind::Own(4)], 3),
    ];
    let positives = [PositiveKind::One, PositiveKind::Several, PositiveKind::Separate, PositiveKind::SeveralSeparate];
    let mut seed = 0;
    for (pools, per_row) in &pools {
        for positives in positives {
            for filter in FILTERS {
                for correction in CORRECTIONS {
                    for reduction in REDUCTIONS {
                        seed += 1;
                        check(&TableConfig {
                            similarity: if seed % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                            dtype: [DType::F32, DType::F16, DType::Bf16][seed % 3],
                            correction,
                            reduction,
                            pools: pools.clone(),
                            per_row: *per_row,
                            positives,
                            positive_weight: seed % 5 < 3,
                            filter,
                            excluded: seed % 7 < 4,
                            ids: seed % 11 < 5,
                            weights: seed % 4 < 2,
                            frozen: if seed % 3 == 0 { seed as u32 % 8 } else { 0 },
                            seed: seed as u64,
                            ..exact()
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn the_reference_agrees_with_itself_at_small_and_large_temperatures() {
    for temperature in [0.01, 0.05, 1.0, 30.0] {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            check(&TableConfig {
                similarity,
                temperature,
                correction: Correction::LogQ,
                reduction: Reduction::Mean,
                pools: vec![PoolKind::Rows(40)],
                per_row: 9,
                positives: PositiveKind::Several,
                filter: FILTERS[2],
                ..exact()
            });
        }
    }
}

/// Every gradient of the reference: a row-sparse one as a dense one, and sums where they are asked for.
#[test]
fn the_reference_has_row_sparse_and_accumulated_gradients() {
    let config = TableConfig {
        pools: vec![PoolKind::Rows(9), PoolKind::Own(4)],
        per_row: 3,
        positives: PositiveKind::Several,
        ..TableConfig::new(8, 60, 5)
    };
    let problem = config.problem();
    let gradients = |request: Request, mut into: Gradients<f64>| {
        let batch = problem.batch().expect("a valid problem");
        let mut output = Output::default();
        Reference::new()
            .compute(&batch, &problem.loss, request, &mut output, Some(&mut into))
            .expect("a loss that fits");
        into
    };
    let dense = gradients(Request::value_and_grad(), Gradients::default());
    let sparse = gradients(Request::value_and_grad().row_sparse(), Gradients::default());
    let d = dense.d_table.as_ref().and_then(TableGradient::dense).expect("asked for");
    let rows = sparse.d_table.as_ref().and_then(TableGradient::row_sparse).expect("asked for");
    assert!(rows.rows.is_sorted_by(|a, b| a < b) && rows.rows.len() < 40);
    for row in 0..60 {
        match rows.rows.binary_search(&row) {
            Ok(at) => assert_eq!(rows.values.row(at), d.row(row as usize)),
            Err(_) => assert!(d.row(row as usize).iter().all(|&d| d == 0.0)),
        }
    }
    for (request, once) in [(Request::value_and_grad(), dense), (Request::value_and_grad().row_sparse(), sparse)] {
        let twice = gradients(request.accumulate(), once.clone());
        assert_eq!(twice.d_temperature, 2.0 * once.d_temperature);
        let (one, two) = match (&once.d_table, &twice.d_table) {
            (Some(TableGradient::Dense(one)), Some(TableGradient::Dense(two))) => (one, two),
            (Some(TableGradient::RowSparse(one)), Some(TableGradient::RowSparse(two))) => (&one.values, &two.values),
            other => panic!("two forms: {other:?}"),
        };
        let matrices =
            [(one, two), (&once.d_queries, &twice.d_queries), (&once.d_candidates[1], &twice.d_candidates[1])];
        for (one, two) in matrices {
            assert!(!one.values.is_empty());
            assert!(one.values.iter().zip(&two.values).all(|(one, two)| 2.0 * one == *two));
        }
    }
}
