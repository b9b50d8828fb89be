// What a thread keeps of its two stationary rows, on Hopper.
#pragma once
#include "shared/score.cuh"

struct TwoRows {
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
};
