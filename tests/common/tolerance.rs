//! How far from float64 a result may be: as far as an honest baseline is, element by element.
//!
//! For each element x of a result there is a **scale**: the size of the terms that x is a sum of, times the condition
//! of its row, `1 + γ|q̂||ĉ| + |log_q|` (an exponential turns an absolute error of its argument into a relative one of
//! its own). It is computed here in float64 from the problem, row by row, by formulas that share nothing with the crate.
//! Rounding errors are proportional to it, so
//!
//! ```text
//! u         = max over the tensor of |baseline − reference| / scale     (units that the baseline loses)
//! tolerance = FACTOR · clamp(u, least, most) · scale + floor
//! ```
//!
//! u is one number for a tensor, so that a baseline that is exact by luck in one element fails nobody; the tolerance is
//! each element's own, so that one wrong element fails, wherever it is and however large its neighbours are. `least`
//! is for tensors of few elements, where the baseline may be lucky in all; `most` keeps a baseline that breaks down from
//! excusing everything. The floor is what underflow of f32 takes: probabilities below 2^-126 are 0. A wrong score,
//! coefficient or tile moves its element by a good part of `scale / condition`: with conditions up to some hundreds and
//! ε = 1.2e-7, that is thousands of tolerances.
//!
//! The epilogue is one for all backends, the reference among them, so agreement with the reference cannot show an error
//! in it: losses and totals are computed here once more, and the reference is held to them before it counts.
//!
//! Numbers of negatives are compared exactly, and so are shapes and which results there are.

use catalog_softmax::{Backend, Correction, DType, Output, Real, Reduction, Reference, Request, Similarity};
use rayon::prelude::*;

use super::naive::{mask, naive_rounded};
use super::problem::{PositiveData, Problem};

/// Times the baseline's error that a backend may be off.
pub const FACTOR: f64 = 4.0;
/// Units of ε that the baseline is believed to lose at most.
const MOST: f64 = 16.0;

/// What an element is a sum of, and what underflow takes from it.
#[derive(Debug, Clone, Copy, Default)]
struct Scale {
    size: f64,
    floor: f64,
}

impl Scale {
    fn mean(self, other: Scale) -> Scale {
        Scale { size: 0.5 * (self.size + other.size), floor: 0.5 * (self.floor + other.floor) }
    }
}

/// Scales of each tensor's rows, by the tensor's name.
type Scales = Vec<(String, Vec<Scale>)>;

/// One result: rows of `width` elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub values: Vec<f64>,
    pub width: usize,
}

fn tensor(name: impl Into<String>, values: Vec<f64>, width: usize) -> Tensor {
    Tensor { name: name.into(), values, width }
}

/// All results of an output by name.
pub fn tensors<T: Real>(output: &Output<T>) -> Vec<Tensor> {
    let wide = |values: &[T]| values.iter().map(|&v| v.into()).collect::<Vec<f64>>();
    let statistics = &output.statistics;
    let mut all = vec![
        tensor("total", vec![output.total], 1),
        tensor("loss", output.loss.clone(), 1),
        tensor("probability", output.probability.clone(), 1),
        tensor("lse", statistics.lse.clone(), 1),
        tensor("positive", statistics.positive.clone(), 1),
        tensor("num_negatives", statistics.num_negatives.iter().map(|&n| n as f64).collect(), 1),
    ];
    if let Some(moments) = &statistics.moments {
        all.push(tensor("expected_score", moments.expected_score.clone(), 1));
        all.push(tensor("entropy", moments.entropy.clone(), 1));
    }
    if let Some(o) = &statistics.expected_negative {
        all.push(tensor("expected_negative", wide(&o.values), o.dim));
    }
    if let Some(gradients) = &output.gradients {
        all.push(tensor("d_queries", wide(&gradients.d_queries.values), gradients.d_queries.dim));
        for (p, d) in gradients.d_candidates.iter().enumerate() {
            all.push(tensor(format!("d_candidates[{p}]"), wide(&d.values), d.dim.max(1)));
        }
        if let Some(d) = &gradients.d_positive_embeddings {
            all.push(tensor("d_positive_embeddings", wide(&d.values), d.dim));
        }
        all.push(tensor("d_temperature", vec![gradients.d_temperature], 1));
        all.push(tensor("d_log_temperature", vec![gradients.d_log_temperature], 1));
    }
    all
}

/// What a problem's results should be, and how near.
#[derive(Debug)]
pub struct Expected {
    pub output: Output<f64>,
    pub tensors: Vec<Tensor>,
    /// For each tensor, the tolerance of each of its rows.
    pub tolerances: Vec<Vec<f64>>,
    /// For each tensor, the units that the baseline loses.
    pub units: Vec<f64>,
}

impl Expected {
    /// Reference, baseline and scales. `operands` is the precision of the baseline's matmul operands: `F32` for a
    /// backend that computes in f32, the input's type for one that rounds to it.
    pub fn new(problem: &Problem, operands: DType) -> Expected {
        let output = reference(problem);
        let tensors = tensors(&output);
        let Measured { baseline, scales, exact } = if problem.loss.symmetric {
            let mut one = problem.clone();
            one.loss.symmetric = false;
            let other = problem.swapped();
            Measured::new(&one, operands).average(Measured::new(&other, operands), problem)
        } else {
            Measured::new(problem, operands)
        };
        let exact_tensors: Vec<Tensor> =
            ["total", "loss"].map(|name| tensors.iter().find(|t| t.name == name).expect("always there").clone()).into();
        let exactly = [&exact.0[..], &exact.1[..]];
        for (tensor, exact) in exact_tensors.iter().zip(exactly) {
            let tolerance = find(&scales, &tensor.name).iter().map(|s| 1e-12 * s.size + 1e-15).collect::<Vec<_>>();
            let exact = self::tensor(tensor.name.clone(), exact.to_vec(), 1);
            compare(&[exact], std::slice::from_ref(tensor), &[tolerance], 1.0)
                .unwrap_or_else(|error| panic!("the reference's epilogue: {error}"));
        }
        let epsilon = epsilon(operands);
        let lost = |name: &str| lost_units(&tensors, &baseline, &scales, name);
        let (mut tolerances, mut units) = (Vec::new(), Vec::new());
        for tensor in &tensors {
            let like = match tensor.name.as_str() {
                // A single number may be exact by luck: its rows say more.
                "total" | "loss" | "probability" => lost("loss").max(lost("lse")),
                "expected_score" | "entropy" => lost("lse").max(lost("positive")),
                "expected_negative" | "d_temperature" | "d_log_temperature" => lost("d_queries").max(lost("lse")),
                name => lost(name),
            };
            // Scales of gradients are lengths of whole rows, those of scores a single number's.
            let least = if tensor.width == 1 { 1.0 } else { 0.4 };
            let unit = like.clamp(least * epsilon, MOST * epsilon);
            let tolerance = |scale: &Scale| FACTOR * unit * scale.size + scale.floor;
            units.push(like / epsilon);
            tolerances.push(find(&scales, &tensor.name).iter().map(tolerance).collect());
        }
        Expected { output, tensors, tolerances, units }
    }

    /// Whether an output agrees.
    pub fn check(&self, output: &Output<f32>) -> Result<(), String> {
        self.check_within(&tensors(output), 1.0)
    }

    /// Whether results agree within `times` the tolerances: 2 where both sides carry rounding errors.
    pub fn check_within(&self, found: &[Tensor], times: f64) -> Result<(), String> {
        let names = |tensors: &[Tensor]| tensors.iter().map(|t| (t.name.clone(), t.values.len())).collect::<Vec<_>>();
        if names(&self.tensors) != names(found) {
            return Err(format!("expected results {:?}, found {:?}", names(&self.tensors), names(found)));
        }
        compare(&self.tensors, found, &self.tolerances, times)
    }
}

/// Compares row by row; names the worst element.
pub fn compare(expected: &[Tensor], found: &[Tensor], tolerances: &[Vec<f64>], times: f64) -> Result<(), String> {
    let mut worst: Option<(f64, String)> = None;
    for ((expected, found), tolerances) in expected.iter().zip(found).zip(tolerances) {
        let width = expected.width;
        for (at, (&want, &got)) in expected.values.iter().zip(&found.values).enumerate() {
            let tolerance = times * tolerances[at / width];
            let error = (got - want).abs();
            let same = got == want || got.is_nan() && want.is_nan();
            if same || error <= tolerance {
                continue;
            }
            let badness = if error.is_finite() { error / tolerance } else { f64::INFINITY };
            if worst.as_ref().is_none_or(|(other, _)| badness > *other) {
                let (row, column) = (at / width, at % width);
                let what = format!(
                    "{}[{row}, {column}] is {got:e}, expected {want:e}: off by {error:.2e}, tolerance {tolerance:.2e}",
                    expected.name
                );
                worst = Some((badness, what));
            }
        }
    }
    worst.map_or(Ok(()), |(_, what)| Err(what))
}

/// Everything the reference can say about a problem.
pub fn reference(problem: &Problem) -> Output<f64> {
    let batch = problem.batch().expect("a valid problem");
    let mut output = Output::default();
    let request = Request::value_and_grad().with_moments();
    Reference::new().compute(&batch, &problem.loss, request, &mut output).expect("a loss that fits");
    output
}

/// The baseline's results and the scales of each tensor's rows, by name.
struct Measured {
    baseline: Vec<Tensor>,
    scales: Scales,
    /// Total and losses by the formulas.
    exact: ([f64; 1], Vec<f64>),
}

/// The distance between 1 and the next number of that type.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2f64.powi(-10),
        DType::Bf16 => 2f64.powi(-7),
        _ => f64::from(f32::EPSILON),
    }
}

fn find<'a>(scales: &'a Scales, name: &str) -> &'a [Scale] {
    &scales.iter().find(|(other, _)| other == name).unwrap_or_else(|| panic!("no scale for {name}")).1
}

/// The baseline's largest error in units of the scale.
fn lost_units(reference: &[Tensor], baseline: &[Tensor], scales: &Scales, name: &str) -> f64 {
    let Some(found) = baseline.iter().find(|t| t.name == name) else { return 0.0 };
    let expected = reference.iter().find(|t| t.name == name).expect("the reference has what the baseline has");
    let scales = find(scales, name);
    let mut worst = 0.0f64;
    for (at, (want, got)) in expected.values.iter().zip(&found.values).enumerate() {
        let scale = scales[at / expected.width];
        let units = ((want - got).abs() - scale.floor) / scale.size;
        // NaN where both are infinite, or where the baseline breaks down: no measure.
        worst = if units > worst { units } else { worst };
    }
    worst
}

impl Measured {
    fn new(problem: &Problem, operands: DType) -> Measured {
        let baseline = baseline(problem, operands);
        let (scales, exact) = scales(problem);
        Measured { baseline, scales, exact }
    }

    /// The mean over both directions.
    fn average(self, other: Measured, problem: &Problem) -> Measured {
        let PositiveData::Index(positives) = &problem.positives else { panic!("a symmetric loss has indices") };
        let width = problem.dim;
        // Row of this direction's tensor → row of the other's.
        let pick = |name: &str, row: usize| match name {
            "loss" | "probability" => positives[row] as usize,
            _ => row,
        };
        let twin = |name: &str| match name {
            "d_queries" => "d_candidates[0]".to_string(),
            "d_candidates[0]" => "d_queries".to_string(),
            _ => name.to_string(),
        };
        let kept = |name: &str| {
            matches!(name, "lse" | "positive" | "num_negatives" | "expected_score" | "entropy" | "expected_negative")
        };
        let mut baseline = Vec::new();
        for mine in &self.baseline {
            let mut mean = mine.clone();
            if !kept(&mine.name) {
                let theirs = other.baseline.iter().find(|t| t.name == twin(&mine.name)).expect("the same results");
                let w = if mine.name.starts_with("d_q") || mine.name.starts_with("d_c") { width } else { 1 };
                for (at, value) in mean.values.iter_mut().enumerate() {
                    *value = 0.5 * (*value + theirs.values[pick(&mine.name, at / w) * w + at % w]);
                }
            }
            baseline.push(mean);
        }
        let mut scales = Vec::new();
        for (name, mine) in &self.scales {
            let mut mean = mine.clone();
            if !kept(name) {
                let theirs = find(&other.scales, &twin(name));
                mean.iter_mut().enumerate().for_each(|(row, scale)| *scale = scale.mean(theirs[pick(name, row)]));
            }
            scales.push((name.clone(), mean));
        }
        let ([total], mut losses) = self.exact;
        let ([other_total], other_losses) = other.exact;
        losses.iter_mut().enumerate().for_each(|(i, l)| *l = 0.5 * (*l + other_losses[positives[i] as usize]));
        Measured { baseline, scales, exact: ([0.5 * (total + other_total)], losses) }
    }
}

fn baseline(problem: &Problem, operands: DType) -> Vec<Tensor> {
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    let d = problem.dim;
    let naive = naive_rounded(problem, true, operands);
    let mut all = vec![
        tensor("total", vec![f64::from(naive.total)], 1),
        tensor("loss", wide(&naive.loss), 1),
        tensor("lse", wide(&naive.lse), 1),
        tensor("positive", wide(&naive.positive), 1),
        tensor("d_queries", wide(&naive.d_queries), d),
    ];
    let mut start = 0;
    for (p, pool) in problem.pools.iter().enumerate() {
        let end = start + pool.candidates.len();
        if pool.gradient {
            all.push(tensor(format!("d_candidates[{p}]"), wide(&naive.d_candidates[start..end]), d));
        }
        start = end;
    }
    if let PositiveData::Separate(_) = problem.positives {
        all.push(tensor("d_positive_embeddings", wide(&naive.d_positive_embeddings), d));
    }
    all
}

/// Unit vectors (or the vectors, under `Dot`) in float64, their lengths, and the inverse by which gradients are scaled.
struct Sides {
    values: Vec<f64>,
    length: Vec<f64>,
    inverse: Vec<f64>,
}

fn sides(x: &[f32], d: usize, similarity: Similarity) -> Sides {
    let mut sides = Sides { values: Vec::new(), length: Vec::new(), inverse: Vec::new() };
    for row in x.chunks(d) {
        let row: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
        let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        let inverse = match similarity {
            Similarity::Dot => 1.0,
            Similarity::Cosine if norm < 1e-12 => 0.0,
            Similarity::Cosine => 1.0 / norm,
        };
        sides.values.extend(row.iter().map(|v| v * inverse));
        sides.length.push(norm * inverse);
        sides.inverse.push(inverse);
    }
    sides
}

/// The adjusted scores (B, N) of a problem in float64, −∞ where masked; number of negatives.
pub fn scores(problem: &Problem) -> (Vec<f64>, Vec<u64>) {
    let (n, d) = (problem.num_candidates(), problem.dim);
    let similarity = problem.loss.similarity;
    let (q, c) =
        (sides(&problem.queries.to_f32(), d, similarity).values, sides(&problem.candidates(), d, similarity).values);
    let log_q: Vec<f32> = problem.pools.iter().flat_map(|pool| pool.log_q.clone().unwrap_or(vec![])).collect();
    let mut z = vec![0.0; problem.num_queries() * n];
    z.par_chunks_mut(n).zip(q.par_chunks(d)).for_each(|(z, q)| {
        for (j, (z, c)) in z.iter_mut().zip(c.chunks(d)).enumerate() {
            let sim = dot(q, c);
            *z = sim / problem.loss.temperature - log_q.get(j).map_or(0.0, |&log_q| f64::from(log_q));
        }
    });
    let num_negatives = mask(problem, &mut z, n, f64::NEG_INFINITY);
    (z, num_negatives)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a8, a_rest), (b8, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut lanes = [0.0; 8];
    for (a, b) in a8.iter().zip(b8) {
        for k in 0..8 {
            lanes[k] += a[k] * b[k];
        }
    }
    lanes.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// What each tensor's rows are sums of; total and losses. One direction.
fn scales(problem: &Problem) -> (Scales, ([f64; 1], Vec<f64>)) {
    let (b, n, d) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let loss = &problem.loss;
    let gamma = 1.0 / loss.temperature;
    let side = |x: &[f32]| sides(x, d, loss.similarity);
    let (q, c, p) = (side(&problem.queries.to_f32()), side(&problem.candidates()), side(&problem.positive_rows()));
    let (mut z, num_negatives) = scores(problem);
    let log_q: Vec<f32> = problem.pools.iter().flat_map(|pool| pool.log_q.clone().unwrap_or_default()).collect();
    let largest = |values: &[f64]| values.iter().fold(0.0f64, |max, v| max.max(v.abs()));
    let (c_max, log_q_max) = (largest(&c.length), log_q.iter().fold(0.0f32, |max, v| max.max(v.abs())));

    let weight = |i: usize| problem.row_weight.as_ref().map_or(1.0, |w| f64::from(w[i]));
    let upstream = match loss.reduction {
        Reduction::None | Reduction::Sum => 1.0,
        Reduction::Mean => 1.0 / b as f64,
        Reduction::WeightedMean => 1.0 / (0..b).map(weight).sum::<f64>(),
    };
    let rows = || vec![Scale::default(); b];
    let (mut lse_scale, mut positive, mut loss_scale, mut probability) = (rows(), rows(), rows(), rows());
    let (mut score, mut expected, mut d_q, mut d_p) = (rows(), rows(), rows(), rows());
    let mut d_c = vec![Scale::default(); n];
    let (mut total, mut d_gamma) = (Scale::default(), Scale::default());
    let (mut exact_total, mut exact_losses) = (0.0, Vec::with_capacity(b));
    // The least normal number: below it, f32 may hold 0.
    let tiny = f64::from(f32::MIN_POSITIVE);
    let scale = |size: f64, floor: f64| Scale { size, floor };
    for i in 0..b {
        let (q_length, p_length) = (q.length[i], p.length[i]);
        let condition = 1.0 + gamma * q_length * c_max.max(p_length) + f64::from(log_q_max);
        let z = &mut z[i * n..(i + 1) * n];
        let max = z.iter().fold(f64::NEG_INFINITY, |max, &z| max.max(z));
        let empty = num_negatives[i] == 0;
        let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
        let margin =
            lse + shift(problem, i) - gamma * dot(&q.values[i * d..(i + 1) * d], &p.values[i * d..(i + 1) * d]);
        let (mut a, mut value) = (sigmoid(margin), margin.max(0.0) + (-margin.abs()).exp().ln_1p());
        let mut exact = value;
        if loss.correction == Correction::CorrectedLogQ {
            a = sigmoid(margin - (num_negatives[i] as f64).ln());
            exact = a * margin;
            value = exact.abs() * (1.0 + condition);
        }
        if empty {
            (a, value, exact) = (0.0, 0.0, 0.0);
        }
        exact_losses.push(exact);
        exact_total += if weight(i) == 0.0 { 0.0 } else { weight(i) * upstream * exact };
        lse_scale[i] = scale(condition, tiny);
        positive[i] = scale(gamma * q_length * p_length, gamma * tiny);
        loss_scale[i] = scale(a * condition + value, tiny);
        // 1 − a in float64
        probability[i] = scale(a.min(1.0 - a) * condition, 1e-15);
        score[i] = scale(gamma * q_length * c_max * condition, gamma * tiny);
        expected[i] = scale(c_max * condition, c_max * n as f64 * tiny);
        let w = weight(i) * upstream;
        total.size += w * loss_scale[i].size;
        let flow = gamma * w * a * condition;
        let lost = gamma * (1.0 + w) * tiny;
        d_q[i] = scale(flow * (c_max + p_length) * q.inverse[i], lost * (c_max + p_length) * q.inverse[i]);
        d_p[i] = scale(flow * q_length * p.inverse[i], lost * q_length * p.inverse[i]);
        d_gamma.size += w * a * condition * q_length * (c_max + p_length);
        if !empty {
            for (d_c, z) in d_c.iter_mut().zip(&*z) {
                d_c.size += flow * (z - lse).exp() * q_length;
                // An exact 0 where masked is a property of its own. A backend may multiply raw embeddings by a factor
                // that holds 1 / length, up to twice what it exponentiates.
                let length = if q.inverse[i] > 0.0 { q_length.max(1.0 / q.inverse[i]) } else { q_length };
                d_c.floor += 2.0 * lost * length;
            }
        }
        if let PositiveData::Index(index) = &problem.positives {
            d_c[index[i] as usize].size += flow * q_length;
        }
    }
    d_c.iter_mut().zip(&c.inverse).for_each(|(d_c, inverse)| *d_c = scale(d_c.size * inverse, d_c.floor * inverse));
    let whole = |factor: f64| vec![scale(factor * d_gamma.size, factor * tiny)];
    let mut all = vec![
        ("total".to_string(), vec![scale(total.size, tiny)]),
        ("loss".to_string(), loss_scale),
        ("probability".to_string(), probability),
        ("entropy".to_string(), lse_scale.clone()),
        ("lse".to_string(), lse_scale),
        ("positive".to_string(), positive),
        ("num_negatives".to_string(), rows()),
        ("expected_score".to_string(), score),
        ("expected_negative".to_string(), expected),
        ("d_queries".to_string(), d_q),
        ("d_positive_embeddings".to_string(), d_p),
        ("d_temperature".to_string(), whole(gamma * gamma)),
        ("d_log_temperature".to_string(), whole(gamma)),
    ];
    let mut start = 0;
    for (p, pool) in problem.pools.iter().enumerate() {
        let end = start + pool.candidates.len() / d;
        all.push((format!("d_candidates[{p}]"), d_c[start..end].to_vec()));
        start = end;
    }
    (all, ([exact_total], exact_losses))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn shift(problem: &Problem, row: usize) -> f64 {
    let positive_log_q = || match (&problem.positives, &problem.positive_log_q) {
        (PositiveData::Separate(_), Some(log_q)) => f64::from(log_q[row]),
        (PositiveData::Index(index), _) => {
            let log_q: Vec<f32> =
                problem.pools.iter().flat_map(|pool| pool.log_q.clone().unwrap_or_default()).collect();
            f64::from(log_q[index[row] as usize])
        }
        (PositiveData::Separate(_), None) => panic!("this loss needs positive_log_q"),
    };
    match problem.loss.correction {
        Correction::None | Correction::LogQNegativesOnly => 0.0,
        Correction::LogQ => positive_log_q(),
        Correction::CorrectedLogQ => (-positive_log_q().exp()).ln_1p(),
    }
}
