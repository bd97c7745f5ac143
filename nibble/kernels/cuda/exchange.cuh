// How thread blocks of one launch hand each other sums through device memory without fences and counters, whose round
// trips take 1 to 2 us each while the next kernel's weights pour in: a word that nobody has written is EMPTY, which no sum
// is, and who has read it makes it that again. Whoever waits must do so for blocks that the device holds at the same time.
#pragma once
#include "common.cuh"

constexpr uint32 EMPTY = 0xFFFFFFFF;  // a NaN that no addition returns: theirs is 0x7FFFFFFF

DEVICE void leave(float4* place, const float (&values)[4]) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(place), "f"(values[0]), "f"(values[1]),
                 "f"(values[2]), "f"(values[3])
                 : "memory");
}

DEVICE void look(float (&values)[4], const float4* place) {
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "l"(place)
                 : "memory");
}

// All four words are looked at: they need not come together
DEVICE bool is_there(const float (&values)[4]) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < 4; i++) all &= __float_as_uint(values[i]) != EMPTY;
    return all;
}

DEVICE void clear(float4* place) {
    const float empty = __uint_as_float(EMPTY);
    leave(place, {empty, empty, empty, empty});
}
