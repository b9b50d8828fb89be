//! A queue as bytes, for checkpoints.
//!
//! ```text
//! u64: MAGIC, VERSION, type of elements, 1 with ids + 2 with log_q, capacity, dim, max_age (0: none), next slot,
//!      number of enqueues with live rows; the rows of each, oldest first
//! live rows, in the order of the queue's pools: embeddings, then ids (u64), then log_q (f32)
//! u64: checksum of all bytes before it
//! ```
//!
//! Numbers are in the machine's byte order. On a machine of the other byte order, MAGIC does not match.

use std::collections::VecDeque;

use super::ring::Ring;
use super::{NegativeQueue, QueueOptions};
use crate::error::{Error, Result, shape, value};
use crate::problem::embeddings::DType;

/// "catqueue" as a little-endian number.
const MAGIC: u64 = u64::from_le_bytes(*b"catqueue");
const VERSION: u64 = 2;
const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];
const ARGUMENT: &str = "bytes";
const RULE: &str = "a NegativeQueue as to_bytes returned it, on a machine of this byte order";

impl NegativeQueue {
    /// The state as bytes, in the machine's byte order: options, order, ages and live rows. A queue that
    /// [`from_bytes`](NegativeQueue::from_bytes) makes from them has bitwise the same pools, split alike, and goes on
    /// as this one does.
    pub fn to_bytes(&self) -> Vec<u8> {
        let &QueueOptions { capacity, dim, dtype, ids, log_q, max_age } = &self.options;
        let dtype = DTYPES.iter().position(|&known| known == dtype).map_or(u64::MAX, |at| at as u64);
        let arrays = u64::from(ids) | u64::from(log_q) << 1;
        let (next, runs) = (self.ring.next() as u64, self.ring.runs());
        let mut header = vec![MAGIC, VERSION, dtype, arrays, capacity as u64, dim as u64, max_age.unwrap_or(0)];
        header.extend([next, runs.len() as u64]);
        header.extend(runs.iter().map(|&rows| rows as u64));
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&header).to_vec();
        for (array, row_bytes) in self.arrays().into_iter().zip(self.options.row_bytes()) {
            for slots in self.ring.live() {
                bytes.extend_from_slice(&array[slots.start * row_bytes..slots.end * row_bytes]);
            }
        }
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum.to_ne_bytes());
        bytes
    }

    /// A queue from its bytes, with the options that it had ([`options`](NegativeQueue::options)).
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Shape`] if the bytes are not what `to_bytes` of a queue returned, are of another
    /// version or byte order, cut off, or damaged, or if there is not enough memory. Memory is reserved for the queue's
    /// whole capacity, but the system provides it only as rows come in. Bytes from an untrusted source can therefore
    /// reserve much memory, but not use it up.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { bytes };
        if reader.number()? != MAGIC {
            return Err(value(ARGUMENT, "something else", RULE));
        }
        let version = reader.number()?;
        if version != VERSION {
            return Err(value(ARGUMENT, format!("of version {version}"), format!("{RULE}, of version {VERSION}")));
        }
        // The checksum is compared before any size is used.
        let Some((body, sum)) = bytes.split_last_chunk::<8>() else { return Err(cut_off(bytes.len())) };
        if u64::from_ne_bytes(*sum) != checksum(body) {
            let found = format!("of a checksum {:#x}", u64::from_ne_bytes(*sum));
            return Err(value(ARGUMENT, found, "the checksum of the bytes before it: they are damaged"));
        }
        let (options, ring) = reader.header()?;
        let mut queue = Self::with_ring(options, ring)?;
        queue.read_rows(&mut reader)?;
        match reader.bytes.len() {
            8 => Ok(queue),
            left => Err(shape(ARGUMENT, format!("{left} after the rows"), "8, a checksum")),
        }
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

/// Bytes that are yet to be read.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(|| cut_off(self.bytes.len()))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_ne_bytes(bytes))
    }

    fn size(&mut self) -> Result<usize> {
        let number = self.number()?;
        usize::try_from(number).map_err(|_| value(ARGUMENT, format!("of a size {number}"), "sizes of this machine"))
    }

    /// Everything after the version and before the rows.
    fn header(&mut self) -> Result<(QueueOptions, Ring)> {
        let (dtype, arrays) = (self.number()?, self.number()?);
        let known = usize::try_from(dtype).ok().and_then(|dtype| DTYPES.get(dtype));
        let (Some(&dtype), 0..=3) = (known, arrays) else {
            let found = format!("of elements {dtype} and arrays {arrays}");
            return Err(value(ARGUMENT, found, "elements 0 to 2 and arrays 0 to 3"));
        };
        let (capacity, dim, max_age) = (self.size()?, self.size()?, self.number()?);
        let max_age = (max_age > 0).then_some(max_age);
        let options = QueueOptions { capacity, dim, dtype, ids: arrays & 1 != 0, log_q: arrays & 2 != 0, max_age };
        options.check()?;
        let (next, count) = (self.size()?, self.size()?);
        // If the bytes are too few for this number of sizes, the error comes before memory is taken for them.
        let runs = (0..count).map(|_| self.size()).collect::<Result<VecDeque<_>>>()?;
        let ring = Ring::restored(capacity, max_age, next, runs);
        let rule = "its live rows in the order of their enqueues, as many as its capacity and none too old";
        Ok((options, ring.ok_or_else(|| value(ARGUMENT, "in a state that no queue can have", rule))?))
    }
}

fn cut_off(left: usize) -> Error {
    shape(
        ARGUMENT,
        format!("only {left} bytes left where more are needed"),
        "all that NegativeQueue::to_bytes returned: they are cut off",
    )
}

/// FNV-1a over words of eight bytes, the last one filled with zeros, rotated so that high bits spread, too. Each step is one
/// to one in sum and word, so that damage to one word is always found.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_ne_bytes(word)).wrapping_mul(0x100_0000_01b3).rotate_left(23)
    })
}
