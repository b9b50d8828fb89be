//! Arrays beside the embeddings: ids, indices and offsets, and the rules about lengths and values that all arrays share.

use std::borrow::Cow;

use crate::error::{Argument, Result, shape, value};

/// 64-bit item ids. An item has the same id in every pool. Ids are only compared for equality, so signed and unsigned
/// ones work alike. Slices of `u64` and `i64` are borrowed; slices of `u32` and `i32` are copied into 64 bits.
///
/// ```
/// use catalog_softmax::Ids;
/// let (borrowed, copied): (Ids, Ids) = (Ids::from(&[7u64, 8]), Ids::from(&[7u32, 8]));
/// assert_eq!(borrowed, copied);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids<'a>(pub(crate) Cow<'a, [u64]>);

/// Indices of candidates, or of a table's rows.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Indices<'a> {
    /// Unsigned, of 32 bits.
    U32(&'a [u32]),
    /// Signed, of 64 bits, as PyTorch has them.
    I64(&'a [i64]),
}

impl Indices<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Indices::U32(indices) => indices.len(),
            Indices::I64(indices) => indices.len(),
        }
    }

    /// The index at a place. A negative one is larger than any length.
    pub(crate) fn at(&self, place: usize) -> usize {
        match self {
            Indices::U32(indices) => indices[place] as usize,
            Indices::I64(indices) => indices[place] as usize,
        }
    }

    /// The place of the first index that is negative or not less than `limit`.
    pub(crate) fn first_not_below(&self, limit: usize) -> Option<usize> {
        match self {
            Indices::U32(indices) => indices.iter().position(|&index| index as usize >= limit),
            Indices::I64(indices) => indices.iter().position(|&index| index as usize >= limit),
        }
    }

    /// The index at a place as an error shows it.
    pub(crate) fn shown(&self, place: usize) -> String {
        match self {
            Indices::U32(indices) => indices[place].to_string(),
            Indices::I64(indices) => indices[place].to_string(),
        }
    }
}

/// `From` slices, vectors and arrays of an element type.
macro_rules! from_slices {
    ($to:ident: $($t:ty => $from:expr),* $(,)?) => {$(
        impl<'a> From<&'a [$t]> for $to<'a> {
            fn from(values: &'a [$t]) -> Self {
                $from(values)
            }
        }
        impl<'a> From<&'a Vec<$t>> for $to<'a> {
            fn from(values: &'a Vec<$t>) -> Self {
                $from(values.as_slice())
            }
        }
        impl<'a, const N: usize> From<&'a [$t; N]> for $to<'a> {
            fn from(values: &'a [$t; N]) -> Self {
                $from(values.as_slice())
            }
        }
    )*};
}
pub(crate) use from_slices;

from_slices!(Ids:
    u64 => |ids| Ids(Cow::Borrowed(ids)),
    i64 => |ids| Ids(Cow::Borrowed(bytemuck::cast_slice(ids))),
    u32 => |ids: &[u32]| Ids(ids.iter().map(|&id| u64::from(id)).collect()),
    // A negative id is the same id as an `i64` of that value.
    i32 => |ids: &[i32]| Ids(ids.iter().map(|&id| i64::from(id) as u64).collect()),
);
from_slices!(Indices: u32 => Indices::U32, i64 => Indices::I64);

/// Per row, ids that are not negatives, as CSR: row i has `ids[offsets[i]..offsets[i + 1]]`.
#[derive(Debug, Clone)]
pub(crate) struct Excluded<'a> {
    pub(crate) offsets: &'a [i64],
    pub(crate) ids: Ids<'a>,
}

impl Excluded<'_> {
    pub(crate) fn row(&self, row: usize) -> &[u64] {
        &self.ids.0[self.offsets[row] as usize..self.offsets[row + 1] as usize]
    }
}

/// Checks the offsets of `rows` rows: they start at 0, never fall, and end with the number of values.
pub(crate) fn check_csr(offsets: (&'static str, &[i64]), values: (&'static str, usize), rows: usize) -> Result<()> {
    let ((name, offsets), (values_name, len)) = (offsets, values);
    check_len(name, offsets.len(), rows + 1, "one more than there are rows")?;
    if offsets[0] != 0 {
        return Err(value(format!("{name}[0]"), offsets[0], "0"));
    }
    if let Some(row) = offsets.windows(2).position(|pair| pair[0] > pair[1]) {
        return Err(value(format!("{name}[{}]", row + 1), offsets[row + 1], "not less than the one before"));
    }
    let end = offsets[rows];
    if end as u64 != len as u64 {
        return Err(shape(values_name, format!("{len} ids"), format!("the last offset, which is {end}")));
    }
    Ok(())
}

/// `why` says what the expected length is.
pub(crate) fn check_len(argument: impl Into<Argument>, found: usize, expected: usize, why: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(shape(argument.into(), format!("length {found}"), format!("length {expected}, {why}")))
}

pub(crate) fn check_all(
    argument: impl Into<Argument>,
    values: &[f32],
    rule: &'static str,
    ok: impl Fn(f32) -> bool,
) -> Result<()> {
    match values.iter().position(|&v| !ok(v)) {
        Some(at) => Err(value(format!("{}[{at}]", argument.into()), values[at], rule)),
        None => Ok(()),
    }
}
