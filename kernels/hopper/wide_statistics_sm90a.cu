// Row statistics of wide rows (more than 256 elements of 16 bits) on Hopper:
//
//   z_ij = (q_i · c_j) · q.scale · c.scale + c.bias              (units of log 2)         max_i = max_j z_ij,  sum_i = Σ_j 2^(z_ij − max_i)
//
// Shapes, numerics, determinism: as in statistics_sm90a.cu, for any dim. A result for each split and query, where each of a pair of
// blocks has a split of its own. Method, cost: wide_scores.cuh.
// Tests: tests/gpu.rs on compute capability 9.0.
#include "hopper/row_sums.cuh"
#include "hopper/wide_scores.cuh"

namespace {

using Shape = WideShape<RowTerm, 2>;

template <bool ONLINE>
struct Statistics {
    static constexpr int TILES = WIDE_BLOCK_Y / 8;

    const StreamParams& p;
    int lane;
    RowSums<ONLINE, TILES> sums[2];

    __device__ __forceinline__ explicit Statistics(const WideParams& h) : p(h.stream), lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void begin(int second, const WideTiles& tiles) {
        sums[second].begin(p, tiles.first_x() + wide_row(second));
    }
    __device__ __forceinline__ void tile(float (&dots)[TILES][4], int second, const WideTiles& tiles, const RowTerm* columns,
                                         uint32_t flags) {
        sums[second].add(p, dots, columns, flags, tiles.first_y(), lane);
    }
    __device__ __forceinline__ void end(int second, const WideTiles& tiles) { sums[second].write(p, tiles.split(), lane); }
};

}  // namespace

#define KERNEL(name, element, online)                                                                                              \
    extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)                                         \
        stream_hopper_##name(const __grid_constant__ WideParams h) {                                                              \
        wide_scores<element, Mode::STATISTICS, Shape, Statistics<online>>(h, h.y_row_terms);                                       \
    }

KERNEL(wide_statistics_f16, __half, true)
KERNEL(wide_statistics_bf16, __nv_bfloat16, true)
KERNEL(wide_bounded_f16, __half, false)
KERNEL(wide_bounded_bf16, __nv_bfloat16, false)
