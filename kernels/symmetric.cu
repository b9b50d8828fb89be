// The symmetric loss on device memory: the batch with its sides swapped, and the mean of both directions.
//
//   swap_positives   query_of[positives[i]] = i; each candidate is the positive of one query
//   swap_weights     weight of candidate j = that of query_of[j]
//   average_rows     loss_i = (loss_i + swapped loss of positives_i) / 2, likewise probabilities
//   average_f32/f64  values = (values + swapped values) / 2
//
// Shapes: (rows), values (count). One thread for each element. A candidate of two queries is a fault (fault.cuh); the one that
// wrote last counts for it, and its results are not to be used.
// Tests: tests/gpu.rs, against host memory.
#include "fault.cuh"
#include "symmetric_params.h"

namespace {

__device__ __forceinline__ uint64_t thread() { return uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

template <typename T>
__device__ __forceinline__ void average(const SymmetricParams& p) {
    const uint64_t i = thread();
    if (i >= p.count) return;
    T* values = static_cast<T*>(p.values);
    values[i] = T(0.5) * (values[i] + static_cast<const T*>(p.swapped_values)[i]);
}

}  // namespace

extern "C" __global__ void swap_positives(const __grid_constant__ SymmetricParams p) {
    const uint64_t row = thread();
    if (row >= p.rows) return;
    const uint32_t positive = p.positives[row];
    // Atomic for the sake of the fault alone.
    if (positive >= p.rows || atomicExch(&p.query_of[positive], uint32_t(row)) != ~0u) report_fault(p.fault, FAULT_POSITIVES, row);
}

extern "C" __global__ void swap_weights(const __grid_constant__ SymmetricParams p) {
    const uint64_t candidate = thread();
    if (candidate >= p.rows) return;
    const uint32_t query = p.query_of[candidate];
    p.swapped_weight[candidate] = query < p.rows ? p.row_weight[query] : 0.0f;
}

extern "C" __global__ void average_rows(const __grid_constant__ SymmetricParams p) {
    const uint64_t row = thread();
    if (row >= p.rows) return;
    const uint32_t positive = p.positives[row] < p.rows ? p.positives[row] : 0;
    p.loss[row] = 0.5 * (p.loss[row] + p.swapped_loss[positive]);
    p.probability[row] = 0.5 * (p.probability[row] + p.swapped_probability[positive]);
}

extern "C" __global__ void average_f32(const __grid_constant__ SymmetricParams p) { average<float>(p); }
extern "C" __global__ void average_f64(const __grid_constant__ SymmetricParams p) { average<double>(p); }
