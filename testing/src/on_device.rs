//! Problems and results in device memory, for steps on it.

use std::sync::Arc;

use catalog_softmax::Request;
use catalog_softmax::cuda::{
    DeviceBatch, DeviceElement, DeviceEmbeddings, DeviceGradients, DeviceMoments, DeviceOutput, DevicePool, DeviceRank,
    DeviceSlice, DeviceSliceMut,
};
use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits};

use super::problem::{PositiveData, Problem, Storage};
use super::step::Step;

/// Embeddings of any type in device memory.
pub enum DeviceStorage {
    F32(CudaSlice<f32>),
    F16(CudaSlice<half::f16>),
    Bf16(CudaSlice<half::bf16>),
}

/// Candidates, ids and log_q.
pub type PoolArrays = (DeviceStorage, Option<CudaSlice<u64>>, Option<CudaSlice<f32>>);

/// A problem's arrays in device memory.
pub struct OnDevice {
    /// Elements between a row's end and the next row, in queries, candidates and separate positives.
    padding: usize,
    pub queries: DeviceStorage,
    pub pools: Vec<PoolArrays>,
    pub positives: Result<CudaSlice<u32>, DeviceStorage>,
    positive_ids: Option<CudaSlice<u64>>,
    positive_log_q: Option<CudaSlice<f32>>,
    excluded: Option<(CudaSlice<i64>, CudaSlice<u64>)>,
    row_weight: Option<CudaSlice<f32>>,
}

pub fn up<T: DeviceRepr>(stream: &Arc<CudaStream>, values: &[T]) -> CudaSlice<T> {
    stream.clone_htod(values).expect("memory for inputs")
}

impl DeviceStorage {
    pub fn new(stream: &Arc<CudaStream>, from: &Storage) -> Self {
        match from {
            Storage::F32(values) => DeviceStorage::F32(up(stream, values)),
            Storage::F16(values) => DeviceStorage::F16(up(stream, values)),
            Storage::Bf16(values) => DeviceStorage::Bf16(up(stream, values)),
        }
    }

    pub fn view(&self, dim: usize) -> DeviceEmbeddings<'_> {
        self.strided_view(dim, 0)
    }

    /// A view of rows that lie `dim + padding` elements apart.
    pub fn strided_view(&self, dim: usize, padding: usize) -> DeviceEmbeddings<'_> {
        fn view<T: DeviceElement>(slice: &CudaSlice<T>, [dim, stride]: [usize; 2]) -> DeviceEmbeddings<'_> {
            DeviceEmbeddings::new(DeviceSlice::new(slice), slice.len() / stride, dim).with_stride(stride)
        }
        let shape = [dim, dim + padding];
        match self {
            DeviceStorage::F32(slice) => view(slice, shape),
            DeviceStorage::F16(slice) => view(slice, shape),
            DeviceStorage::Bf16(slice) => view(slice, shape),
        }
    }
}

impl OnDevice {
    pub fn new(stream: &Arc<CudaStream>, problem: &Problem) -> Self {
        OnDevice::padded(stream, problem, 0)
    }

    /// The same with `padding` NaNs behind each row.
    pub fn padded(stream: &Arc<CudaStream>, problem: &Problem, padding: usize) -> Self {
        let matrix = |from: &Storage| DeviceStorage::new(stream, &from.padded(problem.dim, padding));
        let option = |values: &Option<Vec<f32>>| values.as_ref().map(|values| up(stream, values));
        let ids = |values: &Option<Vec<u64>>| values.as_ref().map(|values| up(stream, values));
        let pools = problem.pools.iter();
        let pools = pools.map(|pool| (matrix(&pool.candidates), ids(&pool.ids), option(&pool.log_q)));
        OnDevice {
            padding,
            queries: matrix(&problem.queries),
            pools: pools.collect(),
            positives: match &problem.positives {
                PositiveData::Index(index) => Ok(up(stream, index)),
                PositiveData::Separate(embeddings) => Err(matrix(embeddings)),
            },
            positive_ids: ids(&problem.positive_ids),
            positive_log_q: option(&problem.positive_log_q),
            excluded: problem.excluded.as_ref().map(|(offsets, ids)| (up(stream, offsets), up(stream, ids))),
            row_weight: option(&problem.row_weight),
        }
    }

    /// Queues a copy of f32 queries over those that are there.
    pub fn write_queries(&mut self, stream: &Arc<CudaStream>, values: &[f32]) {
        let DeviceStorage::F32(queries) = &mut self.queries else { panic!("f32") };
        stream.memcpy_htod(values, queries).expect("as many elements");
    }

    /// Queues zeros over f32 queries, with nothing to read from the host.
    pub fn clear_queries(&mut self, stream: &Arc<CudaStream>) {
        let DeviceStorage::F32(queries) = &mut self.queries else { panic!("f32") };
        stream.memset_zeros(queries).expect("the stream works");
    }

    pub fn batch<'a>(&'a self, problem: &Problem) -> DeviceBatch<'a> {
        let view = |storage: &'a DeviceStorage| storage.strided_view(problem.dim, self.padding);
        let mut pools = self.pools.iter().zip(&problem.pools).map(|((candidates, ids, log_q), data)| {
            let mut pool = DevicePool::new(view(candidates));
            if let Some(ids) = ids {
                pool = pool.ids(DeviceSlice::new(ids));
            }
            if let Some(log_q) = log_q {
                pool = pool.log_q(DeviceSlice::new(log_q));
            }
            if data.gradient { pool } else { pool.without_gradient() }
        });
        let (queries, first) = (view(&self.queries), pools.next().expect("a pool"));
        let mut batch = match &self.positives {
            Ok(index) => DeviceBatch::new(queries, first).positives(DeviceSlice::new(index)),
            Err(embeddings) => DeviceBatch::new(queries, first).positive_embeddings(view(embeddings)),
        };
        for pool in pools {
            batch = batch.pool(pool);
        }
        if let Some(ids) = &self.positive_ids {
            batch = batch.positive_ids(DeviceSlice::new(ids));
        }
        if let Some(log_q) = &self.positive_log_q {
            batch = batch.positive_log_q(DeviceSlice::new(log_q));
        }
        if let Some((offsets, ids)) = &self.excluded {
            batch = batch.excluded_ids(DeviceSlice::new(offsets), DeviceSlice::new(ids));
        }
        match &self.row_weight {
            Some(weights) => batch.row_weight(DeviceSlice::new(weights)),
            None => batch,
        }
    }
}

/// Everything that a step writes, with NaN (or all ones) in it before.
pub struct Results {
    pub total: CudaSlice<f64>,
    f64s: [CudaSlice<f64>; 6],
    u64s: [CudaSlice<u64>; 3],
    pub d_queries: CudaSlice<f32>,
    pub d_candidates: Vec<Option<CudaSlice<f32>>>,
    d_positive_embeddings: Option<CudaSlice<f32>>,
    temperature: [CudaSlice<f64>; 2],
}

impl Results {
    pub fn new(stream: &Arc<CudaStream>, problem: &Problem) -> Self {
        let (b, dim) = (problem.num_queries(), problem.dim);
        let f64s = |len: usize| up(stream, &vec![f64::NAN; len]);
        let f32s = |len: usize| up(stream, &vec![f32::NAN; len]);
        let separate = matches!(problem.positives, PositiveData::Separate(_));
        let pools = problem.pools.iter();
        Results {
            total: f64s(1),
            f64s: std::array::from_fn(|_| f64s(b)),
            u64s: std::array::from_fn(|_| up(stream, &vec![u64::MAX; b])),
            d_queries: f32s(b * dim),
            d_candidates: pools.map(|pool| pool.gradient.then(|| f32s(pool.candidates.len()))).collect(),
            d_positive_embeddings: separate.then(|| f32s(b * dim)),
            temperature: std::array::from_fn(|_| f64s(1)),
        }
    }

    /// A place for everything that the request names.
    pub fn output(&mut self, request: Request) -> DeviceOutput<'_> {
        fn place<T: Send + Sync>(slice: &mut CudaSlice<T>) -> DeviceSliceMut<'_, T> {
            DeviceSliceMut::new(slice)
        }
        let [loss, probability, lse, positive, score, entropy] = &mut self.f64s;
        let [num_negatives, above, ties] = &mut self.u64s;
        let [tau, log_tau] = &mut self.temperature;
        let d_candidates = self.d_candidates.iter_mut().map(|d| d.as_mut().map(|d| place(d))).collect();
        let mut gradients = DeviceGradients::new(place(&mut self.d_queries), d_candidates);
        gradients.d_positive_embeddings = self.d_positive_embeddings.as_mut().map(|d| place(d));
        gradients.d_temperature = Some(place(tau));
        gradients.d_log_temperature = Some(place(log_tau));
        let mut output = DeviceOutput::new(place(&mut self.total));
        output.loss = Some(place(loss));
        output.probability = Some(place(probability));
        output.lse = Some(place(lse));
        output.positive = Some(place(positive));
        output.num_negatives = Some(place(num_negatives));
        output.moments =
            request.moments.then(|| DeviceMoments { expected_score: place(score), entropy: place(entropy) });
        output.rank = request.rank.then(|| DeviceRank { above: place(above), ties: place(ties) });
        output.gradients = request.gradients.then_some(gradients);
        output
    }

    /// In the shape of a host step's output.
    pub fn download(&self, stream: &Arc<CudaStream>, like: &Step) -> Step {
        fn down<T: DeviceRepr + Default + Clone + ValidAsZeroBits>(
            stream: &Arc<CudaStream>,
            slice: &CudaSlice<T>,
        ) -> Vec<T> {
            stream.clone_dtoh(slice).expect("results come down")
        }
        let mut output = like.clone();
        output.total = down(stream, &self.total)[0];
        let [loss, probability, lse, positive, score, entropy] = &self.f64s;
        (output.loss, output.probability) = (down(stream, loss), down(stream, probability));
        let statistics = &mut output.statistics;
        (statistics.lse, statistics.positive) = (down(stream, lse), down(stream, positive));
        let moments = statistics.moments.as_mut().expect("asked for");
        (moments.expected_score, moments.entropy) = (down(stream, score), down(stream, entropy));
        let [num_negatives, above, ties] = &self.u64s;
        statistics.num_negatives = down(stream, num_negatives);
        let rank = statistics.rank.as_mut().expect("asked for");
        (rank.above, rank.ties) = (down(stream, above), down(stream, ties));
        let g = output.gradients.as_mut().expect("asked for");
        g.d_queries.values = down(stream, &self.d_queries);
        for (to, from) in g.d_candidates.iter_mut().zip(&self.d_candidates) {
            to.values = from.as_ref().map_or(Vec::new(), |from| down(stream, from));
        }
        if let (Some(to), Some(from)) = (&mut g.d_positive_embeddings, &self.d_positive_embeddings) {
            to.values = down(stream, from);
        }
        g.d_temperature = down(stream, &self.temperature[0])[0];
        g.d_log_temperature = down(stream, &self.temperature[1])[0];
        output
    }
}
