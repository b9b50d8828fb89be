//! How the streams are cut: tile sizes as the kernels have them, splits, slices and shared memory. Pure arithmetic.

use super::driver::Limits;
use crate::problem::embeddings::DType;

/// Stationary rows of a block, streamed rows of a tile (`tile_stream.cuh`).
pub(super) const BLOCK_X: usize = 128;
pub(super) const BLOCK_Y: usize = 64;
const STAGES: usize = 2;
/// Bytes of a row that are copied at a time.
const CHUNK_BYTES: usize = 128;
/// Of a tile's column, what it brings to the scores (`RowTerm`), and of a pass with an output also what it brings to that and which rows
/// reject it (`Factor`, `Hits`).
const COLUMN_BYTES: usize = 8;
const OUTPUT_COLUMN_BYTES: usize = 28;
/// Of a stationary row, what an output leaves no registers for (`OutputStorage`).
const OUTPUT_ROW_BYTES: usize = 12;
/// Bound of the memory for partial outputs, unless one split alone needs more.
const MAX_PARTIAL_BYTES: usize = 256 << 20;

/// What a launch of Hopper's kernels is cut into (`statistics_sm90a.cu`, `output_sm90a.cu`): stationary rows of a block, streamed rows
/// of a tile, by chunks of a row.
const HOPPER_STATISTICS: [(usize, usize); 3] = [(256, 128); 3];
const HOPPER_OUTPUT: [(usize, usize); 3] = [(128, 128), (128, 128), (128, 64)];
/// The widest rows that they take, in chunks.
const HOPPER_CHUNKS: usize = 4;
/// What starting a unit of work costs, in tiles: the stationary rows' copy, and the first tile's matmul with nothing beside it.
const UNIT_TILES: usize = 3;
/// The same for a block of the portable kernels.
const BLOCK_TILES: usize = 2;

/// Wider rows (`wide_scores.cuh`, `wide_output_sm90a.cu`): stationary rows of a block of scores, streamed rows of a tile, output
/// columns of a block.
pub(super) const WIDE_X: usize = 256;
pub(super) const WIDE_Y: usize = 128;
const WIDE_COLUMNS: usize = 256;
/// What adding a unit's output to what memory holds costs, in tiles: twice 128 KiB at a multiprocessor's share of the L2 cache.
const WIDE_OUTPUT_TILES: usize = 4;
/// Bounds of a panel of probabilities. On 132 multiprocessors it takes 64 MiB: under 1% of the logits of 8192 queries and 10^6
/// candidates, with room for the rest of the workspace. The larger it is, the rarer is the output added to memory.
const PANEL_BYTES_PER_MULTIPROCESSOR: usize = 512 << 10;
const PANEL_ROWS: usize = 8192;

/// Kernels to launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// `stream_sm80.cu`
    Portable,
    /// Blocks take units of work in turn.
    Hopper { multiprocessors: usize },
    /// Pairs of blocks do; an output by panels of probabilities.
    Wide { pairs: usize, panel: Option<Panel> },
}

/// Pairs of rows whose probabilities are held at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Panel {
    /// Stationary rows, a multiple of [`WIDE_X`].
    pub(super) rows: usize,
    /// Tiles of streamed rows.
    pub(super) tiles: usize,
}

impl Panel {
    fn new(limits: Limits, blocks: usize, tiles: usize) -> Self {
        // Panels of one size, but for rounding.
        let even = |count: usize, most: usize| count.div_ceil(count.div_ceil(most));
        let rows = even(blocks, PANEL_ROWS / WIDE_X) * WIDE_X;
        let affordable = limits.multiprocessors * PANEL_BYTES_PER_MULTIPROCESSOR / (rows * WIDE_Y * 2);
        // A power of two: units of the usual shapes come out even.
        Panel { rows, tiles: even(tiles, 1 << affordable.max(1).ilog2()) }
    }

    /// Bytes of its 16-bit probabilities.
    pub(super) fn bytes(self) -> usize {
        self.rows * self.tiles * WIDE_Y * 2
    }
}

/// Tiles of each split of `tiles`, where `workers` take units (one of `blocks`, one split) that cost `start` tiles to begin: the
/// busiest worker has the least to do, with the fewest splits (`most` at most) among equals.
pub(super) fn tiles_per_split(workers: usize, blocks: usize, tiles: usize, most: usize, start: usize) -> usize {
    let cost = |splits: &usize| (blocks * splits).div_ceil(workers) * (tiles.div_ceil(*splits) + start);
    tiles.div_ceil((1..=most).min_by_key(cost).unwrap_or(1))
}

/// One launch of a streaming kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tiling {
    pub(super) family: Family,
    pub(super) block_x: usize,
    /// Rows of a tile.
    pub(super) block_y: usize,
    pub(super) splits: usize,
    pub(super) tiles_per_split: usize,
    /// Chunks of output columns that a block has, as in the kernel's name; 0 without an output.
    pub(super) output_chunks: usize,
    /// Slices of output columns, one block each.
    pub(super) slices: usize,
    pub(super) x_resident: bool,
    pub(super) shared_bytes: usize,
}

impl Tiling {
    /// Cuts `x_rows` stationary against `y_rows` streamed rows of `dim` elements.
    pub(super) fn new(limits: Limits, dtype: DType, dim: usize, x_rows: usize, y_rows: usize, output: bool) -> Self {
        let chunks = (dim * dtype.size()).div_ceil(CHUNK_BYTES);
        let output_chunks = if output { [1, 2, 4][chunks.min(3) - 1] } else { 0 };
        let slices = if output { chunks.div_ceil(output_chunks) } else { 1 };
        let blocks = x_rows.div_ceil(BLOCK_X) * slices;
        let tiles = y_rows.div_ceil(BLOCK_Y);
        let affordable = affordable_splits(x_rows, dim, output);
        // `SharedStorage` and `OutputStorage` in `tile_stream.cuh`. A stage holds a chunk, or a whole narrow tile for its output.
        let stage_chunks = if matches!(output_chunks, 1 | 2) { output_chunks } else { 1 };
        let (column_bytes, row_bytes) =
            if output { (OUTPUT_COLUMN_BYTES, OUTPUT_ROW_BYTES) } else { (COLUMN_BYTES, 0) };
        let storage = STAGES * BLOCK_Y * (stage_chunks * CHUNK_BYTES + column_bytes) + BLOCK_X * row_bytes;
        let resident = storage + chunks * BLOCK_X * CHUNK_BYTES;
        let x_resident = resident <= limits.shared_bytes;
        let shared_bytes = if x_resident { resident } else { storage + STAGES * BLOCK_X * CHUNK_BYTES };
        let workers = limits.multiprocessors * blocks_of_a_multiprocessor(limits, dtype, output_chunks, shared_bytes);
        let most = (4 * workers).div_ceil(blocks).min(affordable).min(tiles);
        let tiles_per_split = tiles_per_split(workers, blocks, tiles, most, BLOCK_TILES);
        Tiling {
            family: Family::Portable,
            block_x: BLOCK_X,
            block_y: BLOCK_Y,
            splits: tiles.div_ceil(tiles_per_split),
            tiles_per_split,
            output_chunks,
            slices,
            x_resident,
            shared_bytes,
        }
    }

    /// The same for Hopper's kernels; `None` if they cannot take such rows.
    pub(super) fn hopper(
        limits: Limits,
        dtype: DType,
        dim: usize,
        x_rows: usize,
        y_rows: usize,
        output: bool,
    ) -> Option<Self> {
        let chunks = (dim * dtype.size()).div_ceil(CHUNK_BYTES);
        // The copy engine's coordinates are signed 32-bit numbers, up to the end of the last tile.
        let addressable = x_rows.max(y_rows) <= i32::MAX as usize - WIDE_X;
        if !limits.hopper || dtype == DType::F32 || !addressable {
            return None;
        }
        if chunks > HOPPER_CHUNKS {
            return Some(Self::wide(limits, dim, x_rows, y_rows, output));
        }
        let width = [1, 2, 4, 4][chunks - 1];
        let (block_x, block_y) = if output { HOPPER_OUTPUT } else { HOPPER_STATISTICS }[width / 2];
        let (blocks, tiles) = (x_rows.div_ceil(block_x), y_rows.div_ceil(block_y));
        let affordable = affordable_splits(x_rows, dim, output);
        let most = (4 * limits.multiprocessors).div_ceil(blocks).min(affordable).min(tiles);
        let tiles_per_split = tiles_per_split(limits.multiprocessors, blocks, tiles, most, UNIT_TILES);
        Some(Tiling {
            family: Family::Hopper { multiprocessors: limits.multiprocessors },
            block_x,
            block_y,
            splits: tiles.div_ceil(tiles_per_split),
            tiles_per_split,
            output_chunks: width,
            slices: 1,
            x_resident: true,
            // One block has a multiprocessor for itself.
            shared_bytes: limits.shared_bytes,
        })
    }

    /// The same for rows of more elements.
    fn wide(limits: Limits, dim: usize, x_rows: usize, y_rows: usize, output: bool) -> Self {
        let pairs = (limits.multiprocessors / 2).max(1);
        let (blocks, tiles) = (x_rows.div_ceil(WIDE_X), y_rows.div_ceil(WIDE_Y));
        let panel = output.then(|| Panel::new(limits, blocks, tiles));
        let (splits, tiles_per_split) = match panel {
            // Each of a pair's blocks has a split for itself.
            None => {
                let tiles = tiles.div_ceil(2);
                let most = (4 * pairs).div_ceil(blocks).min(tiles);
                let of_each = tiles_per_split(pairs, blocks, tiles, most, UNIT_TILES);
                (2 * tiles.div_ceil(of_each), of_each)
            }
            // Of each panel's tiles.
            Some(panel) => {
                let units = panel.rows / WIDE_X * dim.div_ceil(WIDE_COLUMNS);
                let most = (2 * pairs).div_ceil(units).min(affordable_splits(x_rows, dim, true)).min(panel.tiles);
                let of_each = tiles_per_split(pairs, units, panel.tiles, most, WIDE_OUTPUT_TILES);
                (panel.tiles.div_ceil(of_each), of_each)
            }
        };
        Tiling {
            family: Family::Wide { pairs, panel },
            block_x: WIDE_X,
            block_y: WIDE_Y,
            splits,
            tiles_per_split,
            output_chunks: 0,
            slices: dim.div_ceil(WIDE_COLUMNS),
            x_resident: false,
            shared_bytes: limits.shared_bytes,
        }
    }

    /// The same in at most that many splits of `y_rows` streamed rows.
    pub(super) fn with_at_most(mut self, splits: usize, y_rows: usize) -> Self {
        let tiles = y_rows.div_ceil(self.block_y);
        self.tiles_per_split = tiles.div_ceil(self.splits.min(splits));
        self.splits = tiles.div_ceil(self.tiles_per_split);
        self
    }

    pub(super) fn is_hopper(&self) -> bool {
        self.family != Family::Portable
    }

    /// Whether the kernel with an output can do with a constant in place of the running maximum.
    pub(super) fn is_bounded(&self) -> bool {
        !matches!(self.family, Family::Wide { .. })
    }

    pub(super) fn panel(&self) -> Option<Panel> {
        match self.family {
            Family::Wide { panel, .. } => panel,
            _ => None,
        }
    }

    pub(super) fn blocks(&self, x_rows: usize) -> (u32, u32, u32) {
        let blocks = x_rows.div_ceil(self.block_x);
        match self.family {
            Family::Portable => (blocks as u32, self.splits as u32, self.slices as u32),
            Family::Hopper { multiprocessors } => ((blocks * self.splits).min(multiprocessors) as u32, 1, 1),
            Family::Wide { pairs, .. } => (2 * (blocks * self.splits / 2).min(pairs) as u32, 1, 1),
        }
    }
}

/// Blocks of a portable stream that a multiprocessor holds at a time, by shared memory and by the registers that `stream_sm80.cu` gives
/// each (its `__launch_bounds__`). What else takes registers counts as one block.
fn blocks_of_a_multiprocessor(limits: Limits, dtype: DType, output_chunks: usize, shared_bytes: usize) -> usize {
    // A multiprocessor has what one block may have and the kibibyte that the system takes of each.
    const RESERVED: usize = 1024;
    let most = if dtype == DType::F32 { [2, 2, 1, 1, 1] } else { [3, 3, 2, 1, 1] }[output_chunks];
    ((limits.shared_bytes + RESERVED) / (shared_bytes + RESERVED)).clamp(1, most)
}

/// Splits whose partial outputs fit in the memory for them.
fn affordable_splits(x_rows: usize, dim: usize, output: bool) -> usize {
    if output { (MAX_PARTIAL_BYTES / (x_rows * dim * size_of::<f32>())).max(1) } else { usize::MAX }
}

/// A constant in place of the running maximum, where `low <= z <= high` (units of log 2) for all of `count` scores:
/// sums of `2^(z − shift)` neither overflow nor lose terms that matter. `None` if the range is too wide.
pub(super) fn static_shift(low: f64, high: f64, count: usize) -> Option<f32> {
    const RANGE: f64 = 250.0;
    let headroom = (count as f64).log2();
    // As far below overflow as the smallest term is above underflow.
    (high - low + headroom <= RANGE).then_some(((low + high + headroom) / 2.0) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { multiprocessors: 132, shared_bytes: 232_448, hopper: true };

    #[test]
    fn splits_cover_every_tile_once() {
        for y_rows in [1, 63, 64, 65, 1000, 100_000, 10_000_000] {
            for x_rows in [1, 128, 129, 8192] {
                for output in [false, true] {
                    let portable = Tiling::new(LIMITS, DType::F16, 128, x_rows, y_rows, output);
                    let hopper = Tiling::hopper(LIMITS, DType::F16, 128, x_rows, y_rows, output);
                    for tiling in [portable, hopper.expect("128 elements of 16 bits")] {
                        let tiles = y_rows.div_ceil(tiling.block_y);
                        assert!(tiling.splits * tiling.tiles_per_split >= tiles);
                        assert!((tiling.splits - 1) * tiling.tiles_per_split < tiles, "no split is empty");
                        assert!(tiling.splits <= 65_535, "a grid's limit");
                    }
                }
            }
        }
    }

    #[test]
    fn outputs_cover_every_column_and_shared_memory_fits() {
        for dtype in [DType::F16, DType::F32] {
            for dim in [1, 31, 32, 33, 64, 65, 128, 129, 256, 257, 1024, 2048, 5000] {
                for shared_bytes in [101_376, 166_912, 232_448] {
                    let limits = Limits { shared_bytes, ..LIMITS };
                    let tiling = Tiling::new(limits, dtype, dim, 8192, 1000, true);
                    let columns = tiling.output_chunks * CHUNK_BYTES / dtype.size();
                    assert!(tiling.slices * columns >= dim && (tiling.slices - 1) * columns < dim);
                    assert!(tiling.shared_bytes <= shared_bytes);
                }
            }
        }
    }

    #[test]
    fn a_wave_of_portable_blocks_is_nearly_full() {
        // Of an A100.
        let limits = Limits { multiprocessors: 108, shared_bytes: 166_912, hopper: false };
        for (dim, output, held) in
            [(64, false, 3), (128, false, 3), (256, false, 2), (64, true, 3), (128, true, 2), (256, true, 1)]
        {
            let tiling = Tiling::new(limits, DType::F16, dim, 8192, 1_000_000, output);
            let (blocks, wave) = (8192 / BLOCK_X * tiling.splits, held * limits.multiprocessors);
            let waves = blocks.div_ceil(wave);
            assert!(100 * blocks >= 94 * waves * wave, "{dim}: {blocks} blocks in {waves} waves of {wave}");
        }
    }

    #[test]
    fn wide_rows_are_cut_into_pairs_and_panels() {
        for y_rows in [1, 128, 129, 100_000, 10_000_000] {
            for x_rows in [1, 256, 257, 8192, 65_536, 1_000_000] {
                let cut = |output| Tiling::hopper(LIMITS, DType::Bf16, 512, x_rows, y_rows, output).expect("16 bits");
                let (statistics, output, tiles) = (cut(false), cut(true), y_rows.div_ceil(WIDE_Y));
                assert!(statistics.splits.is_multiple_of(2) && statistics.splits * statistics.tiles_per_split >= tiles);
                let panel = output.panel().expect("an output has panels");
                assert!(
                    panel.bytes() <= 132 * PANEL_BYTES_PER_MULTIPROCESSOR
                        && panel.rows <= PANEL_ROWS
                        && panel.rows.is_multiple_of(WIDE_X)
                );
                assert!(output.splits <= panel.tiles && output.splits * output.tiles_per_split >= panel.tiles);
            }
        }
        // The shape of the benchmarks: a wave of units, none split.
        let output = Tiling::hopper(LIMITS, DType::Bf16, 512, 8192, 1_000_000, true).expect("16 bits");
        assert_eq!((output.splits, output.panel()), (1, Some(Panel { rows: 8192, tiles: 32 })));
    }

    #[test]
    fn rows_past_the_copy_engine_s_coordinates_stay_on_the_portable_kernels() {
        for dim in [8, 512] {
            let cut = |x_rows, y_rows| Tiling::hopper(LIMITS, DType::F16, dim, x_rows, y_rows, false).is_some();
            let most = (1 << 31) - 1 - WIDE_X;
            assert!(cut(256, most) && cut(most, 256));
            assert!(!cut(256, most + 1) && !cut(most + 1, 256), "the last tile would end past 2^31 - 1");
        }
    }

    #[test]
    fn a_static_shift_keeps_sums_in_range() {
        let (low, high, count) = (-60.0, 100.0, 1 << 20);
        let shift = f64::from(static_shift(low, high, count).expect("180 bits"));
        assert!(high - shift + 20.0 < 127.0 && low - shift > -126.0);
        assert_eq!(static_shift(-120.0, 120.0, 1 << 20), None);
    }
}
