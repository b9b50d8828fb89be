// One wrapper per instruction of Hopper's: barriers in shared memory, the copy engine, register budgets. wgmma is in wgmma.cuh.
#pragma once
#include "hopper/stream_sm90a_params.h"
#include "shared/ptx.cuh"

namespace ptx {

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Where `arrives`, without a branch: the warp stays together for the matmuls that follow.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, bool arrives) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(barrier), "r"(int(arrives))
                 : "memory");
}

// Arrives, and lets the phase wait for `bytes` of copies besides.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Where `arrives`, at the barrier in the same place of block `rank` of the cluster; without a branch, as above. It orders the block's
// own accesses alone: what buffers hand over are reads that have ended. (Ordering the cluster's would cost a fence of the whole device.)
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank, bool arrives) {
    asm volatile(
        "{\n.reg .pred p;\n.reg .b32 there;\n"
        "setp.ne.b32 p, %2, 0;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "@p mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(rank), "r"(int(arrives))
        : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

// Waits for the end of the phase of that parity.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    while (!barrier_try_wait(barrier, parity)) {
    }
}

// A box of a matrix to shared memory: from element `column` of row `row` on, zeros where there is nothing.
__device__ __forceinline__ void tma_load(uint32_t to, const TensorMap* map, uint32_t column, uint32_t row, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
                 "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// The same box to the same place in every block of the cluster whose bit is in `blocks`; each one's barrier there counts its bytes.
__device__ __forceinline__ void tma_load_multicast(uint32_t to, const TensorMap* map, uint32_t column, uint32_t row, uint32_t barrier,
                                                   uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
        : "memory");
}

// `bytes` (a multiple of 16) to shared memory.
__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Ordinary writes to shared memory become visible to wgmma and the copy engine.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits for `threads` threads at one of the block's 16 barriers; 0 is __syncthreads'.
__device__ __forceinline__ void named_barrier(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// threadIdx.x, read anew: what follows from it need not stay in registers.
__device__ __forceinline__ uint32_t thread_index() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits for all threads of the cluster; a warp need not be together.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

template <uint32_t REGISTERS>
__device__ __forceinline__ void set_max_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <uint32_t REGISTERS>
__device__ __forceinline__ void set_max_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

}  // namespace ptx
