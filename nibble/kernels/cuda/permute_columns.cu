// Columns of a matrix in another order: out[t, j] = x[t, order[j]], fp16 (T, K), order int32 (K,).
//
// Thread block (x: row, y: run of blockDim.x columns), one thread per element. Bytes moved: 4 K per row, and the order.
// Not measured.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    permute_columns(const uint16* x, const int* __restrict__ order, int num_columns, uint16* out) {
    grid_launch_dependents();
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    int from = column < num_columns ? order[column] : 0;
    grid_wait();
    int64 row = int64(blockIdx.x) * num_columns;
    if (column < num_columns) out[row + column] = x[row + from];
}
