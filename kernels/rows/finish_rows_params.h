// Arguments of finish_rows.cu, a struct for each of its parts, mirrored in src/backend/cuda/params.rs.
#pragma once
#include "shared/stream_params.h"

// Partial results of splits: (splits, rows) each.
struct Splits {
    const float* max;
    const float* sum;
    const uint32_t* masked;
    uint64_t count;
};

// merge.cuh: statistics of rows. Above and ties are (splits, pairs).
struct StatisticsParams {
    Splits splits;  // none where statistics are given (QueryGradientParams)
    // (splits, rows) each; null but for details.
    const float* sum_score;
    const float* sum_z;
    const uint32_t* above;
    const uint32_t* ties;
    const float* positive_z;          // (pairs)
    const int64_t* positive_offsets;  // (rows + 1): which pairs a row has; null where row i has the pair i
    // Results, (rows) each, of positives and ranks (pairs); null where nobody wants them.
    double* lse;
    double* positive;
    uint64_t* num_negatives;
    double* expected_score;
    double* entropy;
    uint64_t* ranked_above;
    uint64_t* ranked_ties;
    uint64_t candidates;  // of all pools, and the row's own negatives
    uint64_t pairs;
};

// merge.cuh: expected negatives.
struct ExpectedParams {
    Splits splits;            // none where they are given
    const float* output;      // (splits, rows, dim)
    float* expected_negative;  // (rows, dim); null where nobody wants or has them
};

// epilogue.cuh
struct EpilogueParams {
    double* block_losses;         // the blocks' shares of the total; null: no epilogue
    double* loss;                  // (rows); null where nobody wants it, as probability
    double* probability;           // (pairs)
    double* d_lse;                 // (rows), with weight and reduction
    double* d_positive;            // (pairs), with these and the pair's weight
    const float* positive_log_q;   // (pairs); null where the correction uses none
    const float* positive_weight;  // (pairs); null where a row's pairs share 1 equally
    const float* row_weight;       // (rows); null: 1 each
    const double* weight_sums;    // (weight_blocks), whose sum is that of all weights; null but for a weighted mean
    uint64_t weight_blocks;
    uint64_t* fault;  // fault.cuh
    uint32_t correction;
    uint32_t reduction;
};

// query_gradient.cuh, and what the gradient's stream reads (terms.cuh).
struct QueryGradientParams {
    // (rows) each, of an epilogue of the caller's own; null after one of ours.
    const double* lse;
    const uint64_t* num_negatives;
    const double* d_lse;
    const double* d_positive;  // (pairs), of either
    const void* queries;
    const float* query_inverse_norm;          // (rows)
    const void* const* positive_addresses;    // (pairs)
    const float* positive_inverse_norm;       // (pairs)
    const int64_t* positive_offsets;          // (rows + 1): which pairs a row has; null where row i has the pair i
    const uint32_t* positives;                // (rows); null where positives are no candidates, or rows have several
    // Results.
    float* d_queries;              // (rows, dim); null: no gradients. May be expected_negative itself.
    float* d_positive_embeddings;  // (pairs, dim); null where positives are candidates or rows of a table
    ColumnTerm* columns;           // (rows)
    PositiveTerm* positive_terms;  // (rows)
    double* block_d_gamma;         // the blocks' shares of ∂L/∂gamma
    uint64_t query_stride;         // elements
    float gamma;                   // 1 / temperature
    float scale;                   // log2(e) / temperature
    uint32_t cosine;
    uint32_t padding;
};

struct FinishRowsParams {
    StatisticsParams statistics;
    ExpectedParams expected;
    EpilogueParams epilogue;
    QueryGradientParams gradient;
    uint64_t rows;
    uint32_t dim;
    uint32_t block_rows;  // rows of a block, at most a warp's lanes
};

constexpr uint32_t CORRECTION_NONE = 0;  // also where log_q is subtracted from negatives alone
constexpr uint32_t CORRECTION_LOG_Q = 1;
constexpr uint32_t CORRECTION_CORRECTED = 2;
constexpr uint32_t REDUCTION_SUM = 0;  // also no reduction
constexpr uint32_t REDUCTION_MEAN = 1;
constexpr uint32_t REDUCTION_WEIGHTED_MEAN = 2;

static_assert(sizeof(FinishRowsParams) == 152 + 48 + 96 + 144 + 16, "mirrored in params.rs");
