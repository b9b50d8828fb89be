// Arguments of finish_gradient.cu, mirrored in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

// What blocks of rows have added up (finish_rows.cu), and where their sums go.
struct TotalsParams {
    // (blocks) each; null where the step has none.
    const double* block_losses;
    const double* block_d_gamma;
    // Results, (1) each; null where nobody wants them.
    double* total;
    double* d_temperature;
    double* d_log_temperature;
    uint64_t blocks;  // 0: no totals here
    double gamma;     // 1 / temperature
};

struct FinishGradientParams {
    const float* max;     // (splits, rows)
    const float* output;  // (splits, rows, dim)
    float* result;        // (rows, dim)
    // The rows themselves, for the cosine's chain rule.
    const void* x;              // not read under dot
    const float* inverse_norm;  // null under dot
    uint64_t x_stride;
    uint64_t rows;
    uint32_t dim;
    uint32_t splits;
    float gamma;  // 1 / temperature
    uint32_t padding;
    TotalsParams totals;  // of the whole step, by one more block
};

static_assert(sizeof(TotalsParams) == 7 * 8, "mirrored in params.rs");
static_assert(sizeof(FinishGradientParams) == 7 * 8 + 4 * 4 + 56, "mirrored in params.rs");
