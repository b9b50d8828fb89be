// Work on rows' positives and rejected ids, ahead of the stream.
//
//   place_positives   of each pair of a row and a positive: the row; address, inverse norm and scale of the positive; where that is a
//                     candidate, id and log_q too; its key into the table of rejected keys, and those of excluded ids; sums of weights
//                     by blocks of rows
//
// Shapes: (rows), (pairs), (excluded pairs). One thread for each: blocks of rows first, then blocks of pairs, then of excluded ones. One
// launch for each pool, since a positive is of one; the first does what is not about positives.
// Sums of weights: f64, in the order of block_sum.cuh; finish_rows.cu adds those of the blocks.
// Tests: tests/gpu.rs, through every result.
#include "rows/block_sum.cuh"
#include "rows/key_table.cuh"
#include "rows/positives_params.h"
#include "shared/fault.cuh"

namespace {

// Row of pair `index` of a CSR array: the last row whose offset is not past it. In bounds whatever the offsets are.
__device__ __forceinline__ uint32_t row_of(const int64_t* offsets, uint32_t rows, int64_t index) {
    uint32_t low = 0, high = rows;
    while (high - low > 1) {
        const uint32_t middle = low + (high - low) / 2;
        if (offsets[middle] <= index) low = middle;
        else high = middle;
    }
    return low;
}

// Reports offsets that do not ascend from 0 to the number of ids.
__device__ __forceinline__ void check_offsets(const PlacePositivesParams& p, uint32_t row) {
    const int64_t from = p.exclude_offsets[row], to = p.exclude_offsets[row + 1];
    if (from > to || (row == 0 && from != 0)) report_fault(p.fault, FAULT_EXCLUDE_OFFSETS, row);
    if (row + 1 == p.rows && to != p.excluded_pairs) report_fault(p.fault, FAULT_EXCLUDE_OFFSETS, p.rows);
}

// Offset `row` of the copy of positive_offsets: that of the row itself, moved between those that row_of's bisection meets on its way to
// the row. Ascending offsets stay as they are. Of others the copies ascend from 0 to the number of pairs, too, so that each pair is of one
// row, the one that row_of finds: no two rows write results of one pair.
__device__ __forceinline__ int64_t ascending_offset(const PlacePositivesParams& p, uint32_t row) {
    if (row == 0) return 0;
    int64_t least = 0, most = p.pairs;
    for (uint32_t low = 0, high = p.rows; high - low > 1;) {
        const uint32_t middle = low + (high - low) / 2;
        const int64_t offset = max(least, min(p.positive_offsets[middle], most));
        if (middle == row) return offset;
        if (middle < row) low = middle, least = offset;
        else high = middle, most = offset;
    }
    return p.pairs;
}

// The same check of positive_offsets. Whoever comes later reads the copy.
__device__ __forceinline__ void copy_offsets(const PlacePositivesParams& p, uint32_t row) {
    const int64_t from = p.positive_offsets[row], to = p.positive_offsets[row + 1];
    if (from > to || (row == 0 && from != 0)) report_fault(p.fault, FAULT_POSITIVE_OFFSETS, row);
    if (row + 1 == p.rows && to != p.pairs) report_fault(p.fault, FAULT_POSITIVE_OFFSETS, p.rows);
    p.pair_offsets[row] = ascending_offset(p, row);
    if (row + 1 == p.rows) p.pair_offsets[p.rows] = p.pairs;
}

__device__ __forceinline__ double weight(const PlacePositivesParams& p, uint32_t row) {
    if (!p.row_weight) return 1.0;
    if (!p.swapped_weight) return p.row_weight[row];
    const uint32_t query = p.positives[row];
    return p.swapped_weight[row] = query < p.rows ? p.row_weight[query] : 0.0f;
}

// Each candidate is to be the positive of one query. Of a candidate of two the one that wrote last counts, and results are not to be
// used.
__device__ __forceinline__ void place_query(const PlacePositivesParams& p, uint32_t row) {
    const uint32_t positive = p.positives[row];
    if (positive >= p.rows || atomicExch(&p.query_of[positive], row) != ~0u) report_fault(p.fault, FAULT_POSITIVES, row);
}

__device__ __forceinline__ void place_positive(const PlacePositivesParams& p, uint32_t pair) {
    const uint32_t row = p.positive_offsets ? row_of(p.positive_offsets, p.rows, pair) : pair;
    if (p.pair_rows) p.pair_rows[pair] = row;
    const uint64_t over_all = p.positives ? p.positives[pair] : pair;
    // A positive that is no candidate: the first candidate is in its place, of no number, so that it spoils its row.
    const bool nowhere = p.positives && over_all >= p.candidates;
    if (nowhere && p.start == 0) report_fault(p.fault, FAULT_POSITIVES, pair);
    // Another pool's positive wraps around to a large number.
    const uint64_t index = nowhere ? 0 : over_all - p.start;
    if (index >= p.count || (nowhere && p.start != 0)) return;
    const float unit = nowhere ? NAN : p.base_inverse_norm[index];
    const uint64_t at = p.base_indices ? p.base_indices[index] : index;
    p.addresses[pair] = static_cast<const char*>(p.base) + at * p.stride * p.element_bytes;
    p.inverse_norm[pair] = unit;
    p.terms[pair] = {unit, 0.0f, 0.0f, 0.0f};
    if (p.candidate_ids) p.positive_ids[pair] = p.candidate_ids[index];
    if (p.candidate_log_q) p.positive_log_q[pair] = p.candidate_log_q[index];
    if (p.keys.capacity == 0) return;
    if (p.positives) insert_pair(p.keys, p.candidate_ids ? p.candidate_ids[index] : over_all, row);
    else if (p.base_indices) insert_pair(p.keys, p.separate_ids ? p.separate_ids[at] : at, row);
    else if (p.separate_ids) insert_pair(p.keys, p.separate_ids[pair], row);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) place_positives(const __grid_constant__ PlacePositivesParams p) {
    const uint32_t row_blocks = (p.rows + THREADS - 1) / THREADS, pair_blocks = (p.pairs + THREADS - 1) / THREADS;
    if (blockIdx.x >= row_blocks + pair_blocks) {
        const uint32_t pair = (blockIdx.x - row_blocks - pair_blocks) * THREADS + threadIdx.x;
        if (pair < p.excluded_pairs) insert_pair(p.keys, p.exclude_ids[pair], row_of(p.exclude_offsets, p.rows, pair));
        return;
    }
    if (blockIdx.x >= row_blocks) {
        const uint32_t pair = (blockIdx.x - row_blocks) * THREADS + threadIdx.x;
        if (pair < p.pairs) place_positive(p, pair);
        return;
    }
    const uint32_t row = blockIdx.x * THREADS + threadIdx.x;
    const bool present = row < p.rows;
    const double own_weight = present ? weight(p, row) : 0.0;
    if (p.weight_sums) {
        const double sum = block_sum(own_weight);
        if (threadIdx.x == 0) p.weight_sums[blockIdx.x] = sum;
    }
    if (!present) return;
    if (p.exclude_offsets) check_offsets(p, row);
    if (p.pair_offsets) copy_offsets(p, row);
    if (p.query_of) place_query(p, row);
}
