// The pairs of a tile that are no negatives. Hits are rare: a tile learns from the candidates' row ranges whether it may
// have any, and only then gathers them into a bitmap.
#pragma once
#include "stream_params.h"

template <int BLOCK_X, int BLOCK_Y>
struct TileMasks {
    static constexpr int WORDS = BLOCK_Y / 32;
    uint32_t bits[BLOCK_X][WORDS];

    __device__ __forceinline__ bool masked(int row, int column) const { return bits[row][column / 32] >> (column % 32) & 1; }

    // Clears the bitmap; all threads call it, and wait before bits are set.
    __device__ __forceinline__ void clear() {
        for (int word = threadIdx.x; word < BLOCK_X * WORDS; word += blockDim.x) bits[word / WORDS][word % WORDS] = 0;
    }

    __device__ __forceinline__ void set(int row, int column) { atomicOr(&bits[row][column / 32], 1u << (column % 32)); }

    static __device__ __forceinline__ bool overlaps(const Hits& hits, uint32_t first, uint32_t count) {
        return hits.first <= hits.last && hits.first < first + count && hits.last >= first;
    }

    // Calls `set_row(query - first)` for each query in [first, first + count) that rejects the candidate.
    template <typename SetRow>
    static __device__ __forceinline__ void for_each(const StreamParams& p, const Hits& hits, uint32_t first, uint32_t count,
                                                    SetRow set_row) {
        if (!overlaps(hits, first, count)) return;
        if (hits.first == hits.last) {
            set_row(hits.first - first);
            return;
        }
        for (uint32_t pair = p.slot_heads[hits.slot]; pair != ~0u; pair = p.pair_next[pair]) {
            const uint32_t row = p.pair_rows[pair];
            if (row >= first && row - first < count) set_row(row - first);
        }
    }
};
