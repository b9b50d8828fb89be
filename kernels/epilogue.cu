// The loss of each row from its statistics, its derivatives, and the total: src/loss.rs on the device.
//
//   epilogue            with m = lse + shift − positive:   softplus(m), a = σ(m); shift 0 or log Q₊
//                       corrected logQ:                     w m, a = w = σ(m − log n); shift log(1 − Q₊)
//                       d_lse = a · weight · reduction, d_positive = −d_lse; a row with no negatives has none of it
//   finish_temperature  dL/dtau = −gamma² Σ d_gamma, dL/dlog tau = −gamma Σ d_gamma
//
// Shapes: (rows). One block: rows are few, and sums have one order (a thread's rows ascending, then a tree), so results are
// bitwise reproducible. In f64.
// Tests: tests/gpu.rs, against src/loss.rs.
#include "epilogue_params.h"
#include "fault.cuh"

namespace {

constexpr uint32_t THREADS = 256;

// The sum of each thread's value, in every thread.
__device__ double block_sum(double value) {
    __shared__ double values[THREADS];
    __syncthreads();  // the last sum has been read
    values[threadIdx.x] = value;
    for (uint32_t half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    }
    __syncthreads();
    return values[0];
}

__device__ double softplus(double m) { return fmax(m, 0.0) + log1p(exp(-fabs(m))); }

__device__ double sigmoid(double m) {
    const double e = exp(-fabs(m));
    return (m < 0.0 ? e : 1.0) / (1.0 + e);
}

// log(1 − exp(x)) for x < 0, without cancellation at either end.
__device__ double log1m_exp(double x) { return x > -0.6931471805599453 ? log(-expm1(x)) : log1p(-exp(x)); }

__device__ double weight(const EpilogueParams& p, uint64_t row) { return p.row_weight ? double(p.row_weight[row]) : 1.0; }

__device__ double row_loss(const EpilogueParams& p, uint64_t row, double& a) {
    a = 0.0;
    const uint64_t n = p.num_negatives[row];
    if (n == 0) return 0.0;
    const double log_q = p.positive_log_q ? double(p.positive_log_q[row]) : 0.0;
    double shift = 0.0;
    if (p.correction == CORRECTION_LOG_Q) shift = log_q;
    if (p.correction == CORRECTION_CORRECTED) shift = log1m_exp(log_q);
    const double m = p.lse[row] + shift - p.positive[row];
    if (isnan(m)) return a = m;
    if (p.correction != CORRECTION_CORRECTED) {
        a = sigmoid(m);
        return softplus(m);
    }
    a = sigmoid(m - log(double(n)));
    return a == 0.0 ? 0.0 : a * m;
}

__device__ void check(const EpilogueParams& p, uint64_t row) {
    const double w = weight(p, row);
    if (!(w >= 0.0 && isfinite(w))) report_fault(p.fault, FAULT_ROW_WEIGHT, row);
    if (!p.positive_log_q) return;
    const double log_q = p.positive_log_q[row];
    if (!isfinite(log_q) || (p.correction == CORRECTION_CORRECTED && log_q >= 0.0)) {
        report_fault(p.fault, FAULT_POSITIVE_LOG_Q, row);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) epilogue(const __grid_constant__ EpilogueParams p) {
    double upstream = 1.0;
    if (p.reduction == REDUCTION_MEAN) upstream = 1.0 / double(p.rows);
    if (p.reduction == REDUCTION_WEIGHTED_MEAN) {
        double sum = 0.0;
        for (uint64_t row = threadIdx.x; row < p.rows; row += THREADS) sum += weight(p, row);
        sum = block_sum(sum);
        if (threadIdx.x == 0 && !(sum > 0.0)) report_fault(p.fault, FAULT_ROW_WEIGHT, p.rows);
        upstream = 1.0 / sum;
    }
    double total = 0.0;
    for (uint64_t row = threadIdx.x; row < p.rows; row += THREADS) {
        check(p, row);
        double a;
        const double loss = row_loss(p, row, a), w = weight(p, row);
        // A row of weight 0 is absent, whatever its loss: 0 · NaN must not enter a sum.
        const double d = w == 0.0 ? 0.0 : w * upstream * a;
        p.loss[row] = loss;
        p.probability[row] = 1.0 - a;
        p.d_lse[row] = d;
        p.d_positive[row] = -d;
        total += w == 0.0 ? 0.0 : w * upstream * loss;
    }
    total = block_sum(total);
    if (threadIdx.x == 0) *p.total = total;
}

extern "C" __global__ void __launch_bounds__(THREADS) finish_temperature(const __grid_constant__ EpilogueParams p) {
    double sum = 0.0;
    for (uint64_t row = threadIdx.x; row < p.rows; row += THREADS) sum += p.d_gamma[row];
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    *p.d_temperature = -p.gamma * p.gamma * sum;
    *p.d_log_temperature = -p.gamma * sum;
}
