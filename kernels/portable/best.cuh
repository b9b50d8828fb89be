// The best K candidates of a warp's 16 rows: a threshold that filters scores in registers, a buffer in global memory that fills,
// a selection that empties it.
//
// A score and an index are one 64-bit key, the larger the better and of equal scores that of the smaller index. Keys of a row are
// distinct, so the best K are one set, in whatever order they came. 0 is the key of no candidate.
//
// A row belongs to one warp, which counts by ballots and sums: no atomics. A full buffer keeps its K largest keys: the K-th is found
// bit by bit from the top, each bit by one count of the keys that are no smaller. Buffers are read about 20 times for K candidates.
#pragma once
#include "shared/score.cuh"

constexpr uint32_t SIGN = 1u << 31;

__host__ __device__ constexpr uint64_t key_of(uint32_t score_bits, uint32_t index) {
    const uint32_t ordered = score_bits & SIGN ? ~score_bits : score_bits | SIGN;
    return uint64_t(ordered) << 32 | uint32_t(~index);
}

__host__ __device__ constexpr uint32_t score_bits_of(uint64_t key) {
    const uint32_t ordered = uint32_t(key >> 32);
    return ordered & SIGN ? ordered & ~SIGN : ~ordered;
}

__host__ __device__ constexpr uint32_t index_of(uint64_t key) { return ~uint32_t(key); }

template <int TILES>
struct BestRows {
    static constexpr uint32_t COLUMNS = 8 * TILES;

    uint64_t* keys[2];  // buffers of this lane's two rows
    uint32_t count[2];  // keys in them: the same for the four lanes of a row
    // The K-th best score of those seen when the buffer was last full. Candidates come in the order of their indices: one that scores
    // no more has K better ones before it. −∞ before, which masked pairs do not exceed; ∞ for a row that is not there.
    float threshold[2];
    uint32_t k, capacity;
    int lane;

    // `first` is the buffer of the thread's first row, the other's is 8 rows on.
    __device__ __forceinline__ BestRows(uint64_t* first, uint32_t k_, uint32_t capacity_, uint32_t row, uint32_t rows, int lane_)
        : keys{first, first + 8ull * capacity_}, count{0, 0}, k(k_), capacity(capacity_), lane(lane_) {
        threshold[0] = row < rows ? -INFINITY : INFINITY;
        threshold[1] = row + 8 < rows ? -INFINITY : INFINITY;
    }

    // Takes a tile of scores, those whose bit is set in `above` (TileMask's bits). A whole warp at a time. `first_index` is the index of
    // the tile's first candidate.
    __device__ __forceinline__ void append(const float (&s)[TILES][4], const uint32_t (&above)[2], uint32_t first_index) {
        if (!__any_sync(~0u, above[0] | above[1])) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t mine = __popc(above[half]);
            // What the row's lanes before this one append.
            const uint32_t one = __shfl_up_sync(~0u, mine, 1, 4);
            uint32_t sum = mine + (lane % 4 >= 1 ? one : 0);
            const uint32_t two = __shfl_up_sync(~0u, sum, 2, 4);
            sum += lane % 4 >= 2 ? two : 0;
            uint64_t* to = keys[half] + count[half] + sum - mine;
#pragma unroll
            for (int i = 0; i < 2 * TILES; ++i) {
                if (!(above[half] >> i & 1)) continue;
                // −0 + 0 is 0: equal scores have equal bits.
                const float score = s[i / 2][2 * half + i % 2] + 0.0f;
                *to++ = key_of(__float_as_uint(score), first_index + c_column(lane, i / 2, i % 2));
            }
            count[half] += __shfl_sync(~0u, sum, 3, 4);
        }
        // Room for the next tile.
        shrink(capacity - COLUMNS);
    }

    // Brings the rows that hold more than `limit` keys, at least K, down to their best K.
    __device__ __forceinline__ void shrink(uint32_t limit) {
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // One lane of each row speaks for it.
            for (uint32_t full = __ballot_sync(~0u, count[half] > limit) & 0x11111111u; full != 0; full &= full - 1) {
                const int leader = __ffs(full) - 1;
                uint64_t* const of_row = reinterpret_cast<uint64_t*>(
                    __shfl_sync(~0u, reinterpret_cast<unsigned long long>(keys[half]), leader));
                const uint64_t kth = keep_best(of_row, __shfl_sync(~0u, count[half], leader));
                if (lane / 4 != leader / 4) continue;
                count[half] = k;
                threshold[half] = __uint_as_float(score_bits_of(kth));
            }
        }
    }

    // Moves the K largest of more than K keys to the front; returns the least of them.
    __device__ uint64_t keep_best(uint64_t* buffer, uint32_t filled) const {
        uint64_t bound = 0;
        for (int bit = 63; bit >= 0; --bit) {
            const uint64_t candidate = bound | 1ull << bit;
            uint32_t reach = 0;
            for (uint32_t i = lane; i < filled; i += 32) reach += buffer[i] >= candidate;
            for (int distance = 16; distance > 0; distance /= 2) reach += __shfl_xor_sync(~0u, reach, distance);
            if (reach >= k) bound = candidate;
            if (reach == k) break;
        }
        // Keys only move towards the front, past none that is still to be read.
        uint32_t kept = 0;
        unsigned long long least = ~0ull;
        for (uint32_t base = 0; base < filled; base += 32) {
            const uint64_t key = base + lane < filled ? buffer[base + lane] : 0;
            const bool keep = key >= bound;
            const uint32_t keeping = __ballot_sync(~0u, keep);
            // All have read what is written over now: a ballot orders no memory.
            __syncwarp();
            if (keep) {
                buffer[kept + __popc(keeping & ((1u << lane) - 1))] = key;
                least = key < least ? key : least;
            }
            kept += __popc(keeping);
        }
        for (int distance = 16; distance > 0; distance /= 2) {
            const unsigned long long other = __shfl_xor_sync(~0u, least, distance);
            least = other < least ? other : least;
        }
        return least;
    }

    // Leaves each row's best K at the front of its buffer, 0 behind them where there are fewer.
    __device__ __forceinline__ void finish() {
        shrink(k);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (threshold[half] == INFINITY && count[half] == 0) continue;
            for (uint32_t i = count[half] + lane % 4; i < k; i += 4) keys[half][i] = 0;
        }
    }
};
