// Arguments of sort_uses.cu, mirrored in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

// A use of a row: the row in the upper 31 bits, and below it which use it is, counted over all lists: candidates of pools by reference,
// then negatives of rows' own, then pairs.
constexpr uint32_t USE_BITS = 33;
// The row of uses of no row, which comes behind all rows: a table has at most 2^31 − 1.
constexpr uint32_t NO_ROW_USED = 0x7fffffff;
// Entries that a block sorts.
constexpr uint32_t SORT_TILE = 4096;

struct ListUsesParams {
    const uint32_t* rows;  // (count): the row of each use; null where use i is of row i
    uint64_t* entries;     // (count)
    uint64_t count;
    uint64_t first;  // which use the first is
    uint64_t limit;  // rows from here on are none
};

// One of 256 digits after the other, the lowest first.
struct SortUsesParams {
    const uint64_t* from;  // (count)
    uint64_t* to;          // (count)
    uint32_t* places;      // (blocks, 256): how often each block has each digit, then where its first entry goes
    uint64_t count;
    uint32_t blocks;
    uint32_t shift;  // of the digit in an entry
};

// Of the first use of each row: which of the rows with a use it is. Of every_row, which has no uses, rows, num_rows and count alone.
struct PlaceRowsParams {
    const uint64_t* entries;  // (count), sorted
    uint32_t* counts;         // (blocks): first uses of each block of SORT_TILE
    uint32_t* places;         // (count), of first uses
    uint32_t* rows;           // (at most count): the rows, ascending
    uint64_t* num_rows;       // (1)
    uint64_t count;
    uint64_t blocks;
};

static_assert(sizeof(PlaceRowsParams) == 7 * 8, "mirrored in params.rs");
static_assert(sizeof(ListUsesParams) == 5 * 8, "mirrored in params.rs");
static_assert(sizeof(SortUsesParams) == 4 * 8 + 2 * 4, "mirrored in params.rs");
