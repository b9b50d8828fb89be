// Hopper's matmul of a warpgroup: d (64 x N) += a (64 x 16) · b (16 x N), 16-bit operands, sums in f32.
//
// Of d, warp w of the group holds rows 16w to 16w + 15 as c_row and c_column (layout.h) say, element [n][2 half + e]. An operand
// in shared memory is made of chunks (layout.h): `K` first, as the rows of X and Y lie, 128 bytes of each; or `MN` first, where
// the rows of the chunk are the sum's index.
#pragma once
#include "hopper/ptx_sm90a.cuh"
#include "shared/layout.h"

namespace wgmma {

enum class Major { K = 0, MN = 1 };

// Sum over 16 elements: a step along the rows of a chunk, and along its rows' number.
constexpr uint32_t K_STEP = 32;
constexpr uint32_t MN_STEP = 16 * CHUNK_BYTES;

// A matrix that starts at `address` (swizzled in atoms of 8 rows, 1024 bytes, to which chunks are aligned); `chunk_bytes` is the
// distance of chunks, where the operand is MN first and wider than one.
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, uint32_t chunk_bytes = 16) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, ATOM = 8 * CHUNK_BYTES;
    return uint64_t(address % (1u << 18) / 16) | uint64_t(chunk_bytes / 16) << 16 | (ATOM / 16) << 32 | SWIZZLE_128;
}

// Operand A in registers: of the 16 rows from `row` on of the chunk at `chunk`, the 16 elements of step `step` along them.
__device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t chunk, uint32_t row, uint32_t step, uint32_t lane) {
    ptx::ldmatrix_x4(a, chunk + swizzle(row + a_row(lane), 2 * step + a_unit(lane)));
}

// Before the first matmul that reads registers written by other instructions.
__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `PENDING` groups run. Their accumulators are then to be passed through `settle`.
template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of accumulators over matmuls and waits.
template <int TILES>
__device__ __forceinline__ void settle(float (&d)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

template <typename Element, int N>
struct Instruction;

// Operands of an accumulator of 64 x 64.
#define D_64 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define OUT_64(d) "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), \
                  "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), \
                  "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
                  "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), \
                  "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
                  "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
                  "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
                  "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3])

// Operands of an accumulator of 64 x 128.
#define D_128 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
             "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define OUT_128(d) "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), \
                  "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), \
                  "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
                  "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), \
                  "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
                  "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
                  "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
                  "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), \
                  "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), \
                  "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), \
                  "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), \
                  "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), \
                  "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), \
                  "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), \
                  "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), \
                  "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])

// Operands of an accumulator of 64 x 256.
#define D_256 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
             "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
             "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
             "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
             "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
             "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
             "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"
#define OUT_256(d) "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), \
                  "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]), \
                  "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), \
                  "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), \
                  "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), \
                  "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]), \
                  "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), \
                  "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]), \
                  "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), \
                  "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]), \
                  "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), \
                  "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]), \
                  "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), \
                  "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]), \
                  "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), \
                  "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3]), \
                  "+f"(d[16][0]), "+f"(d[16][1]), "+f"(d[16][2]), "+f"(d[16][3]), \
                  "+f"(d[17][0]), "+f"(d[17][1]), "+f"(d[17][2]), "+f"(d[17][3]), \
                  "+f"(d[18][0]), "+f"(d[18][1]), "+f"(d[18][2]), "+f"(d[18][3]), \
                  "+f"(d[19][0]), "+f"(d[19][1]), "+f"(d[19][2]), "+f"(d[19][3]), \
                  "+f"(d[20][0]), "+f"(d[20][1]), "+f"(d[20][2]), "+f"(d[20][3]), \
                  "+f"(d[21][0]), "+f"(d[21][1]), "+f"(d[21][2]), "+f"(d[21][3]), \
                  "+f"(d[22][0]), "+f"(d[22][1]), "+f"(d[22][2]), "+f"(d[22][3]), \
                  "+f"(d[23][0]), "+f"(d[23][1]), "+f"(d[23][2]), "+f"(d[23][3]), \
                  "+f"(d[24][0]), "+f"(d[24][1]), "+f"(d[24][2]), "+f"(d[24][3]), \
                  "+f"(d[25][0]), "+f"(d[25][1]), "+f"(d[25][2]), "+f"(d[25][3]), \
                  "+f"(d[26][0]), "+f"(d[26][1]), "+f"(d[26][2]), "+f"(d[26][3]), \
                  "+f"(d[27][0]), "+f"(d[27][1]), "+f"(d[27][2]), "+f"(d[27][3]), \
                  "+f"(d[28][0]), "+f"(d[28][1]), "+f"(d[28][2]), "+f"(d[28][3]), \
                  "+f"(d[29][0]), "+f"(d[29][1]), "+f"(d[29][2]), "+f"(d[29][3]), \
                  "+f"(d[30][0]), "+f"(d[30][1]), "+f"(d[30][2]), "+f"(d[30][3]), \
                  "+f"(d[31][0]), "+f"(d[31][1]), "+f"(d[31][2]), "+f"(d[31][3])

// `accumulate` 0: d is overwritten. SS: both operands in shared memory; RS: `a` in registers, as a mma fragment.
#define INSTRUCTION(element, name, n, A, B, C, D, E, F)                                                                          \
    template <>                                                                                                              \
    struct Instruction<element, n> {                                                                                         \
        template <Major A_MAJOR, Major B_MAJOR>                                                                              \
        static __device__ __forceinline__ void ss(float (&d)[n / 8][4], uint64_t a, uint64_t b, int accumulate) {            \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " C ", 0;\n"                                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " " D_##n ", " A ", " B              \
                         ", p, 1, 1, " D ", " E ";}"                                                                         \
                         : OUT_##n(d)                                                                                        \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(int(A_MAJOR)), "n"(int(B_MAJOR)));                           \
        }                                                                                                                    \
        template <Major B_MAJOR>                                                                                             \
        static __device__ __forceinline__ void rs(float (&d)[n / 8][4], const uint32_t (&a)[4], uint64_t b, int accumulate) { \
            asm volatile("{.reg .pred p; setp.ne.b32 p, " F ", 0;\n"                                                         \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " " D_##n ", {" A ", " B ", " C      \
                         ", " D "}, " E ", p, 1, 1, %" RS_MAJOR_##n ";}"                                                      \
                         : OUT_##n(d)                                                                                        \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(int(B_MAJOR)));          \
        }                                                                                                                    \
    };

#define RS_MAJOR_64 "38"
#define RS_MAJOR_128 "70"
#define RS_MAJOR_256 "134"
INSTRUCTION(__half, "f16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
INSTRUCTION(__nv_bfloat16, "bf16", 64, "%32", "%33", "%34", "%35", "%36", "%37")
INSTRUCTION(__half, "f16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
INSTRUCTION(__nv_bfloat16, "bf16", 128, "%64", "%65", "%66", "%67", "%68", "%69")
INSTRUCTION(__half, "f16", 256, "%128", "%129", "%130", "%131", "%132", "%133")
INSTRUCTION(__nv_bfloat16, "bf16", 256, "%128", "%129", "%130", "%131", "%132", "%133")

}  // namespace wgmma
