//! Views of embedding matrices: the inputs' element types, shapes and strides.

use half::{bf16, f16};

use super::arrays::from_slices;
use super::pages::ask_for_huge_pages;
use super::shape::MatrixShape;
use crate::error::{Argument, Result, shape};

/// Element type of an embedding matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

/// The elements of an embedding matrix, borrowed.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Elements<'a> {
    /// `f32` in host memory.
    F32(&'a [f32]),
    /// `f16` in host memory.
    F16(&'a [f16]),
    /// `bf16` in host memory.
    Bf16(&'a [bf16]),
}

impl Elements<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Elements::F32(v) => v.len(),
            Elements::F16(v) => v.len(),
            Elements::Bf16(v) => v.len(),
        }
    }
}

from_slices!(Elements: f32 => Elements::F32, f16 => Elements::F16, bf16 => Elements::Bf16);

/// A borrowed row-major matrix of `rows` embeddings with `dim` elements each, the rows `stride` elements apart.
///
/// Shapes are checked by what takes the matrix, such as [`BatchBuilder::build`](crate::BatchBuilder::build), which knows the
/// argument's name.
///
/// ```
/// use catalog_softmax::Embeddings;
/// let table = vec![0.5f32; 10 * 8];
/// let all = Embeddings::new(&table, 10, 8);
/// let first_half_of_each_row = Embeddings::new(&table, 10, 4).with_stride(8);
/// assert_eq!((all.rows(), first_half_of_each_row.dim()), (10, 4));
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Embeddings<'a> {
    elements: Elements<'a>,
    rows: usize,
    dim: usize,
    stride: usize,
}

impl<'a> Embeddings<'a> {
    /// A contiguous matrix: `elements` holds `rows * dim` values.
    pub fn new(elements: impl Into<Elements<'a>>, rows: usize, dim: usize) -> Self {
        Embeddings { elements: elements.into(), rows, dim, stride: dim }
    }

    /// The same with the starts of consecutive rows `stride >= dim` elements apart.
    pub fn with_stride(mut self, stride: usize) -> Self {
        self.stride = stride;
        self
    }

    /// Number of embeddings.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per embedding.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Elements between the starts of consecutive rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self.elements {
            Elements::F32(_) => DType::F32,
            Elements::F16(_) => DType::F16,
            Elements::Bf16(_) => DType::Bf16,
        }
    }

    /// The elements as they lie in memory: row i begins at `i * stride`.
    pub fn elements(&self) -> Elements<'a> {
        self.elements
    }

    pub(crate) fn shape(&self) -> MatrixShape {
        MatrixShape { rows: self.rows, dim: self.dim, dtype: self.dtype() }
    }

    /// Checks that the elements fill the shape: every row takes `stride` elements but the last, which takes `dim`.
    pub(crate) fn check(&self, argument: impl Into<Argument>) -> Result<()> {
        let argument = argument.into();
        if self.rows == 0 || self.dim == 0 {
            return Err(shape(argument, format!("shape ({}, {})", self.rows, self.dim), "rows >= 1 and dim >= 1"));
        }
        if self.stride < self.dim {
            return Err(shape(
                argument,
                format!("a row stride of {} elements", self.stride),
                format!("row stride >= dim, which is {}", self.dim),
            ));
        }
        let found = self.elements.len();
        let span = (self.rows - 1).checked_mul(self.stride).and_then(|n| n.checked_add(self.dim));
        // A contiguous matrix must be given whole; a strided view may end before or after its last row's padding.
        let fits = if self.stride == self.dim { span == Some(found) } else { span.is_some_and(|span| span <= found) };
        if fits {
            return Ok(());
        }
        let (rows, dim, stride) = (self.rows, self.dim, self.stride);
        let rule = format!("(rows - 1) * stride + dim elements for rows {rows}, stride {stride}, dim {dim}");
        Err(shape(argument, format!("{found} elements"), rule))
    }

    /// The elements as they lie in memory.
    pub(crate) fn bytes(&self) -> &'a [u8] {
        match self.elements {
            Elements::F32(v) => bytemuck::cast_slice(v),
            Elements::F16(v) => bytemuck::cast_slice(v),
            Elements::Bf16(v) => bytemuck::cast_slice(v),
        }
    }

    /// Asks the processor to fetch a row that is read soon. Rows named by a table's indices are scattered, and without
    /// this each one would be waited for.
    pub(crate) fn prefetch_row(&self, row: usize) {
        let range = row * self.stride..row * self.stride + self.dim;
        match self.elements {
            Elements::F32(v) => prefetch(&v[range]),
            Elements::F16(v) => prefetch(&v[range]),
            Elements::Bf16(v) => prefetch(&v[range]),
        }
    }

    /// Copies row `row` into `out`, widened.
    pub(crate) fn widen_row<T: Real>(&self, row: usize, out: &mut [T]) {
        let range = row * self.stride..row * self.stride + self.dim;
        match self.elements {
            Elements::F32(v) => T::widen_f32(&v[range], out),
            Elements::F16(v) => T::widen_f16(&v[range], out),
            Elements::Bf16(v) => T::widen_bf16(&v[range], out),
        }
    }
}

/// Asks the processor to fetch values that are read soon; nothing on processors without a way to ask.
pub(crate) fn prefetch<T>(values: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in values.chunks(CACHE_LINE / size_of::<T>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64. A prefetch changes no state that a program sees, and the address is within a
        // slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}

#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;

/// A matrix of the crate `ndarray`, with the feature `ndarray`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) where the rows do not follow each other without gaps. Rows with gaps go in by
/// [`Embeddings::with_stride`].
///
/// ```
/// use catalog_softmax::Embeddings;
/// use ndarray::{Array2, s};
/// let table = Array2::<f32>::ones((10, 8));
/// assert_eq!(Embeddings::try_from(table.view())?.dim(), 8);
/// assert!(Embeddings::try_from(table.slice(s![.., ..4])).is_err());
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[cfg(feature = "ndarray")]
impl<'a, T> TryFrom<ndarray::ArrayView2<'a, T>> for Embeddings<'a>
where
    &'a [T]: Into<Elements<'a>>,
{
    type Error = crate::Error;

    fn try_from(array: ndarray::ArrayView2<'a, T>) -> Result<Self> {
        let (rows, dim) = array.dim();
        let strides = array.strides().to_vec();
        match array.to_slice() {
            Some(elements) => Ok(Embeddings::new(elements, rows, dim)),
            None => Err(shape("array", format!("strides {strides:?}"), "rows that follow each other without gaps")),
        }
    }
}

/// The type in which a backend returns gradients: `f32`, or `f64` for the reference.
pub trait Real:
    Copy + Default + PartialEq + std::fmt::Debug + Into<f64> + Send + Sync + private::Sealed + 'static
{
    /// Rounds to this type.
    fn from_f64(value: f64) -> Self;
    /// Numbers of this type as a [`Collective`](crate::sharded::Collective) takes them.
    #[doc(hidden)]
    fn numbers(values: &mut [Self]) -> Numbers<'_>;
    #[doc(hidden)]
    fn widen_f32(from: &[f32], to: &mut [Self]);
    #[doc(hidden)]
    fn widen_f16(from: &[f16], to: &mut [Self]);
    #[doc(hidden)]
    fn widen_bf16(from: &[bf16], to: &mut [Self]);
}

mod private {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

impl Real for f32 {
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
    fn numbers(values: &mut [f32]) -> Numbers<'_> {
        Numbers::F32(values)
    }
    fn widen_f32(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn widen_f16(from: &[f16], to: &mut [f32]) {
        half::slice::HalfFloatSliceExt::convert_to_f32_slice(from, to);
    }
    fn widen_bf16(from: &[bf16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
    }
}

impl Real for f64 {
    fn from_f64(value: f64) -> f64 {
        value
    }
    fn numbers(values: &mut [f64]) -> Numbers<'_> {
        Numbers::F64(values)
    }
    fn widen_f32(from: &[f32], to: &mut [f64]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f64::from(*from);
        }
    }
    fn widen_f16(from: &[f16], to: &mut [f64]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f64();
        }
    }
    fn widen_bf16(from: &[bf16], to: &mut [f64]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = from.to_f64();
        }
    }
}

/// Numbers that a [`Collective`](crate::sharded::Collective) sums in place.
#[derive(Debug)]
pub enum Numbers<'a> {
    /// Single precision.
    F32(&'a mut [f32]),
    /// Double precision.
    F64(&'a mut [f64]),
}

impl Numbers<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Numbers::F32(v) => v.len(),
            Numbers::F64(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An owned row-major matrix, as gradients come back: `values[row * dim + k]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Matrix<T> {
    /// `rows * dim` elements.
    pub values: Vec<T>,
    /// Number of rows.
    pub rows: usize,
    /// Elements per row.
    pub dim: usize,
}

impl<T: Real> Matrix<T> {
    /// The row `row`, `dim` elements.
    ///
    /// # Panics
    /// If `row >= rows`.
    pub fn row(&self, row: usize) -> &[T] {
        &self.values[row * self.dim..(row + 1) * self.dim]
    }

    /// Zeros of a shape.
    pub(crate) fn zeros(rows: usize, dim: usize) -> Self {
        Matrix { values: vec![T::default(); rows * dim], rows, dim }
    }

    /// The elements in single precision.
    pub(crate) fn to_f32(&self) -> Matrix<f32> {
        let values = self.values.iter().map(|&value| value.into() as f32).collect();
        Matrix { values, rows: self.rows, dim: self.dim }
    }

    /// Sets the shape, and keeps the memory if it already has that many elements. Old values stay in it, so the caller
    /// has to write every element.
    pub(crate) fn set_shape(&mut self, rows: usize, dim: usize) {
        self.rows = rows;
        self.dim = dim;
        if self.values.len() != rows * dim {
            self.values = vec![T::default(); rows * dim];
            ask_for_huge_pages(&mut self.values);
        }
    }
}
