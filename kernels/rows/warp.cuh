// What kernels with a warp for each row share.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr uint32_t WARP = 32;
constexpr uint32_t BLOCK_ROWS = 8;  // warps in a block: THREADS / 32 in driver.rs

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The sum over the warp, by a butterfly: the same in every lane, and in one order.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (uint32_t distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
}
