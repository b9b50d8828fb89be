//! Golden batches with single elements spoiled, as expected, as found, and as both.

use std::path::Path;

use catalog_softmax::{Backend, Cpu, Reference, Request, Similarity};

use super::{CPU, on};
use catalog_softmax_testing::golden::{Expected, Golden, Tensor};
use catalog_softmax_testing::golden_check::{Judge, Precision, Results, results};
use catalog_softmax_testing::golden_files::files;
use catalog_softmax_testing::problem::{PositiveData, Problem};
use catalog_softmax_testing::step::Step;

#[test]
fn whatever_is_spoiled_is_bad() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for path in files(&folder) {
        let golden = Golden::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let (on_cpu, right) = (on(&mut Cpu::new(), &golden.problem), on(&mut Reference::new(), &golden.problem));
        let units = Units::new(&golden.problem, &right);
        // Roundings are 1e-7 in f32. A row whose positive takes all but 1e-9 is right to 1e-6 by a cross-entropy in
        // f64.
        for (precision, found, little) in [(CPU, &on_cpu, 1e-3), (Precision::Float64, &right, 1e-5)] {
            let judge = Judge::new(&golden.problem, precision);
            for name in golden.expected.keys() {
                let what = format!("{}, {precision:?}: {name}", path.display());
                spoil_elements(&judge, &golden.expected[name], found, name, &units, little, &what);
            }
        }
    }
}

/// Spoils several elements in several ways: as expected, as found, and as both, in which case the two agree.
fn spoil_elements(
    judge: &Judge,
    expected: &Tensor,
    found: &Results,
    name: &'static str,
    units: &Units,
    little: f64,
    what: &str,
) {
    let mut ways = 0;
    for at in elements(&expected.values) {
        for value in
            spoils(expected.values[at], if name == "num_negatives" { 1.0 } else { little * units.of(name, at) })
        {
            let (mut wrong, mut wrongly_found) = (expected.clone(), found.clone());
            wrong.values[at] = value;
            wrongly_found.get_mut(name).expect("found").values[at] = value;
            let case = || format!("{what}[{at}] is {}, spoiled to {value}", expected.values[at]);
            let verdict = |expected: &Tensor, found: &Results| {
                let verdicts = judge.judge(&Expected::from([(name, expected.clone())]), found);
                let [verdict] = &verdicts[..] else { panic!("{}: {verdicts:?}", case()) };
                assert!(verdict.at == at && !verdict.passes(), "{}: {verdict:?}", case());
                (verdict.found.passes(), verdict.expected.passes())
            };
            assert_eq!(verdict(&wrong, found), (true, false), "{}", case());
            assert_eq!(verdict(expected, &wrongly_found), (false, true), "{}", case());
            assert!(!verdict(&wrong, &wrongly_found).0, "{}", case());
            ways += 1;
        }
    }
    assert!(ways >= 4, "{what}: spoiled in {ways} ways");
}

/// The first, the last, some between, and the largest.
fn elements(values: &[f64]) -> Vec<usize> {
    let mut elements: Vec<usize> = (0..5).map(|k| k * (values.len() - 1) / 4).collect();
    let finite = (0..values.len()).filter(|&at| values[at].is_finite());
    elements.extend(finite.max_by(|&a, &b| values[a].abs().total_cmp(&values[b].abs())));
    elements.sort_unstable();
    elements.dedup();
    elements
}

/// Wrong values in place of `value`: off by a little, of the other sign, zero, and not finite. A sign or a zero that
/// changes the value by less than that little is left out: it is a smaller error than the test asks to be seen.
fn spoils(value: f64, little: f64) -> Vec<f64> {
    let mut spoils =
        vec![value + little, value - little, -value, 0.0, -1e30, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    spoils.retain(|&spoil| {
        let change = (spoil - value).abs();
        spoil != value && (change.is_nan() || change >= 0.99 * little)
    });
    spoils
}

/// What an element's error is a share of, by a rule of this test's own: scores of a batch share the largest one, and a
/// loss has its own value. A gradient's row has two parts, from the scores of negatives and from those of the
/// positives, before they cancel and before the cosine's chain rule takes a share; the largest element of the two is
/// its unit.
pub struct Units {
    right: Results,
    parts: [Results; 2],
    problem: Problem,
}

impl Units {
    pub fn new(problem: &Problem, right: &Results) -> Units {
        Units { right: right.clone(), parts: parts(&of_unit_vectors(problem)), problem: problem.clone() }
    }

    pub fn of(&self, name: &str, at: usize) -> f64 {
        let largest = |values: &[f64]| values.iter().filter(|v| v.is_finite()).fold(0.0f64, |max, v| max.max(v.abs()));
        let right = &self.right[name].values;
        let dim = self.problem.dim;
        let row = at / dim * dim..(at / dim + 1) * dim;
        let unit = match name {
            "lse" | "positive" => largest(right),
            "d_queries" | "d_candidates" | "d_positive_embeddings" => {
                let [of_negatives, of_positives] = &self.parts;
                let part = |part: &Results| largest(&part[name].values[row.clone()]);
                part(of_negatives).max(part(of_positives)) / norms(&self.problem, name)[at / dim]
            }
            _ => right[at].abs(),
        };
        // Where there is nothing to be a share of, and for a vector that is too short to have a gradient.
        if unit > 0.0 && unit.is_finite() { unit } else { 1.0 }
    }
}

/// The gradients by the scores of negatives alone, and by those of positives alone. Of a symmetric loss, in one
/// direction.
fn parts(problem: &Problem) -> [Results; 2] {
    let (batch, mut loss) = (problem.batch().expect("a valid problem"), problem.loss);
    loss.symmetric = false;
    let statistics = Reference::new().statistics(&batch, &loss, Request::value_and_grad()).expect("a loss that fits");
    let epilogue = loss.epilogue(&batch, &statistics).expect("its own statistics");
    let zeros = vec![0.0; batch.num_queries()];
    [(&epilogue.d_lse, &zeros), (&zeros, &epilogue.d_positive)].map(|(d_lse, d_positive)| {
        let gradients = Reference::new().gradients(&batch, &loss, &statistics, d_lse, d_positive);
        let output = Step { gradients: Some(gradients.expect("as many as rows")), ..Step::default() };
        results(&output)
    })
}

/// The dot products of unit vectors: the cosine without its chain rule.
fn of_unit_vectors(problem: &Problem) -> Problem {
    let mut units = problem.clone();
    if problem.loss.similarity == Similarity::Dot {
        return units;
    }
    units.loss.similarity = Similarity::Dot;
    let normalize = |values: &mut Vec<f32>| {
        for row in values.chunks_mut(problem.dim) {
            let norm = norm(row);
            row.iter_mut().for_each(|x| *x = if norm < 1e-12 { 0.0 } else { (f64::from(*x) / norm) as f32 });
        }
    };
    units.queries = problem.queries.map(normalize);
    units.pools[0].candidates = problem.pools[0].candidates.map(normalize);
    if let PositiveData::Separate(embeddings) = &problem.positives {
        units.positives = PositiveData::Separate(embeddings.map(normalize));
    }
    units
}

fn norm(row: &[f32]) -> f64 {
    row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// What the chain rule divides the rows of a gradient by.
fn norms(problem: &Problem, name: &str) -> Vec<f64> {
    let rows = match (name, &problem.positives) {
        ("d_queries", _) => problem.queries.to_f32(),
        ("d_positive_embeddings", PositiveData::Separate(embeddings)) => embeddings.to_f32(),
        _ => problem.candidates(),
    };
    let cosine = problem.loss.similarity == Similarity::Cosine;
    rows.chunks(problem.dim).map(|row| if cosine { norm(row) } else { 1.0 }).collect()
}
