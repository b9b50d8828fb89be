//! What distinguishes one loss, one epilogue or one request from another.

use super::*;

pub fn losses_are_not_negative(backend: Subject<'_>, _: Operands) {
    for_random_configs(100, [20, 40, 8], |config| {
        if config.correction == Correction::CorrectedLogQ {
            return Ok(());
        }
        let output = compute(backend, &config.problem(), Request::value());
        match output.loss.iter().chain([&output.total]).find(|loss| loss.is_nan() || **loss < 0.0) {
            Some(loss) => Err(format!("a loss of {loss}")),
            None => Ok(()),
        }
    });
}

pub fn corrected_logq_is_a_shifted_cross_entropy(backend: Subject<'_>, operands: Operands) {
    let (b, n) = (13, 270);
    let config = Config {
        correction: Correction::CorrectedLogQ,
        separate: true,
        log_q: LogQ::Realistic,
        ..Config::new(b, n, 8)
    };
    let mut corrected = config.problem();
    // One probability for all positives, so that one log_q' serves all rows; no masks, so that n is the same in each.
    let positive_log_q = -1.5f32;
    corrected.positive_log_q = Some(vec![positive_log_q; b]);
    let shift = (n as f64).ln() - (-f64::from(positive_log_q).exp()).ln_1p();
    let mut shifted = corrected.clone();
    shifted.positive_log_q = None;
    shifted.loss = shifted.loss.correction(Correction::LogQNegativesOnly);
    let log_q = shifted.pools[0].log_q.as_mut().expect("asked for");
    log_q.iter_mut().for_each(|l| *l = (f64::from(*l) + shift) as f32);
    let (one, two) = (everything(backend, &corrected), everything(backend, &shifted));
    let tolerances = Expected::new(&corrected, operands(DType::F32)).tolerances;
    let (one, two) = (tensors(&one), tensors(&two));
    for name in ["d_queries", "d_candidates[0]", "d_positive_embeddings", "d_temperature"] {
        let at = one.iter().position(|t| t.name == name).expect("asked for");
        let one = std::slice::from_ref(&one[at]);
        compare(one, &two[at..=at], &tolerances[at..=at], 2.0).unwrap_or_else(|error| panic!("{error}"));
    }
}

pub fn a_symmetric_loss_is_the_mean_of_both_directions(backend: Subject<'_>, operands: Operands) {
    for masking in [Masking::None, Masking::Ids] {
        let b = 261;
        let config = Config { symmetric: true, weights: true, masking, ..Config::new(b, b, 10) };
        let problem = Config { reduction: Reduction::WeightedMean, ..config }.problem();
        let mut one_way = problem.clone();
        one_way.loss.symmetric = false;
        let (both, one, other) =
            (everything(backend, &problem), everything(backend, &one_way), everything(backend, &problem.swapped()));
        let PositiveData::Index(positives) = &problem.positives else { panic!("by index") };
        let mut mean = one.clone();
        mean.total = 0.5 * (one.total + other.total);
        for (i, &j) in positives.iter().enumerate() {
            mean.loss[i] = 0.5 * (one.loss[i] + other.loss[j as usize]);
            mean.probability[i] = 0.5 * (one.probability[i] + other.probability[j as usize]);
        }
        let half = |a: &mut [f32], b: &[f32]| a.iter_mut().zip(b).for_each(|(a, b)| *a = 0.5 * (*a + b));
        let (into, from) = (mean.gradients.as_mut().expect("asked for"), gradients(&other));
        half(&mut into.d_queries.values, &from.d_candidates[0].values);
        half(&mut into.d_candidates[0].values, &from.d_queries.values);
        into.d_temperature = 0.5 * (into.d_temperature + from.d_temperature);
        into.d_log_temperature = 0.5 * (into.d_log_temperature + from.d_log_temperature);
        same(&Expected::new(&problem, operands(DType::F32)), &tensors(&mean), &tensors(&both), "symmetric");
        assert_eq!(both.statistics, one.statistics, "statistics are those of queries against candidates");
        let value = compute(backend, &problem, Request::value());
        assert!(near(&[value.total], &[both.total]) && near(&value.loss, &both.loss));
    }
}

pub fn an_epilogue_of_your_own_gets_its_gradients(backend: Subject<'_>, operands: Operands) {
    let config = Config {
        pools: vec![200, 90],
        correction: Correction::LogQ,
        masking: Masking::Excluded,
        weights: true,
        separate: true,
        ..Config::new(33, 1, 11)
    };
    let problem = config.problem();
    let (batch, loss) = (problem.batch().expect("a valid problem"), &problem.loss);
    let whole: Step = backend.value_and_grad(&batch, loss).expect("a loss that fits").into();
    let statistics = backend.statistics(&batch, loss, Request::value_and_grad()).expect("a loss that fits");
    let epilogue = loss.epilogue(&batch, &statistics).expect("a loss that fits");
    let parts = backend
        .gradients(&batch, loss, &statistics, &epilogue.d_lse, &epilogue.d_positive)
        .expect("statistics with gradients");
    assert_eq!(epilogue.loss, whole.loss);
    assert_eq!(epilogue.total, whole.total);
    let mut rebuilt = whole.clone();
    rebuilt.gradients = Some(parts);
    let expected = Expected::new(&problem, operands(DType::F32));
    let close = |found: &[Tensor]| {
        let without_moments: Vec<usize> = (0..expected.tensors.len())
            .filter(|&at| !["expected_score", "entropy"].contains(&expected.tensors[at].name.as_str()))
            .collect();
        let want: Vec<Tensor> = without_moments.iter().map(|&at| expected.tensors[at].clone()).collect();
        let tolerances: Vec<Vec<f64>> = without_moments.iter().map(|&at| expected.tolerances[at].clone()).collect();
        compare(&want, found, &tolerances, 1.0)
    };
    close(&tensors(&rebuilt)).unwrap_or_else(|error| panic!("{error}"));

    // Arbitrary derivatives by lse and positive, of both signs, one of them 0: the loss of margins and z-losses.
    let d_lse: Vec<f64> = (0..33).map(|i| f64::from(i % 5 - 2) * 0.3).collect();
    let d_positive: Vec<f64> = (0..33).map(|i| f64::from(i % 3 - 1) * 0.7).collect();
    let found = backend.gradients(&batch, loss, &statistics, &d_lse, &d_positive).expect("statistics with gradients");
    let mut truth = Reference::new();
    let exact = truth.statistics(&batch, loss, Request::value_and_grad()).expect("a loss that fits");
    let want = truth.gradients(&batch, loss, &exact, &d_lse, &d_positive).expect("statistics with gradients");
    let near = |name: &str, found: &[f32], want: &[f64]| {
        for (row, (found, want)) in found.chunks(11).zip(want.chunks(11)).enumerate() {
            let size = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
            let off = found.iter().zip(want).fold(0.0f64, |max, (f, w)| max.max((f64::from(*f) - w).abs()));
            assert!(off <= 3e-5 * size, "{name}, row {row}: off by {off:e} of {size:e}");
        }
    };
    near("d_queries", &found.d_queries.values, &want.d_queries.values);
    for p in 0..2 {
        near("d_candidates", &found.d_candidates[p].values, &want.d_candidates[p].values);
    }
    let (found_p, want_p) = (found.d_positive_embeddings.as_ref(), want.d_positive_embeddings.as_ref());
    near("d_positive_embeddings", &found_p.expect("separate").values, &want_p.expect("separate").values);
    assert!((found.d_temperature / want.d_temperature - 1.0).abs() < 1e-4);
}

pub fn requests_do_not_change_each_other(backend: Subject<'_>, _: Operands) {
    let config =
        Config { pools: vec![300, 20], correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(19, 1, 13) };
    let problem = config.problem();
    let value = compute(backend, &problem, Request::value());
    let all = compute(backend, &problem, Request::value_and_grad().with_moments().with_rank());
    let (plain, rich): (&RowStatistics, &RowStatistics) = (&value.statistics, &all.statistics);
    assert!(near(&plain.lse, &rich.lse) && near(&plain.positive, &rich.positive) && near(&value.loss, &all.loss));
    assert_eq!(plain.num_negatives, rich.num_negatives);
    assert!(plain.moments.is_none() && plain.rank.is_none() && plain.expected_negative.is_none());
    assert!(value.gradients.is_none() && all.gradients.is_some());
    assert!(rich.moments.is_some() && rich.rank.is_some() && rich.expected_negative.is_some());
    let moments = compute(backend, &problem, Request::value().with_moments());
    assert_eq!(moments.statistics.moments, rich.moments);
    let rank = compute(backend, &problem, Request::value().with_rank());
    assert_eq!(rank.statistics.rank, rich.rank);
    // A smaller request clears what a larger one left.
    let mut reused = all.clone();
    let batch = problem.batch().expect("a valid problem");
    reused.compute(backend, &batch, &problem.loss, Request::value()).expect("a loss that fits");
    assert_eq!(reused, value);
}
