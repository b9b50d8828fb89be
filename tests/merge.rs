//! `RowStatistics::merge`: statistics over parts of the candidates are those over all.

use catalog_softmax::{Backend, Batch, Cpu, Error, Pool, Reference, Request, RowStatistics};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::problem::{PositiveData, Problem};

fn problem() -> Problem {
    Config { separate: true, masking: Masking::Excluded, temperature: 0.2, ..Config::new(11, 40, 6) }.problem()
}

/// Statistics of the problem's queries against these of its candidates.
fn over<B: Backend>(backend: &mut B, problem: &Problem, candidates: std::ops::Range<usize>) -> RowStatistics<B::Real> {
    let (pool, dim) = (&problem.pools[0], problem.dim);
    let part = pool.candidates.map(|values| *values = values[candidates.start * dim..candidates.end * dim].to_vec());
    let ids = &pool.ids.as_ref().expect("ids")[candidates];
    let (offsets, excluded) = problem.excluded.as_ref().expect("exclusions");
    let PositiveData::Separate(positives) = &problem.positives else { panic!("separate positives") };
    let batch = Batch::builder(problem.queries.view(dim), Pool::new(part.view(dim)).ids(ids))
        .positive_embeddings(positives.view(dim))
        .positive_ids(problem.positive_ids.as_ref().expect("ids"))
        .excluded_ids(offsets, excluded)
        .build()
        .expect("a batch");
    let request = Request::value_and_grad().with_moments().with_rank();
    backend.statistics(&batch, &problem.loss, request).expect("statistics")
}

fn near(what: &str, found: &[f64], expected: &[f64], epsilon: f64) {
    assert_eq!(found.len(), expected.len());
    for (row, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let same = found == expected || (found - expected).abs() <= epsilon * expected.abs().max(1.0);
        assert!(same, "{what}[{row}] is {found}, expected {expected}");
    }
}

/// `epsilon` times the number of parts and the largest score, which is 5.
fn check<B: Backend>(backend: &mut B, epsilon: f64) {
    let (problem, epsilon) = (problem(), 20.0 * epsilon);
    let whole = over(backend, &problem, 0..40);
    for ends in [vec![40], vec![1, 40], vec![13, 14, 40], vec![10, 20, 30, 40]] {
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let parts: Vec<_> = starts.zip(&ends).map(|(start, &end)| over(backend, &problem, start..end)).collect();
        let merged = RowStatistics::merge(&parts).expect("parts that fit");
        assert_eq!((&merged.positive, &merged.rank), (&whole.positive, &whole.rank));
        assert_eq!(merged.num_negatives, whole.num_negatives);
        near("lse", &merged.lse, &whole.lse, epsilon);
        let (found, expected) = (merged.moments.expect("moments"), whole.moments.as_ref().expect("moments"));
        near("expected_score", &found.expected_score, &expected.expected_score, epsilon);
        near("entropy", &found.entropy, &expected.entropy, epsilon);
        let wide = |o: &RowStatistics<B::Real>| {
            let o = o.expected_negative.as_ref().expect("asked for");
            o.values.iter().map(|&value| value.into()).collect::<Vec<f64>>()
        };
        let o = RowStatistics::merge(&parts).expect("parts that fit");
        near("expected_negative", &wide(&o), &wide(&whole), epsilon);
    }
}

#[test]
fn parts_of_the_candidates_merge_into_all() {
    check(&mut Reference::new(), f64::EPSILON);
    check(&mut Cpu::new(), f64::from(f32::EPSILON));
}

#[test]
fn one_part_is_itself_and_parts_without_negatives_drop_out() {
    let part = over(&mut Reference::new(), &problem(), 0..40);
    assert_eq!(RowStatistics::merge(std::slice::from_ref(&part)), Ok(part.clone()));
    let mut empty = part.clone();
    empty.lse.fill(f64::NEG_INFINITY);
    empty.num_negatives.fill(0);
    let rank = empty.rank.as_mut().expect("asked for");
    rank.above.fill(0);
    rank.ties.fill(0);
    for parts in [[part.clone(), empty.clone()], [empty, part.clone()]] {
        assert_eq!(RowStatistics::merge(&parts), Ok(part.clone()));
    }
}

#[test]
fn nan_stays() {
    let part = over(&mut Reference::new(), &problem(), 0..40);
    let mut spoiled = part.clone();
    spoiled.lse[3] = f64::NAN;
    for parts in [[part.clone(), spoiled.clone()], [spoiled.clone(), part.clone()], [spoiled.clone(), spoiled]] {
        let merged = RowStatistics::merge(&parts).expect("parts that fit");
        let o = merged.expected_negative.as_ref().expect("asked for");
        assert!(merged.lse[3].is_nan() && o.row(3).iter().all(|o| o.is_nan()));
        assert!(merged.lse[4].is_finite() && o.row(4).iter().all(|o| o.is_finite()));
    }
}

#[test]
fn parts_that_do_not_fit_are_named() {
    let part = over(&mut Reference::new(), &problem(), 0..40);
    let argument = |change: &dyn Fn(&mut RowStatistics<f64>)| {
        let mut other = part.clone();
        change(&mut other);
        match RowStatistics::merge(&[part.clone(), other]).expect_err("it does not fit") {
            Error::Shape { argument, .. } | Error::Missing { argument, .. } => argument,
            error => panic!("{error}"),
        }
    };
    assert_eq!(argument(&|part| part.lse.truncate(3)), "parts[1].lse");
    assert_eq!(argument(&|part| part.num_negatives.truncate(3)), "parts[1].num_negatives");
    assert_eq!(argument(&|part| part.positive.push(0.0)), "parts[1].positive");
    assert_eq!(argument(&|part| part.moments = None), "parts[1].moments");
    assert_eq!(argument(&|part| part.rank = None), "parts[1].rank");
    assert_eq!(argument(&|part| part.expected_negative = None), "parts[1].expected_negative");
    let short = |part: &mut RowStatistics<f64>| part.expected_negative.as_mut().expect("asked for").values.truncate(5);
    assert_eq!(argument(&short), "parts[1].expected_negative");
    let mut lacks = part.clone();
    lacks.rank = None;
    let given = RowStatistics::merge(&[lacks, part]);
    assert!(matches!(given, Err(Error::DoesNotApply { argument, .. }) if argument == "parts[1].rank"));
    assert!(matches!(RowStatistics::<f64>::merge(&[]), Err(Error::Missing { .. })));
}
