//! Tables, rows of them, several positives, filters, and gradients to add to.

use catalog_softmax::{Matrix, RowNegatives, RowSparse, Table, TableGradient, TopK};
use catalog_softmax_testing::generate_tables::{PoolKind, PositiveKind, TableConfig};
use catalog_softmax_testing::problem::{PoolRows, RowNegativesData};

use super::*;

const M: usize = 9;

/// 4 queries, a table of 9 items, a pool of 6 of its rows and one of 2 candidates of their own, 3 negatives for each query.
fn over_a_table() -> Problem {
    let pools = vec![PoolKind::Rows(6), PoolKind::Own(2)];
    let config =
        TableConfig { pools, per_row: 3, excluded: true, weights: true, ids: true, ..TableConfig::new(4, M, 3) };
    TableConfig { correction: Correction::CorrectedLogQ, ..config }.problem()
}

/// The same with 5 positives: 2, 0, 1 and 2.
fn several() -> Problem {
    let mut problem = over_a_table();
    problem.positives = PositiveData::Index(vec![0, 1, 2, 3, 8]);
    problem.positive_log_q = Some(vec![-1.0; 5]);
    problem.positive_offsets = Some(vec![0, 2, 2, 3, 5]);
    problem.positive_weight = Some(vec![1.0, 0.5, 0.0, 2.0, 1.0]);
    problem
}

/// One query for each candidate, as symmetric losses want it.
fn plain_index() -> Problem {
    plain()
}

fn own(problem: &mut Problem) -> &mut RowNegativesData {
    problem.row_negatives.as_mut().expect("has them")
}

fn offsets_of_positives(problem: &mut Problem) -> &mut Vec<i64> {
    problem.positive_offsets.as_mut().expect("has them")
}

fn no_log_q(problem: &mut Problem) {
    problem.loss = problem.loss.correction(Correction::None);
    problem.pools.iter_mut().for_each(|pool| pool.log_q = None);
    problem.positive_log_q = None;
    own(problem).log_q = None;
}

#[test]
fn rows_of_a_table() {
    table(
        over_a_table,
        &[
            ("M = 0", |p| p.table.as_mut().unwrap().embeddings = f32s(0, 3), Shape("table", "shape (0, 3)")),
            (
                "element types of the table",
                |p| p.table.as_mut().unwrap().embeddings = Storage::new(&[0.5; 27], DType::F16),
                Shape("table", "F16"),
            ),
            ("ids too few", |p| p.table.as_mut().unwrap().ids = Some(vec![1; 8]), Shape("table ids", "length 8")),
            (
                "a candidate past the table",
                |p| p.pools[0].rows = Some(PoolRows::These(vec![0, 1, 9, 3, 4, 10])),
                Value("pools[0].candidate_rows[2]", "9"),
            ),
            (
                "no candidate is no candidate",
                |p| p.pools[0].rows = Some(PoolRows::These(vec![0, 1, 2, 3, 4, u32::MAX])),
                Value("pools[0].candidate_rows[5]", "4294967295"),
            ),
            (
                "an empty pool",
                |p| {
                    p.pools[0].rows = Some(PoolRows::These(vec![]));
                    p.pools[0].log_q = Some(vec![]);
                },
                Shape("pools[0].candidates", "0 rows"),
            ),
            (
                "log_q of a pool of rows",
                |p| p.pools[0].log_q = Some(vec![-1.0; 5]),
                Shape("pools[0].log_q", "length 5"),
            ),
            (
                "log_q of the whole table",
                |p| p.pools[0].rows = Some(PoolRows::All),
                Shape("pools[0].log_q", "length 6"),
            ),
            ("ids of a pool of rows", |p| p.pools[0].ids = Some(vec![1; 6]), DoesNotApply("pools[0].candidate_ids")),
            ("ids of a pool beside it", |p| p.pools[1].ids = None, Missing("pools[1].candidate_ids")),
            (
                "a positive past the table",
                |p| p.positives = PositiveData::Index(vec![0, 9, 1, 2]),
                Value("positives[1]", "9"),
            ),
            ("positives too few", |p| p.positives = PositiveData::Index(vec![0; 3]), Shape("positives", "length 3")),
            ("ids of rows", |p| p.positive_ids = Some(vec![0; 4]), DoesNotApply("positive_ids")),
            (
                "ids of separate positives",
                |p| p.positives = PositiveData::Separate(f32s(4, 3)),
                Missing("positive_ids"),
            ),
            ("log_q of rows", |p| p.positive_log_q = None, Missing("positive_log_q")),
            ("log_q of three rows", |p| p.positive_log_q = Some(vec![-1.0; 3]), Shape("positive_log_q", "length 3")),
            (
                "log_q of a row 0 under corrected logQ",
                |p| p.positive_log_q = Some(vec![-1.0, -1.0, 0.0, -1.0]),
                Value("positive_log_q[2]", "0"),
            ),
            (
                "log_q of rows where only negatives are corrected",
                |p| p.loss = p.loss.correction(Correction::LogQNegativesOnly),
                DoesNotApply("positive_log_q"),
            ),
        ],
    );
}

#[test]
fn row_negatives() {
    table(
        over_a_table,
        &[
            ("past the table", |p| own(p).rows[7] = 9, Value("row_negatives[2, 1]", "9")),
            ("past the table by far", |p| own(p).rows[0] = u32::MAX - 1, Value("row_negatives[0, 0]", "4294967294")),
            ("K = 0", |p| own(p).per_row = 0, Value("row_negatives.per_row", "0")),
            ("K past its limit", |p| own(p).per_row = 4097, Value("row_negatives.per_row", "4097")),
            ("too few", |p| _ = own(p).rows.pop(), Shape("row_negatives", "length 11")),
            ("of another K", |p| own(p).per_row = 4, Shape("row_negatives", "length 12")),
            ("log_q too few", |p| own(p).log_q = Some(vec![-1.0; 11]), Shape("row_negatives_log_q", "length 11")),
            ("log_q of none of them", |p| own(p).log_q = None, Missing("row_negatives_log_q")),
            ("log_q of the pools", |p| p.pools[0].log_q = None, Missing("pools[0].log_q")),
            ("log_q NaN", |p| own(p).log_q.as_mut().unwrap()[4] = f32::NAN, Value("row_negatives_log_q[4]", "NaN")),
            (
                "log_q without a correction",
                |p| {
                    let log_q = own(p).log_q.take();
                    no_log_q(p);
                    p.pools.clear();
                    own(p).log_q = log_q;
                },
                DoesNotApply("log_q"),
            ),
            (
                "no log_q for a correction",
                |p| {
                    let correction = p.loss.correction;
                    no_log_q(p);
                    p.loss = p.loss.correction(correction);
                },
                Missing("log_q"),
            ),
        ],
    );
    table(
        plain,
        &[(
            "without a table",
            |p| p.row_negatives = Some(RowNegativesData { rows: vec![0; 4], per_row: 1, log_q: None }),
            Missing("table"),
        )],
    );
}

#[test]
fn more_row_negatives_than_places_have_numbers() {
    let b = (1usize << 31) / RowNegatives::MAX_PER_ROW;
    let (queries, table) = (vec![0.5f32; b], [0.5f32; 3]);
    let positives = vec![0u32; b];
    let batch = Batch::of_table(Embeddings::new(&queries, b, 1), Embeddings::new(&table, 3, 1)).positives(&positives);
    let error = batch.row_negatives(RowNegatives::new(&positives, RowNegatives::MAX_PER_ROW)).build();
    check("2^31", &error.expect_err("rejected"), Shape("row_negatives", "shape (524288, 4096)"));
}

#[test]
fn several_positives() {
    table(
        several,
        &[
            ("offsets too few", |p| _ = offsets_of_positives(p).pop(), Shape("positive_offsets", "length 4")),
            ("offsets too many", |p| offsets_of_positives(p).push(5), Shape("positive_offsets", "length 6")),
            ("offsets start past 0", |p| offsets_of_positives(p)[0] = 1, Value("positive_offsets[0]", "1")),
            ("offsets below 0", |p| offsets_of_positives(p)[0] = -1, Value("positive_offsets[0]", "-1")),
            ("offsets fall", |p| offsets_of_positives(p)[2] = 1, Value("positive_offsets[2]", "1")),
            ("offsets end early", |p| offsets_of_positives(p)[4] = 4, Shape("positives", "5")),
            ("offsets end late", |p| offsets_of_positives(p)[4] = i64::MAX, Shape("positives", "5")),
            (
                "a positive past the table",
                |p| p.positives = PositiveData::Index(vec![0, 0, 0, 0, 9]),
                Value("positives[4]", "9"),
            ),
            ("weights too few", |p| p.positive_weight = Some(vec![1.0; 4]), Shape("positive_weight", "length 4")),
            (
                "a weight below 0",
                |p| p.positive_weight.as_mut().unwrap()[3] = -0.5,
                Value("positive_weight[3]", "-0.5"),
            ),
            ("a weight NaN", |p| p.positive_weight.as_mut().unwrap()[0] = f32::NAN, Value("positive_weight[0]", "NaN")),
            (
                "a weight ∞",
                |p| p.positive_weight.as_mut().unwrap()[4] = f32::INFINITY,
                Value("positive_weight[4]", "inf"),
            ),
            ("log_q of 4", |p| p.positive_log_q = Some(vec![-1.0; 4]), Shape("positive_log_q", "length 4")),
            ("log_q NaN", |p| p.positive_log_q.as_mut().unwrap()[4] = f32::NAN, Value("positive_log_q[4]", "NaN")),
        ],
    );
    table(
        over_a_table,
        &[("weights without offsets", |p| p.positive_weight = Some(vec![1.0; 4]), DoesNotApply("positive_weight"))],
    );
    table(
        full,
        &[
            (
                "offsets of separate positives",
                |p| p.positive_offsets = Some(vec![0, 1, 1, 2, 3]),
                Shape("positive_embeddings", "4"),
            ),
            (
                "ids of separate positives",
                |p| {
                    p.positive_offsets = Some(vec![0, 1, 2, 3, 4]);
                    p.positive_ids = Some(vec![0; 5]);
                },
                Shape("positive_ids", "length 5"),
            ),
        ],
    );
    // The diagonal is one positive for each row.
    let x = [0.5f32; 6];
    let rows = || Embeddings::new(&x, 2, 3);
    let error = Batch::in_batch(rows(), rows()).positive_offsets(&[0, 1, 2]).build().expect_err("rejected");
    check("in_batch", &error, DoesNotApply("positive_offsets"));
}

#[test]
fn filters() {
    table(
        over_a_table,
        &[
            ("NaN", |p| p.loss = p.loss.false_negative_margin(f64::NAN), Value("false_negative_margin", "NaN")),
            ("∞", |p| p.loss = p.loss.false_negative_margin(f64::INFINITY), Value("false_negative_margin", "inf")),
            ("ratio NaN", |p| p.loss = p.loss.false_negative_ratio(f64::NAN), Value("false_negative_ratio", "NaN")),
            ("ratio 0", |p| p.loss = p.loss.false_negative_ratio(0.0), Value("false_negative_ratio", "0")),
            ("ratio −1", |p| p.loss = p.loss.false_negative_ratio(-1.0), Value("false_negative_ratio", "-1")),
            ("ratio ∞", |p| p.loss = p.loss.false_negative_ratio(f64::INFINITY), Value("false_negative_ratio", "inf")),
            (
                "ratio of dot products",
                |p| {
                    p.loss.similarity = Similarity::Dot;
                    p.loss = p.loss.false_negative_ratio(0.9);
                },
                DoesNotApply("false_negative_ratio"),
            ),
        ],
    );
}

#[test]
fn symmetric_losses_have_no_table() {
    table(
        over_a_table,
        &[(
            "a table",
            |p| {
                no_log_q(p);
                p.loss = p.loss.symmetric();
            },
            DoesNotApply("table"),
        )],
    );
    table(
        plain_index,
        &[(
            "offsets",
            |p| {
                p.positive_offsets = Some(vec![0, 1, 2, 3, 4]);
                p.loss = p.loss.symmetric();
            },
            DoesNotApply("positive_offsets"),
        )],
    );
}

#[test]
fn rows_by_signed_indices() {
    let (table, queries) = ([0.5f32; 12], [0.5f32; 6]);
    let builder = || Batch::of_table(Embeddings::new(&queries, 2, 3), Embeddings::new(&table, 4, 3));
    let positives = [0u32, 3];
    let with = |rows: &[i64]| builder().positives(&positives).pool(Pool::rows(rows)).build().err();
    assert_eq!(with(&[0, 3, 3]), None);
    check("−1", &with(&[0, -1]).expect("rejected"), Value("candidate_rows[1]", "-1"));
    check("4", &with(&[4]).expect("rejected"), Value("candidate_rows[0]", "4"));
    check("0 in its low 32 bits", &with(&[1 << 32]).expect("rejected"), Value("candidate_rows[0]", "4294967296"));
    let own = |rows: &[i64]| builder().positives(&positives).row_negatives(RowNegatives::new(rows, 1)).build().err();
    assert_eq!(own(&[-1, 3]), None);
    for (given, value) in [(-2, "-2"), (4, "4"), (1 << 32, "4294967296"), (i64::MIN, "-9223372036854775808")] {
        check(value, &own(&[0, given]).expect("rejected"), Value("row_negatives[1, 0]", value));
    }
    // None of 32 bits is a large row of 64.
    let none = i64::from(RowNegatives::NONE);
    check("none", &own(&[none, 0]).expect("rejected"), Value("row_negatives[0, 0]", "4294967295"));
    let positive = |rows: &[i64]| builder().positives(rows).build().err();
    check("positive", &positive(&[0, -1]).expect("rejected"), Value("positives[1]", "-1"));
    check("positive", &positive(&[4, 0]).expect("rejected"), Value("positives[0]", "4"));
    let without = builder().row_negatives(RowNegatives::new(&[0i64, 1], 1)).build().expect_err("rejected");
    check("no positives", &without, Missing("positives"));
    // Pools of rows have a table.
    let queries = Embeddings::new(&queries, 2, 3);
    for pool in [Pool::rows(&positives), Pool::whole_table()] {
        let error = Batch::builder(queries, pool).positives(&positives).build().expect_err("rejected");
        check("no table", &error, Missing("table"));
    }
}

#[test]
fn views_and_shapes_of_a_table() {
    let (table, queries, positives) = ([0.5f32; 12], [0.5f32; 6], [0u32, 3]);
    let build =
        |table: Table<'_>| Batch::of_table(Embeddings::new(&queries, 2, 3), table).positives(&positives).build().err();
    assert_eq!(build(Table::of_shape(4, 3, DType::F32)), None);
    check("of 5 rows", &build(Table::new(Embeddings::new(&table, 5, 3))).expect("rejected"), Shape("table", "12"));
    check("of dim 2", &build(Table::new(Embeddings::new(&table, 6, 2))).expect("rejected"), Shape("table", "dim 2"));
    check("no rows", &build(Table::of_shape(0, 3, DType::F32)).expect("rejected"), Shape("table", "shape (0, 3)"));
    check("dim 0", &build(Table::of_shape(4, 0, DType::F32)).expect("rejected"), Shape("table", "shape (4, 0)"));
    check("type", &build(Table::of_shape(4, 3, DType::F16)).expect("rejected"), Shape("table", "F16"));
    let large = Table::of_shape(1 << 31, 3, DType::F32);
    check("2^31 rows", &build(large).expect("rejected"), Shape("table", "2147483648 rows"));
    let past = Table::of_shape(3, 3, DType::F32);
    check("positive", &build(past).expect("rejected"), Value("positives[1]", "3"));
}

/// A batch that knows only the shape of its table is for `update`: every other entrance rejects it.
#[test]
fn the_shape_of_a_table_alone() {
    let (queries, positives) = ([0.5f32; 6], [0u32, 3]);
    let batch = Batch::of_table(Embeddings::new(&queries, 2, 3), Table::of_shape(4, 3, DType::F32));
    let batch = batch.positives(&positives).build().expect("a valid batch");
    let loss = Loss::softmax(Similarity::Dot, 1.0);
    let (mut cpu, mut output, mut gradients) = (Cpu::new(), Output::default(), Gradients::default());
    let request = Request::value_and_grad();
    let missing = |error: Option<Error>, entrance: &str| {
        check(entrance, &error.unwrap_or_else(|| panic!("{entrance}: accepted")), Missing("table"));
    };
    missing(cpu.compute(&batch, &loss, request, &mut output, Some(&mut gradients)).err(), "compute");
    assert_eq!((output, gradients), (Output::default(), Gradients::default()), "outputs are untouched");
    missing(cpu.value(&batch, &loss).err(), "value");
    missing(Reference::new().value_and_grad(&batch, &loss).err(), "reference");
    missing(cpu.plan(&batch, &loss, request).err(), "plan");
    missing(cpu.statistics(&batch, &loss, request).err(), "statistics");
    missing(cpu.hardest_negatives(&batch, Similarity::Dot, 1).err(), "hardest_negatives");
    let statistics = catalog_softmax::RowStatistics::default();
    missing(cpu.gradients(&batch, &loss, &statistics, &[0.0; 2], &[0.0; 2]).err(), "gradients");
}

#[test]
fn hardest_negatives() {
    let mut problem = several();
    no_log_q(&mut problem);
    let find = |problem: &Problem, k: usize| {
        let batch = problem.batch().expect("a valid batch");
        let [one, two] = [
            Cpu::new().hardest_negatives(&batch, Similarity::Cosine, k).map(drop).err(),
            Reference::new().hardest_negatives(&batch, Similarity::Cosine, k).map(drop).err(),
        ];
        assert_eq!(one, two);
        one
    };
    assert_eq!(find(&problem, 8), None);
    check("k = 0", &find(&problem, 0).expect("rejected"), Value("k", "0"));
    check("k past the candidates", &find(&problem, 9).expect("rejected"), Value("k", "9"));
    check("k past its limit", &find(&problem, 5000).expect("rejected"), Value("k", "5000"));
    problem.pools.clear();
    check("no pool", &find(&problem, 1).expect("rejected"), Missing("candidates"));
}

#[test]
#[should_panic(expected = "index out of bounds")]
fn lists_through_an_array_that_is_too_short() {
    let top = TopK::<f32>::default();
    assert!(top.through(&[]).is_empty());
    let problem = over_a_table();
    let batch = problem.batch().expect("a valid batch");
    Cpu::new().hardest_negatives(&batch, Similarity::Cosine, 8).expect("a valid k").through(&[0]);
}

/// What gradients to add to must be, and what a request for gradients may be.
#[test]
fn gradients_to_add_to() {
    type Spoil = fn(&mut Gradients);
    let separate = {
        let pools = vec![PoolKind::Rows(6), PoolKind::Own(2)];
        let config = TableConfig { pools, positives: PositiveKind::Separate, ..TableConfig::new(4, M, 3) };
        config.problem()
    };
    let dense: &[(&str, Spoil, Wanted)] = &[
        ("nothing", |g| *g = Gradients::default(), Shape("gradients.d_queries", "shape (0, 0)")),
        ("queries of 3 rows", |g| g.d_queries = matrix(3, 3), Shape("gradients.d_queries", "shape (3, 3)")),
        ("queries of dim 4", |g| g.d_queries = matrix(4, 4), Shape("gradients.d_queries", "shape (4, 4)")),
        ("queries that lack an element", |g| _ = g.d_queries.values.pop(), Shape("gradients.d_queries", "11 values")),
        ("one pool", |g| _ = g.d_candidates.pop(), Shape("gradients.d_candidates", "length 1")),
        ("a pool of rows", |g| g.d_candidates[0] = matrix(6, 3), Shape("gradients.d_candidates[0]", "shape (6, 3)")),
        ("a pool", |g| g.d_candidates[1] = matrix(3, 3), Shape("gradients.d_candidates[1]", "shape (3, 3)")),
        ("no positives", |g| g.d_positive_embeddings = None, Missing("gradients.d_positive_embeddings")),
        (
            "positives",
            |g| g.d_positive_embeddings = Some(matrix(5, 3)),
            Shape("gradients.d_positive_embeddings", "shape (5, 3)"),
        ),
        ("no table", |g| g.d_table = None, Missing("gradients.d_table")),
        (
            "a smaller table",
            |g| g.d_table = Some(TableGradient::Dense(matrix(8, 3))),
            Shape("gradients.d_table", "(8, 3)"),
        ),
        ("rows of a table", |g| g.d_table = Some(sparse(&[1], 1)), DoesNotApply("gradients.d_table")),
    ];
    let row_sparse: &[(&str, Spoil, Wanted)] = &[
        ("a dense table", |g| g.d_table = Some(TableGradient::Dense(matrix(M, 3))), DoesNotApply("gradients.d_table")),
        ("rows that fall", |g| g.d_table = Some(sparse(&[2, 1], 2)), Value("gradients.d_table.rows[1]", "1")),
        ("a row twice", |g| g.d_table = Some(sparse(&[0, 2, 2], 3)), Value("gradients.d_table.rows[2]", "2")),
        ("a row past the table", |g| g.d_table = Some(sparse(&[2, 9], 2)), Value("gradients.d_table.rows[1]", "9")),
        ("values too few", |g| g.d_table = Some(sparse(&[2, 3], 1)), Shape("gradients.d_table", "shape (1, 3)")),
    ];
    let batch = separate.batch().expect("a valid batch");
    for (cases, request) in [(dense, Request::value_and_grad()), (row_sparse, Request::value_and_grad().row_sparse())] {
        for (what, spoil, wanted) in cases {
            let (mut output, mut gradients) = (Output::default(), Gradients::default());
            Cpu::new().compute(&batch, &separate.loss, request, &mut output, Some(&mut gradients)).expect("valid");
            spoil(&mut gradients);
            let before = (output.clone(), gradients.clone());
            let error =
                Cpu::new().compute(&batch, &separate.loss, request.accumulate(), &mut output, Some(&mut gradients));
            check(what, &error.expect_err(what), *wanted);
            assert_eq!((output.clone(), gradients.clone()), before, "{what}: outputs are untouched");
            let epilogue = separate.loss.epilogue(&batch, &output.statistics).expect("valid");
            let (d_lse, d_positive) = (&epilogue.d_lse, &epilogue.d_positive);
            let request = request.accumulate();
            let statistics = &output.statistics;
            let error = Cpu::new().gradients_into(
                &batch,
                &separate.loss,
                request,
                statistics,
                d_lse,
                d_positive,
                &mut gradients,
            );
            check(what, &error.expect_err(what), *wanted);
            assert_eq!(gradients, before.1, "{what}: gradients are untouched");
        }
    }
}

fn matrix(rows: usize, dim: usize) -> Matrix<f32> {
    let mut matrix = Matrix::default();
    (matrix.rows, matrix.dim, matrix.values) = (rows, dim, vec![0.0; rows * dim]);
    matrix
}

fn sparse(rows: &[u32], of_values: usize) -> TableGradient<f32> {
    TableGradient::RowSparse(RowSparse { rows: rows.to_vec(), values: matrix(of_values, 3) })
}

#[test]
fn requests_that_do_not_apply() {
    let problem = plain();
    let (batch, loss) = (problem.batch().expect("valid"), &problem.loss);
    let run = |request: Request| {
        let (mut output, mut gradients) = (Output::default(), Gradients::default());
        let place = request.gradients.then_some(&mut gradients);
        Cpu::new().compute(&batch, loss, request, &mut output, place).expect_err("does not apply")
    };
    check("no table", &run(Request::value_and_grad().row_sparse()), DoesNotApply("request.row_sparse"));
    check("no gradients", &run(Request::value().accumulate()), DoesNotApply("request.accumulate"));
    check("nothing to add to", &run(Request::value_and_grad().accumulate()), Shape("gradients.d_queries", "(0, 0)"));
}

/// Arrays of the lengths of the positives, in an epilogue of one's own.
#[test]
fn gradients_of_several_positives_that_do_not_fit() {
    let problem = several();
    let (batch, loss) = (problem.batch().expect("valid"), &problem.loss);
    let mut cpu = Cpu::new();
    let statistics = cpu.statistics(&batch, loss, Request::value_and_grad()).expect("a loss that fits");
    let (d_lse, d_positive) = (vec![0.0; 4], vec![0.0; 5]);
    assert!(cpu.gradients(&batch, loss, &statistics, &d_lse, &d_positive).is_ok());
    let mut error = |d_lse: &[f64], d_positive: &[f64]| {
        cpu.gradients(&batch, loss, &statistics, d_lse, d_positive).expect_err("does not fit")
    };
    check("d_lse of the pairs", &error(&d_positive, &d_positive), Shape("d_lse", "length 5"));
    check("d_positive of the rows", &error(&d_lse, &d_lse), Shape("d_positive", "length 4"));
    let mut short = statistics.clone();
    short.positive.pop();
    let wanted = Shape("statistics.positive", "length 4");
    check("epilogue", &loss.epilogue(&batch, &short).expect_err("does not fit"), wanted);
    check("gradients", &cpu.gradients(&batch, loss, &short, &d_lse, &d_positive).expect_err("does not fit"), wanted);
}
