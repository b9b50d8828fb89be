// The one definition of a score, and what every streaming kernel does with a tile of them in registers.
//
// A thread holds rows `c_row(lane, 0)` and `c_row(lane, 1)` of its warp's 16, and of TILES x 8 columns those that c_column says
// (layout.h): element [n][2 half + e]. The layout is that of mma.sync and of wgmma.
#pragma once
#include "layout.h"
#include "ptx.cuh"
#include "stream_params.h"
#include "tile_mask.cuh"

enum class Mode { STATISTICS, EXPECTED, DETAIL, GRADIENT, PAIRED, TOP_K };

// z, in units of log 2.
__device__ __forceinline__ float score(float dot, float row_scale, float column_scale, float bias) {
    return fmaf(dot * column_scale, row_scale, bias);
}

// Similarity of a pair in units of log 2, rounded alike wherever it is computed: ranks compare for equality.
__device__ __forceinline__ float similarity(float dot, float row_scale, float column_scale) {
    return __fmul_rn(__fmul_rn(dot, column_scale), row_scale);
}

// What is subtracted from scores before exponentiation: the maximum, but for a row that saw no score yet.
__device__ __forceinline__ float subtrahend(float max) { return max == -INFINITY ? 0.0f : max; }

// A streamed row that is not finite: its scores are NaN, and its elements count as zeros.
__device__ __forceinline__ bool spoiled(float column_scale) { return isnan(column_scale); }

// Sums over the four lanes that share a row.
template <typename T>
__device__ __forceinline__ T sum_of_quad(T value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// A thread's two rows.
struct RowState {
    float max[2];
    float sum[2];
};

// Scale and bias of columns `column` and `column + 1`, an even one and its neighbour.
__device__ __forceinline__ void load_pair(const RowTerm* terms, int column, RowTerm (&pair)[2]) {
    const float4 both = ptx::load_shared_4(terms + column);
    pair[0] = {both.x, both.y};
    pair[1] = {both.z, both.w};
}

__device__ __forceinline__ void load_pair(const ColumnTerm* terms, int column, RowTerm (&pair)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const float2 one = ptx::load_shared_2(&terms[column + e].scale);
        pair[e] = {one.x, one.y};
    }
}

// A tile of scores. Term: ColumnTerm, or RowTerm where there is no output.
template <Mode MODE, int TILES, typename Term>
struct ScoreTile {
    static constexpr bool HAS_OUTPUT = MODE == Mode::EXPECTED || MODE == Mode::GRADIENT;
    static constexpr bool X_IS_QUERIES = MODE != Mode::GRADIENT;

    const StreamParams& p;
    const Term* terms;      // the tile's columns, in shared memory
    uint32_t first_column;  // index of its first streamed row
    uint32_t row;           // index of the thread's first stationary row
    int lane;
    // Of special tiles: pairs that are no negatives; these and columns without a share; rows' positives.
    TileMask<TILES> mask;
    TileMask<TILES> dropped;
    TileMask<TILES> positive;

    __device__ __forceinline__ ScoreTile(const StreamParams& params, const Term* of_columns, uint32_t column, uint32_t row_, int lane_)
        : p(params), terms(of_columns), first_column(column), row(row_), lane(lane_), mask{}, dropped{}, positive{} {}

    // Finds what is special in the tile, a whole warp at a time.
    __device__ __forceinline__ void look() {
        mask = positive = {};
        const uint32_t first_row = row - lane / 4;
        if (p.hits) {
            if (X_IS_QUERIES) mask.of_queries(p, first_row, first_column, lane);
            else mask.of_candidates(p, row, first_column, lane);
        }
        dropped = mask;
#pragma unroll 1
        for (uint32_t base = 0; base < 8 * TILES; base += 32) {
            const uint32_t column = base + lane, index = first_column + column;
            // Streamed rows without weight, or past the end, have the bias −∞: their scores are −∞ whatever their elements.
            const bool weightless = terms[column].bias == -INFINITY;
            dropped.add(TileMask<TILES>::share(__ballot_sync(~0u, weightless), base, lane));
            if (MODE != Mode::GRADIENT || !p.positives) continue;
            const uint32_t distance = index < p.y_rows ? p.positives[index].index - p.candidate_start - first_row : ~0u;
            for (uint32_t hit = __ballot_sync(~0u, distance < 16); hit != 0; hit &= hit - 1) {
                const int at = __ffs(hit) - 1;
                positive.add_row(__shfl_sync(~0u, distance, at), base + at, lane);
            }
        }
    }

    // After `look`: whether the warp has pairs to `drop` and to `mend`. A tile is special for all its warps, and where ids are popular
    // most tiles are.
    __device__ __forceinline__ bool found() const {
        return __any_sync(~0u, (dropped.bits[0] | dropped.bits[1] | positive.bits[0] | positive.bits[1]) != 0);
    }

    // Of a row's positive in the gradient.
    __device__ __forceinline__ const PositiveTerm& positive_term(int n, int e) const {
        return p.positives[first_column + c_column(lane, n, e)];
    }

    // Scores in place of dots.
    __device__ __forceinline__ void scores(float (&s)[TILES][4], const RowTerm (&rows)[2]) const {
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(terms, c_column(lane, n, 0), pair);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const RowTerm& term = pair[e % 2];
                // Queries have no bias.
                const float bias = X_IS_QUERIES ? term.bias : rows[e / 2].bias + term.bias;
                s[n][e] = score(s[n][e], rows[e / 2].scale, term.scale, bias);
            }
        }
    }

    // In a special tile, after `scores`: −∞ for dropped pairs, and at a positive's place in the gradient its exponent.
    __device__ __forceinline__ void drop(float (&z)[TILES][4]) const {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) {
            if (dropped.holds(i / 4, i % 4)) z[i / 4][i % 4] = -INFINITY;
            if (MODE == Mode::GRADIENT && positive.holds(i / 4, i % 4)) z[i / 4][i % 4] = positive_term(i / 4, i % 4).exponent;
        }
    }

    // Moves rows to the maximum that they have with this tile. `factor` is what earlier sums are to be multiplied by.
    __device__ __forceinline__ void advance_max(const float (&z)[TILES][4], RowState& state, float (&factor)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float max = state.max[half];
#pragma unroll
            for (int n = 0; n < TILES; ++n) max = fmaxf(max, fmaxf(z[n][2 * half], z[n][2 * half + 1]));
            max = fmaxf(max, __shfl_xor_sync(~0u, max, 1));
            max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
            // Sums are 0 before the first score, and NaN where one was NaN: 0 · NaN keeps it.
            factor[half] = ptx::exp2(state.max[half] - subtrahend(max));
            state.max[half] = max;
        }
    }

    // Probabilities relative to 2^origin in place of scores, times each column's factor where they go on into the output; their sums
    // are added to the rows'.
    __device__ __forceinline__ void probabilities(float (&z)[TILES][4], const float (&origin)[2], float (&row_sum)[2]) const {
        // The tile's own sum first: fewer, larger terms round less.
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            float2 pair[2];  // factor, unscale
            if constexpr (HAS_OUTPUT) {
                for (int e = 0; e < 2; ++e) pair[e] = ptx::load_shared_2(&terms[c_column(lane, n, e)].factor);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float probability = ptx::exp2(z[n][e] - origin[e / 2]);
                if constexpr (HAS_OUTPUT) {
                    if (X_IS_QUERIES) sum[e / 2] += probability * pair[e % 2].y;
                    z[n][e] = probability * pair[e % 2].x;
                } else {
                    sum[e / 2] += probability;
                }
            }
        }
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
    }

    // In a special tile, after `probabilities` that go on: dropped pairs have no share, even in a row whose factor is NaN, and positives
    // have factors of their own.
    __device__ __forceinline__ void mend(float (&z)[TILES][4], const float (&origin)[2]) const {
#pragma unroll
        for (int i = 0; i < 4 * TILES; ++i) {
            const int n = i / 4, e = i % 4;
            if (dropped.holds(n, e)) z[n][e] = 0.0f;
            if (MODE != Mode::GRADIENT || !positive.holds(n, e)) continue;
            const PositiveTerm& term = positive_term(n, e);
            z[n][e] = ptx::exp2(term.exponent - origin[e / 2]) * term.factor;
        }
    }
};
