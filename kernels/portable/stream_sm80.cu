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
//     leaves m where no score is above it, and statistics do while no sum has become large (`has_outgrown`): m' is found where it has to be.
// [4] Y comes a second time, its columns [first, first + OUTPUT_CHUNKS chunks) only: blockIdx.z is the slice of columns. Rows of up to 256
//     bytes stay in the ring instead, and [1] to [4] are done for half of the tile's rows, then for the other half (TILES).
//     P is multiplied by y.factor, rounded to Y's type (f32: split in two, fragments.cuh) and never leaves registers.
//
// f32 is multiplied by plain multiply-adds where these take less time than tensor cores (plain.cuh).
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
        Base::own_column_spoiled, Base::start, Base::terms_of, Base::wait, Base::wait_for_tile;
    using Base::add_moments, Base::clear_ranks, Base::keep_max, Base::load_max, Base::load_rows, Base::look, Base::move_max, Base::new_slab,
        Base::rank, Base::write;
    using Base::BELOW, Base::HAS_OUTPUT, Base::HOLDS_TILE, Base::TILES;
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
            wait_for_tile(tile);
            dots(s, 0, stage);
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
            if (wait_for_tile(tile)) {
#pragma unroll 1
                for (int first = 0; first < BLOCK_Y; first += 8 * TILES) add<true>(tile, first, stage, slabs, o);
            } else {
#pragma unroll 1
                for (int first = 0; first < BLOCK_Y; first += 8 * TILES) add<false>(tile, first, stage, slabs, o);
            }
            if (HOLDS_TILE) stage = after(stage);
        }
        ptx::cp_async_wait<0>();
        if constexpr (HAS_OUTPUT) Fragments<Element>::settle_output(o, lane);
#pragma unroll
        for (int i = 0; i < SLABS; ++i) write(slabs[i], o[i]);
    }

    // [1] to [4] for a tile's streamed rows from `first` on, as many as a warp has scores of at a time.
    template <bool IS_SPECIAL>
    __device__ __forceinline__ void add(uint32_t tile, int first, uint32_t& stage, Slab (&slabs)[SLABS],
                                        float (&o)[SLABS][OUTPUT_TILES][4]) {
        float s[SLABS][TILES][4];
        dots(s, first, stage);
        const bool is_spoiled = HAS_OUTPUT && IS_SPECIAL && first == 0 && __syncthreads_or(own_column_spoiled(terms_of(tile)));
        if (IS_SPECIAL) {
            // Slab after slab: what is special takes registers.
#pragma unroll
            for (int i = 0; i < SLABS; ++i) weigh<true, 1>(s, i, tile, first, slabs, o);
        } else {
            weigh<false, SLABS>(s, 0, tile, first, slabs, o);
        }
#pragma unroll
        for (int chunk = 0; chunk < OUTPUT_CHUNKS; ++chunk) {
            // The tile is there already, or its chunk comes again.
            if (!HOLDS_TILE) wait();
            const uint32_t from = chunk_of(stage, HOLDS_TILE ? chunk : 0);
            if (is_spoiled) clear_spoiled(from, terms_of(tile));
            Fragments<Element>::multiply_output(o, chunk * TILES_PER_CHUNK, s, from + first * CHUNK_BYTES, lane, [&] {
                if (!HOLDS_TILE) fill(before(stage));
            });
            if (!HOLDS_TILE) stage = after(stage);
        }
    }

    // [2] and [3] for COUNT slabs from `slab` on: P in place of dots. What columns bring is loaded once for all of them.
    template <bool IS_SPECIAL, int COUNT>
    __device__ __forceinline__ void weigh(float (&s)[SLABS][TILES][4], int slab, uint32_t number, int first, Slab (&slabs)[SLABS],
                                          float (&o)[SLABS][OUTPUT_TILES][4]) {
        const uint32_t first_row = IS_SPECIAL ? ptx::opaque(slabs[slab].first_row) : slabs[slab].first_row;
        Tile tile(p, terms_of(number) + first, number * BLOCK_Y + first, first_row, lane);
        float raw[TILES][4], origin[COUNT][2] = {}, sum[COUNT][2] = {};
        const bool is_found = IS_SPECIAL && look(s[slab], tile, slabs[slab]);
        if constexpr (MODE == Mode::DETAIL) rank(s[slab], tile, slabs[slab], raw);
        if constexpr (MODE == Mode::STATISTICS && !IS_SPECIAL) {
            if (sum_at_once(s, tile.terms, slabs)) return;
        } else {
            score_slabs<COUNT>(s, slab, tile.terms, slabs);
        }
        if (is_found) tile.drop(s[slab]);
        if (p.online) rescale<COUNT>(s, slab, slabs, o, origin);
        if constexpr (MODE == Mode::DETAIL) add_moments(raw, s[slab], tile, origin[0], slabs[slab]);
        // A tile's own sum first: fewer, larger terms round less.
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            float2 pair[2] = {};
            if (HAS_OUTPUT) load_pair(factors_of(number) + first, c_column(lane, n, 0), pair);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) Tile::probabilities(s[slab + i][n], origin[i], pair, sum[i]);
        }
#pragma unroll
        for (int i = 0; i < 2 * COUNT; ++i) slabs[slab + i / 2].state.sum[i % 2] += sum[i / 2][i % 2];
        if (HAS_OUTPUT && is_found) tile.mend(s[slab], origin[0]);
    }

    // Scores in place of dots.
    template <int COUNT>
    __device__ __forceinline__ void score_slabs(float (&s)[SLABS][TILES][4], int slab, const RowTerm* terms, const Slab (&slabs)[SLABS]) {
        RowTerm rows[COUNT][2];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) load_rows(slabs[slab + i], rows[i]);
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(terms, c_column(lane, n, 0), pair);
#pragma unroll
            for (int i = 0; i < COUNT; ++i) Tile::scores(s[slab + i][n], rows[i], pair);
        }
    }

    // Scores in place of dots, and their sums, score by score: exponentials begin with the first. False where a maximum has to move first;
    // then nothing has been added.
    __device__ __forceinline__ bool sum_at_once(float (&s)[SLABS][TILES][4], const RowTerm* terms, Slab (&slabs)[SLABS]) {
        float origin[SLABS][2], sum[SLABS][2] = {};
        const float2 no_factors[2] = {};
#pragma unroll
        for (int i = 0; i < 2 * SLABS; ++i) origin[i / 2][i % 2] = subtrahend(slabs[i / 2].state.max[i % 2]);
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(terms, c_column(lane, n, 0), pair);
#pragma unroll
            for (int i = 0; i < SLABS; ++i) {
                Tile::scores(s[i][n], slabs[i].rows, pair);
                Tile::probabilities(s[i][n], origin[i], no_factors, sum[i]);
            }
        }
        if (p.online) {
            bool moves = false;
#pragma unroll
            for (int i = 0; i < SLABS; ++i) moves |= Tile::has_outgrown(sum[i], slabs[i].state);
            if (__any_sync(~0u, moves)) return false;
        }
#pragma unroll
        for (int i = 0; i < 2 * SLABS; ++i) slabs[i / 2].state.sum[i % 2] += sum[i / 2][i % 2];
        return true;
    }

    // [3] COUNT slabs from `slab` on move to the maxima that their rows have with these scores. `origin`: what is subtracted from scores.
    template <int COUNT>
    __device__ __forceinline__ void rescale(const float (&z)[SLABS][TILES][4], int slab, Slab (&slabs)[SLABS],
                                            float (&o)[SLABS][OUTPUT_TILES][4], float (&origin)[COUNT][2]) {
        float largest[COUNT][2];
        bool moves = false;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            load_max(slabs[slab + i]);
            Tile::find_largest(z[slab + i], largest[i]);
            moves |= Tile::is_above(largest[i], BELOW, slabs[slab + i].state);
        }
        if (__any_sync(~0u, moves)) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                float factor[2];
                move_max(largest[i], slabs[slab + i], factor);
                keep_max(slabs[slab + i]);
                Fragments<Element>::to_output_rows(factor, lane);
#pragma unroll
                for (int n = 0; n < (HAS_OUTPUT ? OUTPUT_TILES * 4 : 0); ++n) o[slab + i][n / 4][n % 4] *= factor[n % 4 / 2];
            }
        }
#pragma unroll
        for (int i = 0; i < 2 * COUNT; ++i) origin[i / 2][i % 2] = subtrahend(slabs[slab + i / 2].state.max[i % 2]);
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
// for 16-bit types, 32, 64 and 128 for f32. `blocks`: of statistics and the narrowest outputs. `slabs`: of outputs of two chunks, which
// have as many blocks. Plain products of f32 leave no registers for two.
#define KERNELS(type, element, blocks, slabs)                    \
    KERNEL(statistics_##type, element, STATISTICS, 0, 2, blocks) \
    KERNEL(detail_##type, element, DETAIL, 0, 1, 1)              \
    KERNEL(paired_##type, element, PAIRED, 0, 1, 1)              \
    KERNEL(expected_1_##type, element, EXPECTED, 1, 2, blocks)   \
    KERNEL(expected_2_##type, element, EXPECTED, 2, slabs, slabs) \
    KERNEL(expected_4_##type, element, EXPECTED, 4, 1, 1)        \
    KERNEL(gradient_1_##type, element, GRADIENT, 1, 2, blocks)   \
    KERNEL(gradient_2_##type, element, GRADIENT, 2, slabs, slabs) \
    KERNEL(gradient_4_##type, element, GRADIENT, 4, 1, 1)

KERNELS(f16, __half, 3, 2)
KERNELS(bf16, __nv_bfloat16, 3, 2)
KERNELS(f32, float, 2, 1)
KERNELS(tf32, Tf32, 2, 1)
