// w[n, k] = scales[n, k / group] * values[n, k] as fp16, rounded once: what a matrix product of many tokens reads.
//
// Shapes: values int8 (N, K) row-major, scales fp16 (N, K / group), out fp16 (rows, K): rows first_row .. of w.
// Bytes: 3 per element. A thread owns 16 neighbouring columns of one row (one load, two stores of 16 bytes; a group is a
// multiple of 16 columns, so it needs one scale).
#include "common.cuh"

constexpr int COLUMNS = 16;

struct __align__(16) Words {
    uint32 w[4];
};

extern "C" __global__ void __launch_bounds__(256)
    int8_dequantize(const int8* __restrict__ values, const uint16* __restrict__ scales, uint16* out,
                    int first_row, int num_rows, int num_columns, int group_size) {
    grid_launch_dependents();
    grid_wait();  // the memory of `out` may still be read by an earlier kernel
    const int runs = num_columns / COLUMNS;
    const int64 index = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= int64(num_rows) * runs) return;
    const int column = int(index % runs) * COLUMNS;
    const int64 row = first_row + index / runs;
    const uint16 half = scales[row * (num_columns / group_size) + column / group_size];
    const uint32 scale = half | uint32(half) << 16;
    const Words bytes = *reinterpret_cast<const Words*>(values + row * num_columns + column);
    Words result[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32 low, high;
        int8_to_half(bytes.w[i], low, high);
        result[i / 2].w[i % 2 * 2] = half2_fma(low, scale, 0);
        result[i / 2].w[i % 2 * 2 + 1] = half2_fma(high, scale, 0);
    }
    Words* target = reinterpret_cast<Words*>(out + index * COLUMNS);
    target[0] = result[0];
    target[1] = result[1];
}
