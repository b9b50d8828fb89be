// Resolves ids ahead of the stream: which rows reject which candidates.
//
// Row i rejects a key: its positive's id (without ids: its positive's index) and the ids that it excludes. Each of these
// (key, row) pairs goes into two hash tables: one by key, which has the range [first, last] of the rows that reject it, and one by
// key and block of 64 rows, which has these rows as bits (rejected.cuh). Then each candidate is looked up in the first, and keeps
// the range and the slot of its key (`Hits`).
//
//   check_offsets  offsets that break the rule are reported
//   clear_slots    slots: key EMPTY, empty range; places: NO_KEY
//   insert_pairs   one thread a pair
//   find_hits      one thread a candidate
//
// Threads insert in any order, so that a key's slot may be another one each time. Its range (integer minimum and maximum) and its
// rows (bits) do not depend on the order, and nothing else is read: results are reproducible.
// Limits: at most 2^30 pairs; `capacity` is a power of two, at least twice their number; slot `capacity` is the key EMPTY's.
// Tests: tests/gpu.rs, every mask against the reference.
#include "fault.cuh"
#include "rejected.cuh"
#include "resolve_params.h"

namespace {

constexpr uint64_t EMPTY = 0x9e3779b97f4a7c15ull;
constexpr uint32_t NONE = ~0u;

__device__ __forceinline__ unsigned long long compare_and_swap(uint64_t* at, uint64_t expected, uint64_t value) {
    return atomicCAS(reinterpret_cast<unsigned long long*>(at), expected, value);
}

// Row of excluded pair `index`: the last row whose offset is not past it.
__device__ __forceinline__ uint32_t row_of(const int64_t* offsets, uint32_t rows, int64_t index) {
    uint32_t low = 0, high = rows;
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        if (offsets[middle] <= index) low = middle;
        else high = middle;
    }
    return low;
}

// Sets the row's bit in its block of the slot's key.
__device__ __forceinline__ void insert_row(const ResolveParams& p, uint32_t slot, uint32_t row) {
    const uint64_t key = block_of_key(slot, row / ROWS_OF_KEY);
    uint32_t place = first_slot(key, p.capacity);
    while (true) {
        const uint64_t found = compare_and_swap(&p.rows_of_keys[place].key, NO_KEY, key);
        if (found == NO_KEY || found == key) break;
        place = (place + 1) & (p.capacity - 1);
    }
    atomicOr(reinterpret_cast<unsigned long long*>(&p.rows_of_keys[place].rows), 1ull << row % ROWS_OF_KEY);
}

}  // namespace

// Offsets that do not ascend from 0 to the number of ids. `row_of` stays in bounds whatever they are.
extern "C" __global__ void check_offsets(const __grid_constant__ ResolveParams p) {
    const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.rows) return;
    const int64_t from = p.exclude_offsets[row], to = p.exclude_offsets[row + 1];
    if (from > to || (row == 0 && from != 0)) report_fault(p.fault, FAULT_EXCLUDE_OFFSETS, row);
    if (row + 1 == p.rows && to != p.excluded_pairs) report_fault(p.fault, FAULT_EXCLUDE_OFFSETS, p.rows);
}

extern "C" __global__ void clear_slots(const __grid_constant__ ResolveParams p) {
    const uint32_t slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot > p.capacity) return;
    p.slot_keys[slot] = EMPTY;
    p.slot_first[slot] = NONE;
    p.slot_last[slot] = 0;
    if (slot < p.capacity) p.rows_of_keys[slot] = {NO_KEY, 0};
}

extern "C" __global__ void insert_pairs(const __grid_constant__ ResolveParams p) {
    const uint32_t pair = blockIdx.x * blockDim.x + threadIdx.x;
    if (pair >= p.positive_pairs + p.excluded_pairs) return;
    const bool is_positive = pair < p.positive_pairs;
    const uint32_t excluded = pair - p.positive_pairs;
    const uint32_t row = is_positive ? pair : row_of(p.exclude_offsets, p.rows, excluded);
    const uint64_t key = !is_positive ? p.exclude_ids[excluded] : p.positive_ids ? p.positive_ids[pair] : p.positives[pair];
    uint32_t slot = p.capacity;
    if (key != EMPTY) {
        slot = first_slot(key, p.capacity);
        // The table is at most half full, so a free slot or the key's own comes.
        while (true) {
            const uint64_t found = compare_and_swap(&p.slot_keys[slot], EMPTY, key);
            if (found == EMPTY || found == key) break;
            slot = (slot + 1) & (p.capacity - 1);
        }
    }
    atomicMin(&p.slot_first[slot], row);
    atomicMax(&p.slot_last[slot], row);
    insert_row(p, slot, row);
}

extern "C" __global__ void find_hits(const __grid_constant__ ResolveParams p) {
    const uint64_t candidate = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (candidate >= p.candidates) return;
    const uint64_t key = p.candidate_ids ? p.candidate_ids[candidate] : p.candidate_start + candidate;
    Hits hits = {1, 0, 0};
    uint32_t slot = p.capacity;
    if (key != EMPTY) {
        slot = first_slot(key, p.capacity);
        while (p.slot_keys[slot] != key && p.slot_keys[slot] != EMPTY) slot = (slot + 1) & (p.capacity - 1);
    }
    if (p.slot_first[slot] != NONE) hits = {p.slot_first[slot], p.slot_last[slot], slot};
    p.hits[candidate] = hits;
}
