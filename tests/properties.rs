//! The properties of every backend, held by the CPU's.

use catalog_softmax::{
    Backend, Batch, Correction, Cpu, DType, Embeddings, Loss, Output, Pool, Reference, Request, Similarity,
};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::properties::{everything, lengths_do_not_matter};
use catalog_softmax_testing::properties::{test_each, with_properties, with_table_properties};
use catalog_softmax_testing::tolerance::Expected;

fn cpu() -> Box<dyn Backend<Real = f32>> {
    Box::new(Cpu::new())
}

with_properties!(test_each!(cpu(), |_| DType::F32));
with_table_properties!(test_each!(cpu(), |_| DType::F32));

/// Under cosine the CPU does not look for the maximum of every tile, so scores here rise as fast as they can from tile to
/// tile of each split: candidates are sorted by their similarity with a query that all queries are near to.
#[test]
fn scores_that_rise_from_tile_to_tile() {
    let many = Config::new(30, 100_000, 8).problem();
    let batch = many.batch().expect("a valid problem");
    let plan = Cpu::new().plan(&batch, &many.loss, Request::value()).expect("a loss that fits");
    for (temperature, correction) in [(0.05, Correction::LogQ), (0.02, Correction::None), (0.005, Correction::LogQ)] {
        let n = 3 * plan.splits * plan.block_n;
        let mut problem = Config { temperature, correction, masking: Masking::Ids, ..Config::new(30, n, 8) }.problem();
        let near = problem.queries.to_f32()[..8].to_vec();
        let dot = |x: &[f32]| {
            x.iter().zip(&near).map(|(x, q)| x * q).sum::<f32>() / x.iter().map(|x| x * x).sum::<f32>().sqrt()
        };
        problem.queries = problem.queries.map(|values| {
            values.chunks_mut(8).for_each(|row| row.iter_mut().zip(&near).for_each(|(x, q)| *x = q + 0.1 * *x));
        });
        problem.pools[0].candidates = problem.pools[0].candidates.map(|values| {
            let mut rows: Vec<Vec<f32>> = values.chunks(8).map(<[f32]>::to_vec).collect();
            rows.sort_by(|a, b| dot(a).total_cmp(&dot(b)));
            // The lowest third in the first tile of each split, the highest in the last.
            let thirds: Vec<&[Vec<f32>]> = rows.chunks(plan.splits * plan.block_n).collect();
            let tiles = (0..plan.splits).flat_map(|split| thirds.iter().map(move |third| (split, third)));
            let tile = |(split, third): (usize, &&[Vec<f32>])| third[split * plan.block_n..][..plan.block_n].concat();
            *values = tiles.flat_map(tile).collect();
        });
        let output = everything(&mut Cpu::new(), &problem);
        Expected::new(&problem, DType::F32).check(&output).unwrap_or_else(|error| panic!("{temperature}: {error}"));
    }
}

/// Scores of which the rounding to `f32` is larger than all that the exponential distinguishes: lse has the precision of its
/// size, and nothing is infinite or NaN.
#[test]
fn scores_of_billions() {
    let lone = [1.0f32, 200_000_050.0, 200_000_178.0];
    for &candidate in &lone[1..] {
        let (queries, candidates) = ([lone[0]], [candidate]);
        let batch = Batch::builder(Embeddings::new(&queries, 1, 1), Embeddings::new(&candidates, 1, 1));
        let batch = batch.positive_embeddings(Embeddings::new(&queries, 1, 1)).build().expect("a valid batch");
        is_right_for_its_size(&batch, &Loss::softmax(Similarity::Dot, 0.05));
    }
    let numbers = |count: usize, size: f32| (0..count).map(|i| (i as f32 * 0.7).sin() * size).collect::<Vec<f32>>();
    let cases = [
        (Similarity::Dot, 1e4, 0.05),
        (Similarity::Dot, 1e4, 0.03),
        (Similarity::Dot, 3e4, 0.5),
        (Similarity::Dot, 1e5, 1.0),
        (Similarity::Cosine, 1.0, 1e-10),
        (Similarity::Cosine, 1.0, 1e-12),
    ];
    for (similarity, size, temperature) in cases {
        let (queries, candidates) = (numbers(4 * 2, size), numbers(40 * 2, 1.3 * size));
        let batch = Batch::builder(Embeddings::new(&queries, 4, 2), Embeddings::new(&candidates, 40, 2));
        let batch = batch.positives(&[3u32, 1, 4, 15]).build().expect("a valid batch");
        is_right_for_its_size(&batch, &Loss::softmax(similarity, temperature));
    }
}

fn is_right_for_its_size(batch: &Batch<'_>, loss: &Loss) {
    let (expected, _) = Reference::new().value_and_grad(batch, loss).expect("a valid loss");
    let (output, gradients) = Cpu::new().value_and_grad(batch, loss).expect("a valid loss");
    for (row, (&lse, &exact)) in output.statistics.lse.iter().zip(&expected.statistics.lse).enumerate() {
        // Each of the rows, the two products, their sum, the temperature and the score is rounded once or twice.
        let tolerance = 8.0 * f64::from(f32::EPSILON) * exact.abs();
        assert!((lse - exact).abs() <= tolerance, "{loss:?}, row {row}: lse is {lse}, expected {exact}");
    }
    let d = gradients.d_candidates[0].values.iter().chain(&gradients.d_queries.values);
    assert!(d.clone().all(|d| d.is_finite()) && output.total.is_finite(), "{loss:?}: {output:?}");
}

/// Under cosine the entropy of a row with one high score among low ones, whose maximum comes in a later tile.
#[test]
fn the_entropy_of_a_peak_does_not_cancel() {
    let (mut output, request) = (Output::default(), Request::value().with_moments());
    let loss = Loss::softmax(Similarity::Cosine, 0.02);
    let many = Config::new(1, 100_000, 2).problem();
    let plan = Cpu::new().plan(&many.batch().expect("a valid problem"), &many.loss, request).expect("a loss that fits");
    // Two tiles in each split.
    let n = 2 * plan.splits * plan.block_n;
    let mut candidates: Vec<f32> = [0.13f32, (1.0f32 - 0.13 * 0.13).sqrt()].repeat(n);
    let peak = plan.block_n + 44;
    candidates[2 * peak..2 * peak + 2].copy_from_slice(&[1.0, 0.0]);
    let (query, positive) = ([1.0f32, 0.0], [0.0f32, 1.0]);
    let batch = Batch::builder(Embeddings::new(&query, 1, 2), Embeddings::new(&candidates, n, 2));
    let batch = batch.positive_embeddings(Embeddings::new(&positive, 1, 2)).build().expect("a valid batch");
    Cpu::new().compute(&batch, &loss, request, &mut output, None).expect("a valid loss");
    let entropy = output.statistics.moments.expect("asked for").entropy[0];
    assert!((0.0..1e-9).contains(&entropy), "{entropy}");
}

/// A candidate that its row excludes has no part in it, whatever its log_q.
#[test]
fn an_excluded_candidate_of_any_log_q_spoils_nothing() {
    let (query, candidates) = ([1.0f32, 0.0], [1.0f32, 0.0, 0.0, 1.0]);
    let pool = Pool::new(Embeddings::new(&candidates, 2, 2)).ids(&[5u64, 6]).log_q(&[-3e38, -1.0]);
    let batch = Batch::builder(Embeddings::new(&query, 1, 2), pool);
    let batch = batch.positive_embeddings(Embeddings::new(&query, 1, 2)).positive_ids(&[5u64]);
    let batch = batch.build().expect("a valid batch");
    let loss = Loss::softmax(Similarity::Cosine, 1.0).correction(Correction::LogQNegativesOnly);
    let output = Cpu::new().value_and_grad(&batch, &loss).expect("a valid loss").0;
    assert!((output.statistics.lse[0] - 1.0).abs() < 1e-6, "{output:?}");
}

/// The CUDA backend's rows end at 2^63.
#[test]
fn rows_as_long_as_f32_has_them_change_nothing_under_cosine() {
    for dtype in [DType::F32, DType::Bf16] {
        for longest in [2f32.powi(64), 2f32.powi(100), 2f32.powi(124)] {
            lengths_do_not_matter(&mut Cpu::new(), |_| DType::F32, dtype, longest);
        }
    }
}
