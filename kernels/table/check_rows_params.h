// Arguments of check_rows.cu, mirrored by `CheckRowsParams` in src/backend/cuda/params.rs.
#pragma once
#include <cstdint>

struct CheckRowsParams {
    const uint32_t* rows;  // (count): rows of a table, as the caller gave them
    uint32_t* checked;     // (count): the same, in bounds
    uint64_t* fault;       // fault.cuh
    uint64_t count;
    uint64_t limit;  // rows of the table
    uint32_t kind;   // of the fault
    uint32_t allows_none;
};

static_assert(sizeof(CheckRowsParams) == 5 * 8 + 2 * 4, "mirrored in params.rs");
