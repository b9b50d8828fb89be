// What Hopper's streaming kernels share: the order of their work, rings of shared memory between the producer and the consumers, and
// the producer itself.
//
// A block has a warpgroup that copies and two that compute. A unit of work is a block of stationary rows against one split of the
// streamed rows; blocks take units in turn, those of the same split at the same time, so that they find its rows in the L2 cache.
//
//   producer                                        consumers
//   X of the unit            -- x_full -->          wait
//   terms and flag of a tile -- terms_full -->      read with the scores; -- terms_empty -->
//   chunks of its rows       -- full -->            matmuls;              -- empty -->
#pragma once
#include "hopper/wgmma.cuh"
#include "shared/score.cuh"

constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;
constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
// Each consumer warp hands buffers back for itself.
constexpr int CONSUMER_WARPS = CONSUMERS * WARPGROUP / 32;
// 65,536 registers: 128 threads with few, 256 with as many as an instruction can name, but for 15.
constexpr uint32_t PRODUCER_REGISTERS = 40;
constexpr uint32_t CONSUMER_REGISTERS = 232;

// Which of the consumer warpgroups this is. The shuffle tells the compiler that a warp's threads agree, so that descriptors of operands are
// in registers that the warp shares.
__device__ __forceinline__ int consumer_group() { return __shfl_sync(~0u, int(threadIdx.x / WARPGROUP), 0) - 1; }

// What a tile may hold beside plain pairs.
constexpr uint32_t TILE_SPECIAL = 1;  // a masked pair
constexpr uint32_t TILE_SPOILED = 2;  // a streamed row that is not finite

// A place in a ring of COUNT buffers, and the parity of its barriers' phase.
template <int COUNT>
struct Place {
    uint32_t index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++index == COUNT) {
            index = 0;
            parity ^= 1;
        }
    }
};

// A ring's barriers, in shared memory.
template <int COUNT>
struct RingBarriers {
    uint64_t full[COUNT];
    uint64_t empty[COUNT];

    __device__ __forceinline__ void init() {
        for (int i = 0; i < COUNT; ++i) {
            ptx::barrier_init(ptx::smem_address(&full[i]), 1);
            ptx::barrier_init(ptx::smem_address(&empty[i]), CONSUMER_WARPS);
        }
    }
    __device__ __forceinline__ void wait_full(const Place<COUNT>& place) {
        ptx::barrier_wait(ptx::smem_address(&full[place.index]), place.parity);
    }
    // The first round finds buffers that nobody has used.
    __device__ __forceinline__ void wait_empty(const Place<COUNT>& place) {
        ptx::barrier_wait(ptx::smem_address(&empty[place.index]), place.parity ^ 1);
    }
    __device__ __forceinline__ uint32_t expect(const Place<COUNT>& place, uint32_t bytes) {
        const uint32_t barrier = ptx::smem_address(&full[place.index]);
        ptx::barrier_arrive_expect(barrier, bytes);
        return barrier;
    }
    // By one lane of each consumer warp.
    __device__ __forceinline__ void release(const Place<COUNT>& place) {
        __syncwarp();
        ptx::barrier_arrive(ptx::smem_address(&empty[place.index]), threadIdx.x % 32 == 0);
    }
};

// A block's units, tile by tile.
template <int BLOCK_X, int BLOCK_Y>
struct Units {
    uint32_t unit, count, x_blocks, tiles, tiles_per_split;

    __device__ __forceinline__ explicit Units(const HopperParams& p) {
        unit = blockIdx.x;
        x_blocks = (p.stream.x_rows + BLOCK_X - 1) / BLOCK_X;
        count = x_blocks * p.splits;
        tiles = (p.stream.y_rows + BLOCK_Y - 1) / BLOCK_Y;
        tiles_per_split = p.stream.tiles_per_split;
    }
    __device__ __forceinline__ bool done() const { return unit >= count; }
    __device__ __forceinline__ void next() { unit += gridDim.x; }
    __device__ __forceinline__ uint32_t first_x() const { return unit % x_blocks * BLOCK_X; }
    __device__ __forceinline__ uint32_t split() const { return unit / x_blocks; }
    __device__ __forceinline__ uint32_t first_tile() const { return split() * tiles_per_split; }
    __device__ __forceinline__ uint32_t end_tile() const { return min(first_tile() + tiles_per_split, tiles); }
};

// Shape: BLOCK_X, BLOCK_Y, CHUNKS of a row, STAGES chunks of Y, TERM_STAGES tiles' terms, and their type Term.
template <typename Shape>
struct PipelineStorage {
    alignas(1024) char x[Shape::CHUNKS * Shape::BLOCK_X * CHUNK_BYTES];
    char y[Shape::STAGES * Shape::BLOCK_Y * CHUNK_BYTES];
    typename Shape::Term terms[Shape::TERM_STAGES][Shape::BLOCK_Y];
    uint32_t flags[Shape::TERM_STAGES];
    RingBarriers<Shape::STAGES> chunks;
    RingBarriers<Shape::TERM_STAGES> of_terms;
    RingBarriers<1> of_x;

    // By one thread, before all synchronise.
    __device__ __forceinline__ void init() {
        chunks.init();
        of_terms.init();
        of_x.init();
        ptx::fence_barrier_init();
    }
    __device__ __forceinline__ uint32_t x_chunk(uint32_t chunk) const {
        return ptx::smem_address(x) + chunk * Shape::BLOCK_X * CHUNK_BYTES;
    }
    __device__ __forceinline__ uint32_t y_chunk(uint32_t stage) const {
        return ptx::smem_address(y) + stage * Shape::BLOCK_Y * CHUNK_BYTES;
    }
};

// What the tile of `present` streamed rows from `first_y` on holds; looked for by a whole warp.
template <Mode MODE, int BLOCK_X, int BLOCK_Y, typename Term>
__device__ __forceinline__ uint32_t tile_flags(const StreamParams& p, const Term* terms, uint32_t first_x, uint32_t first_y,
                                               uint32_t present,
                                               int lane) {
    constexpr bool X_IS_QUERIES = MODE != Mode::GRADIENT;
    bool special = false, is_spoiled = false;
#pragma unroll
    for (uint32_t i = lane; i < BLOCK_Y; i += 32) {
        if (i >= present) continue;
        is_spoiled |= spoiled(terms[first_y + i].scale);
        if (X_IS_QUERIES && p.hits) special |= overlaps(p.hits[first_y + i], first_x, BLOCK_X);
    }
    if (!X_IS_QUERIES && p.hits) {
#pragma unroll 2
        for (uint32_t i = lane; i < BLOCK_X; i += 32) {
            if (first_x + i < p.x_rows) special |= overlaps(p.hits[first_x + i], first_y, BLOCK_Y);
        }
    }
    const bool any_spoiled = __any_sync(~0u, is_spoiled);
    return (__any_sync(~0u, special) || any_spoiled ? TILE_SPECIAL : 0) | (any_spoiled ? TILE_SPOILED : 0);
}

// Terms of a tile of streamed rows, of which `present` are there, to shared memory: what the copy engine takes, whole units of 16
// bytes, by one lane, and before that the rest by a whole warp.
template <typename Term>
__device__ __forceinline__ uint32_t bulk_terms(uint32_t present) {
    return present * sizeof(Term) / 16 * 16 / sizeof(Term);
}

template <typename Term>
__device__ __forceinline__ void copy_last_terms(Term* to, const Term* from, uint32_t present, uint32_t count, int lane) {
    // What is not there has probability 0.
    Term nothing = {};
    nothing.bias = -INFINITY;
    for (uint32_t i = bulk_terms<Term>(present) + lane; i < count; i += 32) to[i] = i < present ? from[i] : nothing;
    __syncwarp();
}

template <typename Term, int COUNT>
__device__ __forceinline__ void copy_bulk_terms(RingBarriers<COUNT>& ring, const Place<COUNT>& place, Term* to, const Term* from,
                                                uint32_t present) {
    const uint32_t bytes = bulk_terms<Term>(present) * sizeof(Term), barrier = ring.expect(place, bytes);
    if (bytes) ptx::bulk_load(ptx::smem_address(to), from, bytes, barrier);
}

// Two warps copy: one the rows, and the other the terms. All lanes of the latter look for what makes a tile special, which takes longer.
template <Mode MODE, typename Shape>
struct Producer {
    static constexpr int BLOCK_X = Shape::BLOCK_X, BLOCK_Y = Shape::BLOCK_Y;
    using Term = typename Shape::Term;

    const HopperParams& h;
    const StreamParams& p;
    PipelineStorage<Shape>& shared;

    __device__ __forceinline__ Producer(const HopperParams& params, PipelineStorage<Shape>& storage)
        : h(params), p(params.stream), shared(storage) {}

    __device__ __forceinline__ void run(const Term* terms) const {
        if (threadIdx.x == 0) copy_rows();
        if (threadIdx.x / 32 == 1) copy_terms(terms, threadIdx.x % 32);
    }

    __device__ __forceinline__ void copy_rows() const {
        Place<Shape::STAGES> place;
        Place<1> x_place;
        ptx::prefetch_map(&h.x_map);
        ptx::prefetch_map(&h.y_map);
        for (Units<BLOCK_X, BLOCK_Y> units(h); !units.done(); units.next()) {
            shared.of_x.wait_empty(x_place);
            const uint32_t full = shared.of_x.expect(x_place, Shape::CHUNKS * BLOCK_X * CHUNK_BYTES);
            for (uint32_t chunk = 0; chunk < Shape::CHUNKS; ++chunk) {
                ptx::tma_load(shared.x_chunk(chunk), &h.x_map, chunk * Shape::CHUNK_ELEMENTS, units.first_x(), full);
            }
            x_place.advance();
            for (uint32_t tile = units.first_tile(); tile < units.end_tile(); ++tile) copy_tile(place, tile * BLOCK_Y);
        }
    }

    __device__ __forceinline__ void copy_tile(Place<Shape::STAGES>& place, uint32_t first) const {
        for (uint32_t chunk = 0; chunk < Shape::CHUNKS; ++chunk) {
            shared.chunks.wait_empty(place);
            const uint32_t full = shared.chunks.expect(place, BLOCK_Y * CHUNK_BYTES);
            ptx::tma_load(shared.y_chunk(place.index), &h.y_map, chunk * Shape::CHUNK_ELEMENTS, first, full);
            place.advance();
        }
    }

    __device__ __forceinline__ void copy_terms(const Term* terms, int lane) const {
        Place<Shape::TERM_STAGES> place;
        for (Units<BLOCK_X, BLOCK_Y> units(h); !units.done(); units.next()) {
            for (uint32_t tile = units.first_tile(); tile < units.end_tile(); ++tile) {
                const uint32_t first = tile * BLOCK_Y, present = min(uint32_t(BLOCK_Y), p.y_rows - first);
                const uint32_t flags = tile_flags<MODE, BLOCK_X, BLOCK_Y>(p, terms, units.first_x(), first, present, lane);
                shared.of_terms.wait_empty(place);
                Term* to = shared.terms[place.index];
                copy_last_terms(to, terms + first, present, BLOCK_Y, lane);
                if (lane == 0) {
                    shared.flags[place.index] = flags;
                    copy_bulk_terms(shared.of_terms, place, to, terms + first, present);
                }
                place.advance();
            }
        }
    }
};
