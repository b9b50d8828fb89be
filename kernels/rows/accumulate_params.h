// Arguments of accumulate.cu, mirrored by `AccumulateParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct AccumulateParams {
    void* to;                  // (rows, dim) of the caller's
    const void* from;          // (count, dim)
    const uint32_t* rows;      // (count): which row of `to` each row is added to; null where it is the same
    const uint64_t* num_rows;  // (1): how many rows there are, where only the device knows; else null
    uint64_t count;
    uint32_t dim;
    uint32_t is_double;  // the elements are f64; else f32
};

static_assert(sizeof(AccumulateParams) == 5 * 8 + 2 * 4, "mirrored in params.rs");
