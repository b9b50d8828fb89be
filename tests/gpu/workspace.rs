//! Workspaces of the caller's, backends that go from stream to stream, and steps in two halves.

use catalog_softmax::cuda::{Cuda, DeviceSlice, DeviceSliceMut, DeviceTopK, DeviceUpstream};
use catalog_softmax::{Correction, Error, Request};
use cudarc::driver::CudaSlice;

use super::open::{on_stream, on_stream_for_capture};
use super::steps::{assert_same, everything, from_host};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::on_device::{OnDevice, Results, up};
use catalog_softmax_testing::problem::Problem;

fn problem() -> Problem {
    let config =
        Config { masking: Masking::Ids, correction: Correction::LogQ, weights: true, ..Config::new(70, 200, 24) };
    config.problem()
}

/// What a step in a workspace of exactly the planned bytes gives, of a backend that holds no memory itself.
pub fn steps_in_the_callers_workspace_allocate_nothing(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let symmetric = Config { symmetric: true, pools: vec![50], ..Config::new(50, 50, 17) };
    for problem in [problem(), symmetric.problem()] {
        let wanted = from_host(cuda, &problem);
        let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
        let batch = inputs.batch(&problem);
        let plan = on_device.plan_on_device(&batch, &problem.loss, everything()).expect("a loss that fits");
        // Whatever was there before: all ones are NaN, and no address.
        let mut workspace = up(&stream, &vec![0xffu8; plan.workspace_bytes]);
        let mut output = results.output(everything());
        output.workspace = Some(DeviceSliceMut::new(&mut workspace));
        on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits");
        on_device.fault().expect("valid input");
        assert_same(&results.download(&stream, &wanted), &wanted, "in the caller's workspace");
        assert_eq!(on_device.device_bytes(), 0);
    }
}

pub fn workspaces_that_do_not_fit_are_errors(_: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let problem = problem();
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let batch = inputs.batch(&problem);
    let needed =
        on_device.plan_on_device(&batch, &problem.loss, everything()).expect("a loss that fits").workspace_bytes;
    let mut workspace = up(&stream, &vec![0u8; needed + 256]);
    for (start, bytes, rule) in
        [(0, needed - 1, format!("at least {needed} bytes")), (8, needed, "256 bytes".to_owned())]
    {
        let mut part = workspace.slice_mut(start..start + bytes);
        let mut output = results.output(everything());
        output.workspace = Some(DeviceSliceMut::new(&mut part));
        let error = on_device.compute_on_device(&batch, &problem.loss, &mut output).expect_err("refused");
        assert!(matches!(error, Error::Shape { .. }), "{error:?}");
        let error = error.to_string();
        assert!(error.starts_with("workspace has") && error.contains(&rule), "{error}");
    }
    let mut output = results.output(everything());
    output.gradients.as_mut().expect("asked for").workspace = Some(DeviceSliceMut::new(&mut workspace));
    let error = on_device.compute_on_device(&batch, &problem.loss, &mut output).expect_err("refused").to_string();
    assert!(error.starts_with("gradients.workspace"), "{error}");
}

/// The loss first, and its gradients later, from what the first half kept.
pub fn a_step_in_two_halves_gives_the_gradients_of_one(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    for separate in [false, true] {
        let config = Config {
            masking: Masking::Ids,
            correction: Correction::CorrectedLogQ,
            weights: true,
            separate,
            ..Config::new(70, 200, 24)
        };
        let problem = config.problem();
        let wanted = from_host(cuda, &problem);
        let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
        let batch = inputs.batch(&problem);
        let request = Request::value_and_grad();
        let plan = on_device.plan_on_device(&batch, &problem.loss, request).expect("a loss that fits");
        let (b, dim) = (problem.num_queries(), problem.dim);
        let f64s = || up(&stream, &vec![f64::NAN; b]);
        let (mut lse, mut d_lse, mut num_negatives) = (f64s(), f64s(), up(&stream, &vec![u64::MAX; b]));
        let mut expected_negative = up(&stream, &vec![f32::NAN; b * dim]);
        let mut workspace: CudaSlice<u8> = up(&stream, &vec![0xff; plan.workspace_bytes]);

        let mut output = results.output(everything());
        output.gradients = None;
        (output.moments, output.rank) = (None, None);
        output.lse = Some(DeviceSliceMut::new(&mut lse));
        output.num_negatives = Some(DeviceSliceMut::new(&mut num_negatives));
        output.d_lse = Some(DeviceSliceMut::new(&mut d_lse));
        output.expected_negative = Some(DeviceSliceMut::new(&mut expected_negative));
        output.workspace = Some(DeviceSliceMut::new(&mut workspace));
        assert_eq!(output.request(), request);
        on_device.compute_on_device(&batch, &problem.loss, &mut output).expect("a loss that fits");

        let d_positive: Vec<f64> = stream.clone_dtoh(&d_lse).expect("results").iter().map(|d| -d).collect();
        let d_positive = up(&stream, &d_positive);
        let upstream = DeviceUpstream {
            lse: DeviceSlice::new(&lse),
            num_negatives: DeviceSlice::new(&num_negatives),
            expected_negative: DeviceSlice::new(&expected_negative),
            d_lse: DeviceSlice::new(&d_lse),
            d_positive: DeviceSlice::new(&d_positive),
        };
        let mut output = results.output(request);
        let gradients = output.gradients.as_mut().expect("asked for");
        gradients.workspace = Some(DeviceSliceMut::new(&mut workspace));
        on_device.gradients_on_device(&batch, &problem.loss, &upstream, gradients).expect("a loss that fits");
        on_device.fault().expect("valid input");
        assert_eq!(on_device.device_bytes(), 0);
        let mut found = wanted.clone();
        let downloaded = results.download(&stream, &wanted);
        (found.total, found.loss) = (downloaded.total, downloaded.loss.clone());
        found.gradients = downloaded.gradients.clone();
        assert_same(&found, &wanted, &format!("separate {separate}"));
    }
    let problem = Config { symmetric: true, pools: vec![30], ..Config::new(30, 30, 16) }.problem();
    let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
    let mut d_lse = up(&stream, &[0f64; 30]);
    let mut output = results.output(Request::value());
    output.d_lse = Some(DeviceSliceMut::new(&mut d_lse));
    let step = on_device.compute_on_device(&inputs.batch(&problem), &problem.loss, &mut output);
    assert!(matches!(step, Err(Error::DoesNotApply { .. })), "{step:?}");
}

/// Step, search and graph on one stream, then on another, and on the first one again.
pub fn a_backend_goes_from_stream_to_stream(cuda: &mut Cuda) {
    let (first, mut on_device) = on_stream_for_capture();
    let second = first.context().new_stream().expect("a stream");
    let problem = problem();
    let wanted = from_host(cuda, &problem);
    let (inputs, mut results) = (OnDevice::new(&first, &problem), Results::new(&first, &problem));
    let (there, mut results_there) = (OnDevice::new(&second, &problem), Results::new(&second, &problem));
    let graph = on_device.capture(&inputs.batch(&problem), &problem.loss, &mut results.output(everything()));
    let graph = graph.expect("a step can be captured");

    on_device.move_to(second.clone()).expect("a stream of the same context");
    assert_eq!(on_device.device_bytes(), 0, "memory is of a stream");
    let batch = there.batch(&problem);
    on_device
        .compute_on_device(&batch, &problem.loss, &mut results_there.output(everything()))
        .expect("a loss that fits");
    on_device.fault().expect("valid input");
    assert_same(&results_there.download(&second, &wanted), &wanted, "on the second stream");
    let refused = on_device.replay(&graph, &inputs.batch(&problem), &mut results.output(everything()));
    assert!(refused.is_err_and(|error| error.to_string().starts_with("graph is of another backend")));

    on_device.move_to(first.clone()).expect("a stream of the same context");
    on_device.replay(&graph, &inputs.batch(&problem), &mut results.output(everything())).expect("the graph runs");
    on_device.fault().expect("valid input");
    assert_same(&results.download(&first, &wanted), &wanted, "back on the first stream");

    let per_thread = first.context().per_thread_stream();
    let error = on_device.move_to(per_thread).expect_err("refused").to_string();
    assert!(error.starts_with("stream is the per-thread default stream"), "{error}");
}

/// A search in a workspace of exactly the planned bytes.
pub fn a_search_in_the_callers_workspace_allocates_nothing(_: &mut Cuda) {
    use catalog_softmax::Similarity::Cosine;
    use catalog_softmax::cuda::{DevicePool, DeviceSearch};
    use catalog_softmax_testing::on_device::DeviceStorage;
    let (stream, mut on_device) = on_stream();
    let (problem, k) = (problem(), 7);
    let views = [&problem.queries, &problem.pools[0].candidates].map(|rows| DeviceStorage::new(&stream, rows));
    let [queries, candidates] = views.each_ref().map(|rows| rows.view(problem.dim));
    let search = DeviceSearch::new(queries, DevicePool::new(candidates));
    let count = problem.num_queries() * k;
    let found = [false, true].map(|lent| {
        let (mut indices, mut scores) = (up(&stream, &vec![7u32; count]), up(&stream, &vec![f32::NAN; count]));
        let plan = on_device.plan_top_k_on_device(&search, Cosine, k).expect("a search that fits");
        let mut workspace = up(&stream, &vec![0xffu8; plan.workspace_bytes]);
        let before = on_device.device_bytes();
        let mut top = DeviceTopK {
            indices: DeviceSliceMut::new(&mut indices),
            scores: DeviceSliceMut::new(&mut scores),
            workspace: lent.then(|| DeviceSliceMut::new(&mut workspace)),
        };
        on_device.top_k_on_device(&search, Cosine, k, &mut top).expect("a search that fits");
        on_device.fault().expect("valid input");
        assert!(!lent || on_device.device_bytes() == before);
        (stream.clone_dtoh(&indices).expect("results"), stream.clone_dtoh(&scores).expect("results"))
    });
    assert_eq!(found[0], found[1]);
}
