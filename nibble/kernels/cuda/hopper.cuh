// What sm_90a adds: barriers in shared memory that count bytes, bulk and tensor copies, warpgroup products. PTX ISA names
// in parentheses. A warpgroup is 4 warps of a block, the first a multiple of 4. Empty for other devices.
#pragma once
#include "common.cuh"

// A CUtensorMap, made by the host (`tensor_map.py`); a kernel's parameter of it is `const __grid_constant__`.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int WARPGROUP = 4 * WARP;

// ---- barriers (mbarrier): addresses are shared_address() of a uint64 ------------------------------------------------------
// A phase ends when `count` arrivals and all expected bytes have come; phases alternate in parity, the first is 0.

DEVICE void init_barrier(uint32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After init_barrier, before the __syncthreads() that shows the barriers to the others: the copy engine sees them too
DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void arrive(uint32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

DEVICE void arrive_and_expect(uint32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

DEVICE void wait_barrier(uint32 barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

DEVICE uint32 load_shared(uint32 shared) {
    uint32 value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
    return value;
}

DEVICE void load_shared(float (&values)[4], uint32 shared) {
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(values[0]), "=f"(values[1]), "=f"(values[2]), "=f"(values[3])
                 : "r"(shared)
                 : "memory");
}

DEVICE void store_shared(uint32 shared, const float (&values)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "f"(values[0]), "f"(values[1]), "f"(values[2]),
                 "f"(values[3])
                 : "memory");
}

DEVICE void store_shared(uint32 shared, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared), "f"(value) : "memory");
}

// COUNT threads of the block, whole warps, with one of the barriers 1 .. 15
template <int COUNT>
DEVICE void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(COUNT) : "memory");
}

// All threads of a warpgroup have COUNT registers from here on: more, once other warps have left theirs (setmaxnreg)
template <int COUNT>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
DEVICE void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- clusters of thread blocks -------------------------------------------------------------------------------------------
// All threads of all blocks arrive and wait, e.g. for each other's barriers to be ready, which fence_barrier_init() releases.
// To release all memory here as well, as is the default, would hold a block's first copies up by 1 us.

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where block `rank` has what lies at `shared` in this one: for arrive_in_cluster()
DEVICE uint32 address_in_cluster(uint32 shared, int rank) {
    uint32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Says that this warp's reads are done (their results were used). Not more: with the scope of the cluster the arrival
// would wait for all memory accesses of the thread.
DEVICE void arrive_in_cluster(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// For one of this block's barriers at which other blocks arrive, or their stores do
DEVICE void wait_barrier_in_cluster(uint32 barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// 16 bytes to another block (or this one), counted by a barrier there; both from address_in_cluster()
DEVICE void store_in_cluster(uint32 address, const float (&values)[4], uint32 barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address),
        "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
        : "memory");
}

// ---- copies that a barrier counts (cp.async.bulk), issued by one thread ----------------------------------------------------

// Contiguous bytes, a multiple of 16, both sides aligned to 16
DEVICE void copy_bulk(uint32 shared, const void* global, int bytes, uint32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}

// The box of a two-dimensional tensor that begins at (column, row); what lies outside of the tensor is zero
DEVICE void copy_box(uint32 shared, const TensorMap& map, int column, int row, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The box of a matrix seen as panels of 64 columns (`panels_map`), from a panel and a row on: one panel after the other
DEVICE void copy_panels(uint32 shared, const TensorMap& map, int panel, int row, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared),
        "l"(&map), "r"(0), "r"(row), "r"(panel), "r"(barrier)
        : "memory");
}

// To the same place in both blocks of a cluster; each block's barrier counts what arrives there
DEVICE void copy_box_to_both(uint32 shared, const TensorMap& map, int column, int row, uint32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(uint16(3))
        : "memory");
}

// ---- warpgroup products (wgmma.mma_async m64nNk16, fp16 in, fp32 sums) ------------------------------------------------------
// Rows 16 i .. 16 i + 15 of A and D belong to warp i of the group, in the fragment layouts of mma_16816: a[4] as there;
// d[4 j ..] is its d of columns 8 j .. 8 j + 7. B lies in shared memory as N rows of 64 fp16, see panel_descriptor().

// Before the first product, and after registers that a product reads or adds to were written
DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
DEVICE void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving uses of d across the point where the products that add to it are waited for
template <int COUNT>
DEVICE void pin(float (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for fragments: they are complete before fence_products(), none is computed between two products
template <int COUNT>
DEVICE void pin(uint32 (&a)[COUNT][4]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}

// Rows of 128 bytes whose 16-byte chunks are swizzled by row % 8, as copy_box leaves them with the 128-byte swizzle; the
// panel starts at a multiple of 1024 bytes. In two steps, between which what lies bytes further on is found: + bytes >> 4.
DEVICE uint32 panel_place(uint32 shared) { return (shared & 0x3FFFF) >> 4 | 1 << 16; }

DEVICE uint64 panel_descriptor(uint32 place) {
    constexpr uint32 EIGHT_ROWS = 1024 >> 4, SWIZZLE_128 = 1;
    uint64 descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(place), "r"(EIGHT_ROWS | SWIZZLE_128 << 30));
    return descriptor;
}

#define D_8 "%0,%1,%2,%3"
#define D_16 D_8 ",%4,%5,%6,%7"
#define D_32 D_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D_64 D_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define S_8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define S_16(i) S_8(i), S_8(i + 4)
#define S_32(i) S_16(i), S_16(i + 8)
#define S_64(i) S_32(i), S_32(i + 16)

// d += a * B
#define MULTIPLY(N, A, B)                                                                                              \
    DEVICE void multiply(float (&d)[N / 2], const uint32 (&a)[4], uint64 b) {                                          \
        asm volatile(                                                                                                  \
            "{\n.reg .pred adds;\nsetp.eq.u32 adds, 0, 0;\n"                                                           \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" D_##N "}, {" A "}, " B ", adds, 1, 1, 0;\n}"    \
            : S_##N(0)                                                                                                 \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                     \
    }
MULTIPLY(32, "%16,%17,%18,%19", "%20")
MULTIPLY(64, "%32,%33,%34,%35", "%36")
#undef MULTIPLY

#endif
