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

/// The smaller batches, with a table and without one.
fn seeds() -> impl Iterator<Item = Vec<u8>> {
    let folders = ["tests/golden", "tests/golden2"].into_iter().flat_map(files);
    folders.filter(|file| file.len() < 1 << 14)
}

fuzz_target!(init: seed(seeds()), |bytes: &[u8]| {
    let Ok(golden) = common::golden::Golden::from_bytes(bytes) else { return };
    // What the batch rejects is a typed error, too.
    if let Ok(batch) = golden.problem.batch() {
        let own = golden.problem.row_negatives.is_some();
        assert!(batch.num_queries() >= 1 && (batch.num_candidates() >= 1 || own));
    }
});
