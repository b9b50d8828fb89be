//! The bias of the corrections for sampling: the mean of a row's gradient over many samples of negatives, against the
//! gradient of the full softmax over the catalogue.

use catalog_softmax::{Backend, Batch, Correction, Cpu, Embeddings, Loss, Pool, Reduction, Similarity};
use catalog_softmax_testing::generate::rng;
use catalog_softmax_testing::gradient_bias::{Catalogue, DIM, POSITIVE};

/// Relative L2 error of the mean gradient over `trials` samples of `n` draws from Q, and its standard error. Draws of
/// the positive are accidental hits, masked by their id.
fn bias(catalogue: &Catalogue, correction: Correction, n: usize, trials: usize) -> (f64, f64) {
    let mut rng = rng(n as u64);
    let loss = Loss::softmax(Similarity::Dot, 1.0).correction(correction).reduction(Reduction::Sum);
    let mut cpu = Cpu::new();
    let (mut sum, mut squares) = ([0.0; DIM], [0.0; DIM]);
    let positive = catalogue.item(POSITIVE);
    for _ in 0..trials {
        let drawn: Vec<usize> = (0..n).map(|_| catalogue.draw_by_popularity(&mut rng)).collect();
        let items: Vec<f32> = drawn.iter().flat_map(|&j| catalogue.item(j).iter().copied()).collect();
        let ids: Vec<u64> = drawn.iter().map(|&j| j as u64).collect();
        let log_q: Vec<f32> = drawn.iter().map(|&j| catalogue.log_q[j]).collect();
        let mut pool = Pool::new(Embeddings::new(&items, n, DIM)).ids(&ids).without_gradient();
        if correction != Correction::None {
            pool = pool.log_q(&log_q);
        }
        let (positive_ids, positive_log_q) = ([POSITIVE as u64], [catalogue.log_q[POSITIVE]]);
        let mut builder = Batch::builder(Embeddings::new(&catalogue.query, 1, DIM), pool)
            .positive_embeddings(Embeddings::new(positive, 1, DIM))
            .positive_ids(&positive_ids[..]);
        if matches!(correction, Correction::LogQ | Correction::CorrectedLogQ) {
            builder = builder.positive_log_q(&positive_log_q);
        }
        let (_, gradients) = cpu.value_and_grad(&builder.build().expect("a valid batch"), &loss).expect("fits");
        for (k, &d) in gradients.d_queries.values.iter().enumerate() {
            sum[k] += f64::from(d);
            squares[k] += f64::from(d).powi(2);
        }
    }
    let count = trials as f64;
    let (mut off, mut variance, mut size) = (0.0, 0.0, 0.0);
    for k in 0..DIM {
        let mean = sum[k] / count;
        off += (mean - catalogue.exact[k]).powi(2);
        variance += (squares[k] / count - mean * mean) / count;
        size += catalogue.exact[k].powi(2);
    }
    ((off / size).sqrt(), (variance / size).sqrt())
}

#[test]
fn the_corrected_gradient_approaches_the_full_softmax() {
    let catalogue = Catalogue::new();
    let (few, few_error) = bias(&catalogue, Correction::CorrectedLogQ, 32, 8000);
    let (more, more_error) = bias(&catalogue, Correction::CorrectedLogQ, 256, 4000);
    let (many, many_error) = bias(&catalogue, Correction::CorrectedLogQ, 1024, 4000);
    let (both, both_error) = bias(&catalogue, Correction::LogQ, 1024, 300);
    let (alone, alone_error) = bias(&catalogue, Correction::LogQNegativesOnly, 1024, 300);
    println!("corrected: {few} ± {few_error} at 32, {more} ± {more_error} at 256, {many} ± {many_error} at 1024");
    println!("logQ at 1024: {both} ± {both_error} on both, {alone} ± {alone_error} on the negatives alone");
    // The ratio estimator's bias falls as 1/n; the design's own run of this kind gave 0.091, 0.004 and 0.78.
    assert!(few < 0.2 + 4.0 * few_error && few > 0.01, "{few} ± {few_error} at 32");
    assert!(more < few / 3.0 + 4.0 * (few_error + more_error), "{more} ± {more_error} at 256");
    assert!(many < few / 8.0 + 4.0 * many_error && many < 0.02, "{many} ± {many_error} at 1024");
    assert!((both - 0.78).abs() < 0.08 + 4.0 * both_error, "{both} ± {both_error}: logQ on both");
    // Its denominator is n times too large: the coefficient tends to 1 instead of 1 − P = 0.43.
    assert!((alone - (1.0 / 0.43 - 1.0)).abs() < 0.05 + 4.0 * alone_error, "{alone} ± {alone_error}");
    assert!(many < 0.05 * both && both < alone);
}
