//! The queue in device memory: the same rows as the one in host memory, the same losses, nothing allocated, errors.

use catalog_softmax::cuda::{Cuda, DeviceElement, DeviceEmbeddings, DevicePool, DeviceQueue, DeviceSlice};
use catalog_softmax::negatives::{NegativeQueue, QueueOptions};
use catalog_softmax::{Correction, DType, Elements, Embeddings, Pool};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, DeviceRepr};
use half::{bf16, f16};
use rand::RngExt;

use super::open::{on_stream, on_stream_for_capture};
use super::steps::{assert_same, everything, from_host};
use catalog_softmax_testing::generate::{Config, Masking, rng, rows};
use catalog_softmax_testing::on_device::{OnDevice, Results, up};
use catalog_softmax_testing::problem::{PoolData, Problem, Storage};

/// A pool's arrays on both sides, its rows `padding` elements apart.
struct Both<'a, T> {
    rows: usize,
    dim: usize,
    padding: usize,
    elements: &'a [T],
    ids: &'a [u64],
    log_q: &'a [f32],
    device: (&'a CudaSlice<T>, &'a CudaSlice<u64>, &'a CudaSlice<f32>),
}

impl<'a, T: DeviceElement> Both<'a, T>
where
    &'a [T]: Into<Elements<'a>>,
{
    fn host(&self, options: (bool, bool)) -> Pool<'a> {
        let embeddings = Embeddings::new(self.elements, self.rows, self.dim).with_stride(self.dim + self.padding);
        let pool = Pool::new(embeddings);
        let pool = if options.0 { pool.ids(self.ids) } else { pool };
        if options.1 { pool.log_q(self.log_q) } else { pool }
    }

    fn device(&self, options: (bool, bool)) -> DevicePool<'a> {
        let embeddings = DeviceEmbeddings::new(DeviceSlice::new(self.device.0), self.rows, self.dim);
        let pool = DevicePool::new(embeddings.with_stride(self.dim + self.padding));
        let pool = if options.0 { pool.ids(DeviceSlice::new(self.device.1)) } else { pool };
        if options.1 { pool.log_q(DeviceSlice::new(self.device.2)) } else { pool }
    }
}

/// Random enqueues into both queues, compared after each one by all that is saved.
fn compare_with_the_host<T: DeviceElement + DeviceRepr>(dtype: DType, round: fn(f32) -> T, seed: u64)
where
    for<'a> &'a [T]: Into<Elements<'a>>,
{
    let (stream, cuda) = on_stream();
    let mut rng = rng(seed);
    for (keeps, max_age) in
        [((true, true), Some(3)), ((false, true), None), ((true, false), Some(1)), ((false, false), None)]
    {
        let (capacity, dim) = (rng.random_range(1..40usize), rng.random_range(1..20usize));
        let mut options = QueueOptions::new(capacity, dim, dtype);
        options = if keeps.0 { options.with_ids() } else { options };
        options = if keeps.1 { options.with_log_q() } else { options };
        options = max_age.map_or(options, |max_age| options.with_max_age(max_age));
        let mut host = NegativeQueue::new(options).expect("valid options");
        let mut device = DeviceQueue::new(&cuda, options).expect("memory");
        let bytes = device.device_bytes();
        for enqueue in 0..12 {
            let (n, padding) = (rng.random_range(1..=2 * capacity), enqueue % 3);
            let elements = rows(&mut rng, n, dim + padding, 1.0);
            let elements: Vec<T> = elements[..n * (dim + padding) - padding].iter().map(|&x| round(x)).collect();
            let ids: Vec<u64> = (0..n).map(|_| rng.random()).collect();
            let log_q: Vec<f32> = (0..n).map(|_| rng.random_range(-9.0..0.0)).collect();
            let arrays = (up(&stream, &elements), up(&stream, &ids), up(&stream, &log_q));
            let (elements, ids, log_q) = (&elements[..], &ids[..], &log_q[..]);
            let device_arrays = (&arrays.0, &arrays.1, &arrays.2);
            let both = Both { rows: n, dim, padding, elements, ids, log_q, device: device_arrays };
            host.enqueue(&both.host(keeps)).expect("rows that fit");
            device.enqueue(&cuda, &both.device(keeps)).expect("rows that fit");
            let what = format!("{dtype:?}, capacity {capacity}, dim {dim}, enqueue {enqueue}");
            assert!(device.to_host().expect("the device works").to_bytes() == host.to_bytes(), "{what}");
            let wanted: Vec<u64> = host.ids().flatten().copied().collect();
            assert_eq!(device.ids_to_host(), Ok(wanted), "{what}");
            assert_eq!((device.len(), device.pools().count()), (host.len(), host.pools().count()), "{what}");
            assert!(device.ages().eq(host.ages()), "{what}");
            if enqueue == 5 {
                device = DeviceQueue::from_host(&cuda, &host).expect("memory");
                assert!(device.to_host().expect("the device works").to_bytes() == host.to_bytes(), "{what}");
            }
        }
        assert_eq!((device.device_bytes(), device.options()), (bytes, options), "allocated once");
        device.clear();
        assert!(device.is_empty() && device.pools().next().is_none());
    }
}

pub fn a_queue_on_the_device_holds_what_the_host_s_does(_: &mut Cuda) {
    compare_with_the_host::<f32>(DType::F32, |x| x, 1);
    compare_with_the_host::<f16>(DType::F16, f16::from_f32, 2);
    compare_with_the_host::<bf16>(DType::Bf16, bf16::from_f32, 3);
}

/// A host pool of a problem's pool.
fn host_pool(data: &PoolData, dim: usize) -> Pool<'_> {
    let mut pool = Pool::new(data.candidates.view(dim));
    if let Some(ids) = &data.ids {
        pool = pool.ids(ids);
    }
    if let Some(log_q) = &data.log_q {
        pool = pool.log_q(log_q);
    }
    pool
}

/// Pools 1 and 2 are the queue's, around the end of its memory or, at a capacity of 65, all of it.
pub fn steps_with_a_queue_give_what_pools_in_host_memory_give(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for (dtype, capacity) in [(DType::F32, 100), (DType::F16, 100), (DType::Bf16, 65)] {
        let config = Config {
            dtype,
            pools: vec![90, 40, 25],
            frozen: 0b110,
            masking: Masking::Excluded,
            correction: Correction::LogQ,
            ..Config::new(50, 1, 24)
        };
        let mut problem = config.problem();
        let dim = problem.dim;
        let options = QueueOptions::new(capacity, dim, dtype).with_ids().with_log_q().with_max_age(2);
        let mut queue = NegativeQueue::new(options).expect("valid options");
        // Rows that are too old by the time of the step, so that the others lie behind them and wrap around.
        let old = Storage::new(&rows(&mut rng(9), 60, dim, 1.0), dtype);
        let (old_ids, old_log_q) = (vec![7u64; 60], vec![-1.0; 60]);
        queue.enqueue(&Pool::new(old.view(dim)).ids(&old_ids).log_q(&old_log_q)).expect("rows that fit");
        for data in &problem.pools[1..] {
            queue.enqueue(&host_pool(data, dim)).expect("rows that fit");
        }
        let queue = DeviceQueue::from_host(&on_device, &queue).expect("memory");
        assert_eq!((queue.len(), queue.pools().count()), (65, if capacity == 65 { 1 } else { 2 }));
        if capacity == 65 {
            join_in_the_order_of_the_memory(&mut problem);
        }
        let wanted = from_host(cuda, &problem);
        let own = Problem { pools: vec![problem.pools[0].clone()], ..problem.clone() };
        let (inputs, mut results) = (OnDevice::new(&stream, &own), Results::new(&stream, &problem));
        let mut output = results.output(everything());
        // From host memory the bounds are known, and a kernel without a running maximum rounds otherwise.
        let log_q = || problem.pools.iter().filter_map(|pool| pool.log_q.as_ref()).flatten().copied();
        let (low, high) = (log_q().fold(f32::INFINITY, f32::min), log_q().fold(f32::NEG_INFINITY, f32::max));
        let batch = inputs.batch(&own).pools(queue.pools()).log_q_bounds(low, high);
        on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits");
        drop(output);
        on_device.fault().expect("valid input");
        assert_same(&results.download(&stream, &wanted), &wanted, &format!("{dtype:?}"));
    }
}

/// Makes pools 1 and 2 one, as a queue of capacity 65 has them: 60 rows came before, so that the first 5 of pool 1 are at the
/// end of the memory and all later ones at its start.
fn join_in_the_order_of_the_memory(problem: &mut Problem) {
    let last = problem.pools.pop().expect("three pools");
    let joined = &mut problem.pools[1];
    let dtype = joined.candidates.dtype();
    let mut values = [joined.candidates.to_f32(), last.candidates.to_f32()].concat();
    values.rotate_left(5 * problem.dim);
    joined.candidates = Storage::new(&values, dtype);
    let (ids, log_q) = (joined.ids.as_mut().expect("asked for"), joined.log_q.as_mut().expect("asked for"));
    ids.extend(last.ids.expect("asked for"));
    ids.rotate_left(5);
    log_q.extend(last.log_q.expect("asked for"));
    log_q.rotate_left(5);
}

/// A capture refuses whatever waits or allocates.
pub fn an_enqueue_neither_waits_nor_allocates(_: &mut Cuda) {
    let (stream, mut on_device) = on_stream_for_capture();
    let problem = Config { masking: Masking::Ids, ..Config::new(30, 30, 12) }.problem();
    let inputs = OnDevice::new(&stream, &problem);
    let data = &problem.pools[0];
    let candidates = up(&stream, &data.candidates.to_f32());
    let ids = up(&stream, data.ids.as_ref().expect("asked for"));
    let own = DevicePool::new(DeviceEmbeddings::new(DeviceSlice::new(&candidates), 30, 12)).ids(DeviceSlice::new(&ids));
    let options = QueueOptions::new(45, 12, DType::F32).with_ids();
    let (mut queue, mut host) =
        (DeviceQueue::new(&on_device, options).expect("memory"), NegativeQueue::new(options).expect("valid options"));
    let largest = inputs.batch(&problem).pool(queue.whole());
    on_device.reserve(&largest, &problem.loss, everything()).expect("memory");
    let bytes = (on_device.device_bytes(), queue.device_bytes());
    // Only the first pool has a gradient.
    let mut frozen = problem.clone();
    frozen.pools.push(PoolData { gradient: false, ..problem.pools[0].clone() });
    let mut results = Results::new(&stream, &frozen);
    stream.synchronize().expect("inputs are up");
    // SAFETY: the graphs run before `on_device` and their memory are dropped, on the same stream.
    unsafe { on_device.allow_capture() };
    for _ in 0..3 {
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a stream of its own");
        let mut output = results.output(everything());
        let used = queue.pools().count();
        output.gradients.as_mut().expect("asked for").d_candidates.truncate(1 + used);
        let batch = inputs.batch(&problem).pools(queue.pools());
        on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a step can be captured");
        drop(output);
        queue.enqueue(&on_device, &own).expect("an enqueue can be captured");
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        stream.end_capture(flags).expect("a graph").expect("with nodes").launch().expect("the graph runs");
        on_device.fault().expect("valid input");
        host.enqueue(&host_pool(data, 12)).expect("rows that fit");
        assert!(queue.to_host().expect("the device works").to_bytes() == host.to_bytes());
        assert_eq!((on_device.device_bytes(), queue.device_bytes()), bytes);
    }
    assert_eq!(queue.len(), 45);
}

pub fn a_queue_that_does_not_fit_is_an_error(_: &mut Cuda) {
    let (stream, on_device) = on_stream();
    let message = |error: catalog_softmax::Error| error.to_string();
    let made = |options| message(DeviceQueue::new(&on_device, options).expect_err("does not fit"));
    assert!(made(QueueOptions::new(0, 4, DType::F32)).starts_with("queue has shape (0, 4)"));
    let huge = made(QueueOptions::new(1 << 31, 1 << 20, DType::F32));
    assert!(huge.starts_with("device memory is"), "{huge}");

    let mut queue = DeviceQueue::new(&on_device, QueueOptions::new(8, 4, DType::F32).with_ids()).expect("memory");
    let (rows, ids, log_q) = (up(&stream, &[1.0f32; 20]), up(&stream, &[1u64; 5]), up(&stream, &[-1.0f32; 5]));
    let half = up(&stream, &[f16::ONE; 20]);
    let whole = |n, dim| DevicePool::new(DeviceEmbeddings::new(DeviceSlice::new(&rows), n, dim));
    let with_ids = |n, dim| whole(n, dim).ids(DeviceSlice::new(&ids));
    queue.enqueue(&on_device, &with_ids(5, 4)).expect("rows that fit");
    let before = queue.to_host().expect("the device works").to_bytes();
    let halves = DevicePool::new(DeviceEmbeddings::new(DeviceSlice::new(&half), 5, 4)).ids(DeviceSlice::new(&ids));
    for (pool, start) in [
        (with_ids(5, 2), "candidates has dim 2"),
        (with_ids(6, 4), "candidates has 20 elements"),
        (halves, "candidates has elements of type F16"),
        (with_ids(4, 4), "candidate_ids has length 5; rule: length 4"),
        (whole(5, 4), "candidate_ids is missing"),
    ] {
        let error = message(queue.enqueue(&on_device, &pool).expect_err(start));
        assert!(error.starts_with(start), "{error}");
    }
    assert!(queue.to_host().expect("the device works").to_bytes() == before, "errors change nothing");

    // What it does not keep is not looked at, whatever its length.
    let too_short = DeviceSlice::new(&log_q);
    let mut bare = DeviceQueue::new(&on_device, QueueOptions::new(9, 2, DType::F32)).expect("memory");
    let mut same = DeviceQueue::new(&on_device, QueueOptions::new(9, 2, DType::F32)).expect("memory");
    bare.enqueue(&on_device, &with_ids(9, 2).log_q(too_short)).expect("rows that fit");
    same.enqueue(&on_device, &whole(9, 2)).expect("rows that fit");
    let [bare, same] = [bare, same].map(|queue| queue.to_host().expect("the device works").to_bytes());
    assert!(bare == same);
}
