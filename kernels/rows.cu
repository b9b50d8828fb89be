// Work on single rows, beside the streams.
//
// row_inverse_norms: inverse_norm[r] = 1 / |x_r|, or 0 where |x_r| < 1e-12 (such a row has cosine 0 with everything); under dot 1.
// NaN for a row with a NaN or ∞: it spoils the row's scores, and tells the streams to take the row's elements for 0.
//
// Shapes: x (rows, dim) with `stride >= dim` elements between rows; f32, f16 or bf16. inverse_norm (rows), f32.
// Cost: reads each element once, 4 flops for each; bound by memory.
// Method: a warp for each row; lane l sums the squares of its elements in order, then a butterfly adds the lanes' sums.
// The order depends on dim and alignment alone, so results are bitwise reproducible.
// Numerics: sums in f32 and no pass to find the largest element. Squares of elements up to 2^127 overflow f32, so a
// second sum takes the squares of x * 2^-96, and serves where the first is not finite; what underflows in it is then
// less than 2^-60 of it. Nothing that matters underflows in the first: at the shortest norm, 1e-12, it is 1e-24.
// Tests: tests/gpu.rs against float64.

#include "params.h"
#include "warp.cuh"

namespace {

constexpr float MIN_NORM = 1e-12f;
constexpr float SHRINK = 0x1p-96f;

struct SumOfSquares {
    float plain = 0.0f;
    float shrunk = 0.0f;  // of x * SHRINK

    __device__ void add(float x) {
        plain = fmaf(x, x, plain);
        const float small = x * SHRINK;
        shrunk = fmaf(small, small, shrunk);
    }

    // The sum over the warp, the same in every lane.
    __device__ void reduce() {
        plain = warp_sum(plain);
        shrunk = warp_sum(shrunk);
    }

    __device__ float inverse_norm(bool cosine) const {
        // Not even the second sum is finite: an element is not.
        if (!isfinite(shrunk)) return NAN;
        if (!cosine) return 1.0f;
        if (!isfinite(plain)) return SHRINK / sqrtf(shrunk);
        const float norm = sqrtf(plain);
        return norm < MIN_NORM ? 0.0f : 1.0f / norm;
    }
};

template <typename T>
__device__ void row_inverse_norms(const RowInverseNormsParams& p) {
    constexpr uint32_t VECTOR = sizeof(uint4) / sizeof(T);
    const uint64_t row = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // the whole warp
    const T* x = static_cast<const T*>(p.embeddings) + row * p.stride;

    SumOfSquares sum;
    uint64_t done = 0;
    // Where every row starts on 16 bytes, lanes load 16 bytes at a time. The choice must not differ between rows, or
    // equal rows could get different sums.
    const bool aligned = reinterpret_cast<uintptr_t>(p.embeddings) % sizeof(uint4) == 0 && p.stride % VECTOR == 0;
    if (aligned) {
        done = p.dim / VECTOR * VECTOR;
        for (uint64_t k = lane * VECTOR; k < done; k += WARP * VECTOR) {
            const uint4 packed = *reinterpret_cast<const uint4*>(x + k);
            const T* elements = reinterpret_cast<const T*>(&packed);
#pragma unroll
            for (uint32_t i = 0; i < VECTOR; ++i) sum.add(widen(elements[i]));
        }
    }
    for (uint64_t k = done + lane; k < p.dim; k += WARP) sum.add(widen(x[k]));

    sum.reduce();
    if (lane == 0) p.inverse_norm[row] = sum.inverse_norm(p.cosine != 0);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)
    row_inverse_norms_f32(const __grid_constant__ RowInverseNormsParams p) {
    row_inverse_norms<float>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)
    row_inverse_norms_f16(const __grid_constant__ RowInverseNormsParams p) {
    row_inverse_norms<__half>(p);
}

extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)
    row_inverse_norms_bf16(const __grid_constant__ RowInverseNormsParams p) {
    row_inverse_norms<__nv_bfloat16>(p);
}
