// A cluster of thread blocks (sm_90), or one thread block: the one that a row of logits has, and how its thread blocks
// reach each other's shared memory.
#pragma once

#include "common.cuh"

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
