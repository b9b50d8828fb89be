// Work on single rows, beside the streams.
//
// row_inverse_norms: inverse_norm[r] = 1 / |x_r|, or 0 where |x_r| < 1e-12 (such a row has cosine 0 with everything);
// under dot 1. NaN for a row with a NaN or ∞, and under cosine for a row of length 2^63 or more: it spoils the row's
// scores, and tells the streams to take the row's elements for 0. Cosines divide a dot product by the lengths, and the
// dot product of two longer rows may overflow f32.
//
// Shapes: x (rows, dim) with `stride >= dim` elements between rows; f32, f16 or bf16. inverse_norm (rows), f32.
// Cost: reads each element once, 4 flops for each; bound by memory.
// Method: a warp for each row; lane l sums the squares of its elements in order, then a butterfly adds the lanes' sums.
// The order depends on dim and alignment alone, so results are bitwise reproducible.
// Numerics: sums in f32 and no pass to find the largest element. Nothing that matters underflows: at the shortest norm,
// 1e-12, the sum of squares is 1e-24. Where it overflows, the row is too long. Of a dot product there is no bound, so a
// second sum finds what is not finite.
// Tests: tests/gpu.rs against float64.

#include "params.h"
#include "warp.cuh"

namespace {

constexpr float MIN_NORM = 1e-12f;
// Dot products of shorter rows are below 2^126, and so is every sum on the way to them; their inverses are not
// denormal.
constexpr float MAX_NORM = 0x1p63f;

struct SumOfSquares {
    float squares = 0.0f;
    float zero = 0.0f;  // of x · 0: NaN if an element is not finite

    __device__ void add(float x) {
        squares = fmaf(x, x, squares);
        zero = fmaf(x, 0.0f, zero);
    }

    // The sum over the warp, the same in every lane.
    __device__ void reduce() {
        squares = warp_sum(squares);
        zero = warp_sum(zero);
    }

    __device__ float inverse_norm(bool cosine) const {
        if (isnan(zero)) return NAN;
        if (!cosine) return 1.0f;
        const float norm = sqrtf(squares);
        if (!(norm < MAX_NORM)) return NAN;
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
