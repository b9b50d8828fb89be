// The pairs of a tile that are no negatives. Hits are rare: a tile learns from the candidates' row ranges whether it may have any,
// and only then its warps look for theirs. A thread keeps a bit for each of its elements.
#pragma once
#include "shared/layout.h"
#include "shared/rejected.cuh"

// Of a candidate that no row rejects.
__device__ __forceinline__ Hits no_hits() { return {1, 0, 0}; }

// Whether rows that reject a candidate may lie in [first, first + count).
__device__ __forceinline__ bool overlaps(const Hits& hits, uint32_t first, uint32_t count) {
    return hits.first <= hits.last && hits.first < first + count && hits.last >= first;
}

template <int TILES>
struct TileMask {
    static_assert(2 * TILES <= 32, "a row's bits fill a word at most");
    // Rows of a key that are looked up at a time.
    static constexpr int AT_ONCE = 8 * TILES < ROWS_OF_KEY ? 8 * TILES : ROWS_OF_KEY;
    static_assert(AT_ONCE % 32 == 0 && 8 * TILES % AT_ONCE == 0 && ROWS_OF_KEY % AT_ONCE == 0, "no key's rows straddle a tile's end");
    uint32_t bits[2];

    __device__ __forceinline__ bool holds(int n, int e) const { return bits[e / 2] >> (2 * n + e % 2) & 1; }

    // The same columns of both rows.
    __device__ __forceinline__ void add(uint32_t columns) {
        bits[0] |= columns;
        bits[1] |= columns;
    }

    // The bit of a column where this lane holds it.
    static __device__ __forceinline__ uint32_t bit(uint32_t column, int lane) {
        return column % 8 / 2 == lane % 4 ? 1u << (column / 8 * 2 + column % 2) : 0;
    }

    // This lane's share of 32 columns from `base` on, of which `columns` has a bit each.
    static __device__ __forceinline__ uint32_t share(uint32_t columns, uint32_t base, int lane) {
        uint32_t mine = 0;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) mine |= (columns >> (8 * tile + 2 * (lane % 4)) & 3) << (base / 4 + 2 * tile);
        return mine;
    }

    // Up to so many hit columns are handed out one by one. With more, the 16 rows are, which costs the same for any number of
    // columns.
    static constexpr int FEW = 3;

    // All lanes take their bits of the columns that are hit. Lane i has the rows that reject column base + i.
    __device__ __forceinline__ void take_columns(uint32_t hit, uint32_t rejecting, uint32_t base, int lane) {
#pragma unroll 1
        for (; hit != 0; hit &= hit - 1) {
            const int column = __ffs(hit) - 1;
            const uint32_t rows = __shfl_sync(~0u, rejecting, column) >> lane / 4, mine = bit(base + column, lane);
            if (rows & 1) bits[0] |= mine;
            if (rows & 1 << 8) bits[1] |= mine;
        }
    }

    __device__ __forceinline__ void take_rows(uint32_t rejecting, uint32_t base, int lane) {
        uint32_t upper = 0, lower = 0;
        // Kernels with half of a tile at a time (TILES = 4) have no registers for more than one of these rows.
#pragma unroll(TILES < 8 ? 1 : 8)
        for (int row = 0; row < 8; ++row) {
            const uint32_t first = __ballot_sync(~0u, rejecting >> row & 1), second = __ballot_sync(~0u, rejecting >> row & 1 << 8);
            if (row == lane / 4) {
                upper = first;
                lower = second;
            }
        }
        bits[0] |= share(upper, base, lane);
        bits[1] |= share(lower, base, lane);
    }

    // Queries stationary, 16 of them in this warp from `first_row`, a multiple of 16. Each lane looks up a candidate's rows; all lanes
    // then take their bits of those that are hit.
    __device__ __forceinline__ void of_queries(const StreamParams& p, uint32_t first_row, uint32_t first_column, int lane) {
#pragma unroll 1
        for (uint32_t base = 0; base < 8 * TILES; base += 32) {
            const uint32_t index = first_column + base + lane;
            uint32_t rejecting = 0;
            if (index < p.y_rows) {
                const Hits hits = p.hits[index];
                if (overlaps(hits, first_row, 16)) {
                    const uint64_t rows = rejecting_rows(p.rows_of_keys, p.rows_capacity, hits, first_row / ROWS_OF_KEY);
                    rejecting = uint32_t(rows >> first_row % ROWS_OF_KEY) & 0xffff;
                }
            }
            const uint32_t hit = __ballot_sync(~0u, rejecting != 0);
            if (__popc(hit) <= FEW) {
                take_columns(hit, rejecting, base, lane);
            } else {
                take_rows(rejecting, base, lane);
            }
        }
    }

    // Candidates stationary: those of this thread are `row` and `row + 8`. `first_column` is a multiple of AT_ONCE.
    __device__ __forceinline__ void of_candidates(const StreamParams& p, uint32_t row, uint32_t first_column, int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t candidate = row + 8 * half;
            if (candidate >= p.x_rows) continue;
            const Hits hits = p.hits[candidate];
            if (!overlaps(hits, first_column, 8 * TILES)) continue;
#pragma unroll 1
            for (uint32_t base = 0; base < 8 * TILES; base += AT_ONCE) {
                uint64_t rejecting = rejecting_rows(p.rows_of_keys, p.rows_capacity, hits, (first_column + base) / ROWS_OF_KEY);
                if (AT_ONCE < ROWS_OF_KEY) rejecting >>= (first_column + base) % ROWS_OF_KEY;
#pragma unroll
                for (int i = 0; i < AT_ONCE; i += 32) bits[half] |= share(uint32_t(rejecting >> i), base + i, lane);
            }
        }
    }

    __device__ __forceinline__ uint32_t count(int half) const { return __popc(bits[half]); }
};
