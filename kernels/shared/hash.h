// The hash of ids, the same as src/hash.rs on the host, which says why and of whom it is. Plain arithmetic, which
// tests/index_arithmetic.cpp checks with no GPU.
#pragma once
#include <cstdint>

#ifndef __CUDACC__
#define __host__
#define __device__
#endif

__host__ __device__ constexpr uint64_t mix(uint64_t id) {
    id = (id ^ id >> 30) * 0xbf58476d1ce4e5b9ull;
    id = (id ^ id >> 27) * 0x94d049bb133111ebull;
    return id ^ id >> 31;
}

// The first slot to try of a table with `capacity` slots, a power of two.
__host__ __device__ constexpr uint32_t first_slot(uint64_t key, uint32_t capacity) {
    return static_cast<uint32_t>(mix(key)) & (capacity - 1);
}
