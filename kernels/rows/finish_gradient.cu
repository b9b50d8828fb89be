// The end of a step: gradients of a pool's candidates, and totals.
//
//   finish_gradient   dĉ = gamma Σ_s 2^max_s output_s;   cosine: dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//                     the last block: what the step comes to (totals.cuh), where the launch has it to do
//   finish_totals     that alone, where no pool has a gradient
//
// Shapes: output (splits, rows, dim), max (splits, rows), result (rows, dim), all f32; x (rows, dim) of any type.
// Method: a warp for each row, its lanes along the row. Sums run in the order of splits and, within the dot product, of a
// fixed tree: bitwise reproducible. `result` may be `output` itself where there is one split.
// Cost: reads and writes each element once or twice; bound by memory.
// Tests: tests/gpu.rs, through every result.
#include "rows/finish_gradient_params.h"
#include "rows/totals.cuh"
#include "rows/warp.cuh"

namespace {

template <typename T>
__device__ void finish_gradient(const FinishGradientParams& p) {
    const uint64_t row = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // the whole warp
    float* to = p.result + row * p.dim;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const float unit = p.inverse_norm ? p.inverse_norm[row] : 1.0f;
    float along = 0.0f, length = 0.0f;
    for (uint32_t k = lane; k < p.dim; k += WARP) {
        float sum = 0.0f;
        for (uint32_t split = 0; split < p.splits; ++split) {
            const uint64_t slot = split * p.rows + row;
            // No score at all: the split's output is 0.
            const float factor = p.max[slot] == -INFINITY ? 0.0f : exp2f(p.max[slot]);
            const float part = p.output[slot * p.dim + k];
            sum += part == 0.0f ? 0.0f : factor * part;
        }
        to[k] = p.gamma * sum;
        const float xk = widen(x[k]) * unit;
        along += p.gamma * sum * xk;
        length += xk * xk;
    }
    if (!p.inverse_norm) return;
    // The length is 1 but for rounding; by it, gradients are orthogonal to the embeddings as they are.
    length = warp_sum(length);
    along = length == 0.0f ? 0.0f : warp_sum(along) / length;
    for (uint32_t k = lane; k < p.dim; k += WARP) to[k] = (to[k] - widen(x[k]) * unit * along) * unit;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) finish_totals(const __grid_constant__ TotalsParams p) { write_totals(p); }

#define FINISH(type, element)                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        finish_gradient_##type(const __grid_constant__ FinishGradientParams p) {                              \
        if (uint64_t(blockIdx.x) * BLOCK_ROWS >= p.rows) write_totals(p.totals);                               \
        else finish_gradient<element>(p);                                                                     \
    }

FINISH(f16, __half)
FINISH(bf16, __nv_bfloat16)
FINISH(f32, float)
