// Gradients of rows that several things name: rows of a table, and candidates of which a query has several as positives.
//
//   sum_segments  the share of SEGMENT uses, where one row has them and more: such a row is not the work of one warp
//   finish_table  dĉ_r = gamma (Σ_s 2^max_s output_s + Σ parts + Σ d_lse q_ik q̂_i + Σ d_positive q̂);   cosine: dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//
// over the splits of a pool whose candidate the row is, the pools' candidates by reference, the (i, k) whose own negative it is, and the
// pairs whose positive it is. Own negatives are scored again beside their row (own_score.cuh).
// Shapes: result (count, dim) f32; uses sorted by row (sort_uses.cu).
// Method: a warp has a row, or the rows whose first use is among the uses that it looks at. It goes through a row's uses, holds 256
// columns of the sum in registers, and applies the chain rule once.
// Sums run in the order of splits, then of the list: no atomics, bitwise reproducible.
// Cost: reads each named row of the table from memory once, and a query from cache for each use; bound by memory where uses are few.
// Tests: tests/gpu/tables.rs, against the reference.
#include "table/finish_table_params.h"
#include "table/own_score.cuh"
#include "table/uses.cuh"

namespace {

constexpr uint32_t EACH = 8;                  // columns of a lane
constexpr uint32_t COLUMNS = EACH * WARP;     // of a warp at a time

// A row, and what scores it as an own negative.
template <typename T>
struct Row {
    uint32_t key;       // the row in the list of uses
    const T* at;
    float unit;         // inverse norm
    Hits hits;          // the queries that reject it
    float held[EACH];   // a lane's columns of those at hand
};

// A lane's columns from `first` on, 0 past the end.
template <typename T>
__device__ __forceinline__ void load(float (&to)[EACH], const T* x, uint32_t first, uint32_t dim, uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < EACH; ++i) {
        const uint32_t column = first + lane + i * WARP;
        to[i] = column < dim ? widen(x[column]) : 0.0f;
    }
}

// sums += factor · x.
__device__ __forceinline__ void add(float (&sums)[EACH], float factor, const float (&x)[EACH]) {
#pragma unroll
    for (uint32_t i = 0; i < EACH; ++i) sums[i] += factor * x[i];
}

template <typename T>
__device__ __forceinline__ Row<T> row_of(const FinishTableParams& p, uint32_t key, uint32_t lane) {
    const T* at = static_cast<const T*>(p.x) + uint64_t(key - p.start) * p.x_stride;
    const float unit = inverse_norm(at, p.own.dim, aligned<T>(p.x, p.x_stride), p.own.cosine != 0, lane);
    return {key, at, unit, p.own.per_row > 0 ? hits_of_row(p.own, key) : Hits{1, 0, 0}, {}};
}

__device__ __forceinline__ void add_splits(float (&sums)[EACH], const FinishTableParams& p, uint64_t row, uint32_t first, uint32_t lane) {
    for (uint32_t split = 0; split < p.splits; ++split) {
        const uint64_t slot = split * p.count + row;
        // No score at all: the split's output is 0.
        const float factor = p.max[slot] == -INFINITY ? 0.0f : exp2f(p.max[slot]);
        float output[EACH];
        load(output, p.output + slot * p.own.dim, first, p.own.dim, lane);
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) sums[i] += output[i] == 0.0f ? 0.0f : factor * output[i];
    }
}

// Adds an own negative's query by d_lse · u_q · q_ik, which is 0 where it is no negative. Its use stands at `at` in the list.
template <typename T>
__device__ __forceinline__ void add_own(float (&sums)[EACH], const FinishTableParams& p, const Row<T>& row, uint32_t place, uint64_t at,
                                        uint32_t first, uint32_t lane) {
    const uint32_t query = place / p.own.per_row, dim = p.own.dim;
    const T* q = query_row<T>(p.own, query);
    const bool is_first = first == 0;
    float coefficient = is_first ? 0.0f : p.coefficients[at];
    const bool is_scored = is_first && p.columns[query].bias != -INFINITY && !rejects(p.own.keys, row.hits, query);
    float x[EACH];
    if (is_scored || coefficient != 0.0f) load(x, q, first, dim, lane);
    if (is_scored) {
        const ColumnTerm& column = p.columns[query];
        const float dot = dim <= COLUMNS ? held_dot(x, row.held) : row_dot(q, row.at, dim, lane);
        const OwnScore of = own_score(p.own, dot, column.scale, row.unit, query, place);
        coefficient = of.is_negative ? column.factor * ptx::exp2(ptx::min_or_nan(of.z + column.bias, column.limit)) : 0.0f;
    }
    if (is_first && p.coefficients && lane == 0) p.coefficients[at] = coefficient;
    if (coefficient != 0.0f) add(sums, coefficient, x);
}

// Adds what a use of the row brings to its gradient.
template <typename T>
__device__ __forceinline__ void add_use(float (&sums)[EACH], const FinishTableParams& p, const Row<T>& row, uint64_t use, uint64_t at,
                                        uint32_t first, uint32_t lane) {
    const uint32_t dim = p.own.dim;
    if (use >= p.uses.first_own && use < p.uses.first_pair) {
        add_own(sums, p, row, static_cast<uint32_t>(use - p.uses.first_own), at, first, lane);
        return;
    }
    float x[EACH];
    if (use < p.uses.first_own) {
        load(x, p.parts + use * dim, first, dim, lane);
        add(sums, 1.0f, x);
        return;
    }
    const uint64_t pair = use - p.uses.first_pair, query = p.pair_rows ? p.pair_rows[pair] : pair;
    const float d_positive = static_cast<float>(p.d_positive[pair]);
    if (d_positive == 0.0f) return;
    load(x, query_row<T>(p.own, query), first, dim, lane);
    add(sums, d_positive * p.own.query_norms[query], x);
}

// Adds the row's uses from `at` to the next multiple of 32. Returns how many these are: fewer where the row ends before.
template <typename T>
__device__ __forceinline__ uint32_t add_some(float (&sums)[EACH], const FinishTableParams& p, const Row<T>& row, uint64_t at,
                                             uint32_t first, uint32_t lane) {
    const uint32_t most = WARP - static_cast<uint32_t>(at % WARP);
    const uint64_t entry = lane < most && at + lane < p.uses.count ? p.uses.entries[at + lane] : ~0ull;
    const uint32_t number = __popc(__ballot_sync(~0u, entry >> USE_BITS == row.key));
    for (uint32_t i = 0; i < number; ++i) {
        const uint64_t use = __shfl_sync(~0u, entry, i) & ((1ull << USE_BITS) - 1);
        add_use(sums, p, row, use, at + i, first, lane);
    }
    return number;
}

// Whether the row, which has the use before `at`, has a whole segment from there on.
__device__ __forceinline__ bool is_segment(const Uses& uses, uint64_t at, uint32_t key) {
    return at % SEGMENT == 0 && at + SEGMENT <= uses.count && row_of_use(uses.entries, at + SEGMENT - 1) == key;
}

// Adds the row's uses, of which the first is at `start`.
template <typename T>
__device__ __forceinline__ void add_uses(float (&sums)[EACH], const FinishTableParams& p, const Row<T>& row, uint64_t start,
                                         uint32_t first, uint32_t lane) {
    uint64_t at = start;
    while (true) {
        if (at > start && is_segment(p.uses, at, row.key)) {
            float x[EACH];
            load(x, p.segments + at / SEGMENT * p.own.dim, first, p.own.dim, lane);
            add(sums, 1.0f, x);
            at += SEGMENT;
            continue;
        }
        const uint32_t number = add_some(sums, p, row, at, first, lane);
        at += number;
        if (number == 0 || at % WARP != 0) return;
    }
}

__device__ __forceinline__ uint64_t first_not_below(const Uses& uses, uint64_t entry) {
    uint64_t low = 0, high = uses.count;
    while (low < high) {
        const uint64_t middle = low + (high - low) / 2;
        if (uses.entries[middle] < entry) low = middle + 1;
        else high = middle;
    }
    return low;
}

// The row's gradient, to `to`. `start` is where its uses begin in the list.
template <typename T>
__device__ __forceinline__ void finish_row(const FinishTableParams& p, uint32_t key, uint64_t start, float* to, uint32_t lane) {
    const uint32_t dim = p.own.dim;
    const bool is_held = dim <= COLUMNS, cosine = p.own.cosine != 0;
    Row<T> row = row_of<T>(p, key, lane);
    float sums[EACH];
    float along = 0.0f, length = 0.0f;
    for (uint32_t first = 0; first < dim; first += COLUMNS) {
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) sums[i] = 0.0f;
        add_splits(sums, p, key - p.start, first, lane);
        load(row.held, row.at, first, dim, lane);
        add_uses(sums, p, row, start, first, lane);
        __syncwarp();  // coefficients are there for the next columns
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) {
            const uint32_t column = first + lane + i * WARP;
            if (column >= dim) continue;
            const float x = row.held[i] * row.unit;
            sums[i] *= p.gamma;
            along += sums[i] * x;
            length += x * x;
            if (!is_held || !cosine) to[column] = sums[i];
        }
    }
    if (!cosine) return;
    // The length is 1 but for rounding; by it, gradients are orthogonal to the embeddings as they are.
    length = warp_sum(length);
    along = length == 0.0f ? 0.0f : warp_sum(along) / length;
    if (is_held) {
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) {
            if (lane + i * WARP < dim) to[lane + i * WARP] = (sums[i] - row.held[i] * row.unit * along) * row.unit;
        }
        return;
    }
    for (uint32_t k = lane; k < dim; k += WARP) to[k] = (to[k] - widen(row.at[k]) * row.unit * along) * row.unit;
}

// A warp for each segment of the list but the first, before which no row has a use.
template <typename T>
__device__ __forceinline__ void sum_segment(const FinishTableParams& p) {
    const uint64_t at = (uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP + 1) * SEGMENT;
    const uint32_t lane = threadIdx.x % WARP, dim = p.own.dim;
    if (at >= p.uses.count) return;  // the whole warp, as below
    const uint32_t key = row_of_use(p.uses.entries, at - 1);
    if (key < p.start || key - p.start >= p.x_rows || !is_segment(p.uses, at, key)) return;
    Row<T> row = row_of<T>(p, key, lane);
    for (uint32_t first = 0; first < dim; first += COLUMNS) {
        float sums[EACH] = {};
        load(row.held, row.at, first, dim, lane);
        for (uint32_t i = 0; i < SEGMENT; i += WARP) add_some(sums, p, row, at + i, first, lane);
        __syncwarp();  // coefficients are there for the next columns
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) {
            const uint32_t column = first + lane + i * WARP;
            if (column < dim) p.segments[at / SEGMENT * dim + column] = sums[i];
        }
    }
}

template <typename T>
__device__ __forceinline__ void finish_table(const FinishTableParams& p) {
    const uint64_t index = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP, dim = p.own.dim;
    uint64_t start = index * USES_OF_WARP;
    bool is_first = p.by_use && lane < USES_OF_WARP && is_first_use(p.uses.entries, p.uses.count, start + lane);
    uint32_t key = 0;
    if (!p.by_use) {
        if (index >= p.count) return;  // the whole warp
        key = static_cast<uint32_t>(p.start + (p.rows ? p.rows[index] : index));
        start = first_not_below(p.uses, uint64_t(key) << USE_BITS);
        is_first = lane == 0;
    }
    for (uint32_t firsts = __ballot_sync(~0u, is_first); firsts != 0; firsts &= firsts - 1) {
        const uint64_t at = start + __ffs(firsts) - 1;
        if (p.by_use) key = row_of_use(p.uses.entries, at);
        finish_row<T>(p, key, at, p.result + (!p.by_use ? index : p.places ? p.places[at] : uint64_t(key)) * dim, lane);
    }
}

}  // namespace

#define FINISH_TABLE(type, element)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP, 2) sum_segments_##type(const __grid_constant__ FinishTableParams p) { \
        sum_segment<element>(p);                                                                                                        \
    }                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP, 2) finish_table_##type(const __grid_constant__ FinishTableParams p) { \
        finish_table<element>(p);                                                                                                       \
    }

FINISH_TABLE(f16, __half)
FINISH_TABLE(bf16, __nv_bfloat16)
FINISH_TABLE(f32, float)
