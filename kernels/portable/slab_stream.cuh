// What a warp keeps of each slab of 16 stationary rows and writes at the end, and what it looks for in special tiles. DETAIL also takes ranks
// and moments from each tile.
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
    using Base::first_row, Base::first_x, Base::lane, Base::p, Base::shared;
    using Base::HAS_OUTPUT, Base::TILES;
    using typename Base::Tile;
    // How far below a row's largest score its maximum is kept (score.cuh).
    static constexpr float BELOW = HAS_OUTPUT ? HEADROOM<Element> : 0.0f;

    using Base::Base;

    __device__ __forceinline__ Slab new_slab(int number) const {
        Slab slab = {first_row(number), {}, {}, {{-INFINITY, -INFINITY}, {0.0f, 0.0f}}, {}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool present = row(slab, half) < p.x_rows;
            const RowTerm term = present ? p.x_terms[row(slab, half)] : RowTerm{0.0f, 0.0f};
            if constexpr (HAS_OUTPUT) {
                if (lane % 4 == 0) shared->rows[row(slab, half) - first_x] = term;
            } else {
                slab.rows[half] = term;
            }
            slab.positive[half] = MODE == Mode::DETAIL && present && !p.pair_offsets ? p.positive_z[row(slab, half)] : 0.0f;
            // The terms hold the shift.
            if (!p.online) slab.state.max[half] = 0.0f;
            if (present && counts_masked()) p.masked[slot_of(row(slab, half))] = 0;
        }
        keep_max(slab);
        return slab;
    }

    // Terms and maxima of a slab's rows, which are in shared memory where an output takes their registers.
    __device__ __forceinline__ void load_rows(const Slab& slab, RowTerm (&rows)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (HAS_OUTPUT) {
                const float2 term = ptx::load_shared_2(&shared->rows[row(slab, half) - first_x]);
                rows[half] = {term.x, term.y};
            } else {
                rows[half] = slab.rows[half];
            }
        }
    }

    __device__ __forceinline__ void load_max(Slab& slab) const {
        if constexpr (HAS_OUTPUT) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                slab.state.max[half] = ptx::load_shared(ptx::smem_address(&shared->max[row(slab, half) - first_x]));
            }
        }
    }

    // All lanes have read the maxima before, and read these later.
    __device__ __forceinline__ void keep_max(const Slab& slab) const {
        if constexpr (HAS_OUTPUT) {
            __syncwarp();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (lane % 4 == 0) shared->max[row(slab, half) - first_x] = slab.state.max[half];
            }
            __syncwarp();
        }
    }

    // Whether the warp has pairs to drop and to mend in the slab.
    __device__ __forceinline__ bool look(const float (&s)[TILES][4], Tile& tile, const Slab& slab) {
        tile.look_for_masked();
        if (p.bounds) {
            RowTerm rows[2];
            load_rows(slab, rows);
            tile.filter(s, rows);
        }
        // Each of a row's four lanes has some of its columns. One thread adds them up in memory, which costs no register.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t masked = sum_of_quad(tile.mask.count(half));
            const uint32_t row = tile.row + 8 * half;
            if (masked && row < p.x_rows && counts_masked()) atomicAdd(&p.masked[slot_of(row)], masked);
        }
        tile.look_at_columns();
        return tile.found();
    }

    // The slab's sums relative to the maximum that its rows have with this tile. `factor` is what its outputs are to be multiplied by.
    __device__ __forceinline__ void move_max(const float (&largest)[2], Slab& slab, float (&factor)[2]) {
        const float before[2] = {slab.state.max[0], slab.state.max[1]};
        Tile::advance_max(largest, BELOW, slab.state, factor);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (MODE == Mode::DETAIL && before[half] != -INFINITY) {
                const float moved = before[half] - slab.state.max[half];
                slab.detail.sum_z[half] = factor[half] * (slab.detail.sum_z[half] + moved * slab.state.sum[half]);
                slab.detail.sum_score[half] *= factor[half];
            }
            slab.state.sum[half] *= factor[half];
        }
    }

    // Results of a slab, and its output's.
    template <int OUTPUT_TILES>
    __device__ __forceinline__ void write(Slab& slab, const float (&o)[OUTPUT_TILES][4]) {
        load_max(slab);
        const Detail& detail = slab.detail;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = sum_of_quad(slab.state.sum[half]);
            const float sum_score = sum_of_quad(detail.sum_score[half]), sum_z = sum_of_quad(detail.sum_z[half]);
            const uint32_t above = sum_of_quad(detail.above[half]), ties = sum_of_quad(detail.ties[half]);
            if (row(slab, half) >= p.x_rows) continue;
            const uint64_t slot = slot_of(row(slab, half));
            if (lane % 4 == 0 && blockIdx.z == 0) {
                p.max[slot] = p.online ? slab.state.max[half] : p.shift;
                if (MODE != Mode::GRADIENT) p.sum[slot] = sum;
                if (MODE == Mode::DETAIL) {
                    p.sum_score[slot] = sum_score;
                    p.sum_z[slot] = sum_z;
                    if (p.pair_offsets) continue;
                    p.above[slot] = above;
                    p.ties[slot] = ties;
                }
            }
            if (!HAS_OUTPUT) continue;
            const uint32_t first = blockIdx.z * OUTPUT_CHUNKS * Fragments<Element>::ELEMENTS_PER_CHUNK + lane % 4 * 2;
            float* to = p.output + slot * p.dim;
#pragma unroll
            for (int n = 0; n < OUTPUT_TILES; ++n) {
                const uint32_t column = first + 8 * n;
                if (column < p.dim) to[column] = o[n][2 * half];
                if (column + 1 < p.dim) to[column + 1] = o[n][2 * half + 1];
            }
        }
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
    __device__ __forceinline__ uint64_t slot_of(uint32_t row) const { return uint64_t(p.first_split + blockIdx.y) * p.x_rows + row; }
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
