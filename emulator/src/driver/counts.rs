//! CUDA_EMULATOR_COUNT=1 or a file's name: launches and executed instructions of each kernel, said when the process ends.
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Mutex, Once};

use super::config::Counts;
use super::note;
use super::state::{config, lock};
use crate::exec::Work;

#[derive(Default)]
struct Count {
    launches: u64,
    instructions: u64,
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
    count.instructions += work.instructions;
}

/// A line for each kernel, with tabs between the columns.
fn table(counted: &BTreeMap<String, Count>) -> String {
    let mut text = String::from("kernel\tlaunches\tinstructions\n");
    for (kernel, Count { launches, instructions }) in counted {
        let _ = writeln!(text, "{kernel}\t{launches}\t{instructions}");
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
        let counted = BTreeMap::from([
            ("b".to_string(), Count { launches: 2, instructions: 300 }),
            ("a".to_string(), Count { launches: 1, instructions: 7 }),
        ]);
        assert_eq!(table(&counted), "kernel\tlaunches\tinstructions\na\t1\t7\nb\t2\t300\n");
    }
}
