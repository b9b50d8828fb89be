// Arguments of Hopper's streaming kernels, mirrored by `HopperParams` in src/backend/cuda/params.rs.
#pragma once
#include "shared/stream_params.h"

// What cuTensorMapEncodeTiled fills in; the kernels only pass its address on. Aligned as the header of CUDA 13 has it.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

struct HopperParams {
    // Chunks (layout.h) of stationary and of streamed rows.
    TensorMap x_map;
    TensorMap y_map;
    StreamParams stream;
    // STATISTICS: what candidates bring to the scores, as there is no output.
    const RowTerm* y_row_terms;
    uint32_t splits;
    uint32_t padding;
};

static_assert(sizeof(HopperParams) == 512, "mirrored in params.rs");
