// Expected negatives and gradients of candidates on Hopper, for rows of up to 256 elements of 16 bits:
//
//   EXPECTED   x = queries,    y = candidates     max, sum, and O_x = Σ_y 2^(z_xy − max_x) y.factor · y
//   GRADIENT   x = candidates, y = queries        O_x = Σ_y 2^(z_xy − max_x) y.factor · y        (terms.cuh says what factor and bias hold)
//
// Shapes: x and y of `dim` elements, by tensor maps; a result for each split and row of x, as in stream_sm80.cu.
//
// A block holds 128 rows of X in shared memory and walks the tiles of streamed rows of its unit (pipeline.cuh). Each of two consumer
// warpgroups has 64 of the rows, with S (scores), P (probabilities, 16 bits) and O in registers:
//
//   S = X Yᵀ of tile 0; P from S                                                                       [1]
//   for each tile:
//     start S = X Yᵀ of the next tile; start O += P Y of this one                                      [2]
//     wait for S; scores, maxima, probabilities of the next tile, while O is being added to          [3]
//     wait for O; hand this tile's chunks back; O *= 2^(old maximum − new one); P from S
//
// [1] P is multiplied by y.factor and rounded to Y's type.
// [2] Y lies once in shared memory: as the first matmul's operand with 64 elements of a row after the other (K first), as the second's
//     with rows as the sum's index (MN first).
// [3] Without a maximum, and unless the tile is special, column by column, so that exponentials begin with the first
//     (row_probabilities.cuh).
//
// ONLINE: with a running maximum, which f16's few exponents need; else biases hold a constant shift, 0 for gradients, whose
// coefficients are at most their row's d_lse.
// A streamed row that is not finite has the probability NaN, or 0 where it is masked: its elements are cleared, as 0 · NaN must not
// enter O.
// Numerics, determinism: as in stream_sm80.cu, headroom of f16 and bound of the gradient included.
// Cost of a tile: 4·128·BLOCK_Y·dim flops, 128·BLOCK_Y exponentials; from L2 BLOCK_Y·dim elements. Registers: see OutputShape.
// Tests: tests/gpu.rs on compute capability 9.0.
#include "hopper/pipeline.cuh"
#include "hopper/row_probabilities.cuh"

namespace {

// Accumulators of a thread, for S, P and O: 64 + 32 + 32, 64 + 32 + 64, 32 + 16 + 128 registers.
template <int CHUNKS_>
struct OutputShape {
    static constexpr int BLOCK_X = 128;
    static constexpr int BLOCK_Y = CHUNKS_ == 4 ? 64 : 128;
    static constexpr int CHUNKS = CHUNKS_;
    static constexpr int CHUNK_ELEMENTS = CHUNK_BYTES / 2;
    // Whole tiles, whose chunks are neighbours, for the second matmul: 8, 5 and 4 of them.
    static constexpr int STAGES = CHUNKS == 1 ? 8 : CHUNKS == 2 ? 10 : 16;
    static_assert(STAGES % CHUNKS == 0 && STAGES >= 2 * CHUNKS, "two tiles at a time");
    static constexpr int TERM_STAGES = 3;
    using Term = ColumnTerm;
};

constexpr uint32_t CONSUMERS_BARRIER = 1;

template <typename Element, Mode MODE, int CHUNKS, bool ONLINE>
struct Consumer {
    using Shape = OutputShape<CHUNKS>;
    static constexpr int TILES = Shape::BLOCK_Y / 8;
    static constexpr int WIDTH = CHUNKS * Shape::CHUNK_ELEMENTS;
    static constexpr int STEPS = Shape::BLOCK_Y / 16;
    // Without a maximum: scores and probabilities column by column; not where that would spill.
    static constexpr bool FUSED = !ONLINE && (MODE == Mode::EXPECTED ? CHUNKS <= 2 : CHUNKS == 2);
    // With a maximum: a vote whether it moves.
    static constexpr bool VOTES = ONLINE && MODE == Mode::EXPECTED && CHUNKS <= 2;
    // Chunks of X that are operands in registers, so that shared memory is read for Y alone: as many as do not spill.
    static constexpr int HELD = MODE == Mode::GRADIENT || CHUNKS == 4 ? 0 : HEADROOM<Element> == 0.0f ? CHUNKS : 1;
    using Rows = RowProbabilities<Element, MODE, ONLINE, TILES>;
    using Scores = typename Rows::Scores;
    using Probabilities = uint32_t[STEPS][4];
    using Output = float[WIDTH / 8][4];
    using ChunkPlace = Place<Shape::STAGES>;

    const HopperParams& h;
    const StreamParams& p;
    PipelineStorage<Shape>& shared;
    int lane, group;
    ChunkPlace scores_place, output_place;
    Place<Shape::TERM_STAGES> terms_place;
    Place<1> x_place;
    Rows rows;
    uint32_t flags;  // of the tile
    uint32_t held_x[HELD > 0 ? HELD : 1][STEPS_PER_CHUNK][4];

    __device__ __forceinline__ Consumer(const HopperParams& params, PipelineStorage<Shape>& storage)
        : h(params), p(params.stream), shared(storage), lane(threadIdx.x % 32), group(consumer_group()) {}

    __device__ __forceinline__ void hold_x() {
        const uint32_t thread = ptx::thread_index(), first = (thread - WARPGROUP) / 32 * 16;
#pragma unroll
        for (int i = 0; i < HELD * STEPS_PER_CHUNK; ++i) {
            const int chunk = i / STEPS_PER_CHUNK, step = i % STEPS_PER_CHUNK;
            wgmma::load_a(held_x[chunk][step], shared.x_chunk(chunk), first, step, thread % 32);
        }
    }

    // Starts s = X · the next tile.
    __device__ __forceinline__ void start_scores(Scores& s) {
        using Matmul = wgmma::Instruction<Element, Shape::BLOCK_Y>;
        wgmma::settle(s);
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            shared.chunks.wait_full(scores_place);
            wgmma::fence();
            const uint64_t x = wgmma::descriptor(shared.x_chunk(chunk) + 64 * group * CHUNK_BYTES);
            const uint64_t y = wgmma::descriptor(shared.y_chunk(scores_place.index));
#pragma unroll
            for (int step = 0; step < STEPS_PER_CHUNK; ++step) {
                const int offset = step * wgmma::K_STEP / 16, accumulate = chunk + step > 0;
                if (chunk < HELD) Matmul::template rs<wgmma::Major::K>(s, held_x[chunk < HELD ? chunk : 0][step], y + offset, accumulate);
                else Matmul::template ss<wgmma::Major::K, wgmma::Major::K>(s, x + offset, y + offset, accumulate);
            }
            scores_place.advance();
        }
        wgmma::commit();
    }

    // Starts o += P · the tile at `output_place`.
    __device__ __forceinline__ void start_output(Output& o, const Probabilities& probabilities) {
        wgmma::settle(o);
        wgmma::fence();
        const uint64_t y = wgmma::descriptor(shared.y_chunk(output_place.index), Shape::BLOCK_Y * CHUNK_BYTES);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            wgmma::Instruction<Element, WIDTH>::template rs<wgmma::Major::MN>(o, probabilities[step], y + step * wgmma::MN_STEP / 16, 1);
        }
        wgmma::commit();
    }

    // The flags are read here, so that nothing waits for them later.
    __device__ __forceinline__ void wait_terms() {
        shared.of_terms.wait_full(terms_place);
        flags = shared.flags[terms_place.index];
    }

    // Probabilities of a tile in place of dots.
    __device__ __forceinline__ void reduce(Scores& s, uint32_t tile) {
        const auto* terms = static_cast<const typename Rows::Term*>(shared.terms[terms_place.index]);
        // Hidden from the compiler, which else keeps what follows from the lane in registers throughout the loop.
        int here = lane;
        asm volatile("" : "+r"(here));
        if (FUSED && !flags) {
            rows.by_column(s, terms, here);
        } else if (VOTES && !flags) {
            rows.by_vote(p, s, terms, here);
        } else {
            rows.in_steps(p, s, terms, flags != 0, tile * Shape::BLOCK_Y, here);
            if (flags & TILE_SPOILED) clear_spoiled();
            // Again, so that X's registers are free until here.
            hold_x();
        }
        shared.of_terms.release(terms_place);
        terms_place.advance();
    }

    // Zeros for the elements of streamed rows that are not finite, in the tile that comes after output_place's or, at the start, in it:
    // the one whose scores were made last. Both groups have made them by the first barrier, and nobody adds it to O before the second.
    __device__ __forceinline__ void clear_spoiled() {
        ptx::named_barrier(CONSUMERS_BARRIER, CONSUMERS * WARPGROUP);
        const uint32_t first = (scores_place.index + Shape::STAGES - CHUNKS) % Shape::STAGES;
        const ColumnTerm* terms = shared.terms[terms_place.index];
        for (uint32_t place = threadIdx.x - WARPGROUP; place < CHUNKS * Shape::BLOCK_Y * UNITS; place += CONSUMERS * WARPGROUP) {
            const uint32_t chunk = place / (Shape::BLOCK_Y * UNITS), at = place % (Shape::BLOCK_Y * UNITS);
            if (!spoiled(terms[copy_row(at)].scale)) continue;
            const uint32_t to = shared.y_chunk(first + chunk) + swizzle(copy_row(at), copy_unit(at));
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
        }
        ptx::fence_async_shared();
        ptx::named_barrier(CONSUMERS_BARRIER, CONSUMERS * WARPGROUP);
    }

    // An accumulator's columns 2t, 2t + 1 of two neighbouring tiles are an operand's.
    static __device__ __forceinline__ void round(const Scores& s, Probabilities& probabilities) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* pair = &s[2 * step + i / 2][i % 2 * 2];
                probabilities[step][i] = ptx::pack(pair[0], pair[1], Element());
            }
        }
    }

    __device__ __forceinline__ void rescale(Output& o) const {
        if (!ONLINE) return;
        // Maxima soon stop moving.
        if (!__any_sync(~0u, rows.factor[0] != 1.0f || rows.factor[1] != 1.0f)) return;
#pragma unroll
        for (int i = 0; i < WIDTH / 2; ++i) o[i / 4][i % 4] *= rows.factor[i % 4 / 2];
    }

    __device__ __forceinline__ void release_chunks() {
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; ++chunk) {
            shared.chunks.release(output_place);
            output_place.advance();
        }
    }

    __device__ __forceinline__ void run() {
        for (Units<Shape::BLOCK_X, Shape::BLOCK_Y> units(h); !units.done(); units.next()) unit(units);
    }

    __device__ __forceinline__ void unit(const Units<Shape::BLOCK_X, Shape::BLOCK_Y>& units) {
        rows.begin(p, units.first_x() + 64 * group + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4);
        Scores s;
        Probabilities probabilities;
        Output o = {};
        shared.of_x.wait_full(x_place);
        hold_x();
        start_scores(s);
        wait_terms();
        wgmma::wait<0>();
        wgmma::settle(s);
        reduce(s, units.first_tile());
        round(s, probabilities);
        for (uint32_t next = units.first_tile() + 1; next < units.end_tile(); ++next) {
            start_scores(s);
            start_output(o, probabilities);
            wait_terms();
            wgmma::wait<1>();
            wgmma::settle(s);
            reduce(s, next);
            wgmma::wait<0>();
            wgmma::settle(o);
            release_chunks();
            rescale(o);
            round(s, probabilities);
        }
        start_output(o, probabilities);
        shared.of_x.release(x_place);
        x_place.advance();
        wgmma::wait<0>();
        wgmma::settle(o);
        release_chunks();
        write(units.split(), o);
    }

    __device__ __forceinline__ void write(uint32_t split, const Output& o) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t index = rows.row + 8 * half;
            const uint64_t slot = uint64_t(p.first_split + split) * p.x_rows + index;
            rows.write(p, slot, half, lane % 4 == 0 && index < p.x_rows);
            if (index >= p.x_rows) continue;
            float* to = p.output + slot * p.dim;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n) {
                const uint32_t column = c_column(lane, n, 0);
                if (column < p.dim) to[column] = o[n][2 * half];
                if (column + 1 < p.dim) to[column + 1] = o[n][2 * half + 1];
            }
        }
    }
};

template <typename Element, Mode MODE, int CHUNKS, bool ONLINE>
__device__ __forceinline__ void output(const HopperParams& p) {
    using Shape = OutputShape<CHUNKS>;
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<PipelineStorage<Shape>*>(memory);
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    if (threadIdx.x < WARPGROUP) {
        ptx::set_max_registers_down<PRODUCER_REGISTERS>();
        Producer<MODE, Shape>(p, shared).run(p.stream.y_terms);
    } else {
        ptx::set_max_registers_up<CONSUMER_REGISTERS>();
        Consumer<Element, MODE, CHUNKS, ONLINE>(p, shared).run();
    }
}

}  // namespace

#define KERNEL(name, element, mode, chunks, online)                                                                    \
    static_assert(sizeof(PipelineStorage<OutputShape<chunks>>) <= 232448, "fits in shared memory");                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
        stream_hopper_##name(const __grid_constant__ HopperParams p) {                                                 \
        output<element, Mode::mode, chunks, online>(p);                                                                \
    }

// Rows of up to 64, 128 and 256 elements.
#define WIDTHS(name, type, element, mode, online)               \
    KERNEL(name##_1_##type, element, mode, 1, online)           \
    KERNEL(name##_2_##type, element, mode, 2, online)           \
    KERNEL(name##_4_##type, element, mode, 4, online)

WIDTHS(expected, f16, __half, EXPECTED, true)
WIDTHS(expected, bf16, __nv_bfloat16, EXPECTED, true)
WIDTHS(bounded_expected, bf16, __nv_bfloat16, EXPECTED, false)
WIDTHS(gradient, f16, __half, GRADIENT, true)
WIDTHS(gradient, bf16, __nv_bfloat16, GRADIENT, false)
