//! The sizes that rounding errors are measured in: for each row of each result, how large the terms are that an element
//! is a sum of. Computed in float64 from the problem, row by row.
//!
//! A gradient may cancel to nothing, as every gradient of a cosine does for vectors of one element. What is left of it
//! says nothing about rounding; what cancelled does. So sizes of gradients are those of the terms before they are added
//! up, and before the cosine's chain rule takes away what is parallel to the vector.

use catalog_softmax::Correction;

use super::formulas::{Row, Sides, dot, log_q, scores, sides, weights};
use super::problem::{PositiveData, Problem};

/// What an element is a sum of, and what underflow takes from it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scale {
    /// The size of the terms.
    pub terms: f64,
    /// The size of the terms, each times the condition of its row: rounding errors are proportional to it.
    pub size: f64,
    /// The same for a computation by softmax minus one-hot, as a cross-entropy over all logits is one: it rounds the
    /// positive's probability, where this crate rounds the coefficient, which is what that probability leaves of 1.
    pub cross_entropy: f64,
    /// What underflow takes.
    pub floor: f64,
}

impl Scale {
    /// Terms of one row. `rest` is what a cross-entropy's terms are larger by.
    fn new(terms: f64, rest: f64, condition: f64, floor: f64) -> Scale {
        Scale { terms, size: terms * condition, cross_entropy: (terms + rest) * condition, floor }
    }

    pub fn add(&mut self, other: Scale) {
        self.terms += other.terms;
        self.size += other.size;
        self.cross_entropy += other.cross_entropy;
        self.floor += other.floor;
    }

    pub fn times(self, factor: f64) -> Scale {
        Scale {
            terms: factor * self.terms,
            size: factor * self.size,
            cross_entropy: factor * self.cross_entropy,
            floor: factor * self.floor,
        }
    }

    pub fn mean(mut self, other: Scale) -> Scale {
        self.add(other);
        self.times(0.5)
    }
}

/// Scales of each tensor's rows, by the tensor's name.
pub type Scales = Vec<(String, Vec<Scale>)>;

/// What the formulas give for the losses.
#[derive(Debug, Clone)]
pub struct Exact {
    pub total: f64,
    pub losses: Vec<f64>,
    /// The largest `lse + shift − positive` of a row.
    pub largest_margin: f64,
}

fn loss_scale(row: &Row, corrected: bool, condition: f64, floor: f64) -> Scale {
    // The corrected loss is a product of a and the margin, and both are off.
    let (value, per_rest) = match corrected {
        true => (row.loss.abs() * (1.0 + condition), row.margin.abs() * (1.0 + condition)),
        false => (row.loss, condition),
    };
    let size = row.a * condition + value;
    // A row without negatives has nothing to round, and its margin is −∞.
    let rounded = if row.rest == 0.0 { 0.0 } else { row.rest * per_rest.max(condition) };
    let cross_entropy = size + rounded;
    Scale { terms: row.a + row.loss.abs(), size, cross_entropy, floor }
}

/// What each tensor's rows are sums of; total and losses. One direction.
pub fn scales(problem: &Problem) -> (Scales, Exact) {
    let terms = Terms::new(problem);
    let mut sizes = Sizes::new(problem.num_queries(), problem.num_candidates());
    for i in 0..problem.num_queries() {
        sizes.add_row(&terms, i);
    }
    sizes.named(&terms)
}

/// What the terms of all results are made of.
struct Terms<'a> {
    problem: &'a Problem,
    gamma: f64,
    q: Sides,
    c: Sides,
    p: Sides,
    z: Vec<f64>,
    num_negatives: Vec<u64>,
    log_q: Vec<f32>,
    c_max: f64,
    log_q_max: f64,
    weights: Vec<f64>,
}

impl<'a> Terms<'a> {
    fn new(problem: &'a Problem) -> Terms<'a> {
        let side = |x: &[f32]| sides(x, problem.dim, problem.loss.similarity);
        let (z, num_negatives) = scores(problem);
        let c = side(&problem.candidates());
        let log_q = log_q(problem);
        Terms {
            problem,
            gamma: 1.0 / problem.loss.temperature,
            q: side(&problem.queries.to_f32()),
            p: side(&problem.positive_rows()),
            z,
            num_negatives,
            c_max: c.length.iter().fold(0.0, |max, v| max.max(v.abs())),
            log_q_max: log_q.iter().fold(0.0, |max, v| f64::max(max, v.abs().into())),
            weights: weights(problem),
            c,
            log_q,
        }
    }

    /// The scores of a row's negatives.
    fn z(&self, i: usize) -> &[f64] {
        let n = self.problem.num_candidates();
        &self.z[i * n..(i + 1) * n]
    }

    fn row(&self, i: usize) -> Row {
        let d = self.problem.dim;
        let positive = self.gamma * dot(&self.q.values[i * d..(i + 1) * d], &self.p.values[i * d..(i + 1) * d]);
        Row::new(self.problem, i, self.z(i), positive, self.num_negatives[i], &self.log_q)
    }
}

/// The least normal number: below it, f32 may hold 0.
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// Scales as they come about, row by row.
struct Sizes {
    lse: Vec<Scale>,
    positive: Vec<Scale>,
    loss: Vec<Scale>,
    probability: Vec<Scale>,
    score: Vec<Scale>,
    expected: Vec<Scale>,
    d_q: Vec<Scale>,
    d_p: Vec<Scale>,
    d_c: Vec<Scale>,
    total: Scale,
    d_gamma: Scale,
    exact: Exact,
}

impl Sizes {
    fn new(b: usize, n: usize) -> Sizes {
        let rows = || vec![Scale::default(); b];
        let tiny = Scale { floor: TINY, ..Scale::default() };
        Sizes {
            lse: rows(),
            positive: rows(),
            loss: rows(),
            probability: rows(),
            score: rows(),
            expected: rows(),
            d_q: rows(),
            d_p: rows(),
            d_c: vec![Scale::default(); n],
            total: tiny,
            d_gamma: tiny,
            exact: Exact { total: 0.0, losses: Vec::with_capacity(b), largest_margin: f64::NEG_INFINITY },
        }
    }

    fn add_row(&mut self, terms: &Terms<'_>, i: usize) {
        let (q_length, p_length) = (terms.q.length[i], terms.p.length[i]);
        let condition = 1.0 + terms.gamma * q_length * terms.c_max.max(p_length) + terms.log_q_max;
        let row = terms.row(i);
        self.exact.losses.push(row.loss);
        self.exact.largest_margin = self.exact.largest_margin.max(row.margin);
        self.set_statistics(terms, i, condition, &row);
        self.add_floors(terms, i);
        // A row without weight is absent, whatever its values.
        if terms.weights[i] != 0.0 {
            self.exact.total += terms.weights[i] * row.loss;
            self.total.add(Scale { floor: 0.0, ..self.loss[i].times(terms.weights[i]) });
            self.add_gradients(terms, i, condition, &row);
        }
    }

    fn set_statistics(&mut self, terms: &Terms<'_>, i: usize, condition: f64, row: &Row) {
        let (gamma, c_max, q_length) = (terms.gamma, terms.c_max, terms.q.length[i]);
        let n = terms.problem.num_candidates() as f64;
        let corrected = terms.problem.loss.correction == Correction::CorrectedLogQ;
        self.lse[i] = Scale::new(condition, 0.0, 1.0, TINY);
        self.positive[i] = Scale::new(gamma * q_length * terms.p.length[i], 0.0, 1.0, gamma * TINY);
        self.loss[i] = loss_scale(row, corrected, condition, TINY);
        // 1 − a in float64
        self.probability[i] = Scale::new(row.a.min(1.0 - row.a), 0.0, condition, 1e-15);
        self.score[i] = Scale::new(gamma * q_length * c_max, 0.0, condition, gamma * TINY);
        self.expected[i] = Scale::new(c_max, 0.0, condition, c_max * n * TINY);
    }

    fn add_floors(&mut self, terms: &Terms<'_>, i: usize) {
        let (q_length, q_inverse) = (terms.q.length[i], terms.q.inverse[i]);
        let lost = terms.gamma * (1.0 + terms.weights[i]) * TINY;
        self.d_q[i].floor = lost * (terms.c_max + terms.p.length[i]) * q_inverse;
        self.d_p[i].floor = lost * q_length * terms.p.inverse[i];
        if terms.num_negatives[i] > 0 {
            // An exact 0 where masked is a property of its own. A backend may multiply raw embeddings by a factor that
            // holds 1 / length, up to twice what it exponentiates.
            let length = if q_inverse > 0.0 { q_length.max(1.0 / q_inverse) } else { q_length };
            self.d_c.iter_mut().for_each(|d_c| d_c.floor += 2.0 * lost * length);
        }
    }

    /// The gradients of the negatives' and of the positive's scores, times a vector each.
    fn add_gradients(&mut self, terms: &Terms<'_>, i: usize, condition: f64, row: &Row) {
        let (q_length, p_length) = (terms.q.length[i], terms.p.length[i]);
        let upstream = terms.gamma * terms.weights[i];
        let flow = |negatives: f64, positive: f64| {
            let of_a = upstream * row.a * (negatives + positive);
            Scale::new(of_a, upstream * row.rest * positive, condition, 0.0)
        };
        self.d_q[i].add(flow(terms.c_max, p_length).times(terms.q.inverse[i]));
        self.d_p[i].add(flow(0.0, q_length).times(terms.p.inverse[i]));
        self.d_gamma.add(flow(terms.c_max, p_length).times(q_length / terms.gamma));
        let negatives = self.d_c.iter_mut().zip(terms.z(i)).filter(|(_, z)| **z != f64::NEG_INFINITY);
        negatives.for_each(|(d_c, z)| d_c.add(flow((z - row.lse).exp() * q_length, 0.0)));
        if let PositiveData::Index(index) = &terms.problem.positives {
            self.d_c[index[i] as usize].add(flow(0.0, q_length));
        }
    }

    fn named(self, terms: &Terms<'_>) -> (Scales, Exact) {
        let d_c: Vec<Scale> = self.d_c.iter().zip(&terms.c.inverse).map(|(d_c, &inverse)| d_c.times(inverse)).collect();
        let counts = vec![Scale::default(); self.lse.len()];
        let mut all = vec![
            ("total".to_string(), vec![self.total]),
            ("loss".to_string(), self.loss),
            ("probability".to_string(), self.probability),
            ("entropy".to_string(), self.lse.clone()),
            ("lse".to_string(), self.lse),
            ("positive".to_string(), self.positive),
            ("num_negatives".to_string(), counts),
            ("expected_score".to_string(), self.score),
            ("expected_negative".to_string(), self.expected),
            ("d_queries".to_string(), self.d_q),
            ("d_positive_embeddings".to_string(), self.d_p),
            ("d_temperature".to_string(), vec![self.d_gamma.times(terms.gamma * terms.gamma)]),
            ("d_log_temperature".to_string(), vec![self.d_gamma.times(terms.gamma)]),
        ];
        let mut start = 0;
        for (p, pool) in terms.problem.pools.iter().enumerate() {
            let end = start + pool.candidates.len() / terms.problem.dim;
            all.push((format!("d_candidates[{p}]"), d_c[start..end].to_vec()));
            start = end;
        }
        (all, self.exact)
    }
}
