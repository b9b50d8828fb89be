// The passes of matmul + softmax that are no matmuls, on materialised logits. NVRTC compiles them when the bench runs; so no
// headers, and bf16 is its bits.
//
//   unit = x / |x|      z = logit - log_q      lse = log sum exp(z)      loss = lse - z_positive
//   logit := softmax(z) - [positive]           d := (d - unit (unit . d)) / |x|
//
// Each pass reads and writes its array once: a row of logits, 16 bytes a thread at a time, by a block; a row of embeddings by a warp.
// The number of candidates is a multiple of 8. tests: the bench compares loss and gradients with the crate's before it times.

typedef unsigned short bf16;
typedef unsigned long long u64;

__device__ float widen(bf16 x) { return __uint_as_float((unsigned)x << 16); }

// To the nearest, ties to even. No NaN comes here.
__device__ bf16 narrow(float x) {
    unsigned bits = __float_as_uint(x);
    return (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

__device__ float warp_sum(float x) {
    for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// z of the 8 candidates of a group.
__device__ void scores(const bf16* row, const float* log_q, u64 group, float (&z)[8]) {
    uint4 packed = ((const uint4*)row)[group];
    unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
    for (int i = 0; i < 8; ++i) z[i] = widen((bf16)(words[i / 2] >> (16 * (i % 2)))) - log_q[8 * group + i];
}

extern "C" __global__ void normalize(const bf16* x, bf16* unit, float* inverse_norm, u64 rows, u64 dim) {
    u64 row = (blockIdx.x * (u64)blockDim.x + threadIdx.x) / 32;
    unsigned lane = threadIdx.x % 32;
    if (row >= rows) return;
    float squares = 0;
    for (u64 k = lane; k < dim; k += 32) {
        float value = widen(x[row * dim + k]);
        squares += value * value;
    }
    float inverse = rsqrtf(warp_sum(squares));
    for (u64 k = lane; k < dim; k += 32) unit[row * dim + k] = narrow(widen(x[row * dim + k]) * inverse);
    if (lane == 0) inverse_norm[row] = inverse;
}

extern "C" __global__ void row_loss(const bf16* logits, const float* log_q, const unsigned* positives, float* lse, float* loss,
                                    u64 candidates) {
    const bf16* row = logits + blockIdx.x * candidates;
    float max = __int_as_float(0xff800000), sum = 0;
    for (u64 group = threadIdx.x; group < candidates / 8; group += blockDim.x) {
        float z[8];
        scores(row, log_q, group, z);
        float larger = max;
        for (int i = 0; i < 8; ++i) larger = fmaxf(larger, z[i]);
        sum *= __expf(max - larger);
        for (int i = 0; i < 8; ++i) sum += __expf(z[i] - larger);
        max = larger;
    }
    __shared__ float maxima[32], sums[32];
    float of_warp = max;
    for (int offset = 16; offset; offset /= 2) of_warp = fmaxf(of_warp, __shfl_xor_sync(~0u, of_warp, offset));
    // A thread that had no group has a maximum of -inf and a sum of 0; a warp of such threads, -inf - -inf.
    float part = warp_sum(sum == 0 ? 0 : sum * __expf(max - of_warp));
    if (threadIdx.x % 32 == 0) {
        maxima[threadIdx.x / 32] = of_warp;
        sums[threadIdx.x / 32] = part;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int warps = blockDim.x / 32;
        float largest = maxima[0], total = 0;
        for (int w = 1; w < warps; ++w) largest = fmaxf(largest, maxima[w]);
        for (int w = 0; w < warps; ++w) total += sums[w] == 0 ? 0 : sums[w] * expf(maxima[w] - largest);
        float log_sum = largest + logf(total);
        unsigned positive = positives[blockIdx.x];
        lse[blockIdx.x] = log_sum;
        loss[blockIdx.x] = log_sum - (widen(row[positive]) - log_q[positive]);
    }
}

extern "C" __global__ void softmax_minus_positive(bf16* logits, const float* log_q, const unsigned* positives, const float* lse,
                                                  u64 candidates) {
    bf16* row = logits + blockIdx.x * candidates;
    float log_sum = lse[blockIdx.x];
    u64 positive = positives[blockIdx.x];
    for (u64 group = threadIdx.x; group < candidates / 8; group += blockDim.x) {
        float z[8];
        scores(row, log_q, group, z);
        unsigned words[4] = {};
        for (int i = 0; i < 8; ++i) {
            float coefficient = __expf(z[i] - log_sum) - (8 * group + i == positive ? 1.0f : 0.0f);
            words[i / 2] |= (unsigned)narrow(coefficient) << (16 * (i % 2));
        }
        ((uint4*)row)[group] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

extern "C" __global__ void chain_rule(float* d, const bf16* unit, const float* inverse_norm, u64 rows, u64 dim) {
    u64 row = (blockIdx.x * (u64)blockDim.x + threadIdx.x) / 32;
    unsigned lane = threadIdx.x % 32;
    if (row >= rows) return;
    float along = 0;
    for (u64 k = lane; k < dim; k += 32) along += d[row * dim + k] * widen(unit[row * dim + k]);
    along = warp_sum(along);
    float inverse = inverse_norm[row];
    for (u64 k = lane; k < dim; k += 32) d[row * dim + k] = (d[row * dim + k] - along * widen(unit[row * dim + k])) * inverse;
}

extern "C" __global__ void mean(const float* loss, double* total, u64 rows) {
    __shared__ double sums[256];
    double sum = 0;
    for (u64 i = threadIdx.x; i < rows; i += 256) sum += loss[i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *total = sums[0] / rows;
}
