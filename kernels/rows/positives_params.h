// Arguments of positives.cu, mirrored by `PlacePositivesParams` in src/backend/cuda/params.rs.
#pragma once
#include "rows/key_table_params.h"

struct PlacePositivesParams {
    // Of one pool, or of the separate positives; null in a search, which has no positives.
    const void* base;
    const uint32_t* base_indices;  // (count): its row i is row base_indices[i] at `base`; null where it is row i
    const float* base_inverse_norm;
    const uint32_t* positives;      // (pairs) indices over all pools; null for separate positives
    const int64_t* positive_offsets;  // (rows + 1): which pairs a row has; null where row i has the pair i
    const uint64_t* candidate_ids;  // (count) of the pool; null without ids, and for separate positives
    const float* candidate_log_q;   // (count) of the pool; null without log_q, and for separate positives
    // Of separate positives (pairs), null without ids; of rows of a table by row, null where a row is its id.
    const uint64_t* separate_ids;
    int64_t* pair_offsets;  // (rows + 1): a copy of positive_offsets that ascends from 0 to pairs, whatever they are; with the first pool
    // Of each pair.
    uint32_t* pair_rows;  // null without positive_offsets
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
    uint32_t pairs;
    uint32_t excluded_pairs;
    uint32_t element_bytes;
};

static_assert(sizeof(PlacePositivesParams) == 21 * 8 + 40 + 5 * 8 + 4 * 4, "mirrored in params.rs");
