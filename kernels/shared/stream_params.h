// Arguments of the streaming kernels, mirrored by `StreamParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

// z = (q · c) · c.scale · q.scale + c.bias + q.bias, in units of log 2.
struct RowTerm {
    float scale;
    float bias;
};

// As RowTerm; besides, what a streamed row's probability is multiplied by on its way into the output: factor · 2^e,
// 1 <= |factor| < 2. The exponent e is part of `bias`, so that the running maximum bounds the product and 16-bit operands
// hold it.
struct ColumnTerm {
    float scale;
    float bias;
    float factor;
    union {
        float unscale;  // of a candidate: 2^−e, which takes the factor's exponent out of sums
        float limit;    // of a query in the gradient: z of a probability of 1
    };
};

// The rows that reject a candidate lie in [first, last] (none if first > last); with more than one, `slot` names their key.
struct Hits {
    uint32_t first;
    uint32_t last;
    uint32_t slot;
};

// Which of 64 neighbouring rows reject a key, a bit each. `key` is the key's slot above the block of rows.
struct alignas(16) RowsOfKey {
    uint64_t key;
    uint64_t rows;
};

// A row's positive in the candidate gradient: its index over all pools, and its coefficient as factor · 2^exponent.
struct PositiveTerm {
    uint32_t index;
    float factor;
    float exponent;
};

struct StreamParams {
    // Stationary and streamed rows: (x_rows, dim) and (y_rows, dim), strides in elements.
    const void* x;
    const void* y;
    const RowTerm* x_terms;
    const ColumnTerm* y_terms;
    // Which rows of the matrices at x and y they are, where they are named by reference: row i is row x_indices[i]. Else null.
    const uint32_t* x_indices;
    const uint32_t* y_indices;
    // Where y is not a matrix but the pairs' positives: the address of each row.
    const void* const* y_addresses;
    // Per candidate of the pool; null where nothing is masked.
    const Hits* hits;
    // Rows that reject a key: a hash table of `rows_capacity` places (rejected.cuh).
    const RowsOfKey* rows_of_keys;
    // Per query; null where positives are no candidates, where rows have several, or without gradient.
    const PositiveTerm* positives;
    // Per pair, for ranks: similarity of the positive in units of log 2. Row i has the pairs from pair_offsets[i] to pair_offsets[i + 1];
    // null where it has the pair i alone.
    const float* positive_z;
    const int64_t* pair_offsets;
    // Per query: candidates of a greater similarity in units of log 2 are no negatives. Null where nothing is filtered.
    const float* bounds;
    // Results, one per split and stationary row; ranks one per split and pair.
    float* max;
    float* sum;
    uint32_t* masked;
    float* output;
    float* sum_score;
    float* sum_z;
    uint32_t* above;
    uint32_t* ties;
    uint64_t x_stride;
    uint64_t y_stride;
    uint32_t x_rows;
    uint32_t y_rows;
    uint32_t dim;
    // Tiles of streamed rows per split.
    uint32_t tiles_per_split;
    // Slot of results of the launch's first split.
    uint32_t first_split;
    // Index over all pools of the pool's first candidate.
    uint32_t candidate_start;
    // 16, 8, 4 or 2 bytes: it divides the addresses of all rows, and their bytes.
    uint32_t alignment;
    // 1 where all chunks of the stationary block stay in shared memory.
    uint32_t x_resident;
    // 1: running maximum; 0: `shift` in its place, which biases hold already.
    uint32_t online;
    float shift;
    uint32_t rows_capacity;
    uint32_t pairs;
};

static_assert(sizeof(StreamParams) == 21 * 8 + 2 * 8 + 12 * 4, "mirrored in params.rs");
