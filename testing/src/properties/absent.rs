//! Ranks, and rows and candidates that take no part: masked, without negatives, of weight 0.

use super::*;

pub fn a_masked_candidate_has_no_gradient(backend: Subject<'_>, _: Operands) {
    // Every row excludes id 77, which every fifth candidate has; some rows have further masks.
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        let (b, n, d) = (270, 290, 7);
        let config = Config { similarity, masking: Masking::Excluded, separate: true, ..Config::new(b, n, d) };
        let mut problem = config.problem();
        let masked = |j: usize| j.is_multiple_of(5) || (200..240).contains(&j);
        let ids = problem.pools[0].ids.as_mut().expect("asked for");
        ids.iter_mut().enumerate().filter(|(j, _)| masked(*j)).for_each(|(_, id)| *id = 77);
        let (offsets, excluded) = problem.excluded.as_mut().expect("asked for");
        let old = excluded.clone();
        excluded.clear();
        for i in 0..b {
            let (from, to) = (offsets[i] as usize, offsets[i + 1] as usize);
            offsets[i] = excluded.len() as i64;
            excluded.extend(&old[from..to]);
            excluded.push(77);
        }
        offsets[b] = excluded.len() as i64;
        let output = everything(backend, &problem);
        let expected = reference(&problem).output.statistics.num_negatives;
        assert_eq!(output.statistics.num_negatives, expected);
        for j in 0..n {
            let d = gradients(&output).d_candidates[0].row(j);
            assert_eq!(d.iter().all(|&d| d == 0.0), masked(j), "{similarity:?}, candidate {j}: {d:?}");
        }
    }
    // Masked in row 0 alone, whose weight is all there is.
    let config = Config { masking: Masking::Ids, separate: true, weights: true, ..Config::new(3, 40, 5) };
    let mut problem = config.problem();
    problem.row_weight = Some(vec![1.0, 0.0, 0.0]);
    let id = problem.pools[0].ids.as_ref().expect("asked for")[11];
    problem.positive_ids.as_mut().expect("asked for")[0] = id;
    let output = everything(backend, &problem);
    for (j, &other) in problem.pools[0].ids.as_ref().expect("asked for").iter().enumerate() {
        let d = gradients(&output).d_candidates[0].row(j);
        assert_eq!(d.iter().all(|&d| d == 0.0), other == id, "candidate {j}: {d:?}");
    }
}

/// Counts of negatives that are bitwise the positive, and bounds of those above it.
fn check_ranks(backend: Subject<'_>, problem: &Problem, what: &str) {
    let output = compute(backend, problem, Request::value().with_rank());
    let rank = output.statistics.rank.as_ref().expect("asked for");
    let mut unadjusted = problem.clone();
    unadjusted.pools.iter_mut().for_each(|pool| pool.log_q = None);
    let (scores, _) = scores(&unadjusted);
    let (n, d) = (problem.num_candidates(), problem.dim);
    let (candidates, positives) = (problem.candidates(), problem.positive_rows());
    let exact = reference(problem).output.statistics.positive;
    for i in 0..problem.num_queries() {
        let positive = &positives[i * d..(i + 1) * d];
        let (mut twins, mut above, mut close) = (0, 0, 0);
        for (j, &s) in scores[i * n..(i + 1) * n].iter().enumerate() {
            if s == f64::NEG_INFINITY {
                continue;
            }
            if candidates[j * d..(j + 1) * d] == *positive {
                twins += 1;
            } else if (s - exact[i]).abs() < 1e-5 * (exact[i].abs() + 1.0 / problem.loss.temperature) {
                close += 1;
            } else if s > exact[i] {
                above += 1;
            }
        }
        let (found_above, found_ties) = (rank.above[i], rank.ties[i]);
        assert!(found_above >= above && found_above <= above + close, "{what}, row {i}: above {found_above}, {above}");
        assert!(found_ties >= twins && found_ties <= twins + close, "{what}, row {i}: ties {found_ties}, {twins}");
        assert!(found_above + found_ties <= above + twins + close, "{what}, row {i}");
    }
}

pub fn ranks_count_what_is_above_and_ties(backend: Subject<'_>, _: Operands) {
    let sizes = [(1, 1), (1, 600), (2, 7), (7, 97), (9, 31), (97, 257), (257, 96), (300, 33)];
    for dim in [1, 2, 3, 8, 31, 64, 257, 513, 700, 1030] {
        for (k, (b, n)) in sizes.into_iter().enumerate() {
            for separate in [false, true] {
                let config = Config {
                    similarity: if (k + dim) % 2 == 0 { Similarity::Cosine } else { Similarity::Dot },
                    temperature: 0.3,
                    dtype: [DType::F32, DType::F16, DType::Bf16][(k + dim) % 3],
                    masking: Masking::Ids,
                    separate,
                    correction: if k % 2 == 0 { Correction::LogQ } else { Correction::None },
                    pools: if n > 90 { vec![n - 40, 40] } else { vec![n] },
                    seed: (dim * 10 + k) as u64,
                    ..Config::new(b, 1, dim)
                };
                let mut problem = config.problem();
                // Copies of a few rows' positives, under ids of their own, all over the catalogue.
                let positives = problem.positive_rows();
                let total = problem.num_candidates();
                let mut start = 0;
                let mut random = rng(config.seed);
                for pool in &mut problem.pools {
                    let rows = pool.candidates.len() / dim;
                    let ids = pool.ids.as_mut().expect("asked for");
                    pool.candidates = pool.candidates.map(|values| {
                        for j in 0..rows {
                            let is_positive = match &problem.positives {
                                PositiveData::Index(index) => index.contains(&((start + j) as u32)),
                                PositiveData::Separate(_) => false,
                            };
                            if !is_positive && random.random_bool(0.3) {
                                let i = random.random_range(0..b);
                                values[j * dim..(j + 1) * dim].copy_from_slice(&positives[i * dim..(i + 1) * dim]);
                                ids[j] = 1 << 63 | (start + j) as u64;
                            }
                        }
                    });
                    start += rows;
                }
                assert_eq!(start, total);
                check_ranks(backend, &problem, &format!("B {b}, N {n}, D {dim}, separate {separate}"));
            }
        }
    }
}

pub fn rows_without_negatives_are_absent(backend: Subject<'_>, operands: Operands) {
    for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            // Row 1 excludes every id. Its positive is candidate 3, which is no other row's.
            let config = Config {
                correction,
                similarity,
                masking: Masking::Excluded,
                temperature: 0.5,
                ..Config::new(4, 300, 6)
            };
            let mut problem = config.problem();
            let mut all = problem.pools[0].ids.clone().expect("asked for");
            problem.positives = PositiveData::Index(vec![0, 3, 7, 299]);
            all.sort_unstable();
            all.dedup();
            problem.excluded = Some((vec![0, 0, all.len() as i64, all.len() as i64, all.len() as i64], all.clone()));
            let output = everything(backend, &problem);
            Expected::new(&problem, operands(DType::F32)).check(&output).unwrap_or_else(|error| panic!("{error}"));
            let statistics = &output.statistics;
            assert_eq!(statistics.num_negatives[1], 0);
            assert_eq!(statistics.lse[1], f64::NEG_INFINITY);
            assert_eq!((output.loss[1], output.probability[1]), (0.0, 1.0));
            let moments = statistics.moments.as_ref().expect("asked for");
            assert_eq!((moments.expected_score[1], moments.entropy[1]), (0.0, 0.0));
            assert!(all_zero(gradients(&output).d_queries.row(1)));
            assert!(all_zero(statistics.expected_negative.as_ref().expect("asked for").row(1)));
            assert!(output.total > 0.0, "the other rows count");

            // No row has a negative: nothing is left.
            let count = all.len() as i64;
            problem.excluded = Some(((0..5).map(|i| i * count).collect(), all.repeat(4)));
            let output = everything(backend, &problem);
            let g = gradients(&output);
            assert_eq!((output.total, g.d_temperature, g.d_log_temperature), (0.0, 0.0, 0.0));
            assert!(all_zero(&g.d_queries.values) && all_zero(&g.d_candidates[0].values), "{correction:?}");
        }
    }
    // A catalogue of the positive alone; and with separate positives.
    for separate in [false, true] {
        let config = Config { separate, masking: Masking::Ids, ..Config::new(1, 1, 3) };
        let mut problem = config.problem();
        problem.positive_ids = separate.then(|| problem.pools[0].ids.clone().expect("asked for"));
        let output = everything(backend, &problem);
        assert_eq!((output.total, output.statistics.lse[0]), (0.0, f64::NEG_INFINITY));
        let g = gradients(&output);
        assert!(all_zero(&g.d_queries.values) && all_zero(&g.d_candidates[0].values));
        assert!(g.d_positive_embeddings.as_ref().is_none_or(|d| all_zero(&d.values)));
    }
}

pub fn rows_of_weight_zero_are_absent(backend: Subject<'_>, operands: Operands) {
    for reduction in [Reduction::Sum, Reduction::Mean, Reduction::WeightedMean] {
        let config = Config { reduction, weights: true, separate: true, ..Config::new(20, 270, 8) };
        let mut problem = config.problem();
        problem.row_weight = Some((0..20).map(|i| if i % 4 == 1 { 0.0 } else { 0.5 + i as f32 }).collect());
        let output = everything(backend, &problem);
        let expected = Expected::new(&problem, operands(DType::F32));
        expected.check(&output).unwrap_or_else(|error| panic!("{error}"));
        // Something else in the rows of weight 0 changes nothing in the gradients of the candidates.
        let mut other = problem.clone();
        other.queries = problem.queries.map(|values| {
            let absent = values.chunks_mut(8).enumerate().filter(|(row, _)| row % 4 == 1);
            absent.for_each(|(_, row)| row.iter_mut().for_each(|x| *x = 5.0 - *x));
        });
        let changed = everything(backend, &other);
        assert_eq!(gradients(&output).d_candidates, gradients(&changed).d_candidates);
        assert_eq!(output.total, changed.total);
        for row in (1..20).step_by(4) {
            assert!(all_zero(gradients(&changed).d_queries.row(row)));
            let d = gradients(&changed).d_positive_embeddings.as_ref().expect("separate");
            assert!(all_zero(d.row(row)));
            assert!(changed.loss[row] > 0.0, "the loss of a row is before weights");
        }
    }
}
