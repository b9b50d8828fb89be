//! `ExactCounts::from_bytes`.
#![no_main]

use catalog_softmax::negatives::ExactCounts;
use catalog_softmax_fuzz::{check_estimator, estimator_seeds, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seed(estimator_seeds(ExactCounts::new())),
    |bytes: &[u8]| check_estimator::<ExactCounts>(bytes)
);
