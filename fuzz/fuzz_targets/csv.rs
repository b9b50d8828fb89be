//! The readers of interactions of `examples/train_two_tower`: one file, and a split by files.
#![no_main]

use std::io::{Seek, Write};
use std::path::Path;
use std::sync::OnceLock;

use catalog_softmax_fuzz::seed;
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;

#[allow(dead_code, unused_imports)]
#[path = "../../examples/train_two_tower"]
mod example {
    pub mod data;
}
use example::data::{Format, Sequences, read_file, read_given};

/// What the readers take from their own crate.
pub type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fuzz_target!(init: seed(SEEDS.map(|lines| lines.as_bytes().to_vec())), |bytes: &[u8]| {
    let whole = write(0, bytes);
    for format in formats() {
        let Ok((sequences, description)) = read_file(whole, &format) else { continue };
        check(&sequences);
        assert!(!description.is_empty());
    }
    let (train, test) = bytes.split_at(bytes.len() / 2);
    let (train, test) = (write(1, train), write(2, test));
    for validation in [None, Some(test)] {
        let Ok((given, _)) = read_given(train, validation, test, &Format::default()) else { continue };
        check(&given.sequences);
        let users = given.sequences.of_user.len();
        assert_eq!((given.trained.len(), given.test.len()), (users, users));
        let items = given.sequences.item_names.len();
        assert!(given.test.iter().flatten().all(|&item| (item as usize) < items));
    }
});

/// The path of a file that holds `bytes` until the next call for the same place. To make a new file each time takes
/// longer than to read it.
fn write(place: usize, bytes: &[u8]) -> &'static Path {
    static FILES: OnceLock<[NamedTempFile; 3]> = OnceLock::new();
    let file = &FILES.get_or_init(|| std::array::from_fn(|_| NamedTempFile::new().expect("a file")))[place];
    let mut writer = file.as_file();
    writer.set_len(0).and_then(|()| writer.rewind()).and_then(|()| writer.write_all(bytes)).expect("a file");
    file.path()
}

fn check(sequences: &Sequences) {
    for items in &sequences.of_user {
        assert!(items.iter().all(|&item| (item as usize) < sequences.item_names.len()));
    }
}

/// What is found by itself, with and without bad lines, and what the command line names.
fn formats() -> [Format; 3] {
    let named = Format {
        columns: Some("user=1,item=Item,time=4".parse().expect("columns")),
        separator: Some("::".parse().expect("a separator")),
        skip_bad_lines: true,
    };
    [Format::default(), Format { skip_bad_lines: true, ..Format::default() }, named]
}

const SEEDS: [&str; 9] = [
    "user_id,item_id,timestamp\nu,a,1\nu,b,2\nv,a,3\n",
    "u,a,1\r\nu,b,2\r\n\r\nv,a,3",
    "timestamp,user_id,item_id\n5,u,late\n1,u,early\n1,v,late\n1,u,tie\n9,u,early\n",
    "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n1,1029,3.0,1260759179\n",
    "\u{feff}u,\"a,b\",-1\n\"u\",\"c\"\"d\",9223372036854775807\n",
    "User::Item::Rating::Timestamp\n1::1193::5::978300760\n1::661::3::978302109\n",
    "196\t242\t881250949\n186\t302\t891717742\n",
    "user,item,time\nu,a,2010-10-19T23:55:27Z\nu,b,2010-10-18 22:17:43.5\n",
    "0 0 1 2 3\n1 2 4\n2 0 5 6\n0 7 8\n1 3 1\n2 7\n",
];
