//! How the CPU backend cuts a problem into blocks, tiles and splits, and an upper bound of the memory that a step takes.
//!
//! The cut depends on the problem alone, so that results do not depend on the machine or on the number of threads. The
//! memory depends on the number of threads, too, because each has buffers.

use super::candidates::LoadedTile;
use super::kernels::Place;
use super::masks::Masks;
use super::matmul::PANEL;
use super::pairs::PairData;
use super::table::TableScratch;
use super::tile::{CHUNK, Scratch};
use super::units::Units;
use super::uses::TableUses;
use super::{OWN_ROWS_PER_UNIT, rows_per_task};
use crate::problem::batch::Batch;
use crate::problem::plan::Plan;
use crate::problem::score_matrix::ScoreMatrix;
use crate::problem::statistics::{Partial, Request};

/// Queries in a block of the stream: at most, and at least but in the last block. A tile of candidates is loaded once for a
/// block, so large blocks load less, and small ones give more threads something to do.
const BLOCK_B: usize = 22 * CHUNK;
const MIN_BLOCK_B: usize = 256;
/// Queries in a block of the stream back. With `BLOCK_N` candidates a tile of coefficients is 256 KiB, which the second-level
/// caches of today's processors (512 KiB and more) hold beside its operands.
pub(super) const BACK_ROWS: usize = 256;
/// Candidates in a tile; fewer where rows are wide.
const BLOCK_N: usize = 256;
const MIN_BLOCK_N: usize = 96;
/// Units of work to aim at, so that machines with many cores have something to do. Not the number of threads: results
/// must not depend on it.
const UNITS: usize = 64;
/// Bound of the memory for partial expected negatives, unless one split alone needs more.
const MAX_PARTIAL_BYTES: usize = 16 << 20;
/// What a unit of work takes in the list of them: three slices, a range and a number, rounded up.
const UNIT_BYTES: usize = 128;

/// The cut of one score matrix.
pub(super) struct Cut {
    pub(super) block_b: usize,
    pub(super) block_n: usize,
    /// Tiles of candidates in all pools; a tile does not cross pools.
    pub(super) tiles: usize,
    /// Blocks of queries.
    pub(super) blocks: usize,
}

impl Cut {
    pub(super) fn new(matrix: &ScoreMatrix<'_>) -> Self {
        let (b, block_n) = (matrix.num_queries(), tile_width(matrix.dim()));
        let tiles: usize = (0..matrix.pools.len()).map(|pool| matrix.candidates(pool).len().div_ceil(block_n)).sum();
        // As many blocks as make up for the units that the tiles cannot give.
        let blocks = UNITS.div_ceil(tiles.max(1)).min(b / MIN_BLOCK_B).max(b.div_ceil(BLOCK_B));
        let block_b = b.div_ceil(blocks).next_multiple_of(CHUNK).min(b);
        Cut { block_b, block_n, tiles, blocks: b.div_ceil(block_b) }
    }

    /// Bytes that hold the units of work and each thread's buffers. Both passes of a step and a search have tiles of this
    /// shape.
    pub(super) fn scratch_bytes(&self, matrix: &ScoreMatrix<'_>, splits: usize, gradients: bool) -> usize {
        let (dim, dtype) = (matrix.dim(), matrix.dtype());
        let tile = match self.tiles {
            0 => LoadedTile::bytes_of_own(self.block_n, dim),
            _ => LoadedTile::bytes(self.block_n, dim, dtype, gradients),
        };
        let per_thread = Scratch::bytes(self.block_b, self.block_n, dim, dtype, gradients) + tile;
        per_thread * rayon::current_num_threads() + splits * self.blocks * UNIT_BYTES
    }
}

/// Candidates in a tile of embeddings of `dim` elements.
fn tile_width(dim: usize) -> usize {
    (BLOCK_N * 256 / dim.max(256)).next_multiple_of(PANEL).max(MIN_BLOCK_N)
}

/// Parts into which a row's negatives are cut: the splits of the pools, and the row's own.
pub(super) fn parts(batch: &Batch<'_>, plan: &Plan) -> usize {
    plan.splits + usize::from(batch.matrix.row_negatives.is_some())
}

/// Units of work of the streaming pass: a block of queries in each split, and tasks of queries with negatives of their
/// own.
pub(super) fn units(batch: &Batch<'_>, plan: &Plan) -> usize {
    let b = batch.num_queries();
    plan.splits * b.div_ceil(plan.block_b) + (parts(batch, plan) - plan.splits) * b.div_ceil(OWN_ROWS_PER_UNIT)
}

/// The plan of both passes. Its bytes are an upper bound on every processor, but for the few KiB of rayon's own queues.
pub(super) fn plan(batch: &Batch<'_>, symmetric: bool, request: Request) -> Plan {
    let matrix = &batch.matrix;
    let (b, pairs, dim) = (matrix.num_queries(), batch.num_positives(), matrix.dim());
    let cut = Cut::new(matrix);
    let row_bytes = b * dim * size_of::<f32>();
    let splits = UNITS.div_ceil(cut.blocks).min((MAX_PARTIAL_BYTES / row_bytes).max(1)).min(cut.tiles);
    let mut plan = Plan { block_b: cut.block_b, block_n: cut.block_n, splits, workspace_bytes: 0 };
    let parts = parts(batch, &plan);
    let expected = if request.gradients { b * dim * size_of::<f32>() } else { 0 };
    let places = if request.rank { pairs * size_of::<Place>() } else { 0 };
    let partials = parts * (b * size_of::<Partial>() + expected + places);
    // Merged partials; lse and coefficients of the stream back; the epilogue's derivatives by lse and by positives.
    let per_row = b * (size_of::<Partial>() + size_of::<f64>() + 2 * size_of::<f32>()) + pairs * size_of::<f64>();
    let packed = if request.gradients { Units::packed_bytes(b, dim, batch.dtype()) } else { 0 };
    let sides = Units::bytes(b, dim, batch.dtype()) + packed + PairData::bytes(batch);
    let other = if symmetric { other_direction_bytes(b, dim, request) } else { 0 };
    plan.workspace_bytes = Masks::bytes(matrix, pairs)
        + sides
        + per_row
        + partials
        + cut.scratch_bytes(matrix, splits, request.gradients)
        + units(batch, &plan) * UNIT_BYTES
        + table_bytes(batch, &cut, request)
        + other;
    plan
}

/// What the gradient of a table and negatives of a row's own take: lists of who names which row, each thread's stretch of
/// rows and its list of one row's negatives, the stretches themselves, a stretch that is added to the caller's gradients,
/// and a row-sparse gradient before it is added to the caller's.
fn table_bytes(batch: &Batch<'_>, cut: &Cut, request: Request) -> usize {
    let dim = batch.dim();
    let spare = if request.accumulate { cut.block_n.max(rows_per_task(dim)) * dim * size_of::<f32>() } else { 0 };
    let threads = rayon::current_num_threads();
    let Some(table) = &batch.matrix.table else { return threads * spare };
    let own = batch.matrix.row_negatives.map_or(0, |negatives| 2 * negatives.per_row * size_of::<u32>());
    let stretches = table.shape.rows.div_ceil(cut.block_n) * UNIT_BYTES;
    let back = if request.gradients { TableUses::bytes(batch) + stretches } else { 0 };
    let added = if request.accumulate && request.row_sparse { TableUses::gradient_bytes(batch) } else { 0 };
    let stretch = if request.gradients { TableScratch::bytes(cut.block_n, dim, batch.dtype()) } else { 0 };
    threads * (spare + own + stretch) + back + added
}

/// What a symmetric loss keeps beside the output: the swapped batch's indices and weights, twice while they are checked,
/// and the output of the other direction, where B queries meet B candidates.
fn other_direction_bytes(b: usize, dim: usize, request: Request) -> usize {
    let swapped = 2 * b * (size_of::<u32>() + size_of::<f32>());
    let per_row = b * 5 * size_of::<f64>();
    // Expected negatives and the gradients of both sides.
    let matrices = if request.gradients { 3 * b * dim * size_of::<f32>() } else { 0 };
    swapped + per_row + matrices
}
