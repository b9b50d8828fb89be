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
// [3] Where the caller bounds z (p.online == 0), m is 0, as biases hold the shift, and nothing is rescaled. Four lanes share a row. A warp
//     whose rows all keep their maximum rescales no O, which would multiply it by 1.
// [4] Y comes a second time, its columns [first, first + OUTPUT_CHUNKS chunks) only: blockIdx.z is the slice of columns. Rows of up to 256
//     bytes stay in the ring instead.
//     P is multiplied by y.factor, rounded to Y's type (f32: split in two, fragments.cuh) and never leaves registers.
//
// Numerics: products and sums in f32. P of 16-bit types is rounded relative to the row's maximum; in f16, m is 14 less where there is an
// output (HEADROOM in score.cuh). Sums run in the order of tiles: results are bitwise reproducible and independent of the grid but for
// the splits, which merge.cuh merges in order.
// Cost of a tile: 2·128·64·D flops and 64·D elements from L2, twice that with an output of wide rows; 128·D more where X does not fit;
// 128·64 exp2.
// Tests: tests/gpu.rs, against the float64 reference.
#include "portable/slab_stream.cuh"

namespace {

template <typename Element, Mode MODE, int OUTPUT_CHUNKS, int SLABS>
struct Stream : SlabStream<Element, MODE, OUTPUT_CHUNKS, SLABS> {
    using Base = SlabStream<Element, MODE, OUTPUT_CHUNKS, SLABS>;
    using Base::after, Base::before, Base::chunk_of, Base::clear_spoiled, Base::dots, Base::factors_of, Base::fill, Base::first_row,
        Base::own_column_spoiled, Base::start, Base::terms_of, Base::wait;
    using Base::add_moments, Base::clear_ranks, Base::counts_masked, Base::new_slab, Base::rank, Base::row;
    using Base::HAS_OUTPUT, Base::HOLDS_TILE;
    using Base::first_tile, Base::end_tile, Base::lane, Base::p;
    using typename Base::Tile;
    static constexpr int TILES_PER_CHUNK = Fragments<Element>::TILES_PER_CHUNK;
    static constexpr int OUTPUT_TILES = HAS_OUTPUT ? OUTPUT_CHUNKS * TILES_PER_CHUNK : 1;
    static_assert(HAS_OUTPUT == (MODE == Mode::EXPECTED || MODE == Mode::GRADIENT), "these two have an output");
    static_assert(TILES_PER_CHUNK * 8 == Fragments<Element>::ELEMENTS_PER_CHUNK, "an output tile is 8 columns wide");

    using Base::Base;

    __device__ __forceinline__ void run_paired() {
        start();
        uint32_t stage = 0;
        for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
            float s[SLABS][8][4];
            dots(s, tile, stage);
#pragma unroll
            for (int i = 0; i < SLABS * 32; ++i) {
                const int slab = i / 32, n = i % 32 / 4, e = i % 4, column = c_column(lane, n, e);
                const uint32_t index = first_row(slab) + e / 2 * 8;
                if (index < p.x_rows && tile * BLOCK_Y + column == index) {
                    const uint32_t query = p.x_indices ? p.x_indices[index] : index;
                    p.max[index] = similarity(s[slab][n][e], p.x_terms[query].scale, terms_of(tile)[column].scale);
                }
            }
        }
    }

    __device__ __forceinline__ void run() {
        Slab slabs[SLABS];
        float o[SLABS][OUTPUT_TILES][4] = {};
#pragma unroll
        for (int i = 0; i < SLABS; ++i) {
            slabs[i] = new_slab(i);
            if (MODE == Mode::DETAIL && p.pair_offsets) clear_ranks(slabs[i]);
        }
        start();
        uint32_t stage = 0;
        for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
            float s[SLABS][8][4];
            const bool is_special = dots(s, tile, stage);
            const RowTerm* terms = terms_of(tile);
            const bool is_spoiled = HAS_OUTPUT && is_special && __syncthreads_or(own_column_spoiled(terms));
            weigh(s, tile, is_special, slabs, o);
#pragma unroll
            for (int chunk = 0; chunk < OUTPUT_CHUNKS; ++chunk) {
                // The tile is there already, or its chunk comes again.
                if (!HOLDS_TILE) wait();
                const uint32_t from = chunk_of(stage, HOLDS_TILE ? chunk : 0);
                if (is_spoiled) clear_spoiled(from, terms);
                Fragments<Element>::multiply_output(o, chunk * TILES_PER_CHUNK, s, from, lane, [&] {
                    if (!HOLDS_TILE) fill(before(stage));
                });
                if (!HOLDS_TILE || chunk + 1 == OUTPUT_CHUNKS) stage = after(stage);
            }
        }
        ptx::cp_async_wait<0>();
#pragma unroll
        for (int i = 0; i < SLABS; ++i) write(slabs[i], o[i]);
    }

    __device__ __forceinline__ Tile tile_of(const Slab& slab, uint32_t tile) const {
        return Tile(p, terms_of(tile), tile * BLOCK_Y, slab.first_row, lane);
    }

    // [2] and [3]: P in place of dots. What columns bring is loaded once for all slabs.
    __device__ __forceinline__ void weigh(float (&s)[SLABS][8][4], uint32_t number, bool is_special, Slab (&slabs)[SLABS],
                                          float (&o)[SLABS][OUTPUT_TILES][4]) {
        static_assert(SLABS <= 2, "or more tiles");
        Tile tiles[2] = {tile_of(slabs[0], number), tile_of(slabs[SLABS - 1], number)};
        float raw[SLABS][8][4], origin[SLABS][2] = {}, sum[SLABS][2] = {};
        bool is_found = false;
        if (is_special) {
#pragma unroll
            for (int i = 0; i < SLABS; ++i) is_found |= look(s[i], tiles[i], slabs[i]);
        }
        if (MODE == Mode::DETAIL) {
#pragma unroll
            for (int i = 0; i < SLABS; ++i) rank(s[i], tiles[i], slabs[i], raw[i]);
        }
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            RowTerm pair[2];
            load_pair(terms_of(number), c_column(lane, n, 0), pair);
#pragma unroll
            for (int i = 0; i < SLABS; ++i) Tile::scores(s[i][n], slabs[i].rows, pair);
        }
        if (is_found) {
#pragma unroll
            for (int i = 0; i < SLABS; ++i) tiles[i].drop(s[i]);
        }
        if (p.online) rescale(s, slabs, o, origin);
        if (MODE == Mode::DETAIL) {
#pragma unroll
            for (int i = 0; i < SLABS; ++i) add_moments(raw[i], s[i], tiles[i], origin[i], slabs[i]);
        }
        // A tile's own sum first: fewer, larger terms round less.
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            float2 pair[2] = {};
            if (HAS_OUTPUT) load_pair(factors_of(number), c_column(lane, n, 0), pair);
#pragma unroll
            for (int i = 0; i < SLABS; ++i) Tile::probabilities(s[i][n], origin[i], pair, sum[i]);
        }
#pragma unroll
        for (int i = 0; i < 2 * SLABS; ++i) slabs[i / 2].state.sum[i % 2] += sum[i / 2][i % 2];
        if (HAS_OUTPUT && is_found) {
#pragma unroll
            for (int i = 0; i < SLABS; ++i) tiles[i].mend(s[i], origin[i]);
        }
    }

    // Whether the warp has pairs to drop and to mend in the slab.
    __device__ __forceinline__ bool look(const float (&s)[8][4], Tile& tile, const Slab& slab) {
        tile.look();
        if (p.bounds) tile.filter(s, slab.rows);
        // Each of a row's four lanes has some of its columns. One thread adds them up in memory, which costs no register.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t masked = sum_of_quad(tile.mask.count(half));
            if (masked && row(slab, half) < p.x_rows && counts_masked()) atomicAdd(&p.masked[this->slot(slab, half)], masked);
        }
        return tile.found();
    }

    // [3]
    __device__ __forceinline__ void rescale(const float (&z)[SLABS][8][4], Slab (&slabs)[SLABS], float (&o)[SLABS][OUTPUT_TILES][4],
                                            float (&origin)[SLABS][2]) {
        float factor[SLABS][2];
        bool is_moved = false;
#pragma unroll
        for (int i = 0; i < SLABS; ++i) {
            RowState& state = slabs[i].state;
            Detail& detail = slabs[i].detail;
            const float before[2] = {state.max[0], state.max[1]};
            Tile::advance_max(z[i], HAS_OUTPUT ? HEADROOM<Element> : 0.0f, state, factor[i]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (MODE == Mode::DETAIL && before[half] != -INFINITY) {
                    const float moved = before[half] - state.max[half];
                    detail.sum_z[half] = factor[i][half] * (detail.sum_z[half] + moved * state.sum[half]);
                    detail.sum_score[half] *= factor[i][half];
                }
                state.sum[half] *= factor[i][half];
                is_moved |= factor[i][half] != 1.0f;
                origin[i][half] = subtrahend(state.max[half]);
            }
        }
        if constexpr (HAS_OUTPUT) {
            if (!__any_sync(~0u, is_moved)) return;
#pragma unroll
            for (int i = 0; i < SLABS * OUTPUT_TILES * 4; ++i) {
                const int slab = i / (OUTPUT_TILES * 4), n = i / 4 % OUTPUT_TILES, e = i % 4;
                o[slab][n][e] *= factor[slab][e / 2];
            }
        }
    }

    __device__ __forceinline__ void write(const Slab& slab, const float (&o)[OUTPUT_TILES][4]) {
        const Detail& detail = slab.detail;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_quad(slab.state.sum[half]);
            const float sum_score = sum_of_quad(detail.sum_score[half]), sum_z = sum_of_quad(detail.sum_z[half]);
            const uint32_t above = sum_of_quad(detail.above[half]), ties = sum_of_quad(detail.ties[half]);
            if (row(slab, half) >= p.x_rows) continue;
            const uint64_t slot = this->slot(slab, half);
            if (lane % 4 == 0 && blockIdx.z == 0) {
                p.max[slot] = p.online ? slab.state.max[half] : p.shift;
                if (MODE != Mode::GRADIENT) p.sum[slot] = sum;
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
            for (int n = 0; n < OUTPUT_TILES; ++n) {
                const uint32_t column = first + 8 * n;
                if (column < p.dim) to[column] = o[n][2 * half];
                if (column + 1 < p.dim) to[column + 1] = o[n][2 * half + 1];
            }
        }
    }
};

template <typename Element, Mode MODE, int OUTPUT_CHUNKS, int SLABS>
__device__ __forceinline__ void stream(const StreamParams& p) {
    extern __shared__ __align__(1024) char memory[];
    Stream<Element, MODE, OUTPUT_CHUNKS, SLABS> stream(p, memory);
    if constexpr (MODE == Mode::PAIRED) stream.run_paired();
    else stream.run();
}

}  // namespace

#define KERNEL(name, element, mode, chunks, slabs, blocks)                                                                               \
    extern "C" __global__ void __launch_bounds__(threads_of(slabs), blocks) stream_##name(const __grid_constant__ StreamParams p) {     \
        stream<element, Mode::mode, chunks, slabs>(p);                                                                                  \
    }

// Slabs, and blocks that a multiprocessor is to have registers for: tiling.rs counts them. Outputs of 64, 128 and 256 columns at a time
// for 16-bit types, 32, 64 and 128 for f32.
#define KERNELS(type, element, statistics_blocks)                    \
    KERNEL(statistics_##type, element, STATISTICS, 0, 2, statistics_blocks) \
    KERNEL(detail_##type, element, DETAIL, 0, 1, 1)                  \
    KERNEL(paired_##type, element, PAIRED, 0, 1, 1)                  \
    KERNEL(expected_1_##type, element, EXPECTED, 1, 2, 2)            \
    KERNEL(expected_2_##type, element, EXPECTED, 2, 1, 1)            \
    KERNEL(expected_4_##type, element, EXPECTED, 4, 1, 1)            \
    KERNEL(gradient_1_##type, element, GRADIENT, 1, 2, 2)            \
    KERNEL(gradient_2_##type, element, GRADIENT, 2, 1, 1)            \
    KERNEL(gradient_4_##type, element, GRADIENT, 4, 1, 1)

KERNELS(f16, __half, 3)
KERNELS(bf16, __nv_bfloat16, 3)
KERNELS(f32, float, 2)
KERNELS(tf32, Tf32, 2)
