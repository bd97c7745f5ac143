// RMS norm: out[t, h] = x[t, h] / sqrt(mean_h(x[t]^2) + eps) * weight[h].
//
// x float32 (T, H), weight float32 (H,) -> out fp16 (T, H). One thread block per row, its size a function of H alone, so
// that a row's sum is added in one order whatever T is: a thread adds its elements (8 neighbouring ones, then the next
// 8 a whole block further on), the lanes of a warp add theirs as a tree, then the warps'.
//
// Bytes moved: 6 H per row (4 read, 2 written), plus the weight. A decode step's rows are a few KB: what counts is the
// latency of one load, one reduction and one store, so the weight is fetched while the kernel before still runs.
//
// Measured in a graph of 64, NVIDIA H100 80GB HBM3, H = 4096: 1.4 us for 1 to 8 rows, 2.1 us for 64; 19.3 us for 2048
// (2.61 TB/s, 86 % of what the card reads).
#include "common.cuh"

constexpr int VECTOR = 8;
constexpr int MAX_WARPS = 32;

DEVICE float block_sum(float x) {
    __shared__ float sums[MAX_WARPS];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x);
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / WARP ? sums[lane] : 0.0f);  // every warp for itself: no second barrier
}

struct Vector {
    float4 low, high;

    float sum_of_squares() const {
        return ((low.x * low.x + low.y * low.y) + (low.z * low.z + low.w * low.w)) +
               ((high.x * high.x + high.y * high.y) + (high.z * high.z + high.w * high.w));
    }
};

DEVICE Vector load_vector(const float* from) {
    const float4* parts = reinterpret_cast<const float4*>(from);
    return {parts[0], parts[1]};
}

DEVICE void store_scaled(uint16* to, const Vector& x, const Vector& weight, float scale) {
    uint4 halves;
    halves.x = floats_to_half2(x.low.x * scale * weight.low.x, x.low.y * scale * weight.low.y);
    halves.y = floats_to_half2(x.low.z * scale * weight.low.z, x.low.w * scale * weight.low.w);
    halves.z = floats_to_half2(x.high.x * scale * weight.high.x, x.high.y * scale * weight.high.y);
    halves.w = floats_to_half2(x.high.z * scale * weight.high.z, x.high.w * scale * weight.high.w);
    *reinterpret_cast<uint4*>(to) = halves;
}

// H a multiple of 8. A thread keeps its first 8 elements in registers; only rows of more than 8192 read the rest twice.
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(const float* x, const float* __restrict__ weight, float eps, int hidden_size, uint16* out) {
    grid_launch_dependents();
    int first = threadIdx.x * VECTOR, stride = blockDim.x * VECTOR;
    Vector w = {}, v = {};
    if (first < hidden_size) w = load_vector(weight + first);
    grid_wait();

    const float* row = x + int64(blockIdx.x) * hidden_size;
    uint16* out_row = out + int64(blockIdx.x) * hidden_size;
    if (first < hidden_size) v = load_vector(row + first);
    float sum = v.sum_of_squares();
    for (int h = first + stride; h < hidden_size; h += stride) sum += load_vector(row + h).sum_of_squares();
    float scale = rsqrtf(block_sum(sum) / hidden_size + eps);

    if (first < hidden_size) store_scaled(out_row + first, v, w, scale);
    for (int h = first + stride; h < hidden_size; h += stride)
        store_scaled(out_row + h, load_vector(row + h), load_vector(weight + h), scale);
}

// Any H
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_any(const float* x, const float* __restrict__ weight, float eps, int hidden_size, uint16* out) {
    grid_launch_dependents();
    grid_wait();
    const float* row = x + int64(blockIdx.x) * hidden_size;
    uint16* out_row = out + int64(blockIdx.x) * hidden_size;
    float sum = 0.0f;
    for (int h = threadIdx.x; h < hidden_size; h += blockDim.x) sum += row[h] * row[h];
    float scale = rsqrtf(block_sum(sum) / hidden_size + eps);
    for (int h = threadIdx.x; h < hidden_size; h += blockDim.x) out_row[h] = float_to_half(row[h] * scale * weight[h]);
}
