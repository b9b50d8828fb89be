//! The plan's workspace bounds what a step allocates: measured by an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use catalog_softmax::{Backend, Correction, Cpu, DType, Reference, Request, TableGradient};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::generate_tables::{PoolKind, PositiveKind, TableConfig};
use catalog_softmax_testing::problem::Problem;
use catalog_softmax_testing::step::Step;
use catalog_softmax_testing::topk::{SearchData, Values};

struct Counting;
static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's contract is this function's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is this function's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let live = LIVE.fetch_add(size, Relaxed) + size;
        LIVE.fetch_sub(layout.size(), Relaxed);
        PEAK.fetch_max(live - layout.size(), Relaxed);
        // SAFETY: the caller's contract is this function's.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes allocated at the peak of `work`, beyond what was live before.
fn peak(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    work();
    PEAK.load(Relaxed) - before
}

/// Beyond what a plan counts: the queues that rayon keeps for the work of two threads.
const RAYON: usize = 64 << 10;
/// What a plan counts for sorting the uses of rows, of which a small step needs little.
const COUNTS: usize = 128 << 10;
const THREADS: usize = 2;

/// Runs `work` on threads of its own, which have ended afterwards, so that no later measurement sees what they free.
fn on_fresh_threads<R: Send>(count: usize, work: impl FnOnce() -> R + Send) -> R {
    let mut threads = Vec::new();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).spawn_handler(|thread| {
        threads.push(std::thread::Builder::new().spawn(|| thread.run())?);
        Ok(())
    });
    let pool = pool.build().expect("threads start");
    let result = pool.install(work);
    drop(pool);
    threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
    result
}

fn output_bytes<T>(output: &Step<T>) -> usize {
    let statistics = &output.statistics;
    let moments = statistics.moments.as_ref().map_or(0, |m| m.expected_score.capacity() + m.entropy.capacity());
    let rank = statistics.rank.as_ref().map_or(0, |rank| rank.above.capacity() + rank.ties.capacity());
    let per_row = [&output.loss, &output.probability, &statistics.lse, &statistics.positive].map(Vec::capacity);
    let numbers = per_row.iter().sum::<usize>() + statistics.num_negatives.capacity() + moments + rank;
    let gradients = output.gradients.iter().flat_map(|g| {
        g.d_candidates
            .iter()
            .chain([&g.d_queries])
            .chain(&g.d_positive_embeddings)
            .map(|matrix| matrix.values.capacity())
            .chain([table_elements(g.d_table.as_ref())])
    });
    let expected = statistics.expected_negative.as_ref().map_or(0, |matrix| matrix.values.capacity());
    numbers * size_of::<f64>() + (gradients.sum::<usize>() + expected) * size_of::<T>()
}

/// Elements of a table's gradient; an index is as large as an element of `f32`.
fn table_elements<T>(d_table: Option<&TableGradient<T>>) -> usize {
    match d_table {
        Some(TableGradient::Dense(d)) => d.values.capacity(),
        Some(TableGradient::RowSparse(rows)) => rows.values.values.capacity() + rows.rows.capacity(),
        None => 0,
    }
}

/// What a first step and a later one allocate beside the output, and what the plan says.
struct Measured {
    planned: usize,
    first: usize,
    later: usize,
}

/// The least of some later steps: on a busy machine a thread may get its first work, and allocate its buffers, after the
/// first step.
fn least_of_later(mut step: impl FnMut() -> usize) -> usize {
    (0..3).map(|_| step()).min().unwrap_or_default()
}

fn measure<B: Backend>(backend: &mut B, problem: &Problem, request: Request) -> Measured {
    let batch = problem.batch().expect("a valid problem");
    let planned = backend.plan(&batch, &problem.loss, request).expect("a loss that fits").workspace_bytes;
    let mut output = Step::default();
    let mut step =
        |output: &mut Step<B::Real>| output.compute(backend, &batch, &problem.loss, request).expect("a loss that fits");
    let first = peak(|| step(&mut output)) - output_bytes(&output);
    let later = least_of_later(|| peak(|| step(&mut output)));
    Measured { planned, first, later }
}

fn problems() -> Vec<Problem> {
    let shapes = [(512, 20_000, 128, DType::F32), (64, 30_000, 64, DType::F16), (300, 9_000, 513, DType::Bf16)];
    let catalogue = shapes.map(|(b, n, dim, dtype)| Config {
        dtype,
        correction: Correction::LogQ,
        masking: Masking::Excluded,
        weights: true,
        ..Config::new(b, n, dim)
    });
    let separate = Config { separate: true, masking: Masking::Ids, ..Config::new(700, 5_000, 40) };
    let symmetric = Config { symmetric: true, weights: true, ..Config::new(1500, 1500, 100) };
    let narrow = Config::new(1, 4_000, 1);
    catalogue.into_iter().chain([separate, symmetric, narrow]).map(|config| config.problem()).collect()
}

/// Over a table: negatives of rows' own, with and without pools; the whole of it; few rows of a large one.
fn table_problems() -> Vec<Problem> {
    let own = TableConfig {
        per_row: 100,
        positives: PositiveKind::Several,
        correction: Correction::LogQ,
        excluded: true,
        weights: true,
        ..TableConfig::new(512, 9_000, 64)
    };
    let both = TableConfig { pools: vec![PoolKind::Rows(6_000), PoolKind::Own(500)], dtype: DType::F16, ..own.clone() };
    let catalogue = TableConfig {
        pools: vec![PoolKind::WholeTable],
        per_row: 0,
        positives: PositiveKind::SeveralSeparate,
        ids: true,
        ..own.clone()
    };
    let large =
        TableConfig { b: 40, rows: 100_000, pools: vec![PoolKind::Rows(300)], dtype: DType::Bf16, ..own.clone() };
    // Rows enough for tasks that both threads take, on a busy machine, too.
    let wide = TableConfig { b: 400, rows: 1_000, dim: 600, positives: PositiveKind::One, ..own.clone() };
    let narrow = TableConfig { b: 3, dim: 1, ..own.clone() };
    let mut problems: Vec<Problem> =
        [own, both, catalogue, large, wide, narrow].iter().map(TableConfig::problem).collect();
    problems.iter_mut().for_each(|problem| problem.loss = problem.loss.false_negative_margin(0.1));
    problems
}

// The only test of this file: all threads of the process are counted.
#[test]
fn steps_and_searches_allocate_what_their_plans_say() {
    for problem in problems() {
        for request in [Request::value(), Request::value_and_grad().with_moments().with_rank()] {
            a_step_on_the_cpu(&problem, request);
        }
    }
    for problem in table_problems() {
        for request in [
            Request::value().with_rank(),
            Request::value_and_grad().with_moments().with_rank(),
            Request::value_and_grad().row_sparse(),
        ] {
            a_step_on_the_cpu(&problem, request);
        }
        for request in [Request::value_and_grad(), Request::value_and_grad().row_sparse()] {
            on_fresh_threads(THREADS, || an_accumulating_step(&mut Cpu::new(), &problem, request));
        }
    }
    let small = Config { symmetric: true, weights: true, ..Config::new(60, 60, 40) };
    let uneven = Config { separate: true, masking: Masking::Ids, ..Config::new(70, 300, 33) };
    for config in [small, uneven] {
        for request in [Request::value(), Request::value_and_grad().with_moments().with_rank()] {
            let Measured { planned, first, .. } = measure(&mut Reference::new(), &config.problem(), request);
            assert!(first <= planned, "reference, {config:?}, {request:?}: used {first}, planned {planned}");
        }
    }
    let own = TableConfig { per_row: 30, positives: PositiveKind::Several, ..TableConfig::new(60, 400, 33) };
    let separate = TableConfig {
        pools: vec![PoolKind::Rows(300), PoolKind::Own(50)],
        positives: PositiveKind::SeveralSeparate,
        ..TableConfig::new(60, 100, 33)
    };
    for config in [own, separate] {
        for request in [Request::value(), Request::value_and_grad().with_rank(), Request::value_and_grad().row_sparse()]
        {
            let Measured { planned, first, .. } = measure(&mut Reference::new(), &config.problem(), request);
            assert!(first <= planned, "reference, {config:?}, {request:?}: used {first}, planned {planned}");
            if request.gradients {
                an_accumulating_step(&mut Reference::new(), &config.problem(), request);
            }
        }
    }
    for (b, n, k) in [(512, 20_000, 100), (300, 30_000, 1024)] {
        let data = SearchData::new(b, &[n], 64, DType::F32, Values::Normal, true);
        on_fresh_threads(THREADS, || a_search_on_the_cpu(&data, (b, n, k)));
    }
    // Blocks and tiles of several sizes, of which a thread may get a smaller one first.
    for (b, k, threads) in [(600, 1024, 5), (530, 1024, 3), (513, 500, 3)] {
        let data = SearchData::new(b, &[20_000], 8, DType::F32, Values::Normal, true);
        on_fresh_threads(threads, || a_search_fits_its_plan(&data, k));
    }
    for dim in [1, 64] {
        let pools = Config { pools: vec![224, 256], ..Config::new(256, 1, dim) };
        on_fresh_threads(1, || a_step_fits_its_plan(&pools.problem()));
    }
    // Wide rows: what scores the positives is allocated beside the buffers that the first step has left.
    for dtype in [DType::F32, DType::Bf16] {
        let wide = Config { dtype, ..Config::new(64, 96, 2049) };
        on_fresh_threads(1, || a_second_step_fits_its_plan(&wide.problem()));
    }
    for (b, rows, pool, per_row) in [(300, 2_000, 2_000, 7), (64, 2_000, 5_000, 1), (300, 20_000, 2_000, 7)] {
        let table = TableConfig {
            b,
            rows,
            dim: 256,
            pools: vec![PoolKind::Rows(pool)],
            per_row,
            ..TableConfig::new(b, rows, 256)
        };
        for threads in [1, 4] {
            on_fresh_threads(threads, || a_step_fits_its_plan(&table.problem()));
        }
    }
}

fn a_step_fits_its_plan(problem: &Problem) {
    let Measured { planned, first, .. } = measure(&mut Cpu::new(), problem, Request::value_and_grad());
    let (b, n, dim) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let rayon = RAYON.max(RAYON / 2 * rayon::current_num_threads());
    assert!(first <= planned + rayon, "B {b}, N {n}, D {dim}: used {first}, planned {planned}");
}

/// All that is live at the peak of a second step: the workspace of the first, and what the second takes beside it.
fn a_second_step_fits_its_plan(problem: &Problem) {
    let (batch, request) = (problem.batch().expect("a valid problem"), Request::value_and_grad());
    let (mut cpu, mut output) = (Cpu::new(), Step::default());
    let planned = cpu.plan(&batch, &problem.loss, request).expect("a loss that fits").workspace_bytes;
    let before = LIVE.load(Relaxed);
    output.compute(&mut cpu, &batch, &problem.loss, request).expect("a loss that fits");
    let held = LIVE.load(Relaxed) - before;
    let used = held + peak(|| output.compute(&mut cpu, &batch, &problem.loss, request).expect("a loss that fits"));
    let used = used - output_bytes(&output);
    assert!(used <= planned + RAYON, "D {}: used {used} in a second step, planned {planned}", problem.dim);
}

fn a_search_fits_its_plan(data: &SearchData, k: usize) {
    let search = data.search();
    let mut cpu = Cpu::new();
    let planned = cpu.plan_top_k(&search, data.similarity, k).expect("a valid k").workspace_bytes;
    let used = peak(|| _ = cpu.top_k(&search, data.similarity, k).expect("a valid k"));
    let b = search.num_queries();
    let outputs = b * k * (size_of::<u32>() + size_of::<f32>());
    let rayon = RAYON.max(RAYON / 2 * rayon::current_num_threads());
    assert!(used - outputs <= planned + rayon, "B {b}, k {k}: used {}, planned {planned}", used - outputs);
}

fn a_step_on_the_cpu(problem: &Problem, request: Request) {
    let (b, n, dim) = (problem.num_queries(), problem.num_candidates(), problem.dim);
    let Measured { planned, first, later } = on_fresh_threads(THREADS, || measure(&mut Cpu::new(), problem, request));
    let shape = format!("B {b}, N {n}, D {dim}, {request:?}");
    println!("{shape}: planned {planned}, first step {first}, later {later}");
    assert!(first <= planned + RAYON, "{shape}: used {first}, planned {planned}");
    // A plan that promises anything is of no use. What it may overestimate: tables of ids that are not full, and the counts by
    // which uses of a large table are sorted. On one thread: of several, one that gets no processor in time needs no buffers.
    let alone = on_fresh_threads(1, || measure(&mut Cpu::new(), problem, request));
    let (most, used) = (alone.planned, alone.first);
    assert!(most <= 3 * used + COUNTS + RAYON, "{shape}, one thread: planned {most}, used {used}");
    assert!(request.gradients || b * n * dim < 1_000_000 || first < b * n * 4, "{shape}: {first} is B x N");
    // All buffers are there already: a later step allocates a list of work and, of a symmetric loss, the other direction's
    // output.
    assert!(problem.loss.symmetric || later <= planned / 3 + RAYON, "{shape}: {later} in a later step");
}

/// A step whose gradients are added to those of the step before.
fn an_accumulating_step<B: Backend + Default>(backend: &mut B, problem: &Problem, request: Request) {
    let batch = problem.batch().expect("a valid problem");
    let mut output = Step::default();
    let accumulating = request.accumulate();
    output.compute(&mut B::default(), &batch, &problem.loss, request).expect("a loss that fits");
    let planned = backend.plan(&batch, &problem.loss, accumulating).expect("a loss that fits").workspace_bytes;
    let used = peak(|| output.compute(backend, &batch, &problem.loss, accumulating).expect("a loss that fits"));
    println!("{request:?}, accumulating: planned {planned}, used {used}");
    assert!(used <= planned + RAYON, "{request:?}: used {used}, planned {planned}");
}

fn a_search_on_the_cpu(data: &SearchData, (b, n, k): (usize, usize, usize)) {
    let search = data.search();
    let mut cpu = Cpu::new();
    let planned = cpu.plan_top_k(&search, data.similarity, k).expect("a valid k").workspace_bytes;
    let outputs = b * k * (size_of::<u32>() + size_of::<f32>());
    let mut run = || cpu.top_k(&search, data.similarity, k).expect("a valid k");
    let first = peak(|| _ = run()) - outputs;
    let later = least_of_later(|| peak(|| _ = run()) - outputs);
    println!("B {b}, N {n}, k {k}: planned {planned}, first search {first}, later {later}");
    assert!(first <= planned + RAYON, "B {b}, N {n}, k {k}: used {first}, planned {planned}");
    assert!(planned <= 3 * first + RAYON, "B {b}, N {n}, k {k}: planned {planned}, used {first}");
    assert!(later <= planned / 3 + RAYON, "B {b}, N {n}, k {k}: {later} in a later search");
}
