//! Exactly k distinct ids: the sets come with the probability of successive draws, by enumeration, and log_q corrects sums over them.

use std::collections::{BTreeMap, BTreeSet};

use catalog_softmax::negatives::{Distribution, RandomStream, Uniform};
use catalog_softmax_testing::samplers::{powers, unigram, zipf_counts};
use catalog_softmax_testing::statistics::{chi_square, critical, draws_to_see_five_percent, five_percent_off};

/// Probability of each set of `k` ids under draws until there are k distinct ones, by enumerating the orders.
fn successive_sets(q: &[f64], k: usize) -> BTreeMap<Vec<u64>, f64> {
    let mut sets = BTreeMap::new();
    let mut orders = vec![(Vec::new(), 1.0)];
    for _ in 0..k {
        let extended = orders.iter().flat_map(|(path, chance): &(Vec<usize>, f64)| {
            let left: f64 = 1.0 - path.iter().map(|&id| q[id]).sum::<f64>();
            let next = (0..q.len()).filter(|id| !path.contains(id));
            next.map(move |id| ([&path[..], &[id]].concat(), chance * q[id] / left)).collect::<Vec<_>>()
        });
        orders = extended.collect();
    }
    for (path, chance) in orders {
        let mut set: Vec<u64> = path.iter().map(|&id| id as u64).collect();
        set.sort_unstable();
        *sets.entry(set).or_insert(0.0) += chance;
    }
    sets
}

/// Many samples of k distinct ids: checks the sets against `wanted`, and that each id's 1/inclusion where it is drawn, else 0,
/// averages to 1, by 5 standard errors and f32's rounding.
fn check_distinct(sampler: &dyn Distribution, k: usize, wanted: &BTreeMap<Vec<u64>, f64>) {
    let rarest = wanted.values().fold(1.0, |rarest: f64, &p| rarest.min(p));
    let trials = draws_to_see_five_percent(wanted.len() - 1).max((10.0 / rarest) as usize);
    let n = sampler.num_items() as usize;
    let mut random = RandomStream::new(16, k as u64);
    let mut seen: BTreeMap<Vec<u64>, u64> = wanted.keys().map(|set| (set.clone(), 0)).collect();
    let (mut sum, mut squares) = (vec![0.0; n], vec![0.0; n]);
    for _ in 0..trials {
        let sample = sampler.draw_distinct(k, &mut random).expect("enough ids");
        assert_eq!(sample.log_q_of(sampler, &sample.ids).expect("drawn"), sample.log_q);
        for (&id, &log_q) in sample.ids.iter().zip(&sample.log_q) {
            let weight = f64::from(-log_q).exp();
            sum[id as usize] += weight;
            squares[id as usize] += weight * weight;
        }
        let mut set = sample.ids;
        set.sort_unstable();
        *seen.get_mut(&set).expect("a set of k distinct ids") += 1;
    }
    let counts: Vec<u64> = seen.into_values().collect();
    let probabilities: Vec<f64> = wanted.values().copied().collect();
    assert!(chi_square(&counts, &probabilities) < critical(counts.len() - 1), "{sampler:?}: sets of {k}");
    assert!(chi_square(&counts, &five_percent_off(&probabilities)) > critical(counts.len() - 1), "5% off is accepted");
    for id in 0..n {
        let mean = sum[id] / trials as f64;
        let error = ((squares[id] / trials as f64 - mean * mean) / trials as f64).sqrt();
        assert!((mean - 1.0).abs() < 5.0 * error + 1e-6, "{sampler:?}: id {id} of {k} counts {mean} ± {error}, not 1");
    }
}

#[test]
fn distinct_ids_come_with_weights_that_correct_exactly() {
    let counts = [20.0, 10.0, 4.0, 3.0, 2.0, 1.0];
    let popularity = unigram(&counts, 1.0);
    for k in [1, 2, 4] {
        check_distinct(&popularity, k, &successive_sets(&powers(&counts, 1.0), k));
    }
    // So skewed that in about half of the samples N tries do not find four ids, and the pass over the catalogue does.
    let skewed = [30.0, 30.0, 3.0, 2.0, 2.0, 2.0];
    check_distinct(&unigram(&skewed, 1.0), 3, &successive_sets(&powers(&skewed, 1.0), 3));
}

/// Of ids in the sample and of others, log_q_of says what, on average over samples, is the probability to be in one: by 5 standard
/// errors, which are small enough to reject 5%.
#[test]
fn beside_distinct_ids_every_id_has_its_inclusion_probability() {
    const TRIALS: usize = 40_000;
    let counts = [40.0, 20.0, 10.0, 5.0, 3.0, 2.0, 1.0];
    let (popularity, q) = (unigram(&counts, 1.0), powers(&counts, 1.0));
    let ids: Vec<u64> = (0..7).collect();
    // Five are seldom found by N tries, so that the times of the last one and of the next come from the pass over the catalogue.
    for k in [1, 2, 5] {
        let mut wanted = [0.0; 7];
        for (set, chance) in successive_sets(&q, k) {
            set.iter().for_each(|&id| wanted[id as usize] += chance);
        }
        let mut random = RandomStream::new(22, k as u64);
        let (mut sum, mut squares) = ([0.0; 7], [0.0; 7]);
        for _ in 0..TRIALS {
            let sample = popularity.draw_distinct(k, &mut random).expect("enough ids");
            let log_q = sample.log_q_of(&popularity, &ids).expect("all may be drawn");
            for (id, log_q) in log_q.iter().enumerate() {
                let inclusion = f64::from(*log_q).exp();
                sum[id] += inclusion;
                squares[id] += inclusion * inclusion;
            }
        }
        for (id, wanted) in wanted.iter().enumerate() {
            let mean = sum[id] / TRIALS as f64;
            let error = ((squares[id] / TRIALS as f64 - mean * mean) / TRIALS as f64).sqrt();
            assert!(5.0 * error < 0.05 * wanted, "{k} ids, id {id}: {error} is too rough");
            assert!((mean - wanted).abs() < 5.0 * error, "{k} ids, id {id}: {mean} ± {error}, not {wanted}");
        }
    }
}

/// Past the blocks in which draws are made, where sets cannot be enumerated: the sum of 1/inclusion over the sample counts the
/// catalogue, by 5 standard errors.
#[test]
fn many_distinct_ids_count_the_catalogue() {
    const TRIALS: usize = 2000;
    let n = 1000;
    let popularity = unigram(&zipf_counts(n), 0.75);
    let mut random = RandomStream::new(21, 0);
    for k in [63, 64, 65, 300] {
        let (mut sum, mut squares) = (0.0, 0.0);
        for _ in 0..TRIALS {
            let sample = popularity.draw_distinct(k, &mut random).expect("enough ids");
            assert_eq!(sample.ids.iter().collect::<BTreeSet<_>>().len(), k);
            let size: f64 = sample.log_q.iter().map(|&log_q| f64::from(-log_q).exp()).sum();
            sum += size;
            squares += size * size;
        }
        let mean = sum / TRIALS as f64;
        let error = ((squares / TRIALS as f64 - mean * mean) / TRIALS as f64).sqrt();
        assert!(error < 0.01 * n as f64, "{k} ids: too rough to notice 5%");
        assert!((mean - n as f64).abs() < 5.0 * error, "{k} ids count {mean} ± {error}, not {n}");
    }
}

#[test]
fn tensorflows_inclusion_probabilities_are_approximate() {
    // What draw_distinct does not use: with them, the check above fails.
    let counts = [20.0, 10.0, 4.0, 3.0, 2.0, 1.0];
    let (popularity, q) = (unigram(&counts, 1.0), powers(&counts, 1.0));
    let (k, trials, mut random) = (2, 100_000, RandomStream::new(17, 0));
    let (mut sum, mut squares) = ([0.0; 6], [0.0; 6]);
    for _ in 0..trials {
        let (mut ids, mut tries) = (Vec::new(), 0);
        while ids.len() < k {
            let (id, _) = popularity.draw_one(&mut random);
            tries += 1;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        for id in ids {
            let weight = 1.0 / (1.0 - (1.0 - q[id as usize]).powi(tries));
            sum[id as usize] += weight;
            squares[id as usize] += weight * weight;
        }
    }
    let worst = (0..6).map(|id| {
        let mean = sum[id] / f64::from(trials);
        let error = ((squares[id] / f64::from(trials) - mean * mean) / f64::from(trials)).sqrt();
        ((mean - 1.0).abs() / error, mean)
    });
    let (errors, mean) = worst.fold((0.0, 1.0), |a, b| if b.0 > a.0 { b } else { a });
    println!("an id counts {mean} instead of 1, {errors} standard errors off");
    assert!(errors > 10.0);
}

#[test]
fn uniform_distinct_ids_are_exactly_k_of_n() {
    let uniform = Uniform::new(6).expect("some items");
    let sets = successive_sets(&[1.0 / 6.0; 6], 3);
    check_distinct(&uniform, 3, &sets);
    let mut random = RandomStream::new(18, 0);
    // Each place holds each id alike, so that the first few are a sample, too.
    let trials = draws_to_see_five_percent(5);
    let mut at_place = [[0u64; 6]; 3];
    for _ in 0..trials {
        let sample = uniform.draw_distinct(3, &mut random).expect("enough ids");
        assert_eq!(sample.log_q, [0.5f32.ln(); 3]);
        sample.ids.iter().enumerate().for_each(|(place, &id)| at_place[place][id as usize] += 1);
    }
    for counts in at_place {
        assert!(chi_square(&counts, &[1.0 / 6.0; 6]) < critical(5), "{counts:?}");
    }
}

#[test]
fn everything_that_can_be_drawn_is_certain() {
    let counts = [3.0, 0.0, 1.0, 1e-200];
    let popularity = unigram(&counts, 1.0);
    let uniform = Uniform::new(3).expect("some items");
    let mut random = RandomStream::new(19, 0);
    let all = popularity.draw_distinct(3, &mut random).expect("three have counts");
    assert_eq!((all.ids, all.log_q), (vec![0, 2, 3], vec![0.0; 3]));
    let mut all = uniform.draw_distinct(3, &mut random).expect("all");
    all.ids.sort_unstable();
    assert_eq!((all.ids, all.log_q), (vec![0, 1, 2], vec![0.0; 3]));
}
