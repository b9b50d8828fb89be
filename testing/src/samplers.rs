//! Popularity as a sampler and as a formula.

use catalog_softmax::negatives::Unigram;

pub fn zipf_counts(n: usize) -> Vec<f64> {
    (1..=n).map(|rank| (1e6 / rank as f64).ceil()).collect()
}

pub fn unigram(counts: &[f64], distortion: f64) -> Unigram {
    Unigram::new(counts, distortion).expect("valid counts")
}

/// `count^distortion` normalised, in f64.
pub fn powers(counts: &[f64], distortion: f64) -> Vec<f64> {
    let weights: Vec<f64> = counts.iter().map(|&c| if c > 0.0 { c.powf(distortion) } else { 0.0 }).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}
