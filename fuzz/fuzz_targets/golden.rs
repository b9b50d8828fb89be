//! `Golden::from_bytes`, the safetensors reader of `examples/replay.rs`, and the batch that it makes.
#![no_main]

use catalog_softmax_fuzz::{files, seed};
use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../testing/src"]
mod common {
    pub mod golden;
    pub mod problem;
}

fuzz_target!(init: seed(files("tests/golden").into_iter().filter(|file| file.len() < 1 << 13)), |bytes: &[u8]| {
    let Ok(golden) = common::golden::Golden::from_bytes(bytes) else { return };
    // What the batch rejects is a typed error, too.
    if let Ok(batch) = golden.problem.batch() {
        assert!(batch.num_queries() >= 1 && batch.num_candidates() >= 1);
    }
});
