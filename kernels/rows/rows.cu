// The first launch of a step: what is known of each row alone, for all that comes later.
//
//   prepare_rows   inverse_norm[r] = 1 / |x_r|, or 0 where |x_r| < 1e-12 (such a row has cosine 0 with everything); under dot 1;
//                  the row's terms in the passes (terms.cuh); and the table of rejected keys, cleared (key_table.cuh)
//
// Shapes: up to three sets of rows x (rows, dim), f32, f16 or bf16: matrices with `stride >= dim` elements between rows, or rows of
// one by reference. Blocks of the first set's rows come first, then those of the others, then those that clear the table.
// Cost: reads each element once, 4 flops for each; bound by memory.
// Method: 8 to 32 lanes for each row (norm.cuh).
// Tests: tests/gpu.rs against float64.

#include "rows/key_table.cuh"
#include "rows/norm.cuh"
#include "rows/terms.cuh"
#include "rows/warp.cuh"
#include "shared/fault.cuh"

namespace {

__device__ __forceinline__ void write_terms(const PrepareRowsParams& p, const RowSet& set, uint64_t row, float unit) {
    const float scale = set.scale * unit, bias = log_q_bias(set, row);
    if (!isfinite(bias)) report_fault(p.fault, FAULT_LOG_Q, set.start + row);
    set.inverse_norm[row] = unit;
    if (set.row_terms) set.row_terms[row] = {scale, bias - set.shift};
    if (set.columns) set.columns[row] = {scale, bias - set.shift, 1.0f, 1.0f};
    if (set.output_columns) set.output_columns[row] = output_column(scale, bias - set.output_shift, set.output_factor);
}

template <typename T>
__device__ __forceinline__ void prepare_rows(const PrepareRowsParams& p) {
    const Lanes lanes(p.dim);
    const uint64_t rows = rows_of_block(p.dim);
    uint64_t block = blockIdx.x;
#pragma unroll
    for (int i = 0; i < ROW_SETS; ++i) {
        const RowSet& set = p.sets[i];
        const uint64_t blocks = (set.rows + rows - 1) / rows;
        if (block < blocks) {
            const uint64_t row = block * rows + lanes.row() % rows;
            const bool is_there = row < set.rows;
            const uint64_t at = !is_there ? 0 : set.indices ? set.indices[row] : row;
            const T* x = static_cast<const T*>(set.embeddings) + at * set.stride;
            const uint32_t dim = is_there ? p.dim : 0;
            const float unit = inverse_norm(x, dim, aligned<T>(set.embeddings, set.stride), p.cosine != 0, lanes);
            if (is_there && lanes.lane == 0) write_terms(p, set, row, unit);
            return;
        }
        block -= blocks;
    }
    const uint64_t slot = block * blockDim.x + threadIdx.x;
    if (p.keys.capacity != 0 && slot <= p.keys.capacity) clear_key(p.keys, slot);
}

}  // namespace

#define PREPARE_ROWS(type, element)                                     \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)       \
        prepare_rows_##type(const __grid_constant__ PrepareRowsParams p) { \
        prepare_rows<element>(p);                                        \
    }

PREPARE_ROWS(f16, __half)
PREPARE_ROWS(bf16, __nv_bfloat16)
PREPARE_ROWS(f32, float)
