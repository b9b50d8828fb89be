use super::*;

fn sequences(of_user: &[&[u32]]) -> Sequences {
    let of_user = of_user.iter().map(|items| items.to_vec()).collect();
    Sequences { of_user, item_names: (0..6).map(|i| i.to_string()).collect() }
}

fn split() -> Split {
    Split::new(sequences(&[&[0, 1, 2, 3, 4], &[4, 0, 5], &[2, 1], &[3]])).unwrap()
}

/// Users with their targets.
fn pairs(held_out: &HeldOut) -> Vec<(u32, &[u32])> {
    let users = held_out.queries.iter().map(|query| query.user);
    users.enumerate().map(|(index, user)| (user, held_out.targets_of(index))).collect()
}

fn trained(split: &Split) -> Vec<(u32, u32)> {
    split.train.iter().map(|&e| (e.user, split.positives(e, 1)[0])).collect()
}

#[test]
fn nothing_held_out_is_trained_on() {
    let split = split();
    assert_eq!(trained(&split), [(0, 1), (0, 2), (2, 1)]);
    assert_eq!(pairs(&split.validation), [(0, &[3][..]), (1, &[0])]);
    assert_eq!(pairs(&split.test), [(0, &[4][..]), (1, &[5])]);
    // Item 5 is held out; user 1's only training interaction is item 4.
    assert_eq!(split.popularity, [1, 2, 2, 1, 1, 0]);
    // Items 1 (twice) and 2 are targets of training examples, item 0 is only an input.
    assert_eq!(split.log_q[..3], [f32::NEG_INFINITY, (2.0f64 / 3.0).ln() as f32, (1.0f64 / 3.0).ln() as f32]);
    assert!(split.log_q[3..].iter().all(|&log_q| log_q == f32::NEG_INFINITY));
    for &example in &split.train {
        assert!(!split.before(example).is_empty());
        assert!(split.positives(example, 9).iter().all(|item| !split.before(example).contains(item)));
    }
    for held_out in [&split.validation, &split.test] {
        for (index, &query) in held_out.queries.iter().enumerate() {
            assert!(!split.before(query).is_empty());
            assert!(!split.before(query).contains(&held_out.targets_of(index)[0]));
        }
    }
}

#[test]
fn the_input_is_what_came_before() {
    let split = split();
    assert_eq!(split.before(split.test.queries[0]), [0, 1, 2, 3]);
    assert_eq!(split.history(split.test.queries[0], 2), [2, 3]);
    assert_eq!(split.history(split.train[0], 2), [0]);
}

/// User 0 is trained on items 0, 1 and 2: neither the validation target, 3, nor the test target is a positive.
#[test]
fn positives_are_the_next_items_that_are_trained_on() {
    let split = split();
    let positives = |next: usize| split.train.iter().map(|&e| split.positives(e, next)).collect::<Vec<_>>();
    assert_eq!(positives(1), [[1], [2], [1]]);
    for next in [2, 100] {
        assert_eq!(positives(next), [&[1, 2][..], &[2], &[1]]);
    }
}

#[test]
fn all_of_a_given_training_file_is_trained_on() {
    // User 0 has a validation item, 3; user 1 has no test item, and user 2 nothing to be queried by.
    let sequences = sequences(&[&[0, 1, 2, 3], &[4, 0], &[]]);
    let given = Given { sequences, trained: vec![3, 2, 0], test: vec![vec![5, 4], vec![], vec![1]] };
    let split = Split::given(given).unwrap();
    assert_eq!(trained(&split), [(0, 1), (0, 2), (1, 0)]);
    assert_eq!(split.popularity, [2, 1, 1, 0, 1, 0]);
    assert_eq!(pairs(&split.validation), [(0, &[3][..])]);
    assert_eq!(pairs(&split.test), [(0, &[5, 4][..])]);
    assert_eq!(split.before(split.validation.queries[0]), [0, 1, 2]);
    assert_eq!(split.before(split.test.queries[0]), [0, 1, 2, 3]);
    assert!(split.validation.one_each() && !split.test.one_each());
}

#[test]
fn a_sample_of_users_keeps_both_their_targets() {
    let mut sampled = split();
    sampled.sample_held_out(1);
    assert_eq!((sampled.validation.queries.len(), sampled.test.queries.len()), (1, 1));
    assert_eq!(sampled.validation.queries[0].user, sampled.test.queries[0].user);
    assert_eq!((sampled.train, sampled.log_q), (split().train, split().log_q));
    let mut all = split();
    all.sample_held_out(9);
    assert_eq!(all.test, split().test);
}

#[test]
fn the_fingerprint_is_of_everything() {
    let base =
        || Given { sequences: sequences(&[&[0, 1, 2], &[4, 0]]), trained: vec![2, 2], test: vec![vec![5], vec![3]] };
    let fingerprint = |change: fn(&mut Given)| {
        let mut given = base();
        change(&mut given);
        Split::given(given).unwrap().fingerprint
    };
    let unchanged = fingerprint(|_| ());
    assert_eq!(unchanged, fingerprint(|_| ()));
    let changes: [fn(&mut Given); 6] = [
        |given| given.sequences.of_user[0].swap(0, 1),
        |given| given.trained[0] = 3,
        |given| given.test[1] = vec![2],
        |given| given.test[1] = vec![3, 2],
        |given| given.sequences.of_user.swap(0, 1),
        |given| given.sequences.item_names[5] = "x".into(),
    ];
    for (index, change) in changes.into_iter().enumerate() {
        assert_ne!(unchanged, fingerprint(change), "change {index}");
    }
    // The order of time alone.
    let reversed = Split::new(sequences(&[&[4, 3, 2, 1, 0], &[5, 0, 4], &[1, 2], &[3]])).unwrap();
    assert_ne!(reversed.fingerprint, split().fingerprint);
}

#[test]
fn too_little_data_is_an_error() {
    let error = |split: Fallible<Split>| split.err().unwrap().to_string();
    assert!(error(Split::new(sequences(&[&[0, 1]]))).starts_with("too little data"));
    let given = Given { sequences: sequences(&[&[0, 1]]), trained: vec![2], test: vec![vec![]] };
    assert!(error(Split::given(given)).contains("0 test targets; a user needs 2 distinct items in the training file"));
}
