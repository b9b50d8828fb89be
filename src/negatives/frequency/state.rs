//! States as bytes, little endian: `CSFQ`, version, kind, contents, checksum.

use super::hashes::Hashes;
use crate::error::{Error, Result, Shown, value};

const MAGIC: [u8; 4] = *b"CSFQ";
const VERSION: u8 = 2;
const HEADER: usize = MAGIC.len() + 2;
const CHECKSUM: usize = 8;

/// More ids than any stream has. An estimator that has observed this many ignores further ones, so that counters cannot
/// overflow, and every state that was written can be read.
pub(super) const MOST_DRAWS: u64 = 1 << 62;

/// Those of the ids that are still counted, the first ones, after `draws` of them.
pub(super) fn counted(ids: &[u64], draws: u64) -> &[u64] {
    let left = usize::try_from(MOST_DRAWS - draws).unwrap_or(usize::MAX);
    &ids[..ids.len().min(left)]
}

/// Whose state it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    ExactCounts = 1,
    CountMin = 2,
    Gaps = 3,
}

/// An error about a state.
pub(super) fn corrupt(found: impl Shown) -> Error {
    value("bytes", found, "the state as to_bytes of the same estimator and version returned it")
}

/// FNV-1a, 64 bits: finds every change of one byte, and others but for 2^-64 of them.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn new(kind: Kind, contents: usize) -> Self {
        let mut bytes = Vec::with_capacity(HEADER + contents + CHECKSUM);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, kind as u8]);
        Writer(bytes)
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(super) fn hashes(&mut self, hashes: &Hashes) {
        self.u64(hashes.seed);
        self.u64(hashes.width as u64);
        self.u64(hashes.depth() as u64);
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        let sum = checksum(&self.0);
        self.u64(sum);
        self.0
    }
}

/// The contents, once header and checksum are right.
pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(kind: Kind, bytes: &'a [u8]) -> Result<Self> {
        let (Some((rest, sum)), Some(header)) = (bytes.split_last_chunk::<CHECKSUM>(), bytes.first_chunk::<HEADER>())
        else {
            return Err(corrupt(format!("{} bytes", bytes.len())));
        };
        if header[..MAGIC.len()] != MAGIC || rest.len() < HEADER {
            return Err(corrupt(format!("bytes that start {header:?}")));
        }
        if header[MAGIC.len()..] != [VERSION, kind as u8] {
            return Err(corrupt(format!("version {}, kind {}", header[MAGIC.len()], header[MAGIC.len() + 1])));
        }
        let (stored, computed) = (u64::from_le_bytes(*sum), checksum(rest));
        if stored != computed {
            return Err(corrupt(format!("checksum {stored:#x} of bytes whose checksum is {computed:#x}")));
        }
        Ok(Reader(&rest[HEADER..]))
    }

    pub(super) fn left(&self) -> usize {
        self.0.len()
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        let (first, rest) = self.0.split_first_chunk().ok_or_else(|| corrupt("too short"))?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*first))
    }

    pub(super) fn draws(&mut self) -> Result<u64> {
        let draws = self.u64()?;
        if draws <= MOST_DRAWS { Ok(draws) } else { Err(corrupt(format!("{draws} ids"))) }
    }

    /// Hash functions, once it is sure that there are `cell_bytes` for each of their cells.
    pub(super) fn hashes(&mut self, cell_bytes: u64) -> Result<Hashes> {
        let (seed, width, depth) = (self.u64()?, self.u64()?, self.u64()?);
        let bytes = width.checked_mul(depth).and_then(|cells| cells.checked_mul(cell_bytes));
        if bytes.is_none_or(|bytes| bytes > self.left() as u64) {
            return Err(corrupt(format!("{depth} x {width} cells in {} bytes", self.left())));
        }
        Hashes::new(width as usize, depth as usize, seed).map_err(corrupt)
    }

    pub(super) fn end(&self) -> Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(corrupt(format!("{} bytes too many", self.left()))) }
    }
}
