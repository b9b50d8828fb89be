//! The matmuls of a tile, by the library `gemm-f32`, and the memory that the library allocates for them.
//!
//! The library prefers outputs whose columns are contiguous. Every matrix here has contiguous rows, so each product is
//! handed over transposed: `toᵀ = bᵀ aᵀ`.

use gemm_common::Parallelism;
use gemm_common::cache::CACHE_INFO;
use gemm_common::gemm::CACHELINE_ALIGN;

/// An operand of a matmul: its elements, and the distances between its rows and between its columns.
#[derive(Clone, Copy)]
struct Operand<'a> {
    values: &'a [f32],
    row_stride: usize,
    column_stride: usize,
}

impl Operand<'_> {
    /// Whether a matrix of that many rows and columns lies within the values.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        self.values.len() > (rows - 1) * self.row_stride + (columns - 1) * self.column_stride
    }
}

/// `to (height, width) = a (height, D) · b (width, D)ᵀ`, all row-major, where D is `a.len() / height`.
pub(super) fn similarities(a: &[f32], b: &[f32], to: &mut [f32], height: usize, width: usize) {
    let dim = a.len() / height;
    let a = Operand { values: a, row_stride: dim, column_stride: 1 };
    let b = Operand { values: b, row_stride: 1, column_stride: dim };
    product((height, width, dim), a, b, to, false, 1.0);
}

/// `to (m, n) = [to +] factor · a (m, k) · b (k, n)`, where `a` has row and column strides `a_strides`, and `b` and `to`
/// are row-major.
pub(super) fn accumulate(
    (m, n, k): (usize, usize, usize),
    a: &[f32],
    a_strides: [usize; 2],
    b: &[f32],
    to: &mut [f32],
    add: bool,
    factor: f32,
) {
    let a = Operand { values: a, row_stride: a_strides[0], column_stride: a_strides[1] };
    let b = Operand { values: b, row_stride: n, column_stride: 1 };
    product((m, n, k), a, b, to, add, factor);
}

fn product((m, n, k): (usize, usize, usize), a: Operand<'_>, b: Operand<'_>, to: &mut [f32], add: bool, factor: f32) {
    assert!(m > 0 && n > 0 && k > 0 && a.holds(m, k) && b.holds(k, n) && to.len() >= m * n);
    let multiply = gemm_f32::gemm::f32::get_gemm_fn();
    // SAFETY: the assertion above bounds every element that the strides reach, and `to` is borrowed mutably, so it does
    // not overlap the operands. Transposed, `to` has n rows and m columns.
    unsafe {
        multiply(
            n,
            m,
            k,
            to.as_mut_ptr(),
            n as isize,
            1,
            add,
            b.values.as_ptr(),
            b.row_stride as isize,
            b.column_stride as isize,
            a.values.as_ptr(),
            a.row_stride as isize,
            a.column_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// Bytes that the library keeps for each thread once a matmul needed them: one buffer of the size of the processor's
/// second-level cache, whatever the matmul's shape.
pub(super) fn bytes_per_thread() -> usize {
    slab_bytes(CACHE_INFO[1].cache_bytes)
}

fn slab_bytes(second_level_cache: usize) -> usize {
    second_level_cache + CACHELINE_ALIGN
}

/// The library's largest block of rows and of columns, over all instruction sets: 4 AVX-512 registers by 6 columns.
const MAX_BLOCK_ROWS: usize = 64;
const MAX_BLOCK_COLUMNS: usize = 8;
/// Columns that the library packs at a time where it does not know the size of the third-level cache.
const COLUMNS_WITHOUT_THIRD_LEVEL: usize = 128 * MAX_BLOCK_COLUMNS;

/// Bytes that the library allocates during one product of shape (m, n, k), at most: copies of both operands in the order
/// in which its inner loop reads them.
pub(super) fn packing_bytes((m, n, k): (usize, usize, usize)) -> usize {
    packing_bytes_with((m, n, k), CACHE_INFO[2].cache_bytes)
}

fn packing_bytes_with((m, n, k): (usize, usize, usize), third_level_cache: usize) -> usize {
    let columns = if third_level_cache == 0 { COLUMNS_WITHOUT_THIRD_LEVEL } else { 0 };
    // The product is handed over transposed: its rows are our columns.
    let columns = m.next_multiple_of(MAX_BLOCK_COLUMNS).max(columns);
    let rows = n.next_multiple_of(MAX_BLOCK_ROWS);
    // The library also keeps a flag for each block of rows.
    (rows + columns) * k * size_of::<f32>() + 2 * CACHELINE_ALIGN + rows
}
