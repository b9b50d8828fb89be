//! Batches over a table, several positives, negatives of rows' own and the false-negative filter, from host memory and against the
//! reference.

use catalog_softmax::optimizer::Optimizer;
use catalog_softmax::{
    Backend, Batch, Cuda, DType, Gradients, Loss, Pool, Reference, Request, RowNegatives, Similarity, Table,
    TableGradient,
};
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::tolerance::epsilon;
use catalog_softmax_testing::updates;

use crate::table_cases::{
    ALL, Candidates, Case, Filter, NO_POOL, ROWS, SEGMENT, WHOLE, assert_near, popular_rows, wide,
};

use Similarity::{Cosine, Dot};

fn agrees(cuda: &mut Cuda, case: &Case) {
    let (data, loss) = (case.data(), &case.loss());
    let batch = &data.batch();
    let request = Request::value_and_grad().with_moments().with_rank();
    let (mut found, mut found_gradients) = (Default::default(), Gradients::default());
    cuda.compute(batch, loss, request, &mut found, Some(&mut found_gradients)).expect("a loss that fits");
    let (mut wanted, mut wanted_gradients) = (Default::default(), Gradients::default());
    Reference::new().compute(batch, loss, request, &mut wanted, Some(&mut wanted_gradients)).expect("a loss that fits");
    let (s, w) = (&found.statistics, &wanted.statistics);
    assert_eq!(s.num_negatives, w.num_negatives, "{case:?}");
    assert_near("lse", case, &s.lse, &w.lse, s.lse.len());
    assert_near("positive", case, &s.positive, &w.positive, s.positive.len());
    assert_near("loss", case, &found.loss, &wanted.loss, found.loss.len());
    assert_near("probability", case, &found.probability, &wanted.probability, found.probability.len());
    assert_near("total", case, &[found.total], &[wanted.total], 1);
    let (moments, wanted_moments) = (s.moments.as_ref().expect("asked for"), w.moments.as_ref().expect("asked for"));
    assert_near("entropy", case, &moments.entropy, &wanted_moments.entropy, moments.entropy.len());
    let scores = (&moments.expected_score, &wanted_moments.expected_score);
    assert_near("expected_score", case, scores.0, scores.1, scores.0.len());
    let (rank, wanted_rank) = (s.rank.as_ref().expect("asked for"), w.rank.as_ref().expect("asked for"));
    // Of f64 scores no two are equal that f32 cannot tell apart.
    let both = |rank: &catalog_softmax::Rank| rank.above.iter().zip(&rank.ties).map(|(a, t)| a + t).collect::<Vec<_>>();
    assert_eq!(both(rank), both(wanted_rank), "ranks of {case:?}");
    let (g, w) = (&found_gradients, &wanted_gradients);
    let dim = case.sizes.3;
    assert_near("d_queries", case, &wide(&g.d_queries.values), &w.d_queries.values, dim);
    for (p, (d, wanted)) in g.d_candidates.iter().zip(&w.d_candidates).enumerate() {
        assert_near(&format!("d_candidates[{p}]"), case, &wide(&d.values), &wanted.values, dim);
    }
    match (&g.d_positive_embeddings, &w.d_positive_embeddings) {
        (Some(d), Some(wanted)) => assert_near("d_positive_embeddings", case, &wide(&d.values), &wanted.values, dim),
        (d, wanted) => assert!(d.is_none() && wanted.is_none()),
    }
    match (&g.d_table, &w.d_table) {
        (Some(TableGradient::Dense(d)), Some(TableGradient::Dense(wanted))) => {
            assert_near("d_table", case, &wide(&d.values), &wanted.values, dim);
            let mut sparse = Gradients::default();
            cuda.compute(batch, loss, request.row_sparse(), &mut found, Some(&mut sparse)).expect("a loss that fits");
            let sparse = sparse.d_table.as_ref().and_then(TableGradient::row_sparse).expect("asked for").clone();
            assert!(sparse.rows.is_sorted_by(|a, b| a < b), "{case:?}");
            for row in 0..d.rows {
                match sparse.rows.binary_search(&(row as u32)) {
                    Ok(at) => assert_eq!(sparse.values.row(at), d.row(row), "row {row} of {case:?}"),
                    Err(_) => assert!(d.row(row).iter().all(|&x| x == 0.0), "row {row} of {case:?}"),
                }
            }
        }
        (d, wanted) => assert!(d.is_none() && wanted.is_none(), "{case:?}"),
    }
}

/// Rows with several positives, one, none, and one twice; by index, of their own embeddings, and rows of a table.
pub fn several_positives_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, Candidates::Separate, ROWS] {
        for (dtype, similarity, log_q) in
            [(DType::F32, Cosine, false), (DType::F16, Cosine, true), (DType::Bf16, Dot, true)]
        {
            agrees(cuda, &Case { dtype, similarity, log_q, several: true, ..Case::new(candidates) });
        }
    }
}

pub fn filters_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, Candidates::Separate, ROWS, WHOLE] {
        for filter in [Filter::Margin(0.3), Filter::Margin(-0.4), Filter::Ratio(0.6)] {
            for several in [false, true] {
                agrees(cuda, &Case { filter, several, own: 9, ..Case::new(candidates) }.without_own_unless_table());
            }
        }
    }
    agrees(cuda, &Case { filter: Filter::Margin(0.5), similarity: Dot, own: 20, ..Case::new(WHOLE) });
}

pub fn pools_by_reference_agree(cuda: &mut Cuda) {
    for candidates in [ROWS, WHOLE, ALL] {
        for (dtype, similarity, log_q) in
            [(DType::F32, Cosine, false), (DType::F16, Cosine, true), (DType::Bf16, Dot, true)]
        {
            for ids in [false, true] {
                agrees(cuda, &Case { dtype, similarity, log_q, ids, ..Case::new(candidates) });
            }
        }
    }
    // Rows that tensor cores take in several slices, and that do not start at multiples of 16 bytes; several splits.
    agrees(cuda, &Case { sizes: (140, 700, 300, 301), log_q: true, ..Case::new(ALL) });
    agrees(cuda, &Case { gradient: false, ..Case::new(ALL) });
}

pub fn negatives_of_rows_own_agree(cuda: &mut Cuda) {
    for candidates in [NO_POOL, ROWS, ALL] {
        for (dtype, similarity, log_q) in
            [(DType::F32, Cosine, false), (DType::F16, Cosine, true), (DType::Bf16, Dot, true)]
        {
            for several in [false, true] {
                agrees(cuda, &Case { dtype, similarity, log_q, several, own: 13, ids: log_q, ..Case::new(candidates) });
            }
        }
    }
    // More negatives than threads, and rows wider than a warp holds.
    agrees(cuda, &Case { own: 300, sizes: (9, 10, 500, 300), log_q: true, ..Case::new(NO_POOL) });
}

pub fn rows_with_many_uses_agree(cuda: &mut Cuda) {
    for case in popular_rows() {
        agrees(cuda, &case);
    }
}

/// The uses of a row end one before the end of a segment of the list, there, and one behind it.
pub fn segments_end_where_a_row_ends(cuda: &mut Cuda) {
    let case = Case { sizes: (4, SEGMENT, 3, 8), own: SEGMENT, ..Case::new(NO_POOL) };
    let (data, own) = (case.data(), case.sizes.0 * case.own);
    for uses in 2 * SEGMENT - 1..=2 * SEGMENT + 1 {
        let own: Vec<u32> = (0..own).map(|place| u32::from(place >= uses)).collect();
        let table = Table::new(data.table.view(case.sizes.3));
        let batch = Batch::of_table(data.queries.view(case.sizes.3), table).positives(&[2u32; 4]);
        let batch = batch.row_negatives(RowNegatives::new(&own, case.own)).build().expect("a batch");
        gradients_agree(cuda, &case, &batch);
    }
}

/// Candidates of the second of two pools, each with pairs of several segments.
pub fn segments_of_a_later_pool_agree(cuda: &mut Cuda) {
    let (b, dim) = (4 * SEGMENT, 8);
    let case = Case { sizes: (b, 5, 1, dim), ..Case::new(Candidates::Embeddings) };
    // Two positives of every other row.
    let (data, offsets) = (case.data(), (0..=b as i64).map(|row| row + row % 2).collect::<Vec<_>>());
    let positives: Vec<u32> = (0..b as u32).map(|row| if row % 8 == 0 { 1 } else { 5 + row % 2 }).collect();
    let batch = Batch::builder(data.queries.view(dim), Pool::new(data.own_pool.view(dim)));
    let batch = batch.pool(Pool::new(data.own_pool.view(dim))).positives(&positives).positive_offsets(&offsets);
    gradients_agree(cuda, &case, &batch.build().expect("a batch"));
}

fn gradients_agree(cuda: &mut Cuda, case: &Case, batch: &Batch<'_>) {
    let (loss, dim) = (Loss::softmax(case.similarity, 0.2), case.sizes.3);
    let (_, found) = cuda.value_and_grad(batch, &loss).expect("a loss that fits");
    let (_, wanted) = Reference::new().value_and_grad(batch, &loss).expect("a loss that fits");
    assert_eq!(found.d_candidates.len(), wanted.d_candidates.len());
    for (d, wanted) in found.d_candidates.iter().zip(&wanted.d_candidates) {
        assert_near("d_candidates", case, &wide(&d.values), &wanted.values, dim);
    }
    let of_table = |found: &Option<TableGradient<f32>>| {
        found.as_ref().and_then(TableGradient::dense).map_or(Vec::new(), |d| wide(&d.values))
    };
    let wanted = wanted.d_table.as_ref().and_then(TableGradient::dense).map_or(Vec::new(), |d| d.values.clone());
    assert_near("d_table", case, &of_table(&found.d_table), &wanted, dim);
}

/// The most similar negatives among candidates by reference.
pub fn hardest_negatives_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, ROWS, WHOLE, ALL] {
        for (several, ids) in [(false, false), (true, true)] {
            let case = Case { several, ids, ..Case::new(candidates) };
            let data = case.data();
            let batch = &data.batch();
            let found = cuda.hardest_negatives(batch, Cosine, 7).expect("a batch with pools");
            let wanted = Reference::new().hardest_negatives(batch, Cosine, 7).expect("a batch with pools");
            for (i, (&found, &wanted)) in found.scores.iter().zip(&wanted.scores).enumerate() {
                let near = (f64::from(found) - wanted).abs() < 1e-5 || f64::from(found) == wanted;
                assert!(near, "scores[{i}] is {found}, not {wanted}: {case:?}");
            }
            // Copies of a row tie, and then the smaller index comes first.
            assert_eq!(found.indices, wanted.indices, "{case:?}");
        }
    }
}

/// The optimiser's step in place of the table's gradient: the gradient from the device, the step on the host.
pub fn updates_are_the_gradient_and_then_the_step(cuda: &mut Cuda) {
    for (p, problem) in updates::problems().iter().enumerate() {
        // All rules on one problem, the first of them on the others.
        let rules = updates::optimizers(problem);
        let number = if p == 0 { rules.len() } else { 1 };
        for (rule, optimizer) in rules.into_iter().take(number).enumerate() {
            let one = updates::updated(cuda, problem, optimizer.clone());
            assert!(one == updates::gradient_then_step(cuda, problem, optimizer.clone()), "rule {rule} of problem {p}");
            if rule == 0 {
                steps_as_the_reference(problem, &one.table, optimizer);
            }
        }
    }
}

/// A step of SGD: 0.1 of the gradient, whose error is that of products of its type; and the table is rounded to its type.
fn steps_as_the_reference(problem: &Problem, found: &[f32], optimizer: Optimizer) {
    let wanted = updates::updated(&mut Reference::new(), problem, optimizer).table;
    let table = &problem.table.as_ref().expect("a table").embeddings;
    let steps = wanted.iter().zip(table.to_f32()).map(|(after, before)| f64::from((after - before).abs()));
    let (largest, unit) = (steps.fold(0.0, f64::max), epsilon(table.dtype()));
    for (i, (&found, &wanted)) in found.iter().zip(&wanted).enumerate() {
        let allowed = 64.0 * unit * largest + 2.0 * unit * f64::from(wanted.abs());
        let error = f64::from((found - wanted).abs());
        assert!(error <= allowed, "element {i} is {found}, not {wanted}, of {:?}", problem.loss);
    }
}
