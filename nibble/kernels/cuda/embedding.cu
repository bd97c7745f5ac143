// Embedding: out[t, h] = scales[ids[t], h / group_size] * values[ids[t], h].
//
// embedding_float16: out[t, h] = values[ids[t], h] of values fp16 (V, H).
//
// ids int32 (T,), values int8 (V, H), scales fp16 (V, H / group_size) -> out float32 (T, H), the residual stream.
// group_size is a multiple of 16, so that the 16 elements of a thread share a scale. One thread block per token (x) and
// run of 16 * blockDim.x columns (y). Bytes moved: 5 H per token and its scales. The product of an int8 and an fp16 is
// exact in float32.
//
// Measured in a graph of 64, NVIDIA H100 80GB HBM3, H = 4096: 1.7 us for 1 token, 2.6 us for 64, 27.9 us for 2048.
#include "common.cuh"

constexpr int VECTOR = 16;

DEVICE float4 scaled_bytes(uint32 bytes, float scale) {
    return make_float4(int8(bytes) * scale, int8(bytes >> 8) * scale, int8(bytes >> 16) * scale,
                       int8(bytes >> 24) * scale);
}

extern "C" __global__ void __launch_bounds__(256)
    embedding(const int* ids, const int8* __restrict__ values, const uint16* __restrict__ scales, int hidden_size,
              int group_size, float* out) {
    grid_launch_dependents();
    grid_wait();
    int h = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    if (h >= hidden_size) return;
    int64 row = ids[blockIdx.x];
    uint4 bytes = *reinterpret_cast<const uint4*>(values + row * hidden_size + h);
    float scale = half_to_float(scales[row * (hidden_size / group_size) + h / group_size]);
    float4* to = reinterpret_cast<float4*>(out + int64(blockIdx.x) * hidden_size + h);
    to[0] = scaled_bytes(bytes.x, scale);
    to[1] = scaled_bytes(bytes.y, scale);
    to[2] = scaled_bytes(bytes.z, scale);
    to[3] = scaled_bytes(bytes.w, scale);
}

extern "C" __global__ void __launch_bounds__(256)
    embedding_float16(const int* ids, const uint16* __restrict__ values, int hidden_size, float* out) {
    grid_launch_dependents();
    grid_wait();
    int h = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    if (h >= hidden_size) return;
    const uint4* from = reinterpret_cast<const uint4*>(values + int64(ids[blockIdx.x]) * hidden_size + h);
    float4* to = reinterpret_cast<float4*>(out + int64(blockIdx.x) * hidden_size + h);
#pragma unroll
    for (int i = 0; i < VECTOR / 8; i++) {
        uint4 halves = from[i];
        to[2 * i] = make_float4(low_half(halves.x), high_half(halves.x), low_half(halves.y), high_half(halves.y));
        to[2 * i + 1] = make_float4(low_half(halves.z), high_half(halves.z), low_half(halves.w), high_half(halves.w));
    }
}
