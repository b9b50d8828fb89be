// Products of f32 by plain multiply-adds, with the interface of fragments.cuh: for devices on which three tf32 products take longer.
//
// A warp multiplies SLABS slabs of 16 stationary rows with 8 · TILES streamed ones. A lane adds up 2 · SLABS rows by 2 · TILES columns of
// scores, then 2 · SLABS rows by 8 columns of each chunk of the output: those that the lane `partner(lane)` has of a tensor core's
// accumulator (layout.h). Neighbours then read the same 16 bytes of X (lane ^ 1) or of Y (lane ^ 2). A load of 16 bytes for which that
// holds takes half the time, by NVIDIA's word for capability 7: shared memory returns 128 bytes a clock, and one copy serves both lanes.
// In the accumulator's own layout neighbours share X alone. Scores go to the accumulator's layout once a tile, the output at the end.
//
// Each score is one chain of fmaf in the order of the elements, so a pair has the same bits whichever side is X.
#pragma once
#include "shared/layout.h"
#include "shared/ptx.cuh"

struct PlainFragments {
    static constexpr int ELEMENTS_PER_CHUNK = CHUNK_BYTES / sizeof(float);
    static constexpr int TILES_PER_CHUNK = ELEMENTS_PER_CHUNK / 8;
    // Operands that are in registers: two on their way.
    static constexpr int AHEAD = 2, HELD = AHEAD + 1;
    // Columns of a chunk of the output that a lane has: those of two units (`plain_column`).
    static constexpr int COLUMNS = 2 * UNIT_BYTES / sizeof(float);

    // Of a place in a chunk in shared memory: the one in the unit of its row whose number differs by this exclusive or.
    static __device__ __forceinline__ uint32_t unit_address(uint32_t address, uint32_t unit) { return address ^ unit * UNIT_BYTES; }

    static __device__ __forceinline__ void load(float (&to)[4], uint32_t address) { ptx::load_shared_4(to, address); }

    // s (slabs x 16 x 8 · TILES, in the partner's place) += x (rows of chunk `x`, from `x_row`) · y (8 · TILES rows of a chunk, from `y`)ᵀ,
    // over the chunk's elements. `meanwhile` is called while the first operands are on their way.
    template <bool X_IS_QUERIES, int SLABS, int TILES, typename Meanwhile>
    static __device__ __forceinline__ void multiply_scores(float (&s)[SLABS][TILES][4], uint32_t x, uint32_t x_row, uint32_t y, int lane,
                                                           Meanwhile meanwhile) {
        constexpr int ROWS = 2 * SLABS, COLUMNS_OF_SCORES = 2 * TILES, LOADS = UNITS * COLUMNS_OF_SCORES;
        const uint32_t from_x = x + swizzle(x_row + c_row(partner(lane), 0), 0);
        const uint32_t from_y[2] = {y + swizzle(c_column(partner(lane), 0, 0), 0), y + swizzle(c_column(partner(lane), 0, 1), 0)};
        float a[2][ROWS][4], b[HELD][4];
        const auto load_a = [&](int unit) {
#pragma unroll
            for (int row = 0; row < ROWS; ++row) load(a[unit % 2][row], unit_address(from_x, unit) + 8 * row * CHUNK_BYTES);
        };
        const auto load_b = [&](int i) {
            const int unit = i / COLUMNS_OF_SCORES, column = i % COLUMNS_OF_SCORES;
            load(b[i % HELD], unit_address(from_y[column % 2], unit) + column / 2 * 8 * CHUNK_BYTES);
        };
        load_a(0);
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load_b(i);
        meanwhile();
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int unit = i / COLUMNS_OF_SCORES, column = i % COLUMNS_OF_SCORES;
            if (i + AHEAD < LOADS) load_b(i + AHEAD);
            if (column == COLUMNS_OF_SCORES - 2 * AHEAD && unit + 1 < UNITS) load_a(unit + 1);
#pragma unroll
            for (int j = 0; j < 4 * ROWS; ++j) {
                const int k = j / ROWS, row = j % ROWS;
                float& sum = s[row / 2][column / 2][row % 2 * 2 + column % 2];
                sum = fmaf(a[unit % 2][row][k], b[i % HELD][k], sum);
            }
        }
    }

    // Scores of a whole tile from the partner's place to the lane's own.
    template <int SLABS, int TILES>
    static __device__ __forceinline__ void settle_scores(float (&s)[SLABS][TILES][4], int lane) {
#pragma unroll
        for (int i = 0; i < SLABS * TILES * 4; ++i) {
            float& score = s[i / (TILES * 4)][i / 4 % TILES][i % 4];
            score = __shfl_sync(~0u, score, partner(lane));
        }
    }

    // o (slabs x 16 x a chunk's columns, from tile `first` on) += p (slabs x 16 x 8 · TILES) · y (8 · TILES rows of a chunk, from `y`).
    // o[slab][first + i / 2][2 · half + i % 2] is column plain_column(lane, i) of the chunk, of row c_row(partner(lane), half).
    template <int SLABS, int COUNT, int TILES, typename Meanwhile>
    static __device__ __forceinline__ void multiply_output(float (&o)[SLABS][COUNT][4], int first, const float (&p)[SLABS][TILES][4],
                                                           uint32_t y, int lane, Meanwhile meanwhile) {
        constexpr int ROWS = 2 * SLABS, STREAMED = 8 * TILES;
        const uint32_t from = y + plain_unit(lane, 0) * UNIT_BYTES;
        // These rows' own sum first: a chain through all streamed rows would round once for each of them.
        float a[HELD][ROWS], b[HELD][2][4], sum[ROWS][COLUMNS] = {};
        const auto fetch = [&](int j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) load(b[j % HELD][i], unit_address(from, j % 8 ^ 4 * i) + j * CHUNK_BYTES);
            // From the lane that has the row's probability of column j.
            const int source = partner(lane) / 4 * 4 + j % 8 / 2;
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                a[j % HELD][row] = __shfl_sync(~0u, p[row / 2][j / 8][row % 2 * 2 + j % 2], source);
            }
        };
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) fetch(j);
        meanwhile();
#pragma unroll
        for (int j = 0; j < STREAMED; ++j) {
            if (j + AHEAD < STREAMED) fetch(j + AHEAD);
#pragma unroll
            for (int i = 0; i < ROWS * COLUMNS; ++i) {
                const int row = i / COLUMNS, column = i % COLUMNS;
                sum[row][column] = fmaf(a[j % HELD][row], b[j % HELD][column / 4][column % 4], sum[row][column]);
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS * COLUMNS; ++i) {
            const int row = i / COLUMNS, column = i % COLUMNS;
            o[row / 2][first + column / 2][row % 2 * 2 + column % 2] += sum[row][column];
        }
    }

    // What lanes have of their own rows of a slab, for the rows of their part of the output.
    static __device__ __forceinline__ void to_output_rows(float (&of_rows)[2], int lane) {
#pragma unroll
        for (int half = 0; half < 2; ++half) of_rows[half] = __shfl_sync(~0u, of_rows[half], partner(lane));
    }

    // The output from its place in `multiply_output` to an accumulator's.
    template <int SLABS, int COUNT>
    static __device__ __forceinline__ void settle_output(float (&o)[SLABS][COUNT][4], int lane) {
        static_assert(COUNT % TILES_PER_CHUNK == 0, "whole chunks");
#pragma unroll
        for (int i = 0; i < SLABS * COUNT / TILES_PER_CHUNK * 2; ++i) {
            const int slab = i % SLABS, half = i / SLABS % 2, first = i / SLABS / 2 * TILES_PER_CHUNK;
            float held[COLUMNS];
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) held[column] = o[slab][first + column / 2][2 * half + column % 2];
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const int n = column / 2, e = column % 2, place = plain_place(n, e);
                const float low = __shfl_sync(~0u, held[place], plain_owner(lane, n));
                const float high = __shfl_sync(~0u, held[place + 2], plain_owner(lane, n));
                o[slab][first + n][2 * half + e] = lane % 2 == 0 ? low : high;
            }
        }
    }
};
