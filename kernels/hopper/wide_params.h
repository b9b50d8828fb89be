// Arguments of Hopper's kernels for rows of more than 256 elements, mirrored by `WideParams` in src/backend/cuda/params.rs.
//
// The panel: probabilities (with the streamed rows' factors) of some stationary against some streamed rows, in the order in which the
// second matmul reads its operand (layout.h).
#pragma once
#include "hopper/stream_sm90a_params.h"

struct WideParams {
    TensorMap x_map;
    TensorMap y_map;
    StreamParams stream;
    // Without a panel: what candidates bring to the scores.
    const RowTerm* y_row_terms;
    char* panel;
    // (tiles, rows): of a tile's row, the power of two that its probabilities are relative to, and their sum.
    float* tile_max;
    float* tile_sum;
    // (tiles): whether the tile has a streamed row that is not finite.
    uint32_t* tile_spoiled;
    // Per row of the panel, as `ordered` says: the largest tile_max so far, and what it was before this panel.
    uint32_t* reference;
    const uint32_t* reference_before;
    // Blocks of stationary rows and tiles of streamed ones that this launch is about.
    uint32_t x_first;
    uint32_t x_blocks;
    uint32_t y_first;
    uint32_t y_tiles;
    // How tiles are cut: for scores the units of pairs of blocks and each block's tiles of a unit; for the output the splits, and the
    // tiles of each.
    uint32_t units;
    uint32_t tiles_per_unit;
    // 1: the output adds to what is there.
    uint32_t adds;
    uint32_t padding;
};

static_assert(sizeof(WideParams) == 640, "mirrored in params.rs");
