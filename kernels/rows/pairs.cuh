// Which pairs of a row and a positive a row has: those from offsets[row] to offsets[row + 1], or without offsets the pair `row`.
#pragma once
#include <cstdint>

struct PairRange {
    uint64_t first;
    uint64_t end;
};

__device__ __forceinline__ PairRange pairs_of(const int64_t* offsets, uint64_t row) {
    if (!offsets) return {row, row + 1};
    return {static_cast<uint64_t>(offsets[row]), static_cast<uint64_t>(offsets[row + 1])};
}
