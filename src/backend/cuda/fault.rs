//! Bad input that only the device sees. Kernels record it (`kernels/shared/fault.cuh`), and the host turns the record
//! into the error that the same input in host memory would be.

use super::driver::Driver;
use super::memory::{Arena, Layout, Part};
use crate::error::{Error, Result, value};

/// The record where nothing is wrong.
const NONE: u64 = u64::MAX;

/// Eight bytes that kernels write where something is wrong, in a place that steps do not move.
#[derive(Debug)]
pub(super) struct FaultRecord {
    arena: Arena,
    part: Part,
}

impl FaultRecord {
    pub(super) fn new(driver: &Driver) -> Result<Self> {
        driver.bind()?;
        let mut layout = Layout::default();
        let part = layout.part(1, size_of::<u64>());
        let mut arena = Arena::default();
        arena.reserve(driver, layout)?;
        let record = FaultRecord { arena, part };
        record.clear(driver)?;
        Ok(record)
    }

    pub(super) fn address(&self) -> u64 {
        self.arena.address(self.part)
    }

    fn clear(&self, driver: &Driver) -> Result<()> {
        driver.fill(self.address(), 0xff, size_of::<u64>())
    }

    /// Waits for the device; the first fault since the last call, if there was one, as an error.
    pub(super) fn take(&self, driver: &Driver) -> Result<()> {
        let mut record = [NONE];
        self.arena.download(driver, self.part, &mut record)?;
        if record[0] == NONE {
            return Ok(());
        }
        self.clear(driver)?;
        Err(error(record[0] >> 56, record[0] & (u64::MAX >> 8)))
    }
}

/// What `fault.cuh`'s number stands for, at that index of its array.
fn error(kind: u64, index: u64) -> Error {
    let (argument, found, rule) = match kind {
        1 => ("positives", "no candidate's index", "at least 0 and less than the number of candidates in all pools"),
        2 => ("exclude_offsets", "out of order", "ascending from 0 to the number of excluded ids"),
        3 => ("log_q", "NaN or infinite", "finite"),
        4 => ("positive_log_q", "out of range", "finite, and < 0 for Correction::CorrectedLogQ"),
        5 => ("row_weight", "negative, NaN or infinite", WEIGHTS),
        6 => ("positive_offsets", "out of order", "ascending from 0 to the number of positives"),
        7 => ("positive_weight", "negative, NaN or infinite", "finite and >= 0"),
        8 => ("candidate_rows", "no row of the table", "less than the table's rows"),
        9 => ("row_negatives", "no row of the table", "a row of the table, or u32::MAX for none"),
        10 => ("positives", "no row of the table", "less than the table's rows"),
        _ => ("row_negatives_log_q", "NaN or infinite", "finite"),
    };
    value(format!("{argument}[{index}]"), found, rule)
}

const WEIGHTS: &str = "finite and >= 0, with a sum > 0 for Reduction::WeightedMean";
