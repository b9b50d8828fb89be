//! One log_q for the union of several pools of negatives: in-batch, sampled and queued ones in one loss.

use crate::error::{Result, missing, shape, value};

/// log_q of candidates in the union of pools that were drawn from different distributions.
///
/// If pool k makes `n_k` draws from a distribution `Q_k`, the union is expected to hold `Σ_k n_k Q_k(j)` copies of item
/// j, whichever pool they come from. `pools` has `n_k` and, for each of the candidates, `log Q_k`; `out` gets
///
/// ```text
/// log_q_j = log Σ_k n_k Q_k(j)          = log n + log of the probability per draw, with n = Σ_k n_k
/// ```
///
/// Call it for the candidates of each pool, always with all the distributions: it is the same number for an item in every
/// pool. `log Q_k` may be −∞ for an item that pool k never draws, as long as another pool draws it:
/// [`Distribution::log_probabilities`](crate::Distribution::log_probabilities) has such.
///
/// With these, `Σ_negatives exp(s − log_q)` estimates the softmax's sum over the catalogue once, at the least variance of
/// such weights up to a term in 1/n: the deterministic mixture, or balance heuristic (Veach and Guibas, "Optimally
/// Combining Sampling Techniques for Monte Carlo Rendering", SIGGRAPH 1995; Owen, "Monte Carlo theory, methods and examples",
/// chapter 9, on mixture and multiple importance sampling). What to give:
///
/// * **Expected counts** (this function's `n_k` as they are) are what [`Correction::LogQNegativesOnly`] needs: its sum
///   over negatives stands beside the positive's `exp(s)`. [`Correction::LogQ`] takes them, too: a constant changes nothing.
/// * **Probabilities per draw** are what [`Correction::CorrectedLogQ`] needs: give `n_k / n` in place of `n_k`.
/// * In-batch negatives are B − 1 draws for each row, from the popularity of positives; a queue's rows are draws from the
///   popularity at their time, `n_k` being its length now.
///
/// What goes wrong with each pool's own count, `log n_k Q_k(j)`: each pool's sum then estimates the whole catalogue's by
/// itself, and that of all K pools is K times too large. Weighting pool k by 1/K, or by `n_k / n` (each pool's own
/// probability per draw, under a loss that divides by the number of negatives), is consistent again, but an item that one
/// pool rarely draws then enters with a large weight when it does, and the variance is that of the worst pool.
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
/// use catalog_softmax::union_log_q;
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
    for (j, out) in out.iter_mut().enumerate() {
        *out = log_count(pools, j) as f32;
    }
    Ok(())
}

/// `log Σ_k n_k Q_k(j)`, relative to the largest term: probabilities of 10^-300 are no zeros.
fn log_count(pools: &[(f64, &[f32])], j: usize) -> f64 {
    let terms = pools.iter().map(|&(draws, log_q)| draws.ln() + f64::from(log_q[j]));
    let max = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY { max } else { max + terms.map(|term| (term - max).exp()).sum::<f64>().ln() }
}

fn check(pools: &[(f64, &[f32])], candidates: usize) -> Result<()> {
    if pools.is_empty() {
        return Err(missing("pools", "a union is of one pool at least"));
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
    match (0..candidates).find(|&j| log_count(pools, j) == f64::NEG_INFINITY) {
        Some(j) => Err(value(format!("log_q of candidate {j}"), "-inf in all pools", "some pool draws it")),
        None => Ok(()),
    }
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
