//! CUDA_EMULATOR_COUNT=1 or a file's name: launches, executed instructions and moved bytes of each kernel, said when the process ends.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, Once};

use super::config::Counts;
use super::note;
use super::state::{config, lock};
use crate::exec::Work;
use crate::exec::traffic::Bytes;

#[derive(Default)]
struct Count {
    launches: u64,
    work: Work,
}

static COUNTED: Mutex<BTreeMap<String, Count>> = Mutex::new(BTreeMap::new());

/// Adds a launch that ended well.
pub fn add(kernel: &str, work: Work) {
    if config().counts.is_none() {
        return;
    }
    // A program need not destroy its contexts, and often does not; it always ends.
    static AT_EXIT: Once = Once::new();
    // SAFETY: the function is of this library, which removes it should it be unloaded, takes nothing and does not unwind.
    AT_EXIT.call_once(|| unsafe {
        libc::atexit(say);
    });
    let mut counted = lock(&COUNTED);
    // No copy of the name in any launch but the first.
    let count = match counted.get_mut(kernel) {
        Some(count) => count,
        None => counted.entry(kernel.to_string()).or_default(),
    };
    count.launches += 1;
    count.work.instructions += work.instructions;
    count.work.bytes.add(work.bytes);
}

/// A line for each kernel, with tabs between the columns.
fn table(counted: &BTreeMap<String, Count>) -> String {
    let mut text = String::from("kernel\tlaunches\tinstructions\tloaded\tfetched\tstored\n");
    for (kernel, Count { launches, work: Work { instructions, bytes } }) in counted {
        let Bytes { loaded, fetched, stored } = bytes;
        let _ = writeln!(text, "{kernel}\t{launches}\t{instructions}\t{loaded}\t{fetched}\t{stored}");
    }
    text
}

extern "C" fn say() {
    let text = table(&lock(&COUNTED));
    match &config().counts {
        Some(Counts::File(path)) => {
            if let Err(why) = std::fs::write(path, text) {
                note(&format!("CUDA_EMULATOR_COUNT: {}: {why}", path.display()));
            }
        }
        // The process is ending: nobody is left to hear that stderr is closed.
        _ => drop(std::io::stderr().write_all(text.as_bytes())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_kernel() {
        let bytes = Bytes { loaded: 64, fetched: 32, stored: 96 };
        let counted = BTreeMap::from([
            ("b".to_string(), Count { launches: 2, work: Work { instructions: 300, bytes: Bytes::default() } }),
            ("a".to_string(), Count { launches: 1, work: Work { instructions: 7, bytes } }),
        ]);
        let head = "kernel\tlaunches\tinstructions\tloaded\tfetched\tstored\n";
        assert_eq!(table(&counted), format!("{head}a\t1\t7\t64\t32\t96\nb\t2\t300\t0\t0\t0\n"));
    }
}
