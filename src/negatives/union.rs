//! One log_q for several pools of negatives in one loss, such as in-batch, sampled and queued ones; and weights for the
//! gradients of candidates when some of these pools receive no gradient.

use crate::error::{Result, missing, shape, value};

/// log_q of candidates in the union of pools that were drawn from different distributions.
///
/// If pool k makes `n_k` draws from a distribution `Q_k`, the union is expected to hold `Σ_k n_k Q_k(j)` copies of item
/// j, whichever pool they come from. `pools` has `n_k` and the `log Q_k` of each candidate; `out` receives
///
/// ```text
/// log_q_j = log Σ_k n_k Q_k(j)          = log n + log of the probability per draw, with n = Σ_k n_k
/// ```
///
/// Call it once for the candidates of each pool, every time with the distributions of all pools. An item then has the
/// same log_q in every pool. `log Q_k` may be −∞ for an item that pool k never draws, as long as another pool draws it:
/// [`Distribution::log_probabilities`](crate::negatives::Distribution::log_probabilities) returns such values.
///
/// With these, `Σ_negatives exp(s − log_q)` estimates the softmax's sum over the catalogue. The weights are known as
/// the deterministic mixture, or balance heuristic, and have the least variance of their kind up to a term in 1/n
/// (Veach and Guibas, "Optimally Combining Sampling Techniques for Monte Carlo Rendering", SIGGRAPH 1995; Owen, "Monte
/// Carlo theory, methods and examples", chapter 9, on mixture and multiple importance sampling). What to give:
///
/// * [`Correction::LogQNegativesOnly`] needs **expected counts**: give `n_k` as they are. Its sum over negatives is
///   added to the positive's `exp(s)`. [`Correction::LogQ`] takes expected counts, too: a constant in all log_q does
///   not change it.
/// * [`Correction::CorrectedLogQ`] needs **probabilities per draw**: give `n_k / n` in place of `n_k`.
/// * In-batch negatives are B − 1 draws for each row from the popularity of positives. A queue's rows are draws from
///   the popularity when they were enqueued, and their `n_k` is the queue's current length.
///
/// Give pools without gradient as well. Items then lack these pools' share of their gradient, and
/// [`union_gradient_weight`] makes up for it.
///
/// Do not give each pool its own count, `log n_k Q_k(j)`: each pool's sum then estimates the whole catalogue's sum by
/// itself, and the sum over K pools is K times too large. Weighting pool k by 1/K, or by `n_k / n` (each pool's own
/// probability per draw, under a loss that divides by the number of negatives), is consistent again. But an item that
/// one pool rarely draws then has a large weight when that pool draws it, and the variance is that of the worst pool.
///
/// [`Correction::LogQNegativesOnly`]: crate::Correction::LogQNegativesOnly
/// [`Correction::LogQ`]: crate::Correction::LogQ
/// [`Correction::CorrectedLogQ`]: crate::Correction::CorrectedLogQ
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) with no pools; [`Error::Shape`](crate::Error::Shape) where a length is not
/// that of `out`; [`Error::Value`](crate::Error::Value) for `n_k` that is not finite and >= 0, for log_q that is NaN or
/// +∞, and for a candidate that no pool draws. `out` is then untouched.
///
/// ```
/// use catalog_softmax::negatives::union_log_q;
/// // Two candidates: a popular one and one of the long tail. 255 in-batch draws by popularity, 512 uniform ones of 10^6.
/// let popularity = [0.01f32.ln(), 1e-7f32.ln()];
/// let uniform = [1e-6f32.ln(); 2];
/// let mut log_q = [0.0; 2];
/// union_log_q(&[(255.0, &popularity), (512.0, &uniform)], &mut log_q)?;
/// assert!((log_q[0] - (255.0f32 * 0.01 + 512.0 * 1e-6).ln()).abs() < 1e-5);
/// assert!((log_q[1] - (255.0f32 * 1e-7 + 512.0 * 1e-6).ln()).abs() < 1e-5);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
pub fn union_log_q(pools: &[(f64, &[f32])], out: &mut [f32]) -> Result<()> {
    check(pools, out.len())?;
    let log_counts = log_counts(pools, out.len(), "all pools", "some pool draws it")?;
    out.iter_mut().zip(log_counts).for_each(|(out, log_count)| *out = log_count as f32);
    Ok(())
}

/// Weights for the gradients of candidates when some pools of a union receive a gradient and others, such as a queue,
/// do not.
///
/// With one log_q for the union, an item's push away from the queries is divided among the copies of it that all pools
/// are expected to hold. Copies in a pool without gradient, such as a [queue](crate::negatives::NegativeQueue), drop
/// their share. If a queue is much longer than the batch, that is most of the push on its items, and another model comes
/// out: on Online Retail it recommended rarer items (`docs/results.md`). To make up for it, multiply the gradient of each
/// copy that has one by
///
/// ```text
/// weight_j = Σ_k n_k Q_k(j) / Σ_{k with gradient} n_k Q_k(j)          >= 1
/// ```
///
/// The mean over draws is then the same as if all pools had a gradient, up to a term in 1/n. Gradients of the queries
/// and of the temperature need no weight. `pools` is as in [`union_log_q`], with a third value that says whether pool k
/// has a gradient. `out` receives a weight for each of the candidates, which are those of pools with a gradient, in any
/// order.
///
/// The weights are for negatives, and a positive's own gradient has to stay as it is. Therefore give positives as
/// separate embeddings ([`positive_embeddings`](crate::BatchBuilder::positive_embeddings), with their ids, so that
/// in-batch candidates are masked as before). Multiply the rows of `d_candidates` and not those of
/// `d_positive_embeddings`.
///
/// # Errors
/// As [`union_log_q`], and [`Error::Value`](crate::Error::Value) for a candidate that no pool with a gradient draws. `out` is then
/// untouched.
///
/// ```
/// use catalog_softmax::negatives::union_gradient_weight;
/// // A popular item and one of the long tail, in a batch of 256 with 512 uniform draws of 10^6, and a queue of 4096 past targets.
/// let popularity = [0.01f32.ln(), 1e-7f32.ln()];
/// let uniform = [1e-6f32.ln(); 2];
/// let mut weight = [0.0; 2];
/// let pools = [(255.0, &popularity[..], true), (512.0, &uniform, true), (4096.0, &popularity, false)];
/// union_gradient_weight(&pools, &mut weight)?;
/// assert!((weight[0] - 17.1).abs() < 0.1 && (weight[1] - 1.8).abs() < 0.1);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
pub fn union_gradient_weight(pools: &[(f64, &[f32], bool)], out: &mut [f32]) -> Result<()> {
    let all: Vec<(f64, &[f32])> = pools.iter().map(|&(draws, log_q, _)| (draws, log_q)).collect();
    check(&all, out.len())?;
    let with_gradient = pools.iter().filter(|(_, _, gradient)| *gradient);
    let with_gradient: Vec<(f64, &[f32])> = with_gradient.map(|&(draws, log_q, _)| (draws, log_q)).collect();
    let all = log_counts(&all, out.len(), "all pools", "some pool draws it")?;
    let rule = "some pool with a gradient draws it";
    let with_gradient = log_counts(&with_gradient, out.len(), "all pools with a gradient", rule)?;
    for (out, (all, with_gradient)) in out.iter_mut().zip(all.into_iter().zip(with_gradient)) {
        *out = (all - with_gradient).exp() as f32;
    }
    Ok(())
}

/// [`log_count`] of each candidate, or the first one that none of these pools draws, said of `pools_name`.
fn log_counts(pools: &[(f64, &[f32])], candidates: usize, pools_name: &str, rule: &str) -> Result<Vec<f64>> {
    let log_count = |j| match log_count(pools, j) {
        f64::NEG_INFINITY => Err(value(format!("log_q of candidate {j}"), format!("-inf in {pools_name}"), rule)),
        log_count => Ok(log_count),
    };
    (0..candidates).map(log_count).collect()
}

/// `log Σ_k n_k Q_k(j)`, relative to the largest term, so that probabilities of 10^-300 do not become zeros.
fn log_count(pools: &[(f64, &[f32])], j: usize) -> f64 {
    let terms = pools.iter().map(|&(draws, log_q)| draws.ln() + f64::from(log_q[j]));
    let max = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + terms.map(|term| (term - max).exp()).sum::<f64>().ln() }
}

fn check(pools: &[(f64, &[f32])], candidates: usize) -> Result<()> {
    if pools.is_empty() {
        return Err(missing("pools", "give at least one pool"));
    }
    for (k, &(draws, log_q)) in pools.iter().enumerate() {
        if !(draws.is_finite() && draws >= 0.0) {
            return Err(value(format!("pools[{k}].draws"), draws, "finite and >= 0"));
        }
        if log_q.len() != candidates {
            let found = format!("length {}", log_q.len());
            return Err(shape(format!("pools[{k}].log_q"), found, format!("length {candidates}, as the output")));
        }
        if let Some(j) = log_q.iter().position(|&l| l.is_nan() || l == f32::INFINITY) {
            return Err(value(
                format!("pools[{k}].log_q[{j}]"),
                log_q[j],
                "a number, or -inf where the pool draws none",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_log_of_the_expected_number_of_copies() {
        let q = [[0.5f32, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4], [1e-30, 0.0, 1.0, 0.0]];
        let log_q = q.map(|row| row.map(f32::ln));
        let draws = [7.0, 100.0, 0.0];
        let mut out = [0.0; 4];
        let pools: Vec<(f64, &[f32])> = draws.iter().copied().zip(log_q.iter().map(|row| &row[..])).collect();
        union_log_q(&pools, &mut out).expect("every candidate is drawn by some pool");
        for j in 0..4 {
            let count: f64 = (0..3).map(|k| draws[k] * f64::from(q[k][j])).sum();
            // log_q of order 1 rounds to 2^-24 of itself on the way in and on the way out.
            assert!((f64::from(out[j]) - count.ln()).abs() < 4.0 * f64::from(f32::EPSILON), "{} at {j}", out[j]);
        }
        // Far below what f64 holds, and a pool in two halves.
        let tiny = [-2000.0f32, -3000.0];
        let mut out = [0.0; 2];
        union_log_q(&[(1.0, &tiny), (1.0, &tiny)], &mut out).expect("drawn");
        assert_eq!(out, [-2000.0 + std::f32::consts::LN_2, -3000.0 + std::f32::consts::LN_2]);
    }

    #[test]
    fn weights_make_up_for_the_copies_without_gradient() {
        let q = [[0.5f32, 0.25, 1e-30], [0.1, 0.2, 0.0], [0.3, 0.7, 1e-30]];
        let log_q = q.map(|row| row.map(f32::ln));
        let mut out = [0.0; 3];
        let of = |gradient: [bool; 3]| {
            let draws = [7.0, 100.0, 50.0];
            (0..3).map(|k| (draws[k], &log_q[k][..], gradient[k])).collect::<Vec<_>>()
        };
        union_gradient_weight(&of([true, true, false]), &mut out).expect("drawn with a gradient");
        for (found, wanted) in out.iter().zip([28.5 / 13.5, 56.75 / 21.75, 57.0 / 7.0]) {
            assert!((found / wanted - 1.0).abs() < 4.0 * f32::EPSILON, "{out:?}");
        }
        union_gradient_weight(&of([true; 3]), &mut out).expect("drawn with a gradient");
        assert_eq!(out, [1.0; 3]);
        for gradient in [[false, true, false], [false; 3]] {
            let mut out = [7.0; 3];
            let error = union_gradient_weight(&of(gradient), &mut out).expect_err("none to make up").to_string();
            let at = if gradient[1] { 2 } else { 0 };
            assert!(
                error.starts_with(&format!("log_q of candidate {at} is -inf in all pools with a gradient")),
                "{error}"
            );
            assert_eq!(out, [7.0; 3]);
        }
        let error = union_gradient_weight(&[(f64::NAN, &log_q[0], true)], &mut out).expect_err("NaN").to_string();
        assert!(error.starts_with("pools[0].draws is NaN"), "{error}");
    }

    #[test]
    fn bad_input_is_an_error_and_writes_nothing() {
        let (fine, never) = ([-1.0f32, -2.0], [-1.0f32, f32::NEG_INFINITY]);
        for (pools, message) in [
            (vec![], "pools is missing"),
            (vec![(1.0, &fine[..1])], "pools[0].log_q has length 1; rule: length 2"),
            (vec![(1.0, &fine[..]), (-1.0, &fine)], "pools[1].draws is -1"),
            (vec![(f64::NAN, &fine[..])], "pools[0].draws is NaN"),
            (vec![(1.0, &[-1.0f32, f32::NAN][..])], "pools[0].log_q[1] is NaN"),
            (vec![(1.0, &[f32::INFINITY, 0.0][..])], "pools[0].log_q[0] is inf"),
            (vec![(1.0, &never[..])], "log_q of candidate 1 is -inf in all pools"),
            (vec![(1.0, &never[..]), (0.0, &fine)], "log_q of candidate 1 is -inf in all pools"),
        ] {
            let mut out = [7.0; 2];
            let error = union_log_q(&pools, &mut out).expect_err(message).to_string();
            assert!(error.starts_with(message), "{error}");
            assert_eq!(out, [7.0; 2]);
        }
    }
}
