// Work on queries and their positives, row by row.
//
//   gather_positives  address, inverse norm and scale of each row's positive; where it is a candidate, id and log_q too
//   query_gradient    dq̂ = gamma (d_lse O + d_positive p̂)          dp̂ = gamma d_positive q̂
//                     d_gamma = d_lse q̂·O + d_positive q̂·p̂
//                     cosine: dx = (dx̂ − x̂ (x̂·dx̂)) / |x|
//
// Shapes: queries (rows, dim), O (rows, dim), everything else (rows). A factor of 0 makes its product 0, whatever the other
// side holds: a row without weight is absent.
// Method of query_gradient: a warp for each row, lanes along the row, one pass for the dot products and one to write.
// The order of sums depends on dim alone: bitwise reproducible. In f64, for rows are few. Bound by memory.
// Tests: tests/gpu.rs, through every result.
#include "fault.cuh"
#include "positives_params.h"
#include "warp.cuh"

namespace {

__device__ __forceinline__ double times(double d, double x) { return d == 0.0 ? 0.0 : d * x; }

template <typename T>
__device__ void query_gradient(const PositivesParams& p) {
    const uint64_t row = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP;
    if (row >= p.rows) return;  // the whole warp
    const T* q = static_cast<const T*>(p.queries) + row * p.query_stride;
    const T* positive = static_cast<const T*>(p.addresses[row]);
    const float* o = p.expected_negative + row * p.dim;
    const bool cosine = p.query_inverse_norm != nullptr;
    const float unit_q = cosine ? p.query_inverse_norm[row] : 1.0f;
    const float unit_p = cosine ? p.positive_inverse_norm[row] : 1.0f;
    const double d_lse = p.d_lse[row], d_positive = p.d_positive[row];

    double q_o = 0.0, q_p = 0.0, q_q = 0.0, p_p = 0.0;
    for (uint32_t k = lane; k < p.dim; k += WARP) {
        const double qk = double(widen(q[k])) * unit_q, pk = double(widen(positive[k])) * unit_p;
        q_o += qk * o[k];
        q_p += qk * pk;
        q_q += qk * qk;
        p_p += pk * pk;
    }
    q_o = warp_sum(q_o);
    q_p = warp_sum(q_p);
    // 1 but for rounding; by these, gradients are orthogonal to the embeddings as they are.
    q_q = warp_sum(q_q);
    p_p = warp_sum(p_p);
    // q̂·dq̂ and p̂·dp̂, each over gamma.
    const double along_q = times(d_lse, q_o) + times(d_positive, q_p), along_p = times(d_positive, q_p);
    if (lane == 0) p.d_gamma[row] = along_q;
    const double project_q = q_q == 0.0 ? 0.0 : along_q / q_q, project_p = p_p == 0.0 ? 0.0 : along_p / p_p;
    for (uint32_t k = lane; k < p.dim; k += WARP) {
        const double qk = double(widen(q[k])) * unit_q, pk = double(widen(positive[k])) * unit_p;
        const double d_q = times(d_lse, o[k]) + times(d_positive, pk), d_p = times(d_positive, qk);
        p.d_queries[row * p.dim + k] = static_cast<float>(p.gamma * (cosine ? (d_q - qk * project_q) * unit_q : d_q));
        if (p.d_positive_embeddings) {
            const double d = cosine ? (d_p - pk * project_p) * unit_p : d_p;
            p.d_positive_embeddings[row * p.dim + k] = static_cast<float>(p.gamma * d);
        }
    }
}

}  // namespace

extern "C" __global__ void gather_positives(const __grid_constant__ PositivesParams p) {
    const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= p.rows) return;
    const uint64_t over_all = p.positives ? p.positives[row] : row;
    // A positive that is no candidate: the first candidate is in its place, of no number, so that it spoils its row.
    const bool nowhere = p.positives && over_all >= p.candidates;
    if (nowhere && p.start == 0) report_fault(p.fault, FAULT_POSITIVES, row);
    // Another pool's positive wraps around to a large number.
    const uint64_t index = nowhere ? 0 : over_all - p.start;
    if (index >= p.count || (nowhere && p.start != 0)) return;
    const float unit = nowhere ? NAN : p.base_inverse_norm[index];
    p.addresses[row] = static_cast<const char*>(p.base) + index * p.stride * p.element_bytes;
    p.positive_inverse_norm[row] = unit;
    p.terms[row] = {unit, 0.0f, 0.0f, 0.0f};
    if (p.candidate_ids) p.positive_ids[row] = p.candidate_ids[index];
    if (p.candidate_log_q) p.positive_log_q[row] = p.candidate_log_q[index];
}

#define QUERY_GRADIENT(type, element)                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)                                        \
        query_gradient_##type(const __grid_constant__ PositivesParams p) {                                \
        query_gradient<element>(p);                                                                       \
    }

QUERY_GRADIENT(f16, __half)
QUERY_GRADIENT(bf16, __nv_bfloat16)
QUERY_GRADIENT(f32, float)
