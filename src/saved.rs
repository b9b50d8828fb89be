//! States as bytes for checkpoints, and the checks when they are read again.
//!
//! ```text
//! u64: MAGIC, VERSION
//! contents
//! u64: checksum of all bytes before it
//! ```
//!
//! Numbers are in the machine's byte order. On a machine of the other byte order, MAGIC does not match.

use crate::error::{Error, Result, shape, value};

/// The argument of every function that reads a state.
pub(crate) const ARGUMENT: &str = "bytes";

/// Whose state it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Format {
    pub(crate) magic: u64,
    pub(crate) version: u64,
    /// The type whose `to_bytes` writes it.
    pub(crate) name: &'static str,
}

impl Format {
    /// Bytes to which the contents are then added.
    pub(crate) fn start(&self) -> Vec<u8> {
        bytemuck::cast_slice(&[self.magic, self.version]).to_vec()
    }

    /// The contents, once magic, version and checksum are right. The checksum is compared before any size is used.
    pub(crate) fn open<'a>(&self, bytes: &'a [u8]) -> Result<Reader<'a>> {
        let rule = format!("a {0} as to_bytes returned it, on a machine of this byte order", self.name);
        let mut reader = Reader { bytes, name: self.name };
        if reader.number()? != self.magic {
            return Err(value(ARGUMENT, "something else", rule));
        }
        let version = reader.number()?;
        if version != self.version {
            return Err(value(
                ARGUMENT,
                format!("of version {version}"),
                format!("{rule}, of version {}", self.version),
            ));
        }
        let Some((contents, sum)) = reader.bytes.split_last_chunk::<8>() else { return Err(reader.cut_off()) };
        if u64::from_ne_bytes(*sum) != checksum(&bytes[..bytes.len() - sum.len()]) {
            let found = format!("of a checksum {:#x}", u64::from_ne_bytes(*sum));
            return Err(value(ARGUMENT, found, "the checksum of the bytes before it: they are damaged"));
        }
        reader.bytes = contents;
        Ok(reader)
    }
}

/// Adds the checksum.
pub(crate) fn finish(mut bytes: Vec<u8>) -> Vec<u8> {
    let sum = checksum(&bytes);
    bytes.extend_from_slice(&sum.to_ne_bytes());
    bytes
}

/// Contents that are yet to be read.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    name: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(|| self.cut_off())?;
        self.bytes = rest;
        Ok(taken)
    }

    pub(crate) fn number(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(self.take(8)?);
        Ok(u64::from_ne_bytes(bytes))
    }

    pub(crate) fn size(&mut self) -> Result<usize> {
        let number = self.number()?;
        usize::try_from(number).map_err(|_| value(ARGUMENT, format!("of a size {number}"), "sizes of this machine"))
    }

    /// Checks that nothing is left.
    pub(crate) fn end(&self) -> Result<()> {
        match self.bytes.len() {
            0 => Ok(()),
            left => Err(shape(ARGUMENT, format!("{left} after the contents"), "only a checksum there")),
        }
    }

    fn cut_off(&self) -> Error {
        shape(
            ARGUMENT,
            format!("only {} bytes left where more are needed", self.bytes.len()),
            format!("all that {}::to_bytes returned: they are cut off", self.name),
        )
    }
}

/// FNV-1a over words of eight bytes, the last one filled with zeros, rotated so that high bits spread, too. Each step
/// is one to one in sum and word, so that damage to one word is always found.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    bytes.chunks(8).fold(0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64, |sum, chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        (sum ^ u64::from_ne_bytes(word)).wrapping_mul(0x100_0000_01b3).rotate_left(23)
    })
}
