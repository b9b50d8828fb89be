//! What a `RawExtra` says, of a batch in device memory.

use catalog_softmax::cuda::{DeviceBatch, DevicePool, DeviceRowNegatives, DeviceTable};
use pyo3::prelude::*;

use crate::arrays::RawBatch;
use crate::device::{matrix, pool, read};
use crate::extra::RawExtra;

impl RawExtra {
    /// The batch with its pools and its rows' own negatives; none where it has no table.
    ///
    /// # Safety
    /// As [`read`], of all that the two name.
    pub unsafe fn device_batch<'a>(&self, raw: &RawBatch) -> PyResult<Option<DeviceBatch<'a>>> {
        let Some(table) = &self.table else { return Ok(None) };
        // SAFETY: handed on.
        unsafe {
            let mut table = DeviceTable::new(matrix(table, "table")?);
            if let Some(ids) = &self.table_ids {
                table = table.ids(read(ids));
            }
            if !self.table_gradient {
                table = table.without_gradient();
            }
            let mut batch = DeviceBatch::of_table(matrix(&raw.0, "queries")?, table);
            for (p, own) in raw.1.iter().enumerate() {
                batch = batch.pool(pool(own, p)?);
            }
            for (rows, log_q) in &self.candidate_rows {
                let pool = rows.as_ref().map_or_else(DevicePool::whole_table, |rows| DevicePool::rows(read(rows)));
                batch = batch.pool(match log_q {
                    Some(log_q) => pool.log_q(read(log_q)),
                    None => pool,
                });
            }
            if let Some((rows, per_row, log_q)) = &self.row_negatives {
                let negatives = DeviceRowNegatives::new(read(rows), *per_row);
                batch = batch.row_negatives(match log_q {
                    Some(log_q) => negatives.log_q(read(log_q)),
                    None => negatives,
                });
            }
            Ok(Some(batch))
        }
    }

    /// # Safety
    /// As [`read`].
    pub unsafe fn with_positives<'a>(&self, mut batch: DeviceBatch<'a>) -> DeviceBatch<'a> {
        if let Some(offsets) = &self.positive_offsets {
            // SAFETY: handed on.
            batch = batch.positive_offsets(unsafe { read(offsets) });
        }
        if let Some(weight) = &self.positive_weight {
            // SAFETY: handed on.
            batch = batch.positive_weight(unsafe { read(weight) });
        }
        batch
    }
}
