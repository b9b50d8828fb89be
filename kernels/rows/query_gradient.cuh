// Gradients of a query and of its positives, given the row's derivatives and its expected negative O:
//
//   dq̂ = gamma (d_lse O + Σ_p d_positive p̂)          dp̂ = gamma d_positive q̂
//   d_gamma = d_lse q̂·O + Σ_p d_positive q̂·p̂
//   cosine: dx = (dx̂ − x̂ (x̂·dx̂)) / |x|
//
// A factor of 0 makes its product 0, whatever the other side holds: a row or a pair without weight is absent.
// Method: a warp for each row, lanes along the row, one pass for the sums and one to write; two more for each separate positive. The
// order of sums depends on dim and the row's pairs alone: bitwise reproducible. In f32, as O and the embeddings are. Bound by memory.
#pragma once
#include "rows/finish_rows_params.h"
#include "rows/pairs.cuh"
#include "rows/warp.cuh"

__device__ __forceinline__ float times(float d, float x) { return d == 0.0f ? 0.0f : d * x; }

template <typename T>
__device__ __forceinline__ const T* positive_row(const QueryGradientParams& p, uint64_t pair) {
    return static_cast<const T*>(p.positive_addresses[pair]);
}

template <typename T>
__device__ __forceinline__ void positive_gradient(const QueryGradientParams& p, uint32_t dim, uint64_t pair, uint32_t lane, const T* q,
                                                  float unit_q) {
    const T* positive = positive_row<T>(p, pair);
    const float unit_p = p.cosine ? p.positive_inverse_norm[pair] : 1.0f, d_positive = static_cast<float>(p.d_positive[pair]);
    float q_p = 0.0f, p_p = 0.0f;
    for (uint32_t k = lane; k < dim; k += WARP) {
        const float pk = widen(positive[k]) * unit_p;
        q_p += widen(q[k]) * unit_q * pk;
        p_p += pk * pk;
    }
    // p̂·dp̂ over gamma. The length is 1 but for rounding; by it, gradients are orthogonal to the embeddings as they are.
    const float along = times(d_positive, warp_sum(q_p));
    p_p = warp_sum(p_p);
    const float project = p_p == 0.0f ? 0.0f : along / p_p;
    for (uint32_t k = lane; k < dim; k += WARP) {
        const float d_p = times(d_positive, widen(q[k]) * unit_q);
        p.d_positive_embeddings[pair * dim + k] = p.gamma * (p.cosine ? (d_p - widen(positive[k]) * unit_p * project) * unit_p : d_p);
    }
}

// Writes the gradients; returns the row's share of d_gamma, the same in every lane. `o` may be where d_queries goes.
template <typename T>
__device__ __forceinline__ float query_gradient(const QueryGradientParams& p, const float* o, uint32_t dim, uint64_t row, uint32_t lane,
                                                float d_lse) {
    const T* q = static_cast<const T*>(p.queries) + row * p.query_stride;
    const float unit_q = p.cosine ? p.query_inverse_norm[row] : 1.0f;
    const PairRange pairs = pairs_of(p.positive_offsets, row);

    // Sums of dq̂ / gamma are kept where the gradient goes.
    float* d_query = p.d_queries + row * dim;
    float along = 0.0f, q_q = 0.0f;
    for (uint32_t k = lane; k < dim; k += WARP) {
        float sum = times(d_lse, o[k]);
        for (uint64_t pair = pairs.first; pair < pairs.end; ++pair) {
            const float unit_p = p.cosine ? p.positive_inverse_norm[pair] : 1.0f;
            sum += times(static_cast<float>(p.d_positive[pair]), widen(positive_row<T>(p, pair)[k]) * unit_p);
        }
        const float qk = widen(q[k]) * unit_q;
        along += times(sum, qk);
        q_q += qk * qk;
        d_query[k] = sum;
    }
    along = warp_sum(along);
    q_q = warp_sum(q_q);
    const float project = q_q == 0.0f ? 0.0f : along / q_q;
    for (uint32_t k = lane; k < dim; k += WARP) {
        const float sum = d_query[k];
        d_query[k] = p.gamma * (p.cosine ? (sum - widen(q[k]) * unit_q * project) * unit_q : sum);
    }
    if (!p.d_positive_embeddings) return along;
    for (uint64_t pair = pairs.first; pair < pairs.end; ++pair) positive_gradient(p, dim, pair, lane, q, unit_q);
    return along;
}
