//! The reference on batches over a table against itself on ordinary ones: each row lowered to a problem of copies, which
//! knows no table, no pairs and no filter. What is lowered shares no code with the crate.

use catalog_softmax::{Correction, DType, Reduction, Similarity};
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
        compare(&[tensor.clone()], &[copied], &[tolerances], 1.0)
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
