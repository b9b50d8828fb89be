// Inverse norms of rows.
//
// The inverse norm is NaN for a row with a NaN or ∞, and under cosine for a row of length 2^63 or more: it spoils the row's
// scores, and tells the streams to take the row's elements for 0. Cosines divide a dot product by the lengths, and the
// dot product of two longer rows may overflow f32.
//
// Method: each of a row's lanes sums the squares of its elements in order, then a butterfly adds the lanes' sums (lanes.cuh).
// Numerics: sums in f32 and no pass to find the largest element. Nothing that matters underflows: at the shortest norm,
// 1e-12, the sum of squares is 1e-24. Where it overflows, the row is too long. Of a dot product there is no bound, so a
// second sum finds what is not finite.
#pragma once
#include "rows/lanes.cuh"

constexpr float MIN_NORM = 1e-12f;
// Dot products of shorter rows are below 2^126, and so is every sum on the way to them; their inverses are not
// denormal.
constexpr float MAX_NORM = 0x1p63f;

struct SumOfSquares {
    float squares = 0.0f;
    float zero = 0.0f;  // of x · 0: NaN if an element is not finite

    __device__ void add(const float (&x)[HELD]) {
#pragma unroll
        for (uint32_t element = 0; element < HELD; ++element) {
            squares = fmaf(x[element], x[element], squares);
            zero = fmaf(x[element], 0.0f, zero);
        }
    }

    // Of the row, the same in each of its lanes. By the whole warp.
    __device__ float inverse_norm(bool cosine, const Lanes& lanes) const {
        const bool is_finite = !isnan(lanes.sum(zero));
        const float norm = sqrtf(cosine ? lanes.sum(squares) : 1.0f);
        if (!is_finite) return NAN;
        if (!cosine) return 1.0f;
        if (!(norm < MAX_NORM)) return NAN;
        return norm < MIN_NORM ? 0.0f : 1.0f / norm;
    }
};

// Of the row at `x`.
template <typename T>
__device__ __forceinline__ float inverse_norm(const T* x, uint32_t dim, bool is_aligned, bool cosine, const Lanes& lanes) {
    SumOfSquares sum;
    for (uint32_t first = 0; first < dim; first += PANEL) {
        float held[HELD];
        load<T>(held, x, first, dim, is_aligned, lanes);
        sum.add(held);
    }
    return sum.inverse_norm(cosine, lanes);
}
