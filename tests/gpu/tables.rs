//! Batches over a table, several positives, negatives of rows' own and the false-negative filter, against the reference.

use std::collections::HashMap;
use std::sync::Arc;

use catalog_softmax::Output;
use catalog_softmax::cuda::{
    DeviceBatch, DeviceGradients, DeviceMoments, DeviceOutput, DevicePool, DeviceRank, DeviceRowNegatives, DeviceSlice,
    DeviceSliceMut, DeviceTable, DeviceTableGradient,
};
use catalog_softmax::{
    Backend, Batch, BatchBuilder, Correction, Cuda, DType, Gradients, Loss, Pool, Reduction, Reference, Request,
    RowNegatives, Similarity, Table, TableGradient,
};
use catalog_softmax_testing::on_device::{DeviceStorage, up};
use catalog_softmax_testing::problem::Storage;
use catalog_softmax_testing::tolerance::epsilon;
use cudarc::driver::{CudaSlice, CudaStream};

use crate::open::on_stream;

use Similarity::{Cosine, Dot};

/// Numbers that look random and are the same everywhere.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }

    /// In [−1, 1).
    fn real(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn rows(&mut self, rows: usize, dim: usize, dtype: DType) -> Storage {
        Storage::new(&(0..rows * dim).map(|_| self.real()).collect::<Vec<_>>(), dtype)
    }

    fn indices(&mut self, count: usize, limit: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(limit) as u32).collect()
    }

    fn log_q(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| -3.0 + self.real()).collect()
    }
}

/// What the candidates are.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Candidates {
    /// Pools: by reference, of its own embeddings, the whole table.
    Pools { rows: bool, own: bool, whole: bool },
    /// Embeddings without a table; positives are candidates.
    Embeddings,
    /// The same, and positives are embeddings of their own.
    Separate,
}

const ROWS: Candidates = Candidates::Pools { rows: true, own: false, whole: false };
const WHOLE: Candidates = Candidates::Pools { rows: false, own: false, whole: true };
const NO_POOL: Candidates = Candidates::Pools { rows: false, own: false, whole: false };
const ALL: Candidates = Candidates::Pools { rows: true, own: true, whole: true };

#[derive(Debug, Clone, Copy)]
enum Filter {
    None,
    Margin(f64),
    Ratio(f64),
}

#[derive(Debug, Clone)]
struct Case {
    dtype: DType,
    similarity: Similarity,
    sizes: (usize, usize, usize, usize),
    candidates: Candidates,
    /// K of the rows' own negatives.
    own: usize,
    several: bool,
    log_q: bool,
    ids: bool,
    filter: Filter,
    gradient: bool,
}

impl Case {
    fn new(candidates: Candidates) -> Self {
        // Queries, candidates of a pool, rows of the table, elements.
        let (dtype, similarity, sizes) = (DType::F32, Cosine, (37, 150, 90, 24));
        let (own, several, log_q, ids, filter, gradient) = (0, false, false, false, Filter::None, true);
        Case { dtype, similarity, sizes, candidates, own, several, log_q, ids, filter, gradient }
    }

    fn has_table(&self) -> bool {
        matches!(self.candidates, Candidates::Pools { .. })
    }

    fn loss(&self) -> Loss {
        let loss = Loss::softmax(self.similarity, if self.similarity == Dot { 2.0 } else { 0.2 });
        let loss = loss.reduction(Reduction::WeightedMean);
        let loss = if self.log_q { loss.correction(Correction::LogQ) } else { loss };
        match self.filter {
            Filter::None => loss,
            Filter::Margin(margin) => loss.false_negative_margin(margin),
            Filter::Ratio(ratio) => loss.false_negative_ratio(ratio),
        }
    }

    fn data(&self) -> Data {
        let (b, n, m, dim) = self.sizes;
        let mut numbers = Numbers(7 * b as u64 + n as u64);
        let (queries, table) = (numbers.rows(b, dim, self.dtype), numbers.rows(m, dim, self.dtype));
        let own_pool = numbers.rows(n, dim, self.dtype);
        let own_ids: Vec<u64> = (0..n).map(|_| 1000 + numbers.below(m) as u64).collect();
        let table_ids: Vec<u64> = (0..m as u64).map(|row| if self.ids { 1000 + row / 2 } else { row }).collect();
        // Row 0 has none, row 1 two that are the same, the others some.
        let count = |row: usize| if row < 2 { 2 * row } else { row % 4 };
        let mut offsets = vec![0i64];
        (0..b).for_each(|row| offsets.push(offsets[row] + count(row) as i64));
        let pairs = if self.several { offsets[b] as usize } else { b };
        let mut positives = numbers.indices(pairs, if self.has_table() { m } else { n });
        positives[1] = positives[0];
        let separate = numbers.rows(pairs, dim, self.dtype);
        let separate_ids: Vec<u64> = (0..pairs).map(|_| 1000 + numbers.below(m) as u64).collect();
        let pair_weight = numbers.log_q(pairs).iter().map(|x| -x).collect();
        let positive_log_q = numbers.log_q(pairs);
        let candidate_rows = numbers.indices(n, m);
        let mut own = numbers.indices(b * self.own, m);
        own.iter_mut().step_by(5).for_each(|row| *row = RowNegatives::NONE);
        let (log_q, whole_log_q, own_log_q) = (numbers.log_q(n), numbers.log_q(m), numbers.log_q(b * self.own));
        let row_weight = (0..b).map(|row| (row % 3) as f32).collect();
        let excluded = (0..2 * b).map(|_| table_ids[numbers.below(m)]).collect();
        let exclude_offsets = (0..=b as i64).map(|row| 2 * row).collect();
        Data {
            case: self.clone(),
            queries,
            table,
            own_pool,
            own_ids,
            table_ids,
            offsets,
            positives,
            separate,
            separate_ids,
            pair_weight,
            positive_log_q,
            candidate_rows,
            own,
            log_q,
            whole_log_q,
            own_log_q,
            row_weight,
            excluded,
            exclude_offsets,
        }
    }

    /// How far from the reference a result may be, in units of the largest number of its row: rounding of the operands that the tensor
    /// cores take, times the size of a score's terms.
    fn tolerance(&self) -> f64 {
        let dim = self.sizes.3 as f64;
        let condition = if self.similarity == Dot { 1.0 + dim / 6.0 } else { 6.0 };
        16.0 * epsilon(self.dtype) * condition
    }
}

/// A case's arrays.
struct Data {
    case: Case,
    queries: Storage,
    table: Storage,
    own_pool: Storage,
    own_ids: Vec<u64>,
    table_ids: Vec<u64>,
    offsets: Vec<i64>,
    positives: Vec<u32>,
    separate: Storage,
    separate_ids: Vec<u64>,
    pair_weight: Vec<f32>,
    positive_log_q: Vec<f32>,
    candidate_rows: Vec<u32>,
    own: Vec<u32>,
    log_q: Vec<f32>,
    whole_log_q: Vec<f32>,
    own_log_q: Vec<f32>,
    row_weight: Vec<f32>,
    excluded: Vec<u64>,
    exclude_offsets: Vec<i64>,
}

impl Data {
    fn batch(&self) -> Batch<'_> {
        let (case, dim) = (&self.case, self.case.sizes.3);
        fn with<'a>(case: &Case, pool: Pool<'a>, log_q: &'a [f32]) -> Pool<'a> {
            if case.log_q { pool.log_q(log_q) } else { pool }
        }
        let queries = self.queries.view(dim);
        let own_pool = || with(case, Pool::new(self.own_pool.view(dim)).ids(&self.own_ids), &self.log_q);
        fn with_log_q<'a>(data: &'a Data, builder: BatchBuilder<'a>) -> BatchBuilder<'a> {
            if data.case.log_q { builder.positive_log_q(&data.positive_log_q) } else { builder }
        }
        let mut builder = match case.candidates {
            Candidates::Pools { rows, own, whole } => {
                let table = Table::new(self.table.view(dim));
                let table = if case.ids { table.ids(&self.table_ids) } else { table };
                let table = if case.gradient { table } else { table.without_gradient() };
                let mut builder = Batch::of_table(queries, table).positives(&self.positives);
                if rows {
                    builder = builder.pool(with(case, Pool::rows(&self.candidate_rows), &self.log_q));
                }
                if own {
                    builder = builder.pool(own_pool());
                }
                if whole {
                    builder = builder.pool(with(case, Pool::whole_table(), &self.whole_log_q));
                }
                if rows && whole {
                    builder = builder.pool(with(case, Pool::rows(&self.positives), &self.positive_log_q));
                }
                with_log_q(self, builder)
            }
            Candidates::Embeddings => Batch::builder(queries, own_pool()).positives(&self.positives),
            Candidates::Separate => {
                let builder = Batch::builder(queries, own_pool()).positive_embeddings(self.separate.view(dim));
                with_log_q(self, builder.positive_ids(&self.separate_ids))
            }
        };
        if case.own > 0 {
            let negatives = RowNegatives::new(&self.own, case.own);
            builder = builder.row_negatives(if case.log_q { negatives.log_q(&self.own_log_q) } else { negatives });
        }
        if case.several {
            builder = builder.positive_offsets(&self.offsets);
            if case.log_q {
                builder = builder.positive_weight(&self.pair_weight);
            }
        }
        let builder = builder.row_weight(&self.row_weight).excluded_ids(&self.exclude_offsets, &self.excluded);
        builder.build().expect("a valid batch")
    }
}

fn assert_near(name: &str, case: &Case, found: &[f64], wanted: &[f64], width: usize) {
    assert_eq!(found.len(), wanted.len(), "{name} of {case:?}");
    let largest = wanted.iter().filter(|x| x.is_finite()).fold(0.0f64, |max, x| max.max(x.abs()));
    let rows = found.chunks(width).zip(wanted.chunks(width)).enumerate();
    for (row, (found, wanted)) in rows {
        let scale = wanted.iter().filter(|x| x.is_finite()).fold(0.01 * largest, |max, x| max.max(x.abs()));
        for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
            let near = (found - wanted).abs() <= case.tolerance() * scale;
            assert!(near || found == wanted, "{name}[{row}, {i}] is {found}, not {wanted}: {case:?}");
        }
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

fn agrees(cuda: &mut Cuda, case: &Case) {
    let (data, loss) = (case.data(), &case.loss());
    let batch = &data.batch();
    let request = Request::value_and_grad().with_moments().with_rank();
    let (mut found, mut found_gradients) = (Default::default(), Gradients::default());
    cuda.compute(batch, loss, request, &mut found, Some(&mut found_gradients)).expect("a loss that fits");
    let (mut wanted, mut wanted_gradients) = (Default::default(), Gradients::default());
    Reference::new().compute(batch, loss, request, &mut wanted, Some(&mut wanted_gradients)).expect("a loss that fits");
    let (s, w) = (&found.statistics, &wanted.statistics);
    assert_eq!(s.num_negatives, w.num_negatives, "{case:?}");
    assert_near("lse", case, &s.lse, &w.lse, s.lse.len());
    assert_near("positive", case, &s.positive, &w.positive, s.positive.len());
    assert_near("loss", case, &found.loss, &wanted.loss, found.loss.len());
    assert_near("probability", case, &found.probability, &wanted.probability, found.probability.len());
    assert_near("total", case, &[found.total], &[wanted.total], 1);
    let (moments, wanted_moments) = (s.moments.as_ref().expect("asked for"), w.moments.as_ref().expect("asked for"));
    assert_near("entropy", case, &moments.entropy, &wanted_moments.entropy, moments.entropy.len());
    let scores = (&moments.expected_score, &wanted_moments.expected_score);
    assert_near("expected_score", case, scores.0, scores.1, scores.0.len());
    let (rank, wanted_rank) = (s.rank.as_ref().expect("asked for"), w.rank.as_ref().expect("asked for"));
    // Of f64 scores no two are equal that f32 cannot tell apart.
    let both = |rank: &catalog_softmax::Rank| rank.above.iter().zip(&rank.ties).map(|(a, t)| a + t).collect::<Vec<_>>();
    assert_eq!(both(rank), both(wanted_rank), "ranks of {case:?}");
    let (g, w) = (&found_gradients, &wanted_gradients);
    let dim = case.sizes.3;
    assert_near("d_queries", case, &wide(&g.d_queries.values), &w.d_queries.values, dim);
    for (p, (d, wanted)) in g.d_candidates.iter().zip(&w.d_candidates).enumerate() {
        assert_near(&format!("d_candidates[{p}]"), case, &wide(&d.values), &wanted.values, dim);
    }
    match (&g.d_positive_embeddings, &w.d_positive_embeddings) {
        (Some(d), Some(wanted)) => assert_near("d_positive_embeddings", case, &wide(&d.values), &wanted.values, dim),
        (d, wanted) => assert!(d.is_none() && wanted.is_none()),
    }
    match (&g.d_table, &w.d_table) {
        (Some(TableGradient::Dense(d)), Some(TableGradient::Dense(wanted))) => {
            assert_near("d_table", case, &wide(&d.values), &wanted.values, dim);
            let mut sparse = Gradients::default();
            cuda.compute(batch, loss, request.row_sparse(), &mut found, Some(&mut sparse)).expect("a loss that fits");
            let sparse = sparse.d_table.as_ref().and_then(TableGradient::row_sparse).expect("asked for").clone();
            assert!(sparse.rows.is_sorted_by(|a, b| a < b), "{case:?}");
            for row in 0..d.rows {
                match sparse.rows.binary_search(&(row as u32)) {
                    Ok(at) => assert_eq!(sparse.values.row(at), d.row(row), "row {row} of {case:?}"),
                    Err(_) => assert!(d.row(row).iter().all(|&x| x == 0.0), "row {row} of {case:?}"),
                }
            }
        }
        (d, wanted) => assert!(d.is_none() && wanted.is_none(), "{case:?}"),
    }
}

/// Rows with several positives, one, none, and one twice; by index, of their own embeddings, and rows of a table.
pub fn several_positives_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, Candidates::Separate, ROWS] {
        for (dtype, similarity, log_q) in
            [(DType::F32, Cosine, false), (DType::F16, Cosine, true), (DType::Bf16, Dot, true)]
        {
            agrees(cuda, &Case { dtype, similarity, log_q, several: true, ..Case::new(candidates) });
        }
    }
}

pub fn filters_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, Candidates::Separate, ROWS, WHOLE] {
        for filter in [Filter::Margin(0.3), Filter::Margin(-0.4), Filter::Ratio(0.6)] {
            for several in [false, true] {
                agrees(cuda, &Case { filter, several, own: 9, ..Case::new(candidates) }.without_own_unless_table());
            }
        }
    }
    agrees(cuda, &Case { filter: Filter::Margin(0.5), similarity: Dot, own: 20, ..Case::new(WHOLE) });
}

impl Case {
    fn without_own_unless_table(self) -> Self {
        Case { own: if self.has_table() { self.own } else { 0 }, ..self }
    }
}

pub fn pools_by_reference_agree(cuda: &mut Cuda) {
    for candidates in [ROWS, WHOLE, ALL] {
        for (dtype, similarity, log_q) in
            [(DType::F32, Cosine, false), (DType::F16, Cosine, true), (DType::Bf16, Dot, true)]
        {
            for ids in [false, true] {
                agrees(cuda, &Case { dtype, similarity, log_q, ids, ..Case::new(candidates) });
            }
        }
    }
    // Rows that tensor cores take in several slices, and that do not start at multiples of 16 bytes; several splits.
    agrees(cuda, &Case { sizes: (140, 700, 300, 301), log_q: true, ..Case::new(ALL) });
    agrees(cuda, &Case { gradient: false, ..Case::new(ALL) });
}

pub fn negatives_of_rows_own_agree(cuda: &mut Cuda) {
    for candidates in [NO_POOL, ROWS, ALL] {
        for (dtype, similarity, log_q) in
            [(DType::F32, Cosine, false), (DType::F16, Cosine, true), (DType::Bf16, Dot, true)]
        {
            for several in [false, true] {
                agrees(cuda, &Case { dtype, similarity, log_q, several, own: 13, ids: log_q, ..Case::new(candidates) });
            }
        }
    }
    // More negatives than threads, and rows wider than a warp holds.
    agrees(cuda, &Case { own: 300, sizes: (9, 10, 500, 300), log_q: true, ..Case::new(NO_POOL) });
}

/// The most similar negatives among candidates by reference.
pub fn hardest_negatives_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, ROWS, WHOLE, ALL] {
        for (several, ids) in [(false, false), (true, true)] {
            let case = Case { several, ids, ..Case::new(candidates) };
            let data = case.data();
            let batch = &data.batch();
            let found = cuda.hardest_negatives(batch, Cosine, 7).expect("a batch with pools");
            let wanted = Reference::new().hardest_negatives(batch, Cosine, 7).expect("a batch with pools");
            for (i, (&found, &wanted)) in found.scores.iter().zip(&wanted.scores).enumerate() {
                let near = (f64::from(found) - wanted).abs() < 1e-5 || f64::from(found) == wanted;
                assert!(near, "scores[{i}] is {found}, not {wanted}: {case:?}");
            }
            // Copies of a row tie, and then the smaller index comes first.
            assert_eq!(found.indices, wanted.indices, "{case:?}");
        }
    }
}

/// A case's arrays in device memory, and a place for everything that a step on them writes.
struct OnDevice {
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
    fn new(stream: &Arc<CudaStream>, data: &Data) -> Self {
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

    fn batch(&self, case: &Case) -> DeviceBatch<'_> {
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
fn agrees_on_device(cuda: &mut Cuda, case: &Case) {
    let (stream, mut on_device) = on_stream();
    let (data, loss, dim) = (case.data(), case.loss(), case.sizes.3);
    let batch = data.batch();
    let (mut wanted, mut gradients) = (Output::default(), Gradients::default());
    let request = Request::value_and_grad().with_moments().with_rank();
    cuda.compute(&batch, &loss, request, &mut wanted, Some(&mut gradients)).expect("a loss that fits");
    let inputs = OnDevice::new(&stream, &data);
    let (b, pairs) = (batch.num_queries(), batch.num_positives());
    let rows = gradients.d_table.as_ref().and_then(TableGradient::dense).map_or(0, |d| d.rows);
    let by_reference: usize = match case.candidates {
        Candidates::Pools { rows: true, .. } => case.sizes.1,
        _ => 0,
    };
    let most = (by_reference + b * case.own + pairs).min(rows);
    let is_whole = match case.candidates {
        Candidates::Pools { rows, own, whole } => whole || !rows && !own && case.own == 0,
        _ => true,
    };
    for sparse in [false, true] {
        if sparse && (is_whole || rows == 0) {
            continue;
        }
        let nan = |count: usize| up(&stream, &vec![f64::NAN; count]);
        let nan32 = |count: usize| up(&stream, &vec![f32::NAN; count.max(1)]);
        let all_ones = |count: usize| up(&stream, &vec![u64::MAX; count]);
        let (mut total, mut losses, mut probability, mut lse, mut positive) =
            (nan(1), nan(b), nan(pairs), nan(b), nan(pairs));
        let (mut expected_score, mut entropy, mut d_positive) = (nan(b), nan(b), nan(pairs));
        let (mut num_negatives, mut above, mut ties) = (all_ones(b), all_ones(pairs), all_ones(pairs));
        let (mut d_queries, mut d_temperature, mut num_rows) = (nan32(b * dim), nan(1), all_ones(1));
        let pools = gradients.d_candidates.iter();
        let mut d_pools: Vec<_> = pools.map(|d| (d.rows > 0).then(|| nan32(d.values.len()))).collect();
        let mut d_separate = nan32(pairs * dim);
        let count = if sparse { most } else { rows };
        let (mut d_table, mut table_rows) = (nan32(count * dim), up(&stream, &vec![u32::MAX; most.max(1)]));
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
        let found_rows = stream.clone_dtoh(&table_rows).expect("a result")[..named].to_vec();
        assert!(found_rows.is_sorted_by(|a, b| a < b), "{case:?}");
        let wanted: Vec<f32> = found_rows.iter().flat_map(|&row| dense.row(row as usize)).copied().collect();
        near32("d_table.values", &d_table, &wanted);
        let others = (0..rows as u32).filter(|row| found_rows.binary_search(row).is_err());
        assert!(others.into_iter().all(|row| dense.row(row as usize).iter().all(|&x| x == 0.0)), "{case:?}");
    }
}

pub fn steps_on_device_memory_agree(cuda: &mut Cuda) {
    for candidates in [Candidates::Embeddings, Candidates::Separate, NO_POOL, ROWS, WHOLE, ALL] {
        let own = if matches!(candidates, Candidates::Pools { .. }) { 7 } else { 0 };
        for (several, log_q) in [(false, true), (true, false), (true, true)] {
            agrees_on_device(cuda, &Case { several, log_q, own, ids: log_q, ..Case::new(candidates) });
        }
        agrees_on_device(cuda, &Case { filter: Filter::Margin(-0.2), several: true, own, ..Case::new(candidates) });
    }
    agrees_on_device(cuda, &Case { dtype: DType::Bf16, ..Case::new(NO_POOL) });
    // Several blocks of a sort, and of its digits.
    agrees_on_device(cuda, &Case { own: 90, sizes: (60, 200, 300, 8), ..Case::new(ROWS) });
    agrees_on_device(cuda, &Case { gradient: false, own: 5, ..Case::new(ROWS) });
}

/// Rows that the table does not have, and offsets out of order: the step stays in bounds, and the fault names them.
pub fn rows_that_are_none_are_faults(_: &mut Cuda) {
    type Spoil = fn(&mut Data);
    let spoil: [(&str, Spoil); 4] = [
        ("candidate_rows[3]", |data| data.candidate_rows[3] = 90),
        ("row_negatives[8]", |data| data.own[8] = 1 << 30),
        ("positives[2]", |data| data.positives[2] = u32::MAX),
        ("positive_offsets[5]", |data| data.offsets[5] = 1 << 40),
    ];
    for (argument, spoil) in spoil {
        let (stream, mut on_device) = on_stream();
        let case = Case { several: true, own: 7, ..Case::new(ROWS) };
        let mut data = case.data();
        spoil(&mut data);
        let inputs = OnDevice::new(&stream, &data);
        let (b, m, dim) = (case.sizes.0, case.sizes.2, case.sizes.3);
        let mut total = up(&stream, &[0.0f64]);
        let (mut d_queries, mut d_table) = (up(&stream, &vec![0.0f32; b * dim]), up(&stream, &vec![0.0f32; m * dim]));
        let mut output = DeviceOutput::new(DeviceSliceMut::new(&mut total));
        let mut to = DeviceGradients::new(DeviceSliceMut::new(&mut d_queries), vec![None]);
        to.d_table = Some(DeviceTableGradient::Dense(DeviceSliceMut::new(&mut d_table)));
        output.gradients = Some(to);
        on_device.compute_on_device(&inputs.batch(&case), &case.loss(), &mut output).expect("a loss that fits");
        drop(output);
        let error = on_device.fault().expect_err("a fault").to_string();
        assert!(error.contains(argument), "{error}, not {argument}");
    }
}
