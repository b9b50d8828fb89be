// What ends the gradient of a row: the factor gamma, and under cosine the chain rule.
//
//   dot: dc = gamma · sum;   cosine: dĉ = gamma · sum, dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//
// Method: a panel of the sum at a time (lanes.cuh). A row of one panel keeps it in registers, a wider one where the gradient goes.
#pragma once
#include "rows/lanes.cuh"

template <typename T>
struct FinishedRow {
    const T* x;        // the row as it is
    float* to;
    bool x_is_aligned;
    bool to_is_aligned;
    bool is_read;      // else x is taken for 0: the lanes have no row, or the chain rule is not asked for
    bool is_written;   // else other lanes have the same row and write it
    bool cosine;
    float unit;        // inverse norm
    float gamma;
};

// By the whole warp. `add(sums, x, first)` adds to a lane's elements of the panel from `first` on, given the row's. `to` may be where `add`
// reads: a lane reads the elements that it writes, and writes a panel after it has been read.
template <typename T, typename Add>
__device__ __forceinline__ void finish_row(const FinishedRow<T>& row, uint32_t dim, const Lanes& lanes, const Add& add) {
    const uint32_t read = row.is_read ? dim : 0, written = row.is_written ? dim : 0;
    const bool is_held = dim <= PANEL;
    float x[HELD], sums[HELD];
    float along = 0.0f, length = 0.0f;
    for (uint32_t first = 0; first < dim; first += PANEL) {
#pragma unroll
        for (uint32_t element = 0; element < HELD; ++element) sums[element] = 0.0f;
        load<T>(x, row.x, first, read, row.x_is_aligned, lanes);
        add(sums, x, first);
#pragma unroll
        for (uint32_t element = 0; element < HELD; ++element) {
            if (lanes.column<T>(first, element) >= dim) continue;
            const float of_unit = x[element] * row.unit;
            sums[element] *= row.gamma;
            along += sums[element] * of_unit;
            length += of_unit * of_unit;
        }
        if (!is_held) store<T>(row.to, sums, first, written, row.to_is_aligned, lanes);
    }
    // The length is 1 but for rounding; by it, gradients are orthogonal to the embeddings as they are.
    length = lanes.sum(length);
    along = lanes.sum(along);
    along = length == 0.0f ? 0.0f : along / length;
    if (!is_held && !row.cosine) return;
    for (uint32_t first = 0; first < dim; first += PANEL) {
        if (!is_held) {
            load<T>(x, row.x, first, read, row.x_is_aligned, lanes);
            load<T>(sums, row.to, first, read, row.to_is_aligned, lanes);
        }
#pragma unroll
        for (uint32_t element = 0; element < HELD; ++element) {
            if (row.cosine) sums[element] = (sums[element] - x[element] * row.unit * along) * row.unit;
        }
        store<T>(row.to, sums, first, written, row.to_is_aligned, lanes);
    }
}

// sums += 2^max · output, a split's share; 0 where the split has no score.
template <typename T>
__device__ __forceinline__ void add_split(float (&sums)[HELD], float max, const float* output, uint32_t first, uint32_t dim,
                                          bool is_aligned, const Lanes& lanes) {
    const float factor = max == -INFINITY ? 0.0f : exp2f(max);
    float part[HELD];
    load<T>(part, output, first, dim, is_aligned, lanes);
#pragma unroll
    for (uint32_t element = 0; element < HELD; ++element) sums[element] += part[element] == 0.0f ? 0.0f : factor * part[element];
}
