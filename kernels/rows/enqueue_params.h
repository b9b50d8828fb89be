// Arguments of enqueue.cu, mirrored by `EnqueueParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct EnqueueParams {
    const void* from;        // first row to copy
    void* to;                // its place; rows are contiguous there
    const uint64_t* ids;     // (rows), null where the queue keeps none
    uint64_t* to_ids;        // (rows)
    const float* log_q;      // (rows), null where the queue keeps none
    float* to_log_q;         // (rows)
    uint64_t rows;
    uint64_t stride;         // bytes between the starts of rows at `from`
    uint64_t row_bytes;
    uint64_t unit;           // 16, 4 or 2 bytes: divides both addresses, `stride` and `row_bytes`
};

static_assert(sizeof(EnqueueParams) == 10 * 8, "mirrored in params.rs");
