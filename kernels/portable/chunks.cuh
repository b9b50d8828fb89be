// Copies chunks of rows (128 bytes of each) from global to shared memory, zeros where there is nothing.
#pragma once
#include "portable/fragments.cuh"

// Rows in global memory: those of a matrix, rows of it by their indices, or addresses of single rows.
template <typename Element>
struct Rows {
    const Element* base;
    const void* const* addresses;
    const uint32_t* indices;
    uint64_t stride;
    uint32_t count;
    uint32_t dim;
    bool aligned;

    __device__ __forceinline__ const Element* row(uint32_t index) const {
        if (addresses) return static_cast<const Element*>(addresses[index]);
        return base + (indices ? indices[index] : index) * stride;
    }

    // One 16-byte unit of row `index`, from element `column` on, to shared memory at `to`.
    __device__ __forceinline__ void copy_unit(uint32_t to, uint32_t index, uint32_t column) const {
        constexpr uint32_t ELEMENTS = UNIT_BYTES / sizeof(Element);
        const uint32_t present = index < count && column < dim ? min(dim - column, ELEMENTS) : 0;
        const Element* from = present ? row(index) + column : base;
        if (aligned) {
            ptx::cp_async_16(to, from, present * sizeof(Element));
            return;
        }
        // Rows of odd widths start anywhere: element by element.
        alignas(UNIT_BYTES) Element unit[ELEMENTS];
#pragma unroll
        for (uint32_t i = 0; i < ELEMENTS; ++i) unit[i] = i < present ? from[i] : Element(0.0f);
        const uint4 bits = *reinterpret_cast<const uint4*>(unit);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                     : "memory");
    }

    // Chunk `chunk` of `ROWS` rows from `first` on, by all threads of the block.
    template <int ROWS, int THREADS>
    __device__ __forceinline__ void copy_chunk(uint32_t to, uint32_t first, uint32_t chunk) const {
        static_assert(ROWS * UNITS % THREADS == 0, "each thread copies as many units");
        constexpr uint32_t ELEMENTS_PER_CHUNK = CHUNK_BYTES / sizeof(Element);
#pragma unroll
        for (int i = 0; i < ROWS * UNITS / THREADS; ++i) {
            const uint32_t place = threadIdx.x + i * THREADS;
            const uint32_t row = copy_row(place), unit = ::copy_unit(place);
            const uint32_t column = chunk * ELEMENTS_PER_CHUNK + unit * (UNIT_BYTES / sizeof(Element));
            copy_unit(to + swizzle(row, unit), first + row, column);
        }
    }
};
