//! `Optimizer::from_bytes`.
#![no_main]

use catalog_softmax::optimizer::{Optimizer, TableMut};
use catalog_softmax::{Embeddings, Matrix, Result};
use catalog_softmax_fuzz::{forge, seed};
use half::bf16;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: seed(seeds().expect("valid options")), |bytes: &[u8]| {
    if let Ok(optimizer) = Optimizer::from_bytes(bytes) {
        assert_eq!(optimizer.to_bytes(), bytes);
    }
    let forged = forge::queue(bytes.to_vec());
    let Ok(mut optimizer) = Optimizer::from_bytes(&forged) else { return };
    assert_eq!(optimizer.to_bytes(), forged);
    let master = optimizer.master_copy().map(|master| (master.rows, master.dim));
    let (rows, dim) = match (optimizer.accumulator(), optimizer.moments()) {
        (Some(sums), _) => master.unwrap_or((sums.len(), 2)),
        // Its dim is not shown: one of these is right.
        (_, Some([m, _])) => master.unwrap_or((m.len(), 1)),
        _ => master.unwrap_or((3, 2)),
    };
    let mut table = vec![bf16::ONE; rows * dim];
    let gradient = Matrix { values: vec![0.5; rows * dim], rows, dim };
    let before = optimizer.steps();
    if optimizer.step(&mut TableMut::new(&mut table, rows, dim), &gradient).is_ok() {
        assert_eq!(optimizer.steps(), before.saturating_add(1));
    } else {
        assert_eq!(optimizer.to_bytes(), forged);
    }
    let saved = optimizer.to_bytes();
    let restored = Optimizer::from_bytes(&saved).expect("a state as it was saved");
    assert_eq!(restored.to_bytes(), saved);
});

/// Optimisers of each rule, with and without a master copy, before and after a step.
fn seeds() -> Result<Vec<Vec<u8>>> {
    let (rows, dim) = (3, 1);
    let start = [0.1f32, -0.2, 0.3];
    let rules = [Optimizer::sgd(0.1)?, Optimizer::row_adagrad(rows, 0.1)?, Optimizer::adam(rows, dim, 0.1)?];
    let mut seeds = Vec::new();
    for optimizer in rules {
        let copy = optimizer.clone().with_weight_decay(0.1)?.with_master_copy(Embeddings::new(&start, rows, dim))?;
        for mut optimizer in [optimizer, copy] {
            seeds.push(optimizer.to_bytes());
            let gradient = Matrix { values: vec![0.5, 0.0, -2.0], rows, dim };
            optimizer.step(&mut TableMut::new(&mut [bf16::ONE; 3], rows, dim), &gradient)?;
            seeds.push(optimizer.to_bytes());
        }
    }
    Ok(seeds)
}
