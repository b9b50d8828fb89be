// Row statistics of a thread's two rows, on Hopper: what the tiles so far sum to.
#pragma once
#include "shared/score.cuh"

// ONLINE: with a running maximum; else biases hold a constant shift in its place, and nothing is rescaled.
template <bool ONLINE, int TILES>
struct RowSums {
    using Tile = ScoreTile<Mode::STATISTICS, TILES, RowTerm>;

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
        of_scores.scores(dots, terms);
        if (special) {
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
