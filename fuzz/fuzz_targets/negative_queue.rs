//! `NegativeQueue::from_bytes`.
#![no_main]

use catalog_softmax::negatives::{NegativeQueue, QueueOptions};
use catalog_softmax::{DType, Elements, Embeddings, Pool};
use catalog_softmax_fuzz::{forge, seed};
use half::{bf16, f16};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: seed(seeds()), |bytes: &[u8]| {
    if let Ok(queue) = NegativeQueue::from_bytes(bytes) {
        assert_eq!(queue.to_bytes(), bytes);
    }
    let forged = forge::queue(bytes.to_vec());
    let Ok(mut queue) = NegativeQueue::from_bytes(&forged) else { return };
    assert_eq!(queue.to_bytes(), forged);
    check(&queue);
    // A queue that is much larger than its bytes is one to use, and not to fill here.
    if queue.capacity() * queue.options().dim() > 1 << 12 {
        return;
    }
    for rows in [1, 2, queue.capacity() + 1] {
        if enqueue(&mut queue, rows) {
            assert!(queue.len() >= rows.min(queue.capacity()));
        }
        check(&queue);
        let saved = queue.to_bytes();
        let restored = NegativeQueue::from_bytes(&saved).expect("a state as it was saved");
        assert_eq!(restored.to_bytes(), saved);
    }
});

/// All views agree on the rows.
fn check(queue: &NegativeQueue) {
    let rows: usize = queue.pools().count();
    assert!(rows <= 2 && (rows == 0) == queue.is_empty());
    assert_eq!(queue.ages().count(), queue.len());
    let options = queue.options();
    let oldest = options.max_age().unwrap_or(u64::MAX);
    assert!(queue.ages().all(|age| (1..=oldest).contains(&age)));
    let kept = |kept: bool| if kept { queue.len() } else { 0 };
    assert_eq!(queue.ids().flatten().count(), kept(options.keeps_ids()));
    assert_eq!(queue.log_q().flatten().count(), kept(options.keeps_log_q()));
}

/// Rows of zeros, if the queue takes them.
fn enqueue(queue: &mut NegativeQueue, rows: usize) -> bool {
    let options = queue.options();
    let elements = rows * options.dim();
    let (f32s, f16s, bf16s) = (vec![0f32; elements], vec![f16::ZERO; elements], vec![bf16::ZERO; elements]);
    let values = match options.dtype() {
        DType::F16 => Elements::F16(&f16s),
        DType::Bf16 => Elements::Bf16(&bf16s),
        _ => Elements::F32(&f32s),
    };
    let (ids, log_q) = (vec![7u64; rows], vec![-1f32; rows]);
    let pool = Pool::new(Embeddings::new(values, rows, options.dim())).ids(&ids).log_q(&log_q);
    queue.enqueue(&pool).is_ok()
}

/// Queues of each type: empty, partly full, full, and with rows that have expired.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let plain = QueueOptions::new(5, 2, dtype);
        for options in [plain, plain.with_ids(), plain.with_log_q().with_max_age(2)] {
            let mut queue = NegativeQueue::new(options).expect("valid options");
            seeds.push(queue.to_bytes());
            for rows in [2, 1, 3, 7] {
                assert!(enqueue(&mut queue, rows));
                seeds.push(queue.to_bytes());
            }
        }
    }
    seeds
}
