// Scores of wide rows (more than 256 elements) on Hopper: tiles of 256 stationary against 128 streamed rows, both sides streamed.
//
// Two blocks (wide.cuh) have the same stationary rows and different tiles. Each of a block's two consumer warpgroups has two times 64 of
// the rows, with accumulators of their own: `a`, and `b`, which follows LAG chunks behind:
//
//   start a += its rows · chunk, for the first LAG chunks
//   for each tile:
//     for the other chunks:     a += its rows · chunk;   b += its rows · the chunk LAG before
//     start b += the last LAG chunks;                          meanwhile a's scores go to the epilogue
//     start a += the first LAG chunks of the next tile;        meanwhile b's do
//
// so that exponentials run beside matmuls. A chunk of Y is held for both; of X, a's and b's rows are copied when their turn comes.
//
// Cost: 48 KiB of shared memory filled for each 256 x 128 x 64 products, 16 of them from the other block: 6.1 TB/s from the L2 cache
// at the tensor cores' rate. Registers: 128 for accumulators.
#pragma once
#include "hopper/wide.cuh"

constexpr int LAG = 2;

// Term: what a streamed row brings to the scores.
template <typename Term_, int TERM_STAGES_>
struct WideShape {
    using Term = Term_;
    static constexpr int TERM_STAGES = TERM_STAGES_;
    static constexpr int BLOCK_X = WIDE_BLOCK_X, BLOCK_Y = WIDE_BLOCK_Y;
    static constexpr int HALF_X = BLOCK_X / 2;  // a's rows of both warpgroups, or b's
    static constexpr int CHUNK_ELEMENTS = CHUNK_BYTES / 2;
    // Of halves of X and of chunks of Y: both four chunks ahead, besides those of Y that wait for b.
    static constexpr int X_STAGES = 8, Y_STAGES = 4 + LAG;
};

template <typename Shape>
struct WideStorage {
    alignas(1024) char x[Shape::X_STAGES][Shape::HALF_X * CHUNK_BYTES];
    char y[Shape::Y_STAGES][Shape::BLOCK_Y * CHUNK_BYTES];
    typename Shape::Term terms[Shape::TERM_STAGES][Shape::BLOCK_Y];
    uint32_t flags[Shape::TERM_STAGES];
    PairBarriers<Shape::X_STAGES> of_x;
    RingBarriers<Shape::Y_STAGES> of_y;
    RingBarriers<Shape::TERM_STAGES> of_terms;

    // By one thread, before the cluster synchronises.
    __device__ __forceinline__ void init() {
        of_x.init();
        of_y.init();
        of_terms.init();
        ptx::fence_barrier_init();
    }
};

// The tiles of a block, as a pair takes units in turn: a block of stationary rows, and `tiles_per_unit` tiles for each of the pair. Tiles
// count from the launch's first; those past its last one hold nothing.
struct WideTiles {
    const WideParams& h;
    uint32_t unit, step, rank;

    __device__ __forceinline__ explicit WideTiles(const WideParams& params)
        : h(params), unit(blockIdx.x / PAIR), step(0), rank(ptx::cluster_rank()) {}
    __device__ __forceinline__ bool done() const { return unit >= h.units; }
    __device__ __forceinline__ bool ends_unit() const { return step + 1 == h.tiles_per_unit; }
    __device__ __forceinline__ bool last() const { return ends_unit() && unit + gridDim.x / PAIR >= h.units; }
    __device__ __forceinline__ void next() {
        if (!ends_unit()) {
            ++step;
            return;
        }
        step = 0;
        unit += gridDim.x / PAIR;
    }
    __device__ __forceinline__ uint32_t first_x() const { return (h.x_first + unit % h.x_blocks) * WIDE_BLOCK_X; }
    __device__ __forceinline__ uint32_t split() const { return unit / h.x_blocks * PAIR + rank; }
    __device__ __forceinline__ uint32_t tile() const { return split() * h.tiles_per_unit + step; }
    __device__ __forceinline__ uint32_t first_y() const { return (h.y_first + tile()) * WIDE_BLOCK_Y; }
};

__device__ __forceinline__ uint32_t chunks_of(const StreamParams& p) { return (p.dim * 2 + CHUNK_BYTES - 1) / CHUNK_BYTES; }

// The warp that copies, and looks for special tiles.
template <Mode MODE, typename Shape>
struct WideProducer {
    static constexpr int BLOCK_X = Shape::BLOCK_X, BLOCK_Y = Shape::BLOCK_Y;
    using Term = typename Shape::Term;

    const WideParams& h;
    const StreamParams& p;
    WideStorage<Shape>& shared;
    const Term* terms;
    int lane;
    Place<Shape::X_STAGES> x_place;
    Place<Shape::Y_STAGES> y_place;
    Place<Shape::TERM_STAGES> terms_place;

    __device__ __forceinline__ WideProducer(const WideParams& params, WideStorage<Shape>& storage, const Term* of_columns)
        : h(params), p(params.stream), shared(storage), terms(of_columns), lane(threadIdx.x % 32) {}

    __device__ __forceinline__ void run() {
        if (lane == 0) {
            ptx::prefetch_map(&h.x_map);
            ptx::prefetch_map(&h.y_map);
        }
        for (WideTiles tiles(h); !tiles.done(); tiles.next()) {
            const uint32_t first_x = tiles.first_x(), first_y = tiles.first_y();
            const uint32_t present = tiles.tile() < h.y_tiles && first_y < p.y_rows ? min(uint32_t(BLOCK_Y), p.y_rows - first_y) : 0;
            const uint32_t flags = tile_flags<MODE, BLOCK_X, BLOCK_Y>(p, terms, first_x, first_y, present, lane);
            if (h.tile_spoiled && lane == 0 && tiles.tile() < h.y_tiles) h.tile_spoiled[tiles.tile()] = flags & TILE_SPOILED;
            if (lane == 0) copy_chunks(first_x, first_y, tiles.rank);
            copy_terms(first_y, present, flags);
        }
    }

    // In the order in which consumers take them.
    __device__ __forceinline__ void copy_chunks(uint32_t first_x, uint32_t first_y, uint32_t rank) {
        const uint32_t chunks = chunks_of(p);
        for (uint32_t chunk = 0; chunk < chunks + LAG; ++chunk) {
            if (chunk < chunks) {
                copy_half(first_x, chunk, rank);
                shared.of_y.wait_empty(y_place);
                const uint32_t full = shared.of_y.expect(y_place, BLOCK_Y * CHUNK_BYTES);
                ptx::tma_load(ptx::smem_address(shared.y[y_place.index]), &h.y_map, chunk * Shape::CHUNK_ELEMENTS, first_y, full);
                y_place.advance();
            }
            if (chunk >= LAG) copy_half(first_x + Shape::HALF_X, chunk - LAG, rank);
        }
    }

    // Half of these rows, for both blocks; the other block copies the other half.
    __device__ __forceinline__ void copy_half(uint32_t first_row, uint32_t chunk, uint32_t rank) {
        constexpr uint32_t ROWS = Shape::HALF_X / PAIR;
        shared.of_x.wait_empty(x_place);
        const uint32_t full = shared.of_x.expect(x_place, Shape::HALF_X * CHUNK_BYTES);
        const uint32_t to = ptx::smem_address(shared.x[x_place.index]) + rank * ROWS * CHUNK_BYTES;
        ptx::tma_load_multicast(to, &h.x_map, chunk * Shape::CHUNK_ELEMENTS, first_row + rank * ROWS, full, BOTH);
        x_place.advance();
    }

    __device__ __forceinline__ void copy_terms(uint32_t first_y, uint32_t present, uint32_t flags) {
        shared.of_terms.wait_empty(terms_place);
        Term* to = shared.terms[terms_place.index];
        copy_last_terms(to, terms + first_y, present, BLOCK_Y, lane);
        if (lane == 0) {
            shared.flags[terms_place.index] = flags;
            copy_bulk_terms(shared.of_terms, terms_place, to, terms + first_y, present);
        }
        terms_place.advance();
    }
};

// What consumers do with the scores. Epilogue: begin(second, tiles) before a unit's first tile; tile(dots, second, tiles, columns, flags)
// with each tile's dots of the thread's rows in half `second`; end(second, tiles) after its last.
template <typename Element, typename Shape, typename Epilogue>
struct WideConsumer {
    static constexpr int TILES = Shape::BLOCK_Y / 8;
    using Accumulator = float[TILES][4];
    using XPlace = Place<Shape::X_STAGES>;
    using YPlace = Place<Shape::Y_STAGES>;

    const WideParams& h;
    WideStorage<Shape>& shared;
    Epilogue epilogue;
    uint32_t chunks, group;
    // Next to multiply: X, a's chunk of Y, b's. Next to hand back.
    XPlace x_place, x_used;
    YPlace a_place, b_place, y_used;
    Place<Shape::TERM_STAGES> terms_place;

    __device__ __forceinline__ WideConsumer(const WideParams& params, WideStorage<Shape>& storage)
        : h(params), shared(storage), epilogue(params), chunks(chunks_of(params.stream)), group(threadIdx.x / WARPGROUP - 1) {}

    // Waits for the next two halves of X. Ahead of a group of matmuls, not within: ptxas takes what a branch divides for groups of their
    // own, and would wait for more than was meant.
    __device__ __forceinline__ void wait_x() {
        XPlace place = x_place;
        shared.of_x.wait_full(place);
        place.advance();
        shared.of_x.wait_full(place);
    }

    // Starts acc += the next half of X · a chunk of Y; from 0 where it is the `first`.
    __device__ __forceinline__ void multiply(Accumulator& acc, YPlace& y_place, bool first) {
        const uint64_t x = wgmma::descriptor(ptx::smem_address(shared.x[x_place.index]) + 64 * group * CHUNK_BYTES);
        const uint64_t y = wgmma::descriptor(ptx::smem_address(shared.y[y_place.index]));
#pragma unroll
        for (int step = 0; step < STEPS_PER_CHUNK; ++step) {
            const int offset = step * wgmma::K_STEP / 16;
            wgmma::Instruction<Element, Shape::BLOCK_Y>::template ss<wgmma::Major::K, wgmma::Major::K>(acc, x + offset, y + offset,
                                                                                                      !first || step > 0);
        }
        x_place.advance();
        y_place.advance();
    }

    __device__ __forceinline__ void release_x() {
        static_assert(LAG == 2, "each group of matmuls reads two halves of X");
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            shared.of_x.release(x_used);
            x_used.advance();
        }
    }

    __device__ __forceinline__ void release_y() {
        shared.of_y.release(y_used);
        y_used.advance();
    }

    __device__ __forceinline__ void start_a(Accumulator& a) {
        wgmma::settle(a);
        wait_x();
        YPlace place = a_place;
#pragma unroll
        for (int chunk = 0; chunk < LAG; ++chunk) {
            shared.of_y.wait_full(place);
            place.advance();
        }
        wgmma::fence();
#pragma unroll
        for (int chunk = 0; chunk < LAG; ++chunk) multiply(a, a_place, chunk == 0);
        wgmma::commit();
    }

    // The matmuls of a tile after start_a, up to b's last ones, which then run.
    __device__ __forceinline__ void finish_a(Accumulator& a, Accumulator& b) {
        // start_a's matmuls ended beside b's epilogue. (ptxas wants to see it, or it serialises all.)
        wgmma::wait<0>();
        wgmma::settle(a);
        wgmma::settle(b);
        release_x();
        for (uint32_t chunk = LAG; chunk < chunks; ++chunk) {
            wait_x();
            shared.of_y.wait_full(a_place);
            wgmma::fence();
            multiply(a, a_place, false);
            multiply(b, b_place, chunk == LAG);
            wgmma::commit();
            wgmma::wait<1>();
            if (chunk == LAG) continue;
            release_x();
            release_y();
        }
        wait_x();
        wgmma::fence();
#pragma unroll
        for (int chunk = 0; chunk < LAG; ++chunk) multiply(b, b_place, false);
        wgmma::commit();
        wgmma::wait<1>();
        wgmma::settle(a);
        release_x();
        release_y();
    }

    __device__ __forceinline__ void finish_b(Accumulator& b) {
        wgmma::wait<0>();
        wgmma::settle(b);
        release_x();
#pragma unroll
        for (int chunk = 0; chunk < LAG; ++chunk) release_y();
    }

    __device__ __forceinline__ void reduce(Accumulator& acc, int second, const WideTiles& tiles) {
        epilogue.tile(acc, second, tiles, shared.terms[terms_place.index], shared.flags[terms_place.index]);
        if (!tiles.ends_unit()) return;
        epilogue.end(second, tiles);
        WideTiles next = tiles;
        next.next();
        if (!next.done()) epilogue.begin(second, next);
    }

    __device__ __forceinline__ void release_terms() {
        shared.of_terms.release(terms_place);
        terms_place.advance();
    }

    __device__ __forceinline__ void run() {
        WideTiles tiles(h);
        if (tiles.done()) return;
        epilogue.begin(0, tiles);
        epilogue.begin(1, tiles);
        Accumulator a, b;
        start_a(a);
        for (; !tiles.last(); tiles.next()) {
            finish_a(a, b);
            shared.of_terms.wait_full(terms_place);
            reduce(a, 0, tiles);
            finish_b(b);
            start_a(a);
            reduce(b, 1, tiles);
            release_terms();
        }
        // The last one has no successor. (A branch in the loop instead would make ptxas serialise the matmuls.)
        finish_a(a, b);
        shared.of_terms.wait_full(terms_place);
        reduce(a, 0, tiles);
        finish_b(b);
        reduce(b, 1, tiles);
        release_terms();
    }
};

// The thread's first row of half `second`, counted in the block.
__device__ __forceinline__ uint32_t wide_row(int second) {
    const uint32_t thread = threadIdx.x - WARPGROUP;
    return WIDE_BLOCK_X / 2 * second + thread / 32 * 16 + thread % 32 / 4;
}

template <typename Element, Mode MODE, typename Shape, typename Epilogue>
__device__ __forceinline__ void wide_scores(const WideParams& h, const typename Shape::Term* terms) {
    static_assert(sizeof(WideStorage<Shape>) <= 232448, "fits in shared memory");
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<WideStorage<Shape>*>(memory);
    if (threadIdx.x == 0) shared.init();
    // Neither block may reach into the other before its barriers are there, or after it has gone.
    ptx::cluster_sync();
    if (threadIdx.x < WARPGROUP) {
        ptx::set_max_registers_down<PRODUCER_REGISTERS>();
        if (threadIdx.x < 32) WideProducer<MODE, Shape>(h, shared, terms).run();
    } else {
        ptx::set_max_registers_up<CONSUMER_REGISTERS>();
        WideConsumer<Element, Shape, Epilogue>(h, shared).run();
    }
    ptx::cluster_sync();
}
