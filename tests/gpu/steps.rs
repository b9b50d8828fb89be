//! Steps on device memory: the same results as from host memory, no allocation, graphs, and faults that only the device sees.

use catalog_softmax::cuda::{
    Cuda, DeviceBatch, DeviceEmbeddings, DevicePool, DeviceSlice, DeviceSliceMut, DeviceStatistics, DeviceUpstream,
};
use catalog_softmax::{Backend, Correction, Error, Reduction, Request, RowStatistics};

use super::open::{on_stream, on_stream_for_capture};
use catalog_softmax_testing::bits::problems;
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::on_device::{DeviceStorage, OnDevice, Results, up};
use catalog_softmax_testing::problem::{PositiveData, Problem};
use catalog_softmax_testing::step::Step;

/// The argument that an error names, and how to make it wrong.
type Spoil = (&'static str, fn(&mut Problem));

pub fn everything() -> Request {
    Request::value_and_grad().with_moments().with_rank()
}

pub fn from_host(cuda: &mut Cuda, problem: &Problem) -> Step {
    let mut output = Step::default();
    let request = everything();
    let batch = problem.batch().expect("a valid problem");
    output.compute(cuda, &batch, &problem.loss, request).expect("a loss that fits");
    output
}

/// Gradients are those of the epilogue, which sums in another order: near, not the same bits.
fn assert_near(what: &str, a: impl IntoIterator<Item = f64>, b: impl IntoIterator<Item = f64>) {
    let (a, b): (Vec<f64>, Vec<f64>) = (a.into_iter().collect(), b.into_iter().collect());
    assert_eq!(a.len(), b.len(), "{what}");
    let largest = b.iter().filter(|x| x.is_finite()).fold(0.0, |m: f64, x| m.max(x.abs()));
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        let same = a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-6 * largest;
        assert!(same, "{what}[{i}] is {a}, from host memory {b}");
    }
}

pub fn assert_same(found: &Step, wanted: &Step, what: &str) {
    assert_eq!(found.statistics.num_negatives, wanted.statistics.num_negatives, "{what}");
    assert_eq!(found.statistics.rank, wanted.statistics.rank, "{what}");
    let near = |name: &str, a: &[f64], b: &[f64]| {
        assert_near(&format!("{what}: {name}"), a.iter().copied(), b.iter().copied());
    };
    near("total", &[found.total], &[wanted.total]);
    near("loss", &found.loss, &wanted.loss);
    near("probability", &found.probability, &wanted.probability);
    near("lse", &found.statistics.lse, &wanted.statistics.lse);
    near("positive", &found.statistics.positive, &wanted.statistics.positive);
    let entropy = |output: &Step| output.statistics.moments.as_ref().expect("asked for").entropy.clone();
    near("entropy", &entropy(found), &entropy(wanted));
    let (f, w) = (found.gradients.as_ref().expect("asked for"), wanted.gradients.as_ref().expect("asked for"));
    let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
    near("d_queries", &wide(&f.d_queries.values), &wide(&w.d_queries.values));
    for (f, w) in f.d_candidates.iter().zip(&w.d_candidates) {
        near("d_candidates", &wide(&f.values), &wide(&w.values));
    }
    if let (Some(f), Some(w)) = (&f.d_positive_embeddings, &w.d_positive_embeddings) {
        near("d_positive_embeddings", &wide(&f.values), &wide(&w.values));
    }
    near("temperature", &[f.d_temperature, f.d_log_temperature], &[w.d_temperature, w.d_log_temperature]);
}

/// Every correction and reduction, and the shapes of `problems`.
fn cases() -> Vec<Problem> {
    let mut cases = problems();
    let base = Config { masking: Masking::Ids, weights: true, ..Config::new(70, 200, 17) };
    for correction in [Correction::LogQ, Correction::LogQNegativesOnly, Correction::CorrectedLogQ] {
        for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean, Reduction::WeightedMean] {
            let symmetric =
                Config { correction: Correction::None, symmetric: true, reduction, pools: vec![70], ..base.clone() };
            cases.push(symmetric.problem());
            for separate in [false, true] {
                cases.push(Config { correction, reduction, separate, ..base.clone() }.problem());
            }
        }
    }
    cases
}

pub fn steps_on_device_memory_give_what_host_memory_gives(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for (c, problem) in cases().iter().enumerate() {
        let wanted = from_host(cuda, problem);
        let (inputs, mut results) = (OnDevice::new(&stream, problem), Results::new(&stream, problem));
        on_device
            .compute_on_device(&inputs.batch(problem), &problem.loss, &mut results.output(everything()))
            .expect("a loss that fits");
        on_device.fault().expect("valid input");
        assert_same(&results.download(&stream, &wanted), &wanted, &format!("case {c}"));
    }
}

/// A z-loss beside the softmax loss, its derivatives computed on the host from the device's statistics.
pub fn an_epilogue_of_your_own_on_device_memory(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let config =
        Config { masking: Masking::Ids, correction: Correction::LogQ, pools: vec![90, 40], ..Config::new(50, 1, 20) };
    for separate in [false, true] {
        let problem = Config { separate, ..config.clone() }.problem();
        let batch = problem.batch().expect("a valid problem");
        let z_loss = |statistics: &RowStatistics| {
            let mut epilogue = problem.loss.epilogue(&batch, statistics).expect("statistics of the batch");
            for (d_lse, lse) in epilogue.d_lse.iter_mut().zip(&statistics.lse) {
                *d_lse += 2e-2 * lse;
            }
            epilogue
        };
        let mut wanted = from_host(cuda, &problem);
        let epilogue = z_loss(&wanted.statistics);
        let (d_lse, d_positive) = (&epilogue.d_lse, &epilogue.d_positive);
        let gradients = cuda.gradients(&batch, &problem.loss, &wanted.statistics, d_lse, d_positive);
        wanted.gradients = Some(gradients.expect("statistics with gradients"));

        let (b, dim) = (problem.num_queries(), problem.dim);
        let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
        let (mut lse, mut positive) = (up(&stream, &vec![f64::NAN; b]), up(&stream, &vec![f64::NAN; b]));
        let mut num_negatives = up(&stream, &vec![u64::MAX; b]);
        let mut expected_negative = up(&stream, &vec![f32::NAN; b * dim]);
        let mut places = DeviceStatistics {
            lse: DeviceSliceMut::new(&mut lse),
            positive: DeviceSliceMut::new(&mut positive),
            num_negatives: DeviceSliceMut::new(&mut num_negatives),
            expected_negative: Some(DeviceSliceMut::new(&mut expected_negative)),
            workspace: None,
        };
        let device_batch = inputs.batch(&problem);
        on_device.statistics_on_device(&device_batch, &problem.loss, &mut places).expect("a loss that fits");
        let mut statistics = wanted.statistics.clone();
        statistics.lse = stream.clone_dtoh(&lse).expect("results");
        statistics.positive = stream.clone_dtoh(&positive).expect("results");
        statistics.num_negatives = stream.clone_dtoh(&num_negatives).expect("results");
        let epilogue = z_loss(&statistics);
        let (d_lse, d_positive) = (up(&stream, &epilogue.d_lse), up(&stream, &epilogue.d_positive));
        let upstream = DeviceUpstream {
            lse: DeviceSlice::new(&lse),
            num_negatives: DeviceSlice::new(&num_negatives),
            expected_negative: DeviceSlice::new(&expected_negative),
            d_lse: DeviceSlice::new(&d_lse),
            d_positive: DeviceSlice::new(&d_positive),
        };
        let mut output = results.output(Request::value_and_grad());
        let gradients = output.gradients.as_mut().expect("asked for");
        on_device.gradients_on_device(&device_batch, &problem.loss, &upstream, gradients).expect("a loss that fits");
        on_device.fault().expect("valid input");
        let mut found = wanted.clone();
        found.statistics = statistics;
        found.gradients = results.download(&stream, &wanted).gradients;
        assert_same(&found, &wanted, &format!("separate {separate}"));
    }
}

pub fn a_reserved_step_allocates_nothing_and_replays_as_a_graph(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream_for_capture();
    let config = Config { masking: Masking::Excluded, correction: Correction::LogQ, ..Config::new(150, 400, 40) };
    let problem = config.problem();
    let wanted = from_host(cuda, &problem);
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let request = everything();
    let batch = inputs.batch(&problem);
    let planned = on_device.plan_on_device(&batch, &problem.loss, request).expect("a loss that fits").workspace_bytes;
    assert_eq!(on_device.device_bytes(), 0, "planning allocates nothing");
    on_device.reserve(&batch, &problem.loss, request).expect("memory");
    assert_eq!(on_device.device_bytes(), planned);
    let mut output = results.output(request);
    let graph = on_device.capture(&batch, &problem.loss, &mut output).expect("a step can be captured");
    assert_eq!((on_device.device_bytes(), graph.device_bytes()), (planned, planned));
    for replay in 0..2 {
        on_device.replay(&graph, &batch, &mut results.output(request)).expect("the graph runs");
        on_device.fault().expect("valid input");
        assert_same(&results.download(&stream, &wanted), &wanted, &format!("replay {replay}"));
    }
}

pub fn faults_that_only_the_device_sees_become_errors(_: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let config = Config {
        masking: Masking::Excluded,
        correction: Correction::LogQ,
        weights: true,
        pools: vec![90, 30],
        ..Config::new(40, 1, 9)
    };
    let clean = config.problem();
    let spoils: [Spoil; 5] = [
        ("positives[7]", |p| {
            let PositiveData::Index(index) = &mut p.positives else { panic!("by index") };
            (index[7], index[8]) = (120, u32::MAX);
        }),
        ("exclude_offsets[3]", |p| p.excluded.as_mut().expect("asked for").0[4] = -5),
        ("log_q[95]", |p| p.pools[1].log_q.as_mut().expect("asked for")[5] = f32::NAN),
        ("row_weight[2]", |p| p.row_weight.as_mut().expect("asked for")[2] = -1.0),
        ("row_weight[39]", |p| p.row_weight.as_mut().expect("asked for")[39] = f32::NAN),
    ];
    for (argument, spoil) in spoils {
        let mut problem = clean.clone();
        spoil(&mut problem);
        let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
        on_device
            .compute_on_device(&inputs.batch(&problem), &problem.loss, &mut results.output(everything()))
            .expect("submitted");
        match on_device.fault() {
            Err(Error::Value { argument: found, .. }) => assert_eq!(found, argument),
            other => panic!("{argument}: {other:?}"),
        }
        on_device.fault().expect("told once");
    }
    let (inputs, mut results) = (OnDevice::new(&stream, &clean), Results::new(&stream, &clean));
    on_device
        .compute_on_device(&inputs.batch(&clean), &clean.loss, &mut results.output(everything()))
        .expect("submitted");
    on_device.fault().expect("a clean step after others");
}

pub fn views_that_do_not_fit_are_errors(_: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let problem = Config::new(20, 50, 8).problem();
    let inputs = OnDevice::new(&stream, &problem);
    let short = up(&stream, &[0u32; 19]);
    let mut results = Results::new(&stream, &problem);
    let mut attempt = |batch: &DeviceBatch<'_>, results: &mut Results| {
        on_device
            .compute_on_device(batch, &problem.loss, &mut results.output(everything()))
            .expect_err("does not fit")
            .to_string()
    };
    let DeviceStorage::F32(queries) = &inputs.queries else { panic!("f32") };
    let DeviceStorage::F32(candidates) = &inputs.pools[0].0 else { panic!("f32") };
    let whole = |slice, rows, dim| DeviceEmbeddings::new(DeviceSlice::new(slice), rows, dim);
    let positives = inputs.positives.as_ref().ok().expect("by index");
    let index = || DeviceSlice::new(positives);
    let pool = || DevicePool::new(whole(candidates, 50, 8));

    let error =
        attempt(&DeviceBatch::new(whole(queries, 20, 8), pool()).positives(DeviceSlice::new(&short)), &mut results);
    assert!(error.starts_with("positives has length 19"), "{error}");
    let error = attempt(&DeviceBatch::new(whole(queries, 21, 8), pool()).positives(index()), &mut results);
    assert!(error.starts_with("queries has 160 elements"), "{error}");
    let narrow = DevicePool::new(whole(candidates, 100, 4));
    let error = attempt(&DeviceBatch::new(whole(queries, 20, 8), narrow).positives(index()), &mut results);
    assert!(error.starts_with("candidates has dim 4"), "{error}");
    // SAFETY: the view is refused for its address before anything reads it.
    let odd = unsafe { DeviceSlice::<f32>::from_raw(3, 160) };
    let error = attempt(&DeviceBatch::new(DeviceEmbeddings::new(odd, 20, 8), pool()).positives(index()), &mut results);
    assert!(error.starts_with("queries has address 0x3"), "{error}");
    results.d_queries = up(&stream, &[0.0f32; 8]);
    let error = attempt(&DeviceBatch::new(whole(queries, 20, 8), pool()).positives(index()), &mut results);
    assert!(error.starts_with("d_queries has length 8"), "{error}");
}
