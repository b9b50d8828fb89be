//! Whole steps and searches with the matrix unit, emulated on every processor: as near to float64 as those without it, and alike for
//! every place that a pair has in its tile.

use half::bf16;

use super::Cpu;
use super::amx::Amx;
use crate::{
    Backend, Batch, Correction, Embeddings, Gradients, Loss, Output, Pool, Reference, Request, RowNegatives, Search,
    Similarity, Table,
};

/// The CPU with the emulated unit, and with the processor's where it has one.
fn backends() -> impl Iterator<Item = Cpu> {
    let with = |amx| Cpu { amx, ..Cpu::without_amx() };
    std::iter::once(with(|| Some(Amx::emulated()))).chain(Amx::detect().map(|_| with(Amx::detect)))
}

/// Numbers of a shape of rows, each row `size(row)` times its numbers.
fn rows(rows: usize, dim: usize, seed: f32, size: impl Fn(usize) -> f32) -> Vec<bf16> {
    let number = |i: usize| ((i as f32 * 0.37 + seed).sin() + (i as f32 * 0.011).cos()) * size(i / dim);
    (0..rows * dim).map(|i| bf16::from_f32(number(i))).collect()
}

/// Results of a step by name.
type Results = Vec<(&'static str, Vec<f64>)>;

fn results<T: Copy + Into<f64>>(output: &Output<T>, gradients: &Gradients<T>) -> Results {
    let wide = |values: &[T]| values.iter().map(|&x| x.into()).collect::<Vec<f64>>();
    let statistics = &output.statistics;
    let mut all = vec![
        ("lse", statistics.lse.clone()),
        ("positive", statistics.positive.clone()),
        ("d_queries", wide(&gradients.d_queries.values)),
        ("d_temperature", vec![gradients.d_temperature]),
    ];
    all.extend(gradients.d_candidates.iter().map(|d| ("d_candidates", wide(&d.values))));
    all.extend(gradients.d_table.iter().filter_map(|d| d.dense()).map(|d| ("d_table", wide(&d.values))));
    all
}

fn step<B: Backend>(mut backend: B, batch: &Batch<'_>, loss: &Loss) -> Results {
    let (mut output, mut gradients) = (Output::default(), Gradients::default());
    let request = Request::value_and_grad();
    backend.compute(batch, loss, request, &mut output, Some(&mut gradients)).expect("a valid batch");
    results(&output, &gradients)
}

/// The largest error of each result, relative to the largest of its numbers, if they are not all 0.
fn errors(found: &Results, exact: &Results) -> Vec<(&'static str, f64)> {
    assert_eq!(found.len(), exact.len());
    let error = |(name, found): &(&'static str, Vec<f64>), exact: &[f64]| {
        assert!(found.iter().all(|x| x.is_finite()), "{name}");
        let largest = exact.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
        let difference = found.iter().zip(exact).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        (*name, difference / if largest == 0.0 { 1.0 } else { largest })
    };
    found.iter().zip(exact).map(|(found, (_, exact))| error(found, exact)).collect()
}

/// Rounding errors that a lucky baseline may be without.
const LEAST: f64 = 2.0 * f32::EPSILON as f64;

fn is_as_near_as_without(batch: &Batch<'_>, loss: &Loss) {
    let exact = step(Reference::new(), batch, loss);
    let baseline = errors(&step(Cpu::without_amx(), batch, loss), &exact);
    for backend in backends() {
        let unit = (backend.amx)();
        for ((name, error), (_, baseline)) in errors(&step(backend, batch, loss), &exact).iter().zip(&baseline) {
            assert!(*error <= 4.0 * baseline.max(LEAST), "{name}: {error:e}, without {baseline:e}, {unit:?}");
        }
    }
}

/// Shapes on both sides of a block's and a tile's edges, rows of very different lengths, duplicates.
#[test]
fn steps_are_as_near_to_float64_as_on_the_vector_units() {
    for (b, n, dim) in [(3, 5, 3), (31, 33, 31), (33, 300, 33), (161, 70, 64), (70, 513, 7)] {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            let size = |row: usize| [1.0, 0.2, 3.0][row % 3];
            let (queries, mut candidates) = (rows(b, dim, 1.0, size), rows(n, dim, 2.0, size));
            candidates.copy_within(0..dim, (n - 1) * dim);
            let positives: Vec<u32> = (0..b).map(|row| (row * 5 % n) as u32).collect();
            let log_q: Vec<f32> = (0..n).map(|i| -1.0 - (i % 7) as f32).collect();
            let ids: Vec<u64> = (0..n as u64).map(|i| i * 2 / 3).collect();
            let pool = Pool::new(Embeddings::new(&candidates[..], n, dim)).log_q(&log_q).ids(&ids);
            let batch = Batch::builder(Embeddings::new(&queries[..], b, dim), pool).positives(&positives);
            let batch = batch.build().expect("a valid batch");
            let loss = Loss::softmax(similarity, 0.2).correction(Correction::LogQNegativesOnly);
            is_as_near_as_without(&batch, &loss);
        }
    }
}

/// Lengths at the ends of the type's range: products of the rows as they are would overflow or vanish on the way.
#[test]
fn lengths_at_the_ends_of_the_range() {
    let (b, n, dim) = (40, 70, 20);
    let positives: Vec<u32> = (0..b as u32).collect();
    for [query, candidate] in [[1e37, 1e37], [1e30, 1e-5], [1e37, 1e-37], [1e-38, 1e37]] {
        let (queries, candidates) = (rows(b, dim, 1.0, |_| query), rows(n, dim, 2.0, |_| candidate));
        let batch = Batch::builder(Embeddings::new(&queries[..], b, dim), Embeddings::new(&candidates[..], n, dim));
        let batch = batch.positives(&positives).build().expect("a valid batch");
        // Scores of the dot product between about -20 and 20.
        let temperature = f64::from(query) * f64::from(candidate);
        let of_dot = temperature < 1e3;
        let dot = of_dot.then(|| Loss::softmax(Similarity::Dot, temperature));
        for loss in dot.into_iter().chain([Loss::softmax(Similarity::Cosine, 0.5)]) {
            let exact = step(Reference::new(), &batch, &loss);
            let baseline = errors(&step(Cpu::without_amx(), &batch, &loss), &exact);
            for backend in backends() {
                let unit = (backend.amx)();
                let found = errors(&step(backend, &batch, &loss), &exact);
                // Gradients by embeddings of such lengths leave the range of `f32` on all backends.
                for ((name, error), (_, baseline)) in found.iter().zip(&baseline).take(2) {
                    let most = 4.0 * baseline.max(LEAST);
                    assert!(
                        *error <= most,
                        "{name}: {error:e}, without {baseline:e}, {query:e}, {candidate:e}, {unit:?}"
                    );
                }
            }
        }
    }
}

/// Long embeddings at a right angle: their similarity is 0, and not 0 times the product of their lengths, which is infinite.
#[test]
fn long_embeddings_at_a_right_angle_have_the_similarity_0() {
    let long = bf16::from_f32(1e30);
    let (queries, candidates) = ([long, bf16::ZERO], [bf16::ZERO, long, bf16::ZERO, -long]);
    let batch = Batch::builder(Embeddings::new(&queries[..], 1, 2), Embeddings::new(&candidates[..], 2, 2));
    let batch = batch.positives(&[0u32]).build().expect("a valid batch");
    for mut backend in backends() {
        let output = backend.value(&batch, &Loss::softmax(Similarity::Dot, 1.0)).expect("a valid loss");
        assert_eq!((output.statistics.lse[0], output.statistics.positive[0]), (0.0, 0.0));
    }
}

/// The gradient of a table: its rows go through the same tiles as a whole pool, as candidates by row, and, on the vector units, as
/// negatives of the queries' own.
#[test]
fn tables_are_as_near_to_float64_as_on_the_vector_units() {
    let (b, m, dim) = (70, 200, 40);
    let (queries, table) = (rows(b, dim, 1.0, |_| 1.0), rows(m, dim, 2.0, |row| 0.5 + (row % 5) as f32));
    let positives: Vec<u32> = (0..b).map(|row| (row * 7 % m) as u32).collect();
    let some: Vec<i64> = (0..90).map(|i| i * i % m as i64).collect();
    let own: Vec<i64> = (0..b as i64 * 3).map(|i| i * 11 % m as i64).collect();
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        for pool in [Pool::whole_table(), Pool::rows(&some)] {
            let of_table = Table::new(Embeddings::new(&table[..], m, dim));
            let batch = Batch::of_table(Embeddings::new(&queries[..], b, dim), of_table).pool(pool);
            let batch = batch.row_negatives(RowNegatives::new(&own, 3)).positives(&positives);
            is_as_near_as_without(&batch.build().expect("a valid batch"), &Loss::softmax(similarity, 0.3));
        }
    }
}

/// Candidates with the same embedding have the same score, wherever they are, and the positive that is one of them ties with it.
#[test]
fn equal_embeddings_have_equal_scores() {
    let (b, n, dim) = (35, 400, 33);
    let (queries, mut candidates) = (rows(b, dim, 1.0, |_| 1.0), rows(n, dim, 2.0, |_| 1.0));
    for copy in 1..n / 40 {
        candidates.copy_within(0..40 * dim, copy * 40 * dim);
    }
    let (queries, candidates) = (Embeddings::new(&queries[..], b, dim), Embeddings::new(&candidates[..], n, dim));
    let positives: Vec<u32> = (0..b as u32).collect();
    let batch = Batch::builder(queries, candidates).positives(&positives).build().expect("a valid batch");
    let loss = Loss::softmax(Similarity::Cosine, 0.1);
    let search = Search::builder(queries, candidates).build().expect("a valid search");
    for mut backend in backends() {
        let statistics = Backend::statistics(&mut backend, &batch, &loss, Request::value().with_rank());
        let statistics = statistics.expect("a valid batch");
        let ties = &statistics.rank.as_ref().expect("asked for").ties;
        assert!(ties.iter().all(|&ties| ties == 9), "{ties:?}");
        let top = backend.top_k(&search, Similarity::Cosine, 10).expect("a valid search");
        for (row, (indices, scores)) in top.indices.chunks(10).zip(top.scores.chunks(10)).enumerate() {
            assert!(indices.windows(2).all(|pair| pair[0] + 40 == pair[1]), "{row}: {indices:?}");
            assert!(scores.iter().all(|score| score.to_bits() == scores[0].to_bits()), "{row}: {scores:?}");
        }
    }
}

/// Scores of order 1 between long and short rows: the derivative by the temperature is of order 1, too, and sums the expected
/// negatives, whose rows are short. And gradients of short queries' candidates.
#[test]
fn gradients_of_short_rows_beside_long_ones() {
    let (b, n, dim) = (70, 300, 16);
    let positives: Vec<u32> = (0..b as u32).collect();
    for [query, candidate] in [[1e34, 1e-34], [1e-34, 1e34]] {
        let (queries, candidates) = (rows(b, dim, 1.0, |_| query), rows(n, dim, 2.0, |_| candidate));
        let batch = Batch::builder(Embeddings::new(&queries[..], b, dim), Embeddings::new(&candidates[..], n, dim));
        let batch = batch.positives(&positives).build().expect("a valid batch");
        is_as_near_as_without(&batch, &Loss::softmax(Similarity::Dot, 4.0));
    }
}

/// Rows that weigh little: coefficients near the least number.
#[test]
fn gradients_of_rows_that_weigh_little() {
    let (b, n, dim) = (70, 300, 37);
    let positives: Vec<u32> = (0..b as u32).collect();
    let (queries, candidates) = (rows(b, dim, 1.0, |_| 1.0), rows(n, dim, 2.0, |_| 1.0));
    for weight in [1e-33, 1e30] {
        let weights = vec![weight; b];
        let batch = Batch::builder(Embeddings::new(&queries[..], b, dim), Embeddings::new(&candidates[..], n, dim));
        let batch = batch.positives(&positives).row_weight(&weights).build().expect("a valid batch");
        is_as_near_as_without(&batch, &Loss::softmax(Similarity::Cosine, 1.0).reduction(crate::Reduction::Sum));
    }
}

/// Whole steps, with a workspace that steps of other shapes and of NaN have left behind.
#[test]
fn emulated_steps_are_the_processors_after_other_steps_too() {
    let shape = |cpu: &mut Cpu, b: usize, n: usize, dim: usize, nan: bool, similarity| {
        let size = |row: usize| if nan { f32::NAN } else { [1.0, 0.2, 3.0][row % 3] };
        let (queries, candidates) = (rows(b, dim, 1.0, size), rows(n, dim, 2.0, size));
        let positives: Vec<u32> = (0..b).map(|row| (row * 5 % n) as u32).collect();
        let batch = Batch::builder(Embeddings::new(&queries[..], b, dim), Embeddings::new(&candidates[..], n, dim));
        let batch = batch.positives(&positives).build().expect("a valid batch");
        let (mut output, mut gradients) = (Output::default(), Gradients::default());
        let request = Request::value_and_grad().with_rank().with_moments();
        let loss = Loss::softmax(similarity, 0.2);
        cpu.compute(&batch, &loss, request, &mut output, Some(&mut gradients)).expect("a valid batch");
        let mut all: Vec<u64> =
            results(&output, &gradients).into_iter().flat_map(|(_, x)| x).map(f64::to_bits).collect();
        all.extend(output.statistics.rank.expect("asked for").ties);
        all
    };
    let mut reused: Vec<Cpu> = backends().collect();
    for (b, n, dim) in [(560, 300, 40), (1, 1, 1), (129, 97, 300), (33, 40, 2049), (529, 33, 31)] {
        for similarity in [Similarity::Cosine, Similarity::Dot] {
            let fresh: Vec<_> = backends().map(|mut cpu| shape(&mut cpu, b, n, dim, false, similarity)).collect();
            assert!(fresh.iter().all(|bits| *bits == fresh[0]), "{b} {n} {dim}: emulated and real");
            for cpu in &mut reused {
                shape(cpu, 150, 310, 70, true, similarity);
                assert!(shape(cpu, b, n, dim, false, similarity) == fresh[0], "{b} {n} {dim}: stale");
            }
        }
    }
}
