// The loss of a row from its statistics, and its derivatives: src/problem/epilogue.rs on the device.
//
//   with m = lse + shift − positive:   softplus(m), a = σ(m); shift 0 or log Q₊
//   corrected logQ:                    w m, a = w = σ(m − log n); shift log(1 − Q₊)
//   d_lse = a · weight · reduction, d_positive = −d_lse; a row with no negatives has none of it
//
// In f64: a loss is the difference of two scores of any size. One lane has one row, so that it costs what 1/32 of a warp costs where
// f64 is slow.
#pragma once
#include "rows/merge.cuh"
#include "shared/fault.cuh"

struct RowLoss {
    double loss;  // before weights
    double a;
    double total;  // the row's share of the total
    double d_lse;
};

__device__ __forceinline__ double softplus(double m) { return fmax(m, 0.0) + log1p(exp(-fabs(m))); }

__device__ __forceinline__ double sigmoid(double m) {
    const double e = exp(-fabs(m));
    return (m < 0.0 ? e : 1.0) / (1.0 + e);
}

// log(1 − exp(x)) for x < 0, without cancellation at either end.
__device__ __forceinline__ double log1m_exp(double x) { return x > -LN_2 ? log(-expm1(x)) : log1p(-exp(x)); }

// What multiplies each weighted row. By a whole warp; of all warps one reports.
__device__ __forceinline__ double upstream(const EpilogueParams& p, uint64_t rows, uint32_t lane, bool reports) {
    if (p.reduction == REDUCTION_MEAN) return 1.0 / double(rows);
    if (p.reduction != REDUCTION_WEIGHTED_MEAN) return 1.0;
    double sum = 0.0;
    for (uint64_t block = lane; block < p.weight_blocks; block += WARP) sum += p.weight_sums[block];
    sum = warp_sum(sum);
    if (reports && lane == 0 && !(sum > 0.0)) report_fault(p.fault, FAULT_ROW_WEIGHT, rows);
    return 1.0 / sum;
}

__device__ __forceinline__ void check(const EpilogueParams& p, uint64_t row, double weight) {
    if (!(weight >= 0.0 && isfinite(weight))) report_fault(p.fault, FAULT_ROW_WEIGHT, row);
    if (!p.positive_log_q) return;
    const float log_q = p.positive_log_q[row];
    if (!isfinite(log_q) || (p.correction == CORRECTION_CORRECTED && log_q >= 0.0f)) {
        report_fault(p.fault, FAULT_POSITIVE_LOG_Q, row);
    }
}

__device__ __forceinline__ double unweighted_loss(const EpilogueParams& p, const RowStatistics& statistics, uint64_t row, double& a) {
    a = 0.0;
    if (statistics.num_negatives == 0) return 0.0;
    const double log_q = p.positive_log_q ? double(p.positive_log_q[row]) : 0.0;
    double shift = 0.0;
    if (p.correction == CORRECTION_LOG_Q) shift = log_q;
    if (p.correction == CORRECTION_CORRECTED) shift = log1m_exp(log_q);
    const double m = statistics.lse + shift - statistics.positive;
    if (isnan(m)) return a = m;
    if (p.correction != CORRECTION_CORRECTED) {
        a = sigmoid(m);
        return softplus(m);
    }
    a = sigmoid(m - log(double(statistics.num_negatives)));
    return a == 0.0 ? 0.0 : a * m;
}

__device__ __forceinline__ RowLoss row_loss(const EpilogueParams& p, const RowStatistics& statistics, uint64_t row, double upstream) {
    const double weight = p.row_weight ? double(p.row_weight[row]) : 1.0;
    check(p, row, weight);
    RowLoss result;
    result.loss = unweighted_loss(p, statistics, row, result.a);
    // A row of weight 0 is absent, whatever its loss: 0 · NaN must not enter a sum.
    result.d_lse = weight == 0.0 ? 0.0 : weight * upstream * result.a;
    result.total = weight == 0.0 ? 0.0 : weight * upstream * result.loss;
    if (p.loss) p.loss[row] = result.loss;
    if (p.probability) p.probability[row] = 1.0 - result.a;
    if (p.d_lse) p.d_lse[row] = result.d_lse;
    return result;
}
