// What a warp keeps of each slab of 16 stationary rows, and what DETAIL takes from a tile besides sums: ranks and moments.
#pragma once
#include "portable/tile_stream.cuh"

struct Detail {
    float sum_score[2];
    float sum_z[2];
    uint32_t above[2];
    uint32_t ties[2];
};

// What a thread keeps of its two rows of a slab.
struct Slab {
    uint32_t first_row;
    RowTerm rows[2];
    float positive[2];
    RowState state;
    Detail detail;
};

template <typename Element, Mode MODE, int OUTPUT_CHUNKS, int SLABS>
struct SlabStream : TileStream<Element, MODE, OUTPUT_CHUNKS, SLABS> {
    using Base = TileStream<Element, MODE, OUTPUT_CHUNKS, SLABS>;
    using Base::first_row, Base::lane, Base::p;
    using typename Base::Tile;

    using Base::Base;

    __device__ __forceinline__ Slab new_slab(int number) const {
        Slab slab = {first_row(number), {}, {}, {{-INFINITY, -INFINITY}, {0.0f, 0.0f}}, {}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool present = row(slab, half) < p.x_rows;
            slab.rows[half] = present ? p.x_terms[row(slab, half)] : RowTerm{0.0f, 0.0f};
            slab.positive[half] = MODE == Mode::DETAIL && present && !p.pair_offsets ? p.positive_z[row(slab, half)] : 0.0f;
            // The terms hold the shift.
            if (!p.online) slab.state.max[half] = 0.0f;
            if (present && counts_masked()) p.masked[slot(slab, half)] = 0;
        }
        return slab;
    }

    // DETAIL: ranks, from dots, and these once more.
    __device__ __forceinline__ void rank(const float (&s)[8][4], const Tile& tile, Slab& slab, float (&raw)[8][4]) {
        if (p.pair_offsets) count_ranks(s, tile, slab);
        else count_rank(s, tile, slab);
#pragma unroll
        for (int i = 0; i < 32; ++i) raw[i / 4][i % 4] = s[i / 4][i % 4];
    }

    __device__ __forceinline__ void count_rank(const float (&s)[8][4], const Tile& tile, Slab& slab) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = c_column(lane, n, e), half = e / 2;
                if (tile.first_column + column >= p.y_rows || tile.mask.holds(n, e)) continue;
                const float sim = similarity(s[n][e], slab.rows[half].scale, tile.terms[column].scale);
                slab.detail.above[half] += sim > slab.positive[half];
                slab.detail.ties[half] += sim == slab.positive[half];
            }
        }
    }

    // The same where rows have several positives: each has a place in memory, to which one thread of the row's four adds.
    __device__ __forceinline__ void count_ranks(const float (&s)[8][4], const Tile& tile, const Slab& slab) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t first = first_pair(slab, half), end = end_pair(slab, half);
#pragma unroll 1
            for (int64_t pair = first; __any_sync(~0u, pair < end); ++pair) {
                const float positive = pair < end ? p.positive_z[pair] : INFINITY;
                uint32_t above = 0, ties = 0;
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    const int n = i / 2, e = 2 * half + i % 2, column = c_column(lane, n, e);
                    if (tile.first_column + column >= p.y_rows || tile.mask.holds(n, e)) continue;
                    const float sim = similarity(s[n][e], slab.rows[half].scale, tile.terms[column].scale);
                    above += sim > positive;
                    ties += sim == positive;
                }
                above = sum_of_quad(above);
                ties = sum_of_quad(ties);
                if (pair >= end || lane % 4 != 0) continue;
                p.above[rank_slot(pair)] += above;
                p.ties[rank_slot(pair)] += ties;
            }
        }
    }

    __device__ __forceinline__ void clear_ranks(const Slab& slab) const {
        if (lane % 4 != 0) return;
        for (int half = 0; half < 2; ++half) {
            for (int64_t pair = first_pair(slab, half); pair < end_pair(slab, half); ++pair) {
                p.above[rank_slot(pair)] = p.ties[rank_slot(pair)] = 0;
            }
        }
    }

    static __device__ __forceinline__ uint32_t row(const Slab& slab, int half) { return slab.first_row + 8 * half; }
    __device__ __forceinline__ uint64_t slot(const Slab& slab, int half) const {
        return uint64_t(p.first_split + blockIdx.y) * p.x_rows + row(slab, half);
    }
    // One thread of each row, of one slice's block.
    __device__ __forceinline__ bool counts_masked() const { return MODE != Mode::GRADIENT && lane % 4 == 0 && blockIdx.z == 0; }
    __device__ __forceinline__ int64_t first_pair(const Slab& slab, int half) const { return pair_offset(row(slab, half), 0); }
    __device__ __forceinline__ int64_t end_pair(const Slab& slab, int half) const { return pair_offset(row(slab, half), 1); }
    __device__ __forceinline__ int64_t pair_offset(uint32_t row, int end) const { return row < p.x_rows ? p.pair_offsets[row + end] : 0; }
    __device__ __forceinline__ uint64_t rank_slot(int64_t pair) const { return uint64_t(p.first_split + blockIdx.y) * p.pairs + pair; }

    // Moments of a tile, relative to the maximum that the row has with it.
    __device__ __forceinline__ void add_moments(const float (&s)[8][4], const float (&z)[8][4], const Tile& tile, const float (&origin)[2],
                                                Slab& slab) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int column = c_column(lane, n, e), half = e / 2;
                const float distance = z[n][e] - origin[half];
                const float probability = ptx::exp2(distance);
                if (probability == 0.0f) continue;  // masked: 0 · ∞ must not enter
                slab.detail.sum_score[half] += probability * similarity(s[n][e], slab.rows[half].scale, tile.terms[column].scale);
                slab.detail.sum_z[half] += probability * distance;
            }
        }
    }
};
