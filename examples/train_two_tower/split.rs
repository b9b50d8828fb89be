//! What is trained on, and what is held out.
//!
//! Of each user with at least three items the last is the test target and the one before it the validation target. The
//! query of a target sees only what the same user took before it, so no target is ever in its own input; popularity and
//! log_q count training interactions alone. The split is per user: another user's training may be later than this
//! user's test, as is usual for leave-last-out.

use catalog_softmax::{ExactCounts, FrequencyEstimator};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Fallible;
use crate::data::Sequences;

/// One target: item `position` of a user's sequence. What comes before is the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Example {
    pub user: u32,
    pub position: u32,
}

pub struct Split {
    sequences: Sequences,
    pub train: Vec<Example>,
    pub validation: Vec<Example>,
    pub test: Vec<Example>,
    /// Training interactions of each item.
    pub popularity: Vec<u32>,
    /// Log of the probability that a random training example has this item as its target: the log_q of in-batch
    /// negatives. −∞ for an item that is never a target, and so never drawn.
    pub log_q: Vec<f32>,
}

impl Split {
    pub fn new(sequences: Sequences) -> Fallible<Split> {
        let num_items = sequences.item_names.len();
        let (mut train, mut validation, mut test) = (Vec::new(), Vec::new(), Vec::new());
        let (mut popularity, mut targets) = (vec![0u32; num_items], Vec::new());
        for (user, items) in sequences.of_user.iter().enumerate() {
            let example = |position: usize| Example { user: user as u32, position: position as u32 };
            let trained = if items.len() < 3 { items.len() } else { items.len() - 2 };
            for (position, &item) in items[..trained].iter().enumerate() {
                popularity[item as usize] += 1;
                // The first item of a user has no input.
                if position > 0 {
                    targets.push(u64::from(item));
                    train.push(example(position));
                }
            }
            if trained < items.len() {
                validation.push(example(trained));
                test.push(example(trained + 1));
            }
        }
        if train.is_empty() || test.is_empty() {
            let users = sequences.of_user.len();
            return Err(format!(
                "too little data: {users} users and {num_items} items leave {} training examples and {} test \
                 targets; a user needs 3 distinct items for a test target and 4 for training examples beside it",
                train.len(),
                test.len()
            )
            .into());
        }
        let mut counts = ExactCounts::new();
        counts.observe(&targets);
        // Counts would take an item that is not there for the next one to come.
        let mut log_q = vec![f32::NEG_INFINITY; num_items];
        for (&item, log_q_of_target) in targets.iter().zip(counts.log_q(&targets)) {
            log_q[item as usize] = log_q_of_target;
        }
        Ok(Split { sequences, train, validation, test, popularity, log_q })
    }

    /// Keeps the held-out targets of at most `users` users, chosen at random and the same in every run.
    pub fn sample_held_out(&mut self, users: usize) {
        let mut chosen: Vec<u32> = self.test.iter().map(|example| example.user).collect();
        chosen.shuffle(&mut StdRng::seed_from_u64(0));
        chosen.truncate(users);
        chosen.sort_unstable();
        for examples in [&mut self.validation, &mut self.test] {
            examples.retain(|example| chosen.binary_search(&example.user).is_ok());
        }
    }

    pub fn num_users(&self) -> usize {
        self.sequences.of_user.len()
    }

    pub fn num_items(&self) -> usize {
        self.sequences.item_names.len()
    }

    pub fn item_names(&self) -> &[String] {
        &self.sequences.item_names
    }

    pub fn target(&self, example: Example) -> u32 {
        self.sequences.of_user[example.user as usize][example.position as usize]
    }

    /// All that the user took before the target, oldest first. Never empty.
    pub fn before(&self, example: Example) -> &[u32] {
        &self.sequences.of_user[example.user as usize][..example.position as usize]
    }

    /// The last `k` items before the target, the query tower's input.
    pub fn history(&self, example: Example, k: usize) -> &[u32] {
        let before = self.before(example);
        &before[before.len().saturating_sub(k)..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split() -> Split {
        let of_user = vec![vec![0, 1, 2, 3, 4], vec![4, 0, 5], vec![2, 1], vec![3]];
        let item_names = (0..6).map(|i| i.to_string()).collect();
        Split::new(Sequences { of_user, item_names }).unwrap()
    }

    #[test]
    fn nothing_held_out_is_trained_on() {
        let split = split();
        let pairs = |examples: &[Example]| -> Vec<_> { examples.iter().map(|&e| (e.user, split.target(e))).collect() };
        assert_eq!(pairs(&split.train), [(0, 1), (0, 2), (2, 1)]);
        assert_eq!(pairs(&split.validation), [(0, 3), (1, 0)]);
        assert_eq!(pairs(&split.test), [(0, 4), (1, 5)]);
        // Item 5 is held out; user 1's only training interaction is item 4.
        assert_eq!(split.popularity, [1, 2, 2, 1, 1, 0]);
        // Items 1 (twice) and 2 are targets of training examples, item 0 is only an input.
        assert_eq!(split.log_q[..3], [f32::NEG_INFINITY, (2.0f64 / 3.0).ln() as f32, (1.0f64 / 3.0).ln() as f32]);
        assert!(split.log_q[3..].iter().all(|&log_q| log_q == f32::NEG_INFINITY));
        for &example in split.train.iter().chain(&split.validation).chain(&split.test) {
            assert!(!split.before(example).is_empty());
            assert!(!split.before(example).contains(&split.target(example)));
        }
    }

    #[test]
    fn the_input_is_what_came_before() {
        let split = split();
        assert_eq!(split.before(split.test[0]), [0, 1, 2, 3]);
        assert_eq!(split.history(split.test[0], 2), [2, 3]);
        assert_eq!(split.history(split.train[0], 2), [0]);
    }

    #[test]
    fn a_sample_of_users_keeps_both_their_targets() {
        let mut sampled = split();
        sampled.sample_held_out(1);
        assert_eq!((sampled.validation.len(), sampled.test.len()), (1, 1));
        assert_eq!(sampled.validation[0].user, sampled.test[0].user);
        assert_eq!((sampled.train, sampled.log_q), (split().train, split().log_q));
        let mut all = split();
        all.sample_held_out(9);
        assert_eq!(all.test, split().test);
    }

    #[test]
    fn too_little_data_is_an_error() {
        let sequences = Sequences { of_user: vec![vec![0, 1]], item_names: vec!["a".into(), "b".into()] };
        assert!(Split::new(sequences).err().unwrap().to_string().starts_with("too little data"));
    }
}
