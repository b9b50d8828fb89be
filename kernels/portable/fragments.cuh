// Tensor-core fragments of a warp's 16 x 64 tile, for each element type. Where operands lie is in layout.h.
#pragma once
#include "shared/layout.h"
#include "shared/ptx.cuh"

template <typename Element>
struct Fragments {
    static constexpr int ELEMENTS_PER_CHUNK = CHUNK_BYTES / sizeof(Element);
    // Accumulator tiles of 8 columns that cover a chunk's elements.
    static constexpr int TILES_PER_CHUNK = ELEMENTS_PER_CHUNK / 8;

    // s (16 x 64) += x (16 rows of chunk `x`, from `x_row`) · y (64 rows of chunk `y`)ᵀ, over the chunk's elements. A
    // pair's product has the same bits whichever side is X.
    template <bool X_IS_QUERIES>
    static __device__ __forceinline__ void multiply_scores(float (&s)[8][4], uint32_t x, uint32_t x_row, uint32_t y, int lane) {
#pragma unroll
        for (int step = 0; step < STEPS_PER_CHUNK; ++step) {
            uint32_t a[4];
            ptx::ldmatrix_x4(a, x + swizzle(x_row + a_row(lane), 2 * step + a_unit(lane)));
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, y + swizzle(16 * pair + b_row(lane), 2 * step + b_unit(lane)));
                ptx::mma(s[2 * pair], a, b[0], b[1], Element());
                ptx::mma(s[2 * pair + 1], a, b[2], b[3], Element());
            }
        }
    }

    // o (16 x chunk) += p (16 x 64) · y (64 rows of chunk `y`). An accumulator's columns 2t, 2t + 1 are an operand's.
    static __device__ __forceinline__ void multiply_output(float (*o)[4], const float (&p)[8][4], uint32_t y, int lane) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint32_t a[4] = {
                ptx::pack(p[2 * step][0], p[2 * step][1], Element()),
                ptx::pack(p[2 * step][2], p[2 * step][3], Element()),
                ptx::pack(p[2 * step + 1][0], p[2 * step + 1][1], Element()),
                ptx::pack(p[2 * step + 1][2], p[2 * step + 1][3], Element()),
            };
#pragma unroll
            for (int pair = 0; pair < TILES_PER_CHUNK / 2; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4_trans(b, y + swizzle(16 * step + a_row(lane), 2 * pair + a_unit(lane)));
                ptx::mma(o[2 * pair], a, b[0], b[1], Element());
                ptx::mma(o[2 * pair + 1], a, b[2], b[3], Element());
            }
        }
    }
};

// f32 rounded to tf32 (11 bits of mantissa) in products: a type of its own for those who allow it.
struct Tf32 {
    float value;
    Tf32() = default;
    __device__ explicit Tf32(float from) : value(from) {}
};

// EXACT: three tf32 products: x = high + low, each of 11 bits of mantissa and more between them than f32 has; the product
// of the two low parts is below f32's rounding and left out. Else the product of the high parts alone.
template <bool EXACT>
struct SinglePrecision {
    static constexpr int ELEMENTS_PER_CHUNK = CHUNK_BYTES / sizeof(float);
    static constexpr int TILES_PER_CHUNK = ELEMENTS_PER_CHUNK / 8;

    static __device__ __forceinline__ void split(uint32_t x, uint32_t& high, uint32_t& low) {
        high = ptx::round_to_tf32(__uint_as_float(x));
        low = EXACT ? ptx::round_to_tf32(__uint_as_float(x) - __uint_as_float(high)) : 0;
    }

    template <bool LOW_FIRST>
    static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&high)[4], const uint32_t (&low)[4],
                                                    uint32_t b0, uint32_t b1) {
        uint32_t high0, low0, high1, low1;
        split(b0, high0, low0);
        split(b1, high1, low1);
        if (EXACT) {
            // Small products first.
            if (LOW_FIRST) ptx::mma_tf32(d, low, high0, high1);
            ptx::mma_tf32(d, high, low0, low1);
            if (!LOW_FIRST) ptx::mma_tf32(d, low, high0, high1);
        }
        ptx::mma_tf32(d, high, high0, high1);
    }

    // The low part of a query comes before that of a candidate, on either side.
    template <bool X_IS_QUERIES>
    static __device__ __forceinline__ void multiply_scores(float (&s)[8][4], uint32_t x, uint32_t x_row, uint32_t y, int lane) {
#pragma unroll
        for (int step = 0; step < STEPS_PER_CHUNK; ++step) {
            uint32_t a[4], high[4], low[4];
            ptx::ldmatrix_x4(a, x + swizzle(x_row + a_row(lane), 2 * step + a_unit(lane)));
#pragma unroll
            for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, y + swizzle(16 * pair + b_row(lane), 2 * step + b_unit(lane)));
                multiply<X_IS_QUERIES>(s[2 * pair], high, low, b[0], b[1]);
                multiply<X_IS_QUERIES>(s[2 * pair + 1], high, low, b[2], b[3]);
            }
        }
    }

    // Columns of the operand are permuted (layout.h).
    static __device__ __forceinline__ void multiply_output(float (*o)[4], const float (&p)[8][4], uint32_t y, int lane) {
#pragma unroll
        for (int step = 0; step < 8; ++step) {
            const float a[4] = {p[step][0], p[step][2], p[step][1], p[step][3]};
            uint32_t high[4], low[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) split(__float_as_uint(a[i]), high[i], low[i]);
            const uint32_t row = single_row(lane, step);
#pragma unroll
            for (int tile = 0; tile < TILES_PER_CHUNK; ++tile) {
                const uint32_t unit = single_unit(lane, tile), within = single_byte(lane);
                const uint32_t b0 = __float_as_uint(ptx::load_shared(y + swizzle(row, unit) + within));
                const uint32_t b1 = __float_as_uint(ptx::load_shared(y + swizzle(row + 1, unit) + within));
                multiply<true>(o[tile], high, low, b0, b1);
            }
        }
    }
};

template <>
struct Fragments<float> : SinglePrecision<true> {};
template <>
struct Fragments<Tf32> : SinglePrecision<false> {};
