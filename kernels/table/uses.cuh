// The sorted list of who names which row (sort_params.h).
#pragma once
#include "table/sort_params.h"

__device__ __forceinline__ uint32_t row_of_use(const uint64_t* entries, uint64_t at) {
    return static_cast<uint32_t>(entries[at] >> USE_BITS);
}

// Whether the use at `at` is the first one of its row.
__device__ __forceinline__ bool is_first_use(const uint64_t* entries, uint64_t count, uint64_t at) {
    if (at >= count) return false;
    const uint32_t row = row_of_use(entries, at);
    return row != NO_ROW_USED && (at == 0 || row_of_use(entries, at - 1) != row);
}
