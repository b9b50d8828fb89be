// Negatives of rows' own: a partial result for each query, beside those of the streams' splits and of the same form.
//
//   stream_own   max z, Σ 2^(z − max), how many are masked; where wanted Σ 2^(z − max) c / |c|, moments, and ranks of each pair
//                over the query's K rows of the table, which are read where they are
//
// z and masks are those of score.cuh and key_table.cuh; an index of NO_NEGATIVE is masked.
// Shapes: rows (queries, K), table (rows, dim). A block for each query.
// Method: each warp scores one to four negatives at a time, each by some of its lanes (lanes.cuh); numbers of all K are kept in shared
// memory (12 bytes each). Then threads are along K for maximum, sums and ranks, and lanes along the rows for the output, whose second read
// of the rows finds them in cache. Sums run in the order of K within a group of lanes, then over groups and warps ascending: bitwise
// reproducible.
// Cost: reads K·dim elements from memory for each query; bound by memory.
// Limits: K <= 4096.
// Tests: tests/gpu/tables.rs, against the reference.
#include "rows/block_sum.cuh"
#include "rows/pairs.cuh"
#include "shared/fault.cuh"
#include "table/own_score.cuh"

namespace {

struct Numbers {
    float* z;       // then 2^(z − max)
    float* factor;  // inverse norms
    float* sim;     // NaN where masked: neither above a positive nor tied with it
};

// By a warp: its negatives. Returns how many of those that this lane's group has are masked.
template <typename T>
__device__ __forceinline__ uint32_t score_all(const OwnNegatives& own, uint64_t* fault, const Numbers& numbers, uint32_t row) {
    const Lanes lanes(own.dim);
    const bool is_aligned = aligned_table<T>(own), are_aligned = aligned_queries<T>(own);
    const T* query = query_row<T>(own, row);
    const float query_scale = own.scale * own.query_norms[row];
    float q[HELD];
    load<T>(q, query, 0, own.dim, are_aligned, lanes);
    uint32_t masked = 0;
    for (uint32_t first_k = threadIdx.x / WARP * lanes.groups(); first_k < own.per_row; first_k += BLOCK_ROWS * lanes.groups()) {
        const uint32_t k = first_k + lanes.group;
        const bool is_there = k < own.per_row;
        const uint64_t place = uint64_t(row) * own.per_row + k;
        const uint32_t index = is_there ? own.rows[place] : NO_NEGATIVE;
        const bool is_scored = index != NO_NEGATIVE && !rejects(own.keys, hits_of_row(own, index), row);
        // What is not scored is taken for 0.
        const T* c = table_row<T>(own, is_scored ? index : 0);
        const uint32_t dim = is_scored ? own.dim : 0;
        SumOfSquares squares;
        float dot = 0.0f;
        for (uint32_t first = 0; first < own.dim; first += PANEL) {
            float x[HELD];
            load<T>(x, c, first, dim, is_aligned, lanes);
            if (own.dim > PANEL) load<T>(q, query, first, own.dim, are_aligned, lanes);
            squares.add(x);
            dot = add_products(dot, q, x);
        }
        const float unit = squares.inverse_norm(own.cosine != 0, lanes);
        const OwnScore of = own_score(own, lanes.sum(dot), query_scale, unit, row, is_scored ? place : 0);
        const bool is_negative = is_scored && of.is_negative;
        if (!is_there || lanes.lane != 0) continue;
        masked += !is_negative;
        if (own.log_q && !isfinite(own.log_q[place])) report_fault(fault, FAULT_ROW_NEGATIVES_LOG_Q, place);
        numbers.z[k] = is_negative ? of.z : -INFINITY;
        numbers.factor[k] = is_scored ? unit : 0.0f;
        numbers.sim[k] = is_negative ? of.sim : NAN;
    }
    return masked;
}

// The largest of all threads' values. NaN is none.
__device__ __forceinline__ float block_max(float value) {
    __shared__ float of_warps[BLOCK_ROWS];
    for (uint32_t distance = WARP / 2; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    for (uint32_t warp = 0; warp < BLOCK_ROWS; ++warp) value = fmaxf(value, of_warps[warp]);
    return value;
}

// Probabilities in place of z; everything that is a sum over them.
__device__ __forceinline__ void write_sums(const OwnNegativesParams& p, const Numbers& numbers, uint64_t slot, uint32_t masked) {
    float max = -INFINITY;
    for (uint32_t k = threadIdx.x; k < p.own.per_row; k += THREADS) max = fmaxf(max, numbers.z[k]);
    max = block_max(max);
    float sum = 0.0f, sum_score = 0.0f, sum_z = 0.0f;
    for (uint32_t k = threadIdx.x; k < p.own.per_row; k += THREADS) {
        const float distance = numbers.z[k] - subtrahend(max), probability = ptx::exp2(distance);
        numbers.z[k] = probability;
        if (probability == 0.0f) continue;  // masked: 0 · ∞ must not enter
        sum += probability;
        sum_score += probability * numbers.sim[k];
        sum_z += probability * distance;
    }
    const double total = block_sum(sum), rejected = block_sum(masked);
    if (threadIdx.x == 0) {
        p.max[slot] = max;
        p.sum[slot] = static_cast<float>(total);
        p.masked[slot] = static_cast<uint32_t>(rejected);
    }
    if (!p.sum_score) return;
    const double score = block_sum(sum_score), z = block_sum(sum_z);
    if (threadIdx.x != 0) return;
    p.sum_score[slot] = static_cast<float>(score);
    p.sum_z[slot] = static_cast<float>(z);
}

__device__ __forceinline__ void write_ranks(const OwnNegativesParams& p, const float* sim, uint32_t row) {
    const PairRange pairs = pairs_of(p.positive_offsets, row);
    for (uint64_t pair = pairs.first; pair < pairs.end; ++pair) {
        const float positive = p.own_z[pair];
        uint32_t above = 0, ties = 0;
        for (uint32_t k = threadIdx.x; k < p.own.per_row; k += THREADS) {
            above += sim[k] > positive;
            ties += sim[k] == positive;
        }
        const double all_above = block_sum(above), all_ties = block_sum(ties);
        if (threadIdx.x != 0) continue;
        p.above[p.split * p.pairs + pair] = static_cast<uint32_t>(all_above);
        p.ties[p.split * p.pairs + pair] = static_cast<uint32_t>(all_ties);
    }
}

template <typename T>
__device__ __forceinline__ void write_output(const OwnNegativesParams& p, const Numbers& numbers, uint64_t slot, uint32_t row) {
    __shared__ float parts[BLOCK_ROWS][PANEL];
    const OwnNegatives& own = p.own;
    const Lanes lanes(own.dim);
    const uint32_t warp = threadIdx.x / WARP;
    const bool is_aligned = aligned_table<T>(own);
    for (uint32_t first = 0; first < own.dim; first += PANEL) {
        float sums[HELD] = {};
        for (uint32_t k = warp * lanes.groups() + lanes.group; k < own.per_row; k += BLOCK_ROWS * lanes.groups()) {
            const float probability = numbers.z[k];
            if (probability == 0.0f) continue;
            float x[HELD];
            load<T>(x, table_row<T>(own, own.rows[uint64_t(row) * own.per_row + k]), first, own.dim, is_aligned, lanes);
            add(sums, probability * numbers.factor[k], x);
        }
        __syncwarp();  // groups of lanes have different numbers of negatives
#pragma unroll
        for (uint32_t element = 0; element < HELD; ++element) {
            const float sum = lanes.sum_of_groups(sums[element]);
            if (lanes.group == 0) parts[warp][lanes.column<T>(0, element)] = sum;
        }
        __syncthreads();
        if (first + threadIdx.x < own.dim) {
            float sum = 0.0f;
            for (uint32_t of = 0; of < BLOCK_ROWS; ++of) sum += parts[of][threadIdx.x];
            p.output[slot * own.dim + first + threadIdx.x] = sum;
        }
        __syncthreads();
    }
}

template <typename T>
__device__ __forceinline__ void stream_own(const OwnNegativesParams& p) {
    extern __shared__ float memory[];
    const Numbers numbers = {memory, memory + p.own.per_row, memory + 2 * p.own.per_row};
    const uint32_t row = blockIdx.x;
    const uint64_t slot = p.split * p.queries + row;
    const uint32_t masked = score_all<T>(p.own, p.fault, numbers, row);
    __syncthreads();
    write_sums(p, numbers, slot, masked);
    if (p.above) write_ranks(p, numbers.sim, row);
    __syncthreads();  // probabilities are there
    if (p.output) write_output<T>(p, numbers, slot, row);
}

}  // namespace

#define STREAM_OWN(type, element)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) stream_own_##type(const __grid_constant__ OwnNegativesParams p) {          \
        stream_own<element>(p);                                                                                                        \
    }

STREAM_OWN(f16, __half)
STREAM_OWN(bf16, __nv_bfloat16)
STREAM_OWN(f32, float)
