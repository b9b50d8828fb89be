//! What is trained on, and what is held out.
//!
//! **Leave last out**, of sequences: of each user with at least three items the last is the test target and the one
//! before it the validation target. The split is per user: another user's training may be later than this user's test,
//! as is usual for it.
//!
//! **Given**, by files: all items of the training file are trained on. A user's test targets are all of the user's
//! items in the test file, and their query sees all that the user took in the training file, and after it in a
//! validation file.
//!
//! In both, a training target is each item but the user's first, predicted from what the user took before it. The query
//! of a target sees only what the same user took before, so no target is ever in its own input; popularity and log_q
//! count training interactions alone.

use std::hash::Hasher;

use catalog_softmax::negatives::{ExactCounts, FrequencyEstimator};
use fnv::FnvHasher;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::Fallible;
use crate::data::{Given, Sequences};

/// A query: what the user took before `position` of the user's sequence. In training, the item there is the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Example {
    pub user: u32,
    pub position: u32,
}

/// Queries with the items that they shall find.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldOut {
    pub queries: Vec<Example>,
    /// (queries + 1) where each query's targets begin in `targets`, and the end.
    pub offsets: Vec<usize>,
    /// Items, at least one for each query.
    pub targets: Vec<u32>,
}

impl HeldOut {
    fn new() -> Self {
        HeldOut { offsets: vec![0], ..HeldOut::default() }
    }

    /// Adds a query, unless it has no target.
    fn push(&mut self, query: Example, targets: &[u32]) {
        if !targets.is_empty() {
            self.queries.push(query);
            self.targets.extend(targets);
            self.offsets.push(self.targets.len());
        }
    }

    pub fn targets_of(&self, query: usize) -> &[u32] {
        &self.targets[self.offsets[query]..self.offsets[query + 1]]
    }

    /// Whether each query has one target and no more.
    pub fn one_each(&self) -> bool {
        self.targets.len() == self.queries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }

    /// Those of the users of a sorted list.
    fn of_users(&self, users: &[u32]) -> HeldOut {
        let mut kept = HeldOut::new();
        for (index, &query) in self.queries.iter().enumerate() {
            if users.binary_search(&query.user).is_ok() {
                kept.push(query, self.targets_of(index));
            }
        }
        kept
    }
}

pub struct Split {
    sequences: Sequences,
    /// How many of each user's items are trained on, the first ones.
    trained: Vec<usize>,
    pub train: Vec<Example>,
    /// Empty where a split is given without a file for it.
    pub validation: HeldOut,
    pub test: HeldOut,
    /// Training interactions of each item.
    pub popularity: Vec<u32>,
    /// Log of the probability that a random training example has this item as its target: the log_q of in-batch
    /// negatives. −∞ for an item that is never a target, and so never drawn.
    pub log_q: Vec<f32>,
    /// A hash of all the above, so that a checkpoint knows the data that it was trained on.
    pub fingerprint: String,
}

impl Split {
    /// Leave last out.
    pub fn new(sequences: Sequences) -> Fallible<Split> {
        let (mut validation, mut test) = (HeldOut::new(), HeldOut::new());
        let mut trained = Vec::new();
        for (user, items) in sequences.of_user.iter().enumerate() {
            let n = if items.len() < 3 { items.len() } else { items.len() - 2 };
            if n < items.len() {
                validation.push(query(user, n), &items[n..n + 1]);
                test.push(query(user, n + 1), &items[n + 1..]);
            }
            trained.push(n);
        }
        let rule = "a user needs 3 distinct items for a test target and 4 for training examples beside it";
        Split::assemble(sequences, trained, validation, test, rule)
    }

    pub fn given(given: Given) -> Fallible<Split> {
        let Given { sequences, trained, test: test_items } = given;
        let (mut validation, mut test) = (HeldOut::new(), HeldOut::new());
        for (user, items) in sequences.of_user.iter().enumerate() {
            // Without an item before them, there is no query.
            if trained[user] > 0 {
                validation.push(query(user, trained[user]), &items[trained[user]..]);
                test.push(query(user, items.len()), &test_items[user]);
            }
        }
        let rule =
            "a user needs 2 distinct items in the training file for an example, and one in the test file that it lacks";
        Split::assemble(sequences, trained, validation, test, rule)
    }

    /// The first `trained` items of each user's are trained on.
    fn assemble(
        sequences: Sequences,
        trained: Vec<usize>,
        validation: HeldOut,
        test: HeldOut,
        rule: &str,
    ) -> Fallible<Split> {
        let num_items = sequences.item_names.len();
        let (mut train, mut popularity, mut targets) = (Vec::new(), vec![0u32; num_items], Vec::new());
        for (user, items) in sequences.of_user.iter().enumerate() {
            for (position, &item) in items[..trained[user]].iter().enumerate() {
                popularity[item as usize] += 1;
                // The first item of a user has no input.
                if position > 0 {
                    targets.push(u64::from(item));
                    train.push(query(user, position));
                }
            }
        }
        if train.is_empty() || test.is_empty() {
            let users = sequences.of_user.len();
            return Err(format!(
                "too little data: {users} users and {num_items} items leave {} training examples and {} test \
                 targets; {rule}",
                train.len(),
                test.targets.len()
            )
            .into());
        }
        let log_q = log_q(&targets, num_items);
        let fingerprint = fingerprint(&sequences, &trained, &validation, &test);
        Ok(Split { sequences, trained, train, validation, test, popularity, log_q, fingerprint })
    }

    /// Keeps the held-out targets of at most `users` users, chosen at random and the same in every run.
    pub fn sample_held_out(&mut self, users: usize) {
        let mut chosen: Vec<u32> = self.test.queries.iter().map(|query| query.user).collect();
        chosen.shuffle(&mut StdRng::seed_from_u64(0));
        chosen.truncate(users);
        chosen.sort_unstable();
        for held_out in [&mut self.validation, &mut self.test] {
            *held_out = held_out.of_users(&chosen);
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

    /// The items that a training example is to predict: its target, and those that the user took next, up to `next` in
    /// all. There are fewer where the items end that the user is trained on.
    pub fn positives(&self, example: Example, next: usize) -> &[u32] {
        let Example { user, position } = example;
        let from = &self.sequences.of_user[user as usize][position as usize..self.trained[user as usize]];
        &from[..next.min(from.len())]
    }

    /// All that the user took before, oldest first. Never empty.
    pub fn before(&self, query: Example) -> &[u32] {
        &self.sequences.of_user[query.user as usize][..query.position as usize]
    }

    /// The last `k` items before, the query tower's input.
    pub fn history(&self, query: Example, k: usize) -> &[u32] {
        let before = self.before(query);
        &before[before.len().saturating_sub(k)..]
    }
}

fn query(user: usize, position: usize) -> Example {
    Example { user: user as u32, position: position as u32 }
}

fn log_q(targets: &[u64], num_items: usize) -> Vec<f32> {
    let mut counts = ExactCounts::new();
    counts.observe(targets);
    // Counts would take an item that is not there for the next one to come.
    let mut log_q = vec![f32::NEG_INFINITY; num_items];
    for (&item, log_q_of_target) in targets.iter().zip(counts.log_q(targets)) {
        log_q[item as usize] = log_q_of_target;
    }
    log_q
}

/// FNV-1a: the same on every machine.
fn fingerprint(sequences: &Sequences, trained: &[usize], validation: &HeldOut, test: &HeldOut) -> String {
    let mut hasher = FnvHasher::default();
    // Lengths before lists: no two splits are written alike.
    let mut write = |number: usize| hasher.write(&(number as u64).to_le_bytes());
    for (items, &trained) in sequences.of_user.iter().zip(trained) {
        write(items.len());
        write(trained);
        items.iter().for_each(|&item| write(item as usize));
    }
    for held_out in [validation, test] {
        write(held_out.queries.len());
        for (index, query) in held_out.queries.iter().enumerate() {
            let targets = held_out.targets_of(index);
            [query.user as usize, query.position as usize, targets.len()].into_iter().for_each(&mut write);
            targets.iter().for_each(|&item| write(item as usize));
        }
    }
    for name in &sequences.item_names {
        hasher.write(&(name.len() as u64).to_le_bytes());
        hasher.write(name.as_bytes());
    }
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests;
