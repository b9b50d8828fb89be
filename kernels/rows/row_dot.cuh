// Dot products of single rows: those of negatives of a row's own, and of positives beside them.
//
// Each of a row's lanes sums the products of its elements in order, then a butterfly adds the lanes' sums (lanes.cuh). The order does not
// depend on which side is the query: a pair has the same bits in the stream, in the stream back and as a positive.
#pragma once
#include "rows/lanes.cuh"
#include "shared/score.cuh"

// A lane's sum with the products of one more panel.
__device__ __forceinline__ float add_products(float sum, const float (&a)[HELD], const float (&b)[HELD]) {
#pragma unroll
    for (uint32_t element = 0; element < HELD; ++element) sum = fmaf(a[element], b[element], sum);
    return sum;
}

// The same in each of the row's lanes. By the whole warp.
template <typename T>
__device__ __forceinline__ float row_dot(const T* a, const T* b, uint32_t dim, bool are_aligned, const Lanes& lanes) {
    float sum = 0.0f;
    for (uint32_t first = 0; first < dim; first += PANEL) {
        float x[HELD], y[HELD];
        load<T>(x, a, first, dim, are_aligned, lanes);
        load<T>(y, b, first, dim, are_aligned, lanes);
        sum = add_products(sum, x, y);
    }
    return lanes.sum(sum);
}
