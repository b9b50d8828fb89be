// Where things are: rows in shared memory, operands in a warp's registers. Plain arithmetic, which tests/index_arithmetic.cpp
// checks with no GPU.
//
// Shared memory holds chunks: rows of 128 bytes (64 elements of 16 bits, 32 of 32 bits), cut into eight 16-byte units
// that are permuted within their row (`swizzle`) so that eight rows of one column of units lie in different banks. A
// matmul step takes two units of each row: 16 elements of 16 bits (m16n8k16) or 8 of 32 bits (m16n8k8). The two layouts
// agree unit for unit, so addresses are the same for all types.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#define __host__
#define __device__
#endif

constexpr int CHUNK_BYTES = 128;
constexpr int UNIT_BYTES = 16;
constexpr int UNITS = CHUNK_BYTES / UNIT_BYTES;
constexpr int STEPS_PER_CHUNK = UNITS / 2;

// Byte offset of unit `unit` of row `row` in a chunk.
__host__ __device__ constexpr uint32_t swizzle(uint32_t row, uint32_t unit) {
    return row * CHUNK_BYTES + ((unit ^ (row % UNITS)) * UNIT_BYTES);
}

// Of a place in a chunk in shared memory: the one 2 · `step` units on in its row, for even units up to 2 · `step` from the row's first two.
// Chunks begin at multiples of CHUNK_BYTES, so the permutation within a row is an exclusive or of the address.
__host__ __device__ constexpr uint32_t step_address(uint32_t address, uint32_t step) { return address ^ 2 * step * UNIT_BYTES; }

// Row and unit of the `place`-th unit of a chunk in the order in which threads copy: neighbours copy neighbours.
__host__ __device__ constexpr uint32_t copy_row(uint32_t place) { return place / UNITS; }
__host__ __device__ constexpr uint32_t copy_unit(uint32_t place) { return place % UNITS; }

// Row and unit that lane `lane` addresses to load the 16 x (2 units) operand A (rows first: units follow).
__host__ __device__ constexpr uint32_t a_row(uint32_t lane) { return lane % 16; }
__host__ __device__ constexpr uint32_t a_unit(uint32_t lane) { return lane / 16; }
// The same for two neighbouring 8-column operands B, whose columns are rows of shared memory.
__host__ __device__ constexpr uint32_t b_row(uint32_t lane) { return lane % 8 + lane / 16 * 8; }
__host__ __device__ constexpr uint32_t b_unit(uint32_t lane) { return lane / 8 % 2; }

// Lane l of a warp is in group g = l / 4 and has place t = l % 4. Of an accumulator tile of 16 x 8 it holds
// c[0], c[1]: row g, columns 2t, 2t + 1, and c[2], c[3]: the same of row g + 8. Row of half `half`; column of element `e` of the
// n-th tile.
__host__ __device__ constexpr uint32_t c_row(uint32_t lane, uint32_t half) { return lane / 4 + 8 * half; }
__host__ __device__ constexpr uint32_t c_column(uint32_t lane, uint32_t n, uint32_t e) { return 8 * n + lane % 4 * 2 + e % 2; }

// f32: an operand's columns are t and t + 4 where an accumulator's are 2t and 2t + 1. A sum has no order: column 2t is taken for
// t and 2t + 1 for t + 4, on both sides. Row of the streamed chunk that is k = t (k = t + 4 is the next), and unit and byte
// within it of output column g of tile `tile`.
__host__ __device__ constexpr uint32_t single_row(uint32_t lane, uint32_t step) { return 8 * step + 2 * (lane % 4); }
__host__ __device__ constexpr uint32_t single_unit(uint32_t lane, uint32_t tile) { return 2 * tile + lane / 16; }
__host__ __device__ constexpr uint32_t single_byte(uint32_t lane) { return lane / 4 % 4 * 4; }

// Plain multiply-adds (plain.cuh): a lane adds up what lane `partner(lane)` has of an accumulator, so that lanes l and l ^ 1 have the
// same rows, l and l ^ 2 the same columns. Bits 1 and 2 are exchanged: the partner's partner is the lane itself.
__host__ __device__ constexpr uint32_t partner(uint32_t lane) { return (lane & ~6u) | (lane & 2) << 1 | (lane & 4) >> 1; }
// Of a chunk of 32 output columns a lane has units t and t + 4, t being its partner's. Column of place `i`, of 8.
__host__ __device__ constexpr uint32_t plain_unit(uint32_t lane, uint32_t i) { return partner(lane) % 4 + i / 4 * 4; }
__host__ __device__ constexpr uint32_t plain_column(uint32_t lane, uint32_t i) { return 4 * plain_unit(lane, i) + i % 4; }
// Which lane has what an accumulator's tile `n` of a chunk has in lane `lane`, and where: at `plain_place`, for odd lanes two places on.
__host__ __device__ constexpr uint32_t plain_owner(uint32_t lane, uint32_t n) { return partner(lane / 4 * 4 + n % 2 * 2 + lane % 4 / 2); }
__host__ __device__ constexpr uint32_t plain_place(uint32_t n, uint32_t e) { return n / 2 * 4 + e % 2; }

// The panel of wide rows' probabilities (wide_params.h), 16 bits each: for each chunk of 64 streamed rows, for each slab of 16 stationary
// ones (`slabs` in all), for each step of 16 streamed rows, 16 bytes of each lane: its part of an operand A, as it is the accumulator's.
constexpr int SLAB_ROWS = 16;
constexpr int PANEL_CHUNK_ROWS = 64;
constexpr int PANEL_STEPS = PANEL_CHUNK_ROWS / 16;
constexpr int STEP_BYTES = 32 * UNIT_BYTES;
constexpr int SLAB_BYTES = PANEL_STEPS * STEP_BYTES;

__host__ __device__ constexpr uint64_t panel_slab(uint64_t chunk, uint64_t slab, uint64_t slabs) {
    return (chunk * slabs + slab) * SLAB_BYTES;
}
__host__ __device__ constexpr uint32_t slab_fragment(uint32_t step, uint32_t lane) { return step * STEP_BYTES + lane * UNIT_BYTES; }
