//! Samplers: what is drawn has the probability that log_q says, by enumeration where there are few outcomes and by chi-square
//! tests where there are many; each such test is also run on a probability that is 5% off, and has to reject it.

use catalog_softmax::negatives::{Distribution, LogUniform, Mixture, RandomStream, Uniform, Unigram, union_log_q};
use catalog_softmax::{Error, Result};
use catalog_softmax_testing::samplers::{powers, unigram, zipf_counts};
use catalog_softmax_testing::statistics::{chi_square, critical, draws_to_see_five_percent, five_percent_off};
use proptest::prelude::*;

fn mixture(n: usize) -> Mixture {
    let popular = unigram(&zipf_counts(n), 1.0);
    let uniform = Uniform::new(n as u64).expect("some items");
    let ranked = LogUniform::new(n as u64).expect("some items");
    Mixture::new(vec![(2.0, Box::new(popular)), (1.0, Box::new(uniform)), (0.5, Box::new(ranked))]).expect("valid")
}

/// TensorFlow's documented formula.
fn log_uniform(n: usize) -> Vec<f64> {
    (0..n).map(|k| (((k + 2) as f64).ln() - ((k + 1) as f64).ln()) / ((n + 1) as f64).ln()).collect()
}

fn mixed(n: usize) -> Vec<f64> {
    let (popular, ranked) = (powers(&zipf_counts(n), 1.0), log_uniform(n));
    popular.iter().zip(&ranked).map(|(p, r)| (2.0 * p + 1.0 / n as f64 + 0.5 * r) / 3.5).collect()
}

/// Each sampler over `n` items and its probabilities by a formula of the test's own.
fn samplers(n: usize) -> Vec<(&'static str, Box<dyn Distribution>, Vec<f64>)> {
    let counts = zipf_counts(n);
    vec![
        ("uniform", Box::new(Uniform::new(n as u64).expect("some items")), vec![1.0 / n as f64; n]),
        ("unigram", Box::new(unigram(&counts, 1.0)), powers(&counts, 1.0)),
        ("unigram, distorted", Box::new(unigram(&counts, 0.75)), powers(&counts, 0.75)),
        ("unigram, flattened", Box::new(unigram(&counts, 0.0)), powers(&counts, 0.0)),
        ("unigram, reversed", Box::new(unigram(&counts, -0.5)), powers(&counts, -0.5)),
        ("log-uniform", Box::new(LogUniform::new(n as u64).expect("some items")), log_uniform(n)),
        ("mixture", Box::new(mixture(n)), mixed(n)),
    ]
}

fn histogram(ids: &[u64], n: usize) -> Vec<u64> {
    let mut counts = vec![0; n];
    ids.iter().for_each(|&id| counts[id as usize] += 1);
    counts
}

/// f32's rounding of log_q, and of the table's probabilities.
fn assert_log_close(log_q: f32, probability: f64, what: &str) {
    let wanted = probability.ln();
    let tolerance = f64::from(f32::EPSILON) * (wanted.abs() + 1.0);
    assert!((f64::from(log_q) - wanted).abs() <= tolerance, "{what}: {log_q}, not {wanted}");
}

#[test]
fn draws_have_the_probability_of_the_formula() {
    const N: usize = 100;
    let draws = draws_to_see_five_percent(N - 1);
    for (name, sampler, probabilities) in samplers(N) {
        let sample = sampler.draw(draws, &mut RandomStream::new(11, 0)).expect("draws that memory holds");
        let counts = histogram(&sample.ids, N);
        let statistic = chi_square(&counts, &probabilities);
        assert!(statistic < critical(N - 1), "{name}: {statistic} after {draws} draws");
        let off = chi_square(&counts, &five_percent_off(&probabilities));
        assert!(off > critical(N - 1), "{name}: 5% off is accepted with {off}");
        // log_q of the draws, of ids, and of the formula are one.
        assert_eq!(sampler.log_q(&sample.ids).expect("drawn ids"), sample.log_q, "{name}");
        for (&id, &log_q) in sample.ids.iter().zip(&sample.log_q) {
            assert_log_close(log_q, probabilities[id as usize], name);
        }
    }
}

#[test]
fn large_catalogues_have_it_too() {
    const N: usize = (1 << 18) - 1;
    // Buckets of ranks: 0, 1, 2..4, 4..8, ...
    let bucket = |id: usize| (id + 1).ilog2() as usize;
    let buckets = bucket(N - 1) + 1;
    let draws = draws_to_see_five_percent(buckets - 1).max(4 * N);
    for (name, sampler, probabilities) in samplers(N) {
        let mut wanted = vec![0.0; buckets];
        probabilities.iter().enumerate().for_each(|(id, p)| wanted[bucket(id)] += p);
        // The first buckets of the uniform are too rare to count.
        let merged = wanted.iter().take_while(|&&p| p * draws as f64 <= 10.0).count();
        let mut counts = vec![0u64; buckets];
        let sample = sampler.draw(draws, &mut RandomStream::new(12, 0)).expect("draws that memory holds");
        sample.ids.iter().for_each(|&id| counts[bucket(id as usize)] += 1);
        let statistic = chi_square(&counts[merged..], &normalised(&wanted[merged..]));
        assert!(statistic < critical(buckets - merged - 1), "{name}: {statistic} after {draws} draws");
        let off = chi_square(&counts[merged..], &five_percent_off(&normalised(&wanted[merged..])));
        assert!(off > critical(buckets - merged - 1), "{name}: 5% off is accepted with {off}");
        let (sum, all) = ((0..N as u64).map(|id| sampler.probability(id)).sum::<f64>(), probabilities.len());
        // Rounding to f32 is independent for each of them, and at most half an ulp.
        assert!((sum - 1.0).abs() < f64::from(f32::EPSILON), "{name}: probabilities of {all} items sum to {sum}");
    }
}

fn normalised(probabilities: &[f64]) -> Vec<f64> {
    let sum: f64 = probabilities.iter().sum();
    probabilities.iter().map(|p| p / sum).collect()
}

#[test]
fn a_mixtures_log_q_is_the_mixtures() {
    const N: usize = 6;
    // Ids 4 and 5 are drawn by the second component alone, 0 and 1 by the first alone.
    let first = [5.0, 3.0, 1.0, 1.0, 0.0, 0.0];
    let second = [0.0, 0.0, 2.0, 1.0, 1.0, 4.0];
    let mixture = Mixture::new(vec![(0.3, Box::new(unigram(&first, 1.0))), (0.9, Box::new(unigram(&second, 1.0)))]);
    let mixture = mixture.expect("valid");
    let (p, r) = (powers(&first, 1.0), powers(&second, 1.0));
    let wanted: Vec<f64> = (0..N).map(|id| 0.25 * p[id] + 0.75 * r[id]).collect();
    assert_eq!(mixture.support(), 6);
    for (id, &wanted) in (0..).zip(&wanted) {
        assert_log_close(mixture.log_q(&[id]).expect("drawn")[0], wanted, "mixture");
    }
    let draws = draws_to_see_five_percent(N - 1);
    let sample = mixture.draw(draws, &mut RandomStream::new(13, 0)).expect("draws that memory holds");
    let counts = histogram(&sample.ids, N);
    assert!(chi_square(&counts, &wanted) < critical(N - 1));
    // A component's own probability at an id that both draw, as each sampler alone would give it, is rejected.
    for own in [p[2], r[2]] {
        let (observed, n) = (counts[2] as f64, draws as f64);
        assert!((observed - own * n).abs() > 4.0 * (n * own * (1.0 - own)).sqrt(), "{own} is accepted");
    }
    let nested = Mixture::new(vec![(1.0, Box::new(mixture)), (1.0, Box::new(Uniform::new(6).expect("some items")))]);
    let nested = nested.expect("a mixture is a distribution");
    assert_log_close(nested.log_q(&[2]).expect("drawn")[0], 0.5 * wanted[2] + 0.5 / 6.0, "nested");
}

#[test]
fn what_hardly_ever_comes_has_a_log_q_all_the_same() {
    // Below a unit of the table: lifted to one, and its log_q says so. TFRS would clip at 1e-6.
    let rare = unigram(&[1e30, 1.0, 0.0, 1e-300], 1.0);
    let unit = 2f64.powi(-32) / 4.0;
    for id in [1, 3] {
        assert_log_close(rare.log_q(&[id]).expect("may be drawn")[0], unit, "one unit");
    }
    assert_eq!((rare.support(), rare.probability(2)), (3, 0.0));
    // Above it, it is the formula's, to half a unit.
    let seldom = unigram(&[1e9, 1.0, 7.0, 0.0], 1.0);
    for (id, count) in [(1u64, 1.0), (2, 7.0)] {
        let difference = seldom.probability(id) - count / (1e9 + 8.0);
        assert!(difference.abs() <= 0.5001 * unit + 1e-7 * seldom.probability(id), "id {id}: {difference}");
    }
    // The extremes of the exponent neither overflow nor lose an id.
    for distortion in [-300.0, 300.0] {
        let extreme = unigram(&[1e-300, 1.0, 1e300], distortion);
        assert_eq!(extreme.support(), 3);
        assert!(extreme.log_q(&[0, 1, 2]).expect("all are drawn").iter().all(|log_q| log_q.is_finite()));
    }
    // Nor does the ratio of two counts, where its power is no extreme: 10^(−400 · 0.001), and 10^(620 · −0.001) of the smallest.
    for (counts, distortion, ratio) in
        [([1e-200, 1e200], 0.001, 10f64.powf(-0.4)), ([1e308, 1e-312], -0.001, 10f64.powf(-0.62))]
    {
        let q = unigram(&counts, distortion).probability(0);
        assert!((q - ratio / (1.0 + ratio)).abs() < 1e-7, "{counts:?}^{distortion}: {q}");
    }
    // And what nearly always comes has one below 0, as the corrected logQ needs it.
    let common = unigram(&[1e9, 1.0, 0.0], 1.0);
    assert_eq!(common.log_q(&[0]), Ok(vec![-f32::EPSILON / 2.0]));
    let sample = common.draw(1000, &mut RandomStream::new(1, 2)).expect("draws that memory holds");
    assert_eq!(common.log_q(&sample.ids), Ok(sample.log_q));
    let one = unigram(&[3.0], 0.75);
    assert_eq!((one.draw_one(&mut RandomStream::new(1, 1)), one.log_q(&[0])), ((0, 1.0), Ok(vec![0.0])));
}

/// Calls `visit` with each sequence of `draws` ids and its probability.
fn sequences(probabilities: &[f64], draws: usize, visit: &mut impl FnMut(&[usize], f64)) {
    fn extend(p: &[f64], left: usize, path: &mut Vec<usize>, chance: f64, visit: &mut impl FnMut(&[usize], f64)) {
        if left == 0 {
            return visit(path, chance);
        }
        for (id, q) in p.iter().enumerate() {
            path.push(id);
            extend(p, left - 1, path, chance * q, visit);
            path.pop();
        }
    }
    extend(probabilities, draws, &mut Vec::new(), 1.0, visit);
}

#[test]
fn deduplicated_draws_have_inclusion_probabilities() {
    let counts = [8.0, 4.0, 2.0, 1.0, 1.0];
    let popularity = unigram(&counts, 1.0);
    let probabilities = powers(&counts, 1.0);
    for draws in [1, 2, 6] {
        let mut included = [0.0; 5];
        sequences(&probabilities, draws, &mut |path, chance| {
            (0..5).filter(|id| path.contains(id)).for_each(|id| included[id] += chance);
        });
        let mut random = RandomStream::new(14, draws as u64);
        let ids = [0, 1, 2, 3, 4];
        let sample = popularity.draw_deduplicated(draws, &mut random).expect("draws that memory holds");
        for (log_q, &wanted) in sample.log_q_of(&popularity, &ids).expect("drawn").iter().zip(&included) {
            assert_log_close(*log_q, wanted, "by enumeration");
        }
        // And what comes is included as often: 5 standard errors, and rejected where it is 5% off.
        let (trials, mut seen) = (40_000, [0u64; 5]);
        for _ in 0..trials {
            let sample = popularity.draw_deduplicated(draws, &mut random).expect("draws that memory holds");
            let mut sorted = sample.ids.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), sample.ids.len(), "an id twice");
            sample.ids.iter().for_each(|&id| seen[id as usize] += 1);
            assert_eq!(sample.log_q_of(&popularity, &sample.ids).expect("drawn"), sample.log_q);
        }
        for (id, &p) in included.iter().enumerate() {
            let (share, error) = (seen[id] as f64 / trials as f64, (p * (1.0 - p) / trials as f64).sqrt());
            assert!((share - p).abs() < 5.0 * error, "id {id} in {share} of the samples, not {p}");
            let unigram = probabilities[id] * draws as f64;
            assert!(draws < 6 || (share - unigram).abs() > 5.0 * error, "unigram Q is accepted for id {id}");
        }
    }
}

/// A distribution of the caller's own, over one rare id and the rest.
#[derive(Debug)]
struct Rare(f64);

impl Distribution for Rare {
    fn num_items(&self) -> u32 {
        2
    }
    fn support(&self) -> u32 {
        2
    }
    fn probability(&self, id: u64) -> f64 {
        [self.0, 1.0 - self.0].get(id as usize).copied().unwrap_or(0.0)
    }
    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64) {
        let id = u64::from(random.unit() >= self.0);
        (id, self.probability(id))
    }
}

#[test]
fn inclusion_is_stable_for_rare_ids_and_many_draws() {
    for q in [1e-30, 1e-17, 1e-12, 1e-7, 1e-3] {
        for draws in [1, 1000, 1_000_000] {
            let sample =
                Rare(q).draw_deduplicated(draws, &mut RandomStream::new(15, 0)).expect("draws that memory holds");
            let log_q = sample.log_q_of(&Rare(q), &[0]).expect("may be drawn")[0];
            // By the series where n·q is small: 1 − (1 − q)^n = nq (1 − (n − 1) q / 2 + (n − 1)(n − 2) q² / 6 − ...).
            let (n, nq) = (draws as f64, draws as f64 * q);
            let wanted = if nq < 1e-2 {
                nq * (1.0 - (n - 1.0) * q / 2.0 + (n - 1.0) * (n - 2.0) * q * q / 6.0)
            } else {
                1.0 - (1.0 - q).powf(n)
            };
            assert_log_close(log_q, wanted, &format!("q = {q}, n = {draws}"));
        }
    }
}

/// What is all but certain stays below certain: 0.875^512 = 2e-30, which f32 holds.
#[test]
fn nothing_that_may_be_missed_is_certain() {
    let sample = Rare(0.125).draw_deduplicated(512, &mut RandomStream::new(20, 0)).expect("draws that memory holds");
    assert_log_ratio(sample.log_q_of(&Rare(0.125), &[0]).expect("may be drawn")[0], -0.875f64.powi(512));
}

/// Two logarithms near 0, each to its own last bits.
fn assert_log_ratio(log_q: f32, wanted: f64) {
    assert!((f64::from(log_q) / wanted - 1.0).abs() < f64::from(f32::EPSILON), "{log_q}, not {wanted}");
}

#[test]
fn streams_are_chacha8_on_every_platform() {
    // The published vector of a zero key and nonce (Strombergson, "Test Vectors for the Stream Cipher ChaCha", 2013):
    // 3e00ef2f 895f40d6 7f5bb8e8 1f09a5a1.
    let mut random = RandomStream::new(0, 0);
    assert_eq!([random.next_u64(), random.next_u64()], [0xd640_5f89_2fef_003e, 0xa1a5_091f_e8b8_5b7f]);
    // Draws as they were when this was written; a change breaks everyone's reproducibility.
    let (counts, random) = (zipf_counts(1000), || RandomStream::new(7, 3));
    let first = |sampler: &dyn Distribution| sampler.draw(6, &mut random()).expect("draws that memory holds").ids;
    assert_eq!(first(&Uniform::new(1000).expect("some items")), UNIFORM);
    assert_eq!(first(&unigram(&counts, 0.75)), UNIGRAM);
    assert_eq!(first(&LogUniform::new(1000).expect("some items")), LOG_UNIFORM);
    assert_eq!(first(&mixture(1000)), MIXTURE);
    let distinct = unigram(&counts, 0.75).draw_distinct(6, &mut random()).expect("enough ids");
    assert_eq!(distinct.ids, DISTINCT);
    assert_eq!(Uniform::new(6).expect("some").draw_distinct(6, &mut random()).expect("six").ids, SHUFFLED);
}

const UNIFORM: [u64; 6] = [662, 504, 736, 43, 1, 636];
const UNIGRAM: [u64; 6] = [9, 2, 17, 43, 1, 636];
const LOG_UNIFORM: [u64; 6] = [96, 31, 160, 0, 0, 80];
const MIXTURE: [u64; 6] = [219, 0, 507, 43, 2, 994];
const DISTINCT: [u64; 6] = [9, 2, 17, 43, 1, 636];
const SHUFFLED: [u64; 6] = [3, 0, 4, 1, 2, 5];

#[test]
fn streams_and_seeds_are_independent() {
    const N: usize = 10;
    let uniform = Uniform::new(N as u64).expect("some items");
    let draws = draws_to_see_five_percent(N * N - 1);
    let draw =
        |seed, stream| uniform.draw(draws, &mut RandomStream::new(seed, stream)).expect("draws that memory holds").ids;
    let base = draw(5, 0);
    assert_eq!(base, draw(5, 0), "the same again");
    for other in [draw(5, 1), draw(5, 2), draw(6, 0), draw(5, u64::MAX)] {
        let pairs: Vec<u64> = base.iter().zip(&other).map(|(&a, &b)| a * N as u64 + b).collect();
        let statistic = chi_square(&histogram(&pairs, N * N), &[1.0 / (N * N) as f64; N * N]);
        assert!(statistic < critical(N * N - 1), "pairs of two streams: {statistic}");
    }
    // Nor is one a stretch of another: 64 bits coincide in 100,000 numbers with a probability of 3e-10.
    let numbers = (0..10).flat_map(|stream| {
        let mut random = RandomStream::new(5, stream);
        (0..10_000).map(move |_| random.next_u64())
    });
    assert_eq!(numbers.collect::<std::collections::HashSet<u64>>().len(), 100_000);
}

#[test]
fn a_clone_repeats_the_stream() {
    let mut random = RandomStream::new(5, 1);
    // Anywhere in one of the generator's blocks.
    for _ in 0..70 {
        let mut clone = random.clone();
        (0..100).for_each(|_| assert_eq!(random.next_u64(), clone.next_u64()));
        random.next_u64();
    }
}

/// An error's argument and what was found; every error has a rule.
fn error_of<T: std::fmt::Debug>(result: Result<T>) -> (String, String) {
    match result {
        Err(Error::Value { argument, value, rule }) if !rule.is_empty() => (argument, value),
        Err(Error::Shape { argument, found, rule }) if !rule.is_empty() => (argument, found),
        other => panic!("{other:?}"),
    }
}

fn names(argument: &str, found: &str) -> (String, String) {
    (argument.into(), found.into())
}

#[test]
fn options_out_of_range_are_rejected() {
    assert_eq!(error_of(Uniform::new(0)), names("num_items", "0"));
    assert_eq!(error_of(LogUniform::new(0)), names("num_items", "0"));
    assert_eq!(error_of(LogUniform::new(1 << 32)), names("num_items", "4294967296"));
    assert!(Uniform::new((1 << 32) - 1).is_ok());
    assert_eq!(error_of(Unigram::new(&[], 1.0)), names("counts", "0 elements"));
    assert_eq!(error_of(Unigram::new(&[0.0, -0.0], 1.0)), names("counts", "no element > 0"));
    for (bad, text) in [(-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf"), (-1e-320, "-1e-320")] {
        let (argument, found) = error_of(Unigram::new(&[1.0, 0.0, bad, bad], 0.75));
        assert!(argument == "counts[2]" && found.starts_with(text), "{argument} {found}");
    }
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_eq!(error_of(Unigram::new(&[1.0], bad)), names("distortion", &format!("{bad:?}")));
    }
}

#[test]
fn mixtures_that_are_none_are_rejected() {
    let uniform = |n| -> Box<dyn Distribution> { Box::new(Uniform::new(n).expect("some items")) };
    assert_eq!(error_of(Mixture::new(vec![])), names("components", "none"));
    for (bad, text) in [(0.0, "0"), (-1.0, "-1"), (f64::NAN, "NaN"), (f64::INFINITY, "inf")] {
        let mixture = Mixture::new(vec![(1.0, uniform(5)), (bad, uniform(5))]);
        assert_eq!(error_of(mixture), names("components[1].weight", text));
    }
    let mixture = Mixture::new(vec![(1.0, uniform(5)), (1.0, uniform(6))]);
    assert_eq!(error_of(mixture), names("components[1]", "6 items"));
    // No draw of 53 bits would choose it, and it would count in the support all the same. The weight is the caller's own.
    for (large, small, text) in [(1e300, 2e-300, "2e-300"), (1.0, 5e-324, "5e-324"), (8.0, 4e-16, "4e-16")] {
        let mixture = Mixture::new(vec![(small, uniform(5)), (large, uniform(5))]);
        assert_eq!(error_of(mixture), names("components[0].weight", text));
    }
}

/// A distribution of the caller's own that always draws its last item, and says how many it draws.
#[derive(Debug)]
struct Last {
    items: u32,
    support: u32,
}

impl Distribution for Last {
    fn num_items(&self) -> u32 {
        self.items
    }
    fn support(&self) -> u32 {
        self.support
    }
    fn probability(&self, id: u64) -> f64 {
        f64::from(u8::from(id + 1 == u64::from(self.items)))
    }
    fn draw_one(&self, _: &mut RandomStream) -> (u64, f64) {
        (u64::from(self.items) - 1, 1.0)
    }
}

#[test]
fn a_support_that_is_another_is_found() {
    let mut random = RandomStream::new(4, 0);
    let found = || names("distribution", "1 of 5 ids with a probability > 0");
    for count in [1, 2, 3] {
        assert_eq!(error_of(Last { items: 5, support: 3 }.draw_distinct(count, &mut random)), found(), "{count}");
    }
    let distinct = Last { items: 5, support: 1 }.draw_distinct(1, &mut random).expect("one id");
    assert_eq!((distinct.ids, distinct.log_q), (vec![4], vec![0.0]));
    // One too few, where all are asked for: there are more.
    let error = error_of(Fewer.draw_distinct(1, &mut random));
    assert_eq!(error, names("distribution", "2 of 2 ids with a probability > 0"));
}

/// A coin that says it has one side.
#[derive(Debug)]
struct Fewer;

impl Distribution for Fewer {
    fn num_items(&self) -> u32 {
        2
    }
    fn support(&self) -> u32 {
        1
    }
    fn probability(&self, id: u64) -> f64 {
        if id < 2 { 0.5 } else { 0.0 }
    }
    fn draw_one(&self, random: &mut RandomStream) -> (u64, f64) {
        (u64::from(random.below(2)), 0.5)
    }
}

/// Shares are what 53 bits make of them, the smallest one too, wherever it stands.
#[test]
fn every_component_has_a_share_of_the_draws() {
    let least = 2f64.powi(-53);
    let popular = || -> Box<dyn Distribution> { Box::new(unigram(&[1.0, 0.0, 0.0], 1.0)) };
    for rare_first in [false, true] {
        let mut components: Vec<(f64, Box<dyn Distribution>)> =
            vec![(1.0, popular()), (1.25 * least, Box::new(Last { items: 3, support: 1 }))];
        if rare_first {
            components.reverse();
        }
        let mixture = Mixture::new(components).expect("a share of 2^-53 or more");
        let probabilities = [0, 1, 2].map(|id| mixture.probability(id));
        assert_eq!((probabilities, mixture.support()), ([1.0 - least, 0.0, least], 2));
        let both = mixture.draw_distinct(2, &mut RandomStream::new(4, 0)).expect("two ids");
        assert_eq!((both.ids, both.log_q), (vec![0, 2], vec![0.0, 0.0]));
        // The one that always comes, but for one draw of 2^53.
        let one = mixture.draw_distinct(1, &mut RandomStream::new(4, 0)).expect("two ids");
        assert_eq!(one.ids, [0]);
    }
    // Thirds are no multiples of 2^-53, and sum to 1 all the same.
    let thirds = Mixture::new((0..3).map(|_| (0.1, popular())).collect()).expect("valid");
    assert_eq!(thirds.probability(0), 1.0);
}

#[test]
fn ids_without_a_log_q_are_rejected() {
    let mut random = RandomStream::new(1, 0);
    for (name, sampler, _) in samplers(10) {
        assert_eq!(error_of(sampler.log_q(&[9, 10])), names("ids[1]", "10"), "{name}");
        assert_eq!(error_of(sampler.log_q(&[u64::MAX])).0, "ids[0]", "{name}");
        let message = sampler.log_q(&[10]).expect_err("past the end").to_string();
        assert_eq!(message, "ids[0] is 10; rule: below 10 (num_items)", "{name}");
        assert_eq!(error_of(sampler.draw_distinct(11, &mut random)), names("count", "11 distinct ids"), "{name}");
        // Empty, and no id can be in it.
        let distinct = sampler.draw_distinct(0, &mut random).expect("none is few enough");
        let deduplicated = sampler.draw_deduplicated(0, &mut random).expect("draws that memory holds");
        for sample in [&sampler.draw(0, &mut random).expect("draws that memory holds"), &deduplicated, &distinct] {
            assert!(sample.ids.is_empty() && sample.log_q.is_empty());
        }
        for sample in [deduplicated, distinct] {
            assert_eq!(error_of(sample.log_q_of(&*sampler, &[3])), names("ids[0]", "3"), "{name}");
        }
    }
    // Nor a certain one.
    let one = Uniform::new(1).expect("some items");
    assert_eq!(
        error_of(one.draw_deduplicated(0, &mut random).expect("draws that memory holds").log_q_of(&one, &[0])),
        names("ids[0]", "0")
    );
    let some = unigram(&[1.0, 0.0, 2.0], 0.0);
    let sample = some.draw(4, &mut random).expect("draws that memory holds");
    for result in [some.log_q(&[0, 2, 1]), sample.log_q_of(&some, &[0, 2, 1])] {
        assert_eq!(error_of(result), names("ids[2]", "1"));
    }
    // Beside other pools they have one: -inf, which a union takes.
    let popularity = some.log_probabilities(&[0, 1, 2, 3]);
    assert_eq!(popularity, [0.5f32.ln(), f32::NEG_INFINITY, 0.5f32.ln(), f32::NEG_INFINITY]);
    let uniform = Uniform::new(4).expect("some items").log_probabilities(&[0, 1, 2, 3]);
    let mut copies = [0.0; 4];
    union_log_q(&[(6.0, &popularity), (4.0, &uniform)], &mut copies).expect("the uniform draws all");
    copies.iter().zip([4.0, 1.0, 4.0, 1.0]).for_each(|(&log_q, copies)| assert_log_close(log_q, copies, "a union"));
    assert_eq!(error_of(some.draw_distinct(3, &mut random)), names("count", "3 distinct ids"));
    let both = Mixture::new(vec![(1.0, Box::new(some.clone())), (1.0, Box::new(some))]).expect("valid");
    assert_eq!((both.support(), error_of(both.log_q(&[1]))), (2, names("ids[0]", "1")));
}

proptest! {
    #[test]
    fn a_bad_count_is_named(mut counts in prop::collection::vec(0.0f64..1e9, 1..50), at in any::<prop::sample::Index>(),
                            bad in prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -1e-9])) {
        let at = at.index(counts.len());
        counts[at] = bad;
        let found = format!("{bad:?}").replace(".0", "");
        prop_assert_eq!(error_of(Unigram::new(&counts, 1.0)), names(&format!("counts[{at}]"), &found));
    }

    /// Any counts, over all exponents of f64: the table's probabilities sum to 1, no count above 0 is lost, none of 0 drawn.
    #[test]
    fn any_counts_make_a_table(exponents in prop::collection::vec(prop::option::of(-300.0f64..300.0), 1..60), distortion in -2.0f64..2.0) {
        let counts: Vec<f64> = exponents.iter().map(|e| e.map_or(0.0, |e| 10f64.powf(e))).collect();
        prop_assume!(counts.iter().any(|&count| count > 0.0));
        let popularity = unigram(&counts, distortion);
        let probabilities: Vec<f64> = (0..counts.len() as u64).map(|id| popularity.probability(id)).collect();
        prop_assert!((probabilities.iter().sum::<f64>() - 1.0).abs() <= f64::from(f32::EPSILON));
        for (count, p) in counts.iter().zip(&probabilities) {
            prop_assert_eq!(*count > 0.0, *p > 0.0);
        }
        let mut random = RandomStream::new(3, 0);
        let sample = popularity.draw(200, &mut random).expect("draws that memory holds");
        prop_assert!(sample.ids.iter().all(|&id| counts[id as usize] > 0.0));
        prop_assert!(sample.log_q.iter().all(|log_q| log_q.is_finite() && *log_q <= 0.0));
        let support = popularity.support() as usize;
        let distinct = popularity.draw_distinct(support.div_ceil(2), &mut random).expect("enough ids");
        prop_assert!(distinct.log_q.iter().all(|log_q| log_q.is_finite() && *log_q <= 0.0));
    }
}
