// How a row of embeddings lies in a warp: short rows share one, so that its instructions work on several.
//
// A row has 8, 16 or 32 lanes, the fewest with which each holds at most HELD elements; the warp's other lanes have other rows, or the same
// one. Wider rows come in panels of PANEL elements. A lane's elements are vectors of 16 bytes, `count` vectors apart. So the order of a
// sum depends on dim and the type alone: a pair of rows has the same bits wherever it is scored.
#pragma once
#include "rows/rows_params.h"
#include "rows/warp.cuh"

constexpr uint32_t PANEL = HELD * WARP;
template <typename T>
constexpr uint32_t VECTOR = sizeof(uint4) / sizeof(T);

struct Lanes {
    uint32_t count;  // of a row
    uint32_t lane;   // this one's place among them
    uint32_t group;  // which of the warp's rows it has, of WARP / count

    __device__ explicit Lanes(uint32_t dim) : count(dim <= 8 * HELD ? 8 : dim <= 16 * HELD ? 16 : WARP) {
        lane = threadIdx.x % count;
        group = threadIdx.x % WARP / count;
    }

    __device__ uint32_t groups() const { return WARP / count; }

    // The row of this lane where each group of lanes has one.
    __device__ uint64_t row() const { return (uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP) * groups() + group; }

    // The column of a lane's element, in the panel that starts at `first`.
    template <typename T>
    __device__ uint32_t column(uint32_t first, uint32_t element) const {
        return first + (element / VECTOR<T> * count + lane) * VECTOR<T> + element % VECTOR<T>;
    }

    // The sum over a row's lanes, the same in each. By the whole warp.
    template <typename V>
    __device__ V sum(V value) const {
        if (count > 16) value += __shfl_xor_sync(~0u, value, 16);
        if (count > 8) value += __shfl_xor_sync(~0u, value, 8);
#pragma unroll
        for (uint32_t distance = 4; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
        return value;
    }

    // The sum over the warp's rows of what each has in this lane's place. By the whole warp.
    __device__ float sum_of_groups(float value) const {
        for (uint32_t distance = count; distance < WARP; distance *= 2) value += __shfl_xor_sync(~0u, value, distance);
        return value;
    }
};

// Rows of a block where each group of lanes has one: Grid::rows in driver.rs.
__device__ __forceinline__ uint32_t rows_of_block(uint32_t dim) { return BLOCK_ROWS * Lanes(dim).groups(); }

// Whether every row of a matrix starts on 16 bytes, so that lanes read and write 16 bytes at a time.
template <typename S>
__device__ __forceinline__ bool aligned(const void* matrix, uint64_t stride) {
    return reinterpret_cast<uintptr_t>(matrix) % sizeof(uint4) == 0 && stride * sizeof(S) % sizeof(uint4) == 0;
}

// A lane's elements of a panel of a row, 0 past the end. The row's elements are of type S, and lie in the lanes where T's do.
template <typename T, typename S>
__device__ __forceinline__ void load(float (&x)[HELD], const S* row, uint32_t first, uint32_t dim, bool is_aligned, const Lanes& lanes) {
    constexpr uint32_t PIECE = VECTOR<S>;
    static_assert(PIECE <= VECTOR<T>, "a piece is in one of T's vectors");
#pragma unroll
    for (uint32_t element = 0; element < HELD; element += PIECE) {
        const uint32_t column = lanes.column<T>(first, element);
        if (is_aligned && column + PIECE <= dim) {
            const uint4 packed = *reinterpret_cast<const uint4*>(row + column);
            const S* elements = reinterpret_cast<const S*>(&packed);
#pragma unroll
            for (uint32_t i = 0; i < PIECE; ++i) x[element + i] = widen(elements[i]);
        } else {
#pragma unroll
            for (uint32_t i = 0; i < PIECE; ++i) x[element + i] = column + i < dim ? widen(row[column + i]) : 0.0f;
        }
    }
}

// The other way, of f32 in the lanes where T's elements lie.
template <typename T>
__device__ __forceinline__ void store(float* row, const float (&x)[HELD], uint32_t first, uint32_t dim, bool is_aligned,
                                      const Lanes& lanes) {
    constexpr uint32_t PIECE = VECTOR<float>;
#pragma unroll
    for (uint32_t element = 0; element < HELD; element += PIECE) {
        const uint32_t column = lanes.column<T>(first, element);
        if (is_aligned && column + PIECE <= dim) {
            *reinterpret_cast<float4*>(row + column) = {x[element], x[element + 1], x[element + 2], x[element + 3]};
        } else {
#pragma unroll
            for (uint32_t i = 0; i < PIECE; ++i) {
                if (column + i < dim) row[column + i] = x[element + i];
            }
        }
    }
}

// sums += factor · x
__device__ __forceinline__ void add(float (&sums)[HELD], float factor, const float (&x)[HELD]) {
#pragma unroll
    for (uint32_t element = 0; element < HELD; ++element) sums[element] += factor * x[element];
}
