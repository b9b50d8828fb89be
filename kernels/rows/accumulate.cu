// Gradients of a step, added to what the caller's memory holds.
//
//   accumulate   to[r, d] += from[r, d], or with a list to[rows[r], d] += from[r, d]
//
// Shapes: (count, dim). One thread for each element. A list has each row once, so that no two threads write the same element: no
// atomics, and one addition for each element, after all of the step's own.
// Cost: reads both and writes one; bound by memory.
// Tests: tests/gpu/accumulate.rs, against the reference.
#include "rows/accumulate_params.h"

namespace {

template <typename T>
__device__ __forceinline__ void accumulate(const AccumulateParams& p) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x, row = i / p.dim;
    if (row >= (p.num_rows ? *p.num_rows : p.count)) return;
    T* to = static_cast<T*>(p.to) + (p.rows ? p.rows[row] : row) * p.dim + i % p.dim;
    *to += static_cast<const T*>(p.from)[i];
}

}  // namespace

extern "C" __global__ void accumulate(const __grid_constant__ AccumulateParams p) {
    if (p.is_double) accumulate<double>(p);
    else accumulate<float>(p);
}
