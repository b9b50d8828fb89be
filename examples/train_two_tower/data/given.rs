//! A split that is given as files: one to train on, one to test on, and one for validation where there is one.

use std::path::Path;

use super::columns::Times;
use super::{Format, Names, Sequences, in_time_order, read_path};
use crate::Fallible;

/// A split by files.
#[derive(Debug)]
pub struct Given {
    /// What each user takes before the test: the items of the training file, then those of the validation file.
    pub sequences: Sequences,
    /// How many of each user's items are of the training file.
    pub trained: Vec<usize>,
    /// What each user is tested on: items of the test file that the user had not taken before.
    pub test: Vec<Vec<u32>>,
}

/// Reads the files and describes them. Every item of any file is in the catalogue.
pub fn read_given(train: &Path, validation: Option<&Path>, test: &Path, format: &Format) -> Fallible<(Given, String)> {
    let mut names = Names::default();
    let mut contents = read_path(train, format, Times::Optional, &mut names)?;
    let num_users = names.users.names.len();
    let (mut of_user, repeats) = in_time_order(&mut contents.interactions, num_users);
    let mut description = contents.describe(train, repeats, 0);
    let trained = of_user.iter().map(Vec::len).collect();
    let mut held_out = |path: &Path, of_user: &[Vec<u32>]| -> Fallible<Vec<Vec<u32>>> {
        let (lists, text) = read_held_out(path, format, of_user, &mut names)?;
        description += &format!("\n      {text}");
        Ok(lists)
    };
    if let Some(path) = validation {
        let lists = held_out(path, &of_user)?;
        of_user.iter_mut().zip(lists).for_each(|(items, list)| items.extend(list));
    }
    let test = held_out(test, &of_user)?;
    let sequences = Sequences { of_user, item_names: names.items.names };
    Ok((Given { sequences, trained, test }, description))
}

/// The items of a file that users of the training file had not taken before, for each of these users, and a
/// description.
fn read_held_out(
    path: &Path,
    format: &Format,
    taken: &[Vec<u32>],
    names: &mut Names,
) -> Fallible<(Vec<Vec<u32>>, String)> {
    let mut contents = read_path(path, format, Times::Optional, names)?;
    let (mut lists, mut repeats) = in_time_order(&mut contents.interactions, names.users.names.len());
    let unknown: usize = lists.drain(taken.len()..).filter(|list| !list.is_empty()).count();
    for (list, taken) in lists.iter_mut().zip(taken) {
        let before = list.len();
        // One sorted copy per user: a user may have taken thousands.
        let mut sorted = taken.clone();
        sorted.sort_unstable();
        list.retain(|item| sorted.binary_search(item).is_err());
        repeats += before - list.len();
    }
    Ok((lists, contents.describe(path, repeats, unknown)))
}
