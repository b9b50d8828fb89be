//! Exact top-K on the CPU: the properties of every backend, threads, errors.

use catalog_softmax::{Backend, Cpu, DType, Embeddings, Error, Pool, Reference, Search, Similarity, TopK};
use catalog_softmax_testing::problem::Storage;
use catalog_softmax_testing::topk::{self, SearchData, TOP_K, Values};

/// Each property as a test of its own.
macro_rules! properties {
    ($($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                topk::$name(&mut Cpu::new());
            }
        )*

        #[test]
        fn the_list_is_complete() {
            assert_eq!(TOP_K.len(), [$(stringify!($name)),*].len());
        }
    };
}
properties! {
    top_k_is_exact_at_the_edges_of_tiles,
    top_k_is_exact_over_many_tiles,
    top_k_agrees_within_rounding,
    top_k_breaks_ties_by_index,
    top_k_has_fewer_where_there_are_fewer,
    top_k_leaves_out_what_is_not_finite,
    top_k_of_rows_of_length_zero,
    top_k_is_the_same_again,
}

#[test]
fn the_reference_is_the_definition() {
    topk::the_reference_is_the_definition();
}

fn bits(top: &TopK) -> (Vec<u32>, Vec<u32>) {
    (top.indices.clone(), top.scores.iter().map(|score| score.to_bits()).collect())
}

/// Splits follow the number of threads; the result does not.
#[test]
fn threads_do_not_matter() {
    for (b, n, dim, k) in [(1, 9000, 64, 100), (300, 4000, 128, 1000), (700, 2000, 24, 10)] {
        let data = SearchData::new(b, &[n, 77], dim, DType::F32, Values::Normal, true);
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
            pool.install(|| {
                let splits = Cpu::new().plan_top_k(&data.search(), data.similarity, k).expect("a valid k").splits;
                (splits, bits(&data.top_k(&mut Cpu::new(), k)))
            })
        };
        let (splits, one) = on(1);
        for threads in [2, 3, 7] {
            let (more_splits, found) = on(threads);
            assert!(more_splits > splits, "{threads} threads");
            assert!(found == one, "{b} queries on {threads} threads");
        }
    }
}

/// The argument that an error names, with the value or what was found.
fn named(error: Error) -> (String, String) {
    match error {
        Error::Value { argument, value, rule } => {
            assert!(!rule.is_empty());
            (argument, value)
        }
        Error::DoesNotApply { argument, .. } => (argument, "does not apply".into()),
        Error::Missing { argument, .. } => (argument, "missing".into()),
        Error::Shape { argument, found, .. } => (argument, found),
        other => panic!("{other}"),
    }
}

#[test]
fn a_k_out_of_range_is_an_error() {
    let few = SearchData::new(2, &[5, 6], 3, DType::F32, Values::Normal, false);
    let many = SearchData::new(2, &[2000], 3, DType::F32, Values::Normal, false);
    for (data, k) in [(&few, 0), (&few, 12), (&few, 1025), (&many, 1025), (&many, usize::MAX)] {
        let search = data.search();
        let wanted = ("k".to_string(), k.to_string());
        assert_eq!(named(Cpu::new().top_k(&search, Similarity::Dot, k).expect_err("out of range")), wanted);
        assert_eq!(named(Cpu::new().plan_top_k(&search, Similarity::Dot, k).expect_err("out of range")), wanted);
        assert_eq!(named(Reference::new().top_k(&search, Similarity::Dot, k).expect_err("out of range")), wanted);
    }
    assert!(Cpu::new().top_k(&few.search(), Similarity::Dot, 11).is_ok());
    assert!(Cpu::new().top_k(&many.search(), Similarity::Dot, 1024).is_ok());
}

#[test]
fn a_search_refuses_what_it_would_ignore_and_what_does_not_fit() {
    let (q, c) = ([0.5f32; 6], [0.5f32; 12]);
    let queries = || Embeddings::new(&q[..], 2, 3);
    let pool = || Pool::new(Embeddings::new(&c[..], 4, 3));
    let (ids, log_q) = ([1u64, 2, 3, 4], [-1.0f32; 4]);
    let (offsets, excluded) = ([0i64, 1, 1], [2u64]);
    let wrong_width = Pool::new(Embeddings::new(&c[..], 3, 4));
    let builder = || Search::builder(queries(), pool());
    let with_ids = || Search::builder(queries(), pool().ids(&ids[..]));
    for (builder, argument, what) in [
        (Search::builder(queries(), pool().log_q(&log_q)), "log_q", "does not apply"),
        (builder().excluded_ids(&offsets, &excluded[..]), "candidate_ids", "missing"),
        (with_ids().excluded_ids(&offsets[..2], &excluded[..]), "exclude_offsets", "length 2"),
        (with_ids().excluded_ids(&offsets, &ids[..]), "exclude_ids", "4 ids"),
        (Search::builder(queries(), wrong_width), "candidates", "dim 4"),
        (with_ids().pool(pool()), "pools[1].candidate_ids", "missing"),
    ] {
        let error = builder.build().expect_err(argument);
        assert_eq!(named(error), (argument.to_string(), what.to_string()));
    }
    let search = with_ids().excluded_ids(&offsets, &excluded[..]).build().expect("a valid search");
    assert_eq!((search.num_queries(), search.num_candidates()), (2, 4));
}

/// Scores one unit of rounding apart, ascending: each beats every threshold before it, and by no more than that.
#[test]
fn the_next_float_is_above_the_threshold() {
    let n = 2000u32;
    let candidates: Vec<f32> = (0..n).map(|j| f32::from_bits(1f32.to_bits() + j / 2)).collect();
    let mut data = SearchData::new(1, &[n as usize], 1, DType::F32, Values::Whole, false);
    (data.queries, data.pools[0].0) = (Storage::F32(vec![1.0]), Storage::F32(candidates));
    for k in [1, 2, 5, 333] {
        let top = data.top_k(&mut Cpu::new(), k);
        let wanted: Vec<u32> = data.ranked()[0].iter().take(k).map(|&(_, index)| index).collect();
        assert_eq!(top.row(0).0, wanted);
    }
}

/// What overflows f32 upwards comes first, by index; downwards it does not come. In float64 nothing overflows.
#[test]
fn overflowed_dot_products_are_first_or_nowhere() {
    let mut data = SearchData::new(1, &[6], 1, DType::F32, Values::Whole, false);
    data.queries = Storage::F32(vec![3e38]);
    data.pools[0].0 = Storage::F32(vec![10.0, 1.0, 20.0, -10.0, 0.0, -1.0]);
    let top = data.top_k(&mut Cpu::new(), 6);
    let inf = f32::INFINITY;
    assert_eq!(top.row(0), (&[0, 2, 1, 4, 5][..], &[inf, inf, 3e38, 0.0, -3e38][..]));
    assert_eq!((top.indices[5], top.scores[5], top.num_rows()), (TopK::NONE, -inf, 1));
    let exact = Reference::new().top_k(&data.search(), Similarity::Dot, 6).expect("a valid k");
    assert_eq!(exact.row(0).0, [2, 0, 1, 4, 5, 3]);
}
