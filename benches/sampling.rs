//! Samplers and frequency estimators at catalogue scale: the alias table's build, draws per second of each sampler, ids per
//! second that each estimator observes and looks up. One thread, 1e7 items, batches of 8192.
//!
//! ```text
//! cargo bench --bench sampling                # reports in target/criterion/report/index.html
//! cargo bench --bench sampling -- 'draw/'     # some of it
//! cargo bench --bench sampling -- --test      # each once, untimed
//! ```

use std::hint::black_box;
use std::time::Duration;

use catalog_softmax::negatives::{
    CountMin, Distribution, ExactCounts, FrequencyEstimator, GapEstimator, LogUniform, Mixture, RandomStream, Uniform,
    Unigram,
};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, Throughput, criterion_group, criterion_main};

const ITEMS: usize = 10_000_000;
const BATCH: usize = 8192;
/// Batches that an estimator goes round: 4 million ids, far past every cache.
const BATCHES: usize = 512;

/// Counts like those of a catalogue: Zipf over ids that are in no order.
fn counts() -> Vec<f64> {
    let mut counts: Vec<f64> = (1..=ITEMS).map(|rank| (1e7 / rank as f64).ceil()).collect();
    let mut random = RandomStream::new(1, 0);
    for i in (1..ITEMS).rev() {
        counts.swap(i, random.below(i as u32 + 1) as usize);
    }
    counts
}

fn group<'a>(c: &'a mut Criterion, name: &str, elements: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(elements as u64));
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_millis(2000));
    group
}

fn samplers(c: &mut Criterion) {
    let counts = counts();
    let mut build = group(c, "build", ITEMS);
    for distortion in [1.0, 0.75] {
        build.bench_function(format!("unigram^{distortion}"), |bencher| {
            bencher.iter_with_large_drop(|| Unigram::new(&counts, distortion).expect("valid counts"));
        });
    }
    build.finish();

    let unigram = || Unigram::new(&counts, 0.75).expect("valid counts");
    let uniform = Uniform::new(ITEMS as u64).expect("some items");
    let mixed: Vec<(f64, Box<dyn Distribution>)> = vec![(1.0, Box::new(unigram())), (1.0, Box::new(uniform))];
    let samplers: [(&str, Box<dyn Distribution>); 4] = [
        ("uniform", Box::new(uniform)),
        ("log_uniform", Box::new(LogUniform::new(ITEMS as u64).expect("some items"))),
        ("unigram", Box::new(unigram())),
        ("mixture", Box::new(Mixture::new(mixed).expect("valid"))),
    ];
    for (name, sampler) in &samplers {
        let mut random = RandomStream::new(7, 0);
        let mut draws = group(c, &format!("draw/{name}"), BATCH);
        draws.bench_function("with_repetitions", |bencher| bencher.iter(|| sampler.draw(BATCH, &mut random)));
        draws.bench_function("deduplicated", |bencher| bencher.iter(|| sampler.draw_deduplicated(BATCH, &mut random)));
        draws.bench_function("distinct", |bencher| {
            bencher.iter(|| sampler.draw_distinct(BATCH, &mut random).expect("enough items"));
        });
        draws.finish();
    }
}

fn estimators(c: &mut Criterion) {
    let stream = Unigram::new(&counts(), 1.0)
        .expect("valid counts")
        .draw(BATCH * BATCHES, &mut RandomStream::new(7, 1))
        .expect("draws")
        .ids;
    estimator(c, "exact_counts", ExactCounts::new(), &stream);
    estimator(c, "count_min", CountMin::new(1 << 22, 4, 7).expect("valid"), &stream);
    estimator(c, "gaps", GapEstimator::new(1 << 22, 2, 0.01, 7).expect("valid"), &stream);
}

fn estimator(c: &mut Criterion, name: &str, mut estimator: impl FrequencyEstimator, stream: &[u64]) {
    let mut batches = stream.chunks(BATCH).cycle();
    let mut group = group(c, &format!("frequency/{name}"), BATCH);
    stream.chunks(BATCH).for_each(|ids| estimator.observe(ids));
    group.bench_function("observe", |bencher| {
        bencher.iter(|| estimator.observe(batches.next().expect("a cycle")));
    });
    group.bench_function("log_q", |bencher| {
        bencher.iter(|| black_box(estimator.log_q(batches.next().expect("a cycle"))));
    });
    group.finish();
}

criterion_group!(benches, samplers, estimators);
criterion_main!(benches);
