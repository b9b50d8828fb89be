// One streaming pass over a B x N table of scores that never exists, in five modes, on tensor cores of sm_80 and later.
//
//   z_xy = (x · y) · x.scale · y.scale + x.bias + y.bias                    (units of log 2; in which order: score.cuh)
//
//   mode        stationary x   streamed y             result for each x
//   STATISTICS  queries        candidates             max z, Σ 2^(z − max)
//   EXPECTED    queries        candidates             the same, and Σ 2^(z − max) y / |y|
//   DETAIL      queries        candidates             as STATISTICS, and Σ 2^(z − max) s, Σ 2^(z − max) (z − max), rank
//   GRADIENT    candidates     queries                Σ coefficient · y / |y|; d_lse · min(1, 2^(z − lse))
//   PAIRED      pairs' queries their positives        (x · y) · x.scale · y.scale of pairs with equal index
//
// A block of 128 stationary rows walks the tiles of 64 streamed rows of its split:
//
//   for each tile:
//     S = X Yᵀ, chunk of 128 bytes of each row after chunk                                   [1]
//     z from S; masked pairs: −∞                                                             [2]
//     m' = max(m, row max of z); sum, O *= 2^(m − m'); P = 2^(z − m'); sum += row sum of P   [3]
//     O += P Y                                                                               [4]
//
// Where the code differs from that:
// [1] By a ring of buffers (tile_stream.cuh).
// [2] Only tiles that may hold a masked pair look for them (tile_mask.cuh). With a false-negative filter these are all tiles: a pair
//     above its query's bound is masked, too (score.cuh).
// [3] Where the caller bounds z (p.online == 0), m is 0, as biases hold the shift, and nothing is rescaled. Four lanes share a row.
// [4] Y comes a second time, its columns [first, first + OUTPUT_CHUNKS chunks) only: blockIdx.z is the slice of columns.
//     P is multiplied by y.factor, rounded to Y's type (f32: split in two, fragments.cuh) and never leaves registers.
//
// Numerics: products and sums in f32. P of 16-bit types is rounded relative to the row's maximum; in f16, m is 14 less where there is an
// output (HEADROOM in score.cuh). Sums run in the order of tiles: results are bitwise reproducible and independent of the grid but for
// the splits, which merge.cuh merges in order.
// Cost of a tile: 2·128·64·D flops and 64·D elements from L2, twice that with an output; 128·D more where X does not fit; 128·64 exp2.
// Tests: tests/gpu.rs, against the float64 reference.
#include "portable/tile_stream.cuh"

namespace {

struct Detail {
    float sum_score[2];
    float sum_z[2];
    uint32_t above[2];
    uint32_t ties[2];
};

template <typename Element, Mode MODE, int OUTPUT_CHUNKS>
struct Stream : TileStream<Element, MODE, OUTPUT_CHUNKS> {
    using Base = TileStream<Element, MODE, OUTPUT_CHUNKS>;
    using Base::clear_spoiled, Base::dots, Base::load_columns, Base::own_column_spoiled, Base::row, Base::special, Base::start, Base::wait;
    using Base::first_tile, Base::end_tile, Base::lane, Base::p, Base::ring_y, Base::shared;
    using typename Base::Tile;
    static constexpr bool HAS_OUTPUT = OUTPUT_CHUNKS > 0;
    static constexpr int TILES_PER_CHUNK = Fragments<Element>::TILES_PER_CHUNK;
    static_assert(HAS_OUTPUT == (MODE == Mode::EXPECTED || MODE == Mode::GRADIENT), "these two have an output");
    static_assert(TILES_PER_CHUNK * 8 == Fragments<Element>::ELEMENTS_PER_CHUNK, "an output tile is 8 columns wide");

    using Base::Base;

    __device__ __forceinline__ void count_rank(const float (&s)[8][4], const Tile& tile, const RowTerm (&rows)[2],
                                               const float (&positive)[2], Detail& detail) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = c_column(lane, n, e), half = e / 2;
                if (tile.first_column + column >= p.y_rows || tile.mask.holds(n, e)) continue;
                const float sim = similarity(s[n][e], rows[half].scale, tile.terms[column].scale);
                detail.above[half] += sim > positive[half];
                detail.ties[half] += sim == positive[half];
            }
        }
    }

    // The same where rows have several positives: each has a place in memory, to which one thread of the row's four adds.
    __device__ __forceinline__ void count_ranks(const float (&s)[8][4], const Tile& tile, const RowTerm (&rows)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t first = first_pair(half), end = end_pair(half);
#pragma unroll 1
            for (int64_t pair = first; __any_sync(~0u, pair < end); ++pair) {
                const float positive = pair < end ? p.positive_z[pair] : INFINITY;
                uint32_t above = 0, ties = 0;
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int n = i / 2, e = 2 * half + i % 2, column = c_column(lane, n, e);
                    if (tile.first_column + column >= p.y_rows || tile.mask.holds(n, e)) continue;
                    const float sim = similarity(s[n][e], rows[half].scale, tile.terms[column].scale);
                    above += sim > positive;
                    ties += sim == positive;
                }
                above = sum_of_quad(above);
                ties = sum_of_quad(ties);
                if (pair >= end || lane % 4 != 0) continue;
                p.above[rank_slot(pair)] += above;
                p.ties[rank_slot(pair)] += ties;
            }
        }
    }

    __device__ __forceinline__ void clear_ranks() const {
        if (lane % 4 != 0) return;
        for (int half = 0; half < 2; ++half) {
            for (int64_t pair = first_pair(half); pair < end_pair(half); ++pair) p.above[rank_slot(pair)] = p.ties[rank_slot(pair)] = 0;
        }
    }

    __device__ __forceinline__ int64_t first_pair(int half) const { return row(half) < p.x_rows ? p.pair_offsets[row(half)] : 0; }
    __device__ __forceinline__ int64_t end_pair(int half) const { return row(half) < p.x_rows ? p.pair_offsets[row(half) + 1] : 0; }
    __device__ __forceinline__ uint64_t rank_slot(int64_t pair) const { return uint64_t(p.first_split + blockIdx.y) * p.pairs + pair; }

    // Moments of a tile, relative to the maximum that the row has with it.
    __device__ __forceinline__ void add_moments(const float (&s)[8][4], const float (&z)[8][4], const Tile& tile,
                                                const RowTerm (&rows)[2], const float (&origin)[2], Detail& detail) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = c_column(lane, n, e), half = e / 2;
                const float distance = z[n][e] - origin[half];
                const float probability = ptx::exp2(distance);
                if (probability == 0.0f) continue;  // masked: 0 · ∞ must not enter
                detail.sum_score[half] += probability * similarity(s[n][e], rows[half].scale, tile.terms[column].scale);
                detail.sum_z[half] += probability * distance;
            }
        }
    }

    __device__ __forceinline__ void run_paired() {
        start();
        uint32_t stage = 0;
        for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
            ColumnTerm* terms = shared->terms[tile % 2];
            load_columns(tile, terms);
            float s[8][4] = {};
            dots(s, stage);
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int column = c_column(lane, n, e);
                    const uint32_t index = row(e / 2);
                    if (index < p.x_rows && tile * BLOCK_Y + column == index) {
                        const uint32_t query = p.x_indices ? p.x_indices[index] : index;
                        p.max[index] = similarity(s[n][e], p.x_terms[query].scale, terms[column].scale);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void run() {
        RowTerm rows[2];
        float positive[2];
        RowState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        Detail detail = {};
        uint32_t masked[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool present = row(half) < p.x_rows;
            rows[half] = present ? p.x_terms[row(half)] : RowTerm{0.0f, 0.0f};
            positive[half] = MODE == Mode::DETAIL && present && !p.pair_offsets ? p.positive_z[row(half)] : 0.0f;
            // The terms hold the shift.
            if (!p.online) state.max[half] = 0.0f;
        }
        float o[HAS_OUTPUT ? OUTPUT_CHUNKS * TILES_PER_CHUNK : 1][4] = {};
        if (MODE == Mode::DETAIL && p.pair_offsets) clear_ranks();
        start();
        uint32_t stage = 0;
        for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
            ColumnTerm* terms = shared->terms[tile % 2];
            load_columns(tile, terms);
            float s[8][4] = {};
            dots(s, stage);
            const bool is_special = special(tile, terms);
            const bool is_spoiled = HAS_OUTPUT && is_special && __syncthreads_or(own_column_spoiled(terms));
            Tile of_scores(p, terms, tile * BLOCK_Y, row(0), lane);
            if (is_special) {
                of_scores.look();
                if (p.bounds) of_scores.filter(s, rows);
                // Each of a row's four lanes has some of its columns.
                masked[0] += of_scores.mask.count(0);
                masked[1] += of_scores.mask.count(1);
            }
            float raw[8][4];
            if (MODE == Mode::DETAIL) {
                if (p.pair_offsets) count_ranks(s, of_scores, rows);
                else count_rank(s, of_scores, rows, positive, detail);
#pragma unroll
                for (int i = 0; i < 32; ++i) raw[i / 4][i % 4] = s[i / 4][i % 4];
            }
            of_scores.scores(s, rows);
            if (is_special && of_scores.found()) of_scores.drop(s);
            if (p.online) rescale(s, of_scores, state, detail, o);
            const float origin[2] = {subtrahend(state.max[0]), subtrahend(state.max[1])};
            if (MODE == Mode::DETAIL) add_moments(raw, s, of_scores, rows, origin, detail);
            of_scores.probabilities(s, origin, state.sum);
            if (HAS_OUTPUT && is_special && of_scores.found()) of_scores.mend(s, origin);
#pragma unroll
            for (int chunk = 0; chunk < OUTPUT_CHUNKS; ++chunk) {
                wait();
                if (is_spoiled) clear_spoiled(ring_y + stage * Y_CHUNK, terms);
                Fragments<Element>::multiply_output(&o[chunk * TILES_PER_CHUNK], s, ring_y + stage * Y_CHUNK, lane);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
            }
        }
        ptx::cp_async_wait<0>();
        write(state, detail, masked, o);
    }

    // [3]
    template <int COUNT>
    __device__ __forceinline__ void rescale(const float (&z)[8][4], const Tile& tile, RowState& state, Detail& detail,
                                            float (&o)[COUNT][4]) {
        float factor[2];
        const float before[2] = {state.max[0], state.max[1]};
        tile.advance_max(z, HAS_OUTPUT ? HEADROOM<Element> : 0.0f, state, factor);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (MODE == Mode::DETAIL && before[half] != -INFINITY) {
                detail.sum_z[half] = factor[half] * (detail.sum_z[half] + (before[half] - state.max[half]) * state.sum[half]);
                detail.sum_score[half] *= factor[half];
            }
            state.sum[half] *= factor[half];
        }
        if (HAS_OUTPUT) {
#pragma unroll
            for (int n = 0; n < COUNT; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) o[n][e] *= factor[e / 2];
            }
        }
    }

    template <int COUNT>
    __device__ __forceinline__ void write(const RowState& state, const Detail& detail, const uint32_t (&masked)[2],
                                          const float (&o)[COUNT][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_quad(state.sum[half]);
            const float sum_score = sum_of_quad(detail.sum_score[half]), sum_z = sum_of_quad(detail.sum_z[half]);
            const uint32_t above = sum_of_quad(detail.above[half]), ties = sum_of_quad(detail.ties[half]);
            const uint32_t rejected = sum_of_quad(masked[half]);
            if (row(half) >= p.x_rows) continue;
            const uint64_t slot = uint64_t(p.first_split + blockIdx.y) * p.x_rows + row(half);
            if (lane % 4 == 0 && blockIdx.z == 0) {
                p.max[slot] = p.online ? state.max[half] : p.shift;
                if (MODE != Mode::GRADIENT) {
                    p.sum[slot] = sum;
                    p.masked[slot] = rejected;
                }
                if (MODE == Mode::DETAIL) {
                    p.sum_score[slot] = sum_score;
                    p.sum_z[slot] = sum_z;
                    if (p.pair_offsets) continue;
                    p.above[slot] = above;
                    p.ties[slot] = ties;
                }
            }
            if (!HAS_OUTPUT) continue;
            const uint32_t first = blockIdx.z * OUTPUT_CHUNKS * Fragments<Element>::ELEMENTS_PER_CHUNK + lane % 4 * 2;
            float* to = p.output + slot * p.dim;
#pragma unroll
            for (int n = 0; n < COUNT; ++n) {
                const uint32_t column = first + 8 * n;
                if (column < p.dim) to[column] = o[n][2 * half];
                if (column + 1 < p.dim) to[column + 1] = o[n][2 * half + 1];
            }
        }
    }
};

template <typename Element, Mode MODE, int OUTPUT_CHUNKS>
__device__ __forceinline__ void stream(const StreamParams& p) {
    extern __shared__ __align__(1024) char memory[];
    Stream<Element, MODE, OUTPUT_CHUNKS> stream(p, memory);
    if constexpr (MODE == Mode::PAIRED) stream.run_paired();
    else stream.run();
}

}  // namespace

#define KERNEL(name, element, mode, chunks)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) stream_##name(const __grid_constant__ StreamParams p) {    \
        stream<element, Mode::mode, chunks>(p);                                                                       \
    }

// Outputs of 64, 128 and 256 columns at a time for 16-bit types, 32, 64 and 128 for f32.
#define KERNELS(type, element)                                 \
    KERNEL(statistics_##type, element, STATISTICS, 0)          \
    KERNEL(detail_##type, element, DETAIL, 0)                  \
    KERNEL(paired_##type, element, PAIRED, 0)                  \
    KERNEL(expected_1_##type, element, EXPECTED, 1)            \
    KERNEL(expected_2_##type, element, EXPECTED, 2)            \
    KERNEL(expected_4_##type, element, EXPECTED, 4)            \
    KERNEL(gradient_1_##type, element, GRADIENT, 1)            \
    KERNEL(gradient_2_##type, element, GRADIENT, 2)            \
    KERNEL(gradient_4_##type, element, GRADIENT, 4)

KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
KERNELS(f32, float)
KERNELS(tf32, Tf32)
