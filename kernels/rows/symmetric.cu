// The symmetric loss on device memory: the mean of both directions (positives.cu swaps the batch's sides).
//
//   average_directions   loss_i = (loss_i + swapped loss of positives_i) / 2, likewise probabilities;
//                        gradients, the total, and gradients of the temperature: (values + swapped values) / 2
//
// Shapes: (rows), (count). One thread for each row and each element.
// Tests: tests/gpu.rs, against host memory.
#include "rows/symmetric_params.h"

namespace {

template <typename T>
__device__ __forceinline__ void average(T* values, const T* swapped, uint64_t i, uint64_t of_swapped) {
    if (values) values[i] = T(0.5) * (values[i] + swapped[of_swapped]);
}

}  // namespace

extern "C" __global__ void average_directions(const __grid_constant__ SymmetricParams p) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < p.count) {
        average(p.d_queries, p.swapped_d_candidates, i, i);
        average(p.d_candidates, p.swapped_d_queries, i, i);
    }
    if (i < p.rows) {
        const uint32_t positive = p.positives[i] < p.rows ? p.positives[i] : 0;
        average(p.loss, p.swapped_loss, i, positive);
        average(p.probability, p.swapped_probability, i, positive);
    }
    if (i != 0) return;
    average(p.total, p.swapped_total, 0, 0);
    average(p.d_temperature, p.swapped_d_temperature, 0, 0);
    average(p.d_log_temperature, p.swapped_d_log_temperature, 0, 0);
}
