// Arguments of bounds.cu, mirrored by `BoundsParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct BoundsParams {
    const float* positive_z;          // (pairs): similarities by the matmul that scores the pools, in units of log 2
    const int64_t* positive_offsets;  // (rows + 1): which pairs a row has; null where row i has the pair i
    // What own similarities are made of; null where rows have no negatives of their own.
    const void* queries;
    const float* query_inverse_norm;        // (rows)
    const void* const* positive_addresses;  // (pairs)
    const float* positive_inverse_norm;     // (pairs)
    // Results.
    float* own_z;       // (pairs): similarities by the sums that score negatives of a row's own; null with `queries`
    float* bounds;      // (rows); null where nothing is filtered
    float* own_bounds;  // (rows): from own_z
    uint64_t query_stride;  // elements
    uint64_t rows;
    double filter;  // a margin in units of log 2, or a ratio
    uint32_t dim;
    uint32_t is_ratio;
    float scale;  // log2(e) / temperature
    uint32_t padding;
};

static_assert(sizeof(BoundsParams) == 12 * 8 + 4 * 4, "mirrored in params.rs");
