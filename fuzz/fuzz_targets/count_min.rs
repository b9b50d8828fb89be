//! `CountMin::from_bytes`.
#![no_main]

use catalog_softmax::negatives::CountMin;
use catalog_softmax_fuzz::{check_estimator, estimator_seeds, seed};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: seed(estimator_seeds(CountMin::new(5, 2, 1).expect("valid options"))),
    |bytes: &[u8]| check_estimator::<CountMin>(bytes)
);
