// Gradients of rows that several things name: rows of a table, and candidates of which a query has several as positives.
//
//   sum_segments  sums of those segments of SEGMENT uses that are all of one row, a warp each: a row may have a share of all uses
//   finish_table  dĉ_r = gamma (Σ_s 2^max_s output_s + Σ parts + Σ d_lse q_ik q̂_i + Σ d_positive q̂);   cosine: dc = (dĉ − ĉ (ĉ·dĉ)) / |c|
//
// over the splits of a pool whose candidate the row is, the pools' candidates by reference, the (i, k) whose own negative it is, and the
// pairs whose positive it is. Own negatives are scored again beside their row (own_score.cuh).
// Shapes: result (count, dim) f32; uses sorted by row (sort_uses.cu).
// Method: a warp has a row, or the rows whose first use is among the uses that it looks at. It goes through a row's uses, one to four at a
// time, each by some of its lanes (lanes.cuh), holds a panel of the sum in registers, and applies the chain rule once.
// The order of sums depends on the list alone: no atomics, bitwise reproducible.
// Cost: reads each named row of the table from memory once, and a query from cache for each use; bound by memory where uses are few.
// Tests: tests/gpu/tables.rs, against the reference.
#include "rows/finish_row.cuh"
#include "table/finish_table_params.h"
#include "table/own_score.cuh"
#include "table/uses.cuh"

namespace {

// A row, and what scores it as an own negative. Each group of lanes has it.
template <typename T>
struct Row {
    uint32_t key;       // the row in the list of uses
    const T* at;
    bool is_aligned;
    float unit;         // inverse norm
    Hits hits;          // the queries that reject it
    float held[HELD];   // a lane's elements of the panel that is summed
};

template <typename T>
__device__ __forceinline__ Row<T> row_of(const FinishTableParams& p, uint32_t key, const Lanes& lanes) {
    const T* at = static_cast<const T*>(p.x) + uint64_t(key - p.start) * p.x_stride;
    const bool is_aligned = aligned<T>(p.x, p.x_stride);
    const float unit = inverse_norm(at, p.own.dim, is_aligned, p.own.cosine != 0, lanes);
    return {key, at, is_aligned, unit, p.own.per_row > 0 ? hits_of_row(p.own, key) : Hits{1, 0, 0}, {}};
}

// Of the pool that is the table: its splits, in turn by the groups of lanes.
template <typename T>
__device__ __forceinline__ void add_splits(float (&sums)[HELD], const FinishTableParams& p, uint64_t row, uint32_t first,
                                           const Lanes& lanes) {
    const uint32_t dim = p.own.dim;
    for (uint32_t split = lanes.group; split < p.splits; split += lanes.groups()) {
        const uint64_t slot = split * p.count + row;
        add_split<T>(sums, p.max[slot], p.output + slot * dim, first, dim, aligned<float>(p.output, dim), lanes);
    }
    __syncwarp();  // groups of lanes have different numbers of splits
}

// A use of the row that a group of lanes has. It brings factor · x to the gradient.
struct Use {
    bool is_own;      // an own negative
    bool is_scored;   // one whose factor needs a score
    uint32_t query;   // of an own negative or a pair
    uint32_t place;   // of an own negative in the (queries, per_row) array
    float factor;
};

// The group's use, which is `entry` of the list and stands at `at`, and its x.
template <typename T>
__device__ __forceinline__ Use use_of(float (&x)[HELD], const FinishTableParams& p, const Row<T>& row, uint64_t entry, uint64_t at,
                                      uint32_t first, const Lanes& lanes) {
    const uint64_t use = entry & ((1ull << USE_BITS) - 1);
    const uint32_t dim = p.own.dim;
    if (use < p.uses.first_own) {
        load<T>(x, p.parts + use * dim, first, dim, aligned<float>(p.parts, dim), lanes);
        return {false, false, 0, 0, 1.0f};
    }
    Use of = {use < p.uses.first_pair, false, 0, 0, 0.0f};
    if (of.is_own) {
        of.place = static_cast<uint32_t>(use - p.uses.first_own);
        of.query = of.place / p.own.per_row;
        of.is_scored = first == 0 && p.columns[of.query].bias != -INFINITY && !rejects(p.own.keys, row.hits, of.query);
        if (first > 0) of.factor = p.coefficients[at];
    } else {
        const uint64_t pair = use - p.uses.first_pair;
        of.query = p.pair_rows ? p.pair_rows[pair] : static_cast<uint32_t>(pair);
        const float d_positive = static_cast<float>(p.d_positive[pair]);
        of.factor = d_positive == 0.0f ? 0.0f : d_positive * p.own.query_norms[of.query];
    }
    const bool is_read = of.is_scored || of.factor != 0.0f;
    load<T>(x, query_row<T>(p.own, of.query), first, is_read ? dim : 0, aligned_queries<T>(p.own), lanes);
    return of;
}

// d_lse · u_q · q_ik of the groups' own negatives; 0 where one is no negative. Of other uses their factor. By the whole warp.
template <typename T>
__device__ __forceinline__ float own_coefficient(const FinishTableParams& p, const Row<T>& row, const float (&x)[HELD], const Use& use,
                                                 const Lanes& lanes) {
    const uint32_t dim = p.own.dim;
    const bool are_aligned = row.is_aligned && aligned_queries<T>(p.own);
    const float dot = dim <= PANEL ? lanes.sum(add_products(0.0f, x, row.held))
                                   : row_dot(query_row<T>(p.own, use.query), row.at, dim, are_aligned, lanes);
    if (!use.is_scored) return use.factor;
    const ColumnTerm& column = p.columns[use.query];
    const OwnScore of = own_score(p.own, dot, column.scale, row.unit, use.query, use.place);
    return of.is_negative ? column.factor * ptx::exp2(ptx::min_or_nan(of.z + column.bias, column.limit)) : 0.0f;
}

// Adds the row's uses from `at` to the next multiple of 32, in turn by the groups of lanes. Returns how many these are: fewer where the
// row ends before.
template <typename T>
__device__ __forceinline__ uint32_t add_some(float (&sums)[HELD], const FinishTableParams& p, const Row<T>& row, uint64_t at,
                                             uint32_t first, const Lanes& lanes) {
    const uint32_t lane = threadIdx.x % WARP, most = WARP - static_cast<uint32_t>(at % WARP);
    const uint64_t entry = lane < most && at + lane < p.uses.count ? p.uses.entries[at + lane] : ~0ull;
    const uint32_t number = __popc(__ballot_sync(~0u, entry >> USE_BITS == row.key));
    for (uint32_t i = 0; i < number; i += lanes.groups()) {
        const uint32_t mine = i + lanes.group;
        const uint64_t of_group = __shfl_sync(~0u, entry, mine % WARP);
        float x[HELD] = {};
        Use use = {};
        if (mine < number) use = use_of(x, p, row, of_group, at + mine, first, lanes);
        if (__any_sync(~0u, use.is_scored)) use.factor = own_coefficient(p, row, x, use, lanes);
        // Later panels read it.
        if (first == 0 && use.is_own && p.coefficients && lanes.lane == 0) p.coefficients[at + mine] = use.factor;
        if (use.factor != 0.0f) add(sums, use.factor, x);
    }
    return number;
}

// Whether the row, which has the use before `at`, has a whole segment from there on.
__device__ __forceinline__ bool is_segment(const Uses& uses, uint64_t at, uint32_t key) {
    return at % SEGMENT == 0 && at + SEGMENT <= uses.count && row_of_use(uses.entries, at + SEGMENT - 1) == key;
}

// Adds the row's uses, of which the first is at `start`.
template <typename T>
__device__ __forceinline__ void add_uses(float (&sums)[HELD], const FinishTableParams& p, const Row<T>& row, uint64_t start,
                                         uint32_t first, const Lanes& lanes) {
    const uint32_t dim = p.own.dim;
    uint64_t at = start;
    while (true) {
        if (at > start && is_segment(p.uses, at, row.key)) {
            float x[HELD];
            load<T>(x, p.segments + at / SEGMENT * dim, first, lanes.group == 0 ? dim : 0, aligned<float>(p.segments, dim), lanes);
            add(sums, 1.0f, x);
            at += SEGMENT;
            continue;
        }
        const uint32_t number = add_some(sums, p, row, at, first, lanes);
        at += number;
        if (number == 0 || at % WARP != 0) return;
    }
}

// The groups' sums, in each of them. Coefficients that lanes have written are there afterwards.
__device__ __forceinline__ void merge_groups(float (&sums)[HELD], const Lanes& lanes) {
    __syncwarp();
#pragma unroll
    for (uint32_t element = 0; element < HELD; ++element) sums[element] = lanes.sum_of_groups(sums[element]);
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
__device__ __forceinline__ void finish(const FinishTableParams& p, uint32_t key, uint64_t start, float* to, const Lanes& lanes) {
    const uint32_t dim = p.own.dim;
    Row<T> row = row_of<T>(p, key, lanes);
    const bool cosine = p.own.cosine != 0, to_is_aligned = aligned<float>(p.result, dim);
    const FinishedRow<T> of = {row.at, to, row.is_aligned, to_is_aligned, true, lanes.group == 0, cosine, row.unit, p.gamma};
    finish_row(of, dim, lanes, [&](float (&sums)[HELD], const float (&x)[HELD], uint32_t first) {
#pragma unroll
        for (uint32_t element = 0; element < HELD; ++element) row.held[element] = x[element];
        add_splits<T>(sums, p, key - p.start, first, lanes);
        add_uses(sums, p, row, start, first, lanes);
        merge_groups(sums, lanes);
    });
}

// A warp for each segment of the list but the first, which is not needed: a row that has it begins in it.
template <typename T>
__device__ __forceinline__ void sum_segment(const FinishTableParams& p) {
    const uint64_t at = (uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP + 1) * SEGMENT;
    const uint32_t dim = p.own.dim;
    const Lanes lanes(dim);
    if (at >= p.uses.count) return;  // the whole warp, as below
    const uint32_t key = row_of_use(p.uses.entries, at - 1);
    if (key < p.start || key - p.start >= p.x_rows || !is_segment(p.uses, at, key)) return;
    Row<T> row = row_of<T>(p, key, lanes);
    for (uint32_t first = 0; first < dim; first += PANEL) {
        float sums[HELD] = {};
        load<T>(row.held, row.at, first, dim, row.is_aligned, lanes);
        for (uint32_t i = 0; i < SEGMENT; i += WARP) add_some(sums, p, row, at + i, first, lanes);
        merge_groups(sums, lanes);
        if (lanes.group == 0) store<T>(p.segments + at / SEGMENT * dim, sums, first, dim, aligned<float>(p.segments, dim), lanes);
    }
}

template <typename T>
__device__ __forceinline__ void finish_table(const FinishTableParams& p) {
    const uint64_t index = uint64_t(blockIdx.x) * BLOCK_ROWS + threadIdx.x / WARP;
    const uint32_t lane = threadIdx.x % WARP, dim = p.own.dim;
    const Lanes lanes(dim);
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
        finish<T>(p, key, at, p.result + (!p.by_use ? index : p.places ? p.places[at] : uint64_t(key)) * dim, lanes);
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
