// One streaming pass over a B x N table of scores that never exists, in four modes, on tensor cores of sm_80 and later.
//
//   z_xy = (x · y) · x.scale · y.scale + x.bias + y.bias                                     (units of log 2)
//
//   mode        stationary x   streamed y             result for each x
//   STATISTICS  queries        candidates             max z, Σ 2^(z − max)
//   EXPECTED    queries        candidates             the same, and Σ 2^(z − max) y / |y|
//   DETAIL      queries        candidates             as STATISTICS, and Σ 2^(z − max) s, Σ 2^(z − max) (z − max), rank
//   GRADIENT    candidates     queries                Σ coefficient · y / |y|, coefficient = d_lse · 2^(z − lse)
//   PAIRED      queries        each row's positive    (x · y) · x.scale · y.scale of pairs with equal index
//   TOP_K       queries        candidates             the K largest (x · y) · x.scale · y.scale that are not masked (best.cuh)
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
// [1] Chunks come through a ring of STAGES buffers by cp.async, STAGES − 1 ahead, across tiles. X stays in shared memory
//     where it fits (p.x_resident); else its chunks come through the ring again with each tile. So any D works.
// [2] Only tiles that may hold a masked pair look for them (tile_mask.cuh).
// [3] Where the caller bounds z (p.online == 0), m is 0, as biases hold the shift, and nothing is rescaled. A row's columns are spread over
//     four lanes, whose sums meet at the end.
// [4] Y comes a second time, its columns [first, first + OUTPUT_CHUNKS chunks) only: blockIdx.z is the slice of columns.
//     P is multiplied by y.factor, rounded to Y's type (f32: split in two, fragments.cuh) and never leaves registers.
//
// Numerics: products and sums in f32. P of 16-bit types is rounded relative to the row's maximum. Sums run in the order of
// tiles: results are bitwise reproducible and independent of the grid but for the splits, which merge.cu merges in order.
// Cost of a tile: 2·128·64·D flops, as many again with an output; 128·64 exponentials; from L2 64·D elements, with an
// output twice, and 128·D where X does not fit. Shared memory: see SharedStorage and tiling.rs.
// Tests: tests/gpu.rs, against the float64 reference.
#include "best.cuh"
#include "chunks.cuh"
#include "score.cuh"
#include "topk_params.h"

namespace {

constexpr int BLOCK_X = 128;
constexpr int BLOCK_Y = 64;
constexpr int THREADS = 256;
constexpr int STAGES = 3;
constexpr int X_CHUNK = BLOCK_X * CHUNK_BYTES;
constexpr int Y_CHUNK = BLOCK_Y * CHUNK_BYTES;
static_assert(BLOCK_X == THREADS / 32 * 16, "a warp has 16 stationary rows");
static_assert(BLOCK_Y == 64, "fragments.cuh is written for 64 columns");

// Behind the chunks in dynamic shared memory: what tiles' columns bring to the scores; two of them, as warps may be a tile apart.
struct SharedStorage {
    ColumnTerm terms[2][BLOCK_Y];
};
static_assert(sizeof(SharedStorage) == 2048, "the host counts it");

struct Detail {
    float sum_score[2];
    float sum_z[2];
    uint32_t above[2];
    uint32_t ties[2];
};

template <typename Element, Mode MODE, int OUTPUT_CHUNKS>
struct Stream {
    static constexpr bool HAS_OUTPUT = OUTPUT_CHUNKS > 0;
    static constexpr bool X_IS_QUERIES = MODE != Mode::GRADIENT;
    static constexpr int TILES_PER_CHUNK = Fragments<Element>::TILES_PER_CHUNK;
    using Tile = ScoreTile<MODE, BLOCK_Y / 8, ColumnTerm>;
    static_assert(HAS_OUTPUT == (MODE == Mode::EXPECTED || MODE == Mode::GRADIENT), "these two have an output");
    static_assert(TILES_PER_CHUNK * 8 == Fragments<Element>::ELEMENTS_PER_CHUNK, "an output tile is 8 columns wide");

    const StreamParams& p;
    Rows<Element> x, y;
    uint32_t x_chunks, ring_x, ring_y;  // shared-memory addresses
    SharedStorage* shared;
    uint32_t first_x, first_tile, end_tile, chunks;
    // The next chunk to be copied: step `fill_step` of tile `fill_tile`.
    uint32_t fill_tile, fill_step, fill_stage;
    int lane, warp_row;
    Hits own_hits;  // GRADIENT: of the candidate first_x + threadIdx.x

    __device__ __forceinline__ Stream(const StreamParams& params, char* memory) : p(params) {
        x = {static_cast<const Element*>(p.x), nullptr, p.x_stride, p.x_rows, p.dim, p.aligned != 0};
        y = {static_cast<const Element*>(p.y), p.y_addresses, p.y_stride, p.y_rows, p.dim, p.aligned != 0};
        chunks = (p.dim + Fragments<Element>::ELEMENTS_PER_CHUNK - 1) / Fragments<Element>::ELEMENTS_PER_CHUNK;
        x_chunks = ptx::smem_address(memory);
        const uint32_t x_bytes = (p.x_resident ? chunks : STAGES) * X_CHUNK;
        ring_x = x_chunks;
        ring_y = x_chunks + x_bytes;
        shared = reinterpret_cast<SharedStorage*>(memory + x_bytes + STAGES * Y_CHUNK);
        first_x = blockIdx.x * BLOCK_X;
        const uint32_t tiles = (p.y_rows + BLOCK_Y - 1) / BLOCK_Y;
        // PAIRED: the tiles with the block's own rows.
        first_tile = MODE == Mode::PAIRED ? first_x / BLOCK_Y : blockIdx.y * p.tiles_per_split;
        const uint32_t count = MODE == Mode::PAIRED ? BLOCK_X / BLOCK_Y : p.tiles_per_split;
        end_tile = min(first_tile + count, tiles);
        fill_tile = first_tile;
        fill_step = fill_stage = 0;
        lane = threadIdx.x % 32;
        warp_row = threadIdx.x / 32 * 16;
        own_hits = {1, 0, 0};
        if (!X_IS_QUERIES && p.hits && threadIdx.x < BLOCK_X && first_x + threadIdx.x < p.x_rows) {
            own_hits = p.hits[first_x + threadIdx.x];
        }
    }

    __device__ __forceinline__ uint32_t row(int half) const { return first_x + warp_row + c_row(lane, half); }

    // Starts the copies of the next step, if there is one; always one group of copies, so that groups count steps.
    __device__ __forceinline__ void fill() {
        if (fill_tile < end_tile) {
            const uint32_t to_y = ring_y + fill_stage * Y_CHUNK;
            if (fill_step < chunks) {
                y.template copy_chunk<BLOCK_Y, THREADS>(to_y, fill_tile * BLOCK_Y, fill_step);
                if (!p.x_resident) {
                    x.template copy_chunk<BLOCK_X, THREADS>(ring_x + fill_stage * X_CHUNK, first_x, fill_step);
                }
            } else {
                const uint32_t chunk = blockIdx.z * OUTPUT_CHUNKS + fill_step - chunks;
                y.template copy_chunk<BLOCK_Y, THREADS>(to_y, fill_tile * BLOCK_Y, chunk);
            }
            if (++fill_step == chunks + OUTPUT_CHUNKS) {
                fill_step = 0;
                ++fill_tile;
            }
        }
        fill_stage = fill_stage + 1 == STAGES ? 0 : fill_stage + 1;
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ void start() {
        if (p.x_resident) {
            for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
                x.template copy_chunk<BLOCK_X, THREADS>(x_chunks + chunk * X_CHUNK, first_x, chunk);
            }
        }
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) fill();
    }

    // Waits for the next chunk in the ring, and refills the stage that all threads have left.
    __device__ __forceinline__ void wait() {
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads();
        fill();
    }

    __device__ __forceinline__ void load_columns(uint32_t tile, ColumnTerm* terms) const {
        if (threadIdx.x >= BLOCK_Y) return;
        const uint32_t index = tile * BLOCK_Y + threadIdx.x;
        // What is not there has probability 0.
        terms[threadIdx.x] = index < p.y_rows ? p.y_terms[index] : ColumnTerm{0.0f, -INFINITY, 0.0f, 0.0f};
    }

    // Whether the tile may hold a masked pair or a streamed row that is not finite. The same for all threads. (A positive that is a
    // candidate is a masked pair.)
    __device__ __forceinline__ bool special(uint32_t tile, const ColumnTerm* terms) const {
        bool mine = own_column_spoiled(terms);
        const uint32_t index = tile * BLOCK_Y + threadIdx.x;
        if (X_IS_QUERIES && p.hits && threadIdx.x < BLOCK_Y && index < p.y_rows) mine |= overlaps(p.hits[index], first_x, BLOCK_X);
        if (!X_IS_QUERIES) mine |= overlaps(own_hits, tile * BLOCK_Y, BLOCK_Y);
        return __syncthreads_or(mine);
    }

    // Of the column that this thread loaded.
    static __device__ __forceinline__ bool own_column_spoiled(const ColumnTerm* terms) {
        return threadIdx.x < BLOCK_Y && spoiled(terms[threadIdx.x].scale);
    }

    // Rows that are not finite, in a chunk for the output: 0 · NaN of a masked pair must not enter it. Where a pair is not masked
    // its probability is NaN.
    __device__ __forceinline__ void clear_spoiled(uint32_t y_chunk, const ColumnTerm* terms) const {
        for (uint32_t place = threadIdx.x; place < BLOCK_Y * UNITS; place += THREADS) {
            if (!spoiled(terms[copy_row(place)].scale)) continue;
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(y_chunk + swizzle(copy_row(place), copy_unit(place))), "r"(0)
                         : "memory");
        }
        __syncthreads();
    }

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
                        p.max[index] = similarity(s[n][e], p.x_terms[index].scale, terms[column].scale);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ void run_top_k(const TopKParams& top) {
        const uint64_t slot = uint64_t(p.first_split + blockIdx.y) * p.x_rows + row(0);
        BestRows<BLOCK_Y / 8> best(top.keys + slot * top.capacity, top.k, top.capacity, row(0), p.x_rows, lane);
        float scale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) scale[half] = row(half) < p.x_rows ? p.x_terms[row(half)].scale : 0.0f;
        start();
        uint32_t stage = 0;
        for (uint32_t tile = first_tile; tile < end_tile; ++tile) {
            ColumnTerm* terms = shared->terms[tile % 2];
            load_columns(tile, terms);
            float s[8][4] = {};
            dots(s, stage);
            Tile of_scores(p, terms, tile * BLOCK_Y, row(0), lane);
            if (special(tile, terms)) of_scores.look();
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

    // s += X Yᵀ, from the ring's next chunks.
    __device__ __forceinline__ void dots(float (&s)[8][4], uint32_t& stage) {
        for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
            wait();
            const uint32_t from_x = p.x_resident ? x_chunks + chunk * X_CHUNK : ring_x + stage * X_CHUNK;
            Fragments<Element>::multiply_scores(s, from_x, warp_row, ring_y + stage * Y_CHUNK, lane);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
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
            positive[half] = MODE == Mode::DETAIL && present ? p.positive_z[row(half)] : 0.0f;
            // The terms hold the shift.
            if (!p.online) state.max[half] = 0.0f;
        }
        float o[HAS_OUTPUT ? OUTPUT_CHUNKS * TILES_PER_CHUNK : 1][4] = {};
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
                // Each of a row's four lanes has some of its columns.
                masked[0] += of_scores.mask.count(0);
                masked[1] += of_scores.mask.count(1);
            }
            float raw[8][4];
            if (MODE == Mode::DETAIL) {
                count_rank(s, of_scores, rows, positive, detail);
#pragma unroll
                for (int i = 0; i < 32; ++i) raw[i / 4][i % 4] = s[i / 4][i % 4];
            }
            of_scores.scores(s, rows);
            if (is_special) of_scores.drop(s);
            if (p.online) rescale(s, of_scores, state, detail, o);
            const float origin[2] = {subtrahend(state.max[0]), subtrahend(state.max[1])};
            if (MODE == Mode::DETAIL) add_moments(raw, s, of_scores, rows, origin, detail);
            of_scores.probabilities(s, origin, state.sum);
            if (HAS_OUTPUT && is_special) of_scores.mend(s, origin);
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
    __device__ __forceinline__ void rescale(const float (&z)[8][4], const Tile& tile, RowState& state, Detail& detail, float (&o)[COUNT][4]) {
        float factor[2];
        const float before[2] = {state.max[0], state.max[1]};
        tile.advance_max(z, state, factor);
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
                if (X_IS_QUERIES) {
                    p.sum[slot] = sum;
                    p.masked[slot] = rejected;
                }
                if (MODE == Mode::DETAIL) {
                    p.sum_score[slot] = sum_score;
                    p.sum_z[slot] = sum_z;
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

#define TOP_K_KERNEL(type, element)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) stream_topk_##type(const __grid_constant__ TopKParams p) { \
        extern __shared__ __align__(1024) char memory[];                                                              \
        Stream<element, Mode::TOP_K, 0> stream(p.stream, memory);                                                     \
        stream.run_top_k(p);                                                                                          \
    }

// Outputs of 64, 128 and 256 columns at a time for 16-bit types, 32, 64 and 128 for f32.
#define KERNELS(type, element)                                 \
    TOP_K_KERNEL(type, element)                                \
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
