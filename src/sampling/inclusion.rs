//! From the probability of one draw to what enters a batch as log_q.

/// The event whose log-probability a candidate's log_q is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Inclusion {
    /// One draw is the id: Q.
    PerDraw,
    /// The id is among this many independent draws: `1 − (1 − Q)^n`.
    AmongDraws(f64),
    /// The id's first time, exponential of rate Q, is before this one: `1 − exp(−Q t)`.
    Before(f64),
    /// The same probability for every id.
    Always(f64),
}

impl Inclusion {
    /// Natural logarithm of the event's probability for an id with `probability` Q per draw. Exact to rounding for any Q in
    /// (0, 1]: neither `1 − Q` nor `1 − (1 − Q)^n` is ever rounded to 1.
    pub(crate) fn log(self, probability: f64) -> f64 {
        match self {
            Inclusion::PerDraw => probability.ln(),
            Inclusion::AmongDraws(draws) => (-(draws * (-probability).ln_1p()).exp_m1()).ln(),
            Inclusion::Before(time) => (-(-probability * time).exp_m1()).ln(),
            Inclusion::Always(inclusion) => inclusion.ln(),
        }
    }
}
