//! The table that a step changes: element type, shape and stride, borrowed mutably.

use half::{bf16, f16};

use crate::error::{Argument, Result, shape};
use crate::problem::embeddings::{DType, Elements, Embeddings};

/// Rows that a table has at most: 2^31 - 1.
pub(super) const MOST_ROWS: usize = i32::MAX as usize;

/// The elements of a table, borrowed mutably.
#[derive(Debug)]
#[non_exhaustive]
pub enum ElementsMut<'a> {
    /// `f32` in host memory.
    F32(&'a mut [f32]),
    /// `f16` in host memory.
    F16(&'a mut [f16]),
    /// `bf16` in host memory.
    Bf16(&'a mut [bf16]),
}

impl<'a> ElementsMut<'a> {
    fn len(&self) -> usize {
        self.view().len()
    }

    fn view(&self) -> Elements<'_> {
        match self {
            ElementsMut::F32(v) => Elements::F32(v),
            ElementsMut::F16(v) => Elements::F16(v),
            ElementsMut::Bf16(v) => Elements::Bf16(v),
        }
    }

    fn reborrow(&mut self) -> ElementsMut<'_> {
        match self {
            ElementsMut::F32(v) => ElementsMut::F32(v),
            ElementsMut::F16(v) => ElementsMut::F16(v),
            ElementsMut::Bf16(v) => ElementsMut::Bf16(v),
        }
    }

    fn split_at(self, at: usize) -> (ElementsMut<'a>, ElementsMut<'a>) {
        fn both<T, R>((left, right): (T, T), part: impl Fn(T) -> R) -> (R, R) {
            (part(left), part(right))
        }
        match self {
            ElementsMut::F32(v) => both(v.split_at_mut(at), ElementsMut::F32),
            ElementsMut::F16(v) => both(v.split_at_mut(at), ElementsMut::F16),
            ElementsMut::Bf16(v) => both(v.split_at_mut(at), ElementsMut::Bf16),
        }
    }
}

/// `From` mutable slices, vectors and arrays of an element type.
macro_rules! from_mutable_slices {
    ($($t:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a mut [$t]> for ElementsMut<'a> {
            fn from(values: &'a mut [$t]) -> Self {
                ElementsMut::$variant(values)
            }
        }
        impl<'a> From<&'a mut Vec<$t>> for ElementsMut<'a> {
            fn from(values: &'a mut Vec<$t>) -> Self {
                ElementsMut::$variant(values)
            }
        }
        impl<'a, const N: usize> From<&'a mut [$t; N]> for ElementsMut<'a> {
            fn from(values: &'a mut [$t; N]) -> Self {
                ElementsMut::$variant(values)
            }
        }
    )*};
}

from_mutable_slices!(f32 => F32, f16 => F16, bf16 => Bf16);

/// A mutably borrowed row-major table of `rows` embeddings with `dim` elements each, the rows `stride` elements apart:
/// what [`Optimizer::step`](super::Optimizer::step) changes. Elements between the rows are neither read nor written.
///
/// The shape is checked by what takes the table, as that of [`Embeddings`] is.
///
/// ```
/// use catalog_softmax::optimizer::TableMut;
/// let mut values = vec![0.5f32; 10 * 8];
/// let first_half_of_each_row = TableMut::new(&mut values, 10, 4).with_stride(8);
/// assert_eq!((first_half_of_each_row.rows(), first_half_of_each_row.view().dim()), (10, 4));
/// ```
#[derive(Debug)]
pub struct TableMut<'a> {
    pub(super) elements: ElementsMut<'a>,
    rows: usize,
    dim: usize,
    stride: usize,
}

impl<'a> TableMut<'a> {
    /// A contiguous table: `elements` holds `rows * dim` values.
    pub fn new(elements: impl Into<ElementsMut<'a>>, rows: usize, dim: usize) -> Self {
        TableMut { elements: elements.into(), rows, dim, stride: dim }
    }

    /// The same with the starts of consecutive rows `stride >= dim` elements apart.
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.stride = stride;
        self
    }

    /// M, the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// D, the elements of a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Elements between the starts of consecutive rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.view().dtype()
    }

    /// The table as embeddings to read.
    pub fn view(&self) -> Embeddings<'_> {
        Embeddings::new(self.elements.view(), self.rows, self.dim).with_stride(self.stride)
    }

    /// Checks that the elements fill the shape, as [`Embeddings::check`] does, and that indices of rows fit an i32.
    pub(crate) fn check(&self, argument: impl Into<Argument>) -> Result<()> {
        let argument = argument.into();
        if self.rows > MOST_ROWS {
            return Err(shape(argument, format!("{} rows", self.rows), "at most 2^31 - 1 rows"));
        }
        self.view().check(argument)
    }

    /// The same table for as long as `self` is borrowed.
    pub(crate) fn reborrow(&mut self) -> TableMut<'_> {
        TableMut { elements: self.elements.reborrow(), rows: self.rows, dim: self.dim, stride: self.stride }
    }

    /// Rows `..row` and rows `row..`, for two threads. Of a checked table; `row` is at most its number of rows.
    pub(crate) fn split_at_row(self, row: usize) -> (TableMut<'a>, TableMut<'a>) {
        let TableMut { elements, rows, dim, stride } = self;
        // Elements may end with the last row: there is not always a whole stride of it.
        let at = (row * stride).min(elements.len());
        let (above, below) = elements.split_at(at);
        (
            TableMut { elements: above, rows: row, dim, stride },
            TableMut { elements: below, rows: rows - row, dim, stride },
        )
    }
}
