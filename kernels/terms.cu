// What rows bring to the scores, beside their elements: scales, biases, and the factors of outputs (stream_params.h).
//
// With gamma' = log2(e) / tau, u = 1 / |x| under cosine (0 for a row shorter than 1e-12) and 1 under dot:
//
//   candidate_columns   scale u_c            bias −log_q · log2(e) − shift  output factor u_c
//   candidate_rows      scale u_c            bias −log_q · log2(e) − shift
//   query_rows          scale gamma' u_q     bias 0
//   query_columns       scale gamma' u_q     bias −lse                      output factor d_lse · u_q      limit 0
//   positive_terms                                                          output factor d_positive · u_q
//
// The exponent subtracts lse in units of log 2, less the exponent of the factor, rounded to f32; what rounding left
// goes into the factor and the limit. Where |lse| is past 2^24 that rounding leaves more than a factor of 2 in the
// factor: of f16, whose operands are below 2^16, rows with d_lse · u_q >= 4 then have infinite coefficients, and their
// candidates gradients that are not finite.
// Tests: tests/gpu.rs, through every result.
#include "fault.cuh"
#include "terms_params.h"

namespace {

constexpr double LOG2_E_EXACT = 1.4426950408889634;
constexpr float LOG2_E = static_cast<float>(LOG2_E_EXACT);

__device__ __forceinline__ uint64_t thread() { return uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

// value = factor · 2^exponent with 1 <= |factor| < 2. Zero has the exponent −inf: nothing of it survives exponentiation.
__device__ __forceinline__ float split_exponent(float value, float& exponent) {
    if (value == 0.0f) {
        exponent = -INFINITY;
        return 0.0f;
    }
    if (!isfinite(value)) {
        exponent = 0.0f;
        return value;
    }
    int e;
    const float fraction = frexpf(value, &e);  // 1/2 <= |fraction| < 1
    exponent = static_cast<float>(e - 1);
    return 2.0f * fraction;
}

__device__ __forceinline__ float unit(const TermsParams& p, uint64_t i) { return p.inverse_norm[i]; }

// Of a query in the gradient. Its coefficients are d_lse · u_q · 2^(z − lse) = factor · 2^(z + bias), and z + bias is
// at most `limit`.
__device__ __forceinline__ ColumnTerm query_column(const TermsParams& p, uint64_t i) {
    // A row with no negatives has no coefficients, and an lse of −inf.
    const float d_lse = p.num_negatives[i] == 0 ? 0.0f : static_cast<float>(p.d_lse[i]);
    float exponent;
    const float fraction = split_exponent(d_lse == 0.0f ? 0.0f : d_lse * unit(p, i), exponent);
    ColumnTerm term = {p.scale * unit(p, i), -INFINITY, fraction, 0.0f};
    if (fraction == 0.0f) return term;
    const double exact = p.lse[i] * LOG2_E_EXACT;
    term.bias = -static_cast<float>(exact - exponent);
    if (!isfinite(term.bias)) return term;
    const double limit = exact + double(term.bias);
    term.factor = static_cast<float>(fraction * exp2(exponent - limit));
    term.limit = static_cast<float>(limit);
    return term;
}

}  // namespace

extern "C" __global__ void candidate_columns(const __grid_constant__ TermsParams p) {
    const uint64_t i = thread();
    if (i >= p.rows) return;
    const float scale = unit(p, i), bias = (p.log_q ? -p.log_q[i] * LOG2_E : 0.0f) - p.shift;
    if (!isfinite(bias)) report_fault(p.fault, FAULT_LOG_Q, p.start + i);
    ColumnTerm term = {scale, bias, 1.0f, 1.0f};
    if (p.output_factor != OUTPUT_NONE) term.factor = scale;
    // A candidate of length 0 has score 0 and a probability; only its place in the output is 0.
    if (p.output_factor == OUTPUT_FOLDED && scale != 0.0f) {
        float exponent;
        term.factor = split_exponent(scale, exponent);
        term.bias += exponent;
        term.unscale = exp2f(-exponent);
    }
    p.columns[i] = term;
}

extern "C" __global__ void candidate_rows(const __grid_constant__ TermsParams p) {
    const uint64_t i = thread();
    if (i >= p.rows) return;
    const float bias = (p.log_q ? -p.log_q[i] * LOG2_E : 0.0f) - p.shift;
    if (!isfinite(bias)) report_fault(p.fault, FAULT_LOG_Q, p.start + i);
    p.row_terms[i] = {unit(p, i), bias};
}

extern "C" __global__ void query_rows(const __grid_constant__ TermsParams p) {
    const uint64_t i = thread();
    if (i >= p.rows) return;
    p.row_terms[i] = {p.scale * unit(p, i), 0.0f};
}

extern "C" __global__ void query_columns(const __grid_constant__ TermsParams p) {
    const uint64_t i = thread();
    if (i >= p.rows) return;
    p.columns[i] = query_column(p, i);
    if (!p.positives) return;
    float exponent;
    const float d_positive = static_cast<float>(p.d_positive[i]);
    const float positive = split_exponent(d_positive == 0.0f ? 0.0f : d_positive * unit(p, i), exponent);
    p.positive_terms[i] = {p.positives[i], positive, exponent};
}
