//! Ctrl-C: the first one asks the training to stop, the second one stops the process.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::Fallible;

/// Whether the training shall stop.
pub static ASKED: AtomicBool = AtomicBool::new(false);

/// The exit status of a process that Ctrl-C ended.
pub const STATUS: u8 = 130;

pub fn listen() -> Fallible<()> {
    ctrlc::set_handler(|| {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(STATUS.into());
        }
    })?;
    Ok(())
}

/// Why a training stopped before its end, as an error that [`main`](crate::main) tells from others.
#[derive(Debug)]
pub struct Interrupted(pub String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}
