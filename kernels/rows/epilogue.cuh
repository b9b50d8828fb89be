// The loss of a row from its statistics, and its derivatives: src/problem/epilogue.rs on the device.
//
//   of each pair, with m = lse + shift − positive:   softplus(m), a = σ(m); shift 0 or log Q₊
//   corrected logQ:                                  w m, a = w = σ(m − log n); shift log(1 − Q₊)
//   of the row, v being the pair's weight:           Σ v softplus(m), d_lse = Σ v a · weight · reduction
//   d_positive = −v a · weight · reduction of each pair; a row with no negatives has none of it
//
// In f64: a loss is the difference of two scores of any size. One lane has one row, so that it costs what 1/32 of a warp costs where
// f64 is slow.
#pragma once
#include "rows/merge.cuh"
#include "shared/fault.cuh"

struct RowLoss {
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

__device__ __forceinline__ void check_log_q(const EpilogueParams& p, uint64_t pair) {
    if (!p.positive_log_q) return;
    const float log_q = p.positive_log_q[pair];
    if (!isfinite(log_q) || (p.correction == CORRECTION_CORRECTED && log_q >= 0.0f)) {
        report_fault(p.fault, FAULT_POSITIVE_LOG_Q, pair);
    }
}

__device__ __forceinline__ void check_weight(const EpilogueParams& p, uint64_t pair) {
    if (p.positive_weight && !(p.positive_weight[pair] >= 0.0f && isfinite(p.positive_weight[pair]))) {
        report_fault(p.fault, FAULT_POSITIVE_WEIGHT, pair);
    }
}

// weight · x, and 0 where the weight is 0, whatever x is: 0 · NaN must not enter a sum.
__device__ __forceinline__ double weighted(double weight, double x) { return weight == 0.0 ? 0.0 : weight * x; }

// Of a pair whose positive has the score `positive`.
__device__ __forceinline__ double pair_loss(const EpilogueParams& p, const RowStatistics& statistics, double positive, uint64_t pair,
                                            double& a) {
    a = 0.0;
    if (statistics.num_negatives == 0) return 0.0;
    const double log_q = p.positive_log_q ? double(p.positive_log_q[pair]) : 0.0;
    double shift = 0.0;
    if (p.correction == CORRECTION_LOG_Q) shift = log_q;
    if (p.correction == CORRECTION_CORRECTED) shift = log1m_exp(log_q);
    const double m = statistics.lse + shift - positive;
    if (isnan(m)) return a = m;
    if (p.correction != CORRECTION_CORRECTED) {
        a = sigmoid(m);
        return softplus(m);
    }
    a = sigmoid(m - log(double(statistics.num_negatives)));
    return a == 0.0 ? 0.0 : a * m;
}

__device__ __forceinline__ RowLoss row_loss(const FinishRowsParams& all, const RowStatistics& statistics, uint64_t row, double upstream) {
    const EpilogueParams& p = all.epilogue;
    const double weight = p.row_weight ? double(p.row_weight[row]) : 1.0;
    if (!(weight >= 0.0 && isfinite(weight))) report_fault(p.fault, FAULT_ROW_WEIGHT, row);
    const PairRange pairs = pairs_of(all.statistics.positive_offsets, row);
    double loss = 0.0, coefficient = 0.0;
    for (uint64_t pair = pairs.first; pair < pairs.end; ++pair) {
        check_log_q(p, pair);
        double a;
        const double of_pair = pair_loss(p, statistics, positive_score(all.statistics, pair), pair, a);
        check_weight(p, pair);
        const double share = p.positive_weight ? double(p.positive_weight[pair]) : 1.0 / double(pairs.end - pairs.first);
        loss += weighted(share, of_pair);
        coefficient += weighted(share, a);
        if (p.probability) p.probability[pair] = 1.0 - a;
        if (p.d_positive) p.d_positive[pair] = weighted(weight * share * upstream, -a);
    }
    // A row of weight 0 is absent, whatever its loss.
    const RowLoss result = {weighted(weight * upstream, loss), weighted(weight * upstream, coefficient)};
    if (p.loss) p.loss[row] = loss;
    if (p.d_lse) p.d_lse[row] = result.d_lse;
    return result;
}
