//! Tests of a sample against a known distribution.

/// Pearson's statistic of observed counts against the probabilities that they should have.
pub fn chi_square(counts: &[u64], probabilities: &[f64]) -> f64 {
    assert_eq!(counts.len(), probabilities.len());
    let n: f64 = counts.iter().map(|&count| count as f64).sum();
    let terms = counts.iter().zip(probabilities).map(|(&count, p)| {
        // Below that the statistic is no chi-square.
        assert!(n * p >= 5.0, "an expected count of {}", n * p);
        (count as f64 - n * p).powi(2) / (n * p)
    });
    terms.sum()
}

/// Value that a chi-square variable exceeds with the probability 3e-5, that of a normal one beyond 4: Wilson and Hilferty 1931,
/// the cube root is close to normal.
pub fn critical(degrees: usize) -> f64 {
    let k = degrees as f64;
    k * (1.0 - 2.0 / (9.0 * k) + 4.0 * (2.0 / (9.0 * k)).sqrt()).powi(3)
}

/// Draws after which probabilities that are all 5% off are rejected but for a probability of 3e-5: the statistic then has the
/// mean `k + λ` and the variance `2k + 4λ`, with `λ = n · 0.05²`.
pub fn draws_to_see_five_percent(degrees: usize) -> usize {
    let k = degrees as f64;
    let seen = |n: f64| {
        let noncentrality = n * 0.05f64.powi(2);
        k + noncentrality - 4.0 * (2.0 * k + 4.0 * noncentrality).sqrt() > critical(degrees)
    };
    let mut n = 1e3;
    while !seen(n) {
        n *= 1.1;
    }
    n as usize
}

/// The probabilities with every other one up by 5% and the rest down by what that takes.
pub fn five_percent_off(probabilities: &[f64]) -> Vec<f64> {
    let even: f64 = probabilities.iter().step_by(2).sum();
    let odd: f64 = probabilities.iter().skip(1).step_by(2).sum();
    let factors = [1.05, 1.0 - 0.05 * even / odd];
    probabilities.iter().zip(factors.iter().cycle()).map(|(p, factor)| p * factor).collect()
}
