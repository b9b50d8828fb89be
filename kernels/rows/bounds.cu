// The false-negative filter's bounds, and what negatives of rows' own are compared with.
//
//   bounds   bound_i = s + margin, or s · ratio where s > 0 (else none: ∞); s the largest similarity of the row's positives
//
// in units of log 2, s from the matmul that scores the pools; own_bound_i the same from row_dot.cuh, which scores negatives of a row's
// own. A candidate with the positive's embedding thereby has the positive's similarity bit for bit, and with a margin of 0 stays a
// negative. NaN is no largest; a row without a positive has no bound.
// Shapes: (rows), (pairs), (rows, dim). A warp for each row. Where a row has 8 or 16 lanes (lanes.cuh), the warp's groups of lanes all
// compute the same. Bound by memory.
// Tests: tests/gpu/tables.rs.
#include "rows/bounds_params.h"
#include "rows/pairs.cuh"
#include "rows/row_dot.cuh"

namespace {

__device__ __forceinline__ float bound(const BoundsParams& p, float best) {
    if (best == -INFINITY || (p.is_ratio && best <= 0.0f)) return INFINITY;
    return static_cast<float>(p.is_ratio ? double(best) * p.filter : double(best) + p.filter);
}

template <typename T>
__device__ __forceinline__ float own_similarity(const BoundsParams& p, const T* query, float query_scale, uint64_t pair) {
    const T* positive = static_cast<const T*>(p.positive_addresses[pair]);
    const bool are_aligned = aligned<T>(positive, 0) && aligned<T>(p.queries, p.query_stride);
    const float dot = row_dot(query, positive, p.dim, are_aligned, Lanes(p.dim));
    return similarity(dot, query_scale, p.positive_inverse_norm[pair]);
}

template <typename T>
__device__ __forceinline__ void bounds(const BoundsParams& p) {
    const uint64_t row = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // the whole warp
    const PairRange pairs = pairs_of(p.positive_offsets, row);
    const T* query = static_cast<const T*>(p.queries) + row * p.query_stride;
    const float query_scale = p.own_z ? p.scale * p.query_inverse_norm[row] : 0.0f;
    float best = -INFINITY, own_best = -INFINITY;
    for (uint64_t pair = pairs.first; pair < pairs.end; ++pair) {
        best = fmaxf(best, p.positive_z[pair]);
        if (!p.own_z) continue;
        const float own = own_similarity(p, query, query_scale, pair);
        own_best = fmaxf(own_best, own);
        if (lane == 0) p.own_z[pair] = own;
    }
    if (lane != 0 || !p.bounds) return;
    p.bounds[row] = bound(p, best);
    if (p.own_z) p.own_bounds[row] = bound(p, own_best);
}

}  // namespace

#define BOUNDS(type, element)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP) bounds_##type(const __grid_constant__ BoundsParams p) { \
        bounds<element>(p);                                                                                            \
    }

BOUNDS(f16, __half)
BOUNDS(bf16, __nv_bfloat16)
BOUNDS(f32, float)
