// Gradients of rows that several things name: rows of a table, and candidates of which a query has several as positives.
//
//   finish_table  dĉ_r = gamma (Σ_s 2^max_s output_s + Σ parts + Σ d_lse q_ik q̂_i + Σ d_positive q̂);   cosine: dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//
// over the splits of a pool whose candidate the row is, the pools' candidates by reference, the (i, k) whose own negative it is, and the
// pairs whose positive it is. Own negatives are scored again beside their row (own_score.cuh).
// Shapes: result (count, dim) f32; uses sorted by row (sort_uses.cu).
// Method: a warp for each row finds its uses by bisection, holds 256 columns of the sum in registers, and applies the chain rule once.
// Sums run in the order of splits, then of the lists: no atomics, bitwise reproducible.
// Cost: reads each named row of the table from memory once, and a query from cache for each use; bound by memory where uses are few.
// Tests: tests/gpu/tables.rs, against the reference.
#include "table/finish_table_params.h"
#include "table/own_score.cuh"

namespace {

constexpr uint32_t EACH = 8;                  // columns of a lane
constexpr uint32_t COLUMNS = EACH * WARP;     // of a warp at a time

struct Range {
    uint64_t first;
    uint64_t end;
};

__device__ __forceinline__ uint64_t first_not_below(const Uses& uses, uint64_t entry) {
    uint64_t low = 0, high = uses.count;
    while (low < high) {
        const uint64_t middle = low + (high - low) / 2;
        if (uses.entries[middle] < entry) low = middle + 1;
        else high = middle;
    }
    return low;
}

// A row's uses as a candidate, as an own negative, and as a positive.
struct RowUses {
    Range candidates;
    Range own;
    Range pairs;
};

__device__ __forceinline__ RowUses uses_of(const Uses& uses, uint64_t row) {
    const uint64_t key = row << USE_BITS;
    const uint64_t first = first_not_below(uses, key), own = first_not_below(uses, key | uses.first_own);
    const uint64_t pairs = first_not_below(uses, key | uses.first_pair), end = first_not_below(uses, (row + 1) << USE_BITS);
    return {{first, own}, {own, pairs}, {pairs, end}};
}

// Which use it is, of those from `first` on.
__device__ __forceinline__ uint32_t user(const Uses& uses, uint64_t at, uint64_t first) {
    return static_cast<uint32_t>((uses.entries[at] & ((1ull << USE_BITS) - 1)) - first);
}

// sums += factor · x, of the columns from `first` on.
template <typename T>
__device__ __forceinline__ void add(float (&sums)[EACH], float factor, const T* x, uint32_t first, uint32_t dim, uint32_t lane) {
#pragma unroll
    for (uint32_t i = 0; i < EACH; ++i) {
        const uint32_t column = first + lane + i * WARP;
        if (column < dim) sums[i] += factor * widen(x[column]);
    }
}

__device__ __forceinline__ void add_splits(float (&sums)[EACH], const FinishTableParams& p, uint64_t row, uint32_t first, uint32_t lane) {
    for (uint32_t split = 0; split < p.splits; ++split) {
        const uint64_t slot = split * p.count + row;
        // No score at all: the split's output is 0.
        const float factor = p.max[slot] == -INFINITY ? 0.0f : exp2f(p.max[slot]);
        const float* output = p.output + slot * p.own.dim;
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) {
            const uint32_t column = first + lane + i * WARP;
            const float part = column < p.own.dim ? output[column] : 0.0f;
            sums[i] += part == 0.0f ? 0.0f : factor * part;
        }
    }
}

// d_lse · u_q · q_ik of the own negative at `place`; 0 where it is none.
template <typename T>
__device__ __forceinline__ float own_coefficient(const FinishTableParams& p, const T* c, float unit, const Hits& hits, uint32_t place,
                                                 uint32_t lane) {
    const uint32_t query = place / p.own.per_row;
    const ColumnTerm& column = p.columns[query];
    if (column.bias == -INFINITY || rejects(p.own.keys, hits, query)) return 0.0f;
    const OwnScore of = own_score(p.own, query_row<T>(p.own, query), c, unit, query, place, lane);
    return of.is_negative ? column.factor * ptx::exp2(ptx::min_or_nan(of.z + column.bias, column.limit)) : 0.0f;
}

template <typename T>
__device__ __forceinline__ void add_own(float (&sums)[EACH], const FinishTableParams& p, const T* c, float unit, const Hits& hits,
                                        const Range& range, uint32_t first, uint32_t lane) {
    for (uint64_t use = range.first; use < range.end; ++use) {
        const uint32_t place = user(p.uses, use, p.uses.first_own);
        float coefficient;
        if (first == 0) {
            coefficient = own_coefficient(p, c, unit, hits, place, lane);
            if (p.coefficients && lane == 0) p.coefficients[use] = coefficient;
        } else {
            coefficient = p.coefficients[use];
        }
        if (coefficient != 0.0f) add(sums, coefficient, query_row<T>(p.own, place / p.own.per_row), first, p.own.dim, lane);
    }
}

template <typename T>
__device__ __forceinline__ void add_pairs(float (&sums)[EACH], const FinishTableParams& p, const Range& range, uint32_t first,
                                          uint32_t lane) {
    for (uint64_t use = range.first; use < range.end; ++use) {
        const uint32_t pair = user(p.uses, use, p.uses.first_pair), query = p.pair_rows ? p.pair_rows[pair] : pair;
        const float d_positive = static_cast<float>(p.d_positive[pair]);
        if (d_positive == 0.0f) continue;
        add(sums, d_positive * p.own.query_norms[query], query_row<T>(p.own, query), first, p.own.dim, lane);
    }
}

// The row that a warp has; none where an earlier warp has it.
__device__ __forceinline__ uint64_t row_at(const FinishTableParams& p, uint64_t index) {
    if (!p.by_use) return p.rows ? p.rows[index] : index;
    const uint64_t row = p.uses.entries[index] >> USE_BITS;
    return index > 0 && p.uses.entries[index - 1] >> USE_BITS == row ? NO_ROW_USED : row;
}

template <typename T>
__device__ __forceinline__ void finish_table(const FinishTableParams& p) {
    const uint64_t index = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP, dim = p.own.dim;
    if (index >= p.count) return;  // the whole warp
    const uint64_t row = row_at(p, index);
    if (row == NO_ROW_USED) return;  // the whole warp
    const T* c = static_cast<const T*>(p.x) + row * p.x_stride;
    const float unit = inverse_norm(c, dim, aligned<T>(p.x, p.x_stride), p.own.cosine != 0, lane);
    const RowUses uses = uses_of(p.uses, p.start + row);
    const Hits hits = uses.own.first < uses.own.end ? hits_of_row(p.own, static_cast<uint32_t>(row)) : Hits{1, 0, 0};
    float* to = p.result + (!p.by_use ? index : p.places ? p.places[index] : row) * dim;
    float along = 0.0f, length = 0.0f;
    for (uint32_t first = 0; first < dim; first += COLUMNS) {
        float sums[EACH] = {};
        add_splits(sums, p, row, first, lane);
        for (uint64_t use = uses.candidates.first; use < uses.candidates.end; ++use) {
            add(sums, 1.0f, p.parts + uint64_t(user(p.uses, use, 0)) * dim, first, dim, lane);
        }
        add_own(sums, p, c, unit, hits, uses.own, first, lane);
        add_pairs<T>(sums, p, uses.pairs, first, lane);
        __syncwarp();  // coefficients are there for the next columns
#pragma unroll
        for (uint32_t i = 0; i < EACH; ++i) {
            const uint32_t column = first + lane + i * WARP;
            if (column >= dim) continue;
            const float d = p.gamma * sums[i], x = widen(c[column]) * unit;
            to[column] = d;
            along += d * x;
            length += x * x;
        }
    }
    if (!p.own.cosine) return;
    // The length is 1 but for rounding; by it, gradients are orthogonal to the embeddings as they are.
    length = warp_sum(length);
    along = length == 0.0f ? 0.0f : warp_sum(along) / length;
    for (uint32_t k = lane; k < dim; k += WARP) to[k] = (to[k] - widen(c[k]) * unit * along) * unit;
}

}  // namespace

#define FINISH_TABLE(type, element)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP, 3) finish_table_##type(const __grid_constant__ FinishTableParams p) { \
        finish_table<element>(p);                                                                                                      \
    }

FINISH_TABLE(f16, __half)
FINISH_TABLE(bf16, __nv_bfloat16)
FINISH_TABLE(f32, float)
