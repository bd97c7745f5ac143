// Random words: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include "common.cuh"

// The first word of Philox4x32-10, key (seed low, seed high), counter (position low, position high, 0, 0)
DEVICE uint32 philox_word(uint64 seed, uint64 position) {
    uint32 c0 = uint32(position), c1 = uint32(position >> 32), c2 = 0, c3 = 0;
    uint32 k0 = uint32(seed), k1 = uint32(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64 first = uint64(c0) * 0xD2511F53u, second = uint64(c2) * 0xCD9E8D57u;
        c0 = uint32(second >> 32) ^ c1 ^ k0;
        c1 = uint32(second);
        c2 = uint32(first >> 32) ^ c3 ^ k1;
        c3 = uint32(first);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}
