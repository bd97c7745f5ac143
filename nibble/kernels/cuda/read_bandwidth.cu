// Reads memory and does nothing with it: the roof of decode.
//
// fill_random:    data[i] = hash(i). Memory of zeros would cost less power to read than weights do.
// read_bandwidth: each thread reads UNROLL x 16 bytes at a time, a block-sized stride apart, past L1, and folds them into
// one word; a store that (almost) never happens keeps the compiler from dropping the loads. Grid-stride over all data.
//
// Measured, NVIDIA H100 80GB HBM3: 3.01 to 3.02 TB/s over 1 GiB.
#include "common.cuh"

constexpr int UNROLL = 8;

DEVICE uint4 load_streaming(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

// num_vectors: of 16 bytes
extern "C" __global__ void __launch_bounds__(512) fill_random(uint4* data, int64 num_vectors) {
    grid_wait();
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < num_vectors; i += int64(gridDim.x) * blockDim.x) {
        uint32 x = uint32(i) * 0x9E3779B9u;
        x = (x ^ x >> 15) * 0x85EBCA6Bu;
        data[i] = make_uint4(x, x * 0xC2B2AE35u, x ^ x >> 13, x * 0x27D4EB2Fu);
    }
}

// num_vectors: a multiple of UNROLL * blockDim.x
extern "C" __global__ void __launch_bounds__(512) read_bandwidth(const uint4* data, int64 num_vectors, uint32* sink) {
    grid_wait();
    uint32 folded = 0;
    int64 run = int64(UNROLL) * blockDim.x;
    for (int64 start = blockIdx.x * run; start < num_vectors; start += gridDim.x * run) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) v[u] = load_streaming(data + start + u * blockDim.x + threadIdx.x);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) folded ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    if (folded == 0x12345678u) *sink = folded;
}
