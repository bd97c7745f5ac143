// Logits in their order, as integers, and what warps do with such integers.
#pragma once

#include "common.cuh"

constexpr float LARGEST_FLOAT = 3.402823466e38f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// Unsigned integers in the order of floats; -0 and 0 are one
DEVICE uint32 order_of(float x) {
    const uint32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float float_of(uint32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

// Candidates in their order, as integers in rising order: falling logit, then rising id
DEVICE uint64 candidate(float logit, uint32 id) { return uint64(~order_of(logit)) << 32 | id; }
DEVICE float logit_of(uint64 candidate) { return float_of(~uint32(candidate >> 32)); }

DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// In pieces of 22 bits, whose sums fit the warp's own reduction: a tenth of the latency of shuffles
DEVICE uint64 warp_sum_64(uint64 x) {
    const uint64 low = __reduce_add_sync(FULL_WARP, uint32(x) & 0x3fffff);
    const uint64 middle = __reduce_add_sync(FULL_WARP, uint32(x >> 22) & 0x3fffff);
    const uint64 high = __reduce_add_sync(FULL_WARP, uint32(x >> 44));
    return low + (middle << 22) + (high << 44);
}

DEVICE uint64 warp_max_64(uint64 x) {
    const uint32 high = __reduce_max_sync(FULL_WARP, uint32(x >> 32));
    const uint32 low = __reduce_max_sync(FULL_WARP, uint32(x >> 32) == high ? uint32(x) : 0);
    return uint64(high) << 32 | low;
}

// Sum over this and all lower lanes
DEVICE uint64 warp_prefix_64(uint64 x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const uint64 other = __shfl_up_sync(FULL_WARP, x, offset);
        if (lane >= offset) x += other;
    }
    return x;
}
