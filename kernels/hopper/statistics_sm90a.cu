// Row statistics on Hopper, for rows of up to 256 elements of 16 bits:
//
//   z_ij = (q_i · c_j) · q.scale · c.scale + c.bias              (units of log 2)         max_i = max_j z_ij,  sum_i = Σ_j 2^(z_ij − max_i)
//
// Shapes: queries (x) and candidates (y) of `dim` elements, by tensor maps; a result for each split and query, as in stream_sm80.cu.
//
// A block holds 256 queries in shared memory and walks the tiles of 128 candidates of its unit (pipeline.cuh). Each of two consumer
// warpgroups has 128 of the queries, as two halves with accumulators of their own, `a` and `b`:
//
//   start a = first half · tile 0
//   for each tile:
//     start b = second half · tile;        meanwhile a: scores, maxima, sums;      wait for the next tile, for b; hand chunks back
//     start a = first half · next tile;    meanwhile b: scores, maxima, sums;      wait for the next terms, for a
//
// so that one half's exponentials run beside the other's matmul, in both warpgroups. The waits for what comes next stand ahead of those
// for matmuls, as ptxas moves exponentials behind a wait for matmuls unless a branch lies between. With 256 queries to each candidate that
// is read, the L2 cache has to deliver 2·N·dim bytes for each 256 queries: 3.1 TB/s at the tensor cores' rate, whatever dim is.
//
// Numerics, determinism: as in stream_sm80.cu. Masked pairs are found in the tiles that the producer marks.
// Cost of a tile: 2·256·128·dim flops; 256·128 exponentials. Registers: 128 for accumulators, and up to 64 for X. Shared memory: PipelineStorage.
// Tests: tests/gpu.rs on compute capability 9.0.
#include "hopper/pipeline.cuh"
#include "hopper/row_sums.cuh"

namespace {

template <int CHUNKS_>
struct StatisticsShape {
    static constexpr int BLOCK_X = 256;
    static constexpr int BLOCK_Y = 128;
    static constexpr int CHUNKS = CHUNKS_;
    static constexpr int CHUNK_ELEMENTS = CHUNK_BYTES / 2;
    // As many as fit beside X in 227 KiB; more than eight hide nothing more.
    static constexpr int STAGES = CHUNKS == 4 ? 6 : 8;
    static constexpr int TERM_STAGES = 2;
    using Term = RowTerm;
};

template <typename Element, int CHUNKS, bool ONLINE>
struct Consumer {
    using Shape = StatisticsShape<CHUNKS>;
    static constexpr int TILES = Shape::BLOCK_Y / 8;
    // Of the next tile's chunks, as many as fit beside a tile.
    static constexpr int AHEAD = CHUNKS < Shape::STAGES - CHUNKS ? CHUNKS : Shape::STAGES - CHUNKS;
    // Chunks of X that are operands in registers, so that shared memory is read for Y alone: as many as do not spill.
    static constexpr int HELD = CHUNKS == 4 ? 0 : ONLINE ? 1 : CHUNKS;
    using Sums = RowSums<ONLINE, TILES>;
    using Accumulator = float[TILES][4];

    const HopperParams& h;
    const StreamParams& p;
    PipelineStorage<Shape>& shared;
    int lane, group_row;  // first row of this warpgroup in the block
    uint32_t flags;       // of the tile
    Place<Shape::STAGES> chunk_place;
    Place<Shape::TERM_STAGES> terms_place;
    Place<1> x_place;
    uint32_t held_x[2][HELD > 0 ? HELD : 1][STEPS_PER_CHUNK][4];

    __device__ __forceinline__ Consumer(const HopperParams& params, PipelineStorage<Shape>& storage)
        : h(params), p(params.stream), shared(storage), lane(threadIdx.x % 32), group_row(consumer_group() * 128) {}

    // The thread's first row in half `second` of the group's rows, counted in the block.
    __device__ __forceinline__ int block_row(int second) const {
        return group_row + 64 * second + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
    }

    // Waits for the first chunks of the tile that begins at `place`.
    __device__ __forceinline__ void wait_ahead(Place<Shape::STAGES> place) {
#pragma unroll
        for (int chunk = 0; chunk < AHEAD; ++chunk) {
            shared.chunks.wait_full(place);
            place.advance();
        }
    }

    __device__ __forceinline__ void hold_x() {
        const uint32_t first = group_row + threadIdx.x % WARPGROUP / 32 * 16;
#pragma unroll
        for (int i = 0; i < 2 * HELD * STEPS_PER_CHUNK; ++i) {
            const int second = i % 2, chunk = i / 2 / STEPS_PER_CHUNK, step = i / 2 % STEPS_PER_CHUNK;
            wgmma::load_a(held_x[second][chunk][step], shared.x_chunk(chunk), first + 64 * second, step, lane);
        }
    }

    // Starts acc = a half of the queries · the tile whose chunks begin at `place`.
    __device__ __forceinline__ void start(Accumulator& acc, int second, Place<Shape::STAGES> place) {
        using Matmul = wgmma::Instruction<Element, Shape::BLOCK_Y>;
        wgmma::settle(acc);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            if (!second && chunk >= AHEAD) shared.chunks.wait_full(place);
            wgmma::fence();
            const uint64_t x = wgmma::descriptor(shared.x_chunk(chunk) + (group_row + 64 * second) * CHUNK_BYTES);
            const uint64_t y = wgmma::descriptor(shared.y_chunk(place.index));
#pragma unroll
            for (int step = 0; step < STEPS_PER_CHUNK; ++step) {
                const int offset = step * wgmma::K_STEP / 16;
                const int accumulate = chunk + step > 0;
                if (chunk < HELD) {
                    Matmul::template rs<wgmma::Major::K>(acc, held_x[second][chunk < HELD ? chunk : 0][step], y + offset, accumulate);
                } else {
                    Matmul::template ss<wgmma::Major::K, wgmma::Major::K>(acc, x + offset, y + offset, accumulate);
                }
            }
            place.advance();
        }
        wgmma::commit();
    }

    __device__ __forceinline__ void finish(Accumulator& acc) {
        wgmma::wait<0>();
        wgmma::settle(acc);
    }

    __device__ __forceinline__ void reduce(Accumulator& acc, uint32_t tile, Sums& sums) {
        sums.add(p, acc, shared.terms[terms_place.index], flags, tile * Shape::BLOCK_Y, lane);
    }

    // The flags are read here, so that nothing waits for them later.
    __device__ __forceinline__ void wait_terms() {
        shared.of_terms.wait_full(terms_place);
        flags = shared.flags[terms_place.index];
    }

    __device__ __forceinline__ Place<Shape::STAGES> next_tile() const {
        Place<Shape::STAGES> place = chunk_place;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) place.advance();
        return place;
    }

    __device__ __forceinline__ void release_chunks() {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            shared.chunks.release(chunk_place);
            chunk_place.advance();
        }
    }

    __device__ __forceinline__ void release_terms() {
        shared.of_terms.release(terms_place);
        terms_place.advance();
    }

    __device__ __forceinline__ void run() {
        for (Units<Shape::BLOCK_X, Shape::BLOCK_Y> units(h); !units.done(); units.next()) unit(units);
    }

    __device__ __forceinline__ void unit(const Units<Shape::BLOCK_X, Shape::BLOCK_Y>& units) {
        Sums first, second;
        first.begin(p, units.first_x() + block_row(0));
        second.begin(p, units.first_x() + block_row(1));
        Accumulator a, b;
        shared.of_x.wait_full(x_place);
        hold_x();
        wait_ahead(chunk_place);
        start(a, 0, chunk_place);
        wait_terms();
        finish(a);
        const uint32_t last = units.end_tile() - 1;
        for (uint32_t tile = units.first_tile(); tile < last; ++tile) {
            start(b, 1, chunk_place);
            reduce(a, tile, first);
            wait_ahead(next_tile());
            finish(b);
            release_chunks();
            start(a, 0, chunk_place);
            reduce(b, tile, second);
            release_terms();
            wait_terms();
            finish(a);
        }
        // The last one has no successor. (A branch in the loop instead would make ptxas serialise the matmuls.)
        start(b, 1, chunk_place);
        reduce(a, last, first);
        finish(b);
        release_chunks();
        reduce(b, last, second);
        release_terms();
        shared.of_x.release(x_place);
        x_place.advance();
        first.write(p, units.split(), lane);
        second.write(p, units.split(), lane);
    }
};

template <typename Element, int CHUNKS, bool ONLINE>
__device__ __forceinline__ void statistics(const HopperParams& p) {
    using Shape = StatisticsShape<CHUNKS>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<PipelineStorage<Shape>*>(memory);
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        ptx::set_max_registers_down<PRODUCER_REGISTERS>();
        Producer<Mode::STATISTICS, Shape>(p, shared).run(p.y_row_terms);
    } else {
        ptx::set_max_registers_up<CONSUMER_REGISTERS>();
        Consumer<Element, CHUNKS, ONLINE>(p, shared).run();
    }
}

}  // namespace

#define KERNEL(name, element, chunks, online)                                                                          \
    static_assert(sizeof(PipelineStorage<StatisticsShape<chunks>>) <= 232448, "fits in shared memory");                 \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        stream_hopper_##name(const __grid_constant__ HopperParams p) {                                                 \
        statistics<element, chunks, online>(p);                                                                        \
    }

// Rows of up to 64, 128 and 256 elements.
#define KERNELS(type, element)                                  \
    KERNEL(statistics_1_##type, element, 1, true)               \
    KERNEL(statistics_2_##type, element, 2, true)               \
    KERNEL(statistics_4_##type, element, 4, true)               \
    KERNEL(bounded_1_##type, element, 1, false)                 \
    KERNEL(bounded_2_##type, element, 2, false)                 \
    KERNEL(bounded_4_##type, element, 4, false)

KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
