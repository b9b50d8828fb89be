// Arguments of resolve.cu, mirrored by `ResolveParams` in src/backend/cuda/params.rs.
#pragma once
#include "stream_params.h"

struct ResolveParams {
    // Pairs: one per query, with key positive_ids[i] or, where that is null, positives[i]; then the excluded ids.
    const uint64_t* positive_ids;
    const uint32_t* positives;
    const int64_t* exclude_offsets;  // (rows + 1)
    const uint64_t* exclude_ids;
    // The table of keys: capacity + 1 slots. The table of their rows: capacity places.
    uint64_t* slot_keys;
    uint32_t* slot_first;
    uint32_t* slot_last;
    RowsOfKey* rows_of_keys;
    // One pool's candidates; without ids a candidate's key is its index over all pools.
    const uint64_t* candidate_ids;
    Hits* hits;
    uint64_t* fault;  // fault.cuh
    uint64_t candidates;
    uint64_t candidate_start;
    uint32_t rows;
    uint32_t positive_pairs;
    uint32_t excluded_pairs;
    uint32_t capacity;
};

static_assert(sizeof(ResolveParams) == 13 * 8 + 4 * 4, "mirrored in params.rs");
