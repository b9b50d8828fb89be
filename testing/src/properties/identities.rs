//! What holds of the softmax whatever the scores are.

use super::*;

/// Dot products with the axes' unit vectors: candidate j is e_j and every row's positive e_n, so that gradients of the
/// queries are the coefficients themselves.
fn axes(b: usize, n: usize, temperature: f64, correction: Correction) -> Problem {
    let dim = n + 1;
    let unit = |j: usize| (0..dim).map(move |k| if k == j { 1.0f32 } else { 0.0 });
    let config = Config { correction, masking: Masking::Ids, separate: true, ..Config::new(b, n, 2) };
    let mut problem = config.problem();
    problem.dim = dim;
    problem.queries = Storage::F32(rows(&mut rng(3), b, dim, 1.0));
    problem.pools[0].candidates = Storage::F32((0..n).flat_map(unit).collect());
    problem.positives = PositiveData::Separate(Storage::F32((0..b).flat_map(|_| unit(n)).collect()));
    problem.loss = Loss::softmax(Similarity::Dot, temperature).correction(correction).reduction(Reduction::Sum);
    problem
}

pub fn coefficients_sum_to_one_minus_p_and_follow_the_exponential(backend: Subject<'_>, _: Operands) {
    let (b, n, tau) = (9, 300, 0.7);
    for correction in [Correction::None, Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
        let problem = axes(b, n, tau, correction);
        let output = everything(backend, &problem);
        let (z, negatives) = scores(&problem);
        let queries = problem.queries.to_f32();
        for i in 0..b {
            let z = &z[i * n..(i + 1) * n];
            let coefficients: Vec<f64> =
                gradients(&output).d_queries.row(i).iter().map(|&d| f64::from(d) * tau).collect();
            let sum: f64 = z.iter().map(|z| z.exp()).sum();
            let positive = (f64::from(queries[i * (n + 1) + n]) / tau).exp();
            let log_q = problem.positive_log_q.as_ref().map_or(0.0, |log_q| f64::from(log_q[i]));
            let (sum_here, positive_here) = match correction {
                Correction::LogQ => (sum, positive / log_q.exp()),
                Correction::CorrectedLogQ => (sum * (1.0 - log_q.exp()) / negatives[i] as f64, positive),
                _ => (sum, positive),
            };
            let a = sum_here / (sum_here + positive_here);
            let total: f64 = coefficients[..n].iter().sum();
            assert!((total - a).abs() < 3e-6 * a, "{correction:?}: row {i}: {total} != {a}");
            assert!((coefficients[n] + a).abs() < 3e-6 * a, "{correction:?}: positive of row {i}: {}", coefficients[n]);
            assert!((1.0 - output.probability[i] - a).abs() < 3e-6, "{correction:?}: probability of row {i}");
            for (j, (&coefficient, z)) in coefficients.iter().zip(z).enumerate() {
                if *z == f64::NEG_INFINITY {
                    assert_eq!(coefficient, 0.0, "{correction:?}: masked ({i}, {j})");
                } else {
                    let expected = a * z.exp() / sum;
                    let off = (coefficient - expected).abs();
                    assert!(off < 1e-5 * expected, "{correction:?}: ({i}, {j}): {coefficient} != {expected}");
                }
            }
        }
    }
}

pub fn gradients_of_two_negatives_have_the_ratio_of_their_exponentials(backend: Subject<'_>, _: Operands) {
    for (tau, dim, n) in [(0.3, 20, 500), (1.0, 3, 90), (2.5, 64, 300)] {
        let config = Config { similarity: Similarity::Dot, temperature: tau, ..Config::new(1, n, dim) };
        let problem = config.problem();
        let output = everything(backend, &problem);
        let (z, _) = scores(&problem);
        let queries = problem.queries.to_f32();
        let k = (0..dim).max_by(|&a, &b| queries[a].abs().total_cmp(&queries[b].abs())).expect("dim >= 1");
        let coefficient = |j: usize| f64::from(gradients(&output).d_candidates[0].row(j)[k] / queries[k]);
        let negatives: Vec<usize> = (0..n).filter(|&j| z[j] > f64::NEG_INFINITY).collect();
        for pair in negatives.windows(2) {
            let found = coefficient(pair[0]) / coefficient(pair[1]);
            let expected = (z[pair[0]] - z[pair[1]]).exp();
            assert!((found / expected - 1.0).abs() < 2e-5, "{pair:?} at {tau}: {found} != {expected}");
        }
    }
}

pub fn entropy_grows_with_temperature(backend: Subject<'_>, _: Operands) {
    let config = Config { temperature: 0.2, separate: true, ..Config::new(5, 300, 16) };
    let mut at = |tau: f64| {
        let mut problem = config.problem();
        problem.loss.temperature = tau;
        let output = everything(backend, &problem);
        (problem, output)
    };
    let entropy = |output: &Step| output.statistics.moments.clone().expect("asked for").entropy;
    let mut before = vec![-1e-6; 5];
    for tau in [1e-3, 0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0, 100.0] {
        let (problem, output) = at(tau);
        let now = entropy(&output);
        assert!(now.iter().zip(&before).all(|(now, before)| now >= before), "{tau}: {now:?} after {before:?}");
        before = now;
        if !(0.1..=3.0).contains(&tau) {
            continue;
        }
        // ∂H/∂τ = D[sim] / τ³
        let step = 0.01 * tau;
        let (below, above) = (entropy(&at(tau - step).1), entropy(&at(tau + step).1));
        let (z, _) = scores(&problem);
        for i in 0..5 {
            let row = &z[i * 300..(i + 1) * 300];
            let sum: f64 = row.iter().map(|z| z.exp()).sum();
            let mean: f64 = row.iter().map(|z| z.exp() / sum * z).sum();
            let variance: f64 = row.iter().map(|z| z.exp() / sum * (z - mean).powi(2)).sum();
            let (slope, expected) = ((above[i] - below[i]) / (2.0 * step), variance / tau);
            let off = (slope - expected).abs();
            assert!(off < 0.01 * expected + 4e-6 / step, "τ = {tau}, row {i}: {slope} != {expected}");
        }
    }
    // τ → ∞: uniform.
    let (problem, output) = at(1e6);
    let candidates = problem.candidates();
    for i in 0..5 {
        assert!((entropy(&output)[i] - 300f64.ln()).abs() < 1e-5, "{:?}", entropy(&output));
        assert!((output.statistics.lse[i] - 300f64.ln()).abs() < 1e-5);
        for k in 0..16 {
            let unit = |row: &[f32]| f64::from(row[k]) / row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let mean = candidates.chunks(16).map(unit).sum::<f64>() / 300.0;
            let o = output.statistics.expected_negative.as_ref().expect("asked for").row(i)[k];
            assert!((f64::from(o) - mean).abs() < 1e-6, "row {i}, {k}: {o} != {mean}");
        }
    }
    // τ → 0: the best negative takes all.
    let (problem, output) = at(1e-6);
    let (z, _) = scores(&problem);
    for i in 0..5 {
        let row = &z[i * 300..(i + 1) * 300];
        let best = (0..300).max_by(|&a, &b| row[a].total_cmp(&row[b])).expect("300 candidates");
        assert!(entropy(&output)[i].abs() < 1e-6);
        assert!((output.statistics.lse[i] / row[best] - 1.0).abs() < 1e-6);
        let c = &candidates[best * 16..(best + 1) * 16];
        let norm = c.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let o = output.statistics.expected_negative.as_ref().expect("asked for").row(i);
        assert!(o.iter().zip(c).all(|(&o, &c)| (f64::from(o) - f64::from(c) / norm).abs() < 1e-6), "row {i}");
    }
}

pub fn a_constant_added_to_log_q_changes_nothing(backend: Subject<'_>, operands: Operands) {
    for separate in [false, true] {
        let config =
            Config { correction: Correction::LogQ, separate, masking: Masking::Ids, ..Config::new(17, 300, 12) };
        let mut problem = config.problem();
        // Multiples of 1/64, so that the sum is exact.
        let round = |log_q: &mut Vec<f32>| log_q.iter_mut().for_each(|l| *l = (*l * 64.0).round() / 64.0);
        problem.pools[0].log_q.as_mut().into_iter().chain(problem.positive_log_q.as_mut()).for_each(round);
        let mut shifted = problem.clone();
        let shift = |log_q: &mut Vec<f32>| log_q.iter_mut().for_each(|l| *l += 2.0);
        shifted.pools[0].log_q.as_mut().into_iter().chain(shifted.positive_log_q.as_mut()).for_each(shift);
        let (one, mut two) = (everything(backend, &problem), everything(backend, &shifted));
        two.statistics.lse.iter_mut().for_each(|lse| *lse += 2.0);
        let expected = Expected::new(&shifted, operands(DType::F32));
        same(&expected, &tensors(&one), &tensors(&two), "log_q + 2");
    }
}

pub fn lengths_change_nothing_under_cosine(backend: Subject<'_>, operands: Operands) {
    for separate in [false, true] {
        let config = Config { separate, temperature: 0.2, ..Config::new(17, 280, 12) };
        let problem = config.problem();
        let expected = Expected::new(&problem, operands(DType::F32));
        let one = everything(backend, &problem);
        let factor = |row: usize| [1.0f32, 1024.0, 3.0, 2f32.powi(-20), 0.7][row % 5];
        let scale = |values: &mut Vec<f32>| {
            values.chunks_mut(12).enumerate().for_each(|(row, x)| x.iter_mut().for_each(|x| *x *= factor(row)));
        };
        let mut scaled = problem.clone();
        scaled.queries = problem.queries.map(scale);
        scaled.pools[0].candidates = problem.pools[0].candidates.map(scale);
        if let PositiveData::Separate(embeddings) = &mut scaled.positives {
            *embeddings = embeddings.map(scale);
        }
        let mut two = tensors(&everything(backend, &scaled));
        for tensor in &mut two {
            if ["d_queries", "d_candidates[0]", "d_positive_embeddings"].contains(&tensor.name.as_str()) {
                tensor.values.iter_mut().enumerate().for_each(|(at, d)| *d *= f64::from(factor(at / 12)));
            }
        }
        same(&expected, &tensors(&one), &two, "scaled");

        // Each gradient is orthogonal to its vector.
        let d = tensors(&one);
        for (name, x) in [
            ("d_queries", problem.queries.to_f32()),
            ("d_candidates[0]", problem.candidates()),
            ("d_positive_embeddings", problem.positive_rows()),
        ] {
            let Some(at) = d.iter().position(|t| t.name == name) else { continue };
            for (row, (x, d)) in x.chunks(12).zip(d[at].values.chunks(12)).enumerate() {
                let along: f64 = x.iter().zip(d).map(|(&x, d)| f64::from(x) * d).sum();
                let norm = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                let bound = expected.tolerances[at][row] * norm * 12f64.sqrt();
                assert!(along.abs() <= bound, "{name}, row {row}: {along:e} along the vector, bound {bound:e}");
            }
        }
    }
}

fn shuffled(n: usize, seed: u64) -> Vec<usize> {
    let (mut order, mut rng) = ((0..n).collect::<Vec<_>>(), rng(seed));
    for i in (1..n).rev() {
        order.swap(i, rng.random_range(0..=i));
    }
    order
}

pub fn permuted_candidates_have_permuted_gradients(backend: Subject<'_>, operands: Operands) {
    let (b, n, d) = (31, 530, 9);
    let config = Config { correction: Correction::LogQ, masking: Masking::Excluded, ..Config::new(b, n, d) };
    let problem = config.problem();
    let order = shuffled(n, 5);
    let mut permuted = problem.clone();
    let (pool, from) = (&mut permuted.pools[0], &problem.pools[0]);
    pool.candidates = from.candidates.map(|values| {
        let original = values.clone();
        for (to, &from) in order.iter().enumerate() {
            values[to * d..(to + 1) * d].copy_from_slice(&original[from * d..(from + 1) * d]);
        }
    });
    pool.ids = from.ids.as_ref().map(|ids| order.iter().map(|&j| ids[j]).collect());
    pool.log_q = from.log_q.as_ref().map(|log_q| order.iter().map(|&j| log_q[j]).collect());
    let PositiveData::Index(positives) = &mut permuted.positives else { panic!("by index") };
    for positive in positives {
        *positive = order.iter().position(|&j| j == *positive as usize).expect("a permutation") as u32;
    }
    let (one, two) = (everything(backend, &problem), everything(backend, &permuted));
    let (one, mut two) = (tensors(&one), tensors(&two));
    let at = two.iter().position(|t| t.name == "d_candidates[0]").expect("asked for");
    let d_permuted = two[at].values.clone();
    for (to, &from) in order.iter().enumerate() {
        two[at].values[from * d..(from + 1) * d].copy_from_slice(&d_permuted[to * d..(to + 1) * d]);
    }
    same(&Expected::new(&problem, operands(DType::F32)), &one, &two, "permuted");
}

pub fn pools_are_one_catalogue(backend: Subject<'_>, operands: Operands) {
    let t = tiles(backend, 9).block_n;
    for sizes in [vec![1, t + 1, 31, 2 * t], vec![t, t, 1, 1], vec![7; 40]] {
        let n = sizes.iter().sum();
        let whole =
            Config { correction: Correction::LogQ, masking: Masking::Excluded, ..Config::new(21, n, 9) }.problem();
        let mut split = whole.clone();
        split.pools.clear();
        let (pool, mut start) = (&whole.pools[0], 0);
        for &rows in &sizes {
            let values = pool.candidates.to_f32();
            split.pools.push(PoolData {
                candidates: Storage::F32(values[start * 9..(start + rows) * 9].to_vec()),
                rows: None,
                ids: pool.ids.as_ref().map(|ids| ids[start..start + rows].to_vec()),
                log_q: pool.log_q.as_ref().map(|log_q| log_q[start..start + rows].to_vec()),
                gradient: true,
            });
            start += rows;
        }
        let request = Request::value_and_grad().with_moments().with_rank();
        let (one, two) = (compute(backend, &whole, request), compute(backend, &split, request));
        assert_eq!(one.statistics.rank, two.statistics.rank, "{sizes:?}");
        let (one, mut two) = (tensors(&one), tensors(&two));
        let first = two.iter().position(|t| t.name == "d_candidates[0]").expect("asked for");
        let parts: Vec<Tensor> = two.splice(first..first + sizes.len(), []).collect();
        let joined = parts.iter().flat_map(|part| part.values.clone()).collect();
        two.insert(first, Tensor { name: "d_candidates[0]".into(), values: joined, width: 9 });
        same(&Expected::new(&whole, operands(DType::F32)), &one, &two, "pools");

        // A pool without gradient changes no other's.
        let all = everything(backend, &split);
        split.pools[1].gradient = false;
        let frozen = everything(backend, &split);
        for (p, (a, b)) in gradients(&all).d_candidates.iter().zip(&gradients(&frozen).d_candidates).enumerate() {
            if p == 1 {
                assert_eq!((b.rows, b.values.len()), (0, 0), "pool 1 is frozen");
            } else {
                assert_eq!(a, b, "pool {p}");
            }
        }
        assert_eq!(gradients(&all).d_queries, gradients(&frozen).d_queries);
    }
}

pub fn temperature_and_queries_agree_on_the_scale(backend: Subject<'_>, _: Operands) {
    // Under `Dot`, to scale the queries is to scale γ: Σ q·∂L/∂q = γ ∂L/∂γ = −∂L/∂log τ = −τ ∂L/∂τ.
    for tau in [0.05, 0.5, 2.0, 30.0] {
        for correction in [Correction::None, Correction::LogQ, Correction::CorrectedLogQ] {
            let similarity = Similarity::Dot;
            let config = Config { similarity, temperature: tau, correction, ..Config::new(23, 280, 14) };
            let problem = config.problem();
            let output = everything(backend, &problem);
            let g = gradients(&output);
            let products = problem.queries.to_f32();
            let products = products.iter().zip(&g.d_queries.values).map(|(&q, &d)| f64::from(q) * f64::from(d));
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()));
            assert!((sum + g.d_log_temperature).abs() < 3e-6 * size, "{tau}: {sum} != −{}", g.d_log_temperature);
            assert!((g.d_log_temperature / (tau * g.d_temperature) - 1.0).abs() < 1e-6, "{tau}");
        }
    }
}

pub fn the_expected_score_is_that_of_the_expected_negative(backend: Subject<'_>, _: Operands) {
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        let config = Config {
            similarity,
            temperature: 0.4,
            correction: Correction::LogQ,
            masking: Masking::Ids,
            ..Config::new(29, 600, 20)
        };
        let problem = config.problem();
        let output = everything(backend, &problem);
        let moments = output.statistics.moments.as_ref().expect("asked for");
        let o = output.statistics.expected_negative.as_ref().expect("asked for");
        let (z, _) = scores(&problem);
        let log_q = problem.pools[0].log_q.as_ref().expect("asked for");
        for (i, q) in problem.queries.to_f32().chunks(20).enumerate() {
            let length = q.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let inverse = if similarity == Similarity::Cosine { 1.0 / length } else { 1.0 };
            let dot: f64 = q.iter().zip(o.row(i)).map(|(&q, &o)| f64::from(q) * f64::from(o)).sum();
            let (score, found) = (dot * inverse / 0.4, moments.expected_score[i]);
            assert!((score - found).abs() < 1e-5 * (1.0 + found.abs()), "row {i}: {score} != {found}");
            // H = lse − E[z]
            let row = &z[i * 600..(i + 1) * 600];
            let sum: f64 = row.iter().map(|z| z.exp()).sum();
            let mean_log_q: f64 = row.iter().zip(log_q).map(|(z, &l)| z.exp() / sum * f64::from(l)).sum();
            let entropy = output.statistics.lse[i] - (found - mean_log_q);
            assert!((entropy - moments.entropy[i]).abs() < 1e-5, "row {i}: {entropy} != {}", moments.entropy[i]);
        }
    }
}
