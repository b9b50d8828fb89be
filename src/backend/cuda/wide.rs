//! The stream over rows of more than 256 elements on Hopper: statistics in one launch, an output by panels.
//!
//! ```text
//! for each panel of stationary rows, of streamed rows:
//!   scores once more, probabilities to the panel       wide_panel_sm90a.cu
//!   panel times streamed rows, added to the output     wide_output_sm90a.cu
//! ```

use super::driver::Grid;
use super::kernels::{Kernel, WIDE_BOUNDED, WIDE_EXPECTED, WIDE_GRADIENT, WIDE_OUTPUT, WIDE_STATISTICS};
use super::params::{ROW_TERM, StreamParams, WideParams};
use super::passes::{Pass, Step};
use super::problem::Rows;
use super::tiling::{Panel, Tiling, WIDE_X, WIDE_Y, tiles_per_split};
use crate::error::Result;

/// Rows that a block copies at a time: of the stationary ones half of what it needs, as the other block of the pair copies the other
/// half; of the streamed ones a tile of scores, or a chunk of the output's.
const X_BOX: usize = 64;
const SCORES_BOX: usize = WIDE_Y;
const OUTPUT_BOX: usize = 64;

impl Step<'_> {
    /// One launch for all tiles; two splits to a pair of blocks.
    pub(super) fn wide_statistics(
        &self,
        tiling: &Tiling,
        pairs: usize,
        [x, y]: [Rows; 2],
        params: &StreamParams,
    ) -> Result<()> {
        let x_blocks = x.rows.div_ceil(WIDE_X);
        let params = WideParams {
            y_row_terms: self.element(self.workspace.candidate_rows, params.candidate_start as usize, ROW_TERM),
            x_blocks: x_blocks as u32,
            y_tiles: y.rows.div_ceil(WIDE_Y) as u32,
            units: (x_blocks * tiling.splits / 2) as u32,
            tiles_per_unit: tiling.tiles_per_split as u32,
            ..self.wide_params([x, y], SCORES_BOX, params)?
        };
        let kernel = if params.stream.online == 0 { WIDE_BOUNDED } else { WIDE_STATISTICS };
        self.launch_pairs(kernel, tiling, pairs, &params)
    }

    /// Each panel of streamed rows adds to the output of those before.
    pub(super) fn wide_output(
        &self,
        pass: Pass,
        tiling: &Tiling,
        pairs: usize,
        panel: Panel,
        [x, y]: [Rows; 2],
        params: &StreamParams,
    ) -> Result<()> {
        let parts = &self.workspace.panel;
        let kernel = if pass == Pass::Gradient { WIDE_GRADIENT } else { WIDE_EXPECTED };
        if params.masked != 0 {
            let first = params.masked + (params.first_split as usize * x.rows * size_of::<u32>()) as u64;
            self.driver.fill(first, 0, tiling.splits * x.rows * size_of::<u32>())?;
        }
        let scores = WideParams {
            panel: self.at(parts.probabilities),
            tile_max: self.at(parts.tile_max),
            tile_sum: self.at(parts.tile_sum),
            tile_spoiled: self.at(parts.tile_spoiled),
            ..self.wide_params([x, y], SCORES_BOX, params)?
        };
        let output_map = self.map(y, OUTPUT_BOX)?;
        let (x_blocks, y_tiles) = (x.rows.div_ceil(WIDE_X), y.rows.div_ceil(WIDE_Y));
        for x_first in (0..x_blocks).step_by(panel.rows / WIDE_X) {
            let blocks = (x_blocks - x_first).min(panel.rows / WIDE_X);
            self.driver.fill(self.at(parts.references), 0, 2 * panel.rows * size_of::<u32>())?;
            for (turn, y_first) in (0..y_tiles).step_by(panel.tiles).enumerate() {
                let tiles = (y_tiles - y_first).min(panel.tiles);
                let reference = |turn: usize| self.element(parts.references, turn % 2 * panel.rows, size_of::<u32>());
                let of_each = tiles_per_split(pairs, blocks, tiles.div_ceil(2), tiles, 0);
                let scores = WideParams {
                    reference: reference(turn),
                    reference_before: reference(turn + 1),
                    x_first: x_first as u32,
                    x_blocks: blocks as u32,
                    y_first: y_first as u32,
                    y_tiles: tiles as u32,
                    units: (blocks * tiles.div_ceil(2 * of_each)) as u32,
                    tiles_per_unit: of_each as u32,
                    adds: u32::from(turn > 0),
                    ..scores
                };
                self.launch_pairs(kernel, tiling, pairs, &scores)?;
                let output = WideParams {
                    y_map: output_map,
                    units: (blocks * tiling.slices * tiling.splits) as u32,
                    tiles_per_unit: tiles.div_ceil(tiling.splits) as u32,
                    ..scores
                };
                self.launch_pairs(WIDE_OUTPUT, tiling, pairs, &output)?;
            }
        }
        Ok(())
    }

    fn map(&self, rows: Rows, box_rows: usize) -> Result<[u64; 16]> {
        self.driver.tensor_map(rows, self.problem.dim, self.problem.dtype, box_rows)
    }

    fn wide_params(&self, [x, y]: [Rows; 2], y_box: usize, stream: &StreamParams) -> Result<WideParams> {
        Ok(WideParams {
            x_map: self.map(x, X_BOX)?,
            y_map: self.map(y, y_box)?,
            stream: *stream,
            ..WideParams::default()
        })
    }

    fn launch_pairs(
        &self,
        kernel: Kernel<WideParams>,
        tiling: &Tiling,
        pairs: usize,
        params: &WideParams,
    ) -> Result<()> {
        let blocks = 2 * pairs.min(params.units as usize) as u32;
        let grid = Grid { blocks: (blocks, 1, 1), shared_bytes: tiling.shared_bytes };
        self.driver.launch(kernel, self.problem.typed(), grid, params)
    }
}
