//! From the probability of one draw to the log_q that a batch takes.

/// The event whose log-probability a candidate's log_q is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Inclusion {
    /// One draw is the id: Q.
    PerDraw,
    /// The id is among this many independent draws, 1 at least: `1 − (1 − Q)^n`.
    AmongDraws(f64),
    /// The id's first time, exponential of rate Q, is before the one that bounds the sample: `1 − exp(−Q t)`. The
    /// bounding time depends on the other ids alone. It is the last one's if k of them are in the sample, and the next
    /// one's if k − 1 are.
    Before { last: f64, next: f64 },
    /// The same probability for every id.
    Always(f64),
}

impl Inclusion {
    /// No id is in a sample of no draws, not even one with Q = 1.
    pub(crate) fn among_draws(draws: usize) -> Self {
        if draws == 0 { Inclusion::Always(0.0) } else { Inclusion::AmongDraws(draws as f64) }
    }

    /// Natural logarithm of the event's probability for an id with `probability` Q per draw, to the rounding of f64 for any Q
    /// in (0, 1]: neither `1 − Q` nor `1 − (1 − Q)^n` is ever rounded to 1.
    pub(crate) fn log(self, probability: f64) -> f64 {
        self.log_of(probability, true)
    }

    /// The same for an id that is or is not in the sample, which [`log`](Inclusion::log) takes it to be.
    pub(crate) fn log_of(self, probability: f64, drawn: bool) -> f64 {
        match self {
            Inclusion::PerDraw => probability.ln(),
            Inclusion::AmongDraws(draws) => log_1m_exp(-draws * (-probability).ln_1p()),
            Inclusion::Before { last, next } => log_1m_exp(probability * if drawn { next } else { last }),
            Inclusion::Always(inclusion) => inclusion.ln(),
        }
    }
}

/// `log(1 − exp(−x))` for x > 0. Below log 2 the difference cancels, above it the logarithm is near 0, and each form is exact
/// where the other is not (Mächler, "Accurately Computing log(1 − exp(−|a|))", 2012).
fn log_1m_exp(x: f64) -> f64 {
    if x <= std::f64::consts::LN_2 { (-(-x).exp_m1()).ln() } else { (-(-x).exp()).ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::Inclusion;

    /// By series: log(1 − p) = −p − p²/2 − ... with p = (1 − Q)^n or exp(−Q t) small, and log(1 − exp(−x)) = log x − x/2 + x²/24
    /// with x small. Relative to the logarithm, which is what the corrections divide by.
    #[test]
    fn logarithms_are_exact_near_certain_and_near_impossible() {
        for (inclusion, q, wanted) in [
            // 0.875^512 = 2.03e-30, and 0.5^60.
            (Inclusion::AmongDraws(512.0), 0.125, -0.875f64.powi(512)),
            (Inclusion::AmongDraws(60.0), 0.5, -0.5f64.powi(60)),
            (Inclusion::AmongDraws(1e6), 1e-12, 1e-6f64.ln() - 0.5e-6),
            (Inclusion::AmongDraws(1.0), 1e-300, 1e-300f64.ln()),
            (Inclusion::AmongDraws(1.0), 0.5, 0.5f64.ln()),
            (Inclusion::AmongDraws(3.0), 1.0, 0.0),
            (Inclusion::Before { last: 9.0, next: 512.0 }, 0.125, -(-64.0f64).exp()),
            (Inclusion::Before { last: 0.0, next: 1e-9 }, 1.0, 1e-9f64.ln() - 0.5e-9),
        ] {
            let log = inclusion.log(q);
            assert!((log - wanted).abs() <= 1e-12 * wanted.abs(), "{inclusion:?} of {q}: {log}, not {wanted}");
        }
    }
}
