//! Interactions: who took what, when. Read from files or generated.
//!
//! `lines.rs` reads lines, `separator.rs` takes them apart, `columns.rs` finds user, item and time among the fields,
//! `times.rs` understands times, `lists.rs` reads files of lists, and `given.rs` files that are split already.

mod columns;
mod given;
mod lines;
mod lists;
mod separator;
mod times;

pub use columns::Choice;
pub use given::{Given, read_given};
pub use separator::Separator;

use std::collections::HashMap;
use std::path::Path;

use csv::ByteRecord;

use crate::Fallible;
use columns::{Columns, Fields, First, Times};
use lines::Lines;
use times::Time;

/// Each user's items in the order of time, every item once: where the user first took it.
#[derive(Debug)]
pub struct Sequences {
    /// Item indices, one list per user.
    pub of_user: Vec<Vec<u32>>,
    /// The name of each item, as in the file.
    pub item_names: Vec<String>,
}

/// What the command line says about files.
#[derive(Debug, Default)]
pub struct Format {
    /// None: found by their names or their order.
    pub columns: Option<Choice>,
    /// None: found in the first line.
    pub separator: Option<Separator>,
    /// Count lines that hold no interaction. The first line is not one of them: it says what the columns are.
    pub skip_bad_lines: bool,
}

/// Numbers names in the order of their first appearance.
#[derive(Default)]
struct Interner {
    index_of: HashMap<String, u32>,
    names: Vec<String>,
}

impl Interner {
    fn index(&mut self, name: &str) -> u32 {
        if let Some(&index) = self.index_of.get(name) {
            return index;
        }
        let index = self.names.len() as u32;
        self.index_of.insert(name.to_owned(), index);
        self.names.push(name.to_owned());
        index
    }
}

/// Users and items of all files.
#[derive(Default)]
struct Names {
    users: Interner,
    items: Interner,
}

struct Interaction {
    user: u32,
    item: u32,
    time: Time,
}

/// What a file holds.
struct Contents {
    /// In the order of the file.
    interactions: Vec<Interaction>,
    /// Lines that held none and were skipped.
    bad_lines: usize,
    /// How the lines were understood.
    layout: String,
}

impl Contents {
    /// For the output. `repeats` are the interactions that were dropped, `unknown_users` those whose were.
    fn describe(&self, path: &Path, repeats: usize, unknown_users: usize) -> String {
        let mut text = format!(
            "{}: {} interactions ({}), {repeats} repeats of an earlier one dropped",
            path.display(),
            self.interactions.len(),
            self.layout
        );
        if self.bad_lines > 0 {
            text += &format!(", {} bad lines skipped", self.bad_lines);
        }
        if unknown_users > 0 {
            text += &format!(", {unknown_users} users without training interactions left out");
        }
        if let Some(values) = self.few_times() {
            text += &format!(
                "\nNOTE: the times of this file have only {values} different values; where they are ratings, --columns \
                 names the column of the times"
            );
        }
        text
    }

    /// The number of different times where it is that of a scale of ratings rather than of times.
    fn few_times(&self) -> Option<usize> {
        let mut values: Vec<Time> = Vec::new();
        for interaction in &self.interactions {
            if !values.contains(&interaction.time) {
                values.push(interaction.time);
            }
            if values.len() > 10 {
                return None;
            }
        }
        (values.len() > 1 && self.interactions.len() > 10 * values.len()).then_some(values.len())
    }
}

/// Reads a file of interactions, plain or gzipped, and describes it.
///
/// Columns are found by the names in the first line, or are user, item and time without such a line. A line that holds
/// no interaction is an error with its number, or is counted where the format says so.
pub fn read_file(path: &Path, format: &Format) -> Fallible<(Sequences, String)> {
    let mut names = Names::default();
    let mut contents = read_path(path, format, Times::Needed, &mut names)?;
    let (of_user, repeats) = in_time_order(&mut contents.interactions, names.users.names.len());
    Ok((Sequences { of_user, item_names: names.items.names }, contents.describe(path, repeats, 0)))
}

fn read_path(path: &Path, format: &Format, times: Times, names: &mut Names) -> Fallible<Contents> {
    let contents = Lines::open(path).and_then(|lines| read(lines, format, times, names));
    contents.map_err(|e| format!("{}: {e}", path.display()).into())
}

/// Reads the lines themselves. Every line is taken apart by itself: its number is right whatever stands before it, and a
/// stray quote spoils one line and not the rest of the file.
fn read(mut lines: Lines, format: &Format, times: Times, names: &mut Names) -> Fallible<Contents> {
    let Some((number, line)) = lines.next()? else { return Err("the file has no lines".into()) };
    let first = line.to_vec();
    let Some(separator) = separator(&first, format, times).map_err(|problem| in_line(number, &problem))? else {
        return lists::read((number, &first), lines, names);
    };
    let mut record = ByteRecord::new();
    separator.split(&first, &mut record)?;
    let First { columns, header } =
        First::of(&record, format.columns.as_ref(), times).map_err(|problem| in_line(number, &problem))?;
    let mut contents = Contents { interactions: Vec::new(), bad_lines: 0, layout: columns.describe(&record, header) };
    let mut kind = None;
    if !header {
        let interaction = parse(&columns, &record, &mut kind, names);
        contents.interactions.push(interaction.map_err(|problem| in_line(number, &problem))?);
    }
    while let Some((number, line)) = lines.next()? {
        separator.split(line, &mut record)?;
        match parse(&columns, &record, &mut kind, names) {
            Ok(interaction) => contents.interactions.push(interaction),
            Err(_) if format.skip_bad_lines => contents.bad_lines += 1,
            Err(problem) => {
                let open = line.iter().filter(|&&byte| byte == b'"').count() % 2 == 1;
                let quote = if open { "; a quote is not closed on this line" } else { "" };
                let advice = "--skip-bad-lines counts such lines instead";
                return Err(in_line(number, &format!("{problem}{quote} ({advice})")).into());
            }
        }
    }
    Ok(contents)
}

fn in_line(number: usize, problem: &str) -> String {
    format!("line {number}: {problem}")
}

/// The separator of a file with this first line, or None for a file of lists.
fn separator(line: &[u8], format: &Format, times: Times) -> Result<Option<Separator>, String> {
    if let Some(separator) = &format.separator {
        return Ok(Some(separator.clone()));
    }
    match Separator::detect(line, columns::is_header)? {
        Some(separator) => Ok(Some(separator)),
        None if times == Times::Optional && format.columns.is_none() && lists::begins(line) => Ok(None),
        None => {
            let shown = String::from_utf8_lossy(&line[..line.len().min(80)]);
            Err(format!("no separator is recognised in {shown:?}; --separator names it"))
        }
    }
}

/// `kind` is that of the times so far.
fn parse(
    columns: &Columns,
    record: &ByteRecord,
    kind: &mut Option<times::Kind>,
    names: &mut Names,
) -> Result<Interaction, String> {
    let Fields { user, item, time } = columns.parse(record)?;
    let time = match time {
        None => Time::NONE,
        Some((time, own)) => {
            let first = *kind.get_or_insert(own);
            if own != first {
                return Err(format!("the time is {}; rule: {} as in the first line", own.name(), first.name()));
            }
            time
        }
    };
    Ok(Interaction { user: names.users.index(user), item: names.items.index(item), time })
}

/// Sorts by time (ties keep the order of the file) and drops what a user had taken before. Returns the number dropped.
fn in_time_order(interactions: &mut [Interaction], num_users: usize) -> (Vec<Vec<u32>>, usize) {
    interactions.sort_by(|a, b| a.user.cmp(&b.user).then(a.time.total_cmp(&b.time)));
    let mut of_user = vec![Vec::new(); num_users];
    let mut taken_by = HashMap::new();
    let mut repeats = 0;
    for &Interaction { user, item, .. } in &*interactions {
        if taken_by.insert(item, user) == Some(user) {
            repeats += 1;
        } else {
            of_user[user as usize].push(item);
        }
    }
    (of_user, repeats)
}

#[cfg(test)]
mod tests;
