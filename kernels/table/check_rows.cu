// Rows of a table in the caller's device memory, which only the device sees: a copy in bounds, for all that follows.
//
//   check_rows   a row past the table's end is a fault; in its place comes row 0, or no negative where there may be none
//
// Shapes: (count). One thread for each.
// Tests: tests/gpu/tables.rs.
#include "shared/fault.cuh"
#include "table/check_rows_params.h"
#include "table/own_params.h"

extern "C" __global__ void check_rows(const __grid_constant__ CheckRowsParams p) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const uint32_t row = p.rows[i];
    const bool is_in_bounds = row < p.limit || (p.allows_none && row == NO_NEGATIVE);
    if (!is_in_bounds) report_fault(p.fault, p.kind, i);
    p.checked[i] = is_in_bounds ? row : p.allows_none ? NO_NEGATIVE : 0;
}
