//! A table in shards, each rank a thread with a backend of its own, against one reference that has all of it.

use catalog_softmax::{Correction, Cuda, DType, Request, Similarity};
use catalog_softmax_testing::generate_tables::{FILTERS, PoolKind, PositiveKind, TableConfig};
use catalog_softmax_testing::shards::{check, results, sharded};
use catalog_softmax_testing::tolerance::Expected;

use crate::open;

pub fn a_table_in_shards_agrees(_: &mut Cuda) {
    let pools = [(vec![], 0), (vec![PoolKind::Rows(13)], 4), (vec![PoolKind::Own(7), PoolKind::WholeTable], 0)];
    let divisions = [vec![23], vec![9, 14], vec![11, 0, 12]];
    for (seed, (pools, per_row)) in pools.into_iter().enumerate() {
        for (dtype, sizes) in [DType::F32, DType::F16, DType::Bf16].into_iter().zip(&divisions) {
            let config = TableConfig {
                similarity: if seed % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                temperature: 0.3,
                dtype,
                correction: if seed == 0 { Correction::None } else { Correction::LogQ },
                pools: pools.clone(),
                per_row,
                positives: if seed == 1 { PositiveKind::Several } else { PositiveKind::One },
                filter: FILTERS[seed % FILTERS.len()],
                excluded: true,
                weights: true,
                seed: seed as u64,
                ..TableConfig::new(9, 23, 6)
            };
            let problem = config.problem();
            let request = Request::value_and_grad().with_moments().with_rank();
            let found = sharded(|| open::backend().expect("opened before"), &problem, sizes, request);
            let expected = Expected::new(&problem, dtype);
            check(&expected, &results(&found), |expected, at| expected.tolerances[at].clone())
                .unwrap_or_else(|error| panic!("{error}\n{sizes:?} {config:?}"));
        }
    }
}
