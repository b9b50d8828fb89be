//! The CUDA backend: golden batches, every property, determinism and memory, on a device.
//!
//! With no device the tests are ignored, and the reason is printed; `REQUIRE_GPU=1` runs, and so fails, them instead. On an
//! emulated device (its name says so) the largest is left out.

#[path = "gpu/accumulate.rs"]
mod accumulate;
#[path = "gpu/launches.rs"]
mod launches;
#[path = "gpu/open.rs"]
mod open;
#[path = "gpu/queue.rs"]
mod queue;
#[path = "gpu/search.rs"]
mod search;
#[path = "gpu/settings.rs"]
mod settings;
#[path = "gpu/sharded.rs"]
mod sharded;
#[path = "gpu/small.rs"]
mod small;
#[path = "gpu/soundness.rs"]
mod soundness;
#[path = "gpu/steps.rs"]
mod steps;
#[path = "gpu/table_cases.rs"]
mod table_cases;
#[path = "gpu/tables.rs"]
mod tables;
#[path = "gpu/tables_on_device.rs"]
mod tables_on_device;
#[path = "gpu/workspace.rs"]
mod workspace;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use catalog_softmax::{Backend, Correction, Cpu, Cuda, DType, Error, Reference, Request, Similarity, Unavailable};
use catalog_softmax_testing::bits::{bits, problems};
use catalog_softmax_testing::generate::{Config, Masking};
use catalog_softmax_testing::golden::Golden;
use catalog_softmax_testing::golden_check::{Precision, judge, results};
use catalog_softmax_testing::golden_files::files;
use catalog_softmax_testing::problem::{PositiveData, Problem, Storage};
use catalog_softmax_testing::properties::{PROPERTIES, Property, of_tables};
use catalog_softmax_testing::step::Step;
use catalog_softmax_testing::tolerance::{Expected, compare as compare_tensors, tensors};
use catalog_softmax_testing::topk::{SearchData, TOP_K, Values};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() {
    if soundness::run_case() {
        return;
    }
    let arguments = Arguments::from_args();
    let opened = open::backend();
    let name = opened.as_ref().ok().and_then(|cuda| cuda.name().ok());
    match (&opened, &name) {
        (Err(reason), _) => println!("gpu tests are ignored: {reason}"),
        (_, name) => println!("gpu tests run on {}", name.as_deref().unwrap_or("a device without a name")),
    }
    let required = std::env::var_os("REQUIRE_GPU").is_some_and(|value| value == "1");
    let absent = opened.is_err() && !required;
    // One backend for all: its workspace goes from test to test, with what the last one left in it.
    let cuda: &'static Mutex<Result<Cuda, Error>> = Box::leak(Box::new(Mutex::new(opened)));
    let mut trials = trials(cuda);
    // What an emulator is too slow for is left out there, visibly.
    let emulated = name.is_some_and(|name| name.contains("emulator"));
    let large = own_trial(cuda, "ten_million_candidates", ten_million_candidates);
    trials.push(if emulated { large.with_ignored_flag(true).with_kind("too large for an emulator") } else { large });
    let for_emulators: [Own; 3] = [
        ("settings::too_little_memory_is_an_error_and_no_more", settings::too_little_memory_is_an_error_and_no_more),
        ("settings::a_device_of_too_low_capability_is_refused", settings::a_device_of_too_low_capability_is_refused),
        ("settings::an_old_driver_is_refused", settings::an_old_driver_is_refused),
    ];
    for (name, test) in for_emulators {
        let trial = own_trial(cuda, name, test);
        trials.push(if emulated { trial } else { trial.with_ignored_flag(true).with_kind("for an emulated device") });
    }
    let trials = trials.into_iter().map(|trial| if absent { trial.with_ignored_flag(true) } else { trial });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

type Shared = &'static Mutex<Result<Cuda, Error>>;

fn trials(cuda: Shared) -> Vec<Trial> {
    let mut trials = Vec::new();
    for file in golden_files() {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let folder = file.parent().and_then(|folder| folder.file_name()).unwrap_or_default().to_string_lossy();
        trials.push(Trial::test(format!("{folder}::{name}"), move || golden(&mut *locked(cuda)?, &file)));
    }
    for &(name, property) in PROPERTIES.iter().chain(of_tables::PROPERTIES) {
        trials.push(Trial::test(format!("property::{name}"), move || hold(cuda, property)));
    }
    for &(name, property) in TOP_K {
        trials.push(Trial::test(format!("topk::{name}"), move || {
            property(&mut *locked(cuda)?);
            Ok(())
        }));
    }
    trials.extend(soundness::trials());
    let own: [Own; 64] = [
        ("small::narrow", small::narrow),
        ("small::wide", small::wide),
        ("small::portable", small::portable),
        ("small::spoiled", small::spoiled),
        ("small::losses", small::losses),
        ("small::searches", small::searches),
        (
            "rows_too_long_for_a_cosine_are_as_rows_that_are_not_finite",
            rows_too_long_for_a_cosine_are_as_rows_that_are_not_finite,
        ),
        ("searches_leave_rows_too_long_for_a_cosine_out", searches_leave_rows_too_long_for_a_cosine_out),
        ("hopper_kernels_agree_at_the_edges_of_their_tiles", hopper_kernels_agree_at_the_edges_of_their_tiles),
        ("hopper_kernels_agree_over_many_tiles", hopper_kernels_agree_over_many_tiles),
        ("wide_kernels_agree_at_the_edges_of_their_tiles", wide_kernels_agree_at_the_edges_of_their_tiles),
        ("wide_kernels_agree_over_many_panels", wide_kernels_agree_over_many_panels),
        ("narrow_kernels_agree_where_maxima_move", narrow_kernels_agree_where_maxima_move),
        ("kernels_agree_where_all_scores_are_low", kernels_agree_where_all_scores_are_low),
        ("wide_kernels_agree_where_maxima_move", wide_kernels_agree_where_maxima_move),
        ("a_device_that_is_not_there_is_an_error", a_device_that_is_not_there_is_an_error),
        ("an_epilogue_of_your_own_on_device_memory", steps::an_epilogue_of_your_own_on_device_memory),
        ("tf32_is_as_near_as_eleven_bits_are", tf32_is_as_near_as_eleven_bits_are),
        (
            "steps_on_device_memory_give_what_host_memory_gives",
            steps::steps_on_device_memory_give_what_host_memory_gives,
        ),
        (
            "a_reserved_step_allocates_nothing_and_replays_as_a_graph",
            steps::a_reserved_step_allocates_nothing_and_replays_as_a_graph,
        ),
        (
            "launches::a_step_is_eight_launches_and_allocates_nothing_on_the_host",
            launches::a_step_is_eight_launches_and_allocates_nothing_on_the_host,
        ),
        (
            "launches::other_steps_allocate_nothing_on_the_host_either",
            launches::other_steps_allocate_nothing_on_the_host_either,
        ),
        ("faults_that_only_the_device_sees_become_errors", steps::faults_that_only_the_device_sees_become_errors),
        ("views_that_do_not_fit_are_errors", steps::views_that_do_not_fit_are_errors),
        (
            "queue::a_queue_on_the_device_holds_what_the_host_s_does",
            queue::a_queue_on_the_device_holds_what_the_host_s_does,
        ),
        (
            "queue::steps_with_a_queue_give_what_pools_in_host_memory_give",
            queue::steps_with_a_queue_give_what_pools_in_host_memory_give,
        ),
        ("queue::an_enqueue_neither_waits_nor_allocates", queue::an_enqueue_neither_waits_nor_allocates),
        ("queue::a_queue_that_does_not_fit_is_an_error", queue::a_queue_that_does_not_fit_is_an_error),
        ("the_plan_of_a_topk_is_its_memory", the_plan_of_a_topk_is_its_memory),
        (
            "search::searches_of_device_memory_find_what_host_memory_finds",
            search::searches_of_device_memory_find_what_host_memory_finds,
        ),
        (
            "search::a_reserved_search_allocates_nothing_and_replays_as_a_graph",
            search::a_reserved_search_allocates_nothing_and_replays_as_a_graph,
        ),
        ("search::strided_rows_are_searched_as_contiguous_ones", search::strided_rows_are_searched_as_contiguous_ones),
        ("search::a_queue_can_be_searched", search::a_queue_can_be_searched),
        ("search::searches_that_do_not_fit_are_errors", search::searches_that_do_not_fit_are_errors),
        (
            "search::offsets_that_are_none_are_a_fault_of_a_search",
            search::offsets_that_are_none_are_a_fault_of_a_search,
        ),
        (
            "settings::strided_rows_give_what_contiguous_ones_give",
            settings::strided_rows_give_what_contiguous_ones_give,
        ),
        ("settings::addresses_of_another_library_do", settings::addresses_of_another_library_do),
        ("settings::two_streams_do_not_meet", settings::two_streams_do_not_meet),
        ("settings::two_threads_do_not_meet", settings::two_threads_do_not_meet),
        ("tables::several_positives_agree", tables::several_positives_agree),
        ("tables::filters_agree", tables::filters_agree),
        ("tables::pools_by_reference_agree", tables::pools_by_reference_agree),
        ("tables::negatives_of_rows_own_agree", tables::negatives_of_rows_own_agree),
        ("tables::rows_with_many_uses_agree", tables::rows_with_many_uses_agree),
        ("tables::segments_end_where_a_row_ends", tables::segments_end_where_a_row_ends),
        ("tables::segments_of_a_later_pool_agree", tables::segments_of_a_later_pool_agree),
        ("tables::hardest_negatives_agree", tables::hardest_negatives_agree),
        ("tables::steps_on_device_memory_agree", tables_on_device::steps_on_device_memory_agree),
        ("tables::rows_that_are_none_are_faults", tables_on_device::rows_that_are_none_are_faults),
        (
            "tables::offsets_out_of_order_give_each_positive_one_row",
            tables_on_device::offsets_out_of_order_give_each_positive_one_row,
        ),
        ("tables::updates_are_the_gradient_and_then_the_step", tables::updates_are_the_gradient_and_then_the_step),
        ("tables::searches_on_device_memory_agree", tables_on_device::searches_on_device_memory_agree),
        ("accumulate::gradients_are_added_to_what_is_there", accumulate::gradients_are_added_to_what_is_there),
        ("accumulate::row_sparse_gradients_are_not_added_to", accumulate::row_sparse_gradients_are_not_added_to),
        ("small::tables", tables_on_device::small),
        ("sharded::a_table_in_shards_agrees", sharded::a_table_in_shards_agrees),
        (
            "workspace::steps_in_the_callers_workspace_allocate_nothing",
            workspace::steps_in_the_callers_workspace_allocate_nothing,
        ),
        ("workspace::workspaces_that_do_not_fit_are_errors", workspace::workspaces_that_do_not_fit_are_errors),
        (
            "workspace::a_step_in_two_halves_gives_the_gradients_of_one",
            workspace::a_step_in_two_halves_gives_the_gradients_of_one,
        ),
        ("workspace::a_backend_goes_from_stream_to_stream", workspace::a_backend_goes_from_stream_to_stream),
        (
            "workspace::a_search_in_the_callers_workspace_allocates_nothing",
            workspace::a_search_in_the_callers_workspace_allocates_nothing,
        ),
        ("the_same_bits_again", the_same_bits_again),
        ("what_a_workspace_held_does_not_matter", what_a_workspace_held_does_not_matter),
        ("the_plan_is_the_memory", the_plan_is_the_memory),
    ];
    trials.extend(own.map(|(name, test)| own_trial(cuda, name, test)));
    trials
}

fn own_trial(cuda: Shared, name: &str, test: fn(&mut Cuda)) -> Trial {
    Trial::test(name, move || {
        test(&mut *locked(cuda)?);
        Ok(())
    })
}

/// A test that is this file's own.
type Own = (&'static str, fn(&mut Cuda));

/// The backend, or why there is none.
fn locked(cuda: Shared) -> Result<Guard, Failed> {
    let guard = cuda.lock().unwrap_or_else(PoisonError::into_inner);
    match &*guard {
        Ok(_) => Ok(Guard(guard)),
        Err(error) => Err(error.into()),
    }
}

struct Guard(MutexGuard<'static, Result<Cuda, Error>>);

impl std::ops::Deref for Guard {
    type Target = Cuda;
    fn deref(&self) -> &Cuda {
        self.0.as_ref().expect("checked when locked")
    }
}

impl std::ops::DerefMut for Guard {
    fn deref_mut(&mut self) -> &mut Cuda {
        self.0.as_mut().expect("checked when locked")
    }
}

fn hold(cuda: Shared, property: Property) -> Result<(), Failed> {
    // Operands of the second matmul are rounded to the inputs' type: so are the baseline's.
    property(&mut *locked(cuda)?, |dtype| dtype);
    Ok(())
}

fn golden_files() -> Vec<PathBuf> {
    let tests = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    match std::env::var("GOLDEN") {
        Ok(folder) => files(std::path::Path::new(&folder)),
        Err(_) => [files(&tests.join("golden")), files(&tests.join("golden2"))].concat(),
    }
}

fn golden(cuda: &mut Cuda, file: &std::path::Path) -> Result<(), Failed> {
    let golden = Golden::load(file)?;
    let output = cuda.value_and_grad(&golden.problem.batch()?, &golden.problem.loss)?;
    let dtype = golden.problem.queries.view(golden.problem.dim).dtype();
    let verdicts = judge(&golden, &results(&output.into()), Precision::Single { operands: dtype });
    assert!(!verdicts.is_empty(), "the file expects something");
    let bad: Vec<_> = verdicts.iter().filter(|verdict| !verdict.passes()).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    Ok(())
}

fn run(cuda: &mut Cuda, problem: &Problem) -> Vec<u64> {
    let batch = problem.batch().expect("a valid problem");
    let request = Request::value_and_grad().with_moments().with_rank();
    let mut output = Step::default();
    output.compute(cuda, &batch, &problem.loss, request).expect("a loss that fits");
    bits(&output)
}

fn the_same_bits_again(cuda: &mut Cuda) {
    for (p, problem) in problems().iter().enumerate() {
        let first = run(cuda, problem);
        for again in 1..4 {
            assert!(run(cuda, problem) == first, "problem {p}, run {again}");
        }
    }
}

/// A fresh backend's memory holds nothing; the shared one's holds what the tests before, and a larger problem, left.
fn what_a_workspace_held_does_not_matter(cuda: &mut Cuda) {
    let large = Config { pools: vec![3000, 500], masking: Masking::Excluded, ..Config::new(600, 1, 96) }.problem();
    for (p, problem) in problems().iter().enumerate() {
        let fresh = run(&mut open::backend().expect("opened before"), problem);
        run(cuda, &large);
        assert!(run(cuda, problem) == fresh, "problem {p}");
    }
}

/// Elements of a row: all 0 but the third.
fn set_row(storage: &Storage, dim: usize, row: usize, value: f32) -> Storage {
    storage.map(|values| {
        values[row * dim..(row + 1) * dim].fill(0.0);
        values[row * dim + 2] = value;
    })
}

/// From 2^63 on, as `Similarity::Cosine` says; a row just shorter is as good as any.
fn rows_too_long_for_a_cosine_are_as_rows_that_are_not_finite(cuda: &mut Cuda) {
    let long = 2f32.powi(63);
    for (dtype, dim) in [(DType::F32, 32), (DType::Bf16, 32), (DType::Bf16, 264)] {
        let config = Config { dtype, separate: true, masking: Masking::Ids, ..Config::new(140, 300, dim) };
        let clean = config.problem();
        let with = |side: &str, value: f32| {
            let mut problem = clean.clone();
            match side {
                "query" => problem.queries = set_row(&clean.queries, dim, 70, value),
                "candidate" => problem.pools[0].candidates = set_row(&clean.pools[0].candidates, dim, 33, value),
                _ => {
                    let PositiveData::Separate(rows) = &clean.positives else { panic!("separate") };
                    problem.positives = PositiveData::Separate(set_row(rows, dim, 7, value));
                }
            }
            problem
        };
        for side in ["query", "candidate", "positive"] {
            let everything = |cuda: &mut Cuda, problem: &Problem| {
                let batch = problem.batch().expect("a valid problem");
                let mut output = Step::default();
                let request = Request::value_and_grad().with_moments();
                output.compute(cuda, &batch, &problem.loss, request).expect("a loss that fits");
                output
            };
            let as_nan = tensors(&everything(cuda, &with(side, f32::NAN)));
            assert!(as_nan.iter().any(|tensor| tensor.values.iter().any(|x| x.is_nan())), "a case for the test");
            for value in [long, -1e25, f32::MAX / 1.01] {
                for (found, wanted) in tensors(&everything(cuda, &with(side, value))).iter().zip(&as_nan) {
                    let same = |(a, b): (&f64, &f64)| a == b || a.is_nan() && b.is_nan();
                    let equal = found.values.iter().zip(&wanted.values).all(same);
                    assert!(equal, "{side} of length {value:e}, {dtype:?}, {dim} elements: {}", found.name);
                }
            }
            let problem = with(side, long * (1.0 - 2f32.powi(-7)));
            let output = everything(cuda, &problem);
            Expected::new(&problem, dtype).check(&output).unwrap_or_else(|error| panic!("{side}, {dtype:?}: {error}"));
        }
    }
}

/// As those that are not finite.
fn searches_leave_rows_too_long_for_a_cosine_out(cuda: &mut Cuda) {
    for dtype in [DType::F32, DType::Bf16] {
        let dim = 32;
        let mut data = SearchData::new(20, &[300], dim, dtype, Values::Normal, false);
        let with = |storage: &Storage, rows: &[usize], value: f32| {
            rows.iter().fold(storage.clone(), |storage, &row| set_row(&storage, dim, row, value))
        };
        let (queries, candidates) = (data.queries.clone(), data.pools[0].0.clone());
        data.queries = with(&queries, &[3], 1e25);
        data.pools[0].0 = with(&candidates, &[0, 70, 299], 1e25);
        let found = data.top_k(cuda, 10);
        data.queries = with(&queries, &[3], f32::INFINITY);
        data.pools[0].0 = with(&candidates, &[0, 70, 299], f32::INFINITY);
        let wanted = data.top_k(&mut Cpu::new(), 10);
        assert_eq!(found.indices, wanted.indices, "{dtype:?}");
    }
}

/// f16 has the mantissa of tf32, and these values are in its range.
fn tf32_is_as_near_as_eleven_bits_are(cuda: &mut Cuda) {
    for similarity in [Similarity::Cosine, Similarity::Dot] {
        let config =
            Config { similarity, temperature: 0.5, separate: true, masking: Masking::Ids, ..Config::new(150, 300, 70) };
        let problem = config.problem();
        let exact = run(cuda, &problem);
        cuda.allow_tf32(true);
        let rounded = run(cuda, &problem);
        let output = cuda.value_and_grad(&problem.batch().expect("a valid problem"), &problem.loss);
        cuda.allow_tf32(false);
        assert!(rounded != exact, "other kernels ran");
        let expected = Expected::new(&problem, DType::F16);
        check_what_is_there(&expected, &output.expect("a loss that fits").into())
            .unwrap_or_else(|error| panic!("{similarity:?}: {error}"));
    }
}

/// As `Expected::check`, of outputs without moments or gradients, too.
fn check_what_is_there(expected: &Expected, output: &Step<f32>) -> Result<(), String> {
    let mut tensors = tensors(output);
    tensors.retain(|tensor| tensor.name != "expected_score" && tensor.name != "entropy");
    let (wanted, tolerances): (Vec<_>, Vec<_>) = expected
        .tensors
        .iter()
        .zip(&expected.tolerances)
        .filter(|(tensor, _)| tensors.iter().any(|found| found.name == tensor.name))
        .map(|(tensor, tolerance)| (tensor.clone(), tolerance.clone()))
        .unzip();
    assert!(wanted.iter().any(|tensor| tensor.name == "lse"), "something to compare");
    compare_tensors(&wanted, &tensors, &tolerances, 1.0)
}

/// A value alone, with a bounded or a running maximum, and with gradients: three kernels. On devices of other capabilities it is
/// one more test of the portable ones.
fn agrees_in_every_mode(cuda: &mut Cuda, config: &Config) {
    agrees_on(cuda, &config.problem(), &format!("{config:?}"));
}

fn agrees_on(cuda: &mut Cuda, problem: &Problem, what: &str) {
    let expected = Expected::new(problem, problem.queries.view(problem.dim).dtype());
    let batch = problem.batch().expect("a valid problem");
    for request in [Request::value(), Request::value_and_grad()] {
        let mut output = Step::default();
        output.compute(cuda, &batch, &problem.loss, request).expect("a loss that fits");
        check_what_is_there(&expected, &output).unwrap_or_else(|error| panic!("{request:?}: {error}\nin {what}"));
    }
}

/// Sizes at which tiles begin, end and are left.
fn edges(tile: usize) -> [usize; 5] {
    [1, tile - 1, tile, tile + 1, 2 * tile + 3]
}

/// Sizes around those of blocks of up to 256 stationary rows and tiles of up to 128 streamed ones; every kind of loss and mask.
fn agrees_at_the_edges(cuda: &mut Cuda, dims: [usize; 6]) {
    for (x, &b) in edges(256).iter().enumerate() {
        for (y, &n) in edges(128).iter().enumerate() {
            let i = 5 * x + y;
            let config = Config {
                dtype: [DType::F16, DType::Bf16][i % 2],
                similarity: if i % 3 == 0 { Similarity::Dot } else { Similarity::Cosine },
                temperature: if i % 3 == 0 { 1.0 } else { 0.1 },
                correction: [Correction::LogQ, Correction::None, Correction::CorrectedLogQ][(x + y) % 3],
                masking: [Masking::Ids, Masking::Excluded, Masking::None][(x + 2 * y) % 3],
                separate: y % 2 == 1,
                weights: x % 2 == 1,
                seed: i as u64,
                ..Config::new(b, n, dims[i % 6])
            };
            agrees_in_every_mode(cuda, &config);
        }
    }
}

/// Both 16-bit types at each shape (queries, candidates, width), the second one with `Dot`.
fn agrees_over_many_tiles(cuda: &mut Cuda, shapes: &[[usize; 3]]) {
    for (i, &[b, n, dim]) in shapes.iter().enumerate() {
        for dtype in [DType::F16, DType::Bf16] {
            let config = Config {
                dtype,
                similarity: if i == 1 { Similarity::Dot } else { Similarity::Cosine },
                correction: Correction::LogQ,
                masking: Masking::Ids,
                ..Config::new(b, n, dim)
            };
            agrees_in_every_mode(cuda, &config);
        }
    }
}

/// One, two and four chunks of 64 elements.
fn hopper_kernels_agree_at_the_edges_of_their_tiles(cuda: &mut Cuda) {
    agrees_at_the_edges(cuda, [64, 40, 128, 104, 256, 200]);
}

/// Rings of buffers go round several times, and blocks take several units of work.
fn hopper_kernels_agree_over_many_tiles(cuda: &mut Cuda) {
    agrees_over_many_tiles(cuda, &[[70, 6000, 64], [300, 3000, 128], [40, 5000, 256], [1500, 700, 64]]);
}

/// The same for rows of more than 256 elements: from five chunks on, slices of 256 output columns.
fn wide_kernels_agree_at_the_edges_of_their_tiles(cuda: &mut Cuda) {
    agrees_at_the_edges(cuda, [264, 320, 512, 328, 576, 1024]);
}

/// Several units for each pair of blocks, several panels of streamed rows (2 MiB of probabilities on four multiprocessors), several
/// of stationary ones (8192 rows), and splits of a panel with nothing in its last one.
fn wide_kernels_agree_over_many_panels(cuda: &mut Cuda) {
    agrees_over_many_tiles(cuda, &[[70, 9000, 264], [600, 3000, 320], [300, 5000, 520]]);
}

/// Scores that grow along the candidates by some tens to hundreds, or fall: each panel's reference differs from the last one's by many powers
/// of two, up and down.
fn wide_kernels_agree_where_maxima_move(cuda: &mut Cuda) {
    agrees_where_maxima_move(cuda, &[DType::F16, DType::Bf16], 264, 20.0, 30.0);
}

/// The same for rows of up to 256 elements, with scores past the largest exponent: maxima stay while no score is above them, or in
/// statistics far above them, and kernels have to notice one that is.
fn narrow_kernels_agree_where_maxima_move(cuda: &mut Cuda) {
    let least = 128.0 * std::f64::consts::LN_2;
    for dim in [64, 128, 256] {
        agrees_where_maxima_move(cuda, &[DType::F16, DType::Bf16], dim, 150.0, least);
    }
    for dim in [32, 64] {
        agrees_where_maxima_move(cuda, &[DType::F32], dim, 150.0, least);
    }
}

/// The last (or first) candidates are about `growth` times as long as drawn, so that each row's lse is at least `least`.
fn agrees_where_maxima_move(cuda: &mut Cuda, dtypes: &[DType], dim: usize, growth: f32, least: f64) {
    let n = 5000;
    // Positives apart: else most tiles hold one, and look for masked pairs.
    let cases = [(false, false), (false, true), (true, false)];
    for (&dtype, (falls, separate)) in dtypes.iter().flat_map(|dtype| cases.map(|case| (dtype, case))) {
        let config =
            Config { dtype, separate, similarity: Similarity::Dot, temperature: 1.0, ..Config::new(300, n, dim) };
        let mut problem = config.problem();
        let dim = problem.dim;
        let grow = |values: &mut Vec<f32>| {
            for (j, row) in values.chunks_mut(dim).enumerate() {
                let place = if falls { n - j } else { j };
                row.iter_mut().for_each(|x| *x *= 0.5 + growth * place as f32 / n as f32);
            }
        };
        problem.pools[0].candidates = problem.pools[0].candidates.map(grow);
        let name = format!("{dim} elements, {dtype:?}, falls: {falls}, separate: {separate}");
        agrees_where(cuda, &problem, &name, |lse| lse > least);
    }
}

/// Every score is so far below 0 that its exponential vanishes: rows need a maximum from their first tile on.
fn kernels_agree_where_all_scores_are_low(cuda: &mut Cuda) {
    for (dtype, dim) in [(DType::F16, 64), (DType::Bf16, 128), (DType::F32, 64), (DType::F16, 256), (DType::Bf16, 264)]
    {
        let config = Config {
            dtype,
            separate: true,
            similarity: Similarity::Dot,
            temperature: 1.0,
            ..Config::new(140, 700, dim)
        };
        let mut problem = config.problem();
        problem.queries = problem.queries.map(|values| values.iter_mut().for_each(|x| *x = x.abs()));
        let lower = |values: &mut Vec<f32>| values.iter_mut().for_each(|x| *x = -300.0 * x.abs());
        problem.pools[0].candidates = problem.pools[0].candidates.map(lower);
        let most = -150.0 * std::f64::consts::LN_2;
        agrees_where(cuda, &problem, &format!("{dim} elements, {dtype:?}"), |lse| lse < most);
    }
}

/// Whether the problem is a `case` for the test, by every row's lse, and the backends agree on it.
fn agrees_where(cuda: &mut Cuda, problem: &Problem, name: &str, case: impl Fn(f64) -> bool) {
    let value = Reference::new().value(&problem.batch().expect("a valid problem"), &problem.loss);
    let lse = value.expect("a loss that fits").statistics.lse;
    assert!(lse.iter().all(|&lse| case(lse)), "a case for the test: {name}, {lse:?}");
    agrees_on(cuda, problem, name);
}

fn a_device_that_is_not_there_is_an_error(_: &mut Cuda) {
    let error = Cuda::new(1000).expect_err("not a thousand devices");
    let Error::DeviceUnavailable { device, reason } = error else { panic!("{error}") };
    assert_eq!(device, "cuda:1000");
    assert!(matches!(reason, Unavailable::NoSuchDevice { .. }), "{reason}");
}

/// Sums over so many candidates, in splits: against float64.
fn ten_million_candidates(cuda: &mut Cuda) {
    let n = std::env::var("GPU_TESTS_CANDIDATES").map_or(10_000_000, |n| n.parse().expect("a number"));
    let config =
        Config { dtype: DType::Bf16, correction: Correction::LogQ, masking: Masking::Ids, ..Config::new(3, n, 32) };
    let problem = config.problem();
    let batch = problem.batch().expect("a valid problem");
    let found = cuda.value(&batch, &problem.loss).expect("a loss that fits");
    let wanted = Reference::new().value(&batch, &problem.loss).expect("a loss that fits");
    assert_eq!(found.statistics.num_negatives, wanted.statistics.num_negatives);
    for (found, wanted) in found.statistics.lse.iter().zip(&wanted.statistics.lse) {
        assert!((found - wanted).abs() < 1e-5 * wanted.abs().max(1.0), "{found}, float64 {wanted}");
    }
}

fn the_plan_is_the_memory(cuda: &mut Cuda) {
    for (dtype, dim) in [(DType::F32, 64), (DType::F16, 264)] {
        let problem = Config { dtype, ..Config::new(500, 2000, dim) }.problem();
        let batch = problem.batch().expect("a valid problem");
        let plan = cuda.plan(&batch, &problem.loss, Request::value_and_grad()).expect("a loss that fits");
        let mut fresh = open::backend().expect("opened before");
        fresh.value_and_grad(&batch, &problem.loss).expect("a loss that fits");
        assert_eq!(fresh.device_bytes(), plan.workspace_bytes);
        // A second step, and a smaller problem, need no more.
        fresh.value_and_grad(&batch, &problem.loss).expect("a loss that fits");
        run(&mut fresh, &Config { dtype, ..Config::new(100, 200, dim) }.problem());
        assert_eq!(fresh.device_bytes(), plan.workspace_bytes);
    }
}

fn the_plan_of_a_topk_is_its_memory(_: &mut Cuda) {
    let data = SearchData::new(300, &[2000, 500], 64, DType::F16, Values::Normal, true);
    let mut fresh = open::backend().expect("opened before");
    let plan = fresh.plan_top_k(&data.search(), data.similarity, 100).expect("a valid k");
    data.top_k(&mut fresh, 100);
    assert_eq!(fresh.device_bytes(), plan.workspace_bytes);
    data.top_k(&mut fresh, 10);
    assert_eq!(fresh.device_bytes(), plan.workspace_bytes);
}
