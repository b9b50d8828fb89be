//! The reader of interactions of `examples/train_two_tower`.
#![no_main]

use std::io::Write;

use catalog_softmax_fuzz::seed;
use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../examples/train_two_tower"]
mod example {
    pub mod data;
}

/// What the reader takes from its own crate.
pub type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fuzz_target!(init: seed(SEEDS.map(|lines| lines.as_bytes().to_vec())), |bytes: &[u8]| {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(bytes).expect("a file");
    for skip_bad_lines in [false, true] {
        let Ok(loaded) = example::data::read_file(file.path(), skip_bad_lines) else { continue };
        let sequences = loaded.sequences;
        let taken: usize = sequences.of_user.iter().map(Vec::len).sum();
        assert_eq!(taken + loaded.repeats, loaded.interactions);
        assert!(sequences.of_user.iter().flatten().all(|&item| (item as usize) < sequences.item_names.len()));
    }
});

const SEEDS: [&str; 6] = [
    "user_id,item_id,timestamp\nu,a,1\nu,b,2\nv,a,3\n",
    "u,a,1\r\nu,b,2\r\n\r\nv,a,3",
    "timestamp,user_id,item_id\n5,u,late\n1,u,early\n1,v,late\n1,u,tie\n9,u,early\n",
    "userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n1,1029,3.0,1260759179\n",
    "\u{feff}u,\"a,b\",-1\n\"u\",\"c\"\"d\",9223372036854775807\n",
    "1::1193::5::978300760\n1::661::3::978302109\n",
];
