// What sample.cu is made of: clusters of thread blocks that share memory, random words, exact weights, sorting.
#pragma once

#include "common.cuh"

// ---- a cluster of thread blocks (sm_90), or one thread block ------------------------------------------------------------

#if __CUDA_ARCH__ >= 900
constexpr int CLUSTER = 8;  // thread blocks of a row; the most that is portable
constexpr int THREADS = 512;

DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// For a barrier that passes no data on; it costs half a microsecond less
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, for the functions below, of the same variable in another thread block of the cluster
DEVICE uint32 remote(const void* variable, int rank) {
    uint32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(variable)), "r"(rank));
    return address;
}
#define SHARED_CLUSTER "shared::cluster"
#else
constexpr int CLUSTER = 1;
constexpr int THREADS = 1024;

DEVICE int cluster_rank() { return 0; }
DEVICE void cluster_arrive() {}
DEVICE void cluster_arrive_relaxed() {}
DEVICE void cluster_wait() { __syncthreads(); }
DEVICE uint32 remote(const void* variable, int rank) { return shared_address(variable); }
#define SHARED_CLUSTER "shared"
#endif

DEVICE void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

DEVICE uint32 load_remote(const uint32* variable, int rank) {
    uint32 value;
    // No "memory": several are to be under way. They stay behind the barrier before them, which is volatile too.
    asm volatile("ld." SHARED_CLUSTER ".u32 %0, [%1];" : "=r"(value) : "r"(remote(variable, rank)));
    return value;
}

DEVICE void store_remote(uint64* variable, int rank, uint64 value) {
    asm volatile("st." SHARED_CLUSTER ".u64 [%0], %1;" ::"r"(remote(variable, rank)), "l"(value) : "memory");
}

DEVICE uint32 add_remote(uint32* variable, int rank, uint32 value) {
    uint32 old;
    asm volatile("atom." SHARED_CLUSTER ".add.u32 %0, [%1], %2;"
                 : "=r"(old) : "r"(remote(variable, rank)), "r"(value) : "memory");
    return old;
}

// ---- reductions of 64 bits ----------------------------------------------------------------------------------------------

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

// ---- random words: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011) ----------------------------------

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

// ---- logits as integers ---------------------------------------------------------------------------------------------------

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

// ---- weights and bins -------------------------------------------------------------------------------------------------------

constexpr int BIN_BITS = CLUSTER > 1 ? 10 : 9;  // bounds shared memory
constexpr int BINS = 1 << BIN_BITS;
constexpr float HEAD_END = 14;   // in powers of two below the largest weight
constexpr float TAIL_END = 44;   // less weighs nothing
constexpr float ROUND = 12582912.0f;  // added to and subtracted from |x| < 2^22, rounds it to an integer, which its bits show

// A weight is units << shift; the largest logit's is 2^43. The shift belongs to a bin. Units of the head (2^17 at most, 2^15
// where a thread block has more than 2^15 logits) can so be added up in 32 bits; those of the tail, 2^29 at most and never
// shifted, are added up with a carry.
struct Weight {
    int bin;  // 0 .. of the head, BINS .. of the tail, in order of falling logit
    uint32 units;
    int shift;

    __device__ uint64 value() const { return uint64(units) << shift; }
};

DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The weights of a row: 2^-t, t = (largest - logit) * log2(e) / temperature, as integers, which add up exactly and in any
// order. One is rounded by 2^-unit_bits of itself at most (and by 2^-44 of the largest).
struct Scale {
    float largest, factor;
    int unit_bits;  // 17 or 15
    float per_t, per_bin;  // the head's bins per unit of t and the reverse; they cover what the row has

    DEVICE Scale of(float largest, float smallest, float temperature, int unit_bits) {
        Scale scale;
        scale.largest = largest;
        scale.unit_bits = unit_bits;
        // Finite at any temperature, so that 0 * factor stays 0
        scale.factor = __fdiv_rn(1.4426950408889634f, fmaxf(temperature, 1e-30f));
        const float range = __fmul_rn(__fsub_rn(largest, smallest), scale.factor);
        const float head = fmaxf(fminf(range, HEAD_END), 1e-3f);
        scale.per_t = __fdiv_rn(BINS - 1, head), scale.per_bin = __fdiv_rn(head, BINS - 1);
        return scale;
    }

    // Rises as logits fall. Every operation is rounded as written, so that all passes agree.
    __device__ float t(float logit) const { return fminf(__fmul_rn(__fsub_rn(largest, logit), factor), 60.0f); }

    // The units of a weight of the tail; few operations, for most logits are there
    DEVICE uint32 tail_units(float t) {
        uint32 units;
        asm("cvt.rni.u32.f32 %0, %1;" : "=r"(units) : "f"(power_of_2(__fsub_rn(43.0f, t))));
        return units;
    }

    __device__ Weight weigh_head(float t) const {
        const float place = __fmaf_rn(t, per_t, ROUND);
        const float bin = fminf(__fsub_rn(place, ROUND), BINS - 1);
        // The bin's power of two; t is less than 1 + 2 bins beyond it
        const float power = __fmaf_rn(bin, per_bin, -0.5f);
        const float whole = fmaxf(__fsub_rn(__fadd_rn(power, ROUND), ROUND), 0.0f);
        const float units = power_of_2(__fsub_rn(whole + unit_bits, t));
        return {int(__float_as_uint(__fadd_rn(bin, ROUND)) & 0xffff),
                __float_as_uint(__fadd_rn(units, 8388608.0f)) & 0x7fffff,
                43 - unit_bits - int(__float_as_uint(__fadd_rn(whole, ROUND)) & 0xff)};
    }

    __device__ Weight weigh(float t) const {
        if (t < HEAD_END) return weigh_head(t);
        const float place = fminf(__fmul_rn(__fsub_rn(t, HEAD_END), (BINS - 1) / (TAIL_END - HEAD_END)), BINS - 1);
        return {BINS + int(place), tail_units(t), 0};
    }
};

// ---- sorting --------------------------------------------------------------------------------------------------------------

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
