// Arguments of resolve.cu, mirrored by `FindHitsParams` in src/backend/cuda/params.rs.
#pragma once
#include "rows/key_table_params.h"

struct FindHitsParams {
    KeyTable keys;
    // One pool's candidates; without ids a candidate's key is its index over all pools. Candidates that are rows of a table have the
    // table's ids, or without ids their row.
    const uint64_t* candidate_ids;
    const uint32_t* indices;  // (candidates): which rows of the table; null where candidate i is row i, or there is no table
    Hits* hits;
    uint64_t candidates;
    uint64_t start;  // index over all pools of the pool's first candidate; 0 for rows of a table
};

static_assert(sizeof(FindHitsParams) == 40 + 5 * 8, "mirrored in params.rs");
