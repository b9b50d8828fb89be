// The one merge of splits' partial results, in their order:
//
//   lse_i = log Σ_s 2^(max_s − max) sum_s + max                                     max = max_s max_s, from units of log 2
//   O_i   = Σ_s 2^(max_s − max) output_s / Σ_s 2^(max_s − max) sum_s                to natural ones; moments and ranks likewise
//
// Numerics: factors and O in f32, as the partial results are; sums of numbers in f64, since an lse is read beside scores of any size.
#pragma once
#include "rows/finish_rows_params.h"
#include "rows/pairs.cuh"
#include "rows/warp.cuh"

constexpr double LN_2 = 0.69314718055994531;

// What a row's splits come to.
struct MergedRow {
    float max;
    double sum;
    uint64_t masked;
};

struct RowStatistics {
    double lse;
    uint64_t num_negatives;
};

// 2^(max_s − max), and 1 for a split that saw no score: its sums are 0, or NaN, which shall stay.
__device__ __forceinline__ float split_factor(float split_max, float max) {
    return split_max == -INFINITY ? 1.0f : exp2f(split_max - max);
}

__device__ __forceinline__ MergedRow merge_row(const Splits& splits, uint64_t rows, uint64_t row) {
    MergedRow merged = {-INFINITY, 0.0, 0};
    for (uint64_t split = 0; split < splits.count; ++split) merged.max = fmaxf(merged.max, splits.max[split * rows + row]);
    for (uint64_t split = 0; split < splits.count; ++split) {
        const uint64_t slot = split * rows + row;
        merged.sum += double(split_factor(splits.max[slot], merged.max)) * splits.sum[slot];
        merged.masked += splits.masked[slot];
    }
    return merged;
}

// Moments.
__device__ __forceinline__ void merge_details(const StatisticsParams& p, const MergedRow& merged, uint64_t rows, uint64_t row) {
    double sum_score = 0.0, sum_z = 0.0;
    for (uint64_t split = 0; split < p.splits.count; ++split) {
        const uint64_t slot = split * rows + row;
        const float max = p.splits.max[slot];
        const double factor = split_factor(max, merged.max), distance = max == -INFINITY ? 0.0 : double(max) - double(merged.max);
        sum_score += factor * p.sum_score[slot];
        sum_z += factor * (p.sum_z[slot] + distance * p.splits.sum[slot]);
    }
    const bool empty = merged.masked == p.candidates;
    if (p.expected_score) p.expected_score[row] = empty ? 0.0 : sum_score / merged.sum * LN_2;
    if (p.entropy) p.entropy[row] = empty ? 0.0 : log(merged.sum) - sum_z / merged.sum * LN_2;
}

// Of a pair.
__device__ __forceinline__ void merge_rank(const StatisticsParams& p, uint64_t pair) {
    uint64_t above = 0, ties = 0;
    for (uint64_t split = 0; split < p.splits.count; ++split) {
        above += p.above[split * p.pairs + pair];
        ties += p.ties[split * p.pairs + pair];
    }
    if (p.ranked_above) p.ranked_above[pair] = above;
    if (p.ranked_ties) p.ranked_ties[pair] = ties;
}

// Of a pair, in natural units.
__device__ __forceinline__ double positive_score(const StatisticsParams& p, uint64_t pair) { return double(p.positive_z[pair]) * LN_2; }

__device__ __forceinline__ RowStatistics finish_statistics(const StatisticsParams& p, const MergedRow& merged, uint64_t rows,
                                                           uint64_t row) {
    RowStatistics statistics;
    const bool empty = merged.masked == p.candidates;
    const double lse = isnan(merged.sum) ? merged.sum : (double(merged.max) + log2(merged.sum)) * LN_2;
    statistics.lse = empty ? -double(INFINITY) : lse;
    statistics.num_negatives = p.candidates - merged.masked;
    if (p.lse) p.lse[row] = statistics.lse;
    if (p.num_negatives) p.num_negatives[row] = statistics.num_negatives;
    if (p.sum_score) merge_details(p, merged, rows, row);
    const PairRange pairs = pairs_of(p.positive_offsets, row);
    for (uint64_t pair = pairs.first; pair < pairs.end; ++pair) {
        if (p.positive) p.positive[pair] = positive_score(p, pair);
        if (p.sum_score) merge_rank(p, pair);
    }
    return statistics;
}

// A row's expected negative by a warp, whose lanes are along the row, 128 elements at a time. `total` is the merged sum; of a row with
// no negatives the result is 0.
__device__ __forceinline__ void merge_expected(const ExpectedParams& p, uint64_t rows, uint32_t dim, uint64_t row, uint32_t lane, float max,
                                               float total, bool empty) {
    constexpr uint32_t EACH = 4;
    for (uint32_t first = lane; first < dim; first += EACH * WARP) {
        float sums[EACH] = {};
        for (uint64_t split = 0; split < p.splits.count; ++split) {
            const uint64_t slot = split * rows + row;
            const float factor = split_factor(p.splits.max[slot], max);
#pragma unroll
            for (uint32_t i = 0; i < EACH; ++i) {
                const uint32_t k = first + i * WARP;
                if (k < dim) sums[i] += factor * p.output[slot * dim + k];
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) {
            const uint32_t k = first + i * WARP;
            if (k < dim) p.expected_negative[row * dim + k] = empty ? 0.0f : sums[i] / total;
        }
    }
}
