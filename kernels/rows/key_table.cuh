// Which rows reject which keys: the table that positives.cu fills and resolve.cu looks candidates up in.
//
// Row i rejects a key: its positive's id (without ids: its positive's index) and the ids that it excludes. Each of these (key, row)
// pairs goes into two hash tables: one by key, which has the range [first, last] of the rows that reject it, and one by key and block
// of 64 rows, which has these rows as bits (rejected.cuh).
//
// Threads insert in any order, so that a key's slot may be another one each time. Its range (integer minimum and maximum) and its
// rows (bits) do not depend on the order, and nothing else is read: results are reproducible.
// Limits: at most 2^30 pairs; slot `capacity` is the key EMPTY's.
#pragma once
#include "rows/key_table_params.h"
#include "shared/rejected.cuh"

constexpr uint64_t EMPTY = 0x9e3779b97f4a7c15ull;
constexpr uint32_t NO_ROW = ~0u;

// Of slot `slot`, at most `capacity`.
__device__ __forceinline__ void clear_key(const KeyTable& table, uint64_t slot) {
    table.keys[slot] = EMPTY;
    table.first[slot] = NO_ROW;
    table.last[slot] = 0;
    if (slot < table.capacity) table.rows[slot] = {NO_KEY, 0};
}

__device__ __forceinline__ unsigned long long compare_and_swap(uint64_t* at, uint64_t expected, uint64_t value) {
    return atomicCAS(reinterpret_cast<unsigned long long*>(at), expected, value);
}

// Sets the row's bit in its block of the slot's key.
__device__ __forceinline__ void insert_row(const KeyTable& table, uint32_t slot, uint32_t row) {
    const uint32_t capacity = static_cast<uint32_t>(table.capacity);
    const uint64_t key = block_of_key(slot, row / ROWS_OF_KEY);
    uint32_t place = first_slot(key, capacity);
    while (true) {
        const uint64_t found = compare_and_swap(&table.rows[place].key, NO_KEY, key);
        if (found == NO_KEY || found == key) break;
        place = (place + 1) & (capacity - 1);
    }
    atomicOr(reinterpret_cast<unsigned long long*>(&table.rows[place].rows), 1ull << row % ROWS_OF_KEY);
}

__device__ __forceinline__ void insert_pair(const KeyTable& table, uint64_t key, uint32_t row) {
    const uint32_t capacity = static_cast<uint32_t>(table.capacity);
    uint32_t slot = capacity;
    if (key != EMPTY) {
        slot = first_slot(key, capacity);
        // The table is at most half full, so a free slot or the key's own comes.
        while (true) {
            const uint64_t found = compare_and_swap(&table.keys[slot], EMPTY, key);
            if (found == EMPTY || found == key) break;
            slot = (slot + 1) & (capacity - 1);
        }
    }
    atomicMin(&table.first[slot], row);
    atomicMax(&table.last[slot], row);
    insert_row(table, slot, row);
}

// The rows that reject a key, once all pairs are there.
__device__ __forceinline__ Hits find_key(const KeyTable& table, uint64_t key) {
    const uint32_t capacity = static_cast<uint32_t>(table.capacity);
    uint32_t slot = capacity;
    if (key != EMPTY) {
        slot = first_slot(key, capacity);
        uint64_t found;
        while ((found = table.keys[slot]) != key) {
            if (found == EMPTY) return {1, 0, 0};
            slot = (slot + 1) & (capacity - 1);
        }
    }
    if (table.first[slot] == NO_ROW) return {1, 0, 0};  // EMPTY itself, which no row rejects
    return {table.first[slot], table.last[slot], slot};
}

// Whether row `row` is one of those.
__device__ __forceinline__ bool rejects(const KeyTable& table, const Hits& hits, uint32_t row) {
    if (hits.first > hits.last || row < hits.first || row > hits.last) return false;
    return rejecting_rows(table.rows, static_cast<uint32_t>(table.capacity), hits, row / ROWS_OF_KEY) >> row % ROWS_OF_KEY & 1;
}
