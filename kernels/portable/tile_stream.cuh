// How a block of stationary rows walks the tiles of streamed rows of its split, on sm_80 and later: copies, columns' terms, products.
//
// Chunks of 128 bytes of each row come through a ring of STAGES buffers by cp.async, STAGES − 1 ahead, across tiles. X stays in shared
// memory where it fits (p.x_resident); else its chunks come through the ring again with each tile. So any D works. In modes with an
// output a tile's Y comes a second time, OUTPUT_CHUNKS chunks of it, or a buffer holds a whole tile (HOLDS_TILE). With a tile's first
// chunk comes what its columns bring to the scores.
//
// A warp has SLABS slabs of 16 of the block's 128 rows: the more slabs, the fewer loads from shared memory, as an operand of streamed
// rows serves all of them; the fewer, the more rows of output fit in registers.
//
// Shared memory: X or its ring, the ring of Y, SharedStorage; counted by tiling.rs.
#pragma once
#include <type_traits>

#include "portable/chunks.cuh"
#include "shared/score.cuh"

constexpr int BLOCK_X = 128;
constexpr int BLOCK_Y = 64;
constexpr int STAGES = 2;
constexpr int X_CHUNK = BLOCK_X * CHUNK_BYTES;
constexpr int Y_CHUNK = BLOCK_Y * CHUNK_BYTES;
static_assert(BLOCK_Y == 64, "fragments.cuh is written for 64 columns");

constexpr int threads_of(int slabs) { return BLOCK_X / (SLAB_ROWS * slabs) * 32; }

// The other half of a ColumnTerm, where there is an output.
struct Factor {
    float factor;
    float unscale_or_limit;
};

__device__ __forceinline__ void load_pair(const Factor* factors, int column, float2 (&pair)[2]) {
    const float4 both = ptx::load_shared_4(factors + column);
    pair[0] = {both.x, both.y};
    pair[1] = {both.z, both.w};
}

// Dynamic shared memory up to X, or its ring: the ring of Y, and what columns bring to the scores, of as many tiles as the ring may hold
// chunks of.
template <int STAGE_CHUNKS>
struct SharedStorage {
    char ring[STAGES][STAGE_CHUNKS * Y_CHUNK];
    RowTerm terms[STAGES][BLOCK_Y];
};
template <int STAGE_CHUNKS>
struct OutputStorage : SharedStorage<STAGE_CHUNKS> {
    Factor factors[STAGES][BLOCK_Y];
    // What the output leaves no registers for. Which rows reject a candidate: a stationary one, or one of the tiles' (`own_hits`).
    Hits hits[STAGES * BLOCK_Y];
    // Of stationary rows.
    RowTerm rows[BLOCK_X];
    float max[BLOCK_X];
};
static_assert(sizeof(SharedStorage<1>) == 17408 && sizeof(OutputStorage<1>) == 21504 && sizeof(OutputStorage<2>) == 37888, "see tiling.rs");
static_assert(STAGES * BLOCK_Y == BLOCK_X, "hits of the stationary candidates fit where those of two tiles do");

template <typename Element, Mode MODE, int OUTPUT_CHUNKS, int SLABS>
struct TileStream {
    static constexpr int THREADS = threads_of(SLABS);
    static constexpr bool X_IS_QUERIES = MODE != Mode::GRADIENT;
    static_assert(THREADS >= BLOCK_Y && (X_IS_QUERIES || THREADS >= BLOCK_X), "each row of a tile has a thread");
    static constexpr bool HAS_OUTPUT = OUTPUT_CHUNKS > 0;
    // Where the output has all columns of narrow rows: a stage of the ring holds a whole tile, once for its scores and its output.
    static constexpr bool HOLDS_TILE = OUTPUT_CHUNKS == 1 || OUTPUT_CHUNKS == 2;
    static constexpr int STAGE_CHUNKS = HOLDS_TILE ? OUTPUT_CHUNKS : 1;
    // Tiles of 8 streamed rows whose scores a warp has at a time: half of them leave registers for the output of two slabs.
    static constexpr int TILES = HOLDS_TILE && SLABS > 1 ? BLOCK_Y / 16 : BLOCK_Y / 8;
    using Tile = ScoreTile<MODE, TILES, RowTerm>;
    using Storage = std::conditional_t<HAS_OUTPUT, OutputStorage<STAGE_CHUNKS>, SharedStorage<STAGE_CHUNKS>>;
    static_assert(sizeof(Storage) % CHUNK_BYTES == 0, "X's chunks begin so");

    const StreamParams& p;
    Rows<Element> x;
    Copier<Element, BLOCK_Y, THREADS, X_IS_QUERIES && MODE != Mode::PAIRED> y;
    Storage* shared;
    uint32_t x_chunks, ring_y;  // shared-memory addresses
    uint32_t first_x, first_tile, end_tile, chunks;
    // The next chunk to be copied: step `fill_step` of tile `fill_tile`.
    uint32_t fill_tile, fill_step;
    uint32_t whole;  // of its tile, where chunks come one by one
    int lane, warp_row;
    // Without an output: which rows reject candidate threadIdx.x of the last tile that copies were started for.
    Hits last_hits;

    __device__ __forceinline__ TileStream(const StreamParams& params, char* memory) : p(params) {
        // Queries are a matrix; those of pairs, and candidates, may be rows of one by reference. The addresses are the pairs' positives.
        const bool is_paired = MODE == Mode::PAIRED;
        [[maybe_unused]] const uint32_t* x_indices = is_paired || !X_IS_QUERIES ? p.x_indices : nullptr;
        [[maybe_unused]] const uint32_t* y_indices = !is_paired && X_IS_QUERIES ? p.y_indices : nullptr;
        [[maybe_unused]] const void* const* y_addresses = is_paired ? p.y_addresses : nullptr;
        const uint32_t bytes = p.dim * sizeof(Element);
        x = {static_cast<const char*>(p.x), nullptr, x_indices, p.x_stride * sizeof(Element), p.x_rows, bytes, p.alignment};
        y.rows = {static_cast<const char*>(p.y), y_addresses, y_indices, p.y_stride * sizeof(Element), p.y_rows, bytes, p.alignment};
        chunks = (bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
        shared = reinterpret_cast<Storage*>(memory);
        x_chunks = ptx::smem_address(shared + 1);
        ring_y = ptx::smem_address(shared->ring);
        first_x = blockIdx.x * BLOCK_X;
        const uint32_t tiles = (p.y_rows + BLOCK_Y - 1) / BLOCK_Y;
        // PAIRED: the tiles with the block's own rows.
        first_tile = MODE == Mode::PAIRED ? first_x / BLOCK_Y : blockIdx.y * p.tiles_per_split;
        const uint32_t count = MODE == Mode::PAIRED ? BLOCK_X / BLOCK_Y : p.tiles_per_split;
        end_tile = min(first_tile + count, tiles);
        fill_tile = first_tile;
        fill_step = 0;
        lane = threadIdx.x % 32;
        warp_row = threadIdx.x / 32 * SLAB_ROWS * SLABS;
        last_hits = no_hits();
        if constexpr (!X_IS_QUERIES) {
            const uint32_t index = first_x + threadIdx.x;
            if (threadIdx.x < BLOCK_X) shared->hits[threadIdx.x] = p.hits && index < p.x_rows ? p.hits[index] : no_hits();
        }
    }

    // The thread's first row of a slab; its other is 8 rows on.
    __device__ __forceinline__ uint32_t first_row(int slab) const { return first_x + warp_row + SLAB_ROWS * slab + c_row(lane, 0); }

    // Starts the copies of the next step into `stage`, if there is one; always one group of copies, so that groups count steps.
    __device__ __forceinline__ void fill(uint32_t stage) {
        if (fill_tile < end_tile) {
            if (HOLDS_TILE) fill_tile_of(stage);
            else fill_chunk_of(stage);
        }
        ptx::cp_async_commit();
    }

    __device__ __forceinline__ void fill_tile_of(uint32_t stage) {
        copy_columns(fill_tile);
#pragma unroll
        for (int chunk = 0; chunk < STAGE_CHUNKS; ++chunk) y.copy(chunk_of(stage, chunk), chunk, y.whole());
        y.seek(++fill_tile * BLOCK_Y);
    }

    __device__ __forceinline__ void fill_chunk_of(uint32_t stage) {
        if (fill_step == 0) {
            whole = y.whole();
            copy_columns(fill_tile);
        }
        const bool is_score = OUTPUT_CHUNKS == 0 || fill_step < chunks;
        y.copy(chunk_of(stage), is_score ? fill_step : blockIdx.z * OUTPUT_CHUNKS + fill_step - chunks, whole);
        if (!p.x_resident && is_score) {
            x.template copy_chunk<BLOCK_X, THREADS>(x_chunks + stage * X_CHUNK, first_x, fill_step);
        }
        if (++fill_step == chunks + OUTPUT_CHUNKS) {
            fill_step = 0;
            y.seek(++fill_tile * BLOCK_Y);
        }
    }

    __device__ __forceinline__ uint32_t chunk_of(uint32_t stage, uint32_t chunk = 0) const {
        return ring_y + (stage * STAGE_CHUNKS + chunk) * Y_CHUNK;
    }

    // With the tile's first chunk.
    __device__ __forceinline__ void copy_columns(uint32_t tile) {
        if (threadIdx.x >= BLOCK_Y) return;
        const uint32_t index = tile * BLOCK_Y + threadIdx.x;
        RowTerm* term = terms_of(tile) + threadIdx.x;
        last_hits = no_hits();
        if (index >= p.y_rows) {
            // What is not there has probability 0.
            *term = {0.0f, -INFINITY};
            if (HAS_OUTPUT) factors_of(tile)[threadIdx.x] = {0.0f, 0.0f};
            if (HAS_OUTPUT && X_IS_QUERIES) *hits_of(tile) = no_hits();
            return;
        }
        ptx::cp_async_few<sizeof(RowTerm)>(ptx::smem_address(term), &p.y_terms[index].scale, true);
        if (HAS_OUTPUT) ptx::cp_async_few<sizeof(Factor)>(ptx::smem_address(factors_of(tile) + threadIdx.x), &p.y_terms[index].factor, true);
        if (!X_IS_QUERIES || !p.hits) return;
        if (HAS_OUTPUT) {
            ptx::cp_async_few<4>(ptx::smem_address(&hits_of(tile)->first), &p.hits[index].first, true);
            ptx::cp_async_few<4>(ptx::smem_address(&hits_of(tile)->last), &p.hits[index].last, true);
        } else {
            last_hits = p.hits[index];
        }
    }

    // Where this thread keeps the hits of its candidate.
    __device__ __forceinline__ Hits* hits_of(uint32_t tile) const {
        if constexpr (HAS_OUTPUT) return shared->hits + (X_IS_QUERIES ? tile % STAGES * BLOCK_Y : 0) + threadIdx.x;
        else return nullptr;
    }

    // Which rows reject this thread's candidate, where it has one: a stationary one, or one of the tile.
    __device__ __forceinline__ Hits own_hits(uint32_t tile) const {
        if (!HAS_OUTPUT) return last_hits;
        return p.hits && threadIdx.x < (X_IS_QUERIES ? BLOCK_Y : BLOCK_X) ? *hits_of(tile) : no_hits();
    }

    __device__ __forceinline__ RowTerm* terms_of(uint32_t tile) const { return shared->terms[tile % STAGES]; }
    __device__ __forceinline__ Factor* factors_of(uint32_t tile) const {
        if constexpr (HAS_OUTPUT) return shared->factors[tile % STAGES];
        else return nullptr;
    }

    __device__ __forceinline__ void start() {
        if (p.x_resident) {
            for (uint32_t chunk = 0; chunk < chunks; ++chunk) {
                x.template copy_chunk<BLOCK_X, THREADS>(x_chunks + chunk * X_CHUNK, first_x, chunk);
            }
        }
        y.seek(first_tile * BLOCK_Y);
#pragma unroll 1
        for (int stage = 0; stage < STAGES - 1; ++stage) fill(stage);
    }

    // For the thread's own copies.
    static __device__ __forceinline__ void wait_for_copies() { ptx::cp_async_wait<STAGES - 2>(); }

    // Waits for the next chunk in the ring. All threads have left the stage before it: the caller fills it again.
    static __device__ __forceinline__ void wait() {
        wait_for_copies();
        __syncthreads();
    }

    // The same for a tile's first chunk. Returns whether the tile may hold a masked pair or a streamed row that is not finite, the same
    // for all threads. (A positive that is a candidate is a masked pair. With a filter, any tile may hold one.)
    __device__ __forceinline__ bool wait_for_tile(uint32_t tile) const {
        wait_for_copies();
        const bool mine = own_column_spoiled(terms_of(tile)) || p.bounds != nullptr;
        const uint32_t first = X_IS_QUERIES ? first_x : tile * BLOCK_Y, count = X_IS_QUERIES ? BLOCK_X : BLOCK_Y;
        return __syncthreads_or(mine || overlaps(own_hits(tile), first, count));
    }

    // Of the column that this thread copied.
    static __device__ __forceinline__ bool own_column_spoiled(const RowTerm* terms) {
        return threadIdx.x < BLOCK_Y && spoiled(terms[threadIdx.x].scale);
    }

    // Rows that are not finite, in a chunk for the output: 0 · NaN of a masked pair must not enter it. Where a pair is not masked
    // its probability is NaN.
    __device__ __forceinline__ void clear_spoiled(uint32_t y_chunk, const RowTerm* terms) const {
        for (uint32_t place = threadIdx.x; place < BLOCK_Y * UNITS; place += THREADS) {
            if (!spoiled(terms[copy_row(place)].scale)) continue;
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(y_chunk + swizzle(copy_row(place), copy_unit(place))), "r"(0)
                         : "memory");
        }
        __syncthreads();
    }

    // s = X Yᵀ of the tile's streamed rows from `first` on, from the ring's next chunks. The tile is there (`wait_for_tile`).
    __device__ __forceinline__ void dots(float (&s)[SLABS][TILES][4], int first, uint32_t& stage) {
#pragma unroll
        for (int i = 0; i < SLABS * TILES * 4; ++i) s[i / (TILES * 4)][i / 4 % TILES][i % 4] = 0.0f;
        // The first chunk by itself: adding to zeros takes no registers that hold them.
        add_chunk(s, 0, stage, 0, first);
        if (HOLDS_TILE) {
            if (STAGE_CHUNKS == 2) add_chunk(s, 1, stage, 1, first);
        } else {
            stage = after(stage);
            for (uint32_t chunk = 1; chunk < chunks; ++chunk) {
                wait();
                add_chunk(s, chunk, stage, 0, first);
                stage = after(stage);
            }
        }
        Fragments<Element>::settle_scores(s, lane);
    }

    // s += chunk `chunk` of X times that at place `place` of the stage, its rows from `first` on. Where these are the first of a stage, the
    // copies of another one are started meanwhile.
    __device__ __forceinline__ void add_chunk(float (&s)[SLABS][TILES][4], uint32_t chunk, uint32_t stage, int place, int first) {
        const uint32_t from_x = x_chunks + (HOLDS_TILE || p.x_resident ? chunk : stage) * X_CHUNK;
        const uint32_t from_y = chunk_of(stage, place) + first * CHUNK_BYTES;
        Fragments<Element>::template multiply_scores<X_IS_QUERIES>(s, from_x, warp_row, from_y, lane, [&] {
            if (place == 0 && first == 0) fill(before(stage));
        });
    }

    static __device__ __forceinline__ uint32_t after(uint32_t stage) { return stage + 1 == STAGES ? 0 : stage + 1; }
    static __device__ __forceinline__ uint32_t before(uint32_t stage) { return stage == 0 ? STAGES - 1 : stage - 1; }
};
