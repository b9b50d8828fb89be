// Tensor-core fragments of a warp's rows, for each element type: SLABS slabs of 16 stationary rows, against 64 streamed ones. An operand
// of streamed rows is loaded once for all slabs, one or two operands ahead of its products. Where operands lie is in layout.h. On some
// devices f32 has plain multiply-adds in their place (plain.cuh).
#pragma once
#include "portable/plain.cuh"
#include "shared/layout.h"
#include "shared/ptx.cuh"

// Where plain multiply-adds take less time for f32 than three tf32 products: on multiprocessors with 128 multiply-adds of f32 a clock, and
// 128 (GeForce) or 256 (professional cards) of tf32. Those of capability 8.0, 8.7, 9.0 and 10.0 have 512 or more of tf32.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define HAS_PLAIN_PRODUCTS 1
#else
#define HAS_PLAIN_PRODUCTS 0
#endif

// Elements of 16 bits: operands are as they lie in shared memory.
template <typename Element>
struct Products {
    template <int COUNT>
    struct Operand {
        uint32_t bits[COUNT];
        __device__ __forceinline__ void set(int i, uint32_t x) { bits[i] = x; }
    };

    template <bool LOW_FIRST>
    static __device__ __forceinline__ void multiply(float (&d)[4], const Operand<4>& a, const Operand<2>& b) {
        ptx::mma(d, a.bits, b.bits[0], b.bits[1], Element());
    }
};

// f32 rounded to tf32 (11 bits of mantissa) in products: a type of its own for those who allow it.
struct Tf32 {
    float value;
};

// EXACT: three tf32 products: x = high + low, each of 11 bits of mantissa and more between them than f32 has; the product of the two low
// parts is below f32's rounding and left out. Else the product of the high parts alone.
template <bool EXACT>
struct SingleProducts {
    // COUNT registers of an operand.
    template <int COUNT>
    struct Operand {
        uint32_t high[COUNT], low[COUNT];

        // Of an element that is finite: others have scales that are NaN. Four instructions: cvt.rna.tf32, which rounds alike, takes three
        // each time, and the tensor core drops what is below the rounded bits.
        __device__ __forceinline__ void set(int i, uint32_t x) {
            if (!EXACT) return set_any(i, x);
            constexpr uint32_t DROPPED = 0x1fff, HALF = (DROPPED + 1) / 2;
            high[i] = (x + HALF) & ~DROPPED;
            low[i] = __float_as_uint(__uint_as_float(x) - __uint_as_float(high[i])) + HALF;
        }

        // Of any number: NaN stays NaN.
        __device__ __forceinline__ void set_any(int i, uint32_t x) {
            high[i] = ptx::round_to_tf32(__uint_as_float(x));
            low[i] = EXACT ? ptx::round_to_tf32(__uint_as_float(x) - __uint_as_float(high[i])) : 0;
        }
    };

    template <bool LOW_FIRST>
    static __device__ __forceinline__ void multiply(float (&d)[4], const Operand<4>& a, const Operand<2>& b) {
        if (EXACT) {
            // Small products first.
            if (LOW_FIRST) ptx::mma_tf32(d, a.low, b.high[0], b.high[1]);
            ptx::mma_tf32(d, a.high, b.low[0], b.low[1]);
            if (!LOW_FIRST) ptx::mma_tf32(d, a.low, b.high[0], b.high[1]);
        }
        ptx::mma_tf32(d, a.high, b.high[0], b.high[1]);
    }
};

template <>
struct Products<float> : SingleProducts<true> {};
template <>
struct Products<Tf32> : SingleProducts<false> {};

template <typename Element>
struct Fragments : Products<Element> {
    using Products<Element>::multiply;
    template <int COUNT>
    using Operand = typename Products<Element>::template Operand<COUNT>;
    static constexpr bool IS_SINGLE = sizeof(Element) == sizeof(float);
    static constexpr int ELEMENTS_PER_CHUNK = CHUNK_BYTES / sizeof(Element);
    // Accumulator tiles of 8 columns that cover a chunk's elements.
    static constexpr int TILES_PER_CHUNK = ELEMENTS_PER_CHUNK / 8;
    // Operands of streamed rows that are on their way to registers, and all that are in them. Those of f32 have more products each.
    static constexpr int AHEAD = IS_SINGLE ? 1 : 2, HELD = AHEAD + 1;

    // s (slabs x 16 x 8 tiles) += x (rows of chunk `x`, from `x_row`) · y (rows of a chunk, from `y` on)ᵀ, over the chunk's elements. A pair's product
    // has the same bits whichever side is X: the low part of a query of f32 comes before that of a candidate. `meanwhile` is called
    // while the first operands are on their way.
    template <bool X_IS_QUERIES, int SLABS, int TILES, typename Meanwhile>
    static __device__ __forceinline__ void multiply_scores(float (&s)[SLABS][TILES][4], uint32_t x, uint32_t x_row, uint32_t y, int lane,
                                                           Meanwhile meanwhile) {
        constexpr int PAIRS = TILES / 2, LOADS = STEPS_PER_CHUNK * PAIRS;
        const uint32_t from_x = x + swizzle(x_row + a_row(lane), a_unit(lane)), from_y = y + swizzle(b_row(lane), b_unit(lane));
        uint32_t raw_a[2][SLABS][4], raw_b[HELD][4];
        Operand<4> a[SLABS];
        const auto load_a = [&](int step) {
#pragma unroll
            for (int slab = 0; slab < SLABS; ++slab) {
                ptx::ldmatrix_x4(raw_a[step % 2][slab], step_address(from_x, step) + SLAB_ROWS * slab * CHUNK_BYTES);
            }
        };
        const auto load_b = [&](int load) {
            ptx::ldmatrix_x4(raw_b[load % HELD], step_address(from_y, load / PAIRS) + 16 * (load % PAIRS) * CHUNK_BYTES);
        };
        load_a(0);
#pragma unroll
        for (int load = 0; load < AHEAD; ++load) load_b(load);
        meanwhile();
#pragma unroll
        for (int load = 0; load < LOADS; ++load) {
            const int step = load / PAIRS, pair = load % PAIRS;
            if (load + AHEAD < LOADS) load_b(load + AHEAD);
            if (pair == PAIRS - AHEAD && step + 1 < STEPS_PER_CHUNK) load_a(step + 1);
            if (pair == 0) {
#pragma unroll
                for (int i = 0; i < 4 * SLABS; ++i) a[i / 4].set(i % 4, raw_a[step % 2][i / 4][i % 4]);
            }
            Operand<2> b[2];
#pragma unroll
            for (int i = 0; i < 4; ++i) b[i / 2].set(i % 2, raw_b[load % HELD][i]);
#pragma unroll
            for (int i = 0; i < 2 * SLABS; ++i) {
                Fragments::template multiply<X_IS_QUERIES>(s[i / 2][2 * pair + i % 2], a[i / 2], b[i % 2]);
            }
        }
    }

    // o (slabs x 16 x a chunk's columns, from accumulator tile `first` on) += p (slabs x 16 x 8 tiles) · y (rows of a chunk, from `y` on).
    template <int SLABS, int COUNT, int P_TILES, typename Meanwhile>
    static __device__ __forceinline__ void multiply_output(float (&o)[SLABS][COUNT][4], int first, const float (&p)[SLABS][P_TILES][4],
                                                           uint32_t y, int lane, Meanwhile meanwhile) {
        // A load's accumulator tiles, steps over streamed rows.
        constexpr int TILES = IS_SINGLE ? 1 : 2, STEPS = P_TILES / TILES, GROUPS = TILES_PER_CHUNK / TILES, LOADS = STEPS * GROUPS;
        uint32_t raw[HELD][2 * TILES];
        Operand<4> a[SLABS];
        const auto load = [&](int load) { load_columns(raw[load % HELD], y, load / GROUPS, load % GROUPS, lane); };
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) load(i);
        meanwhile();
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            const int step = i / GROUPS, tile = first + i % GROUPS * TILES;
            if (i + AHEAD < LOADS) load(i + AHEAD);
            if (i % GROUPS == 0) {
#pragma unroll
                for (int slab = 0; slab < SLABS; ++slab) set_probabilities(a[slab], p[slab], step);
            }
            Operand<2> b[TILES];
#pragma unroll
            for (int j = 0; j < 2 * TILES; ++j) b[j / 2].set(j % 2, raw[i % HELD][j]);
#pragma unroll
            for (int j = 0; j < TILES * SLABS; ++j) {
                Fragments::template multiply<true>(o[j / TILES][tile + j % TILES], a[j / TILES], b[j % TILES]);
            }
        }
    }

    // An accumulator's columns 2t, 2t + 1 are an operand's of 16 bits. Those of f32 are permuted (layout.h).
    template <int P_TILES>
    static __device__ __forceinline__ void set_probabilities(Operand<4>& a, const float (&p)[P_TILES][4], int step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (IS_SINGLE) {
                a.set_any(i, __float_as_uint(p[step][i % 2 * 2 + i / 2]));
            } else {
                const float* pair = &p[2 * step + i / 2][i % 2 * 2];
                a.set(i, ptx::pack(pair[0], pair[1], Element()));
            }
        }
    }

    // Of 16 streamed rows two accumulator tiles' columns; of 8 rows of f32 one tile's.
    static __device__ __forceinline__ void load_columns(uint32_t (&b)[4], uint32_t y, int step, int group, int lane) {
        const uint32_t from = y + swizzle(a_row(lane), a_unit(lane));
        ptx::ldmatrix_x4_trans(b, step_address(from, group) + 16 * step * CHUNK_BYTES);
    }
    static __device__ __forceinline__ void load_columns(uint32_t (&b)[2], uint32_t y, int step, int tile, int lane) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t from = y + swizzle(single_row(lane, 0) + i, single_unit(lane, 0)) + single_byte(lane);
            b[i] = __float_as_uint(ptx::load_shared(step_address(from, tile) + 8 * step * CHUNK_BYTES));
        }
    }

    // Scores and output are where an accumulator has them; plain.cuh moves its own there.
    template <int SLABS, int TILES>
    static __device__ __forceinline__ void settle_scores(float (&)[SLABS][TILES][4], int) {}
    static __device__ __forceinline__ void to_output_rows(float (&)[2], int) {}
    template <int SLABS, int COUNT>
    static __device__ __forceinline__ void settle_output(float (&)[SLABS][COUNT][4], int) {}
};

#if HAS_PLAIN_PRODUCTS
template <>
struct Fragments<float> : PlainFragments {};
#endif
