//! The CPU backend beside the textbook: one streamed pass against matmul, B x N array, softmax (`testing/src/naive.rs`,
//! in Rust with the same matmul library). Loss alone, and loss with gradients. Throughput is in scores: B x N.
//!
//! ```text
//! cargo bench                     # reports with plots in target/criterion/report/index.html
//! cargo bench -- 'loss/B=64'      # some of it
//! cargo bench -- --test           # each once, untimed
//! ```
//!
//! The textbook is written to be read, not to be fast: `benches/peers/cpu.py` compares with PyTorch.

use std::hint::black_box;
use std::time::Duration;

use catalog_softmax::{Cpu, Loss, Request, Similarity};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use catalog_softmax_testing::naive::naive;
use catalog_softmax_testing::problem::{PoolData, PositiveData, Problem, Storage};
use catalog_softmax_testing::step::Step;

const QUERIES: [usize; 2] = [64, 512];
const CANDIDATES: [usize; 2] = [10_000, 100_000];
const DIMS: [usize; 3] = [64, 128, 256];

fn loss(c: &mut Criterion) {
    over_shapes(c, "loss", Request::value());
}

fn loss_and_gradients(c: &mut Criterion) {
    over_shapes(c, "loss_and_gradients", Request::value_and_grad());
}

fn over_shapes(c: &mut Criterion, name: &str, request: Request) {
    for b in QUERIES {
        for n in CANDIDATES {
            for d in DIMS {
                let mut group = c.benchmark_group(format!("{name}/B={b} N={n} D={d}"));
                group.throughput(Throughput::Elements((b * n) as u64));
                // Few samples of a call or more each: a call takes up to a second.
                group.sampling_mode(SamplingMode::Flat).sample_size(10);
                group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(1000));
                one_shape(&mut group, &problem(b, n, d), request);
                group.finish();
            }
        }
    }
}

fn one_shape(group: &mut BenchmarkGroup<'_, WallTime>, problem: &Problem, request: Request) {
    let batch = problem.batch().expect("the inputs are consistent");
    // A training loop keeps both.
    let (mut cpu, mut step) = (Cpu::new(), Step::default());
    group.bench_function("streamed", |bencher| {
        bencher.iter(|| {
            step.compute(&mut cpu, &batch, &problem.loss, request).expect("the loss fits the batch");
            black_box(step.total)
        });
    });
    group.bench_function("textbook", |bencher| bencher.iter(|| black_box(naive(problem, request.gradients))));
}

/// Seeded inputs: each query's positive is a random candidate.
fn problem(b: usize, n: usize, dim: usize) -> Problem {
    let mut rng = SmallRng::seed_from_u64(1);
    let mut embeddings = |rows: usize| {
        Storage::F32(std::iter::repeat_with(|| rng.random::<f32>() * 2.0 - 1.0).take(rows * dim).collect())
    };
    let (queries, candidates) = (embeddings(b), embeddings(n));
    Problem {
        dim,
        queries,
        table: None,
        row_negatives: None,
        positive_offsets: None,
        positive_weight: None,
        pools: vec![PoolData { candidates, rows: None, ids: None, log_q: None, gradient: true }],
        positives: PositiveData::Index((0..b).map(|_| rng.random_range(0..n as u32)).collect()),
        positive_ids: None,
        positive_log_q: None,
        excluded: None,
        row_weight: None,
        loss: Loss::softmax(Similarity::Cosine, 0.05),
    }
}

criterion_group!(benches, loss, loss_and_gradients);
criterion_main!(benches);
