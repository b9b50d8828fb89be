//! Several pools of negatives in one loss: with one Q for their union the gradient tends to the full softmax's, with a Q for
//! each pool it does not. `examples/gradient_bias.rs` makes the table and the picture.

use catalog_softmax::Correction;
use catalog_softmax_testing::gradient_bias::{Catalogue, POSITIVE, Q, Setup, setups};

/// Of the full softmax, in [`Catalogue::new`].
const P: f64 = 0.57;

/// With each pool's own count the sum over K pools is K times too large, and so are the odds against the positive: its
/// coefficient is `K (1 − P) / (K (1 − P) + P)` in place of `1 − P`.
fn error_of_a_sum_k_times_too_large(k: f64) -> f64 {
    k / (k * (1.0 - P) + P) - 1.0
}

#[test]
fn the_limit_for_many_draws_is_the_full_softmax_with_one_q_alone() {
    let catalogue = Catalogue::new();
    for setup in setups(256) {
        let error = catalogue.error(&setup.limit(&catalogue));
        let name = setup.name;
        match (setup.correction, setup.q) {
            (Correction::None, _) => assert!(error > 0.3, "{name}: {error}"),
            // The positive is one of n draws there: its odds are off by n Q.
            (Correction::LogQ, _) => {
                let odds = setup.draws() * f64::from(catalogue.log_q[POSITIVE]).exp();
                assert!((error - (error_of_a_sum_k_times_too_large(odds)).abs()).abs() < 1e-3, "{name}: {error}");
            }
            (_, Q::OwnCount) => {
                let wanted = error_of_a_sum_k_times_too_large(setup.pools.len() as f64);
                // P is 0.57 within 1e-4.
                assert!((error - wanted).abs() < 1e-3, "{name}: {error}, not {wanted}");
            }
            // log_q up to 8 in f32.
            _ => assert!(error < 1e-6, "{name}: {error}"),
        }
    }
}

#[test]
fn the_mean_gradient_is_the_limit_up_to_the_noise_squared() {
    let catalogue = Catalogue::new();
    for (b, steps) in [(32, 4000), (256, 2000)] {
        for (seed, setup) in setups(b).into_iter().enumerate() {
            let measured = setup.measure(&catalogue, steps, seed as u64);
            let limit = setup.limit(&catalogue);
            let off: Vec<f64> =
                measured.mean.iter().zip(&limit).zip(&catalogue.exact).map(|((m, l), e)| m - l + e).collect();
            let off = catalogue.error(&off);
            // A smooth function of sums of draws is off by half its second derivative times their variance, which is what
            // makes the noise; four standard errors on top.
            let bound = measured.noise.powi(2) + 4.0 * measured.standard_error;
            println!("b {b}, {}: {off} from the limit, bound {bound}", setup.name);
            assert!(off < bound, "b {b}, {}: {off} from the limit, bound {bound}", setup.name);
            if setup.q == Q::OwnCount {
                assert!(measured.error > 0.35, "b {b}, {}: {}", setup.name, measured.error);
            }
        }
    }
}

#[test]
fn one_q_for_the_union_is_less_noisy_than_weights_of_the_pools() {
    let catalogue = Catalogue::new();
    let noise = |name: &str| {
        let named = |setup: &Setup| setup.name == name;
        let setup = setups(256).into_iter().find(named).expect("a set-up of that name");
        setup.measure(&catalogue, 2000, 5).noise
    };
    let (union, shares) = (noise("in-batch + uniform, one Q"), noise("in-batch + uniform, shares"));
    let in_batch = noise("in-batch, counts");
    println!("noise of a step: {union} with one Q, {shares} with shares, {in_batch} in-batch alone");
    // A standard deviation over 2000 steps has a standard error of a few percent, heavy tails included.
    assert!(union < 0.7 * shares && shares < 0.7 * in_batch, "{union}, {shares}, {in_batch}");
}

/// One Q for the union is right for the query, but a queue's rows have no gradient, and with them a popular item loses most of its
/// own. Weights bring it back.
#[test]
fn items_get_back_the_gradient_that_a_queue_takes() {
    let catalogue = Catalogue::new();
    for name in ["in-batch + uniform, one Q", "+ queue, one Q"] {
        let setup = setups(256).into_iter().find(|setup| setup.name == name).expect("a set-up of that name");
        let measure = |weighted| setup.gradient_of_items(&catalogue, 1000, 11, weighted);
        let (plain, weighted, limit) = (measure(false), measure(true), setup.limit_of_items(&catalogue));
        println!("{name}: {plain:?} of the full softmax's, {limit:?} expected, {weighted:?} weighted");
        for part in 0..2 {
            // The sum over a part of some 100 draws a step is off by a tenth or so: a third of a percent in the mean.
            assert!((plain[part] / limit[part] - 1.0).abs() < 0.02, "{name}: {plain:?}, not {limit:?}");
            assert!((weighted[part] - 1.0).abs() < 0.02, "{name}, weighted: {weighted:?}");
        }
        assert!(
            if setup.is_queued() { limit[0] < 0.3 && limit[1] < 0.9 } else { limit == [1.0; 2] },
            "{name}: {limit:?}"
        );
    }
}
