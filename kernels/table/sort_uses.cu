// Who names which row, sorted by row: what finish_table.cu adds gradients up by.
//
//   list_uses                                     one entry for each use of a row, in the order of the uses
//   sort_count, sort_places, sort_scatter         one pass of a radix sort, by a digit of 8 bits of the row
//   count_rows, place_rows                        of sorted uses, the rows that have one, ascending, and where each row's first use is
//   every_row                                     the same list where every row of the table has one
//
// Shapes: (uses). A pass keeps the order of entries with equal digits, so after the last one a row's uses are in their order: the result
// depends on the input alone. No atomics but integer ones that count.
// Method: a block has SORT_TILE entries. It counts its digits; one block turns all counts into places; each block then sorts its entries
// by the digit in shared memory and writes them, so that neighbours go to neighbouring places.
// Cost of a pass: reads the entries twice and writes them once; bound by memory.
// Limits: 2^32 − 1 uses.
// Tests: tests/gpu/tables.rs, through every gradient of a table.
#include "rows/warp.cuh"
#include "table/uses.cuh"

namespace {

constexpr uint32_t THREADS = BLOCK_ROWS * WARP;
constexpr uint32_t DIGITS = 256;
constexpr uint32_t EACH = SORT_TILE / THREADS;  // entries of a thread
static_assert(DIGITS == THREADS, "a thread for each digit");

__device__ __forceinline__ uint32_t digit_of(const SortUsesParams& p, uint64_t entry) {
    return static_cast<uint32_t>(entry >> p.shift) % DIGITS;
}

// The sum of the values of the block's threads before this one. Between two calls there has to be a barrier.
__device__ __forceinline__ uint32_t sum_before(uint32_t value) {
    __shared__ uint32_t of_warps[BLOCK_ROWS];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t sum = value;
    for (uint32_t distance = 1; distance < WARP; distance *= 2) {
        const uint32_t lower = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += lower;
    }
    if (lane == WARP - 1) of_warps[warp] = sum;
    __syncthreads();
    for (uint32_t of = 0; of < warp; ++of) sum += of_warps[of];
    return sum - value;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) list_uses(const __grid_constant__ ListUsesParams p) {
    const uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= p.count) return;
    const uint64_t row = p.rows ? p.rows[i] : i;
    p.entries[i] = (row < p.limit ? row : NO_ROW_USED) << USE_BITS | (p.first + i);
}

extern "C" __global__ void __launch_bounds__(THREADS) sort_count(const __grid_constant__ SortUsesParams p) {
    __shared__ uint32_t counts[DIGITS];
    counts[threadIdx.x] = 0;
    __syncthreads();
    const uint64_t first = uint64_t(blockIdx.x) * SORT_TILE;
    for (uint64_t i = first + threadIdx.x; i < min(first + SORT_TILE, p.count); i += THREADS) atomicAdd(&counts[digit_of(p, p.from[i])], 1);
    __syncthreads();
    p.places[uint64_t(blockIdx.x) * DIGITS + threadIdx.x] = counts[threadIdx.x];
}

// By one block: thread t has digit t.
extern "C" __global__ void __launch_bounds__(THREADS) sort_places(const __grid_constant__ SortUsesParams p) {
    uint32_t* mine = p.places + threadIdx.x;
    uint32_t sum = 0;
    for (uint64_t block = 0; block < p.blocks; ++block) sum += mine[block * DIGITS];
    uint32_t place = sum_before(sum);
    for (uint64_t block = 0; block < p.blocks; ++block) {
        const uint32_t count = mine[block * DIGITS];
        mine[block * DIGITS] = place;
        place += count;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) sort_scatter(const __grid_constant__ SortUsesParams p) {
    __shared__ uint64_t sorted[SORT_TILE];
    __shared__ uint32_t places[BLOCK_ROWS][DIGITS];  // how many entries of a digit a warp has had; then where its first one is in `sorted`
    __shared__ uint32_t beyond[DIGITS];              // what is added to a place in `sorted` for that in `to`
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint64_t start = uint64_t(blockIdx.x) * SORT_TILE;
    const uint32_t number = static_cast<uint32_t>(min(uint64_t(SORT_TILE), p.count - start));
    for (uint32_t of = 0; of < BLOCK_ROWS; ++of) places[of][threadIdx.x] = 0;
    __syncthreads();

    // A warp has EACH · 32 entries in a row. Of an entry: how many of the warp's with its digit come before it.
    uint64_t entries[EACH];
    uint32_t before[EACH];
#pragma unroll
    for (uint32_t round = 0; round < EACH; ++round) {
        const uint32_t i = (warp * EACH + round) * WARP + lane;
        const bool present = i < number;
        entries[round] = present ? p.from[start + i] : 0;
        const uint32_t digit = present ? digit_of(p, entries[round]) : DIGITS;
        const uint32_t same = __match_any_sync(~0u, digit), lower = __popc(same & ((1u << lane) - 1));
        before[round] = present ? places[warp][digit] + lower : 0;
        __syncwarp();  // counts are read before they are replaced
        if (present && lower == 0) places[warp][digit] += __popc(same);
        __syncwarp();
    }
    __syncthreads();

    // Thread t has digit t.
    uint32_t sum = 0;
    for (uint32_t of = 0; of < BLOCK_ROWS; ++of) sum += places[of][threadIdx.x];
    uint32_t place = sum_before(sum);
    beyond[threadIdx.x] = p.places[uint64_t(blockIdx.x) * DIGITS + threadIdx.x] - place;
    for (uint32_t of = 0; of < BLOCK_ROWS; ++of) {
        const uint32_t count = places[of][threadIdx.x];
        places[of][threadIdx.x] = place;
        place += count;
    }
    __syncthreads();

#pragma unroll
    for (uint32_t round = 0; round < EACH; ++round) {
        if ((warp * EACH + round) * WARP + lane >= number) continue;
        sorted[places[warp][digit_of(p, entries[round])] + before[round]] = entries[round];
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < number; i += THREADS) {
        const uint64_t entry = sorted[i];
        p.to[beyond[digit_of(p, entry)] + i] = entry;
    }
}

namespace {

// The sum over the block, the same in every thread. Once in a kernel: nothing waits for an earlier sum to be read.
__device__ __forceinline__ uint32_t sum_of_block(uint32_t value) {
    __shared__ uint32_t of_warps[BLOCK_ROWS];
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    uint32_t sum = 0;
    for (uint32_t warp = 0; warp < BLOCK_ROWS; ++warp) sum += of_warps[warp];
    return sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) count_rows(const __grid_constant__ PlaceRowsParams p) {
    const uint64_t first = uint64_t(blockIdx.x) * SORT_TILE;
    uint32_t count = 0;
    for (uint32_t round = 0; round < EACH; ++round) count += is_first_use(p.entries, p.count, first + round * THREADS + threadIdx.x);
    count = sum_of_block(count);
    if (threadIdx.x == 0) p.counts[blockIdx.x] = count;
}

extern "C" __global__ void __launch_bounds__(THREADS) place_rows(const __grid_constant__ PlaceRowsParams p) {
    __shared__ uint32_t of_warps[BLOCK_ROWS];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    uint32_t place = 0;
    for (uint64_t block = threadIdx.x; block < blockIdx.x; block += THREADS) place += p.counts[block];
    place = sum_of_block(place);  // first uses before those of this round
    for (uint32_t round = 0; round < SORT_TILE / THREADS; ++round) {
        const uint64_t i = uint64_t(blockIdx.x) * SORT_TILE + round * THREADS + threadIdx.x;
        const bool mine = is_first_use(p.entries, p.count, i);
        const uint32_t firsts = __ballot_sync(~0u, mine);
        if (lane == 0) of_warps[warp] = __popc(firsts);
        __syncthreads();
        uint32_t before = place;
        for (uint32_t of = 0; of < BLOCK_ROWS; ++of) {
            if (of < warp) before += of_warps[of];
            place += of_warps[of];
        }
        __syncthreads();  // counts are read before they are replaced
        if (!mine) continue;
        before += __popc(firsts & ((1u << lane) - 1));
        p.places[i] = before;
        p.rows[before] = row_of_use(p.entries, i);
    }
    if (blockIdx.x + 1 == p.blocks && threadIdx.x == 0) *p.num_rows = place;
}

extern "C" __global__ void __launch_bounds__(THREADS) every_row(const __grid_constant__ PlaceRowsParams p) {
    const uint64_t i = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i < p.count) p.rows[i] = static_cast<uint32_t>(i);
    if (i == 0) *p.num_rows = p.count;
}
