// Arguments of merge.cu, mirrored by `MergeParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

// Partial results of splits: (splits, rows) each. Results: (rows). The last four of both are null but for details.
struct MergeRowsParams {
    const float* max;
    const float* sum;
    const uint32_t* masked;
    const float* sum_score;
    const float* sum_z;
    const uint32_t* above;
    const uint32_t* ties;
    const float* positive_z;  // (rows)
    double* lse;
    double* positive;
    uint64_t* num_negatives;
    double* expected_score;
    double* entropy;
    uint64_t* ranked_above;
    uint64_t* ranked_ties;
    uint64_t rows;
    uint64_t candidates;  // of all pools
    uint64_t splits;
};

static_assert(sizeof(MergeRowsParams) == 18 * 8, "mirrored in params.rs");

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
