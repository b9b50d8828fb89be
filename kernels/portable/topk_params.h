// Arguments of the search for the best K candidates, mirrored in src/backend/cuda/params.rs.
#pragma once
#include "shared/stream_params.h"

struct TopKParams {
    StreamParams stream;
    // (splits, queries, capacity): keys of what each split found (best.cuh). In the end the first K are its best, 0 where there are
    // fewer.
    uint64_t* keys;
    uint32_t k;
    // At least K and a tile's columns.
    uint32_t capacity;
};
static_assert(sizeof(TopKParams) == sizeof(StreamParams) + 16, "mirrored in params.rs");

struct MergeTopKParams {
    const uint64_t* keys;
    // (rows, K)
    uint32_t* indices;
    float* scores;
    uint32_t rows;
    uint32_t splits;
    uint32_t k;
    uint32_t capacity;
};
static_assert(sizeof(MergeTopKParams) == 3 * 8 + 4 * 4, "mirrored in params.rs");
