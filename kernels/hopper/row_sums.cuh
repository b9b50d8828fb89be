// Row statistics of a thread's two rows, on Hopper: what the tiles so far sum to.
#pragma once
#include "shared/score.cuh"

// ONLINE: with a running maximum, which moves where a score is more than SLACK above it; else biases hold a constant shift in its place,
// and nothing is rescaled.
template <bool ONLINE, int TILES>
struct RowSums {
    using Tile = ScoreTile<Mode::STATISTICS, TILES, RowTerm>;

    // How far a score may be above the maximum that sums are relative to: nothing overflows, and small terms lose nothing.
    static constexpr float SLACK = 32.0f;

    uint32_t row;  // index of the first; the second is 8 further
    RowTerm terms[2];
    RowState state;
    uint32_t masked[2];

    __device__ __forceinline__ void begin(const StreamParams& p, uint32_t first_row) {
        row = first_row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t index = row + 8 * half;
            terms[half] = index < p.x_rows ? p.x_terms[index] : RowTerm{0.0f, 0.0f};
            state.max[half] = -INFINITY;
            state.sum[half] = 0.0f;
            masked[half] = 0;
        }
    }

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
        float sum[2] = {0.0f, 0.0f}, largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            RowTerm pair[2];
            load_pair(columns, c_column(lane, n, 0), pair);
            Tile::scores(dots[n], terms, pair);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (ONLINE) largest[e / 2] = fmaxf(largest[e / 2], dots[n][e]);
                sum[e / 2] += ptx::exp2(dots[n][e] - origin[e / 2]);
            }
        }
        if (ONLINE && __any_sync(~0u, largest[0] > state.max[0] + SLACK || largest[1] > state.max[1] + SLACK)) return false;
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
