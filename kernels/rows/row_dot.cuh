// Dot products and similarities of single rows, by a warp: those of negatives of a row's own, and of positives beside them.
//
// Lane l sums the products of elements l, l + 32, ... in order, then a butterfly adds the lanes' sums. The order depends on dim alone
// and not on which side is the query: a pair has the same bits in the stream, in the stream back and as a positive.
#pragma once
#include "rows/warp.cuh"
#include "shared/score.cuh"

template <typename T>
__device__ __forceinline__ float row_dot(const T* a, const T* b, uint32_t dim, uint32_t lane) {
    float sum = 0.0f;
    for (uint32_t k = lane; k < dim; k += WARP) sum = fmaf(widen(a[k]), widen(b[k]), sum);
    return warp_sum(sum);
}

// The same where lanes hold the rows, 0 past the end.
template <uint32_t EACH>
__device__ __forceinline__ float held_dot(const float (&a)[EACH], const float (&b)[EACH]) {
    float sum = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < EACH; ++i) sum = fmaf(a[i], b[i], sum);
    return warp_sum(sum);
}
