// Arguments of epilogue.cu, mirrored by `EpilogueParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct EpilogueParams {
    // (rows) each
    const double* lse;
    const double* positive;
    const uint64_t* num_negatives;
    const float* positive_log_q;  // null where the correction uses none
    const float* row_weight;      // null: 1 each
    double* loss;
    double* probability;
    double* d_lse;
    double* d_positive;
    double* total;  // (1)
    // finish_temperature
    const double* d_gamma;
    double* d_temperature;      // (1)
    double* d_log_temperature;  // (1)
    uint64_t* fault;            // fault.cuh
    uint64_t rows;
    double gamma;
    uint32_t correction;
    uint32_t reduction;
};

constexpr uint32_t CORRECTION_NONE = 0;  // also where log_q is subtracted from negatives alone
constexpr uint32_t CORRECTION_LOG_Q = 1;
constexpr uint32_t CORRECTION_CORRECTED = 2;
constexpr uint32_t REDUCTION_SUM = 0;  // also no reduction
constexpr uint32_t REDUCTION_MEAN = 1;
constexpr uint32_t REDUCTION_WEIGHTED_MEAN = 2;

static_assert(sizeof(EpilogueParams) == 16 * 8 + 2 * 4, "mirrored in params.rs");
