// What a step comes to, from the shares of blocks of rows:
//
//   total = Σ losses          dL/dtau = −gamma² Σ d_gamma, dL/dlog tau = −gamma Σ d_gamma
//
// By one block of THREADS, in f64 and in one order: each thread's blocks ascending, then that of block_sum.cuh.
#pragma once
#include "rows/block_sum.cuh"
#include "rows/finish_gradient_params.h"

__device__ __forceinline__ double sum_of_blocks(const double* of_blocks, uint64_t blocks) {
    double sum = 0.0;
    for (uint64_t block = threadIdx.x; block < blocks; block += THREADS) sum += of_blocks[block];
    return block_sum(sum);
}

__device__ __forceinline__ void write_totals(const TotalsParams& p) {
    if (p.block_losses) {
        const double total = sum_of_blocks(p.block_losses, p.blocks);
        if (threadIdx.x == 0 && p.total) *p.total = total;
    }
    if (!p.block_d_gamma) return;
    const double d_gamma = sum_of_blocks(p.block_d_gamma, p.blocks);
    if (threadIdx.x != 0) return;
    if (p.d_temperature) *p.d_temperature = -p.gamma * p.gamma * d_gamma;
    if (p.d_log_temperature) *p.d_log_temperature = -p.gamma * d_gamma;
}
