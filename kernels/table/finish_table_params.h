// Arguments of finish_table.cu, mirrored in src/backend/cuda/params.rs.
#pragma once
#include "table/own_params.h"
#include "table/sort_params.h"

// Uses among which a warp looks for the first ones of rows.
constexpr uint32_t USES_OF_WARP = 16;
// Uses of one row that are added up apart from the others. A segment starts at a multiple of SEGMENT in the list.
constexpr uint32_t SEGMENT = 64;

// Who names which row, sorted by row (sort_params.h).
struct Uses {
    const uint64_t* entries;
    uint64_t count;   // rows with a gradient; not read with by_use
    uint64_t first_own;   // where the uses as negatives of rows' own begin: before them are those as candidates, places in `parts`
    uint64_t first_pair;  // and those as positives
};

struct FinishTableParams {
    OwnNegatives own;  // queries also where there are none
    Uses uses;
    const uint32_t* rows;  // (count) rows with a gradient, ascending; null where that is every row, or with by_use
    // A pool whose candidates are the rows themselves: its partial gradients, (splits, count) and (splits, count, dim).
    const float* max;
    const float* output;
    const float* parts;          // (candidates of pools by reference, dim): their gradients by unit vectors, over gamma
    const ColumnTerm* columns;   // (queries), of the stream back
    const uint32_t* pair_rows;   // (pairs): the query of each; null where pair i is of query i
    const double* d_positive;    // (pairs)
    float* coefficients;         // (own uses), of rows of more columns than a warp holds; else null
    float* segments;             // (segments, dim): sums of SEGMENT uses that are all of one row (finish_table.cu)
    const uint32_t* places;      // (uses): with by_use, where the row of a first use goes; null where it goes to its place in the table
    const void* x;               // the matrix of the rows
    float* result;               // (count, dim), or with by_use (rows, dim); may be `output` where there is one split
    uint64_t x_stride;           // elements
    uint64_t count;   // rows with a gradient; not read with by_use
    uint64_t start;   // what the lists have for row 0: 0, or the index over all pools of a pool's first candidate
    uint32_t splits;  // 0 without such a pool
    uint32_t by_use;  // 1: rows are those of the uses
    float gamma;      // 1 / temperature
    uint32_t x_rows;  // of the matrix at x
};

static_assert(sizeof(FinishTableParams) == 128 + 4 * 8 + 15 * 8 + 4 * 4, "mirrored in params.rs");
