// The best K candidates of each query that are not masked: what each split of the candidates holds (stream_topk), and the merge of the
// splits, sorted (merge_topk).
//
//   s_ij = (q_i · c_j) · q.scale · c.scale                                                   (scales are inverse norms, or 1)
//   indices_i, scores_i = the K largest s_ij, of equal ones the smaller j first; index 2^32 − 1 and score −∞ where there are fewer
//
// Shapes: keys (splits, rows, capacity), of which the first K count (best.cuh); indices and scores (rows, K).
// Method, stream_topk: tiles of scores as in stream_sm80.cu; those above the row's threshold go to its buffer (best.cuh).
// Method, merge_topk: a block for each row has two halves of P >= K keys in shared memory, P a power of two: the best so far, and a
// split's. A bitonic sort of both leaves the best in the first. The best K of distinct keys are one list: bitwise reproducible.
// Limits: K <= 1024.
// Cost of a tile: 2·128·64·D flops, a comparison for each score. Of the merge, for each row and split: K keys read, and
// log2(2P) (log2(2P) + 1) / 2 passes over 2P keys in shared memory (16 KiB at most).
// Tests: tests/gpu.rs, topk::* and search::*, against the definition.
#include "portable/best.cuh"
#include "portable/tile_stream.cuh"
#include "portable/topk_params.h"

namespace {

constexpr uint32_t MAX_K = 1024;
constexpr uint32_t MERGE_THREADS = 256;

template <typename Element>
struct TopKStream : TileStream<Element, Mode::TOP_K, 0, 1> {
    using Base = TileStream<Element, Mode::TOP_K, 0, 1>;
    using Base::dots, Base::first_row, Base::start, Base::terms_of, Base::wait_for_tile;
    using Base::first_tile, Base::end_tile, Base::lane, Base::p;
    using typename Base::Tile;

    using Base::Base;

    __device__ __forceinline__ void run(const TopKParams& top) {
        const uint32_t row = first_row(0);
        const uint64_t slot = uint64_t(p.first_split + blockIdx.y) * p.x_rows + row;
        BestRows<BLOCK_Y / 8> best(top.keys + slot * top.capacity, top.k, top.capacity, row, p.x_rows, lane);
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) scale[half] = row + 8 * half < p.x_rows ? p.x_terms[row + 8 * half].scale : 0.0f;
        start();
        uint32_t stage = 0;
        for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
            float slab[1][8][4];
            const bool is_special = wait_for_tile(tile);
            dots(slab, 0, stage);
            auto& s = slab[0];
            const RowTerm* terms = terms_of(tile);
            Tile of_scores(p, terms, tile * BLOCK_Y, row, lane);
            if (is_special) of_scores.look();
            uint32_t above[2] = {};
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                const int n = i / 4, e = i % 4, half = e / 2, column = c_column(lane, n, e);
                s[n][e] = similarity(s[n][e], scale[half], terms[column].scale);
                // False for NaN.
                const bool is = s[n][e] > best.threshold[half] && !of_scores.mask.holds(n, e) && of_scores.first_column + column < p.y_rows;
                above[half] |= uint32_t(is) << (2 * n + e % 2);
            }
            best.append(s, above, p.candidate_start + of_scores.first_column);
        }
        ptx::cp_async_wait<0>();
        best.finish();
    }
};

// Sorts `count` keys, a power of two and at least 2, largest first, by all threads of the block.
__device__ __forceinline__ void sort_descending(uint64_t* keys, uint32_t count) {
    for (uint32_t run = 2; run <= count; run *= 2) {
        for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (uint32_t pair = threadIdx.x; pair < count / 2; pair += MERGE_THREADS) {
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

extern "C" __global__ void __launch_bounds__(MERGE_THREADS) merge_topk(const __grid_constant__ MergeTopKParams p) {
    __shared__ uint64_t keys[2 * MAX_K];
    const uint64_t row = blockIdx.x;
    uint32_t half = 1;
    while (half < p.k) half *= 2;
    for (uint32_t i = threadIdx.x; i < half; i += MERGE_THREADS) keys[i] = 0;
    for (uint64_t split = 0; split < p.splits; ++split) {
        const uint64_t* found = p.keys + (split * p.rows + row) * p.capacity;
        for (uint32_t i = threadIdx.x; i < half; i += MERGE_THREADS) keys[half + i] = i < p.k ? found[i] : 0;
        sort_descending(keys, 2 * half);
    }
    for (uint32_t i = threadIdx.x; i < p.k; i += MERGE_THREADS) {
        const uint64_t key = keys[i];
        p.indices[row * p.k + i] = key ? index_of(key) : ~0u;
        p.scores[row * p.k + i] = key ? __uint_as_float(score_bits_of(key)) : -INFINITY;
    }
}

#define KERNEL(type, element)                                                                                           \
    extern "C" __global__ void __launch_bounds__(threads_of(1), 1) stream_topk_##type(const __grid_constant__ TopKParams p) { \
        extern __shared__ __align__(1024) char memory[];                                                                \
        TopKStream<element> stream(p.stream, memory);                                                                   \
        stream.run(p);                                                                                                  \
    }

KERNEL(f16, __half)
KERNEL(bf16, __nv_bfloat16)
KERNEL(f32, float)
KERNEL(tf32, Tf32)
