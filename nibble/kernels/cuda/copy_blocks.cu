// KV blocks of all layers to page-locked memory of the host, or back: swapped[pairs[i][1]] <-> kv_cache[:, pairs[i][0]].
//
// kv_cache (num_layers, num_blocks, num_pieces), swapped (n, num_layers, num_pieces) in pieces of 16 bytes; pairs (m, 2)
// in the host's memory too. Thread block (x: run of pieces, y: layer, z: pair); a thread has all its pieces on their way
// before it stores the first. One launch whatever the number of blocks: cudaMemcpy2DAsync would be one for each, and its
// pitch, a layer's cache, may be more than the 2 GiB it is made for.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int PIECES = 8;  // of a thread

extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks(
    uint4* kv_cache, uint4* swapped, const int2* pairs, int num_blocks, int num_pieces, int to_host) {
    grid_launch_dependents();
    grid_wait();
    const int2 pair = pairs[blockIdx.z];
    const int64 layer = blockIdx.y, num_layers = gridDim.y;
    uint4* block = kv_cache + (layer * num_blocks + pair.x) * num_pieces;
    uint4* host_block = swapped + (pair.y * num_layers + layer) * num_pieces;
    const uint4* from = to_host ? block : host_block;
    uint4* to = to_host ? host_block : block;
    const int first = blockIdx.x * PIECES * THREADS + threadIdx.x;
    uint4 pieces[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (first + i * THREADS < num_pieces) pieces[i] = from[first + i * THREADS];
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        if (first + i * THREADS < num_pieces) to[first + i * THREADS] = pieces[i];
}
