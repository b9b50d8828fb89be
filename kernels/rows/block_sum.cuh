// A sum over a block in a fixed order.
#pragma once
#include "rows/warp.cuh"

constexpr uint32_t THREADS = BLOCK_ROWS * WARP;

// The sum of each thread's value, in every thread: of each warp by its butterfly, of the warps ascending. By all threads of a block of
// THREADS.
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double of_warps[BLOCK_ROWS];
    value = warp_sum(value);
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    double sum = 0.0;
    for (uint32_t warp = 0; warp < BLOCK_ROWS; ++warp) sum += of_warps[warp];
    return sum;
}
