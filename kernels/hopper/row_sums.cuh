// Row statistics of a thread's two rows, on Hopper: what the tiles so far sum to.
#pragma once
#include "hopper/two_rows.cuh"

// ONLINE: with a running maximum, which moves where scores are far above it; else biases hold a constant shift in its place, and nothing is
// rescaled.
template <bool ONLINE, int TILES>
struct RowSums : TwoRows {
    using Tile = ScoreTile<Mode::STATISTICS, TILES, RowTerm>;

    // A tile's scores from its dots, and their maxima and sums.
    __device__ __forceinline__ void add(const StreamParams& p, float (&dots)[TILES][4], const RowTerm* columns, bool special,
                                        uint32_t first_column, int lane) {
        Tile of_scores(p, columns, first_column, row, lane);
        if (!special) {
            if (plain(dots, columns, lane)) return;
        } else {
            of_scores.scores(dots, terms);
            of_scores.look();
            if (of_scores.found()) of_scores.drop(dots);
            masked[0] += of_scores.mask.count(0);
            masked[1] += of_scores.mask.count(1);
        }
        if (ONLINE) {
            float factor[2];
            of_scores.advance_max(dots, 0.0f, state, factor);
            state.sum[0] *= factor[0];
            state.sum[1] *= factor[1];
        }
        const float origin[2] = {ONLINE ? subtrahend(state.max[0]) : 0.0f, ONLINE ? subtrahend(state.max[1]) : 0.0f};
        of_scores.probabilities(dots, origin, state.sum);
    }

    // The same of a tile without masked pairs, score by score, so that exponentials begin with the first. False where a maximum has to
    // move first; then scores have taken the place of dots, and nothing else has changed.
    __device__ __forceinline__ bool plain(float (&dots)[TILES][4], const RowTerm* columns, int lane) {
        const float origin[2] = {ONLINE ? subtrahend(state.max[0]) : 0.0f, ONLINE ? subtrahend(state.max[1]) : 0.0f};
        float sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(columns, c_column(lane, n, 0), pair);
            Tile::scores(dots[n], terms, pair);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e / 2] += ptx::exp2(dots[n][e] - origin[e / 2]);
        }
        if (ONLINE && __any_sync(~0u, Tile::has_outgrown(sum, state))) return false;
        state.sum[0] += sum[0];
        state.sum[1] += sum[1];
        return true;
    }

    __device__ __forceinline__ void write(const StreamParams& p, uint32_t split, int lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_quad(state.sum[half]);
            const uint32_t rejected = sum_of_quad(masked[half]), index = row + 8 * half;
            if (lane % 4 != 0 || index >= p.x_rows) continue;
            const uint64_t slot = uint64_t(p.first_split + split) * p.x_rows + index;
            p.max[slot] = ONLINE ? state.max[half] : p.shift;
            p.sum[slot] = sum;
            p.masked[slot] = rejected;
        }
    }
};
