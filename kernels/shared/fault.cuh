// Input that only the device sees, found to break a rule. The step goes on, in bounds; the host turns the record into an error
// when it reads results.
#pragma once
#include <cstdint>

// src/backend/cuda/fault.rs has the same numbers.
constexpr uint64_t FAULT_POSITIVES = 1;
constexpr uint64_t FAULT_EXCLUDE_OFFSETS = 2;
constexpr uint64_t FAULT_LOG_Q = 3;
constexpr uint64_t FAULT_POSITIVE_LOG_Q = 4;
constexpr uint64_t FAULT_ROW_WEIGHT = 5;
constexpr uint64_t FAULT_POSITIVE_OFFSETS = 6;
constexpr uint64_t FAULT_POSITIVE_WEIGHT = 7;
constexpr uint64_t FAULT_CANDIDATE_ROWS = 8;
constexpr uint64_t FAULT_ROW_NEGATIVES = 9;
constexpr uint64_t FAULT_POSITIVE_ROWS = 10;
constexpr uint64_t FAULT_ROW_NEGATIVES_LOG_Q = 11;

// Keeps the least (kind, index): the same record whatever the order of threads. ~0 is none.
__device__ __forceinline__ void report_fault(uint64_t* fault, uint64_t kind, uint64_t index) {
    atomicMin(reinterpret_cast<unsigned long long*>(fault), static_cast<unsigned long long>(kind << 56 | index));
}
