// Resolves ids ahead of the stream: which rows reject which candidates.
//
//   find_hits   each candidate's key is looked up in the table of rejected keys (key_table.cuh); the range of the rows that reject it
//               and the slot of its key are kept for the stream (`Hits`)
//
// Shapes: (candidates). One thread for each; rows.cu clears the table, positives.cu fills it.
// Tests: tests/gpu.rs, every mask against the reference.
#include "rows/key_table.cuh"
#include "rows/resolve_params.h"

extern "C" __global__ void find_hits(const __grid_constant__ FindHitsParams p) {
    const uint64_t candidate = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (candidate >= p.candidates) return;
    const uint64_t at = p.indices ? p.indices[candidate] : candidate;
    p.hits[candidate] = find_key(p.keys, p.candidate_ids ? p.candidate_ids[at] : p.start + at);
}
