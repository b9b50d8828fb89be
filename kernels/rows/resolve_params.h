// Arguments of resolve.cu, mirrored by `FindHitsParams` in src/backend/cuda/params.rs.
#pragma once
#include "rows/key_table_params.h"

struct FindHitsParams {
    KeyTable keys;
    // One pool's candidates; without ids a candidate's key is its index over all pools.
    const uint64_t* candidate_ids;
    Hits* hits;
    uint64_t candidates;
    uint64_t start;  // index over all pools of the pool's first candidate
};

static_assert(sizeof(FindHitsParams) == 40 + 4 * 8, "mirrored in params.rs");
