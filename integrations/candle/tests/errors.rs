//! Errors name the argument, its value and the rule.

use candle_core::{DType, Device, Result, Tensor, Var};
use catalog_softmax_candle::{Correction, Error, Options, Reduction, softmax_loss};

const DEVICE: &Device = &Device::Cpu;

fn ones(rows: usize, dim: usize) -> Tensor {
    Tensor::ones((rows, dim), DType::F32, DEVICE).unwrap()
}

fn vector<T: candle_core::WithDType>(values: &[T]) -> Option<Tensor> {
    Some(Tensor::from_slice(values, values.len(), DEVICE).unwrap())
}

#[track_caller]
fn refused(queries: &Tensor, candidates: &Tensor, options: Options, message: &str) {
    match softmax_loss(queries, candidates, &options) {
        Err(Error::Loss(error)) => {
            assert_eq!(error.to_string(), message);
            // Through candle's own error, as in a function that returns candle's result.
            let error = candle_core::Error::from(Error::Loss(error)).to_string();
            assert!(error.contains(message), "{error}");
        }
        Err(other) => panic!("an error of another kind: {other}"),
        Ok(_) => panic!("no error, but: {message}"),
    }
}

#[test]
fn shapes_and_types() {
    let (q, c, default) = (ones(3, 4), ones(5, 4), Options::default);
    let flat = Tensor::ones(12, DType::F32, DEVICE).unwrap();
    refused(&flat, &c, default(), "queries has shape [12]; rule: two dimensions: rows, and numbers of a row");
    refused(&q, &flat, default(), "candidates has shape [12]; rule: two dimensions: rows, and numbers of a row");
    let double = q.to_dtype(DType::F64).unwrap();
    refused(&double, &c, default(), "the type of queries is F64; rule: F32, F16 or BF16");
    refused(&q, &double, default(), "the type of candidates is F64; rule: F32, F16 or BF16");
    let options = Options { positive_embeddings: Some(ones(3, 5)), ..default() };
    refused(&q, &c, options, "positive_embeddings has shape [3, 5]; rule: (P, D) with the queries' D, 4");
    let half = Options { positive_embeddings: Some(q.to_dtype(DType::F16).unwrap()), ..default() };
    refused(&q, &c, half, "the type of positive_embeddings is F16; rule: the type of queries, F32");
    let options = Options { positives: vector(&[0f32, 1.0, 2.0]), ..default() };
    refused(&q, &c, options, "the type of positives is F32; rule: an integer type");
    let options = Options { log_q: vector(&[0u32; 5]), correction: Correction::LogQ, ..default() };
    refused(&q, &c, options, "the type of log_q is U32; rule: a floating-point type");
    let options = Options { row_weight: Some(ones(3, 1)), ..default() };
    refused(&q, &c, options, "row_weight has shape [3, 1]; rule: one dimension");
    let options = Options { temperature: Tensor::ones(2, DType::F32, DEVICE).unwrap().into(), ..default() };
    refused(&q, &c, options, "temperature has shape [2]; rule: one element");
    let options = Options { temperature: Tensor::new(1u32, DEVICE).unwrap().into(), ..default() };
    refused(&q, &c, options, "the type of temperature is U32; rule: a floating-point type");
}

#[test]
fn values() {
    let (q, c, default) = (ones(3, 4), ones(5, 4), Options::default);
    let range = "rule: at least 0 and less than the number of candidates in all pools";
    let options = Options { positives: vector(&[0u32, 1, 5]), ..default() };
    refused(&q, &c, options, &format!("positives[2] is 5; {range}"));
    let options = Options { positives: vector(&[0i64, -1, 4]), ..default() };
    refused(&q, &c, options, &format!("positives[1] is -1; {range}"));
    let weight = Options { row_weight: vector(&[1f32, -1.0, 1.0]), ..default() };
    refused(&q, &c, weight, "row_weight[1] is -1; rule: finite and >= 0");
    let rule = "rule: finite and > 0, with log2(e) / temperature a normal number of single precision";
    refused(&q, &c, Options { temperature: 0.0.into(), ..default() }, &format!("temperature is 0; {rule}"));
    let tensor = Tensor::new(-1f32, DEVICE).unwrap();
    refused(&q, &c, Options { temperature: tensor.into(), ..default() }, &format!("temperature is -1; {rule}"));
    let variable = Var::zeros(5, DType::F32, DEVICE).unwrap();
    let options = Options { log_q: Some((variable.as_tensor() * 2.0).unwrap()), ..default() };
    refused(&q, &c, options, "log_q is a tensor that requires a gradient; rule: a constant: call detach() on it");
}

#[test]
fn what_goes_with_what() {
    let (q, c, default) = (ones(3, 4), ones(5, 4), Options::default);
    let rule = "Correction::None subtracts none: choose a correction, or give none";
    let options = Options { log_q: vector(&[-1f32; 5]), ..default() };
    refused(&q, &c, options, &format!("log_q is given but does not apply; rule: {rule}"));
    let options = Options { correction: Correction::LogQ, ..default() };
    refused(&q, &c, options, "log_q is missing; rule: every correction subtracts it from the negatives' scores");
    let options = Options { reduction: Reduction::WeightedMean, ..default() };
    refused(&q, &c, options, "row_weight is missing; rule: Reduction::WeightedMean divides by its sum");
    let both = Options { false_negative_margin: Some(1.0), false_negative_ratio: Some(0.5), ..default() };
    refused(&q, &c, both, "false_negative_ratio is 0.5; rule: None where there is a false_negative_margin");
    let symmetric = "rule: a symmetric loss needs one pool in which each candidate is the positive of one query";
    let options = Options { symmetric: true, ..default() };
    refused(&q, &c, options, &format!("candidates has 5 rows for 3 queries; {symmetric}"));
    let options = Options { symmetric: true, positives: vector(&[0u32, 2, 2]), ..default() };
    refused(&q, &ones(3, 4), options, &format!("positives[2] is 2; {symmetric}"));
}

/// Candle's own errors pass through as what they are.
#[test]
fn an_error_reaches_a_function_with_candles_result() {
    fn step() -> Result<Tensor> {
        Ok(softmax_loss(&ones(3, 4), &ones(2, 4), &Options::default())?)
    }
    let message = step().unwrap_err().to_string();
    assert!(
        message.contains("candidates has 2 rows; rule: in_batch needs a candidate for each of 3 queries"),
        "{message}"
    );
}
