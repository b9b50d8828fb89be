// Copies chunks of rows (128 bytes of each) from global to shared memory, zeros where there is nothing.
#pragma once
#include "portable/fragments.cuh"

// Rows in global memory: those of a matrix, rows of it by their indices, or addresses of single rows.
template <typename Element>
struct Rows {
    const char* base;
    const void* const* addresses;
    const uint32_t* indices;
    uint64_t stride;     // in bytes
    uint32_t count;
    uint32_t bytes;      // of a row
    uint32_t alignment;  // 16, 8, 4 or 2 bytes: it divides the rows' addresses and `bytes`

    // Where a row is in the matrix.
    __device__ __forceinline__ uint32_t place(uint32_t index) const { return indices && index < count ? indices[index] : index; }

    __device__ __forceinline__ const char* at_place(uint32_t place) const {
        return addresses ? static_cast<const char*>(addresses[place]) : base + place * stride;
    }

    // One 16-byte unit of row `index`, from byte `column` on, to shared memory at `to`.
    __device__ __forceinline__ void copy_unit(uint32_t to, uint32_t index, uint32_t column) const {
        const uint32_t present = index < count && column < bytes ? min(bytes - column, UNIT_BYTES) : 0;
        const char* from = present ? at_place(place(index)) + column : base;
        if (alignment == UNIT_BYTES) {
            ptx::cp_async_16(to, from, present);
        } else if (alignment > 2) {
#pragma unroll 1
            for (uint32_t byte = 0; byte < UNIT_BYTES; byte += alignment) {
                const char* piece = byte < present ? from + byte : from;
                if (alignment == 8) ptx::cp_async_few<8>(to + byte, piece, byte < present);
                else ptx::cp_async_few<4>(to + byte, piece, byte < present);
            }
        } else {
            copy_elements(to, from, present);
        }
    }

    // Rows of odd widths of 16-bit elements start anywhere: element by element, and no copy that goes on by itself.
    __device__ __forceinline__ void copy_elements(uint32_t to, const char* from, uint32_t present) const {
        alignas(UNIT_BYTES) uint16_t unit[UNIT_BYTES / 2];
#pragma unroll
        for (uint32_t i = 0; i < UNIT_BYTES / 2; ++i) unit[i] = 2 * i < present ? reinterpret_cast<const uint16_t*>(from)[i] : 0;
        const uint4 bits = *reinterpret_cast<const uint4*>(unit);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                     : "memory");
    }

    // Chunk `chunk` of `ROWS` rows from `first` on, by all threads of the block.
    template <int ROWS, int THREADS>
    __device__ __forceinline__ void copy_chunk(uint32_t to, uint32_t first, uint32_t chunk) const {
        static_assert(ROWS * UNITS % THREADS == 0, "each thread copies as many units");
#pragma unroll 2
        for (uint32_t place = threadIdx.x; place < ROWS * UNITS; place += THREADS) {
            const uint32_t row = copy_row(place), unit = ::copy_unit(place);
            copy_unit(to + swizzle(row, unit), first + row, chunk * CHUNK_BYTES + unit * UNIT_BYTES);
        }
    }
};

// Chunks of the same ROWS rows, one after the other. A thread copies one unit of each of its rows. BY_INDEX: rows may be named by their
// indices, and the thread keeps those of its rows.
template <typename Element, int ROWS, int THREADS, bool BY_INDEX>
struct Copier {
    static constexpr int APART = THREADS / UNITS;  // between a thread's rows
    static constexpr int COUNT = ROWS / APART;
    static_assert(APART % UNITS == 0, "a thread's units lie at one place of their rows");

    Rows<Element> rows;
    uint32_t first;
    uint32_t places[BY_INDEX ? COUNT : 1];

    // Rows from `first` on come next. Their indices are on their way until the first copy.
    __device__ __forceinline__ void seek(uint32_t first_) {
        first = first_;
#pragma unroll
        for (int i = 0; i < (BY_INDEX ? COUNT : 0); ++i) places[i] = rows.place(index(i));
    }

    // Of the thread's i-th row.
    __device__ __forceinline__ uint32_t index(int i) const { return first + copy_row(threadIdx.x) + i * APART; }

    // Chunks that all rows have whole, at addresses that whole units may be copied from.
    __device__ __forceinline__ uint32_t whole() const {
        return rows.alignment == UNIT_BYTES && first + ROWS <= rows.count ? rows.bytes / CHUNK_BYTES : 0;
    }

    // `whole`: what that function returns.
    __device__ __forceinline__ void copy(uint32_t to, uint32_t chunk, uint32_t whole) const {
        if (chunk >= whole) {
            rows.template copy_chunk<ROWS, THREADS>(to, first, chunk);
            return;
        }
        to += swizzle(copy_row(threadIdx.x), copy_unit(threadIdx.x));
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const char* row = rows.at_place(BY_INDEX ? places[BY_INDEX ? i : 0] : index(i));
            const char* from = row + chunk * CHUNK_BYTES + copy_unit(threadIdx.x) * UNIT_BYTES;
            ptx::cp_async_16(to + i * APART * CHUNK_BYTES, from, true);
        }
    }
};
