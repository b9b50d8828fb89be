//! A generated data set, for when there is none at hand: Zipf popularity and latent taste, for a catalogue of any size.
//!
//! Items lie on a sphere of [`LATENT`] dimensions, and so does each user's taste. A user takes distinct items, one after
//! the other, each in proportion to `rank^-ZIPF · exp(TASTE · taste·item)`: popular things, and things to their taste.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, StandardNormal, Zipf};

use crate::data::Sequences;

const LATENT: usize = 8;
const ZIPF: f32 = 1.0;
const TASTE: f32 = 5.0;
/// Number of items that a user takes: uniform over this range.
const TAKEN: std::ops::Range<usize> = 10..40;
/// The data are the same in every run; `--seed` is the training's.
const SEED: u64 = 20_250_101;

/// One line for the output: nobody should take the numbers for those of real users.
pub fn description(users: usize, items: usize) -> String {
    format!(
        "GENERATED data (no --data given): {users} users, {items} items, popularity Zipf({ZIPF:.1}), \
         taste of {LATENT} latent dimensions"
    )
}

/// `items` is more than a user takes.
pub fn sequences(users: usize, items: usize) -> Sequences {
    let mut rng = StdRng::seed_from_u64(SEED);
    let points: Vec<[f32; LATENT]> = (0..items).map(|_| on_sphere(&mut rng)).collect();
    let popularity = Zipf::new(items as f32, ZIPF).expect("a catalogue has an item at least");
    let of_user = (0..users).map(|_| taken_by_one_user(&points, &popularity, &mut rng)).collect();
    Sequences { of_user, item_names: (1..=items).map(|rank| format!("item{rank}")).collect() }
}

/// By rejection: an item comes up by its popularity, and the user takes it with the probability `exp(TASTE (affinity − 1))`.
/// The cost is a few hundred tries for an item, whatever the catalogue's size.
fn taken_by_one_user(points: &[[f32; LATENT]], popularity: &Zipf<f32>, rng: &mut StdRng) -> Vec<u32> {
    let taste = on_sphere(rng);
    let count = rng.random_range(TAKEN);
    let mut taken: Vec<u32> = Vec::with_capacity(count);
    while taken.len() < count {
        let index = popularity.sample(rng) as usize - 1;
        let affinity: f32 = taste.iter().zip(&points[index]).map(|(a, b)| a * b).sum();
        if rng.random::<f32>() < (TASTE * (affinity - 1.0)).exp() && !taken.contains(&(index as u32)) {
            taken.push(index as u32);
        }
    }
    // Likely items tend to come first: in this order, the last ones would be less popular.
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
        let data = sequences(6000, 2000);
        assert_eq!(data.of_user, sequences(6000, 2000).of_user);
        let mut counts = vec![0u32; 2000];
        for &item in data.of_user.iter().flatten() {
            counts[item as usize] += 1;
        }
        let (head, tail): (u32, u32) = (counts[..200].iter().sum(), counts[1000..].iter().sum());
        assert!(head > 2 * tail, "the first tenth was taken {head} times, the last half {tail} times");
        for items in &data.of_user {
            assert!(TAKEN.contains(&items.len()));
            assert!(items.iter().enumerate().all(|(i, item)| !items[..i].contains(item)), "{items:?}");
        }
    }

    #[test]
    fn a_large_catalogue_is_taken_from_everywhere() {
        let data = sequences(50, 1_000_000);
        assert_eq!(data.item_names.len(), 1_000_000);
        // log(10^6 / 10^4) / log(10^6) is a third: the share of the ranks past 10^4 under Zipf's law.
        let all = data.of_user.iter().flatten().count() as f64;
        let rare = data.of_user.iter().flatten().filter(|&&item| item >= 10_000).count() as f64;
        assert!((0.2..0.45).contains(&(rare / all)), "{rare} of {all}");
    }
}
