//! A generated data set, for when there is none at hand: Zipf popularity and latent taste.
//!
//! Items lie on a sphere of [`LATENT`] dimensions, and so does each user's taste. A user takes distinct items, each in
//! proportion to `rank^-ZIPF · exp(TASTE · taste·item)`: popular things, and things to their taste.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Gumbel, StandardNormal};

use crate::data::Sequences;

const USERS: usize = 6000;
const ITEMS: usize = 2000;
const LATENT: usize = 8;
const ZIPF: f32 = 1.0;
const TASTE: f32 = 5.0;
/// Number of items that a user takes: uniform over this range.
const TAKEN: std::ops::Range<usize> = 10..40;
/// The data are the same in every run; `--seed` is the training's.
const SEED: u64 = 20_250_101;

/// One line for the output: nobody should take the numbers for those of real users.
pub fn description() -> String {
    format!(
        "GENERATED data (no --data given): {USERS} users, {ITEMS} items, popularity Zipf({ZIPF:.1}), \
         taste of {LATENT} latent dimensions"
    )
}

pub fn sequences() -> Sequences {
    let mut rng = StdRng::seed_from_u64(SEED);
    let items: Vec<[f32; LATENT]> = (0..ITEMS).map(|_| on_sphere(&mut rng)).collect();
    let of_user = (0..USERS).map(|_| taken_by_one_user(&items, &mut rng)).collect();
    Sequences { of_user, item_names: (1..=ITEMS).map(|rank| format!("item{rank}")).collect() }
}

/// Draws without replacement by the Gumbel trick: the largest of `log weight + Gumbel noise`.
fn taken_by_one_user(items: &[[f32; LATENT]], rng: &mut StdRng) -> Vec<u32> {
    let taste = on_sphere(rng);
    let noise = Gumbel::new(0.0f32, 1.0).expect("a scale of 1 is valid");
    let mut keys: Vec<(f32, u32)> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let affinity: f32 = taste.iter().zip(item).map(|(a, b)| a * b).sum();
        let log_weight = TASTE * affinity - ZIPF * ((index + 1) as f32).ln();
        keys.push((log_weight + noise.sample(rng), index as u32));
    }
    let count = rng.random_range(TAKEN);
    keys.select_nth_unstable_by(count, |a, b| b.0.total_cmp(&a.0));
    let mut taken: Vec<u32> = keys[..count].iter().map(|&(_, index)| index).collect();
    // The largest keys are the likeliest items: in the order of the keys, the last ones would be less popular.
    taken.shuffle(rng);
    taken
}

fn on_sphere(rng: &mut StdRng) -> [f32; LATENT] {
    let mut point = [0.0f32; LATENT];
    point.fill_with(|| StandardNormal.sample(rng));
    let norm = point.iter().map(|x| x * x).sum::<f32>().sqrt();
    point.map(|x| x / norm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_are_always_the_same_and_skewed() {
        let data = sequences();
        assert_eq!(data.of_user, sequences().of_user);
        let mut counts = vec![0u32; ITEMS];
        for &item in data.of_user.iter().flatten() {
            counts[item as usize] += 1;
        }
        let (head, tail): (u32, u32) = (counts[..ITEMS / 10].iter().sum(), counts[ITEMS / 2..].iter().sum());
        assert!(head > 2 * tail, "the first tenth was taken {head} times, the last half {tail} times");
    }
}
