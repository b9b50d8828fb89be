//! NaN and infinities spoil what they touch and nothing else.

use super::*;

/// Every element type; rows that start at multiples of 16 bytes, and others; rows of more than 256 elements.
const NAN_CASES: [(Similarity, DType, usize); 6] = [
    (Similarity::Cosine, DType::F32, 6),
    (Similarity::Dot, DType::F32, 6),
    (Similarity::Cosine, DType::F16, 72),
    (Similarity::Dot, DType::Bf16, 72),
    (Similarity::Dot, DType::F16, 264),
    (Similarity::Cosine, DType::Bf16, 264),
];

pub fn nan_spoils_what_it_touches(backend: Subject<'_>, _: Operands) {
    let (b, n) = (270, 300);
    for (similarity, dtype, d) in NAN_CASES {
        let config = Config {
            similarity,
            dtype,
            temperature: 0.5,
            separate: true,
            masking: Masking::Ids,
            ..Config::new(b, n, d)
        };
        let clean = config.problem();
        let before = everything(backend, &clean);
        let set = |storage: &Storage, row: usize, value: f32| storage.map(|values| values[row * d + 2] = value);
        let same = |a: f64, b: f64| a.to_bits() == b.to_bits();

        // In a query, of any payload: its row, and the gradients of all candidates, which its row has no share in.
        for nan in [f32::NAN, f32::from_bits(0x7fc0_0001), f32::from_bits(0xffff_ffff), f32::INFINITY] {
            let mut problem = clean.clone();
            problem.queries = set(&clean.queries, 130, nan);
            let after = everything(backend, &problem);
            for i in 0..b {
                let (lse, loss) = (after.statistics.lse[i], after.loss[i]);
                if i == 130 {
                    assert!(!lse.is_finite() && !loss.is_finite(), "{similarity:?}, {nan} in a query: {lse}, {loss}");
                    assert!(gradients(&after).d_queries.row(i).iter().any(|d| d.is_nan()));
                } else {
                    assert!(same(lse, before.statistics.lse[i]) && same(loss, before.loss[i]), "row {i}");
                    assert_eq!(gradients(&after).d_queries.row(i), gradients(&before).d_queries.row(i), "row {i}");
                }
            }
            assert!(!after.total.is_finite());
        }

        // In a separate positive: its row's loss, not its lse.
        let mut problem = clean.clone();
        let PositiveData::Separate(embeddings) = &clean.positives else { panic!("separate") };
        problem.positives = PositiveData::Separate(set(embeddings, 7, f32::NAN));
        let after = everything(backend, &problem);
        for i in 0..b {
            assert!(same(after.statistics.lse[i], before.statistics.lse[i]), "row {i}");
            assert_eq!(after.loss[i].is_nan(), i == 7, "row {i}");
            assert_eq!(gradients(&after).d_queries.row(i).iter().any(|d| d.is_nan()), i == 7, "row {i}");
        }

        // In a candidate: every row that has it for a negative, and no other.
        for nan in [f32::NAN, f32::from_bits(0x7fc0_0001)] {
            let mut problem = clean.clone();
            problem.pools[0].candidates = set(&clean.pools[0].candidates, 33, nan);
            let id = clean.pools[0].ids.as_ref().expect("asked for")[33];
            // Some of them masked.
            let positive_ids = problem.positive_ids.as_mut().expect("asked for");
            for i in (0..b).step_by(40) {
                positive_ids[i] = id;
            }
            let masked = |i: usize| problem.positive_ids.as_ref().expect("asked for")[i] == id;
            let after = everything(backend, &problem);
            for i in 0..b {
                assert_eq!(after.statistics.lse[i].is_nan(), !masked(i), "{similarity:?}, row {i}");
                assert_eq!(after.loss[i].is_nan(), !masked(i), "{similarity:?}, row {i}");
                if !masked(i) {
                    assert!(gradients(&after).d_queries.row(i).iter().any(|d| d.is_nan()), "row {i}");
                }
            }
        }
    }
}

/// 0 · NaN enters no sum: not from a row of weight 0, not from a masked pair.
pub fn nan_spoils_nothing_else(backend: Subject<'_>, _: Operands) {
    let (b, n) = (270, 300);
    for (similarity, dtype, d) in NAN_CASES {
        let config = Config {
            similarity,
            dtype,
            temperature: 0.5,
            separate: true,
            masking: Masking::Ids,
            ..Config::new(b, n, d)
        };
        let clean = config.problem();
        let set = |storage: &Storage, row: usize, value: f32| storage.map(|values| values[row * d + 2] = value);
        let ids = clean.pools[0].ids.as_ref().expect("asked for");

        // In the query of a row of weight 0: all but that row stays.
        let mut problem = clean.clone();
        problem.row_weight = Some((0..b).map(|i| if i == 130 { 0.0 } else { 1.0 }).collect());
        let before = everything(backend, &problem);
        problem.queries = set(&clean.queries, 130, f32::NAN);
        let after = everything(backend, &problem);
        assert_eq!(after.total, before.total, "{similarity:?}");
        let same = gradients(&after).d_candidates == gradients(&before).d_candidates;
        assert!(same, "{similarity:?}: a NaN in a query of weight 0 reached the candidates' gradients");
        assert_eq!(gradients(&after).d_temperature, gradients(&before).d_temperature, "{similarity:?}");

        // In a query: what its row masks has no share in it.
        let mut problem = clean.clone();
        problem.queries = set(&clean.queries, 130, f32::NAN);
        problem.positive_ids.as_mut().expect("asked for")[130] = ids[33];
        let after = everything(backend, &problem);
        for (j, id) in ids.iter().enumerate() {
            let finite = gradients(&after).d_candidates[0].row(j).iter().all(|d| d.is_finite());
            assert_eq!(finite, *id == ids[33], "{similarity:?}, candidate {j}");
        }

        // In candidates, early and late in a tile and beyond it: the rows that mask them.
        for candidate in [33, 100, 290] {
            let mut problem = clean.clone();
            let masked = |i: usize| i.is_multiple_of(40);
            let positive_ids = problem.positive_ids.as_mut().expect("asked for");
            for i in (0..b).filter(|&i| masked(i)) {
                positive_ids[i] = ids[candidate];
            }
            let before = everything(backend, &problem);
            problem.pools[0].candidates = set(&clean.pools[0].candidates, candidate, f32::NAN);
            let after = everything(backend, &problem);
            for i in (0..b).filter(|&i| masked(i)) {
                assert_eq!(after.loss[i], before.loss[i], "{similarity:?}, candidate {candidate}, row {i}");
                let [after, before] = [&after, &before].map(|output| gradients(output).d_queries.row(i));
                assert_eq!(after, before, "{similarity:?}, candidate {candidate}, row {i}");
            }
        }
    }
}
