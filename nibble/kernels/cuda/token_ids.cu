// Token ids that never leave the device.
//
// gather_ids:  out[t] = ids[t] where ids[t] >= 0, else max(latest[-1 - ids[t]], 0)
// scatter_ids: latest[indices[s]] = ids[s] where indices[s] >= 0
// All int32; one thread per id. `latest` is written by the step before, so nothing is read before grid_wait().
// Measured in a graph of 64, NVIDIA H100 80GB HBM3: 0.8 to 0.9 us for 1 to 256 ids, little more than an empty kernel.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) gather_ids(const int* ids, const int* latest, int num_ids, int* out) {
    grid_launch_dependents();
    grid_wait();
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t >= num_ids) return;
    int id = ids[t];
    out[t] = id >= 0 ? id : max(latest[-1 - id], 0);
}

extern "C" __global__ void __launch_bounds__(256)
    scatter_ids(const int* ids, const int* indices, int num_ids, int* latest) {
    grid_launch_dependents();
    grid_wait();
    int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s < num_ids && indices[s] >= 0) latest[indices[s]] = ids[s];
}
