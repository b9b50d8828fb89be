// Merges the partial results of splits in order, and finishes gradients.
//
//   merge_rows        lse_i = log Σ_s 2^(max_s − max) sum_s + max, moments and ranks, from units of log 2 to natural ones
//   merge_expected    O_i = Σ_s 2^(max_s − max) output_s / Σ_s 2^(max_s − max) sum_s        max = max_s max_s
//   finish_gradient   dĉ = gamma Σ_s 2^max_s output_s;   cosine: dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//
// Shapes: output (splits, rows, dim), max and sum (splits, rows), result (rows, dim), all f32; x (rows, dim) of any type.
// Method: merge_rows has a thread for each row and sums in f64; the others a warp for each row, its lanes along the row. Sums run in the order of splits and, within the dot product, of a
// fixed tree: bitwise reproducible. `result` may be `output` itself where there is one split.
// Cost: reads and writes each element once or twice; bound by memory.
// Tests: tests/gpu.rs, through every result.
#include "merge_params.h"
#include "warp.cuh"

namespace {

// 2^(max_s − max), and 1 for a split that saw no score: its sums are 0, or NaN, which shall stay.
__device__ __forceinline__ float split_factor(float split_max, float max) {
    return split_max == -INFINITY ? 1.0f : exp2f(split_max - max);
}

template <typename T>
__device__ void finish_gradient(const MergeParams& p) {
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

constexpr double LN_2 = 0.69314718055994531;

}  // namespace

extern "C" __global__ void merge_rows(const __grid_constant__ MergeRowsParams p) {
    const uint64_t row = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= p.rows) return;
    float max = -INFINITY;
    for (uint64_t split = 0; split < p.splits; ++split) max = fmaxf(max, p.max[split * p.rows + row]);
    double sum = 0.0, sum_score = 0.0, sum_z = 0.0;
    uint64_t masked = 0, above = 0, ties = 0;
    for (uint64_t split = 0; split < p.splits; ++split) {
        const uint64_t slot = split * p.rows + row;
        const float from = p.max[slot];
        // A split that saw no score sums to 0, or to NaN, which shall stay.
        const double distance = from == -INFINITY ? 0.0 : double(from) - double(max);
        const double factor = exp2(distance);
        sum += factor * p.sum[slot];
        masked += p.masked[slot];
        if (!p.sum_score) continue;
        sum_score += factor * p.sum_score[slot];
        sum_z += factor * (p.sum_z[slot] + distance * p.sum[slot]);
        above += p.above[slot];
        ties += p.ties[slot];
    }
    const bool empty = masked == p.candidates;
    p.lse[row] = empty ? -double(INFINITY) : isnan(sum) ? sum : (double(max) + log2(sum)) * LN_2;
    p.positive[row] = double(p.positive_z[row]) * LN_2;
    p.num_negatives[row] = p.candidates - masked;
    if (!p.sum_score) return;
    p.expected_score[row] = empty ? 0.0 : sum_score / sum * LN_2;
    p.entropy[row] = empty ? 0.0 : log(sum) - sum_z / sum * LN_2;
    p.ranked_above[row] = above;
    p.ranked_ties[row] = ties;
}

extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP) merge_expected(const __grid_constant__ MergeParams p) {
    const uint64_t row = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // the whole warp
    float max = -INFINITY, total = 0.0f;
    uint64_t masked = 0;
    for (uint32_t split = 0; split < p.splits; ++split) {
        max = fmaxf(max, p.max[split * p.rows + row]);
        masked += p.masked[split * p.rows + row];
    }
    for (uint32_t split = 0; split < p.splits; ++split) {
        const uint64_t slot = split * p.rows + row;
        total += split_factor(p.max[slot], max) * p.sum[slot];
    }
    for (uint32_t k = lane; k < p.dim; k += WARP) {
        float sum = 0.0f;
        for (uint32_t split = 0; split < p.splits; ++split) {
            const uint64_t slot = split * p.rows + row;
            sum += split_factor(p.max[slot], max) * p.output[slot * p.dim + k];
        }
        p.result[row * p.dim + k] = masked == p.candidates ? 0.0f : sum / total;
    }
}

#define FINISH(type, element)                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)                                            \
        finish_gradient_##type(const __grid_constant__ MergeParams p) {                                       \
        finish_gradient<element>(p);                                                                          \
    }

FINISH(f16, __half)
FINISH(bf16, __nv_bfloat16)
FINISH(f32, float)
