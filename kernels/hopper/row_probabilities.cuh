// Probabilities of a thread's two rows, on Hopper: a tile's, on their way into the output, and what the tiles so far sum to.
#pragma once
#include <type_traits>

#include "hopper/two_rows.cuh"

// Of candidates whose factor is their scale, and unscale 1 (OUTPUT_PLAIN in rows_params.h): shared memory binds, so that is not read twice.
struct PlainTerm : ColumnTerm {};

__device__ __forceinline__ float2 load_factors(const PlainTerm* term) {
    return {ptx::load_shared(ptx::smem_address(&term->scale)), 1.0f};
}

// ONLINE: with a running maximum; else biases hold a constant shift in its place, and nothing is rescaled.
template <typename Element, Mode MODE, bool ONLINE, int TILES>
struct RowProbabilities : TwoRows {
    static constexpr bool IS_PLAIN = MODE == Mode::EXPECTED && HEADROOM<Element> == 0.0f;
    using Term = std::conditional_t<IS_PLAIN, PlainTerm, ColumnTerm>;
    using Tile = ScoreTile<MODE, TILES, Term>;
    using Scores = float[TILES][4];

    float factor[2];  // what outputs before the last tile are to be multiplied by

    // Probabilities in place of dots, of a tile without masked pairs and without a maximum: column by column, so that exponentials begin
    // with the first.
    __device__ __forceinline__ void by_column(Scores& s, const Term* columns, int lane) {
        const float no_origin[2] = {0.0f, 0.0f};
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(columns, c_column(lane, n, 0), pair);
            float2 factors[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                factors[e] = IS_PLAIN ? float2{pair[e].scale, 1.0f} : load_factors(&columns[c_column(lane, n, e)]);
            }
            Tile::scores(s[n], terms, pair);
            Tile::probabilities(s[n], no_origin, factors, sum);
        }
        state.sum[0] += sum[0];
        state.sum[1] += sum[1];
    }

    // The same with a maximum. It soon stops moving: lanes find its new value only where one of them has a larger score.
    __device__ __forceinline__ void by_vote(const StreamParams& p, Scores& s, const Term* columns, int lane) {
        // In the pass over the scores: by `find_largest` behind it, expected negatives of bf16 at D = 128 spill.
        float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(columns, c_column(lane, n, 0), pair);
            Tile::scores(s[n], terms, pair);
#pragma unroll
            for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], s[n][e]);
        }
        factor[0] = factor[1] = 1.0f;
        if (__any_sync(~0u, Tile::is_above(largest, HEADROOM<Element>, state))) advance_max(s);
        const float origins[2] = {subtrahend(state.max[0]), subtrahend(state.max[1])};
        Tile(p, columns, 0, row, lane).probabilities(s, origins, state.sum);
    }

    // The same of any tile, in steps. `is_special`: it may have masked pairs.
    __device__ __forceinline__ void in_steps(const StreamParams& p, Scores& s, const Term* columns, bool is_special, uint32_t first_column,
                                             int lane) {
        Tile of_scores(p, columns, first_column, row, lane);
        of_scores.scores(s, terms);
        if (is_special) {
            of_scores.look();
            if (of_scores.found()) of_scores.drop(s);
            masked[0] += of_scores.mask.count(0);
            masked[1] += of_scores.mask.count(1);
        }
        if (ONLINE) advance_max(s);
        const float origins[2] = {ONLINE ? subtrahend(state.max[0]) : 0.0f, ONLINE ? subtrahend(state.max[1]) : 0.0f};
        of_scores.probabilities(s, origins, state.sum);
        if (is_special && of_scores.found()) of_scores.mend(s, origins);
    }

    __device__ __forceinline__ void advance_max(const Scores& s) {
        Tile::advance_max(s, HEADROOM<Element>, state, factor);
        state.sum[0] *= factor[0];
        state.sum[1] *= factor[1];
    }

    // Of row `half`. Sums and counts are results of the pass that wants expected negatives.
    __device__ __forceinline__ void write(const StreamParams& p, uint64_t slot, int half, bool writes) const {
        const float sum = sum_of_quad(state.sum[half]);
        const uint32_t rejected = sum_of_quad(masked[half]);
        if (!writes) return;
        p.max[slot] = ONLINE ? state.max[half] : p.shift;
        if (MODE == Mode::EXPECTED) {
            p.sum[slot] = sum;
            p.masked[slot] = rejected;
        }
    }
};
