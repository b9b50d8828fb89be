// The one definition of a score, and what every streaming kernel does with a tile of them in registers.
//
// A thread holds rows `c_row(lane, 0)` and `c_row(lane, 1)` of its warp's 16, and of TILES x 8 columns those that c_column says
// (layout.h): element [n][2 half + e]. The layout is that of mma.sync and of wgmma.
#pragma once
#include "shared/layout.h"
#include "shared/ptx.cuh"
#include "shared/stream_params.h"
#include "shared/tile_mask.cuh"

enum class Mode { STATISTICS, EXPECTED, DETAIL, GRADIENT, PAIRED, TOP_K };

// z, in units of log 2. The candidate's scale comes first in every pass, and its bias within the sum that is rounded:
// whichever side is stationary, a pair has the same z bit for bit, and a row's largest z never exceeds its lse.
__device__ __forceinline__ float score(float dot, float candidate_scale, float query_scale, float candidate_bias) {
    return fmaf(dot * candidate_scale, query_scale, candidate_bias);
}

// Similarity of a pair in units of log 2, rounded alike wherever it is computed: ranks compare for equality.
__device__ __forceinline__ float similarity(float dot, float row_scale, float column_scale) {
    return __fmul_rn(__fmul_rn(dot, column_scale), row_scale);
}

// Probabilities of f16 that go on into a matmul are relative to 2^(max − 14): f16 has exponents from −24 to 15, so what
// is below 2^-25 of a row's maximum would vanish from the output and not from the sum. So 2^-39 of it is the least that
// counts, and with a factor below 2 the largest is below 2^15. Nothing has to be undone: sums and outputs are relative
// to the same exponent.
template <typename Element>
constexpr float HEADROOM = 0.0f;
template <>
constexpr float HEADROOM<__half> = 14.0f;

// The exponent that a row's probabilities are relative to. Rounded up, for where f32 does not resolve it the operand
// may not overflow.
__device__ __forceinline__ float below(float max, float headroom) {
    return headroom == 0.0f ? max : __fadd_ru(max, -headroom);
}

// The largest exponent of a row in the gradient. Exponents are at most 127, and greater only where z of this pass and
// the row's lse are from matmuls that round differently; `limit` holds such probabilities, but 2^max must be finite.
constexpr float LARGEST_EXPONENT = 127.0f;

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

// A column's factor, and unscale or limit.
__device__ __forceinline__ float2 load_factors(const ColumnTerm* term) { return ptx::load_shared_2(&term->factor); }

// A tile of scores. Term: ColumnTerm, or RowTerm where there is no output.
template <Mode MODE, int TILES, typename Term>
struct ScoreTile {
    static constexpr bool HAS_OUTPUT = MODE == Mode::EXPECTED || MODE == Mode::GRADIENT;
    static constexpr bool X_IS_QUERIES = MODE != Mode::GRADIENT;
    // How far a score may be above the maximum that sums are relative to before that moves: sums neither overflow nor lose small terms.
    // An output could overflow: its elements are as large as those of the rows.
    static constexpr float SLACK = MODE == Mode::STATISTICS ? 32.0f : 0.0f;

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
        look_for_masked();
        look_at_columns();
    }

    __device__ __forceinline__ void look_for_masked() {
        mask = {};
        if (!p.hits) return;
        if (X_IS_QUERIES) mask.of_queries(p, row - lane / 4, first_column, lane);
        else mask.of_candidates(p, row, first_column, lane);
    }

    // After all masked pairs are found.
    __device__ __forceinline__ void look_at_columns() {
        dropped = mask;
        positive = {};
        if (MODE == Mode::GRADIENT) look_at_queries();
        else drop_weightless();
    }

    // After `look_for_masked`, of dots: pairs above their query's bound are no negatives. Both passes compare the same bits: a product
    // does not depend on which side is X (fragments.cuh), and `similarity` multiplies the candidate's scale first. NaN is not above.
    __device__ __forceinline__ void filter(const float (&dots)[TILES][4], const RowTerm (&rows)[2]) {
        float of_rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) of_rows[half] = X_IS_QUERIES ? bound(row + 8 * half, p.x_rows) : INFINITY;
#pragma unroll
        for (int i = 0; i < 2 * TILES; ++i) {
            const int column = c_column(lane, i / 2, i % 2);
            const uint32_t y = first_column + column;
            const float scale = ptx::load_shared_2(&terms[column].scale).x, of_column = X_IS_QUERIES ? 0.0f : bound(y, p.y_rows);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float dot = dots[i / 2][2 * half + i % 2], of_row = rows[half].scale;
                const float sim = X_IS_QUERIES ? similarity(dot, of_row, scale) : similarity(dot, scale, of_row);
                const bool is_above = y < p.y_rows && sim > (X_IS_QUERIES ? of_rows[half] : of_column);
                mask.bits[half] |= uint32_t(is_above) << i;
            }
        }
    }

    // The bound of query `index` of `count`. Volatile: those of all columns at a time would take the registers of the output.
    __device__ __forceinline__ float bound(uint32_t index, uint32_t count) const {
        return index < count ? *static_cast<const volatile float*>(p.bounds + index) : INFINITY;
    }

    // Streamed rows without weight, or past the end, have the bias −∞: their scores are −∞ whatever their elements.
    __device__ __forceinline__ void drop_weightless() {
#pragma unroll 1
        for (uint32_t base = 0; base < 8 * TILES; base += 32) {
            const uint32_t weightless = __ballot_sync(~0u, terms[base + lane].bias == -INFINITY);
            dropped.add(TileMask<TILES>::share(weightless, base, lane));
        }
    }

    // The same in the gradient, and rows' positives. One column after the other: a warp at a time needs registers that the widest
    // kernels do not have.
    __device__ __forceinline__ void look_at_queries() {
#pragma unroll 1
        for (int i = 0; i < 2 * TILES; ++i) {
            const int column = c_column(lane, i / 2, i % 2);
            const uint32_t index = first_column + column;
            if (terms[column].bias == -INFINITY) dropped.add(1u << i);
            if (!p.positives || index >= p.y_rows) continue;
            const uint32_t distance = p.positives[index].index - p.candidate_start - row;
            if (distance == 0) positive.bits[0] |= 1u << i;
            if (distance == 8) positive.bits[1] |= 1u << i;
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
            scores(s[n], rows, pair);
        }
    }

    // The same of the two columns whose terms are `pair`.
    static __device__ __forceinline__ void scores(float (&s)[4], const RowTerm (&rows)[2], const RowTerm (&pair)[2]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const RowTerm &column = pair[e % 2], &of_row = rows[e / 2];
            s[e] = X_IS_QUERIES ? score(s[e], column.scale, of_row.scale, column.bias)
                                : score(s[e], of_row.scale, column.scale, of_row.bias) + column.bias;
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

    // The largest of this thread's scores in each of its rows.
    static __device__ __forceinline__ void find_largest(const float (&z)[TILES][4], float (&largest)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            largest[half] = -INFINITY;
#pragma unroll
            for (int n = 0; n < TILES; ++n) largest[half] = fmaxf(largest[half], fmaxf(z[n][2 * half], z[n][2 * half + 1]));
            if (MODE == Mode::GRADIENT) largest[half] = fminf(largest[half], LARGEST_EXPONENT);
        }
    }

    // Whether one of them is so large that its row's maximum has to move. After some tiles this is rare.
    static __device__ __forceinline__ bool is_above(const float (&largest)[2], float headroom, const RowState& state) {
        // With |, not ||, which would become a branch.
        return below(largest[0], headroom) > state.max[0] + SLACK | below(largest[1], headroom) > state.max[1] + SLACK;
    }

    // The same where there is no output, from sums of this tile's probabilities relative to the maxima so far, without a comparison of each
    // score: a sum within LARGEST has no term above it. A row without a maximum needs one, as sums of low scores relative to 0 vanish.
    static __device__ __forceinline__ bool has_outgrown(const float (&sum)[2], const RowState& state) {
        // A thread's terms of a row, each 2^SLACK.
        constexpr float LARGEST = 2 * TILES * 0x1p32f;
        static_assert(MODE != Mode::STATISTICS || SLACK == 32.0f, "see LARGEST");
        return sum[0] > LARGEST | sum[1] > LARGEST | state.max[0] == -INFINITY | state.max[1] == -INFINITY;
    }

    // Moves rows to the maxima that they have with this tile, less `headroom`. `factor` is what earlier sums are to be multiplied by.
    static __device__ __forceinline__ void advance_max(const float (&z)[TILES][4], float headroom, RowState& state,
                                                       float (&factor)[2]) {
        float largest[2];
        find_largest(z, largest);
        advance_max(largest, headroom, state, factor);
    }

    // The same, given the largest of this thread's scores.
    static __device__ __forceinline__ void advance_max(const float (&largest)[2], float headroom, RowState& state, float (&factor)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float max = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], 1));
            max = fmaxf(max, __shfl_xor_sync(~0u, max, 2));
            max = fmaxf(state.max[half], below(max, headroom));
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
            float2 pair[2] = {};
            if constexpr (HAS_OUTPUT) {
                for (int e = 0; e < 2; ++e) pair[e] = load_factors(&terms[c_column(lane, n, e)]);
            }
            probabilities(z[n], origin, pair, sum);
        }
        row_sum[0] += sum[0];
        row_sum[1] += sum[1];
    }

    // The same of two columns. `pair`: their factors, and unscale or limit.
    static __device__ __forceinline__ void probabilities(float (&z)[4], const float (&origin)[2], const float2 (&pair)[2],
                                                         float (&sum)[2]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if constexpr (MODE == Mode::GRADIENT) z[e] = ptx::min_or_nan(z[e], pair[e % 2].y);
            const float probability = ptx::exp2(z[e] - origin[e / 2]);
            if constexpr (HAS_OUTPUT) {
                if (X_IS_QUERIES) sum[e / 2] += probability * pair[e % 2].y;
                z[e] = probability * pair[e % 2].x;
            } else {
                sum[e / 2] += probability;
            }
        }
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
