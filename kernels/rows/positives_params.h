// Arguments of positives.cu, mirrored by `PlacePositivesParams` in src/backend/cuda/params.rs.
#pragma once
#include "rows/key_table_params.h"

struct PlacePositivesParams {
    // Of one pool, or of the separate positives; null in a search, which has no positives.
    const void* base;
    const float* base_inverse_norm;
    const uint32_t* positives;      // (rows) indices over all pools; null for separate positives
    const uint64_t* candidate_ids;  // (count) of the pool; null without ids, and for separate positives
    const float* candidate_log_q;   // (count) of the pool; null without log_q, and for separate positives
    const uint64_t* separate_ids;   // (rows) of separate positives; null without ids
    // Of each row's positive.
    const void** addresses;
    float* inverse_norm;
    ColumnTerm* terms;
    uint64_t* positive_ids;  // null without ids
    float* positive_log_q;   // null without log_q
    // Pairs beside the positives', and all rows' numbers: with the first pool, else null.
    const int64_t* exclude_offsets;  // (rows + 1)
    const uint64_t* exclude_ids;
    const float* row_weight;  // (rows); null: 1 each
    double* weight_sums;      // of each block of rows; null where nobody wants them
    // A symmetric loss. The first direction writes where each candidate's query is; it held all ones before. In the second one,
    // where queries are candidates, `positives` is that array, and each row's weight is that of its query.
    uint32_t* query_of;
    float* swapped_weight;
    KeyTable keys;    // of capacity 0 where nothing is masked
    uint64_t* fault;  // fault.cuh
    uint64_t stride;  // of base, elements
    uint64_t start;   // index over all pools of the pool's first candidate
    uint64_t count;   // its candidates
    uint64_t candidates;  // of all pools
    uint32_t rows;
    uint32_t excluded_pairs;
    uint32_t element_bytes;
    uint32_t padding;
};

static_assert(sizeof(PlacePositivesParams) == 17 * 8 + 40 + 5 * 8 + 4 * 4, "mirrored in params.rs");
