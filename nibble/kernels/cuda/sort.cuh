// Sorting within a thread block.
#pragma once

#include "common.cuh"

// The values of threads 0 .. size - 1 in rising order, by all threads of the thread block; the others' are ~0. Exchanges
// within a warp need no barrier. `buffer`: as many values as threads.
DEVICE uint64 sort(uint64 value, int size, uint64* buffer) {
    const int thread = threadIdx.x;
    for (int run = 2; run < 2 * size; run *= 2) {
        for (int stride = run / 2; stride > 0; stride /= 2) {
            uint64 other;
            if (stride < WARP) {
                other = __shfl_xor_sync(FULL_WARP, value, stride);
            } else {
                __syncthreads();
                buffer[thread] = value;
                __syncthreads();
                other = buffer[thread ^ stride];
            }
            const bool takes_smaller = ((thread & stride) == 0) == ((thread & run) == 0);
            value = (other < value) == takes_smaller ? other : value;
        }
    }
    return value;
}
