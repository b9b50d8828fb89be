// A panel of probabilities of wide rows (more than 256 elements of 16 bits) on Hopper, the first of an output's two matmuls:
//
//   P_xy = 2^(z_xy − m) y.factor,  m = ⌈max of z_xy over y of the tile⌉ − headroom,  sum = Σ_y of the tile 2^(z_xy − m)
//
//   EXPECTED   x = queries,    y = candidates        GRADIENT   x = candidates, y = queries         (terms.cuh says what z and factor hold)
//
// Shapes: x and y of `dim` elements, by tensor maps; P, m and sum of the launch's rows and tiles as wide_params.h says.
// wide_output_sm90a.cu multiplies the panel with Y. Storing it costs 2 bytes a pair, to a cache that holds most of it, where computing
// scores again for each 256 columns of the output would cost 2·dim flops.
//
// Method, cost: wide_scores.cuh. A tile's probabilities are relative to a power of two of its own, so that tiles need no order, 16
// bits hold what matters of each, and moving them to a common reference is exact. The rows' largest m so far, over all tiles, is kept
// by an integer maximum, whose result does not depend on the order; masked pairs are counted likewise.
// Numerics, determinism: as in stream_sm80.cu. Of f16's headroom (score.cuh) one half is in P, the other in what moves
// it to the common reference: both are operands of 16 bits.
// Tests: tests/gpu.rs on compute capability 9.0.
#include "hopper/wide_scores.cuh"

namespace {

using Shape = WideShape<ColumnTerm, 1>;

template <typename Element, Mode MODE>
struct Panel {
    static constexpr int TILES = WIDE_BLOCK_Y / 8;
    static constexpr int STEPS_PER_TILE = TILES / 2;
    using Tile = ScoreTile<MODE, TILES, ColumnTerm>;

    const WideParams& h;
    const StreamParams& p;
    int lane;
    RowTerm terms[2][2];

    __device__ __forceinline__ explicit Panel(const WideParams& params) : h(params), p(params.stream), lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void begin(int second, const WideTiles& tiles) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t index = tiles.first_x() + wide_row(second) + 8 * half;
            terms[second][half] = index < p.x_rows ? p.x_terms[index] : RowTerm{0.0f, 0.0f};
        }
    }

    __device__ __forceinline__ void end(int, const WideTiles&) {}

    __device__ __forceinline__ void tile(float (&dots)[TILES][4], int second, const WideTiles& tiles, const ColumnTerm* columns,
                                         uint32_t flags) {
        if (tiles.tile() >= h.y_tiles) return;
        const uint32_t row = tiles.first_x() + wide_row(second);
        Tile of_scores(p, columns, tiles.first_y(), row, lane);
        of_scores.scores(dots, terms[second]);
        if (flags) {
            of_scores.look();
            if (of_scores.found()) of_scores.drop(dots);
            if (MODE == Mode::EXPECTED) count_masked(of_scores, row);
        }
        RowState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        float unused[2];
        of_scores.advance_max(dots, 0.0f, state, unused);
        state.max[0] = below(ceilf(state.max[0]), HEADROOM<Element> / 2);
        state.max[1] = below(ceilf(state.max[1]), HEADROOM<Element> / 2);
        const float origin[2] = {subtrahend(state.max[0]), subtrahend(state.max[1])};
        of_scores.probabilities(dots, origin, state.sum);
        if (flags) {
            // Again: to keep what was found would spill.
            of_scores.look();
            if (of_scores.found()) of_scores.mend(dots, origin);
        }
        store(dots, second, tiles);
        write(state, row, tiles);
    }

    __device__ __forceinline__ void count_masked(const Tile& of_scores, uint32_t row) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t rejected = sum_of_quad(of_scores.mask.count(half)), index = row + 8 * half;
            if (lane % 4 == 0 && index < p.x_rows && rejected) {
                atomicAdd(&p.masked[uint64_t(p.first_split) * p.x_rows + index], rejected);
            }
        }
    }

    // An accumulator's columns 2t, 2t + 1 of two neighbouring tiles are an operand's.
    __device__ __forceinline__ void store(const float (&s)[TILES][4], int second, const WideTiles& tiles) const {
        const uint32_t local_row = tiles.first_x() - h.x_first * WIDE_BLOCK_X + wide_row(second);
        const uint32_t slab = local_row / SLAB_ROWS, slabs = h.x_blocks * (WIDE_BLOCK_X / SLAB_ROWS);
#pragma unroll
        for (int step = 0; step < STEPS_PER_TILE; ++step) {
            const uint4 fragment = {
                ptx::pack(s[2 * step][0], s[2 * step][1], Element()),
                ptx::pack(s[2 * step][2], s[2 * step][3], Element()),
                ptx::pack(s[2 * step + 1][0], s[2 * step + 1][1], Element()),
                ptx::pack(s[2 * step + 1][2], s[2 * step + 1][3], Element()),
            };
            const uint64_t chunk = tiles.tile() * (WIDE_BLOCK_Y / PANEL_CHUNK_ROWS) + step / PANEL_STEPS;
            char* to = h.panel + panel_slab(chunk, slab, slabs) + slab_fragment(step % PANEL_STEPS, lane);
            *reinterpret_cast<uint4*>(to) = fragment;
        }
    }

    __device__ __forceinline__ void write(const RowState& state, uint32_t row, const WideTiles& tiles) const {
        const uint64_t rows = uint64_t(h.x_blocks) * WIDE_BLOCK_X;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_quad(state.sum[half]);
            const uint32_t index = row + 8 * half;
            if (lane % 4 != 0 || index >= p.x_rows) continue;
            const uint32_t local = index - h.x_first * WIDE_BLOCK_X;
            h.tile_max[tiles.tile() * rows + local] = state.max[half];
            h.tile_sum[tiles.tile() * rows + local] = sum;
            atomicMax(&h.reference[local], max(h.reference_before[local], ordered(state.max[half])));
        }
    }
};

}  // namespace

#define KERNEL(name, element, mode)                                                                                                \
    extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)                                         \
        stream_hopper_##name(const __grid_constant__ WideParams h) {                                                              \
        wide_scores<element, Mode::mode, Shape, Panel<element, Mode::mode>>(h, h.stream.y_terms);                                  \
    }

KERNEL(wide_expected_f16, __half, EXPECTED)
KERNEL(wide_expected_bf16, __nv_bfloat16, EXPECTED)
KERNEL(wide_gradient_f16, __half, GRADIENT)
KERNEL(wide_gradient_bf16, __nv_bfloat16, GRADIENT)
