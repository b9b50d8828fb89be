// Merges what the splits of a search found: the best K of each row, sorted.
//
//   indices_i, scores_i = the K largest keys of all splits of row i, largest first; index 2^32 − 1 and score −∞ where there are fewer
//
// Shapes: keys (splits, rows, capacity), of which the first K count (best.cuh); indices and scores (rows, K).
// Method: a block for each row has two halves of P >= K keys in shared memory, P a power of two: the best so far, and a split's.
// A bitonic sort of both leaves the best in the first. The best K of distinct keys are one list: bitwise reproducible.
// Limits: K <= 1024.
// Cost: for each row and split K keys read, and log2(2P) (log2(2P) + 1) / 2 passes over 2P keys in shared memory (16 KiB at most).
// Tests: tests/gpu.rs, top_k::*, against the reference.
#include "best.cuh"
#include "topk_params.h"

namespace {

constexpr uint32_t THREADS = 256;
constexpr uint32_t MAX_K = 1024;

// Sorts `count` keys, a power of two and at least 2, largest first, by all threads of the block.
__device__ __forceinline__ void sort_descending(uint64_t* keys, uint32_t count) {
    for (uint32_t run = 2; run <= count; run *= 2) {
        for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (uint32_t pair = threadIdx.x; pair < count / 2; pair += THREADS) {
                const uint32_t low = pair / distance * 2 * distance + pair % distance, high = low + distance;
                const uint64_t a = keys[low], b = keys[high];
                // Every other run is sorted the other way round.
                if ((low & run) == 0 ? a < b : a > b) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
    }
    __syncthreads();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) merge_topk(const __grid_constant__ MergeTopKParams p) {
    __shared__ uint64_t keys[2 * MAX_K];
    const uint64_t row = blockIdx.x;
    uint32_t half = 1;
    while (half < p.k) half *= 2;
    for (uint32_t i = threadIdx.x; i < half; i += THREADS) keys[i] = 0;
    for (uint64_t split = 0; split < p.splits; ++split) {
        const uint64_t* found = p.keys + (split * p.rows + row) * p.capacity;
        for (uint32_t i = threadIdx.x; i < half; i += THREADS) keys[half + i] = i < p.k ? found[i] : 0;
        sort_descending(keys, 2 * half);
    }
    for (uint32_t i = threadIdx.x; i < p.k; i += THREADS) {
        const uint64_t key = keys[i];
        p.indices[row * p.k + i] = key ? index_of(key) : ~0u;
        p.scores[row * p.k + i] = key ? __uint_as_float(score_bits_of(key)) : -INFINITY;
    }
}
