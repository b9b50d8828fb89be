// Copies rows into a queue, with their ids and log_q.
//
// Shapes: from (rows) of `row_bytes` bytes, `stride` bytes apart; to (rows), contiguous; ids and log_q (rows). Method:
// a warp for each row; lane l copies units l, l + 32, ... of it, and lane 0 the row's id and log_q. Why a kernel:
// cuMemcpy2D "may fail for pitches not computed by cuMemAllocPitch" within a device, and the strides here are the
// caller's; and one launch serves all three arrays. Cost: reads and writes each byte once; bound by memory. Tests:
// tests/gpu/queue.rs and tests/gpu/soundness.rs against the queue in host memory.

#include "rows/enqueue_params.h"
#include "rows/warp.cuh"

namespace {

template <typename Unit>
__device__ void copy_row(const EnqueueParams& p, uint64_t row, uint32_t lane) {
    const Unit* from = reinterpret_cast<const Unit*>(static_cast<const char*>(p.from) + row * p.stride);
    Unit* to = reinterpret_cast<Unit*>(static_cast<char*>(p.to) + row * p.row_bytes);
    for (uint64_t i = lane; i < p.row_bytes / sizeof(Unit); i += WARP) to[i] = from[i];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)
    enqueue_rows(const __grid_constant__ EnqueueParams p) {
    const uint64_t row = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= p.rows) return;
    if (p.unit == 16) {
        copy_row<uint4>(p, row, lane);
    } else if (p.unit == 4) {
        copy_row<uint32_t>(p, row, lane);
    } else {
        copy_row<uint16_t>(p, row, lane);
    }
    if (lane != 0) return;
    if (p.ids != nullptr) p.to_ids[row] = p.ids[row];
    if (p.log_q != nullptr) p.to_log_q[row] = p.log_q[row];
}
