//! The plan's workspace is what a step allocates: measured by an allocator that counts. One test, because all threads
//! of this process are counted.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use catalog_softmax::{Backend, Correction, Cpu, DType, Output, Request};
use common::generate::{Config, Masking};
use common::topk::{SearchData, Values};

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

#[test]
fn a_step_allocates_what_its_plan_says() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads start");
    for (b, n, dim, dtype) in
        [(512, 20_000, 128, DType::F32), (64, 30_000, 64, DType::F16), (300, 9_000, 513, DType::Bf16)]
    {
        let config =
            Config { dtype, correction: Correction::LogQ, masking: Masking::Excluded, ..Config::new(b, n, dim) };
        let problem = config.problem();
        let batch = problem.batch().expect("a valid problem");
        for request in [Request::value(), Request::value_and_grad().with_moments().with_rank()] {
            pool.install(|| {
                let mut cpu = Cpu::new();
                let planned = cpu.plan(&batch, &problem.loss, request).expect("a loss that fits").workspace_bytes;
                let mut output = Output::default();
                let mut step = || cpu.compute(&batch, &problem.loss, request, &mut output).expect("a loss that fits");
                let used = peak(&mut step);
                // Outputs: (B, D) twice and (N, D) with gradients, and per-row numbers.
                let outputs = b * 11 * 8 + if request.gradients { (2 * b + n) * dim * 4 } else { 0 };
                // The list of work units, vectors that grow by doubling, and the like.
                let slack = 512 * 1024;
                assert!(used <= planned + outputs + slack, "B {b}, N {n}, D {dim}: {used} > {planned} + {outputs}");
                // Loosely: a matmul slab that an earlier shape left to the threads is planned and not allocated again.
                assert!(planned <= 3 * (used - used.min(outputs)) + slack, "B {b}, N {n}, D {dim}: {planned} ≫ {used}");
                assert!(request.gradients || used < b * n * 4, "no B x N: {used}");

                // Again, everything is there: what is allocated is small and does not grow with B x N or N x D.
                let again = peak(&mut step);
                println!("B {b}, N {n}, D {dim}: planned {planned}, used {used} with outputs {outputs}, again {again}");
                // The matmul packs its operands into memory that it gives back: a part of the plan.
                assert!(again <= slack + planned / 4, "B {b}, N {n}, D {dim}: {again} bytes in a second step");
            });
        }
    }
    for (b, n, k) in [(512, 20_000, 100), (300, 30_000, 1024)] {
        let data = SearchData::new(b, &[n], 64, DType::F32, Values::Normal, true);
        let search = data.search();
        pool.install(|| {
            let mut cpu = Cpu::new();
            let planned = cpu.plan_top_k(&search, data.similarity, k).expect("a valid k").workspace_bytes;
            let (outputs, slack) = (b * k * 8, 512 * 1024);
            let mut run = || cpu.top_k(&search, data.similarity, k).expect("a valid k");
            let used = peak(|| _ = run());
            println!("B {b}, N {n}, k {k}: planned {planned}, used {used} with outputs {outputs}");
            assert!(used <= planned + outputs + slack, "B {b}, N {n}, k {k}: {used} > {planned} + {outputs}");
            assert!(planned <= 3 * (used - outputs) + slack, "B {b}, N {n}, k {k}: {planned} ≫ {used}");
            let again = peak(|| _ = run());
            assert!(again <= outputs + slack + planned / 4, "B {b}, N {n}, k {k}: {again} bytes in a second search");
        });
    }
}
