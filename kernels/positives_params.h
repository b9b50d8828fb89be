// Arguments of positives.cu, mirrored by `PositivesParams` in src/backend/cuda/params.rs.
#pragma once
#include "stream_params.h"

struct PositivesParams {
    // gather_positives: one pool, or the separate positives.
    const void* base;
    const uint32_t* positives;  // (rows) indices over all pools; null for separate positives
    const float* base_inverse_norm;  // as in terms_params.h
    const uint64_t* candidate_ids;   // (count) of the pool; null without ids, and for separate positives
    const float* candidate_log_q;    // (count) of the pool; null without log_q, and for separate positives
    uint64_t* positive_ids;          // (rows); null without ids
    float* positive_log_q;           // (rows); null without log_q
    uint64_t* fault;                 // fault.cuh
    // Of each row's positive; written by gather_positives, read by query_gradient.
    const void** addresses;
    float* positive_inverse_norm;
    ColumnTerm* terms;
    // query_gradient
    const void* queries;
    const float* query_inverse_norm;  // null under dot
    const float* expected_negative;  // (rows, dim)
    const double* d_lse;
    const double* d_positive;
    float* d_queries;              // (rows, dim)
    float* d_positive_embeddings;  // (rows, dim); null where positives are candidates
    double* d_gamma;               // (rows)
    uint64_t stride;        // of base, elements
    uint64_t query_stride;
    uint64_t start;         // index over all pools of the pool's first candidate
    uint64_t count;         // its candidates
    uint64_t candidates;    // of all pools
    uint32_t rows;
    uint32_t dim;
    uint32_t element_bytes;
    float gamma;
};

static_assert(sizeof(PositivesParams) == 24 * 8 + 4 * 4, "mirrored in params.rs");
