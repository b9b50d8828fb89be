// Negatives of rows' own: a partial result for each query, beside those of the streams' splits and of the same form.
//
//   stream_own   max z, Σ 2^(z − max), how many are masked; where wanted Σ 2^(z − max) c / |c|, moments, and ranks of each pair
//                over the query's K rows of the table, which are read where they are
//
// z and masks are those of score.cuh and key_table.cuh; an index of NO_NEGATIVE is masked.
// Shapes: rows (queries, K), table (rows, dim). A block for each query.
// Method: each warp scores every eighth negative, its lanes along the embedding; numbers of all K are kept in shared memory (12 bytes
// each). Then threads are along K for maximum, sums and ranks, and along the embedding for the output, whose second read of the rows
// finds them in cache. Sums run in the order of K within a warp, and warps ascending: bitwise reproducible.
// Cost: reads K·dim elements from memory for each query; bound by memory.
// Limits: K <= 4096.
// Tests: tests/gpu/tables.rs, against the reference.
#include "rows/block_sum.cuh"
#include "rows/pairs.cuh"
#include "shared/fault.cuh"
#include "table/own_score.cuh"

namespace {

constexpr uint32_t EACH = THREADS / WARP;  // output columns of a lane
static_assert(EACH * WARP == THREADS, "a thread adds up one column");

struct Numbers {
    float* z;       // then 2^(z − max)
    float* factor;  // inverse norms
    float* sim;     // NaN where masked: neither above a positive nor tied with it
};

// By a warp: its negatives. Returns how many of them are masked.
template <typename T>
__device__ __forceinline__ uint32_t score_all(const OwnNegatives& own, uint64_t* fault, const Numbers& numbers, uint32_t row, uint32_t warp,
                                             uint32_t lane) {
    const T* query = query_row<T>(own, row);
    const float query_scale = own.scale * own.query_norms[row];
    uint32_t masked = 0;
    for (uint32_t k = warp; k < own.per_row; k += BLOCK_ROWS) {
        const uint64_t place = uint64_t(row) * own.per_row + k;
        const uint32_t index = own.rows[place];
        OwnScore of = {NAN, -INFINITY, false};
        float unit = 0.0f;
        if (index != NO_NEGATIVE && !rejects(own.keys, hits_of_row(own, index), row)) {
            const T* c = table_row<T>(own, index);
            unit = table_norm(own, c, lane);
            of = own_score(own, row_dot(query, c, own.dim, lane), query_scale, unit, row, place);
        }
        masked += !of.is_negative;
        if (lane != 0) continue;
        if (own.log_q && !isfinite(own.log_q[place])) report_fault(fault, FAULT_ROW_NEGATIVES_LOG_Q, place);
        numbers.z[k] = of.is_negative ? of.z : -INFINITY;
        numbers.factor[k] = unit;
        numbers.sim[k] = of.is_negative ? of.sim : NAN;
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
    const double total = block_sum(sum), rejected = block_sum(threadIdx.x % WARP == 0 ? masked : 0);
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
    __shared__ float parts[BLOCK_ROWS][THREADS];
    const OwnNegatives& own = p.own;
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (uint32_t first = 0; first < own.dim; first += THREADS) {
        float sums[EACH] = {};
        for (uint32_t k = warp; k < own.per_row; k += BLOCK_ROWS) {
            const float probability = numbers.z[k];
            if (probability == 0.0f) continue;
            const T* c = table_row<T>(own, own.rows[uint64_t(row) * own.per_row + k]);
            const float factor = probability * numbers.factor[k];
#pragma unroll
            for (uint32_t i = 0; i < EACH; ++i) {
                const uint32_t column = first + lane + i * WARP;
                if (column < own.dim) sums[i] += factor * widen(c[column]);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) parts[warp][lane + i * WARP] = sums[i];
        __syncthreads();
        float sum = 0.0f;
        for (uint32_t of = 0; of < BLOCK_ROWS; ++of) sum += parts[of][threadIdx.x];
        if (first + threadIdx.x < own.dim) p.output[slot * own.dim + first + threadIdx.x] = sum;
        __syncthreads();
    }
}

template <typename T>
__device__ __forceinline__ void stream_own(const OwnNegativesParams& p) {
    extern __shared__ float memory[];
    const Numbers numbers = {memory, memory + p.own.per_row, memory + 2 * p.own.per_row};
    const uint32_t row = blockIdx.x;
    const uint64_t slot = p.split * p.queries + row;
    const uint32_t masked = score_all<T>(p.own, p.fault, numbers, row, threadIdx.x / WARP, threadIdx.x % WARP);
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
