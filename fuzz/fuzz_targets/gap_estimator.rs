//! `GapEstimator::from_bytes`.
#![no_main]

use catalog_softmax::negatives::GapEstimator;
use catalog_softmax_fuzz::{check_estimator, estimator_seeds, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seed(estimator_seeds(GapEstimator::new(5, 2, 0.3, 1).expect("valid options"))),
    |bytes: &[u8]| check_estimator::<GapEstimator>(bytes)
);
