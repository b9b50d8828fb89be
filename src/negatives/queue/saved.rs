//! A queue as bytes, for checkpoints: in the format of [`crate::saved`], whose contents are
//!
//! ```text
//! u64: type of elements, 1 with ids + 2 with log_q, capacity, dim, max_age (0: none), next slot, number of enqueues with
//!      live rows; the rows of each, oldest first
//! live rows, in the order of the queue's pools: embeddings, then ids (u64), then log_q (f32)
//! ```

use std::collections::VecDeque;

use super::ring::Ring;
use super::{NegativeQueue, QueueOptions};
use crate::error::{Result, value};
use crate::problem::embeddings::DType;
use crate::saved::{ARGUMENT, Format, Reader, finish};

/// The magic is "catqueue" as a little-endian number.
const FORMAT: Format = Format { magic: u64::from_le_bytes(*b"catqueue"), version: 2, name: "NegativeQueue" };
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

impl NegativeQueue {
    /// The state as bytes, in the machine's byte order: options, order, ages and live rows. A queue that
    /// [`from_bytes`](NegativeQueue::from_bytes) makes from them has bitwise the same pools, split alike, and goes on
    /// as this one does.
    pub fn to_bytes(&self) -> Vec<u8> {
        let &QueueOptions { capacity, dim, dtype, ids, log_q, max_age } = &self.options;
        let dtype = DTYPES.iter().position(|&known| known == dtype).map_or(u64::MAX, |at| at as u64);
        let arrays = u64::from(ids) | u64::from(log_q) << 1;
        let (next, runs) = (self.ring.next() as u64, self.ring.runs());
        let mut header = vec![dtype, arrays, capacity as u64, dim as u64, max_age.unwrap_or(0)];
        header.extend([next, runs.len() as u64]);
        header.extend(runs.iter().map(|&rows| rows as u64));
        let mut bytes = FORMAT.start();
        bytes.extend_from_slice(bytemuck::cast_slice(&header));
        for (array, row_bytes) in self.arrays().into_iter().zip(self.options.row_bytes()) {
            for slots in self.ring.live() {
                bytes.extend_from_slice(&array[slots.start * row_bytes..slots.end * row_bytes]);
            }
        }
        finish(bytes)
    }

    /// A queue from its bytes, with the options that it had ([`options`](NegativeQueue::options)).
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) or [`Error::Shape`](crate::Error::Shape) if the bytes are not what
    /// `to_bytes` of a queue returned, are of another version or byte order, cut off, or damaged, or if there is not
    /// enough memory. Memory is reserved for the queue's whole capacity, but the system provides it only as rows come
    /// in. Bytes from an untrusted source can therefore reserve much memory, but not use it up.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = FORMAT.open(bytes)?;
        let (options, ring) = read_header(&mut reader)?;
        let mut queue = Self::with_ring(options, ring)?;
        queue.read_rows(&mut reader)?;
        reader.end()?;
        Ok(queue)
    }

    fn read_rows(&mut self, reader: &mut Reader<'_>) -> Result<()> {
        let (live, row_bytes) = (self.ring.live(), self.options.row_bytes());
        for (array, row_bytes) in self.arrays_mut().into_iter().zip(row_bytes) {
            for slots in &live {
                let to = &mut array[slots.start * row_bytes..slots.end * row_bytes];
                to.copy_from_slice(reader.take(to.len())?);
            }
        }
        Ok(())
    }
}

/// Everything after the version and before the rows.
fn read_header(reader: &mut Reader<'_>) -> Result<(QueueOptions, Ring)> {
    let (dtype, arrays) = (reader.number()?, reader.number()?);
    let known = usize::try_from(dtype).ok().and_then(|dtype| DTYPES.get(dtype));
    let (Some(&dtype), 0..=3) = (known, arrays) else {
        let found = format!("of elements {dtype} and arrays {arrays}");
        return Err(value(ARGUMENT, found, "elements 0 to 2 and arrays 0 to 3"));
    };
    let (capacity, dim, max_age) = (reader.size()?, reader.size()?, reader.number()?);
    let max_age = (max_age > 0).then_some(max_age);
    let options = QueueOptions { capacity, dim, dtype, ids: arrays & 1 != 0, log_q: arrays & 2 != 0, max_age };
    options.check()?;
    let (next, count) = (reader.size()?, reader.size()?);
    // If the bytes are too few for this number of sizes, the error comes before memory is taken for them.
    let runs = (0..count).map(|_| reader.size()).collect::<Result<VecDeque<_>>>()?;
    let ring = Ring::restored(capacity, max_age, next, runs);
    let rule = "its live rows in the order of their enqueues, as many as its capacity and none too old";
    Ok((options, ring.ok_or_else(|| value(ARGUMENT, "in a state that no queue can have", rule))?))
}
