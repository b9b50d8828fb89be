// What rows bring to the scores, beside their elements: scales, biases, and the factors of outputs (stream_params.h).
//
// With gamma' = log2(e) / tau, u = 1 / |x| under cosine (0 for a row shorter than 1e-12) and 1 under dot:
//
//   row_term       candidate: scale u_c, bias −log_q · log2(e) − shift          query: scale gamma' u_q, bias 0
//   column_term    candidate: the same                                                                      output factor u_c
//   query_column   scale gamma' u_q     bias −lse                      output factor d_lse · u_q      limit 0
//   positive_term                                                      output factor d_positive · u_q
//
// The exponent subtracts lse in units of log 2, less the exponent of the factor, rounded to f32; what rounding left
// goes into the factor and the limit. Where |lse| is past 2^24 that rounding leaves more than a factor of 2 in the
// factor: of f16, whose operands are below 2^16, rows with d_lse · u_q >= 4 then have infinite coefficients, and their
// candidates gradients that are not finite.
#pragma once
#include "rows/rows_params.h"

constexpr double LOG2_E_EXACT = 1.4426950408889634;
constexpr float LOG2_E = static_cast<float>(LOG2_E_EXACT);

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

// What a row's log_q brings to its bias.
__device__ __forceinline__ float log_q_bias(const RowSet& set, uint64_t row) {
    return set.log_q ? -set.log_q[row] * LOG2_E : 0.0f;
}

// Of a pass with an output.
__device__ __forceinline__ ColumnTerm output_column(float scale, float bias, uint32_t output_factor) {
    ColumnTerm term = {scale, bias, scale, 1.0f};
    // A candidate of length 0 has score 0 and a probability; only its place in the output is 0.
    if (output_factor == OUTPUT_FOLDED && scale != 0.0f) {
        float exponent;
        term.factor = split_exponent(scale, exponent);
        term.bias += exponent;
        term.unscale = exp2f(-exponent);
    }
    return term;
}

// Of a query in the gradient, `unit` its inverse norm and `scale` gamma'. Its coefficients are
// d_lse · u_q · 2^(z − lse) = factor · 2^(z + bias), and z + bias is at most `limit`.
__device__ __forceinline__ ColumnTerm query_column(float unit, float scale, double lse, float d_lse) {
    float exponent;
    const float fraction = split_exponent(d_lse == 0.0f ? 0.0f : d_lse * unit, exponent);
    ColumnTerm term = {scale * unit, -INFINITY, fraction, 0.0f};
    if (fraction == 0.0f) return term;
    const double exact = lse * LOG2_E_EXACT;
    term.bias = -static_cast<float>(exact - exponent);
    if (!isfinite(term.bias)) return term;
    const double limit = exact + double(term.bias);
    term.factor = static_cast<float>(fraction * exp2(exponent - limit));
    term.limit = static_cast<float>(limit);
    return term;
}

// Of a query's positive, a candidate of that index over all pools.
__device__ __forceinline__ PositiveTerm positive_term(uint32_t index, float unit, float d_positive) {
    float exponent;
    const float factor = split_exponent(d_positive == 0.0f ? 0.0f : d_positive * unit, exponent);
    return {index, factor, exponent};
}
