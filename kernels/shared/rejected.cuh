// Which rows reject a key, by blocks of 64 rows: one place of a hash table holds a block's rows as bits (RowsOfKey).
//
// A lookup costs one or two reads however many rows reject the key: popular items, which are the positives of many rows and in the
// histories of many users, cost what others cost.
#pragma once
#include "shared/hash.h"
#include "shared/stream_params.h"

// What marks a free place; no slot is as large.
constexpr uint64_t NO_KEY = ~0ull;
constexpr uint32_t ROWS_OF_KEY = 64;

__device__ __forceinline__ uint64_t block_of_key(uint32_t slot, uint32_t block) { return uint64_t(slot) << 32 | block; }

// Rows 64 · block + i that reject a candidate, bit i each; `rows` is the table of `capacity` places.
__device__ __forceinline__ uint64_t rejecting_rows(const RowsOfKey* rows, uint32_t capacity, const Hits& hits, uint32_t block) {
    if (hits.first == hits.last) return hits.first / ROWS_OF_KEY == block ? 1ull << hits.first % ROWS_OF_KEY : 0;
    const uint64_t key = block_of_key(hits.slot, block);
    for (uint32_t place = first_slot(key, capacity);; place = (place + 1) & (capacity - 1)) {
        const ulonglong2 found = *reinterpret_cast<const ulonglong2*>(&rows[place]);
        if (found.x == key) return found.y;
        if (found.x == NO_KEY) return 0;
    }
}
