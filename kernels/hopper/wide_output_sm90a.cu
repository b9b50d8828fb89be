// The output of wide rows (more than 256 elements of 16 bits) on Hopper, the second of its two matmuls:
//
//   O_x = 2^(before_x − R_x) O_x + Σ_tiles 2^(m_x,tile − R_x) P_x,tile · Y_tile     R = rows' largest m so far − headroom
//   sum_x likewise, with the tiles' sums
//
// Shapes: a panel P with m and sums of its tiles (wide_panel_sm90a.cu), y by a tensor map; O (splits, x_rows, dim) f32. With `adds`
// 0 there was no O before. A split has a part of the panel's tiles.
//
// Two blocks (wide.cuh) have 128 rows of X each, the same 256 columns of Y and the same tiles. Each of a block's two consumer warpgroups
// has 64 of the rows, with O in registers. Chunks of 64 streamed rows go through a ring: of P as it lies, of Y four boxes of 64 columns,
// two of them from the other block. P is read as the matmul's operand, multiplied by 2^(m − R) (a power of two: exact, and what
// becomes 0 is below the operand's resolution), and the next chunk's is read beside the matmul.
//
// A streamed row that is not finite has the probability NaN, or 0 where it is masked: its elements are cleared, as 0 · NaN must not
// enter O.
// Cost of a chunk: 2·128·256·64 flops; 48 KiB of shared memory filled, 16 of them by the other block. Registers: 128 for accumulators.
// Numerics, determinism: as in stream_sm80.cu; sums run in the order of tiles.
// Tests: tests/gpu.rs on compute capability 9.0.
#include "hopper/wide.cuh"
#include "shared/score.cuh"

namespace {

constexpr int BLOCK_X = 128;
constexpr int COLUMNS = 256;
constexpr int COLUMNS_PER_BOX = CHUNK_BYTES / 2;
constexpr int BOXES = COLUMNS / COLUMNS_PER_BOX;
constexpr int BOX_BYTES = PANEL_CHUNK_ROWS * CHUNK_BYTES;
constexpr int P_BYTES = BLOCK_X / SLAB_ROWS * SLAB_BYTES;
constexpr int CHUNKS_PER_TILE = WIDE_BLOCK_Y / PANEL_CHUNK_ROWS;
constexpr int STAGES = 4;
constexpr uint32_t CONSUMERS_BARRIER = 1;

struct Storage {
    alignas(1024) char y[STAGES][BOXES * BOX_BYTES];
    char p[STAGES][P_BYTES];
    PairBarriers<STAGES> ring;
};
static_assert(sizeof(Storage) <= 232448, "fits in shared memory");

// A block's units: a pair's 256 rows, a slice of the columns, a split of the tiles.
struct OutputUnits {
    const WideParams& h;
    uint32_t unit, slices, rank;

    __device__ __forceinline__ explicit OutputUnits(const WideParams& params)
        : h(params), unit(blockIdx.x / PAIR), slices((params.stream.dim + COLUMNS - 1) / COLUMNS), rank(ptx::cluster_rank()) {}
    __device__ __forceinline__ bool done() const { return unit >= h.units; }
    __device__ __forceinline__ void next() { unit += gridDim.x / PAIR; }
    // Counted from the launch's first stationary row.
    __device__ __forceinline__ uint32_t first_x() const { return unit % h.x_blocks * WIDE_BLOCK_X + rank * BLOCK_X; }
    __device__ __forceinline__ uint32_t slice() const { return unit / h.x_blocks % slices; }
    __device__ __forceinline__ uint32_t split() const { return unit / h.x_blocks / slices; }
    __device__ __forceinline__ uint32_t first_tile() const { return split() * h.tiles_per_unit; }
    __device__ __forceinline__ uint32_t end_tile() const { return min(first_tile() + h.tiles_per_unit, h.y_tiles); }
};

__device__ __forceinline__ void produce(const WideParams& h, Storage& shared) {
    ptx::prefetch_map(&h.y_map);
    const uint64_t slabs = h.x_blocks * (WIDE_BLOCK_X / SLAB_ROWS);
    Place<STAGES> place;
    for (OutputUnits units(h); !units.done(); units.next()) {
        const uint32_t first_box = PAIR * units.rank, first_column = units.slice() * COLUMNS;
        for (uint32_t chunk = units.first_tile() * CHUNKS_PER_TILE; chunk < units.end_tile() * CHUNKS_PER_TILE; ++chunk) {
            shared.ring.wait_empty(place);
            const uint32_t full = shared.ring.expect(place, BOXES * BOX_BYTES + P_BYTES);
            ptx::bulk_load(ptx::smem_address(shared.p[place.index]), h.panel + panel_slab(chunk, units.first_x() / SLAB_ROWS, slabs),
                           P_BYTES, full);
            for (uint32_t box = first_box; box < first_box + BOXES / PAIR; ++box) {
                ptx::tma_load_multicast(ptx::smem_address(shared.y[place.index]) + box * BOX_BYTES, &h.y_map,
                                        first_column + box * COLUMNS_PER_BOX, h.y_first * WIDE_BLOCK_Y + chunk * PANEL_CHUNK_ROWS, full,
                                         BOTH);
            }
            place.advance();
        }
    }
}

// Of a tile, what the thread's two rows are to be multiplied by, and more.
struct TileTerms {
    float max[2], sum[2];
    uint32_t is_spoiled;

    __device__ __forceinline__ void load(const WideParams& h, uint32_t tile, uint32_t row) {
        const uint64_t at = uint64_t(tile) * h.x_blocks * WIDE_BLOCK_X + row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool present = h.x_first * WIDE_BLOCK_X + row + 8 * half < h.stream.x_rows;
            max[half] = present ? h.tile_max[at + 8 * half] : -INFINITY;
            sum[half] = present ? h.tile_sum[at + 8 * half] : 0.0f;
        }
        is_spoiled = h.tile_spoiled[tile];
    }
};

template <typename Element>
struct Consumer {
    using Output = float[COLUMNS / 8][4];
    using Fragments = uint32_t[PANEL_STEPS][4];

    const WideParams& h;
    const StreamParams& p;
    Storage& shared;
    int lane, warp;
    Place<STAGES> place;
    uint32_t row;  // counted from the launch's first stationary row
    float reference[2], before[2], sum[2];

    __device__ __forceinline__ Consumer(const WideParams& params, Storage& storage)
        : h(params), p(params.stream), shared(storage), lane(threadIdx.x % 32), warp(threadIdx.x / 32 - WARPGROUP / 32) {}

    __device__ __forceinline__ uint32_t index(int half) const { return h.x_first * WIDE_BLOCK_X + row + 8 * half; }

    // 2^(max − R): 1 at most, in f16 2^7.
    __device__ __forceinline__ float factor(float max, int half) const { return ptx::exp2(max - subtrahend(reference[half])); }

    __device__ __forceinline__ void begin(uint32_t first_x) {
        row = first_x + warp * SLAB_ROWS + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool present = index(half) < p.x_rows;
            const float max = present ? from_ordered(h.reference[row + 8 * half]) : -INFINITY;
            const float max_before = present && h.adds ? from_ordered(h.reference_before[row + 8 * half]) : -INFINITY;
            reference[half] = below(max, HEADROOM<Element> / 2);
            before[half] = below(max_before, HEADROOM<Element> / 2);
            sum[half] = 0.0f;
        }
    }

    // The operand P of the next chunk, relative to R.
    __device__ __forceinline__ void load(Fragments& a, const uint32_t (&factors)[2]) {
        shared.ring.wait_full(place);
        const char* slab = shared.p[place.index] + warp * SLAB_BYTES;
#pragma unroll
        for (int step = 0; step < PANEL_STEPS; ++step) {
            const uint4 fragment = *reinterpret_cast<const uint4*>(slab + slab_fragment(step, lane));
            a[step][0] = ptx::multiply(fragment.x, factors[0], Element());
            a[step][1] = ptx::multiply(fragment.y, factors[1], Element());
            a[step][2] = ptx::multiply(fragment.z, factors[0], Element());
            a[step][3] = ptx::multiply(fragment.w, factors[1], Element());
        }
    }

    // Starts o += P · Y of the next chunk.
    __device__ __forceinline__ void start(Output& o, const Fragments& a) {
        wgmma::fence();
        const uint64_t y = wgmma::descriptor(ptx::smem_address(shared.y[place.index]), BOX_BYTES);
#pragma unroll
        for (int step = 0; step < PANEL_STEPS; ++step) {
            wgmma::Instruction<Element, COLUMNS>::template rs<wgmma::Major::MN>(o, a[step], y + step * wgmma::MN_STEP / 16, 1);
        }
        wgmma::commit();
    }

    __device__ __forceinline__ void release(Place<STAGES> used) { shared.ring.release(used); }

    // Zeros for the elements of streamed rows that are not finite in the next chunk, which both warpgroups have not begun to multiply.
    __device__ __forceinline__ void clear_spoiled(uint32_t chunk) {
        shared.ring.wait_full(place);
        const uint32_t first = h.y_first * WIDE_BLOCK_Y + chunk * PANEL_CHUNK_ROWS, y = ptx::smem_address(shared.y[place.index]);
        for (uint32_t at = threadIdx.x - WARPGROUP; at < PANEL_CHUNK_ROWS * UNITS; at += CONSUMERS * WARPGROUP) {
            const uint32_t streamed = first + copy_row(at);
            if (streamed >= p.y_rows || !spoiled(p.y_terms[streamed].scale)) continue;
            for (int box = 0; box < BOXES; ++box) {
                const uint32_t to = y + box * BOX_BYTES + swizzle(copy_row(at), copy_unit(at));
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
            }
        }
        ptx::fence_async_shared();
        ptx::named_barrier(CONSUMERS_BARRIER, CONSUMERS * WARPGROUP);
    }

    __device__ __forceinline__ void run() {
        for (OutputUnits units(h); !units.done(); units.next()) unit(units);
    }

    __device__ __forceinline__ void unit(const OutputUnits& units) {
        begin(units.first_x());
        Output o = {};
        Fragments a, b;
        TileTerms terms;
        // A split may have none of a last panel's tiles.
        const bool empty = units.first_tile() >= units.end_tile();
        terms.load(h, empty ? 0 : units.first_tile(), row);
        wgmma::settle(o);
        Place<STAGES> used = place;
        for (uint32_t tile = units.first_tile(); tile < units.end_tile(); ++tile) {
            uint32_t factors[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float f = factor(terms.max[half], half);
                sum[half] += terms.sum[half] * f;
                factors[half] = ptx::pack(f, f, Element());
            }
            const bool is_spoiled = terms.is_spoiled;
            terms.load(h, min(tile + 1, units.end_tile() - 1), row);
            if (is_spoiled) clear_spoiled(tile * CHUNKS_PER_TILE);
            load(a, factors);
            start(o, a);
            place.advance();
            wgmma::wait<1>();
            // The chunk before, but for a unit's first.
            if (tile != units.first_tile()) {
                release(used);
                used.advance();
            }
            if (is_spoiled) clear_spoiled(tile * CHUNKS_PER_TILE + 1);
            load(b, factors);
            start(o, b);
            place.advance();
            wgmma::wait<1>();
            release(used);
            used.advance();
        }
        wgmma::wait<0>();
        wgmma::settle(o);
        if (!empty) release(used);
        write(units, o);
    }

    __device__ __forceinline__ void write(const OutputUnits& units, const Output& o) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (index(half) >= p.x_rows) continue;
            const uint64_t slot = uint64_t(p.first_split + units.split()) * p.x_rows + index(half);
            const float keep = factor(before[half], half);
            if (lane % 4 == 0 && units.slice() == 0) {
                p.max[slot] = reference[half];
                if (p.sum) p.sum[slot] = sum[half] + (h.adds ? keep * p.sum[slot] : 0.0f);
            }
            const uint32_t first = units.slice() * COLUMNS + c_column(lane, 0, 0);
            add_row(o, half, keep, p.output + slot * p.dim + first, p.dim > first ? p.dim - first : 0);
        }
    }

    // The thread's part of a row, where `present` columns are left from its first one on. Many loads at a time: one after the other
    // they would take longer than the matmuls.
    __device__ __forceinline__ void add_row(const Output& o, int half, float keep, float* to, int present) const {
        constexpr int BATCH = 16;
#pragma unroll
        for (int batch = 0; batch < COLUMNS / 8; batch += BATCH) {
            float old[BATCH][2];
#pragma unroll
            for (int i = 0; i < 2 * BATCH; ++i) {
                const int column = 8 * (batch + i / 2) + i % 2;
                old[i / 2][i % 2] = h.adds && column < present ? to[column] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < 2 * BATCH; ++i) {
                const int column = 8 * (batch + i / 2) + i % 2;
                if (column < present) to[column] = o[batch + i / 2][2 * half + i % 2] + keep * old[i / 2][i % 2];
            }
        }
    }
};

template <typename Element>
__device__ __forceinline__ void output(const WideParams& h) {
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<Storage*>(memory);
    if (threadIdx.x == 0) {
        shared.ring.init();
        ptx::fence_barrier_init();
    }
    // Neither block may reach into the other before its barriers are there, or after it has gone.
    ptx::cluster_sync();
    if (threadIdx.x < WARPGROUP) {
        ptx::set_max_registers_down<PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce(h, shared);
    } else {
        ptx::set_max_registers_up<CONSUMER_REGISTERS>();
        Consumer<Element>(h, shared).run();
    }
    ptx::cluster_sync();
}

}  // namespace

extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)
    stream_hopper_wide_output_f16(const __grid_constant__ WideParams h) {
    output<__half>(h);
}

extern "C" __global__ void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)
    stream_hopper_wide_output_bf16(const __grid_constant__ WideParams h) {
    output<__nv_bfloat16>(h);
}
