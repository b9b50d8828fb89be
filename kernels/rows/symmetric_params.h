// Arguments of symmetric.cu, mirrored by `SymmetricParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

// Results of one direction, and those of the other one at their side; null where nobody wants them.
struct SymmetricParams {
    const uint32_t* positives;  // (rows)
    // (rows)
    double* loss;
    const double* swapped_loss;
    double* probability;
    const double* swapped_probability;
    // (count) each: gradients of queries, which are candidates there, and of candidates, which are queries.
    float* d_queries;
    const float* swapped_d_candidates;
    float* d_candidates;
    const float* swapped_d_queries;
    // (1)
    double* total;
    const double* swapped_total;
    double* d_temperature;
    const double* swapped_d_temperature;
    double* d_log_temperature;
    const double* swapped_d_log_temperature;
    uint64_t rows;
    uint64_t count;  // 0 without gradients
};

static_assert(sizeof(SymmetricParams) == 17 * 8, "mirrored in params.rs");
