// The table of rejected keys (key_table.cuh), mirrored by `KeyTable` in src/backend/cuda/params.rs.
#pragma once
#include "shared/stream_params.h"

struct KeyTable {
    // capacity + 1 slots.
    uint64_t* keys;
    uint32_t* first;
    uint32_t* last;
    // capacity places (rejected.cuh).
    RowsOfKey* rows;
    uint64_t capacity;  // a power of two, at least twice the number of pairs; 0: no table
};

static_assert(sizeof(KeyTable) == 5 * 8, "mirrored in params.rs");
