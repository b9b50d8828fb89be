// Inverse norms of rows.
//
// The inverse norm is NaN for a row with a NaN or ∞, and under cosine for a row of length 2^63 or more: it spoils the row's
// scores, and tells the streams to take the row's elements for 0. Cosines divide a dot product by the lengths, and the
// dot product of two longer rows may overflow f32.
//
// Method: a warp for each row; lane l sums the squares of its elements in order, then a butterfly adds the lanes' sums.
// The order depends on dim and alignment alone, so results are bitwise reproducible.
// Numerics: sums in f32 and no pass to find the largest element. Nothing that matters underflows: at the shortest norm,
// 1e-12, the sum of squares is 1e-24. Where it overflows, the row is too long. Of a dot product there is no bound, so a
// second sum finds what is not finite.
#pragma once
#include "rows/warp.cuh"

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

// Whether every row of a matrix starts on 16 bytes, so that lanes load 16 bytes at a time. The choice must not differ between rows,
// or equal rows could get different sums.
template <typename T>
__device__ __forceinline__ bool aligned(const void* matrix, uint64_t stride) {
    return reinterpret_cast<uintptr_t>(matrix) % sizeof(uint4) == 0 && stride * sizeof(T) % sizeof(uint4) == 0;
}

// Of the row at `x`, by a warp.
template <typename T>
__device__ __forceinline__ float inverse_norm(const T* x, uint64_t dim, bool is_aligned, bool cosine, uint32_t lane) {
    constexpr uint32_t VECTOR = sizeof(uint4) / sizeof(T);
    SumOfSquares sum;
    uint64_t done = 0;
    if (is_aligned) {
        done = dim / VECTOR * VECTOR;
        for (uint64_t k = lane * VECTOR; k < done; k += WARP * VECTOR) {
            const uint4 packed = *reinterpret_cast<const uint4*>(x + k);
            const T* elements = reinterpret_cast<const T*>(&packed);
#pragma unroll
            for (uint32_t i = 0; i < VECTOR; ++i) sum.add(widen(elements[i]));
        }
    }
    for (uint64_t k = done + lane; k < dim; k += WARP) sum.add(widen(x[k]));
    sum.reduce();
    return sum.inverse_norm(cosine);
}
