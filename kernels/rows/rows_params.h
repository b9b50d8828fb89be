// Arguments of rows.cu, mirrored by `PrepareRowsParams` in src/backend/cuda/params.rs.
#pragma once
#include "rows/key_table_params.h"
#include "shared/stream_params.h"

// Rows of one matrix, and where what is known about them goes.
struct RowSet {
    const void* embeddings;   // (rows, dim), f32, f16 or bf16: the kernel's name says which
    const uint32_t* indices;  // (rows): row i is row indices[i] at `embeddings`; null where it is row i
    const float* log_q;      // (rows); null without a correction
    // Results, (rows) each; null where no pass wants them.
    float* inverse_norm;
    RowTerm* row_terms;
    ColumnTerm* columns;         // of a pass without output
    ColumnTerm* output_columns;  // of a pass with one
    uint64_t rows;               // 0: no such rows
    uint64_t stride;             // elements between the starts of rows
    uint64_t start;              // index over all pools of the first row
    float scale;                 // multiplies inverse norms
    // What is subtracted from biases in place of a maximum: from those of rows and columns, and of columns with an output.
    float shift;
    float output_shift;
    uint32_t output_factor;
};

// Values of output_factor, a column's factor and its exponent: as it is; or its exponent folded into the bias, where 16-bit operands
// would overflow or the running maximum is to bound the product.
constexpr uint32_t OUTPUT_PLAIN = 1;
constexpr uint32_t OUTPUT_FOLDED = 2;

constexpr int ROW_SETS = 3;

// Elements of a row that a lane holds at a time (lanes.cuh).
constexpr uint32_t HELD = 8;

struct PrepareRowsParams {
    RowSet sets[ROW_SETS];  // queries, separate positives, a pool's candidates
    KeyTable keys;          // to be cleared; of capacity 0 where there is nothing to clear
    uint64_t* fault;        // fault.cuh
    uint64_t dim;
    uint64_t cosine;  // 0: 1 in place of the inverse norm
};

static_assert(sizeof(RowSet) == 10 * 8 + 4 * 4, "mirrored in params.rs");
static_assert(sizeof(PrepareRowsParams) == 3 * 96 + 40 + 3 * 8, "mirrored in params.rs");
