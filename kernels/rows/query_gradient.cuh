// Gradients of a query and of its positive, given the row's derivatives and its expected negative O:
//
//   dq̂ = gamma (d_lse O + d_positive p̂)          dp̂ = gamma d_positive q̂
//   d_gamma = d_lse q̂·O + d_positive q̂·p̂
//   cosine: dx = (dx̂ − x̂ (x̂·dx̂)) / |x|
//
// A factor of 0 makes its product 0, whatever the other side holds: a row without weight is absent.
// Method: a warp for each row, lanes along the row, one pass for the dot products and one to write. The order of sums depends on dim
// alone: bitwise reproducible. In f32, as O and the embeddings are. Bound by memory.
#pragma once
#include "rows/finish_rows_params.h"
#include "rows/warp.cuh"

__device__ __forceinline__ float times(float d, float x) { return d == 0.0f ? 0.0f : d * x; }

// Writes the gradients; returns the row's share of d_gamma, the same in every lane. `o` may be where d_queries goes.
template <typename T>
__device__ __forceinline__ float query_gradient(const QueryGradientParams& p, const float* o, uint32_t dim, uint64_t row, uint32_t lane,
                                                float d_lse, float d_positive) {
    const T* q = static_cast<const T*>(p.queries) + row * p.query_stride;
    const T* positive = static_cast<const T*>(p.positive_addresses[row]);
    const float unit_q = p.cosine ? p.query_inverse_norm[row] : 1.0f;
    const float unit_p = p.cosine ? p.positive_inverse_norm[row] : 1.0f;

    float q_o = 0.0f, q_p = 0.0f, q_q = 0.0f, p_p = 0.0f;
    for (uint32_t k = lane; k < dim; k += WARP) {
        const float qk = widen(q[k]) * unit_q, pk = widen(positive[k]) * unit_p;
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
    const float along_q = times(d_lse, q_o) + times(d_positive, q_p), along_p = times(d_positive, q_p);
    const float project_q = q_q == 0.0f ? 0.0f : along_q / q_q, project_p = p_p == 0.0f ? 0.0f : along_p / p_p;
    for (uint32_t k = lane; k < dim; k += WARP) {
        const float qk = widen(q[k]) * unit_q, pk = widen(positive[k]) * unit_p;
        const float d_q = times(d_lse, o[k]) + times(d_positive, pk), d_p = times(d_positive, qk);
        p.d_queries[row * dim + k] = p.gamma * (p.cosine ? (d_q - qk * project_q) * unit_q : d_q);
        if (p.d_positive_embeddings) {
            p.d_positive_embeddings[row * dim + k] = p.gamma * (p.cosine ? (d_p - pk * project_p) * unit_p : d_p);
        }
    }
    return along_q;
}
