// Arguments of symmetric.cu, mirrored by `SymmetricParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct SymmetricParams {
    const uint32_t* positives;  // (rows)
    uint32_t* query_of;         // (rows), all ones before
    const float* row_weight;    // (rows); null: 1 each
    float* swapped_weight;      // (rows)
    uint64_t* fault;            // fault.cuh
    // average_rows
    double* loss;
    double* probability;
    const double* swapped_loss;
    const double* swapped_probability;
    // average
    void* values;
    const void* swapped_values;
    uint64_t rows;
    uint64_t count;
};

static_assert(sizeof(SymmetricParams) == 13 * 8, "mirrored in params.rs");
