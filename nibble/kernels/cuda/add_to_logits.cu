// Sparse additions: logits[rows[i], ids[i]] += values[i].
//
// logits float32 (S, V), rows and ids int32 (n,), values float32 (n,). One thread per addition, atomically, because a
// pair may occur more than once; in which order its additions happen is then not defined (a sum of three or more terms
// may differ in its last bit). Measured in a graph of 64, NVIDIA H100 80GB HBM3: 0.8 us for 64 additions.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256)
    add_to_logits(float* logits, const int* rows, const int* ids, const float* values, int count, int vocab_size) {
    grid_launch_dependents();
    grid_wait();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) atomicAdd(logits + int64(rows[i]) * vocab_size + ids[i], values[i]);
}
