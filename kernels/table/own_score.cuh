// The score of a negative of a row's own: for the stream and for the stream back.
//
// Dots come from row_dot.cuh and norms from norm.cuh, both in an order that does not depend on who asks (lanes.cuh), so both passes see the
// same bits and leave out the same negatives.
#pragma once
#include "rows/key_table.cuh"
#include "rows/norm.cuh"
#include "rows/row_dot.cuh"
#include "rows/terms.cuh"
#include "table/own_params.h"

template <typename T>
__device__ __forceinline__ const T* table_row(const OwnNegatives& own, uint64_t row) {
    return static_cast<const T*>(own.table) + row * own.table_stride;
}

template <typename T>
__device__ __forceinline__ const T* query_row(const OwnNegatives& own, uint64_t query) {
    return static_cast<const T*>(own.queries) + query * own.query_stride;
}

template <typename T>
__device__ __forceinline__ bool aligned_table(const OwnNegatives& own) {
    return aligned<T>(own.table, own.table_stride);
}

template <typename T>
__device__ __forceinline__ bool aligned_queries(const OwnNegatives& own) {
    return aligned<T>(own.queries, own.query_stride);
}

// Which queries reject a row of the table.
__device__ __forceinline__ Hits hits_of_row(const OwnNegatives& own, uint32_t row) {
    if (own.keys.capacity == 0) return {1, 0, 0};
    return find_key(own.keys, own.table_ids ? own.table_ids[row] : row);
}

struct OwnScore {
    float sim;  // in units of log 2
    float z;
    bool is_negative;
};

// The score of the negative at `place` of the (queries, per_row) array, from the dot product of its query and its row. `unit` is the row's
// inverse norm, `query_scale` is own.scale times the query's.
__device__ __forceinline__ OwnScore own_score(const OwnNegatives& own, float dot, float query_scale, float unit, uint32_t query,
                                              uint64_t place) {
    const float bias = own.log_q ? -own.log_q[place] * LOG2_E : 0.0f, sim = similarity(dot, query_scale, unit);
    return {sim, score(dot, unit, query_scale, bias), !(own.bounds && sim > own.bounds[query])};
}
