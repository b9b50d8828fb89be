//! A backend agrees with the reference: on random problems, at the edges of tiles, for every combination of options.

use super::*;

pub fn agrees_on_random_problems(backend: Subject<'_>, operands: Operands) {
    for_random_configs(400, [40, 60, 24], |config| agrees(backend, config, operands));
}

pub fn agrees_on_wide_random_problems(backend: Subject<'_>, operands: Operands) {
    for_random_configs(40, [300, 400, 80], |config| agrees(backend, config, operands));
}

pub fn agrees_at_the_edges_of_tiles(backend: Subject<'_>, operands: Operands) {
    let plan = tiles(backend, 8);
    let corrections = [
        Correction::LogQ,
        Correction::None,
        Correction::CorrectedLogQ,
        Correction::LogQNegativesOnly,
        Correction::LogQ,
    ];
    for (x, &b) in edges(plan.block_b).iter().enumerate() {
        for (y, &n) in edges(plan.block_n).iter().enumerate() {
            let config = Config {
                dim: [8, 3, 17, 33, 5][(x + y) % 5],
                similarity: if (x + y) % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                temperature: if (x + y) % 2 == 0 { 0.1 } else { 1.0 },
                correction: corrections[(x + 2 * y) % 5],
                masking: [Masking::Ids, Masking::None, Masking::Excluded][(x + y) % 3],
                separate: y % 2 == 1,
                weights: x % 2 == 1,
                seed: (x * 5 + y) as u64,
                ..Config::new(b, n, 8)
            };
            must_agree(backend, &config, operands);
        }
    }
    // Pools that end and begin within what would be a tile.
    let t = plan.block_n;
    for pools in [vec![1, t - 1, t, t + 1], vec![t + 1, 1, 1, 2 * t + 3], vec![5; 9]] {
        let config = Config { pools, correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(19, 1, 12) };
        must_agree(backend, &config, operands);
    }
}

pub fn agrees_at_every_width(backend: Subject<'_>, operands: Operands) {
    for (i, dim) in
        [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 127, 128, 255, 256, 257, 512, 513, 1030].into_iter().enumerate()
    {
        let n = tiles(backend, dim).block_n;
        let small = Config {
            similarity: if i % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
            correction: Correction::LogQ,
            separate: i % 3 == 0,
            masking: Masking::Ids,
            seed: dim as u64,
            ..Config::new(9, n + 1, dim)
        };
        must_agree(backend, &small, operands);
        let large = Config { similarity: Similarity::Cosine, separate: i % 3 == 1, ..Config::new(65, n - 1, dim) };
        must_agree(backend, &large, operands);
    }
}

/// The running maximum: a split of several tiles carries sums from one to the next and scales them as the maximum grows.
pub fn agrees_over_several_tiles_in_a_split(backend: Subject<'_>, operands: Operands) {
    for b in [1, 37] {
        let base = Config { correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(b, 1, 5) };
        let tiles_and_splits = |backend: Subject<'_>, pools: &[usize]| {
            let problem = Config { pools: pools.to_vec(), ..base.clone() }.problem();
            let batch = problem.batch().expect("a valid problem");
            let request = Request::value_and_grad();
            let plan = backend.plan(&batch, &problem.loss, request).expect("a loss that fits");
            (pools.iter().map(|n| n.div_ceil(plan.block_n)).sum::<usize>(), plan.splits)
        };
        // Tiles do not cross pools: many small pools are many tiles.
        let small: Vec<usize> = (0..300).map(|p| 1 + p % 3).collect();
        // No more candidates than the backend's number of splits asks for, since an emulated device is slow.
        let sizes = [6_000, 20_000, 60_000].map(|n| vec![n + b]);
        let is_enough = |pools: &&Vec<usize>| {
            let (tiles, splits) = tiles_and_splits(backend, pools);
            tiles >= 4 * splits
        };
        let large = sizes.iter().find(is_enough).unwrap_or(&sizes[2]).clone();
        let (tiles, splits) = tiles_and_splits(backend, &large);
        assert!(tiles >= 2 * splits, "a case for the test: {tiles} tiles in {splits} splits");
        for pools in [small, large] {
            for (similarity, temperature) in [(Similarity::Cosine, 0.02), (Similarity::Dot, 1.0)] {
                must_agree(
                    backend,
                    &Config { pools: pools.clone(), similarity, temperature, ..base.clone() },
                    operands,
                );
            }
        }
    }
}

pub fn agrees_on_strided_views(backend: Subject<'_>, operands: Operands) {
    for (i, padding) in [1, 3, 29].into_iter().enumerate() {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let config = Config {
                dtype,
                separate: i % 2 == 0,
                pools: vec![300, 7],
                correction: Correction::LogQ,
                masking: Masking::Ids,
                ..Config::new(11, 1, 7 + i)
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
}

pub fn agrees_for_every_combination_of_options(backend: Subject<'_>, operands: Operands) {
    let mut seed = 0;
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ]
        {
            for reduction in [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean] {
                for masking in [Masking::None, Masking::Ids, Masking::Excluded] {
                    for separate in [false, true] {
                        seed += 1;
                        let config = Config {
                            pools: vec![20, 1, 13],
                            dtype: [DType::F32, DType::F16, DType::Bf16][seed % 3],
                            similarity,
                            temperature: [0.05, 0.2, 1.0][seed % 3],
                            correction,
                            reduction,
                            masking,
                            separate,
                            log_q: if seed % 2 == 0 { LogQ::OrderOne } else { LogQ::Realistic },
                            weights: seed % 4 < 2,
                            frozen: seed as u32 % 8,
                            seed: seed as u64,
                            ..Config::new(12, 1, 10)
                        };
                        must_agree(backend, &config, operands);
                    }
                }
            }
        }
    }
    for (i, reduction) in
        [Reduction::None, Reduction::Mean, Reduction::Sum, Reduction::WeightedMean].into_iter().enumerate()
    {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            let masking = if i % 2 == 0 { Masking::Ids } else { Masking::None };
            let config =
                Config { symmetric: true, weights: true, reduction, similarity, masking, ..Config::new(33, 33, 6) };
            must_agree(backend, &config, operands);
        }
    }
}
