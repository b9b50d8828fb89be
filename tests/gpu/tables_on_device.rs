//! The same in the caller's device memory.

use std::collections::HashMap;
use std::sync::Arc;

use catalog_softmax::Output;
use catalog_softmax::cuda::{
    DeviceBatch, DeviceGradients, DeviceMoments, DeviceOutput, DevicePool, DeviceRank, DeviceRowNegatives,
    DeviceSearch, DeviceSlice, DeviceSliceMut, DeviceTable, DeviceTableGradient, DeviceTopK,
};
use catalog_softmax::{Backend, Cuda, DType, Gradients, Pool, Request, Search, TableGradient};
use catalog_softmax_testing::on_device::{DeviceStorage, up};
use catalog_softmax_testing::problem::Storage;
use cudarc::driver::{CudaSlice, CudaStream};

use crate::open::on_stream;
use crate::table_cases::{ALL, Candidates, Case, Data, Filter, NO_POOL, ROWS, WHOLE, assert_near, popular_rows, wide};

/// A case's arrays in device memory, and a place for everything that a step on them writes.
pub struct OnDevice {
    queries: DeviceStorage,
    table: DeviceStorage,
    own_pool: DeviceStorage,
    separate: DeviceStorage,
    u64s: HashMap<&'static str, CudaSlice<u64>>,
    i64s: HashMap<&'static str, CudaSlice<i64>>,
    u32s: HashMap<&'static str, CudaSlice<u32>>,
    f32s: HashMap<&'static str, CudaSlice<f32>>,
}

impl OnDevice {
    pub fn new(stream: &Arc<CudaStream>, data: &Data) -> Self {
        let mut u32s: HashMap<_, _> = [("positives", &data.positives), ("rows", &data.candidate_rows)]
            .into_iter()
            .map(|(name, values)| (name, up(stream, values)))
            .collect();
        if !data.own.is_empty() {
            u32s.insert("own", up(stream, &data.own));
        }
        let ids = [("own", &data.own_ids), ("table", &data.table_ids), ("separate", &data.separate_ids)];
        let u64s = ids.into_iter().chain([("excluded", &data.excluded)]);
        let i64s = [("positives", &data.offsets), ("excluded", &data.exclude_offsets)];
        let f32s = [
            ("pair_weight", &data.pair_weight),
            ("positive_log_q", &data.positive_log_q),
            ("log_q", &data.log_q),
            ("whole_log_q", &data.whole_log_q),
            ("own_log_q", &data.own_log_q),
            ("row_weight", &data.row_weight),
        ];
        OnDevice {
            queries: DeviceStorage::new(stream, &data.queries),
            table: DeviceStorage::new(stream, &data.table),
            own_pool: DeviceStorage::new(stream, &data.own_pool),
            separate: DeviceStorage::new(stream, &data.separate),
            u64s: u64s.map(|(name, values)| (name, up(stream, values))).collect(),
            i64s: i64s.into_iter().map(|(name, values)| (name, up(stream, values))).collect(),
            u32s,
            f32s: (f32s.into_iter().filter(|(_, values)| !values.is_empty()))
                .map(|(name, values)| (name, up(stream, values)))
                .collect(),
        }
    }

    pub fn batch(&self, case: &Case) -> DeviceBatch<'_> {
        let dim = case.sizes.3;
        let f32s = |name| DeviceSlice::new(&self.f32s[name]);
        let u64s = |name| DeviceSlice::new(&self.u64s[name]);
        let u32s = |name| DeviceSlice::new(&self.u32s[name]);
        fn with<'a>(inputs: &'a OnDevice, case: &Case, pool: DevicePool<'a>, log_q: &str) -> DevicePool<'a> {
            if case.log_q { pool.log_q(DeviceSlice::new(&inputs.f32s[log_q])) } else { pool }
        }
        let queries = self.queries.view(dim);
        let own_pool = with(self, case, DevicePool::new(self.own_pool.view(dim)).ids(u64s("own")), "log_q");
        let mut batch = match case.candidates {
            Candidates::Pools { rows, own, whole } => {
                let table = DeviceTable::new(self.table.view(dim));
                let table = if case.ids { table.ids(u64s("table")) } else { table };
                let table = if case.gradient { table } else { table.without_gradient() };
                let mut batch = DeviceBatch::of_table(queries, table).positives(u32s("positives"));
                if rows {
                    batch = batch.pool(with(self, case, DevicePool::rows(u32s("rows")), "log_q"));
                }
                if own {
                    batch = batch.pool(own_pool);
                }
                if whole {
                    batch = batch.pool(with(self, case, DevicePool::whole_table(), "whole_log_q"));
                }
                if rows && whole {
                    batch = batch.pool(with(self, case, DevicePool::rows(u32s("positives")), "positive_log_q"));
                }
                if case.log_q { batch.positive_log_q(f32s("positive_log_q")) } else { batch }
            }
            Candidates::Embeddings => DeviceBatch::new(queries, own_pool).positives(u32s("positives")),
            Candidates::Separate => {
                let batch = DeviceBatch::new(queries, own_pool).positive_embeddings(self.separate.view(dim));
                let batch = batch.positive_ids(u64s("separate"));
                if case.log_q { batch.positive_log_q(f32s("positive_log_q")) } else { batch }
            }
        };
        if case.own > 0 {
            let negatives = DeviceRowNegatives::new(u32s("own"), case.own);
            batch = batch.row_negatives(if case.log_q { negatives.log_q(f32s("own_log_q")) } else { negatives });
        }
        if case.several {
            batch = batch.positive_offsets(DeviceSlice::new(&self.i64s["positives"]));
            if case.log_q {
                batch = batch.positive_weight(f32s("pair_weight"));
            }
        }
        batch.row_weight(f32s("row_weight")).excluded_ids(DeviceSlice::new(&self.i64s["excluded"]), u64s("excluded"))
    }
}

/// A step on device memory gives what one on host memory gives, with a dense and with a row-sparse gradient of the table.
fn agrees_on_device(cuda: &mut Cuda, (stream, on_device): &mut Opened, case: &Case) {
    let (data, loss, dim) = (case.data(), case.loss(), case.sizes.3);
    let batch = data.batch();
    let (mut wanted, mut gradients) = (Output::default(), Gradients::default());
    let request = Request::value_and_grad().with_moments().with_rank();
    cuda.compute(&batch, &loss, request, &mut wanted, Some(&mut gradients)).expect("a loss that fits");
    let inputs = OnDevice::new(stream, &data);
    let (b, pairs) = (batch.num_queries(), batch.num_positives());
    let rows = gradients.d_table.as_ref().and_then(TableGradient::dense).map_or(0, |d| d.rows);
    let by_reference: usize = match case.candidates {
        Candidates::Pools { rows: true, .. } => case.sizes.1,
        _ => 0,
    };
    let is_whole = match case.candidates {
        Candidates::Pools { rows, own, whole } => whole || !rows && !own && case.own == 0,
        _ => true,
    };
    let most = if is_whole { rows } else { (by_reference + b * case.own + pairs).min(rows) };
    for sparse in [false, true] {
        if sparse && rows == 0 {
            continue;
        }
        let nan = |count: usize| up(stream, &vec![f64::NAN; count]);
        let nan32 = |count: usize| up(stream, &vec![f32::NAN; count.max(1)]);
        let all_ones = |count: usize| up(stream, &vec![u64::MAX; count]);
        let (mut total, mut losses, mut probability, mut lse, mut positive) =
            (nan(1), nan(b), nan(pairs), nan(b), nan(pairs));
        let (mut expected_score, mut entropy, mut d_positive) = (nan(b), nan(b), nan(pairs));
        let (mut num_negatives, mut above, mut ties) = (all_ones(b), all_ones(pairs), all_ones(pairs));
        let (mut d_queries, mut d_temperature, mut num_rows) = (nan32(b * dim), nan(1), all_ones(1));
        let pools = gradients.d_candidates.iter();
        let mut d_pools: Vec<_> = pools.map(|d| (d.rows > 0).then(|| nan32(d.values.len()))).collect();
        let mut d_separate = nan32(pairs * dim);
        let count = if sparse { most } else { rows };
        let (mut d_table, mut table_rows) = (nan32(count * dim), up(stream, &vec![u32::MAX; most.max(1)]));
        let places = d_pools.iter_mut().map(|d| d.as_mut().map(DeviceSliceMut::new)).collect();
        let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
        output.loss = Some(DeviceSliceMut::new(&mut losses));
        output.probability = Some(DeviceSliceMut::new(&mut probability));
        output.lse = Some(DeviceSliceMut::new(&mut lse));
        output.positive = Some(DeviceSliceMut::new(&mut positive));
        output.num_negatives = Some(DeviceSliceMut::new(&mut num_negatives));
        output.d_positive = Some(DeviceSliceMut::new(&mut d_positive));
        output.moments = Some(DeviceMoments {
            expected_score: DeviceSliceMut::new(&mut expected_score),
            entropy: DeviceSliceMut::new(&mut entropy),
        });
        output.rank = Some(DeviceRank { above: DeviceSliceMut::new(&mut above), ties: DeviceSliceMut::new(&mut ties) });
        let mut to = DeviceGradients::new(DeviceSliceMut::new(&mut d_queries), places);
        to.d_temperature = Some(DeviceSliceMut::new(&mut d_temperature));
        if gradients.d_positive_embeddings.is_some() {
            to.d_positive_embeddings = Some(DeviceSliceMut::new(&mut d_separate));
        }
        if rows > 0 {
            let values = DeviceSliceMut::new(&mut d_table);
            to.d_table = Some(match sparse {
                false => DeviceTableGradient::Dense(values),
                true => DeviceTableGradient::RowSparse {
                    rows: DeviceSliceMut::new(&mut table_rows),
                    values,
                    num_rows: DeviceSliceMut::new(&mut num_rows),
                },
            });
        }
        output.gradients = Some(to);
        on_device.compute_on_device(&inputs.batch(case), &loss, &mut output).expect("a loss that fits");
        drop(output);
        on_device.fault().expect("valid input");

        let near = |name: &str, found: &CudaSlice<f64>, wanted: &[f64]| {
            assert_near(name, case, &stream.clone_dtoh(found).expect("a result"), wanted, 1);
        };
        let near32 = |name: &str, found: &CudaSlice<f32>, wanted: &[f32]| {
            let found = stream.clone_dtoh(found).expect("a result");
            assert_near(name, case, &wide(&found[..wanted.len()]), &wide(wanted), dim);
        };
        let statistics = &wanted.statistics;
        assert_eq!(stream.clone_dtoh(&num_negatives).expect("a result"), statistics.num_negatives, "{case:?}");
        let rank = statistics.rank.as_ref().expect("asked for");
        assert_eq!(stream.clone_dtoh(&above).expect("a result"), rank.above, "{case:?}");
        assert_eq!(stream.clone_dtoh(&ties).expect("a result"), rank.ties, "{case:?}");
        near("total", &total, &[wanted.total]);
        near("loss", &losses, &wanted.loss);
        near("probability", &probability, &wanted.probability);
        near("lse", &lse, &statistics.lse);
        near("positive", &positive, &statistics.positive);
        near("entropy", &entropy, &statistics.moments.as_ref().expect("asked for").entropy);
        near("d_positive", &d_positive, &loss.epilogue(&batch, statistics).expect("of this batch").d_positive);
        near("d_temperature", &d_temperature, &[gradients.d_temperature]);
        near32("d_queries", &d_queries, &gradients.d_queries.values);
        for (d, wanted) in d_pools.iter().zip(&gradients.d_candidates) {
            if let Some(d) = d {
                near32("d_candidates", d, &wanted.values);
            }
        }
        if let Some(wanted) = &gradients.d_positive_embeddings {
            near32("d_positive_embeddings", &d_separate, &wanted.values);
        }
        let Some(dense) = gradients.d_table.as_ref().and_then(TableGradient::dense) else { continue };
        if !sparse {
            near32("d_table", &d_table, &dense.values);
            continue;
        }
        let named = stream.clone_dtoh(&num_rows).expect("a result")[0] as usize;
        assert!(!is_whole || named == rows, "{named} rows of {case:?}");
        let found_rows = stream.clone_dtoh(&table_rows).expect("a result")[..named].to_vec();
        assert!(found_rows.is_sorted_by(|a, b| a < b), "{case:?}");
        let wanted: Vec<f32> = found_rows.iter().flat_map(|&row| dense.row(row as usize)).copied().collect();
        near32("d_table.values", &d_table, &wanted);
        let others = (0..rows as u32).filter(|row| found_rows.binary_search(row).is_err());
        assert!(others.into_iter().all(|row| dense.row(row as usize).iter().all(|&x| x == 0.0)), "{case:?}");
    }
}

/// What the race detector looks at: every kernel of tables, over several blocks of a sort and of its digits.
pub fn small(cuda: &mut Cuda) {
    let opened = &mut on_stream();
    let case = Case { sizes: (21, 40, 270, 8), several: true, log_q: true, ids: true, ..Case::new(ROWS) };
    agrees_on_device(cuda, opened, &Case { own: 200, filter: Filter::Margin(-0.2), ..case.clone() });
    agrees_on_device(cuda, opened, &Case { own: 3, dtype: DType::F16, sizes: (5, 9, 30, 264), ..case });
    agrees_on_device(cuda, opened, &Case { sizes: (9, 20, 30, 12), ..Case::new(ALL) });
    // Rows with several segments of uses, wider than a warp holds.
    agrees_on_device(cuda, opened, &Case { own: 60, sizes: (6, 9, 2, 264), ..Case::new(NO_POOL) });
    offsets_out_of_order_give_each_positive_one_row(cuda);
}

pub fn steps_on_device_memory_agree(cuda: &mut Cuda) {
    let opened = &mut on_stream();
    for candidates in [Candidates::Embeddings, Candidates::Separate, NO_POOL, ROWS, WHOLE, ALL] {
        let own = if matches!(candidates, Candidates::Pools { .. }) { 7 } else { 0 };
        for (several, log_q) in [(false, true), (true, false), (true, true)] {
            agrees_on_device(cuda, opened, &Case { several, log_q, own, ids: log_q, ..Case::new(candidates) });
        }
        agrees_on_device(
            cuda,
            opened,
            &Case { filter: Filter::Margin(-0.2), several: true, own, ..Case::new(candidates) },
        );
    }
    agrees_on_device(cuda, opened, &Case { dtype: DType::Bf16, ..Case::new(NO_POOL) });
    // Several blocks of a sort, and of its digits.
    agrees_on_device(cuda, opened, &Case { own: 90, sizes: (60, 200, 300, 8), ..Case::new(ROWS) });
    popular_rows().iter().for_each(|case| agrees_on_device(cuda, opened, case));
    agrees_on_device(cuda, opened, &Case { gradient: false, own: 5, ..Case::new(ROWS) });
}

/// Searches of device memory: the most similar negatives as from host memory, and among rows of a table what a search of these rows'
/// embeddings finds.
pub fn searches_on_device_memory_agree(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for candidates in [Candidates::Embeddings, Candidates::Separate, ROWS, WHOLE, NO_POOL, ALL] {
        for (several, ids, dtype) in [(false, false, DType::F32), (true, true, DType::F16)] {
            let case = Case { several, ids, dtype, log_q: ids, ..Case::new(candidates) };
            // Their rows' own negatives do not matter.
            let case = if candidates == ROWS { Case { own: 4, ..case } } else { case };
            let data = case.data();
            let inputs = OnDevice::new(&stream, &data);
            for k in [1, 7, 60] {
                let wanted = cuda.hardest_negatives(&data.batch(), case.similarity, k).expect("a batch with pools");
                let found = searched(&stream, wanted.indices.len(), |top| {
                    on_device.hardest_negatives_on_device(&inputs.batch(&case), case.similarity, k, top)
                });
                assert_eq!((found.0, found.1), (wanted.indices, wanted.scores), "{k} of {case:?}");
            }
            on_device.fault().expect("valid input");
            if matches!(candidates, ROWS | WHOLE) {
                search_over_a_table_agrees(cuda, &mut on_device, &stream, &inputs, &data);
            }
        }
    }
}

/// Among rows of a table, without positives.
fn search_over_a_table_agrees(
    cuda: &mut Cuda,
    on_device: &mut Cuda,
    stream: &Arc<CudaStream>,
    inputs: &OnDevice,
    data: &Data,
) {
    let (case, dim) = (&data.case, data.case.sizes.3);
    let table = DeviceTable::new(inputs.table.view(dim)).ids(DeviceSlice::new(&inputs.u64s["table"]));
    let search = DeviceSearch::of_table(inputs.queries.view(dim), table);
    let (search, rows) = match case.candidates {
        ROWS => (search.pool(DevicePool::rows(DeviceSlice::new(&inputs.u32s["rows"]))), data.candidate_rows.clone()),
        _ => (search, (0..case.sizes.2 as u32).collect()),
    };
    let search =
        search.excluded_ids(DeviceSlice::new(&inputs.i64s["excluded"]), DeviceSlice::new(&inputs.u64s["excluded"]));
    let table = data.table.to_f32();
    let gathered: Vec<f32> = rows.iter().flat_map(|&row| &table[row as usize * dim..][..dim]).copied().collect();
    let gathered = Storage::new(&gathered, case.dtype);
    let ids: Vec<u64> = rows.iter().map(|&row| data.table_ids[row as usize]).collect();
    let host = Search::builder(data.queries.view(dim), Pool::new(gathered.view(dim)).ids(&ids))
        .excluded_ids(&data.exclude_offsets, &data.excluded)
        .build()
        .expect("a valid search");
    let wanted = cuda.top_k(&host, case.similarity, 5).expect("a search that fits");
    let found =
        searched(stream, wanted.indices.len(), |top| on_device.top_k_on_device(&search, case.similarity, 5, top));
    on_device.fault().expect("valid input");
    assert_eq!((found.0, found.1), (wanted.indices, wanted.scores), "{case:?}");
}

/// Indices and scores of a search that finds `count` of each.
fn searched(
    stream: &Arc<CudaStream>,
    count: usize,
    search: impl FnOnce(&mut DeviceTopK<'_>) -> catalog_softmax::Result<()>,
) -> (Vec<u32>, Vec<f32>) {
    let (mut indices, mut scores) = (up(stream, &vec![0u32; count]), up(stream, &vec![0.0f32; count]));
    let (to_indices, to_scores) = (DeviceSliceMut::new(&mut indices), DeviceSliceMut::new(&mut scores));
    let mut top = DeviceTopK { indices: to_indices, scores: to_scores, workspace: None };
    search(&mut top).expect("a search that fits");
    (stream.clone_dtoh(&indices).expect("a result"), stream.clone_dtoh(&scores).expect("a result"))
}

/// Rows that the table does not have, and offsets out of order: the step stays in bounds, and the fault names them.
pub fn rows_that_are_none_are_faults(_: &mut Cuda) {
    let spoil: [(&str, Spoil); 4] = [
        ("candidate_rows[3]", |data| data.candidate_rows[3] = 90),
        ("row_negatives[8]", |data| data.own[8] = 1 << 30),
        ("positives[2]", |data| data.positives[2] = u32::MAX),
        ("positive_offsets[5]", |data| data.offsets[5] = 1 << 40),
    ];
    let case = Case { several: true, own: 7, ..Case::new(ROWS) };
    let mut opened = on_stream();
    spoil.into_iter().for_each(|(argument, spoil)| is_a_fault(&mut opened, &case, argument, spoil));
}

/// Offsets that give positives to several rows, to none, or that are no places at all. Each pair has results of its own, which no two
/// rows may write: under the race detector, this would fail where they do.
pub fn offsets_out_of_order_give_each_positive_one_row(_: &mut Cuda) {
    let spoil: [(&str, Spoil); 6] = [
        ("positive_offsets[0]", |data| data.offsets[0] = 4),
        ("positive_offsets[2]", |data| data.offsets[3] = 0),
        ("positive_offsets[1]", |data| data.offsets[1] = i64::MAX),
        ("positive_offsets[0]", |data| data.offsets.reverse()),
        ("positive_offsets[0]", |data| data.offsets.iter_mut().step_by(2).for_each(|offset| *offset = -*offset - 1)),
        ("positive_offsets[11]", |data| *data.offsets.last_mut().expect("B + 1 of them") -= 1),
    ];
    let mut opened = on_stream();
    for candidates in [ROWS, Candidates::Separate] {
        let own = if candidates == ROWS { 3 } else { 0 };
        let case = Case { several: true, own, sizes: (11, 20, 15, 8), ..Case::new(candidates) };
        spoil.iter().for_each(|&(argument, spoil)| is_a_fault(&mut opened, &case, argument, spoil));
    }
}

type Spoil = fn(&mut Data);
/// A stream, and a backend on it: it takes an emulated device a while to load the kernels.
type Opened = (Arc<CudaStream>, Cuda);

/// A step on spoiled input reports it, and the next one, on input as it was, gives what it gave before.
fn is_a_fault((stream, on_device): &mut Opened, case: &Case, argument: &str, spoil: Spoil) {
    let mut data = case.data();
    let loss = case.loss();
    let sound = OnDevice::new(stream, &data);
    let before = gradient_of_queries(stream, on_device, &sound, case, data.positives.len());
    on_device.fault().expect("valid input");
    spoil(&mut data);
    let inputs = OnDevice::new(stream, &data);
    gradient_of_queries(stream, on_device, &inputs, case, data.positives.len());
    let error = on_device.fault().expect_err("a fault").to_string();
    assert!(error.contains(argument), "{error}, not {argument}");
    let after = gradient_of_queries(stream, on_device, &sound, case, data.positives.len());
    on_device.fault().expect("valid input");
    assert_eq!(before, after, "{argument} of {case:?}, {loss:?}");
}

/// Of a step with all its gradients.
fn gradient_of_queries(
    stream: &Arc<CudaStream>,
    on_device: &mut Cuda,
    inputs: &OnDevice,
    case: &Case,
    pairs: usize,
) -> Vec<f32> {
    let (b, n, m, dim) = case.sizes;
    let zeros = |rows: usize| up(stream, &vec![0.0f32; rows * dim]);
    let (mut d_queries, mut d_table, mut d_pool, mut d_positives) = (zeros(b), zeros(m), zeros(n), zeros(pairs));
    let mut total = up(stream, &[0.0f64]);
    let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
    let pool = (!case.has_table()).then(|| DeviceSliceMut::new(&mut d_pool));
    let mut to = DeviceGradients::new(DeviceSliceMut::new(&mut d_queries), vec![pool]);
    if case.has_table() {
        to.d_table = Some(DeviceTableGradient::Dense(DeviceSliceMut::new(&mut d_table)));
    } else {
        to.d_positive_embeddings = Some(DeviceSliceMut::new(&mut d_positives));
    }
    output.gradients = Some(to);
    on_device.compute_on_device(&inputs.batch(case), &case.loss(), &mut output).expect("a loss that fits");
    drop(output);
    stream.clone_dtoh(&d_queries).expect("a result")
}
