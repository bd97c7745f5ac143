// y[t, n] += bias[n] in place, for what a cuBLAS product leaves. y fp16 or float32 (T, N), bias float32 (N).
// A thread owns elements i, i + grid size ..; bytes: y read and written once.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    add_bias_half(uint16* y, const float* __restrict__ bias, int64 size, int num_columns) {
    grid_launch_dependents();
    grid_wait();
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += int64(gridDim.x) * blockDim.x)
        y[i] = float_to_half(half_to_float(y[i]) + bias[i % num_columns]);
}

extern "C" __global__ void __launch_bounds__(256)
    add_bias_float(float* y, const float* __restrict__ bias, int64 size, int num_columns) {
    grid_launch_dependents();
    grid_wait();
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += int64(gridDim.x) * blockDim.x)
        y[i] += bias[i % num_columns];
}
