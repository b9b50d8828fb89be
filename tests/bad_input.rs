//! Bad input gets a typed error that names the argument, its value and the rule; outputs stay as they were.

use catalog_softmax::{
    Backend, Batch, Correction, Cpu, DType, Device, Embeddings, Error, Gradients, Ids, Indices, Loss, Output, Pool,
    Reduction, Reference, Request, Similarity, Unavailable,
};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::problem::{PositiveData, Problem, Storage};
use catalog_softmax_testing::step::Step;
use half::f16;

#[path = "bad_input/tables.rs"]
mod tables;

/// What an error must be: variant, argument, and a part of the value as given.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    Shape(&'static str, &'static str),
    Value(&'static str, &'static str),
    Missing(&'static str),
    DoesNotApply(&'static str),
}
use Wanted::{DoesNotApply, Missing, Shape, Value};

fn check(what: &str, error: &Error, wanted: Wanted) {
    let rule = match (error, wanted) {
        (Error::Shape { argument, found, rule }, Shape(name, value)) if argument == name && found.contains(value) => {
            rule.as_str()
        }
        (Error::Value { argument, value, rule }, Value(name, text)) if argument == name && value == text => {
            rule.as_str()
        }
        (Error::Missing { argument, rule }, Missing(name)) if argument == name => rule,
        (Error::DoesNotApply { argument, rule }, DoesNotApply(name)) if argument == name => rule,
        _ => panic!("{what}: wanted {wanted:?}, got {error:?}"),
    };
    assert!(!rule.is_empty(), "{what}: no rule");
    let text = error.to_string();
    let (Shape(name, _) | Value(name, _) | Missing(name) | DoesNotApply(name)) = wanted;
    assert!(text.contains(name) && text.contains("rule: ") && text.contains(rule), "{what}: {text}");
    if let Shape(_, value) | Value(_, value) = wanted {
        assert!(text.contains(value), "{what}: {text}");
    }
}

/// A plain problem of 4 queries and 6 candidates, and one with everything.
fn plain() -> Problem {
    Config::new(4, 6, 3).problem()
}

fn full() -> Problem {
    let config = Config { correction: Correction::CorrectedLogQ, masking: Masking::Excluded, ..Config::new(4, 6, 3) };
    Config { separate: true, weights: true, ..config }.problem()
}

fn two_pools() -> Problem {
    Config { pools: vec![4, 2], correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(4, 1, 3) }.problem()
}

/// The error of a problem: of its batch, or of its loss on every entrance, with outputs as they were.
fn error_of(problem: &Problem) -> Option<Error> {
    let batch = match problem.batch() {
        Ok(batch) => batch,
        Err(error) => return Some(error),
    };
    let filled = plain();
    let good = filled.batch().expect("a valid problem");
    let mut cpu = Cpu::new();
    let mut output: Step = cpu.value_and_grad(&good, &filled.loss).expect("a loss that fits").into();
    let before = output.clone();
    let loss = &problem.loss;
    let error = output.compute(&mut cpu, &batch, loss, Request::value_and_grad()).err()?;
    assert_eq!(output, before, "outputs are untouched");
    let untouched = Step::default();
    let mut exact = untouched.clone();
    let same = |other: Option<Error>, entrance: &str| assert_eq!(other.as_ref(), Some(&error), "{entrance}");
    same(exact.compute(&mut Reference::new(), &batch, loss, Request::value()).err(), "reference");
    assert_eq!(exact, untouched, "outputs are untouched");
    same(cpu.value(&batch, loss).err(), "value");
    same(cpu.value_and_grad(&batch, loss).err(), "value_and_grad");
    same(cpu.plan(&batch, loss, Request::value()).err(), "plan");
    same(cpu.statistics(&batch, loss, Request::value()).err(), "statistics");
    same(loss.epilogue(&batch, &before.statistics).err(), "epilogue");
    same(cpu.gradients(&batch, loss, &before.statistics, &[0.0; 4], &[0.0; 4]).err(), "gradients");
    Some(error)
}

/// What is wrong, how to make it so, and the error that it should be.
type Row = (&'static str, fn(&mut Problem), Wanted);

fn table(base: fn() -> Problem, rows: &[Row]) {
    assert_eq!(error_of(&base()), None, "the base is valid");
    for (what, spoil, wanted) in rows {
        let mut problem = base();
        spoil(&mut problem);
        let error = error_of(&problem).unwrap_or_else(|| panic!("{what}: accepted"));
        check(what, &error, *wanted);
    }
}

fn f32s(rows: usize, dim: usize) -> Storage {
    Storage::F32(vec![0.5; rows * dim])
}

fn log_q(problem: &mut Problem) -> &mut Vec<f32> {
    problem.pools[0].log_q.as_mut().expect("has log_q")
}

fn offsets(problem: &mut Problem) -> &mut Vec<i64> {
    &mut problem.excluded.as_mut().expect("has exclusions").0
}

#[test]
fn options_out_of_range() {
    table(
        plain,
        &[
            ("temperature 0", |p| p.loss.temperature = 0.0, Value("temperature", "0")),
            ("temperature −0", |p| p.loss.temperature = -0.0, Value("temperature", "-0")),
            ("temperature −1", |p| p.loss.temperature = -1.0, Value("temperature", "-1")),
            ("temperature NaN", |p| p.loss.temperature = f64::NAN, Value("temperature", "NaN")),
            ("temperature ∞", |p| p.loss.temperature = f64::INFINITY, Value("temperature", "inf")),
            ("1 / temperature past f32", |p| p.loss.temperature = 1e-40, Value("temperature", "1e-40")),
            // 1 / temperature fits in f32; in units of log 2 it does not.
            ("log2(e) / temperature past f32", |p| p.loss.temperature = 3e-39, Value("temperature", "3e-39")),
            // 1e-39 is a number of f32, with a third of its digits.
            ("1 / temperature subnormal in f32", |p| p.loss.temperature = 1e39, Value("temperature", "1e39")),
            ("1 / temperature 0 in f32", |p| p.loss.temperature = 1e50, Value("temperature", "1e50")),
        ],
    );
}

#[test]
fn shapes_that_disagree() {
    table(
        full,
        &[
            ("B = 0", |p| p.queries = f32s(0, 3), Shape("queries", "shape (0, 3)")),
            ("N = 0", |p| p.pools[0].candidates = f32s(0, 3), Shape("candidates", "shape (0, 3)")),
            ("ids too few", |p| p.pools[0].ids = Some(vec![1; 5]), Shape("candidate_ids", "length 5")),
            ("ids too many", |p| p.pools[0].ids = Some(vec![1; 7]), Shape("candidate_ids", "length 7")),
            ("log_q too few", |p| *log_q(p) = vec![-1.0; 5], Shape("log_q", "length 5")),
            ("positive_ids", |p| p.positive_ids = Some(vec![1; 3]), Shape("positive_ids", "length 3")),
            ("positive_log_q", |p| p.positive_log_q = Some(vec![-1.0; 5]), Shape("positive_log_q", "length 5")),
            (
                "positive_embeddings",
                |p| p.positives = PositiveData::Separate(f32s(3, 3)),
                Shape("positive_embeddings", "length 3"),
            ),
            ("row_weight", |p| p.row_weight = Some(vec![1.0; 3]), Shape("row_weight", "length 3")),
            ("offsets too few", |p| _ = offsets(p).pop(), Shape("exclude_offsets", "length 4")),
            ("offsets past the end", |p| *offsets(p) = vec![0, 0, 0, 0, 99], Shape("exclude_ids", "ids")),
            ("offsets before the end", |p| *offsets(p) = vec![0; 5], Shape("exclude_ids", "ids")),
            (
                "positives",
                |p| {
                    *p = plain();
                    p.positives = PositiveData::Index(vec![0; 3]);
                },
                Shape("positives", "length 3"),
            ),
            (
                "element types of candidates",
                |p| p.pools[0].candidates = Storage::new(&[0.5; 18], DType::F16),
                Shape("candidates", "F16"),
            ),
            (
                "element types of positives",
                |p| p.positives = PositiveData::Separate(Storage::new(&[0.5; 12], DType::Bf16)),
                Shape("positive_embeddings", "Bf16"),
            ),
        ],
    );
    table(
        two_pools,
        &[
            ("second pool empty", |p| p.pools[1].candidates = f32s(0, 3), Shape("pools[1].candidates", "shape (0, 3)")),
            ("second pool's ids", |p| p.pools[1].ids = Some(vec![]), Shape("pools[1].candidate_ids", "length 0")),
            ("second pool's log_q", |p| p.pools[1].log_q = Some(vec![0.0]), Shape("pools[1].log_q", "length 1")),
        ],
    );
}

#[test]
fn views_that_do_not_fit_their_elements() {
    let (x, q) = (vec![0.5f32; 12], vec![0.5f32; 6]);
    let half = vec![f16::from_f32(0.5); 12];
    let (positives, signed) = ([0u32, 1], [0i64, 1]);
    let queries = Embeddings::new(&q, 2, 3);
    let builder = |queries, candidates: Embeddings<'_>| {
        Batch::builder(queries, candidates).positives(&positives[..]).build().map(|_| ())
    };
    builder(queries, Embeddings::new(&x, 4, 3)).expect("valid");
    builder(queries, Embeddings::new(&x, 3, 3).with_stride(4)).expect("valid: the last row's padding is there");
    builder(queries, Embeddings::new(&x[..11], 3, 3).with_stride(4)).expect("valid: without the last row's padding");
    for (what, queries, candidates, wanted) in [
        ("D = 0", Embeddings::new(&q, 2, 0), Embeddings::new(&x, 4, 3), Shape("queries", "shape (2, 0)")),
        ("too few", queries, Embeddings::new(&x, 5, 3), Shape("candidates", "12 elements")),
        ("too many", queries, Embeddings::new(&x, 3, 3), Shape("candidates", "12 elements")),
        ("another dim", queries, Embeddings::new(&x, 3, 4), Shape("candidates", "dim 4")),
        ("short stride", queries, Embeddings::new(&x, 4, 3).with_stride(2), Shape("candidates", "stride of 2")),
        ("long stride", queries, Embeddings::new(&x, 4, 3).with_stride(4), Shape("candidates", "12 elements")),
        ("overflow", queries, Embeddings::new(&x, usize::MAX, 3), Shape("candidates", "12 elements")),
        (
            "overflow by stride",
            queries,
            Embeddings::new(&x, 4, 3).with_stride(usize::MAX),
            Shape("candidates", "12 el"),
        ),
        ("another type", queries, Embeddings::new(&half, 4, 3), Shape("candidates", "F16")),
    ] {
        check(what, &builder(queries, candidates).expect_err(what), wanted);
    }
    let candidates = Embeddings::new(&x, 4, 3);
    let error = Batch::builder(queries, candidates).build().expect_err("no positives");
    check("no positives", &error, Missing("positives"));
    let twice = Batch::in_batch(queries, candidates).positives(&signed[..]).build().expect_err("twice");
    check("positives twice", &twice, DoesNotApply("a second kind of positives"));
    let twice = Batch::builder(queries, candidates).positives(&signed[..]).positive_embeddings(queries);
    check("positives twice", &twice.build().expect_err("twice"), DoesNotApply("a second kind of positives"));
    let few = Batch::in_batch(Embeddings::new(&x, 4, 3), queries).build().expect_err("N < B");
    check("in_batch with too few candidates", &few, Shape("candidates", "2 rows"));
}

#[test]
fn values_out_of_range() {
    table(
        plain,
        &[
            ("positive = N", |p| p.positives = PositiveData::Index(vec![0, 5, 6, 9]), Value("positives[2]", "6")),
            (
                "positive = u32::MAX",
                |p| p.positives = PositiveData::Index(vec![u32::MAX, 0, 0, 0]),
                Value("positives[0]", "4294967295"),
            ),
            ("weight < 0", |p| p.row_weight = Some(vec![1.0, 0.0, -0.5, -1.0]), Value("row_weight[2]", "-0.5")),
            ("weight NaN", |p| p.row_weight = Some(vec![1.0, f32::NAN, 0.0, 0.0]), Value("row_weight[1]", "NaN")),
            ("weight ∞", |p| p.row_weight = Some(vec![1.0, 1.0, 1.0, f32::INFINITY]), Value("row_weight[3]", "inf")),
            (
                "weights that sum to 0",
                |p| {
                    p.row_weight = Some(vec![0.0; 4]);
                    p.loss = p.loss.reduction(Reduction::WeightedMean);
                },
                Value("the sum of row_weight", "0"),
            ),
        ],
    );
    table(
        full,
        &[
            ("log_q NaN", |p| log_q(p)[3] = f32::NAN, Value("log_q[3]", "NaN")),
            ("log_q ∞", |p| log_q(p)[0] = f32::INFINITY, Value("log_q[0]", "inf")),
            ("log_q −∞", |p| log_q(p)[5] = f32::NEG_INFINITY, Value("log_q[5]", "-inf")),
            (
                "positive_log_q NaN",
                |p| p.positive_log_q = Some(vec![-1.0, f32::NAN, -1.0, -1.0]),
                Value("positive_log_q[1]", "NaN"),
            ),
            (
                "positive_log_q −∞",
                |p| p.positive_log_q = Some(vec![f32::NEG_INFINITY; 4]),
                Value("positive_log_q[0]", "-inf"),
            ),
            (
                "positive_log_q 0 under corrected logQ",
                |p| p.positive_log_q = Some(vec![-1.0, -0.1, -2.0, 0.0]),
                Value("positive_log_q[3]", "0"),
            ),
            (
                "positive_log_q > 0 under corrected logQ",
                |p| p.positive_log_q = Some(vec![-1.0, 2.5, -2.0, 0.0]),
                Value("positive_log_q[1]", "2.5"),
            ),
            ("offsets start past 0", |p| offsets(p)[0] = 1, Value("exclude_offsets[0]", "1")),
            ("offsets start below 0", |p| offsets(p)[0] = -1, Value("exclude_offsets[0]", "-1")),
            ("offsets fall", |p| *offsets(p) = vec![0, 3, 2, 4, 4], Value("exclude_offsets[2]", "2")),
            ("offsets below 0", |p| *offsets(p) = vec![0, -3, 2, 4, 4], Value("exclude_offsets[1]", "-3")),
        ],
    );
    table(
        two_pools,
        &[(
            "log_q NaN in the second pool",
            |p| p.pools[1].log_q = Some(vec![0.0, f32::NAN]),
            Value("pools[1].log_q[1]", "NaN"),
        )],
    );
    // A positive that is a candidate brings its own log_q: the same rule.
    let mut problem = Config { correction: Correction::CorrectedLogQ, ..Config::new(4, 6, 3) }.problem();
    problem.positives = PositiveData::Index(vec![0, 1, 2, 5]);
    log_q(&mut problem)[2] = 0.25;
    check("log_q of a positive", &error_of(&problem).expect("rejected"), Value("positive_log_q[2]", "0.25"));
    log_q(&mut problem)[2] = -0.25;
    log_q(&mut problem)[3] = 0.25;
    assert_eq!(error_of(&problem), None, "no positive has it: a mere constant");
}

#[test]
fn signed_indices() {
    let (x, q) = (vec![0.5f32; 12], vec![0.5f32; 6]);
    let build = |positives: Indices<'_>| {
        Batch::builder(Embeddings::new(&q, 2, 3), Embeddings::new(&x, 4, 3)).positives(positives).build().err()
    };
    assert_eq!(build(Indices::I64(&[0, 3])), None);
    for (given, wanted) in [
        ([-1, 0], Value("positives[0]", "-1")),
        ([0, 4], Value("positives[1]", "4")),
        ([i64::MIN, 0], Value("positives[0]", "-9223372036854775808")),
        // 0 in its low 32 bits
        ([0, 1 << 32], Value("positives[1]", "4294967296")),
    ] {
        check("signed", &build(Indices::I64(&given)).expect("rejected"), wanted);
    }
    check("short", &build(Indices::I64(&[0])).expect("rejected"), Shape("positives", "length 1"));
}

#[test]
fn what_is_missing() {
    table(
        full,
        &[
            ("ids for positive_ids and exclusions", |p| p.pools[0].ids = None, Missing("candidate_ids")),
            ("ids of separate positives", |p| p.positive_ids = None, Missing("positive_ids")),
            ("log_q for a correction", |p| p.pools[0].log_q = None, Missing("log_q")),
            ("log_q of separate positives", |p| p.positive_log_q = None, Missing("positive_log_q")),
            (
                "log_q of separate positives, logQ on both",
                |p| {
                    p.positive_log_q = None;
                    p.loss = p.loss.correction(Correction::LogQ);
                },
                Missing("positive_log_q"),
            ),
        ],
    );
    table(
        plain,
        &[
            ("weights", |p| p.loss = p.loss.reduction(Reduction::WeightedMean), Missing("row_weight")),
            ("ids for exclusions", |p| p.excluded = Some((vec![0; 5], vec![])), Missing("candidate_ids")),
            ("log_q", |p| p.loss = p.loss.correction(Correction::LogQ), Missing("log_q")),
        ],
    );
    table(
        two_pools,
        &[
            ("ids of the first pool", |p| p.pools[0].ids = None, Missing("pools[0].candidate_ids")),
            ("ids of the second pool", |p| p.pools[1].ids = None, Missing("pools[1].candidate_ids")),
            ("log_q of the second pool", |p| p.pools[1].log_q = None, Missing("pools[1].log_q")),
        ],
    );
}

#[test]
fn what_does_not_apply() {
    table(
        full,
        &[
            ("log_q without a correction", |p| p.loss = p.loss.correction(Correction::None), DoesNotApply("log_q")),
            (
                "positive_log_q without a correction",
                |p| {
                    p.loss = p.loss.correction(Correction::None);
                    p.pools[0].log_q = None;
                },
                DoesNotApply("positive_log_q"),
            ),
            (
                "positive_log_q where only negatives are corrected",
                |p| p.loss = p.loss.correction(Correction::LogQNegativesOnly),
                DoesNotApply("positive_log_q"),
            ),
            (
                "positive_ids beside indices",
                |p| p.positives = PositiveData::Index(vec![0; 4]),
                DoesNotApply("positive_ids"),
            ),
            (
                "positive_log_q beside indices",
                |p| {
                    p.positives = PositiveData::Index(vec![0; 4]);
                    p.positive_ids = None;
                },
                DoesNotApply("positive_log_q"),
            ),
        ],
    );
}

fn square() -> Problem {
    Config { symmetric: true, masking: Masking::Ids, ..Config::new(5, 5, 3) }.problem()
}

#[test]
fn symmetric_losses() {
    // Of another B than the tables' outputs: `error_of` does not apply.
    let rows: &[Row] = &[
        ("a frozen pool", |p| p.pools[0].gradient = false, DoesNotApply("candidates.without_gradient")),
        ("exclusions", |p| p.excluded = Some((vec![0; 6], vec![])), DoesNotApply("excluded_ids")),
        (
            "a positive shared by two queries",
            |p| p.positives = PositiveData::Index(vec![0, 1, 2, 1, 4]),
            Value("positives[3]", "1"),
        ),
        (
            "more candidates than queries",
            |p| {
                p.pools[0].candidates = f32s(6, 3);
                p.pools[0].ids = Some(vec![1; 6]);
            },
            Shape("candidates", "6 rows"),
        ),
        (
            "two pools",
            |p| {
                let pool = p.pools[0].clone();
                p.pools.push(pool);
            },
            Shape("candidates", "2 pools"),
        ),
        (
            "separate positives",
            |p| {
                p.positives = PositiveData::Separate(f32s(5, 3));
                p.positive_ids = Some(vec![1; 5]);
            },
            DoesNotApply("positive_embeddings"),
        ),
        (
            "a correction",
            |p| {
                p.pools[0].log_q = Some(vec![-1.0; 5]);
                p.loss = p.loss.correction(Correction::LogQ);
            },
            DoesNotApply("Correction::LogQ"),
        ),
    ];
    let of = |problem: &Problem| {
        let batch = problem.batch().expect("a valid batch");
        let mut output = Step::default();
        let error = output.compute(&mut Cpu::new(), &batch, &problem.loss, Request::value_and_grad()).err();
        let untouched = Step { gradients: Some(Gradients::default()), ..Step::default() };
        assert!(error.is_none() || output == untouched, "outputs are untouched");
        error
    };
    assert_eq!(of(&square()), None, "the base is valid");
    for (what, spoil, wanted) in rows {
        let mut problem = square();
        spoil(&mut problem);
        check(what, &of(&problem).unwrap_or_else(|| panic!("{what}: accepted")), *wanted);
    }
}

#[test]
fn gradients_have_a_place_where_the_request_is_for_them_and_nowhere_else() {
    let problem = plain();
    let (batch, loss) = (problem.batch().expect("valid"), &problem.loss);
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    let mut run = |request, place: Option<&mut Gradients>| {
        Cpu::new().compute(&batch, loss, request, &mut output, place).expect_err("does not fit")
    };
    check("no place", &run(Request::value_and_grad(), None), Missing("gradients"));
    check("a place", &run(Request::value(), Some(&mut gradients)), DoesNotApply("gradients"));
    assert_eq!((output, gradients), (Output::default(), Gradients::default()), "outputs are untouched");
}

#[test]
fn ids_and_indices_of_every_type_are_the_same_ids_and_indices() {
    let ids = [7u64, 0, u64::from(u32::MAX)];
    let wanted = Ids::from(&ids);
    assert_eq!(Ids::from(&[7i64, 0, i64::from(u32::MAX)][..]), wanted);
    assert_eq!(Ids::from(&vec![7u32, 0, u32::MAX]), wanted);
    assert_eq!(Ids::from(&[-1i32]), Ids::from(&[-1i64]));
    let (q, c) = ([0.5f32; 4], [0.25f32; 6]);
    let build = |positives: Indices<'_>| {
        let batch = Batch::builder(Embeddings::new(&q, 2, 2), Embeddings::new(&c, 3, 2)).positives(positives);
        Cpu::new().value(&batch.build().expect("valid"), &Loss::softmax(Similarity::Dot, 1.0)).expect("fits")
    };
    assert_eq!(build((&[2u32, 1]).into()), build((&vec![2i64, 1]).into()));
}

#[test]
fn gradients_of_statistics_that_do_not_fit() {
    let (problem, symmetric) = (plain(), square());
    let (batch, loss) = (problem.batch().expect("valid"), &problem.loss);
    let mut cpu = Cpu::new();
    let bare = cpu.statistics(&batch, loss, Request::value()).expect("fits");
    let good = cpu.statistics(&batch, loss, Request::value_and_grad()).expect("fits");
    let mut short = good.clone();
    short.lse.pop();
    let mut narrow = good.clone();
    narrow.expected_negative.as_mut().expect("asked for").dim = 2;
    let (four, three) = ([0.1; 4], [0.1; 3]);
    let mut run = |statistics, d_lse: &[f64], d_positive: &[f64]| {
        cpu.gradients(&batch, loss, statistics, d_lse, d_positive).expect_err("does not fit")
    };
    check("no O", &run(&bare, &four, &four), Missing("statistics.expected_negative"));
    check("d_lse", &run(&good, &three, &four), Shape("d_lse", "length 3"));
    check("d_positive", &run(&good, &four, &three), Shape("d_positive", "length 3"));
    check("lse", &run(&short, &four, &four), Shape("statistics.lse", "length 3"));
    check("O", &run(&narrow, &four, &four), Shape("statistics.expected_negative", "shape (4, 2)"));
    check("epilogue", &loss.epilogue(&batch, &short).expect_err("short"), Shape("statistics", "length 3"));
    let batch = symmetric.batch().expect("valid");
    let statistics = cpu.statistics(&batch, &symmetric.loss, Request::value_and_grad()).expect("fits");
    let error = cpu.gradients(&batch, &symmetric.loss, &statistics, &[0.1; 5], &[0.1; 5]).expect_err("two directions");
    check("symmetric", &error, DoesNotApply("symmetric"));
}

#[test]
fn devices() {
    // With no GPU, no driver, an old driver, or kernels not built: a typed error with the device's name, and no panic.
    for ordinal in [0, 1, 4096, usize::MAX] {
        match Device::Cuda(ordinal).open() {
            Ok(_) => assert!(ordinal < 4096, "no machine has that many"),
            Err(Error::DeviceUnavailable { device, reason }) => {
                assert_eq!(device, format!("cuda:{ordinal}"));
                assert!(!reason.to_string().is_empty());
                if let Unavailable::NoSuchDevice { count } = reason {
                    assert!(count >= 0 && ordinal >= count as usize);
                }
                if let Unavailable::DriverTooOld { found, needed } = reason {
                    assert!(found < needed);
                }
            }
            Err(other) => panic!("not an error of devices: {other:?}"),
        }
    }
    let selected = Device::auto();
    match selected.device {
        Device::Cpu => {
            let reason = selected.no_gpu.expect("the CPU is chosen for a reason");
            assert!(matches!(&reason, Error::DeviceUnavailable { device, .. } if device == "cuda:0"), "{reason:?}");
            assert!(reason.to_string().starts_with("device cuda:0 cannot be used: "), "{reason}");
        }
        _ => assert_eq!(selected.no_gpu, None),
    }
    let mut backend = selected.device.open().expect("what auto selects opens");
    let (q, c) = ([1.0f32, 0.0], [1.0f32, 0.0, 0.0, 1.0]);
    let batch = Batch::in_batch(Embeddings::new(&q[..], 1, 2), Pool::new(Embeddings::new(&c[..], 2, 2)));
    let batch = batch.build().expect("valid");
    let loss = backend.value(&batch, &Loss::softmax(Similarity::Dot, 1.0)).expect("fits").total;
    assert!((loss - (1.0 + (-1f64).exp()).ln()).abs() < 1e-6, "{loss}");
    assert!(Device::Cpu.open().is_ok());
}
