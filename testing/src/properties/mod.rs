//! The properties that every backend has: agreement with the reference, and the identities of the mathematics.
//!
//! Each is a function of a backend; `test_each!` makes a test of each. Tile sizes are read from the backend's plan.

use std::cell::RefCell;

use catalog_softmax::{
    Backend, Correction, DType, Gradients, Loss, Plan, Reduction, Reference, Request, RowStatistics, Similarity,
    TableGradient,
};
use proptest::strategy::Strategy;
use proptest::test_runner::{Config as Cases, RngSeed, TestCaseError, TestRunner};
use rand::RngExt;

use crate::formulas::scores;
use crate::generate::{Config, LogQ, Masking, configs, rng, rows};
use crate::problem::{PoolData, PoolRows, PositiveData, Problem, Storage};
use crate::step::Step;
use crate::tolerance::{Expected, Tensor, compare, reference, tensors};

mod absent;
mod agreement;
mod ends;
mod identities;
mod losses;
mod spoiled;
mod table_identities;
mod tables;

/// The backend under test.
pub type Subject<'a> = &'a mut dyn Backend<Real = f32>;
/// Input type → precision of the matmul operands of the baseline that the backend is measured by.
pub type Operands = fn(DType) -> DType;

/// A property of a backend.
pub type Property = fn(Subject<'_>, Operands);

/// The list of properties, given to another macro.
#[macro_export]
macro_rules! with_properties {
    ($with:ident!($($arguments:tt)*)) => {
        $with! { ($($arguments)*)
            agrees_on_random_problems,
            agrees_on_wide_random_problems,
            agrees_at_the_edges_of_tiles,
            agrees_at_every_width,
            agrees_over_several_tiles_in_a_split,
            agrees_on_strided_views,
            agrees_for_every_combination_of_options,
            coefficients_sum_to_one_minus_p_and_follow_the_exponential,
            gradients_of_two_negatives_have_the_ratio_of_their_exponentials,
            entropy_grows_with_temperature,
            a_constant_added_to_log_q_changes_nothing,
            lengths_change_nothing_under_cosine,
            permuted_candidates_have_permuted_gradients,
            pools_are_one_catalogue,
            a_masked_candidate_has_no_gradient,
            losses_are_not_negative,
            corrected_logq_is_a_shifted_cross_entropy,
            a_symmetric_loss_is_the_mean_of_both_directions,
            an_epilogue_of_your_own_gets_its_gradients,
            requests_do_not_change_each_other,
            temperature_and_queries_agree_on_the_scale,
            the_expected_score_is_that_of_the_expected_negative,
            ranks_count_what_is_above_and_ties,
            rows_without_negatives_are_absent,
            rows_of_weight_zero_are_absent,
            nan_spoils_what_it_touches,
            nan_spoils_nothing_else,
            scores_of_several_hundred,
            both_passes_have_the_same_probabilities,
            a_small_temperature,
            lengths_near_the_ends_of_the_range,
            long_rows_change_nothing_under_cosine,
            gradients_of_scores_of_a_hundred_million,
            far_rows_keep_their_share,
            log_q_of_any_size,
        }
    };
}

/// The list of properties of batches over a table, of several positives and of filters.
#[macro_export]
macro_rules! with_table_properties {
    ($with:ident!($($arguments:tt)*)) => {
        $with! { ($($arguments)*)
            tables_agree_on_random_problems,
            tables_agree_on_wide_random_problems,
            tables_agree_at_the_edges_of_tiles,
            tables_agree_on_strided_views,
            tables_agree_for_every_combination_of_options,
            filters_agree_without_a_table,
            a_score_at_the_bound_is_a_negative_in_both_passes,
            nan_in_a_table_spoils_what_names_it,
            row_negatives_alike_are_a_shared_pool,
            rows_of_a_table_are_copies,
            several_positives_are_repeated_rows,
            one_positive_by_offsets_is_one_positive,
            several_positives_by_index_agree,
            the_whole_table_is_the_pool_of_a_batch_without_one,
            a_permuted_table_has_permuted_gradients,
            row_sparse_gradients_are_the_dense_ones_rows,
            accumulated_gradients_are_sums,
            accumulation_leaves_what_a_batch_has_not,
            what_has_no_gradient_gets_none,
            rows_that_name_nothing_add_nothing,
            a_positive_of_weight_zero_is_still_no_negative,
            the_hardest_negatives_are_the_most_similar,
            ranks_count_for_each_pair,
        }
    };
}

/// Makes a test of each property. `$backend` is a `Box<dyn Backend<Real = f32>>`.
#[macro_export]
macro_rules! test_each {
    (($backend:expr, $operands:expr) $($name:ident,)*) => {
        $(
            #[test]
            fn $name() {
                $crate::properties::$name(&mut *$backend, $operands);
            }
        )*
    };
}

#[macro_export]
macro_rules! list {
    (() $($name:ident,)*) => {
        /// Every property by its name.
        pub const PROPERTIES: &[(&str, Property)] = &[$((stringify!($name), $name)),*];
    };
}
pub use absent::*;
pub use agreement::*;
pub use ends::*;
pub use identities::*;
pub use losses::*;
pub use spoiled::*;
pub use table_identities::*;
pub use tables::*;
with_properties!(list!());

/// Those of batches over a table.
pub mod of_tables {
    use super::*;
    with_table_properties!(list!());
}
pub use {test_each, with_properties, with_table_properties};

pub fn compute(backend: Subject<'_>, problem: &Problem, request: Request) -> Step {
    let mut step = Step::default();
    let batch = problem.batch().expect("a valid problem");
    step.compute(backend, &batch, &problem.loss, request).expect("a loss that fits");
    step
}

pub fn everything(backend: Subject<'_>, problem: &Problem) -> Step {
    compute(backend, problem, Request::value_and_grad().with_moments())
}

/// Whether two requests have the same result. Not bit for bit: a backend may sum in another way for another request.
fn near(a: &[f64], b: &[f64]) -> bool {
    let epsilon = f64::from(f32::EPSILON);
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a == b || (a - b).abs() <= 4.0 * epsilon * a.abs().max(1.0))
}

pub fn gradients(output: &Step) -> &Gradients<f32> {
    output.gradients.as_ref().expect("asked for")
}

/// The output of a valid problem is the reference's.
fn agrees(backend: Subject<'_>, config: &Config, operands: Operands) -> Result<(), String> {
    let problem = config.problem();
    Expected::new(&problem, operands(config.dtype)).check(&everything(backend, &problem))
}

fn must_agree(backend: Subject<'_>, config: &Config, operands: Operands) {
    agrees(backend, config, operands).unwrap_or_else(|error| panic!("{error}\nin {config:?}"));
}

/// Runs a property on random problems: always the same ones, unless `PROPTEST_RNG_SEED` says otherwise;
/// `PROPTEST_CASES` says how many.
fn for_random_configs(cases: u32, sizes: [usize; 3], property: impl FnMut(&Config) -> Result<(), String>) {
    let [b, n, dim] = sizes;
    for_random(cases, &configs(b, n, dim), property);
}

fn for_random<S: Strategy>(cases: u32, strategy: &S, property: impl FnMut(&S::Value) -> Result<(), String>) {
    let mut options = Cases { failure_persistence: None, max_shrink_iters: 200, ..Cases::default() };
    if std::env::var_os("PROPTEST_CASES").is_none() {
        options.cases = cases;
    }
    if std::env::var_os("PROPTEST_RNG_SEED").is_none() {
        options.rng_seed = RngSeed::Fixed(20_251_123);
    }
    let property = RefCell::new(property);
    TestRunner::new(options)
        .run(strategy, |config| (property.borrow_mut())(&config).map_err(TestCaseError::fail))
        .unwrap_or_else(|error| panic!("{error}"));
}

/// The tiles of a large problem of that width.
fn tiles(backend: Subject<'_>, dim: usize) -> Plan {
    let problem = Config::new(1100, 1100, dim).problem();
    let batch = problem.batch().expect("a valid problem");
    backend.plan(&batch, &problem.loss, Request::value_and_grad()).expect("a loss that fits")
}

/// Sizes at which tiles begin, end and are left.
fn edges(tile: usize) -> [usize; 5] {
    [1, (tile - 1).max(1), tile, tile + 1, 2 * tile + 3]
}

pub fn same(expected: &Expected, one: &[Tensor], two: &[Tensor], what: &str) {
    compare(one, two, &expected.tolerances, 2.0).unwrap_or_else(|error| panic!("{what}: {error}"));
}

fn all_zero(values: &[f32]) -> bool {
    values.iter().all(|&v| v == 0.0)
}
