// Rotary embedding, in place: (x[i], x[i + D/2]) -> (x[i] cos - x[i + D/2] sin, x[i + D/2] cos + x[i] sin), i < D/2, of
// the q and k heads of qkv fp16 (T, (heads + 2 kv heads) D); table float32 (positions, 2, D / 2).
//
// One thread block per token, one warp per head and pass; products and sums in fp32, rounded once.
// Bytes moved: 4 D per head. The serving path has no need of it: there the rotation is part of append_kv.cu and
// attention_decode.cu.
#include "attention.cuh"

extern "C" __global__ void __launch_bounds__(256)
    rope(uint16* qkv, const int* positions, const float* __restrict__ table, int row_size, int num_rotated_heads) {
    grid_launch_dependents();
    grid_wait();
    int token = blockIdx.x;
    const float* cos_sin = table + int64(positions[token]) * D;
    for (int head = threadIdx.x / WARP; head < num_rotated_heads; head += blockDim.x / WARP) {
        uint16* at = qkv + int64(token) * row_size + head * D;
        HeadRow row;
        row.load(at);
        row.rotate_all(cos_sin);
        row.store(at);
    }
}
