// RMS norm of each head of q and k, in place: x[i] / sqrt(mean(x^2) + eps) * weight[i], of the q heads of qkv fp16
// (T, (heads + 2 kv heads) D) with one weight float32 (D,), of the k heads with another.
//
// One thread block per token, one warp per head and pass: a warp holds a head's row in registers. Sums and products in
// fp32, rounded once. Bytes moved: 4 D per head. Not measured.
#include "attention.cuh"

extern "C" __global__ void __launch_bounds__(256)
    norm_heads(uint16* qkv, const float* __restrict__ q_weight, const float* __restrict__ k_weight, float eps, int row_size,
               int num_heads, int num_normed_heads) {
    grid_launch_dependents();
    grid_wait();
    uint16* token = qkv + int64(blockIdx.x) * row_size;
    for (int head = threadIdx.x / WARP; head < num_normed_heads; head += blockDim.x / WARP) {
        const float* weight = head < num_heads ? q_weight : k_weight;
        HeadRow row;
        row.load(token + head * D);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            float low0 = low_half(row.low[j]), low1 = high_half(row.low[j]);
            float high0 = low_half(row.high[j]), high1 = high_half(row.high[j]);
            sum += (low0 * low0 + low1 * low1) + (high0 * high0 + high1 * high1);
        }
        float scale = rsqrtf(warp_sum(sum) / D + eps);
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!HeadRow::has(j)) continue;
            float2 low = *reinterpret_cast<const float2*>(weight + 2 * HeadRow::unit(j));
            float2 high = *reinterpret_cast<const float2*>(weight + HALF + 2 * HeadRow::unit(j));
            row.low[j] = floats_to_half2(low_half(row.low[j]) * scale * low.x, high_half(row.low[j]) * scale * low.y);
            row.high[j] = floats_to_half2(low_half(row.high[j]) * scale * high.x, high_half(row.high[j]) * scale * high.y);
        }
        row.store(token + head * D);
    }
}
