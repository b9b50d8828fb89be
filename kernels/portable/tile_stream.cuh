// How a block of stationary rows walks the tiles of streamed rows of its split, on sm_80 and later: copies, columns' terms, products.
//
// Chunks of 128 bytes of each row come through a ring of STAGES buffers by cp.async, STAGES − 1 ahead, across tiles. X stays in shared
// memory where it fits (p.x_resident); else its chunks come through the ring again with each tile. So any D works. In modes with an
// output a tile's Y comes a second time, OUTPUT_CHUNKS chunks of it.
//
// Shared memory: X or its ring, the ring of Y, SharedStorage; counted by tiling.rs.
#pragma once
#include "portable/chunks.cuh"
#include "shared/score.cuh"

constexpr int BLOCK_X = 128;
constexpr int BLOCK_Y = 64;
constexpr int THREADS = 256;
constexpr int STAGES = 3;
constexpr int X_CHUNK = BLOCK_X * CHUNK_BYTES;
constexpr int Y_CHUNK = BLOCK_Y * CHUNK_BYTES;
static_assert(BLOCK_X == THREADS / 32 * 16, "a warp has 16 stationary rows");
static_assert(BLOCK_Y == 64, "fragments.cuh is written for 64 columns");

// Behind the chunks in dynamic shared memory: what tiles' columns bring to the scores; two of them, as warps may be a tile apart.
struct SharedStorage {
    ColumnTerm terms[2][BLOCK_Y];
};
static_assert(sizeof(SharedStorage) == 2048, "the host counts it");

template <typename Element, Mode MODE, int OUTPUT_CHUNKS>
struct TileStream {
    static constexpr bool X_IS_QUERIES = MODE != Mode::GRADIENT;
    using Tile = ScoreTile<MODE, BLOCK_Y / 8, ColumnTerm>;

    const StreamParams& p;
    Rows<Element> x, y;
    uint32_t x_chunks, ring_x, ring_y;  // shared-memory addresses
    SharedStorage* shared;
    uint32_t first_x, first_tile, end_tile, chunks;
    // The next chunk to be copied: step `fill_step` of tile `fill_tile`.
    uint32_t fill_tile, fill_step, fill_stage;
    int lane, warp_row;
    Hits own_hits;  // GRADIENT: of the candidate first_x + threadIdx.x

    __device__ __forceinline__ TileStream(const StreamParams& params, char* memory) : p(params) {
        // Queries are a matrix; those of pairs, and candidates, may be rows of one by reference. The addresses are the pairs' positives.
        const bool is_paired = MODE == Mode::PAIRED;
        [[maybe_unused]] const uint32_t* x_indices = is_paired || !X_IS_QUERIES ? p.x_indices : nullptr;
        [[maybe_unused]] const uint32_t* y_indices = !is_paired && X_IS_QUERIES ? p.y_indices : nullptr;
        [[maybe_unused]] const void* const* y_addresses = is_paired ? p.y_addresses : nullptr;
        x = {static_cast<const Element*>(p.x), nullptr, x_indices, p.x_stride, p.x_rows, p.dim, p.aligned != 0};
        y = {static_cast<const Element*>(p.y), y_addresses, y_indices, p.y_stride, p.y_rows, p.dim, p.aligned != 0};
        chunks = (p.dim + Fragments<Element>::ELEMENTS_PER_CHUNK - 1) / Fragments<Element>::ELEMENTS_PER_CHUNK;
        x_chunks = ptx::smem_address(memory);
        const uint32_t x_bytes = (p.x_resident ? chunks : STAGES) * X_CHUNK;
        ring_x = x_chunks;
        ring_y = x_chunks + x_bytes;
        shared = reinterpret_cast<SharedStorage*>(memory + x_bytes + STAGES * Y_CHUNK);
        first_x = blockIdx.x * BLOCK_X;
        const uint32_t tiles = (p.y_rows + BLOCK_Y - 1) / BLOCK_Y;
        // PAIRED: the tiles with the block's own rows.
        first_tile = MODE == Mode::PAIRED ? first_x / BLOCK_Y : blockIdx.y * p.tiles_per_split;
        const uint32_t count = MODE == Mode::PAIRED ? BLOCK_X / BLOCK_Y : p.tiles_per_split;
        end_tile = min(first_tile + count, tiles);
        fill_tile = first_tile;
        fill_step = fill_stage = 0;
        lane = threadIdx.x % 32;
        warp_row = threadIdx.x / 32 * 16;
        own_hits = {1, 0, 0};
        if (!X_IS_QUERIES && p.hits && threadIdx.x < BLOCK_X && first_x + threadIdx.x < p.x_rows) {
            own_hits = p.hits[first_x + threadIdx.x];
        }
    }

    __device__ __forceinline__ uint32_t row(int half) const { return first_x + warp_row + c_row(lane, half); }

    // Starts the copies of the next step, if there is one; always one group of copies, so that groups count steps.
    __device__ __forceinline__ void fill() {
        if (fill_tile < end_tile) {
            const uint32_t to_y = ring_y + fill_stage * Y_CHUNK;
            if (fill_step < chunks) {
                y.template copy_chunk<BLOCK_Y, THREADS>(to_y, fill_tile * BLOCK_Y, fill_step);
                if (!p.x_resident) {
                    x.template copy_chunk<BLOCK_X, THREADS>(ring_x + fill_stage * X_CHUNK, first_x, fill_step);
                }
            } else {
                const uint32_t chunk = blockIdx.z * OUTPUT_CHUNKS + fill_step - chunks;
                y.template copy_chunk<BLOCK_Y, THREADS>(to_y, fill_tile * BLOCK_Y, chunk);
            }
            if (++fill_step == chunks + OUTPUT_CHUNKS) {
                fill_step = 0;
                ++fill_tile;
            }
        }
        fill_stage = fill_stage + 1 == STAGES ? 0 : fill_stage + 1;
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ void start() {
        if (p.x_resident) {
            for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
                x.template copy_chunk<BLOCK_X, THREADS>(x_chunks + chunk * X_CHUNK, first_x, chunk);
            }
        }
#pragma unroll
        for (int stage = 0; stage < STAGES - 1; ++stage) fill();
    }

    // Waits for the next chunk in the ring, and refills the stage that all threads have left.
    __device__ __forceinline__ void wait() {
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads();
        fill();
    }

    __device__ __forceinline__ void load_columns(uint32_t tile, ColumnTerm* terms) const {
        if (threadIdx.x >= BLOCK_Y) return;
        const uint32_t index = tile * BLOCK_Y + threadIdx.x;
        // What is not there has probability 0.
        terms[threadIdx.x] = index < p.y_rows ? p.y_terms[index] : ColumnTerm{0.0f, -INFINITY, 0.0f, 0.0f};
    }

    // Whether the tile may hold a masked pair or a streamed row that is not finite. The same for all threads. (A positive that is a
    // candidate is a masked pair. With a filter, any tile may hold one.)
    __device__ __forceinline__ bool special(uint32_t tile, const ColumnTerm* terms) const {
        bool mine = own_column_spoiled(terms) || p.bounds != nullptr;
        const uint32_t index = tile * BLOCK_Y + threadIdx.x;
        if (X_IS_QUERIES && p.hits && threadIdx.x < BLOCK_Y && index < p.y_rows) mine |= overlaps(p.hits[index], first_x, BLOCK_X);
        if (!X_IS_QUERIES) mine |= overlaps(own_hits, tile * BLOCK_Y, BLOCK_Y);
        return __syncthreads_or(mine);
    }

    // Of the column that this thread loaded.
    static __device__ __forceinline__ bool own_column_spoiled(const ColumnTerm* terms) {
        return threadIdx.x < BLOCK_Y && spoiled(terms[threadIdx.x].scale);
    }

    // Rows that are not finite, in a chunk for the output: 0 · NaN of a masked pair must not enter it. Where a pair is not masked
    // its probability is NaN.
    __device__ __forceinline__ void clear_spoiled(uint32_t y_chunk, const ColumnTerm* terms) const {
        for (uint32_t place = threadIdx.x; place < BLOCK_Y * UNITS; place += THREADS) {
            if (!spoiled(terms[copy_row(place)].scale)) continue;
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(y_chunk + swizzle(copy_row(place), copy_unit(place))), "r"(0)
                         : "memory");
        }
        __syncthreads();
    }

    // s += X Yᵀ, from the ring's next chunks.
    __device__ __forceinline__ void dots(float (&s)[8][4], uint32_t& stage) {
        for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
            wait();
            const uint32_t from_x = p.x_resident ? x_chunks + chunk * X_CHUNK : ring_x + stage * X_CHUNK;
            const uint32_t from_y = ring_y + stage * Y_CHUNK;
            Fragments<Element>::template multiply_scores<X_IS_QUERIES>(s, from_x, warp_row, from_y, lane);
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
    }
};
