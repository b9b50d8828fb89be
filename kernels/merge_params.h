// Arguments of merge.cu, mirrored by `MergeParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct MergeParams {
    const float* max;
    const float* sum;
    const uint32_t* masked;
    const float* output;
    float* result;
    // The rows themselves, for the cosine's chain rule.
    const void* x;
    const float* inverse_norm;  // null under dot
    uint64_t x_stride;
    uint64_t rows;
    uint64_t candidates;  // of all pools
    uint32_t dim;
    uint32_t splits;
    float gamma;  // 1 / temperature
    uint32_t padding;
};

static_assert(sizeof(MergeParams) == 10 * 8 + 4 * 4, "mirrored in params.rs");
