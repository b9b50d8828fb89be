//! Problems as small as they can be that use every kernel, take several units of work for each block and make every ring of buffers go
//! round: for the race detector, under which a kernel takes many times as long. (`CUDA_EMULATOR_SM=2` makes sure of the rings.)

use catalog_softmax::{Backend, Correction, Cuda, DType, Reduction, Request, Similarity};

use crate::agrees_on;
use crate::open::on_stream;
use crate::steps::{assert_same, everything, from_host};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::on_device::{OnDevice, Results};
use catalog_softmax_testing::problem::{Problem, Storage};
use catalog_softmax_testing::step::Step;
use catalog_softmax_testing::tolerance::Expected;
use catalog_softmax_testing::topk::{SearchData, Values, is_exact};

fn config(b: usize, n: usize, dim: usize, dtype: DType, similarity: Similarity) -> Config {
    let temperature = if similarity == Similarity::Dot { 1.0 } else { 0.1 };
    let (correction, masking) = (Correction::LogQ, Masking::Excluded);
    Config { dtype, similarity, temperature, correction, masking, ..Config::new(b, n, dim) }
}

fn agree(cuda: &mut Cuda, cases: &[(usize, usize, usize, DType, Similarity)]) {
    for &(b, n, dim, dtype, similarity) in cases {
        let config = config(b, n, dim, dtype, similarity);
        agrees_on(cuda, &config.problem(), &format!("{config:?}"));
    }
}

/// Hopper's kernels for rows of one, two and four chunks. On other devices these are the portable ones.
pub fn narrow(cuda: &mut Cuda) {
    use Similarity::{Cosine, Dot};
    agree(
        cuda,
        &[(520, 700, 64, DType::F16, Cosine), (130, 700, 128, DType::Bf16, Dot), (100, 700, 256, DType::F16, Dot)],
    );
}

/// Those for rows of more than 256 elements.
pub fn wide(cuda: &mut Cuda) {
    agree(cuda, &[(140, 500, 264, DType::F16, Similarity::Cosine), (40, 300, 576, DType::Bf16, Similarity::Dot)]);
}

/// The portable kernels: rows that stay in shared memory and rows that do not, of every type, and output columns in several slices.
pub fn portable(cuda: &mut Cuda) {
    use Similarity::{Cosine, Dot};
    agree(
        cuda,
        &[(140, 330, 33, DType::F32, Cosine), (130, 200, 300, DType::F32, Dot), (140, 200, 301, DType::Bf16, Cosine)],
    );
    let problem = config(140, 200, 40, DType::F16, Cosine).problem();
    let (batch, mut output) = (problem.batch().expect("a valid problem"), Step::default());
    let request = Request::value_and_grad().with_moments();
    output.compute(cuda, &batch, &problem.loss, request).expect("a loss that fits");
    Expected::new(&problem, DType::F16).check(&output).unwrap_or_else(|error| panic!("moments: {error}"));
}

fn gradients_of(cuda: &mut Cuda, problem: &Problem) -> Vec<f32> {
    let batch = problem.batch().expect("a valid problem");
    let (_, gradients) = cuda.value_and_grad(&batch, &problem.loss).expect("a loss that fits");
    gradients.d_candidates[0].values.clone()
}

/// Rows that are not finite, as a query without weight and as a candidate that all queries exclude, change no other gradient.
pub fn spoiled(cuda: &mut Cuda) {
    for (dtype, dim) in [(DType::F16, 64), (DType::Bf16, 264)] {
        let config = Config { weights: true, ..config(140, 300, dim, dtype, Similarity::Dot) };
        let mut clean = config.problem();
        let (candidate, query) = (133, 130);
        clean.row_weight.as_mut().expect("asked for")[query] = 0.0;
        let ids = clean.pools[0].ids.as_mut().expect("asked for");
        ids[candidate] = u64::MAX;
        let (offsets, excluded) = clean.excluded.as_mut().expect("asked for");
        for row in (0..offsets.len() - 1).rev() {
            excluded.insert(offsets[row] as usize, u64::MAX);
        }
        offsets.iter_mut().enumerate().for_each(|(row, offset)| *offset += row as i64);
        let set = |storage: &Storage, row: usize| storage.map(|values| values[row * dim + 2] = f32::NAN);
        let mut problem = clean.clone();
        problem.queries = set(&clean.queries, query);
        problem.pools[0].candidates = set(&clean.pools[0].candidates, candidate);
        let (wanted, found) = (gradients_of(cuda, &clean), gradients_of(cuda, &problem));
        assert!(wanted.iter().all(|x| x.is_finite()) && wanted.iter().any(|&x| x != 0.0), "a case for the test");
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            assert!(found.to_bits() == wanted.to_bits(), "{dtype:?}, candidate {}: {found}, not {wanted}", i / dim);
        }
    }
}

/// What surrounds the stream on device memory: every reduction, and the symmetric loss.
pub fn losses(cuda: &mut Cuda) {
    let (stream, mut on_device) = on_stream();
    let base = Config { masking: Masking::Ids, weights: true, ..Config::new(300, 70, 17) };
    for reduction in [Reduction::Mean, Reduction::WeightedMean] {
        for symmetric in [false, true] {
            let problem = Config { reduction, symmetric, ..base.clone() }.problem();
            let wanted = from_host(cuda, &problem);
            let (inputs, mut results) = (OnDevice::new(&stream, &problem), Results::new(&stream, &problem));
            let mut output = results.output(everything());
            on_device.compute_on_device(&inputs.batch(&problem), &problem.loss, &mut output).expect("a loss that fits");
            drop(output);
            on_device.fault().expect("valid input");
            let what = format!("{reduction:?}, symmetric: {symmetric}");
            assert_same(&results.download(&stream, &wanted), &wanted, &what);
        }
    }
}

/// Lists short and long, that overflow their buffers several times.
pub fn searches(cuda: &mut Cuda) {
    for (k, n) in [(3, 900), (100, 900)] {
        let data = SearchData::new(70, &[n, 65], 40, DType::F16, Values::Whole, true);
        is_exact(&data.top_k(cuda, k), &data.ranked(), k);
    }
}
