//! How far from float64 a result may be: as far as an honest baseline is, element by element.
//!
//! For each element x of a result there is a **scale**: the size of the terms that x is a sum of, times the condition
//! of its row, `1 + γ|q̂||ĉ| + |log_q|` (an exponential turns an absolute error of its argument into a relative one of
//! its own). `scales.rs` computes it in float64 from the problem. Rounding errors are proportional to it, so
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

use catalog_softmax::{DType, Real, Reference, Request, TableGradient};

use super::formulas::weights;
use super::lowering::{Lift, lower};
use super::naive::naive_rounded;
use super::problem::{PositiveData, Problem};
use super::scales::{Exact, Scale, Scales, scales};
use super::step::Step;

/// Times the baseline's error that a backend may be off.
pub const FACTOR: f64 = 4.0;
/// Units of ε that the baseline is believed to lose at most.
const MOST: f64 = 16.0;

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
pub fn tensors<T: Real>(output: &Step<T>) -> Vec<Tensor> {
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
        if let Some(d) = gradients.d_table.as_ref().and_then(TableGradient::dense) {
            all.push(tensor("d_table", wide(&d.values), d.dim));
        }
        all.push(tensor("d_temperature", vec![gradients.d_temperature], 1));
        all.push(tensor("d_log_temperature", vec![gradients.d_log_temperature], 1));
    }
    all
}

/// What a problem's results should be, and how near.
#[derive(Debug)]
pub struct Expected {
    pub output: Step<f64>,
    pub tensors: Vec<Tensor>,
    /// For each tensor, the scale of each of its rows.
    pub scales: Vec<Vec<Scale>>,
    /// For each tensor, the tolerance of each of its rows.
    pub tolerances: Vec<Vec<f64>>,
    /// Total and losses by the formulas.
    pub exact: Exact,
    /// For each tensor, the units that the baseline loses.
    pub units: Vec<f64>,
}

impl Expected {
    /// As [`measure`](Expected::measure), of a problem whose loss the reference computes as the formulas say.
    pub fn new(problem: &Problem, operands: DType) -> Expected {
        let expected = Expected::measure(problem, operands);
        expected.check_epilogue().unwrap_or_else(|error| panic!("the reference's epilogue: {error}"));
        expected
    }

    /// Reference, baseline and scales. `operands` is the precision of the baseline's matmul operands: `F32` for a
    /// backend that computes in f32, the input's type for one that rounds to it.
    pub fn measure(problem: &Problem, operands: DType) -> Expected {
        let output = reference(problem);
        let tensors = tensors(&output);
        let Measured { baseline, scales, exact } = if problem.loss.symmetric {
            let mut one = problem.clone();
            one.loss.symmetric = false;
            Measured::of(&one, operands).average(Measured::of(&problem.swapped(), operands), problem)
        } else {
            Measured::of(problem, operands)
        };
        let epsilon = epsilon(operands);
        let lost = |name: &str| lost_units(&tensors, &baseline, &scales, name);
        let (mut tolerances, mut units) = (Vec::new(), Vec::new());
        for tensor in &tensors {
            let like = match tensor.name.as_str() {
                // A single number may be exact by luck: its rows say more.
                "total" | "loss" | "probability" => lost("loss").max(lost("lse")),
                "expected_score" | "entropy" => lost("lse").max(lost("positive")),
                "expected_negative" | "d_temperature" | "d_log_temperature" => lost("d_queries").max(lost("lse")),
                // A row that few things name may be exact by luck: its coefficients are those of the queries' gradients.
                "d_table" => lost("d_table").max(lost("d_queries")).max(lost("lse")),
                name => lost(name),
            };
            // Scales of gradients are lengths of whole rows, those of scores a single number's.
            let least = if tensor.width == 1 { 1.0 } else { 0.4 };
            let unit = like.clamp(least * epsilon, MOST * epsilon);
            let tolerance = |scale: &Scale| FACTOR * unit * scale.size + scale.floor;
            units.push(like / epsilon);
            tolerances.push(find(&scales, &tensor.name).iter().map(tolerance).collect());
        }
        let scales = tensors.iter().map(|tensor| find(&scales, &tensor.name).to_vec()).collect();
        Expected { output, tensors, scales, tolerances, exact, units }
    }

    /// Whether the reference's total and losses are those of the formulas.
    fn check_epilogue(&self) -> Result<(), String> {
        let exact = [("total", vec![self.exact.total]), ("loss", self.exact.losses.clone())];
        exact.into_iter().try_for_each(|(name, exact)| {
            let at = self.tensors.iter().position(|t| t.name == name).expect("always there");
            let tolerance = self.scales[at].iter().map(|s| 1e-12 * s.size + 1e-15).collect();
            compare(&[tensor(name, exact, 1)], &self.tensors[at..=at], &[tolerance], 1.0)
        })
    }

    /// Whether an output agrees.
    pub fn check(&self, output: &Step) -> Result<(), String> {
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
pub fn reference(problem: &Problem) -> Step<f64> {
    let batch = problem.batch().expect("a valid problem");
    let mut step = Step::default();
    let request = Request::value_and_grad().with_moments();
    step.compute(&mut Reference::new(), &batch, &problem.loss, request).expect("a loss that fits");
    step
}

/// The baseline's results and the scales of each tensor's rows, by name.
struct Measured {
    baseline: Vec<Tensor>,
    scales: Scales,
    exact: Exact,
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
    /// Of one direction.
    fn of(problem: &Problem, operands: DType) -> Measured {
        if problem.is_ordinary() { Measured::new(problem, operands) } else { Measured::lifted(problem, operands) }
    }

    fn new(problem: &Problem, operands: DType) -> Measured {
        let baseline = baseline(problem, operands);
        let (scales, exact) = scales(problem);
        Measured { baseline, scales, exact }
    }

    /// Of a problem with a table, several positives or a filter: row by row, each as an ordinary problem.
    fn lifted(problem: &Problem, operands: DType) -> Measured {
        let mut scales = Lift::new(problem, 1);
        let mut values = Lift::new(problem, problem.dim);
        let mut exact = Exact { total: 0.0, losses: Vec::new(), largest_margin: f64::NEG_INFINITY };
        (0..problem.pools.len()).for_each(|pool| scales.reserve_pool(pool));
        (0..problem.pools.len()).for_each(|pool| values.reserve_pool(pool));
        for name in ["positive", "probability", "d_positive_embeddings", "d_table"] {
            scales.reserve(name);
        }
        for (lowered, row_weight) in lower(problem).iter().zip(weights(problem)) {
            let row = Measured::new(&lowered.problem, operands);
            row.scales.iter().for_each(|(name, of_row)| scales.add(lowered, name, of_row));
            for tensor in &row.baseline {
                let single: Vec<f32> = tensor.values.iter().map(|&value| value as f32).collect();
                values.add(lowered, &tensor.name, &single);
            }
            exact.largest_margin = exact.largest_margin.max(row.exact.largest_margin);
            let loss = lowered.loss(&row.exact.losses);
            exact.total += if row_weight == 0.0 { 0.0 } else { row_weight * loss };
            exact.losses.push(loss);
        }
        let widths: Vec<usize> = values.results.keys().map(|name| values.width_of(name)).collect();
        let baseline = values.results.into_iter().zip(widths);
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
        let baseline = baseline.map(|((name, values), width)| tensor(name, wide(values), width)).collect();
        Measured { baseline, scales: scales.results.into_iter().collect(), exact }
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
        let (one, other) = (self.exact, other.exact);
        let mean = |(i, loss): (usize, &f64)| 0.5 * (loss + other.losses[positives[i] as usize]);
        let exact = Exact {
            total: 0.5 * (one.total + other.total),
            losses: one.losses.iter().enumerate().map(mean).collect(),
            largest_margin: one.largest_margin.max(other.largest_margin),
        };
        Measured { baseline, scales, exact }
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
