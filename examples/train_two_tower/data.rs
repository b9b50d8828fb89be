//! Interactions: who took what, when. Read from a CSV file or generated.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use csv::ByteRecord;
use flate2::bufread::MultiGzDecoder;

use crate::Fallible;

/// Each user's items in the order of time, every item once: where the user first took it.
pub struct Sequences {
    /// Item indices, one list per user.
    pub of_user: Vec<Vec<u32>>,
    /// The name of each item, as in the file.
    pub item_names: Vec<String>,
}

/// What was read, and what was left out.
pub struct Loaded {
    pub sequences: Sequences,
    /// Lines that held an interaction.
    pub interactions: usize,
    /// Purchases of an item that the user had taken before.
    pub repeats: usize,
    /// Lines that held none and were skipped.
    pub bad_lines: usize,
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

struct Interaction {
    user: u32,
    item: u32,
    timestamp: i64,
}

/// Reads `user_id,item_id,timestamp` lines from a plain or gzipped file.
///
/// A header is optional; with one, columns are found by name and may stand in any order. A line that holds no
/// interaction is an error with its number, or is counted where `skip_bad_lines` says so.
pub fn read_file(path: &Path, skip_bad_lines: bool) -> Fallible<Loaded> {
    let in_file = |e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let mut file = BufReader::new(File::open(path).map_err(|e| in_file(&e))?);
    let gzipped = file.fill_buf().map_err(|e| in_file(&e))?.starts_with(&[0x1f, 0x8b]);
    let lines: Box<dyn BufRead> =
        if gzipped { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) };
    read(lines, skip_bad_lines).map_err(|e| in_file(&e).into())
}

/// Reads the lines themselves; see [`read_file`].
///
/// Every line is taken apart by itself: its number is right whatever stands before it, and a stray quote spoils one line
/// and not the rest of the file.
fn read(mut input: impl BufRead, skip_bad_lines: bool) -> Fallible<Loaded> {
    let (mut users, mut items) = (Interner::default(), Interner::default());
    let mut interactions = Vec::new();
    let (mut bad_lines, mut line_number) = (0, 0);
    let mut columns = None;
    let (mut line, mut record) = (Vec::new(), ByteRecord::new());
    while input.read_until(b'\n', &mut line)? > 0 {
        line_number += 1;
        take_apart(line.trim_ascii(), &mut record)?;
        line.clear();
        if record.is_empty() {
            continue;
        }
        if columns.is_none() {
            let header = Columns::from_header(&record);
            columns = header.or(Some(Columns::IN_ORDER));
            if header.is_some() {
                continue;
            }
        }
        match columns.unwrap_or(Columns::IN_ORDER).parse(&record) {
            Ok((user, item, timestamp)) => {
                interactions.push(Interaction { user: users.index(user), item: items.index(item), timestamp });
            }
            Err(_) if skip_bad_lines => bad_lines += 1,
            Err(problem) => {
                let advice = "--skip-bad-lines counts such lines instead";
                return Err(format!("line {line_number}: {problem} ({advice})").into());
            }
        }
    }
    let count = interactions.len();
    let (of_user, repeats) = in_time_order(interactions, users.names.len());
    Ok(Loaded { sequences: Sequences { of_user, item_names: items.names }, interactions: count, repeats, bad_lines })
}

/// The fields of one line; none of a blank line.
fn take_apart(line: &[u8], record: &mut ByteRecord) -> Result<(), csv::Error> {
    record.clear();
    if line.contains(&b'"') {
        csv::ReaderBuilder::new().has_headers(false).from_reader(line).read_byte_record(record)?;
    } else if !line.is_empty() {
        // What the parser would do, without the cost of a parser per line.
        record.extend(line.split(|&byte| byte == b','));
    }
    Ok(())
}

/// Where the three fields stand in a line.
#[derive(Clone, Copy)]
struct Columns {
    user: usize,
    item: usize,
    timestamp: usize,
}

impl Columns {
    const IN_ORDER: Columns = Columns { user: 0, item: 1, timestamp: 2 };

    /// The columns by name, where `record` names all three.
    fn from_header(record: &ByteRecord) -> Option<Columns> {
        let find = |name: &str| record.iter().position(|field| field.trim_ascii() == name.as_bytes());
        Some(Columns { user: find("user_id")?, item: find("item_id")?, timestamp: find("timestamp")? })
    }

    fn parse<'a>(&self, record: &'a ByteRecord) -> Result<(&'a str, &'a str, i64), String> {
        let field = |index: usize, name: &str| {
            let bytes = record.get(index).ok_or_else(|| format!("no {name}: there are {} columns", record.len()))?;
            let text = std::str::from_utf8(bytes).map_err(|_| format!("{name} is not UTF-8"))?.trim();
            if text.is_empty() { Err(format!("{name} is empty")) } else { Ok(text) }
        };
        let (user, item) = (field(self.user, "user_id")?, field(self.item, "item_id")?);
        let timestamp = field(self.timestamp, "timestamp")?;
        let seconds = timestamp.parse().map_err(|_| format!("timestamp {timestamp:?} is not a whole number"))?;
        Ok((user, item, seconds))
    }
}

/// Sorts by time (ties keep the order of the file) and drops what a user had taken before. Returns the number dropped.
fn in_time_order(mut interactions: Vec<Interaction>, num_users: usize) -> (Vec<Vec<u32>>, usize) {
    interactions.sort_by_key(|interaction| (interaction.user, interaction.timestamp));
    let mut of_user = vec![Vec::new(); num_users];
    let mut taken_by = HashMap::new();
    let mut repeats = 0;
    for Interaction { user, item, .. } in interactions {
        if taken_by.insert(item, user) == Some(user) {
            repeats += 1;
        } else {
            of_user[user as usize].push(item);
        }
    }
    (of_user, repeats)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(csv: &str) -> String {
        read(csv.as_bytes(), false).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_bad_line_is_an_error_with_its_number() {
        let bad_timestamp = error("user_id,item_id,timestamp\nu,85123A,1\nu,22,noon\n");
        assert!(bad_timestamp.starts_with("line 3: timestamp \"noon\" is not a whole number"), "{bad_timestamp}");
        let missing_column = error("u,a,1\n\nu,b\n");
        assert!(missing_column.starts_with("line 3: no timestamp: there are 2 columns"), "{missing_column}");
        assert!(error("user_id,item_id,timestamp\nu,,1\n").starts_with("line 2: item_id is empty"));
        assert!(error("\"u\",a,1\r\n\r\nu,\"a,1\r\nu,a,1\r\n").starts_with("line 3: no timestamp"));
        assert!(error("who,what,when\nu,a,1\n").starts_with("line 1: timestamp \"when\""));
    }

    #[test]
    fn bad_lines_are_counted_on_request() {
        let loaded = read("u,a,1\nu,b\nu,c,x\nu,d,4\n".as_bytes(), true).unwrap();
        assert_eq!((loaded.interactions, loaded.bad_lines), (2, 2));
        assert_eq!(loaded.sequences.item_names, ["a", "d"]);
    }

    #[test]
    fn sequences_are_in_time_order_without_repeats() {
        let csv = "timestamp,user_id,item_id\n5,u,late\n1,u,early\n1,v,late\n1,u,tie\n9,u,early\n";
        let loaded = read(csv.as_bytes(), false).unwrap();
        let Sequences { of_user, item_names } = loaded.sequences;
        let names: Vec<Vec<&str>> =
            of_user.iter().map(|items| items.iter().map(|&i| item_names[i as usize].as_str()).collect()).collect();
        assert_eq!(names, [vec!["early", "tie", "late"], vec!["late"]]);
        assert_eq!(loaded.repeats, 1);
    }

    #[test]
    fn gzip_is_recognised_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("no_suffix");
        let mut gz = flate2::write::GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gz, b"u,a,1\nu,b,2\n").unwrap();
        gz.finish().unwrap();
        assert_eq!(read_file(&path, false).unwrap().interactions, 2);
        assert!(read_file(&folder.path().join("absent"), false).err().unwrap().to_string().contains("absent"));
    }
}
