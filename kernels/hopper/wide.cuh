// What Hopper's kernels for rows of more than 256 elements share: pairs of blocks, and their rings.
//
// Two blocks of a cluster work at the same time on tiles that have one side in common. Each reads half of that side and sends it to
// both, so that the L2 cache delivers it once.
#pragma once
#include "hopper/pipeline.cuh"
#include "hopper/wide_params.h"

constexpr uint32_t PAIR = 2;
constexpr uint16_t BOTH = 3;

// Sizes of the blocks of scores.
constexpr int WIDE_BLOCK_X = 256;
constexpr int WIDE_BLOCK_Y = 128;

// A ring whose buffers both blocks fill: each hands them back to both.
template <int COUNT>
struct PairBarriers : RingBarriers<COUNT> {
    __device__ __forceinline__ void init() {
        for (int i = 0; i < COUNT; ++i) {
            ptx::barrier_init(ptx::smem_address(&this->full[i]), 1);
            ptx::barrier_init(ptx::smem_address(&this->empty[i]), PAIR * CONSUMER_WARPS);
        }
    }
    // By two lanes of each consumer warp, one for each block.
    __device__ __forceinline__ void release(const Place<COUNT>& place) {
        __syncwarp();
        const uint32_t lane = threadIdx.x % 32;
        ptx::barrier_arrive_at(ptx::smem_address(&this->empty[place.index]), lane % PAIR, lane < PAIR);
    }
};

// Floats as unsigned integers of the same order; 0, which is none of them, stands for −∞ where nothing was seen.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ float from_ordered(uint32_t x) {
    return x == 0 ? -INFINITY : __uint_as_float(x >> 31 ? x & ~(1u << 31) : ~x);
}
