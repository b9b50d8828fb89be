// Everything between the stream and the stream back, row by row:
//
//   finish_rows   statistics and expected negatives of the splits, merged (merge.cuh); where the step has an epilogue, losses and
//                 derivatives (epilogue.cuh); where it has gradients, those of queries and separate positives (query_gradient.cuh)
//                 and the terms of the stream back (terms.cuh)
//
// Shapes: (rows), (rows, dim). A block has `block_rows` rows. Its first warp has a lane for each and does what is about numbers, most
// of it in f64; then each warp has a row at a time, its lanes along the row. Parts whose arguments are null are left out.
// Totals: each block writes its rows' share, in a fixed order; totals.cuh adds the blocks'. Bitwise reproducible.
// Cost: reads and writes each element of the splits' outputs once and of O and the embeddings twice; bound by memory.
// Tests: tests/gpu.rs, through every result, against src/problem/epilogue.rs.
#include "rows/epilogue.cuh"
#include "rows/merge.cuh"
#include "rows/query_gradient.cuh"
#include "rows/terms.cuh"

namespace {

// What the block's warps get to know of its rows.
struct BlockRow {
    float max;    // of the expected negative's splits,
    float total;  // and their sum
    bool empty;
    float d_lse;
    float d_gamma;
};

// Of the row that this lane has, if `present`.
__device__ __forceinline__ void finish_numbers(const FinishRowsParams& p, BlockRow* rows, uint32_t lane, uint64_t row, bool present) {
    const bool has_epilogue = p.epilogue.block_losses != nullptr;
    const double of_mean = has_epilogue ? upstream(p.epilogue, p.rows, lane, blockIdx.x == 0) : 0.0;
    double total = 0.0;
    if (present) {
        BlockRow mine = {};
        const MergedRow merged = merge_row(p.statistics.splits, p.rows, row);
        // One pass may have been both.
        const bool same = p.expected.splits.max == p.statistics.splits.max;
        const MergedRow expected = same ? merged : merge_row(p.expected.splits, p.rows, row);
        mine.max = expected.max;
        mine.total = static_cast<float>(expected.sum);
        mine.empty = expected.masked == p.statistics.candidates;

        const QueryGradientParams& g = p.gradient;
        RowStatistics statistics = {};
        double d_lse = 0.0;
        if (p.statistics.splits.count) statistics = finish_statistics(p.statistics, merged, p.rows, row);
        if (has_epilogue) {
            const RowLoss loss = row_loss(p, statistics, row, of_mean);
            total = loss.total;
            d_lse = loss.d_lse;
        } else if (g.d_queries) {
            statistics.lse = g.lse[row];
            statistics.num_negatives = g.num_negatives[row];
            d_lse = g.d_lse[row];
        }
        mine.d_lse = static_cast<float>(d_lse);
        if (g.d_queries) {
            const float unit = g.query_inverse_norm[row];
            // A row with no negatives has no coefficients, and an lse of −inf.
            g.columns[row] = query_column(unit, g.scale, statistics.lse, statistics.num_negatives == 0 ? 0.0f : mine.d_lse);
            if (g.positives) g.positive_terms[row] = positive_term(g.positives[row], unit, static_cast<float>(g.d_positive[row]));
        }
        rows[lane] = mine;
    }
    if (!has_epilogue) return;
    total = warp_sum(total);
    if (lane == 0) p.epilogue.block_losses[blockIdx.x] = total;
}

template <typename T>
__device__ __forceinline__ void finish_vectors(const FinishRowsParams& p, BlockRow& of_row, uint64_t row, uint32_t lane) {
    if (p.expected.splits.count) {
        merge_expected(p.expected, p.rows, p.dim, row, lane, of_row.max, of_row.total, of_row.empty);
    }
    if (!p.gradient.d_queries) return;
    const float* o = p.expected.expected_negative + row * p.dim;
    const float d_gamma = query_gradient<T>(p.gradient, o, p.dim, row, lane, of_row.d_lse);
    if (lane == 0) of_row.d_gamma = d_gamma;
}

template <typename T>
__device__ __forceinline__ void finish_rows(const FinishRowsParams& p) {
    __shared__ BlockRow rows[WARP];
    const uint32_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const uint64_t first = uint64_t(blockIdx.x) * p.block_rows;
    const uint32_t count = static_cast<uint32_t>(min(uint64_t(p.block_rows), p.rows - first));
    if (warp == 0) finish_numbers(p, rows, lane, first + lane, lane < count);
    if (!p.expected.expected_negative) return;  // all threads
    __syncthreads();
    for (uint32_t local = warp; local < count; local += BLOCK_ROWS) finish_vectors<T>(p, rows[local], first + local, lane);
    if (!p.gradient.d_queries) return;  // all threads
    __syncthreads();
    if (warp != 0) return;
    const double d_gamma = warp_sum(lane < count ? double(rows[lane].d_gamma) : 0.0);
    if (lane == 0) p.gradient.block_d_gamma[blockIdx.x] = d_gamma;
}

}  // namespace

#define FINISH_ROWS(type, element)                                       \
    extern "C" __global__ void __launch_bounds__(BLOCK_ROWS* WARP, 2)     \
        finish_rows_##type(const __grid_constant__ FinishRowsParams p) {  \
        finish_rows<element>(p);                                          \
    }

FINISH_ROWS(f16, __half)
FINISH_ROWS(bf16, __nv_bfloat16)
FINISH_ROWS(f32, float)
