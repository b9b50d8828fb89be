// Parameters of kernels, one struct for each, by value. src/backend/cuda/params.rs mirrors them field by field; both
// sides assert the sizes, so that a field that one side lacks does not compile.
#pragma once

#include <cstdint>

// A row-major matrix in device memory: element k of row r is at index r * stride + k.
struct RowInverseNormsParams {
    const void* embeddings;  // (rows, dim), f32, f16 or bf16: the kernel's name says which
    float* inverse_norm;     // (rows)
    uint64_t rows;
    uint64_t dim;
    uint64_t stride;  // elements
    uint64_t cosine;  // 0: 1 in place of the inverse norm
};
static_assert(sizeof(RowInverseNormsParams) == 48, "src/backend/cuda/params.rs says 48");
