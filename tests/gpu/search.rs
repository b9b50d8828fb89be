//! Searches of device memory: the same lists as from host memory, no allocation, graphs, errors and faults.

use std::sync::Arc;

use catalog_softmax::cuda::{Cuda, DevicePool, DeviceQueue, DeviceSearch, DeviceSlice, DeviceSliceMut, DeviceTopK};
use catalog_softmax::negatives::QueueOptions;
use catalog_softmax::{DType, Error, Similarity, TopK};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream};

use super::open::{on_stream, on_stream_for_capture};
use catalog_softmax_testing::on_device::{DeviceStorage, up};
use catalog_softmax_testing::problem::Storage;
use catalog_softmax_testing::topk::{SearchData, Values};

/// A search's arrays in device memory.
struct OnDevice {
    padding: usize,
    queries: DeviceStorage,
    pools: Vec<(DeviceStorage, Option<CudaSlice<u64>>)>,
    excluded: Option<(CudaSlice<i64>, CudaSlice<u64>)>,
}

impl OnDevice {
    fn new(stream: &Arc<CudaStream>, data: &SearchData) -> Self {
        OnDevice::padded(stream, data, 0)
    }

    /// With `padding` NaNs behind each row.
    fn padded(stream: &Arc<CudaStream>, data: &SearchData, padding: usize) -> Self {
        let matrix = |from: &Storage| DeviceStorage::new(stream, &from.padded(data.dim, padding));
        let pool =
            |(candidates, ids): &(_, Option<Vec<u64>>)| (matrix(candidates), ids.as_ref().map(|ids| up(stream, ids)));
        OnDevice {
            padding,
            queries: matrix(&data.queries),
            pools: data.pools.iter().map(pool).collect(),
            excluded: data.excluded.as_ref().map(|(offsets, ids)| (up(stream, offsets), up(stream, ids))),
        }
    }

    fn search(&self, dim: usize) -> DeviceSearch<'_> {
        let mut pools = self.pools.iter().map(|(candidates, ids)| {
            let pool = DevicePool::new(candidates.strided_view(dim, self.padding));
            ids.as_ref().map_or(pool, |ids| pool.ids(DeviceSlice::new(ids)))
        });
        let first = pools.next().expect("a pool");
        let queries = self.queries.strided_view(dim, self.padding);
        let search = pools.fold(DeviceSearch::new(queries, first), DeviceSearch::pool);
        match &self.excluded {
            Some((offsets, ids)) => search.excluded_ids(DeviceSlice::new(offsets), DeviceSlice::new(ids)),
            None => search,
        }
    }
}

/// A place for the lists of `rows` rows, with something in it that is no result.
struct Place {
    stream: Arc<CudaStream>,
    indices: CudaSlice<u32>,
    scores: CudaSlice<f32>,
}

impl Place {
    fn new(stream: &Arc<CudaStream>, rows: usize, k: usize) -> Self {
        let (indices, scores) = (up(stream, &vec![7; rows * k]), up(stream, &vec![f32::NAN; rows * k]));
        Place { stream: stream.clone(), indices, scores }
    }

    fn view(&mut self) -> DeviceTopK<'_> {
        DeviceTopK {
            indices: DeviceSliceMut::new(&mut self.indices),
            scores: DeviceSliceMut::new(&mut self.scores),
            workspace: None,
        }
    }

    fn assert_is(&self, wanted: &TopK, what: &str) {
        let indices = self.stream.clone_dtoh(&self.indices).expect("results come down");
        let scores = self.stream.clone_dtoh(&self.scores).expect("results come down");
        assert_eq!((indices, scores), (wanted.indices.clone(), wanted.scores.clone()), "{what}");
    }
}

pub fn searches_of_device_memory_find_what_host_memory_finds(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for (masked, values, dim) in [(false, Values::Normal, 40), (true, Values::Normal, 33), (true, Values::Whole, 8)]
        {
            let data = SearchData::new(70, &[190, 65], dim, dtype, values, masked);
            let inputs = OnDevice::new(&stream, &data);
            for k in [1, 20, 255] {
                let mut place = Place::new(&stream, 70, k);
                on_device
                    .top_k_on_device(&inputs.search(dim), data.similarity, k, &mut place.view())
                    .expect("a search that fits");
                on_device.fault().expect("valid input");
                place.assert_is(&data.top_k(cuda, k), &format!("{dtype:?}, masked {masked}, dim {dim}, k {k}"));
            }
        }
    }
}

/// The elements between rows are NaN. Scores are exact: where rows begin decides in which order a length is summed.
pub fn strided_rows_are_searched_as_contiguous_ones(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for (dim, padding) in [(33, 1), (20, 3), (24, 8), (64, 64)] {
            let data = SearchData::new(70, &[190, 65], dim, dtype, Values::Whole, true);
            let (inputs, mut place) = (OnDevice::padded(&stream, &data, padding), Place::new(&stream, 70, 20));
            on_device
                .top_k_on_device(&inputs.search(dim), data.similarity, 20, &mut place.view())
                .expect("a search that fits");
            on_device.fault().expect("valid input");
            place.assert_is(&data.top_k(cuda, 20), &format!("{dtype:?}, dim {dim}, padding {padding}"));
        }
    }
}

pub fn a_reserved_search_allocates_nothing_and_replays_as_a_graph(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream_for_capture();
    let data = SearchData::new(130, &[300], 24, DType::F16, Values::Normal, true);
    let (inputs, mut place, k) = (OnDevice::new(&stream, &data), Place::new(&stream, 130, 50), 50);
    let (search, similarity) = (inputs.search(24), data.similarity);
    let planned = on_device.plan_top_k_on_device(&search, similarity, k).expect("a search that fits").workspace_bytes;
    assert_eq!(on_device.device_bytes(), 0, "planning allocates nothing");
    on_device.reserve_top_k_on_device(&search, similarity, k).expect("memory");
    assert_eq!(on_device.device_bytes(), planned);
    stream.synchronize().expect("inputs are up");
    // SAFETY: the graph runs before `on_device` and its memory are dropped, on the same stream.
    unsafe { on_device.allow_capture() };
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).expect("a stream of its own");
    on_device.top_k_on_device(&search, similarity, k, &mut place.view()).expect("a search can be captured");
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags).expect("a graph").expect("with nodes");
    assert_eq!(on_device.device_bytes(), planned);
    let wanted = data.top_k(cuda, k);
    for replay in 0..2 {
        graph.launch().expect("the graph runs");
        on_device.fault().expect("valid input");
        place.assert_is(&wanted, &format!("replay {replay}"));
    }
}

/// Past candidates can be searched where they lie.
pub fn a_queue_can_be_searched(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let (dim, capacity, k) = (16, 48, 10);
    let data = SearchData::new(20, &[32], dim, DType::F16, Values::Normal, true);
    let inputs = OnDevice::new(&stream, &data);
    let options = QueueOptions::new(capacity, dim, DType::F16).with_ids();
    let mut queue = DeviceQueue::new(&on_device, options).expect("a queue that fits");
    let (candidates, ids) = &inputs.pools[0];
    let rows = DevicePool::new(candidates.view(dim)).ids(DeviceSlice::new(ids.as_ref().expect("masked")));
    queue.enqueue(&on_device, &rows).expect("rows that fit");
    let mut place = Place::new(&stream, 20, k);
    let pool = queue.pools().next().expect("rows in it");
    let search = DeviceSearch::new(inputs.queries.view(dim), pool);
    let (offsets, excluded) = inputs.excluded.as_ref().expect("masked");
    let search = search.excluded_ids(DeviceSlice::new(offsets), DeviceSlice::new(excluded));
    on_device.top_k_on_device(&search, data.similarity, k, &mut place.view()).expect("a search that fits");
    on_device.fault().expect("valid input");
    place.assert_is(&data.top_k(cuda, k), "a queue");
}

pub fn searches_that_do_not_fit_are_errors(_: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let data = SearchData::new(20, &[50, 5], 8, DType::F32, Values::Normal, true);
    let inputs = OnDevice::new(&stream, &data);
    let mut attempt = |search: &DeviceSearch<'_>, k: usize, places: usize| {
        let mut place = Place::new(&stream, places, 1);
        let found = on_device.top_k_on_device(search, Similarity::Dot, k, &mut place.view());
        found.expect_err("does not fit").to_string()
    };
    for k in [0, 56, 1025] {
        let error = attempt(&inputs.search(8), k, 20);
        assert!(error.starts_with(&format!("k is {k}")), "{error}");
    }
    let error = attempt(&inputs.search(8), 3, 59);
    assert!(error.starts_with("indices has length 59"), "{error}");
    let error = attempt(&inputs.search(4), 3, 120);
    assert!(error.starts_with("pools[0].candidate_ids has length 50"), "{error}");
    let queries = || inputs.queries.view(8);
    let nameless = DevicePool::new(inputs.pools[0].0.view(8));
    let (offsets, ids) = inputs.excluded.as_ref().expect("masked");
    let search = DeviceSearch::new(queries(), nameless).excluded_ids(DeviceSlice::new(offsets), DeviceSlice::new(ids));
    let error = attempt(&search, 3, 60);
    assert!(error.starts_with("candidate_ids"), "{error}");
    let log_q = up(&stream, &[0.0f32; 50]);
    let corrected = DeviceSearch::new(queries(), nameless.log_q(DeviceSlice::new(&log_q)));
    let error = attempt(&corrected, 3, 60);
    assert!(error.starts_with("log_q"), "{error}");
}

pub fn offsets_that_are_none_are_a_fault_of_a_search(_: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let mut data = SearchData::new(20, &[50], 8, DType::F32, Values::Normal, true);
    data.excluded.as_mut().expect("masked").0[4] = -5;
    let (inputs, mut place) = (OnDevice::new(&stream, &data), Place::new(&stream, 20, 3));
    on_device.top_k_on_device(&inputs.search(8), data.similarity, 3, &mut place.view()).expect("submitted");
    match on_device.fault() {
        Err(Error::Value { argument, .. }) => assert_eq!(argument, "exclude_offsets[3]"),
        other => panic!("{other:?}"),
    }
    on_device.fault().expect("told once");
}
