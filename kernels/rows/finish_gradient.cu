// The end of a step: gradients of a pool's candidates, and totals.
//
//   finish_gradient   dĉ = gamma Σ_s 2^max_s output_s;   cosine: dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//                     the last block: what the step comes to (totals.cuh), where the launch has it to do
//   finish_totals     that alone, where no pool has a gradient
//
// Shapes: output (splits, rows, dim), max (splits, rows), result (rows, dim), all f32; x (rows, dim) of any type.
// Method: 8 to 32 lanes for each row (lanes.cuh). Sums run in the order of splits and, within the dot product, of a
// fixed tree: bitwise reproducible. `result` may be `output` itself where there is one split.
// Cost: reads each output once and writes each gradient once; rows of more than 256 elements under cosine are read and written twice.
// Bound by memory.
// Tests: tests/gpu.rs, through every result.
#include "rows/finish_gradient_params.h"
#include "rows/finish_row.cuh"
#include "rows/totals.cuh"
#include "rows/warp.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void finish_gradient(const FinishGradientParams& p) {
    const Lanes lanes(p.dim);
    const uint64_t mine = lanes.row();
    const bool is_there = mine < p.rows, is_aligned = aligned<float>(p.output, p.dim);
    const uint64_t row = is_there ? mine : 0;
    const uint32_t dim = is_there ? p.dim : 0;  // lanes without a row read none: `output` may be `result`
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const bool x_is_aligned = aligned<T>(p.x, p.x_stride), to_is_aligned = aligned<float>(p.result, p.dim);
    const bool cosine = p.inverse_norm != nullptr;
    const float unit = cosine ? p.inverse_norm[row] : 1.0f;
    const FinishedRow<T> of = {x, p.result + row * p.dim, x_is_aligned, to_is_aligned, is_there && cosine, is_there, cosine, unit, p.gamma};
    finish_row(of, p.dim, lanes, [&](float (&sums)[HELD], const float (&)[HELD], uint32_t first) {
        for (uint32_t split = 0; split < p.splits; ++split) {
            const uint64_t slot = split * p.rows + row;
            add_split<T>(sums, p.max[slot], p.output + slot * p.dim, first, dim, is_aligned, lanes);
        }
    });
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) finish_totals(const __grid_constant__ TotalsParams p) { write_totals(p); }

#define FINISH(type, element)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        finish_gradient_##type(const __grid_constant__ FinishGradientParams p) {                              \
        if (uint64_t(blockIdx.x) * rows_of_block(p.dim) >= p.rows) write_totals(p.totals);                               \
        else finish_gradient<element>(p);                                                                     \
    }

FINISH(f16, __half)
FINISH(bf16, __nv_bfloat16)
FINISH(f32, float)
