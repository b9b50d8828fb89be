// The first launch of a step: what is known of each row alone, for all that comes later.
//
//   prepare_rows   inverse_norm[r] = 1 / |x_r|, or 0 where |x_r| < 1e-12 (such a row has cosine 0 with everything); under dot 1;
//                  the row's terms in the passes (terms.cuh); and the table of rejected keys, cleared (key_table.cuh)
//
// The inverse norm is NaN for a row with a NaN or ∞, and under cosine for a row of length 2^63 or more: it spoils the row's
// scores, and tells the streams to take the row's elements for 0. Cosines divide a dot product by the lengths, and the
// dot product of two longer rows may overflow f32.
//
// Shapes: up to three sets of rows x (rows, dim) with `stride >= dim` elements between rows; f32, f16 or bf16. Blocks of the first
// set's rows come first, then those of the others, then those that clear the table.
// Cost: reads each element once, 4 flops for each; bound by memory.
// Method: a warp for each row; lane l sums the squares of its elements in order, then a butterfly adds the lanes' sums.
// The order depends on dim and alignment alone, so results are bitwise reproducible.
// Numerics: sums in f32 and no pass to find the largest element. Nothing that matters underflows: at the shortest norm,
// 1e-12, the sum of squares is 1e-24. Where it overflows, the row is too long. Of a dot product there is no bound, so a
// second sum finds what is not finite.
// Tests: tests/gpu.rs against float64.

#include "rows/key_table.cuh"
#include "rows/terms.cuh"
#include "rows/warp.cuh"
#include "shared/fault.cuh"

namespace {

constexpr float MIN_NORM = 1e-12f;
// Dot products of shorter rows are below 2^126, and so is every sum on the way to them; their inverses are not
// denormal.
constexpr float MAX_NORM = 0x1p63f;

struct SumOfSquares {
    float squares = 0.0f;
    float zero = 0.0f;  // of x · 0: NaN if an element is not finite

    __device__ void add(float x) {
        squares = fmaf(x, x, squares);
        zero = fmaf(x, 0.0f, zero);
    }

    // The sum over the warp, the same in every lane.
    __device__ void reduce() {
        squares = warp_sum(squares);
        zero = warp_sum(zero);
    }

    __device__ float inverse_norm(bool cosine) const {
        if (isnan(zero)) return NAN;
        if (!cosine) return 1.0f;
        const float norm = sqrtf(squares);
        if (!(norm < MAX_NORM)) return NAN;
        return norm < MIN_NORM ? 0.0f : 1.0f / norm;
    }
};

template <typename T>
__device__ __forceinline__ float inverse_norm(const PrepareRowsParams& p, const RowSet& set, uint64_t row, uint32_t lane) {
    constexpr uint32_t VECTOR = sizeof(uint4) / sizeof(T);
    const T* x = static_cast<const T*>(set.embeddings) + row * set.stride;
    SumOfSquares sum;
    uint64_t done = 0;
    // Where every row starts on 16 bytes, lanes load 16 bytes at a time. The choice must not differ between rows, or
    // equal rows could get different sums.
    const bool aligned = reinterpret_cast<uintptr_t>(set.embeddings) % sizeof(uint4) == 0 && set.stride % VECTOR == 0;
    if (aligned) {
        done = p.dim / VECTOR * VECTOR;
        for (uint64_t k = lane * VECTOR; k < done; k += WARP * VECTOR) {
            const uint4 packed = *reinterpret_cast<const uint4*>(x + k);
            const T* elements = reinterpret_cast<const T*>(&packed);
#pragma unroll
            for (uint32_t i = 0; i < VECTOR; ++i) sum.add(widen(elements[i]));
        }
    }
    for (uint64_t k = done + lane; k < p.dim; k += WARP) sum.add(widen(x[k]));
    sum.reduce();
    return sum.inverse_norm(p.cosine != 0);
}

__device__ __forceinline__ void write_terms(const PrepareRowsParams& p, const RowSet& set, uint64_t row, float unit) {
    const float scale = set.scale * unit, bias = log_q_bias(set, row);
    if (!isfinite(bias)) report_fault(p.fault, FAULT_LOG_Q, set.start + row);
    set.inverse_norm[row] = unit;
    if (set.row_terms) set.row_terms[row] = {scale, bias - set.shift};
    if (set.columns) set.columns[row] = {scale, bias - set.shift, 1.0f, 1.0f};
    if (set.output_columns) set.output_columns[row] = output_column(scale, bias - set.output_shift, set.output_factor);
}

template <typename T>
__device__ __forceinline__ void prepare_rows(const PrepareRowsParams& p) {
    uint64_t block = blockIdx.x;
#pragma unroll
    for (int i = 0; i < ROW_SETS; ++i) {
        const RowSet& set = p.sets[i];
        const uint64_t blocks = (set.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        if (block < blocks) {
            const uint64_t row = block * BLOCK_ROWS + threadIdx.x / WARP;
            const uint32_t lane = threadIdx.x % WARP;
            if (row >= set.rows) return;  // the whole warp
            const float unit = inverse_norm<T>(p, set, row, lane);
            if (lane == 0) write_terms(p, set, row, unit);
            return;
        }
        block -= blocks;
    }
    const uint64_t slot = block * blockDim.x + threadIdx.x;
    if (p.keys.capacity != 0 && slot <= p.keys.capacity) clear_key(p.keys, slot);
}

}  // namespace

#define PREPARE_ROWS(type, element)                                     \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP)       \
        prepare_rows_##type(const __grid_constant__ PrepareRowsParams p) { \
        prepare_rows<element>(p);                                        \
    }

PREPARE_ROWS(f16, __half)
PREPARE_ROWS(bf16, __nv_bfloat16)
PREPARE_ROWS(f32, float)
