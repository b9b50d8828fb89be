// What is known about negatives of rows' own, for own_negatives.cu and finish_table.cu; mirrored in src/backend/cuda/params.rs.
#pragma once
#include "rows/key_table_params.h"

// The index that stands for no negative.
constexpr uint32_t NO_NEGATIVE = ~0u;

struct OwnNegatives {
    const uint32_t* rows;       // (queries, per_row): rows of the table
    const float* log_q;         // (queries, per_row); null without a correction
    const float* bounds;        // (queries): greater similarities in units of log 2 are no negatives; null where nothing is filtered
    const void* queries;        // (queries, dim)
    const float* query_norms;   // (queries): inverse norms
    const void* table;          // (table rows, dim)
    const uint64_t* table_ids;  // (table rows); null where an item is its row
    KeyTable keys;              // of capacity 0 where nothing is masked
    uint64_t query_stride;      // elements
    uint64_t table_stride;
    uint32_t per_row;  // 0: none
    uint32_t dim;
    uint32_t cosine;
    float scale;  // log2(e) / temperature
};

// Of own_negatives.cu: one more split of the streams' partial results.
struct OwnNegativesParams {
    OwnNegatives own;
    const float* own_z;               // (pairs): the positives' similarities by the same sums; null where nobody ranks
    const int64_t* positive_offsets;  // (queries + 1): which pairs a row has; null where row i has the pair i
    // Results, (splits, queries) each; null where nobody wants them. Above and ties are (splits, pairs).
    float* max;
    float* sum;
    uint32_t* masked;
    float* output;  // (splits, queries, dim)
    float* sum_score;
    float* sum_z;
    uint32_t* above;
    uint32_t* ties;
    uint64_t* fault;  // fault.cuh
    uint64_t split;
    uint64_t queries;
    uint64_t pairs;
};

static_assert(sizeof(OwnNegatives) == 7 * 8 + 40 + 2 * 8 + 4 * 4, "mirrored in params.rs");
static_assert(sizeof(OwnNegativesParams) == 128 + 14 * 8, "mirrored in params.rs");
