//! Frequency estimators: against plain definitions, known Zipf streams with derived noise, drifts, and their saved states.

use std::collections::HashMap;
use std::fmt::Debug;

use catalog_softmax::Error;
use catalog_softmax::negatives::{
    CountMin, Distribution, ExactCounts, FrequencyEstimator, GapEstimator, LogUniform, RandomStream, Unigram,
};
use proptest::prelude::*;

/// Ids of a Zipf stream, spread over all 64 bits as real ids may be.
fn zipf(items: u64, draws: usize, stream: u64) -> Vec<u64> {
    let ranks =
        LogUniform::new(items).expect("some items").draw(draws, &mut RandomStream::new(21, stream)).expect("draws").ids;
    ranks.into_iter().map(id_of_rank).collect()
}

fn id_of_rank(rank: u64) -> u64 {
    (rank + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn counted(stream: &[u64]) -> HashMap<u64, u64> {
    let mut counts = HashMap::new();
    stream.iter().for_each(|&id| *counts.entry(id).or_insert(0) += 1);
    counts
}

fn gaps(width: usize, depth: usize, alpha: f64, seed: u64) -> GapEstimator {
    GapEstimator::new(width, depth, alpha, seed).expect("valid options")
}

fn count_min(width: usize, depth: usize, seed: u64) -> CountMin {
    CountMin::new(width, depth, seed).expect("valid options")
}

/// Observes a stream in batches of uneven sizes.
fn observe(estimator: &mut impl FrequencyEstimator, stream: &[u64]) {
    let mut rest = stream;
    for size in (1..).map(|i| 1 + (i * 37) % 100) {
        if rest.is_empty() {
            return;
        }
        let (batch, after) = rest.split_at(size.min(rest.len()));
        estimator.observe(batch);
        rest = after;
    }
}

#[test]
fn exact_counts_are_the_shares_of_the_stream() {
    let stream = zipf(1000, 50_000, 0);
    let mut counts = ExactCounts::new();
    observe(&mut counts, &stream);
    let wanted = counted(&stream);
    for (&id, &count) in &wanted {
        assert_eq!(counts.probability(id), count as f64 / 50_000.0);
        assert_eq!(counts.log_q(&[id]), [(count as f64 / 50_000.0).ln() as f32]);
    }
    assert!(!wanted.contains_key(&7));
    assert_eq!(counts.probability(7), 1.0 / 50_001.0);
}

/// The estimator's definition in f64 and without hashing, 1/Q of each id: n/k while k <= 1/α, then the average of the gaps with
/// the rate max(α, 1/k).
fn mean_gaps(stream: &[u64], alpha: f64) -> HashMap<u64, f64> {
    let mut positions: HashMap<u64, Vec<usize>> = HashMap::new();
    stream.iter().zip(1..).for_each(|(&id, t)| positions.entry(id).or_default().push(t));
    let mean = |times: &Vec<usize>| {
        if times.len() as f64 <= 1.0 / alpha {
            return stream.len() as f64 / times.len() as f64;
        }
        let starts = std::iter::once(&0).chain(times);
        let gaps = times.iter().zip(starts).map(|(t, before)| (t - before) as f64);
        gaps.zip(1..).fold(0.0, |mean, (gap, k)| {
            let rate = f64::max(alpha, 1.0 / f64::from(k));
            (1.0 - rate) * mean + rate * gap
        })
    };
    positions.iter().map(|(&id, times)| (id, mean(times))).collect()
}

/// Until an id has come up 1/α times, whatever the order of batches.
#[test]
fn the_first_estimates_are_shares_in_any_order() {
    let distinct: Vec<u64> = (0..512).map(id_of_rank).collect();
    let repeated: Vec<u64> = (0..512).map(|i| id_of_rank(i % 7 * (i % 3))).collect();
    for batch in [distinct, repeated] {
        let reversed: Vec<u64> = batch.iter().rev().copied().collect();
        let mut sorted = batch.clone();
        sorted.sort_unstable();
        for batch in [&batch, &reversed, &sorted] {
            let (mut counts, mut estimator) = (ExactCounts::new(), gaps(1 << 22, 2, 1e-3, 5));
            for _ in 0..2 {
                counts.observe(batch);
                estimator.observe(batch);
                assert_eq!(estimator.log_q(batch), counts.log_q(batch));
                assert!(estimator.log_q(batch).iter().all(|&log_q| log_q < 0.0));
            }
        }
    }
    // An id that stays away has a smaller share with each further one; after 1/α appearances, here 4, its own gap.
    let mut estimator = gaps(1 << 22, 2, 0.25, 5);
    estimator.observe(&[1, 2, 1, 2, 1, 2]);
    assert_eq!(estimator.probability(1), 0.5);
    estimator.observe(&[3, 3, 3, 3]);
    assert_eq!(estimator.probability(1), 0.3);
    // Gaps of 1, 2 and 2 of the first three appearances, a fourth one of 6: a mean of 11/4, and then 0.75 · 11/4 + 0.25 · 1.
    estimator.observe(&[1]);
    assert_eq!(estimator.probability(1), 4.0 / 11.0);
    estimator.observe(&[1]);
    assert_eq!(estimator.probability(1), 1.0 / (0.75 * 2.75 + 0.25));
    estimator.observe(&[3; 100]);
    assert_eq!(estimator.probability(1), 1.0 / (0.75 * 2.75 + 0.25));
}

#[test]
fn gaps_follow_their_definition_where_no_cells_are_shared() {
    for alpha in [1e-4, 0.01, 0.3, 1.0] {
        let stream = zipf(200, 30_000, 1);
        // 200 ids in 2^22 cells: none shared in both rows but for 1e-9.
        let mut estimator = gaps(1 << 22, 2, alpha, 5);
        observe(&mut estimator, &stream);
        for (id, gap) in mean_gaps(&stream, alpha) {
            // Each update rounds to f32 by 2^-24; the rate forgets them after 1/rate, at most min(1/α, appearances).
            let tolerance = 2f64.powi(-24) * (1.0 / alpha).min(30_000.0);
            let relative = estimator.probability(id) * gap - 1.0;
            assert!(
                relative.abs() <= tolerance,
                "alpha {alpha}: 1/{} instead of {gap}",
                1.0 / estimator.probability(id)
            );
        }
    }
}

#[test]
fn gaps_estimate_a_known_distribution() {
    const ITEMS: u64 = 10_000;
    let alpha = 0.02;
    let truth = LogUniform::new(ITEMS).expect("some items");
    // Streams enough that the means are known to 1%; ids that come up 200 times or more, and rarer ones.
    let (mut mature, mut rare) = (Vec::new(), Vec::new());
    for stream in 0..20 {
        let mut estimator = gaps(1 << 18, 2, alpha, stream);
        observe(&mut estimator, &zipf(ITEMS, 100_000, 100 + stream));
        for rank in (0..40).chain(1000..1040) {
            let q = truth.probability(rank);
            let error = estimator.log_q(&[id_of_rank(rank)])[0] - q.ln() as f32;
            if rank < 40 { mature.push(f64::from(error)) } else { rare.push(f64::from(error)) }
        }
    }
    let (mean, deviation) = moments(&mature);
    // Relative variance of the mean gap: α / (2 − α), times 1 − Q, which is 0.92 to 1 here; log is concave: + α/4.
    let wanted = (alpha / (2.0 - alpha)).sqrt();
    let standard_error = wanted / (mature.len() as f64).sqrt();
    assert!((mean - alpha / 4.0).abs() < 5.0 * standard_error, "mean error {mean} ± {standard_error} of log Q");
    assert!((deviation / wanted - 1.0).abs() < 0.15, "deviation {deviation}, not {wanted}");
    // Where the expected number of appearances is about 11, the mean of k gaps: 1/sqrt(k), and + 1/(2k).
    let (mean, deviation) = moments(&rare);
    assert!(mean.abs() < 0.2 && deviation > 0.2 && deviation < 0.5, "rare ids: {mean}, {deviation}");
}

fn moments(values: &[f64]) -> (f64, f64) {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    (mean, (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt())
}

#[test]
fn several_hashes_mend_collisions() {
    const ITEMS: u64 = 5000;
    let stream = zipf(ITEMS, 200_000, 2);
    let exact = mean_gaps(&stream, 0.05);
    let errors = |depth| {
        let mut estimator = gaps(4096, depth, 0.05, 3);
        observe(&mut estimator, &stream);
        let overestimated = exact.iter().filter(|(id, gap)| estimator.probability(**id) * **gap > 1.5).count();
        overestimated as f64 / exact.len() as f64
    };
    let (one, three) = (errors(1), errors(3));
    println!("Q is more than half too high for {one} of the ids with one hash, for {three} with three");
    // 5000 ids in 4096 cells: a cell is shared with 1 − exp(−5000/4096) = 0.7 of the ids in one row, with its cube in all three,
    // and sharing with rarer ids does not count.
    assert!(one > 0.3 && three < one.powi(3) * 1.5, "{one} and {three}");
}

#[test]
fn count_min_is_never_low_and_rarely_high() {
    const ITEMS: u64 = 5000;
    let stream = zipf(ITEMS, 100_000, 3);
    let exact = counted(&stream);
    let (width, depth) = (500, 2);
    let (mut past_bound, mut total, mut plain) = (0, 0.0, 0.0);
    for seed in 0..20 {
        let mut sketch = count_min(width, depth, seed);
        observe(&mut sketch, &stream);
        plain += plain_count_min(&stream, width, depth, seed);
        // One row is a plain sketch; a further one never raises an estimate.
        let mut one_row = count_min(width, 1, seed);
        observe(&mut one_row, &stream);
        for (&id, &count) in &exact {
            let estimate = (sketch.probability(id) * 100_000.0).round() as u64;
            assert!(estimate >= count, "{estimate} of {count}");
            assert!(sketch.probability(id) <= one_row.probability(id), "id {id}");
            total += sketch.probability(id);
            past_bound += usize::from(estimate as f64 > count as f64 + 100_000.0 * std::f64::consts::E / width as f64);
        }
    }
    println!("estimates sum to {total}, a plain sketch's to {plain}");
    assert!(total < 0.97 * plain, "estimates sum to {total}, a plain sketch's to {plain}");
    // exp(−2) of them by the bound.
    let share = past_bound as f64 / (20 * exact.len()) as f64;
    println!("{share} of the estimates are past the bound, which allows {}", (-2f64).exp());
    assert!(share < (-2f64).exp());
    // With room for all, the counts are exact.
    let mut sketch = count_min(1 << 22, 3, 1);
    observe(&mut sketch, &stream);
    exact.iter().for_each(|(&id, &count)| assert_eq!(sketch.probability(id), count as f64 / 100_000.0));
}

/// Sum of the estimated probabilities of a sketch that raises every cell.
fn plain_count_min(stream: &[u64], width: usize, depth: usize, seed: u64) -> f64 {
    let mut random = RandomStream::new(seed, 99);
    let mut rows: Vec<(HashMap<u64, usize>, Vec<u64>)> = vec![(HashMap::new(), vec![0; width]); depth];
    for &id in stream {
        for (cell_of, cells) in &mut rows {
            let cell = *cell_of.entry(id).or_insert_with(|| random.below(width as u32) as usize);
            cells[cell] += 1;
        }
    }
    let estimate = |id: &u64| rows.iter().map(|(cell_of, cells)| cells[cell_of[id]]).min().expect("rows");
    rows[0].0.keys().map(|id| estimate(id) as f64 / stream.len() as f64).sum()
}

/// Draws of two items: the second has the probability `q`.
fn coin(q: f64, draws: usize, random: &mut RandomStream) -> Vec<u64> {
    Unigram::new(&[1.0 - q, q], 1.0).expect("valid").draw(draws, random).expect("draws").ids
}

#[test]
fn gaps_follow_a_drift_and_counts_do_not() {
    let (alpha, before, after) = (0.05, 0.02, 0.1);
    let appearances = 20i32; // 1/alpha: one time constant.
    let (mut gap_after, mut much_later) = (Vec::new(), Vec::new());
    let mut counts = ExactCounts::new();
    for trial in 0..400 {
        let mut random = RandomStream::new(22, trial);
        let mut estimator = gaps(1024, 2, alpha, trial);
        // 10,000 ids with 200 appearances: the first gaps are forgotten to 0.95^180 = 1e-4.
        let first = coin(before, 10_000, &mut random);
        estimator.observe(&first);
        counts.observe(&first);
        let mut seen = 0;
        while seen < appearances as u64 {
            let batch = coin(after, 1, &mut random);
            estimator.observe(&batch);
            seen += batch[0];
        }
        gap_after.push(1.0 / estimator.probability(1));
        let rest = coin(after, 3000, &mut random);
        estimator.observe(&rest);
        counts.observe(&rest);
        much_later.push(1.0 / estimator.probability(1));
    }
    // The mean gap after k appearances: δ' + (δ − δ') (1 − α)^k. The first of them waited partly under the old Q: an appearance's
    // gap begins before the change, on average 1/Q before it, so that this gap is longer by δ.
    let left = (1.0 - alpha).powi(appearances);
    let (old, new) = (1.0 / before, 1.0 / after);
    let wanted = new + (old - new) * left + alpha * (1.0 - alpha).powi(appearances - 1) * (old - 1.0);
    let (mean, deviation) = moments(&gap_after);
    let error = deviation / (gap_after.len() as f64).sqrt();
    assert!((mean - wanted).abs() < 5.0 * error, "mean gap {mean} ± {error} after one time constant, not {wanted}");
    // Half or twice the rate would be seen.
    for rate in [alpha / 2.0, alpha * 2.0] {
        let other = new + (old - new) * (1.0 - rate).powi(appearances);
        assert!((mean - other).abs() > 5.0 * error, "{rate} fits as well");
    }
    let (mean, deviation) = moments(&much_later);
    assert!((mean - new).abs() < 5.0 * deviation / 20.0, "{mean} in the end, not {new}");
    // Counts are of the whole stream: 10,000 ids before, some 3,200 after.
    let whole = counts.probability(1);
    assert!((whole - (10_000.0 * before + 3000.0 * after) / 13_000.0).abs() < 0.001, "{whole}");
}

#[test]
fn an_id_in_a_batch_has_the_inclusion_probability() {
    let (batch_size, batches) = (64, 4000);
    let stream = zipf(300, batch_size * batches, 4);
    let mut counts = ExactCounts::new();
    let mut batches_with: HashMap<u64, u64> = HashMap::new();
    for batch in stream.chunks(batch_size) {
        counts.observe(batch);
        counted(batch).keys().for_each(|&id| *batches_with.entry(id).or_insert(0) += 1);
    }
    let truth = LogUniform::new(300).expect("some items");
    for rank in 0..300 {
        let id = id_of_rank(rank);
        let share = batches_with.get(&id).copied().unwrap_or(0) as f64 / batches as f64;
        let q = truth.probability(rank);
        let wanted = 1.0 - (1.0 - q).powi(batch_size as i32);
        let error = (wanted * (1.0 - wanted) / batches as f64).sqrt();
        assert!((share - wanted).abs() < 5.0 * error, "rank {rank} is in {share} of the batches, not {wanted}");
        // What the estimator says rests on the count, whose relative error is 1/sqrt(n Q).
        let estimate = f64::from(counts.log_q_deduplicated(&[id], batch_size)[0]).exp();
        let count_error = wanted / (q * stream.len() as f64).sqrt();
        assert!((estimate - wanted).abs() < 5.0 * count_error + 1e-6, "rank {rank}: {estimate}, not {wanted}");
        // Unigram Q as it stands, as deduplicated batches are often given, would be far off.
        assert!(wanted > 3.0 * q);
    }
}

#[test]
fn an_id_that_is_in_nearly_every_batch_is_not_certain() {
    let mut counts = ExactCounts::new();
    counts.observe(&[3, 1, 1, 1, 1, 1, 1, 1]);
    // 0.875^512 = 2e-30.
    let ratio = f64::from(counts.log_q_deduplicated(&[3], 512)[0]) / -0.875f64.powi(512);
    assert!((ratio - 1.0).abs() < f64::from(f32::EPSILON), "{ratio}");
}

#[test]
fn an_id_that_was_never_seen_is_as_if_it_came_next() {
    fn check(mut estimator: impl FrequencyEstimator) {
        assert_eq!(estimator.log_q(&[1, 2]), [0.0, 0.0], "nothing observed");
        estimator.observe(&[5, 5, 9]);
        let unseen = estimator.log_q(&[1])[0];
        assert_eq!(unseen, 0.25f32.ln());
        assert!(estimator.log_q_deduplicated(&[1, 5], 3).iter().all(|log_q| log_q.is_finite()));
        estimator.observe(&[1]);
        assert_eq!(estimator.log_q(&[1])[0], unseen, "as announced");
        // Nothing is clipped: rare ids get a log_q far below those that TFRS clips at, log 1e-6 = −13.8.
        let filler = vec![5u64; 1 << 20];
        (0..8).for_each(|_| estimator.observe(&filler));
        estimator.observe(&[77]);
        assert!(estimator.log_q(&[77, 78]).iter().all(|&log_q| log_q < -15.9), "{:?}", estimator.log_q(&[77, 78]));
    }
    check(ExactCounts::new());
    check(count_min(1 << 12, 3, 1));
    check(gaps(1 << 12, 3, 0.01, 1));
}

/// Saves in the middle, goes on in both, and compares everything.
fn restores<E: FrequencyEstimator + Debug>(mut estimator: E) {
    let (first, second) = (zipf(3000, 20_000, 5), zipf(5000, 20_000, 6));
    observe(&mut estimator, &first);
    let bytes = estimator.to_bytes();
    let mut restored = E::from_bytes(&bytes).expect("a saved state");
    assert_eq!(restored.to_bytes(), bytes);
    for estimator in [&mut estimator, &mut restored] {
        observe(estimator, &second);
    }
    assert_eq!(estimator.to_bytes(), restored.to_bytes());
    let ids: Vec<u64> = (0..6000).map(id_of_rank).collect();
    assert_eq!(estimator.log_q(&ids), restored.log_q(&ids));
    assert_ne!(estimator.to_bytes(), bytes, "the second half counts");
}

#[test]
fn restored_estimators_go_on_identically() {
    restores(ExactCounts::new());
    restores(count_min(1000, 3, 9));
    restores(gaps(1000, 2, 0.05, 9));
}

fn rejects<E: FrequencyEstimator + Debug>(bytes: &[u8]) {
    match E::from_bytes(bytes) {
        Err(Error::Value { argument, value, rule }) => {
            assert_eq!(argument, "bytes");
            assert!(!value.is_empty() && rule.contains("to_bytes"));
        }
        other => panic!("{other:?}"),
    }
}

/// Contents with a right checksum.
fn forge(contents: Vec<u8>) -> Vec<u8> {
    catalog_softmax_testing::forge::estimator([&contents[..], &[0; 8]].concat())
}

fn states() -> [Vec<u8>; 3] {
    let stream = zipf(50, 200, 7);
    let (mut counts, mut sketch, mut gaps) = (ExactCounts::new(), count_min(16, 2, 1), gaps(16, 2, 0.05, 1));
    counts.observe(&stream);
    sketch.observe(&stream);
    gaps.observe(&stream);
    [counts.to_bytes(), sketch.to_bytes(), gaps.to_bytes()]
}

fn each_rejects(kind: usize, bytes: &[u8]) {
    [rejects::<ExactCounts>, rejects::<CountMin>, rejects::<GapEstimator>][kind](bytes);
}

#[test]
fn states_of_others_and_cut_ones_are_rejected() {
    for (kind, state) in states().iter().enumerate() {
        (0..state.len()).for_each(|len| each_rejects(kind, &state[..len]));
        (0..3).filter(|&other| other != kind).for_each(|other| each_rejects(other, state));
        each_rejects(kind, &[&state[..], &[0]].concat());
    }
}

#[test]
fn forged_states_are_rejected() {
    let [counts, sketch, gaps] = states();
    let with = |state: &[u8], at: usize, value: u64| {
        let mut contents = state[..state.len() - 8].to_vec();
        contents[at..at + 8].copy_from_slice(&value.to_le_bytes());
        forge(contents)
    };
    // Counts: header 6, then (id, count).
    rejects::<ExactCounts>(&with(&counts, 14, 0));
    rejects::<ExactCounts>(&with(&counts, 14, u64::MAX));
    rejects::<ExactCounts>(&with(&counts, 6, u64::MAX));
    rejects::<ExactCounts>(&forge(counts[..counts.len() - 16].to_vec()));
    for state in [&sketch, &gaps] {
        let kind = if std::ptr::eq(state, &sketch) { 1 } else { 2 };
        // Seed 6, width 14, depth 22, draws 30, then alpha and cells: sizes past the bytes must not be allocated.
        for (at, value) in
            [(14, 0), (14, 15), (14, 17), (14, 1 << 60), (14, u64::MAX), (22, 0), (22, 65), (22, u64::MAX)]
        {
            each_rejects(kind, &with(state, at, value));
        }
        each_rejects(kind, &with(state, 30, u64::MAX));
        each_rejects(kind, &with(state, 30, 0));
        each_rejects(kind, &with(state, state.len() - 16, u64::MAX));
    }
    for alpha in [f64::NAN, 0.0, -1.0, 1.5] {
        rejects::<GapEstimator>(&with(&gaps, 38, alpha.to_bits()));
    }
    rejects::<GapEstimator>(&with(&gaps, 46, 201));
    // The last cell's appearances, beside its gap: more of them than ids.
    let at = gaps.len() - 16;
    let cell = u64::from_le_bytes(gaps[at..at + 8].try_into().expect("8 bytes"));
    rejects::<GapEstimator>(&with(&gaps, at, cell & !0xffff_ffff | 201));
}

#[test]
fn options_out_of_range_are_rejected() {
    let error_of = |result: Result<(), Error>| match result {
        Err(Error::Value { argument, value, rule }) => (argument, value, rule),
        other => panic!("{other:?}"),
    };
    for (width, depth, argument, value) in [
        (0, 1, "width", "0"),
        (usize::MAX, 1, "width", "18446744073709551615"),
        (1, 0, "depth", "0"),
        (1, 65, "depth", "65"),
    ] {
        for result in [CountMin::new(width, depth, 0).map(|_| ()), GapEstimator::new(width, depth, 0.1, 0).map(|_| ())]
        {
            let (found, text, rule) = error_of(result);
            assert_eq!((found.as_str(), text.as_str()), (argument, value));
            assert!(!rule.is_empty());
        }
    }
    // More than any machine has.
    let (argument, _, rule) = error_of(CountMin::new(1 << 40, 64, 0).map(|_| ()));
    assert_eq!((argument.as_str(), rule.as_str()), ("width", "the cells of 64 (depth) hash functions fit in memory"));
    for alpha in [0.0, -0.1, 1.1, f64::NAN, 1e-5] {
        assert_eq!(error_of(GapEstimator::new(1, 1, alpha, 0).map(|_| ())).0, "alpha");
    }
}

fn use_if_accepted(kind: usize, bytes: &[u8]) {
    fn use_it<E: FrequencyEstimator>(bytes: &[u8]) {
        if let Ok(mut estimator) = E::from_bytes(bytes) {
            estimator.observe(&[1, 2, 3, u64::MAX]);
            let log_q = estimator.log_q(&[1, 2, 3, u64::MAX, 99]);
            assert!(log_q.iter().all(|log_q| log_q.is_finite() && *log_q <= 0.0), "{log_q:?}");
        }
    }
    [use_it::<ExactCounts>, use_it::<CountMin>, use_it::<GapEstimator>][kind](bytes);
}

proptest! {
    #[test]
    fn a_changed_byte_is_found(kind in 0usize..3, at in any::<prop::sample::Index>(), change in 1u8..) {
        let mut state = states()[kind].clone();
        let at = at.index(state.len());
        state[at] ^= change;
        each_rejects(kind, &state);
    }

    /// With the checksum right, contents are either a state or an error; and a state works.
    #[test]
    fn forged_contents_never_panic(kind in 0usize..3, at in any::<prop::sample::Index>(), bytes in any::<[u8; 8]>()) {
        let state = &states()[kind];
        let mut contents = state[..state.len() - 8].to_vec();
        let at = at.index(contents.len() - 8);
        contents[at..at + 8].copy_from_slice(&bytes);
        let forged = forge(contents);
        use_if_accepted(kind, &forged);
    }

    #[test]
    fn garbage_is_rejected(kind in 0usize..3, bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        each_rejects(kind, &bytes);
        each_rejects(kind, &forge(bytes.clone()));
        // With the right header, they may be a state.
        use_if_accepted(kind, &forge([b"CSFQ", &[2, kind as u8 + 1][..], &bytes].concat()));
    }
}
