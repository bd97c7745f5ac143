// What the kernels share: fixed-width types, fp16 pairs, asynchronous copies, tensor-core products, warp reductions,
// programmatic dependent launch. Inline PTX instead of CUDA's headers: NVRTC then needs no include path, and a file
// compiles in a tenth of the time. sm_80 and newer.
#pragma once

typedef signed char int8;
typedef unsigned char uint8;
typedef unsigned short uint16;  // also the bits of one fp16
typedef unsigned int uint32;    // also the bits of an fp16 pair, the lower address in the low half
typedef long long int64;
typedef unsigned long long uint64;

#define DEVICE static __device__ __forceinline__

constexpr int WARP = 32;
constexpr int BLOCK_TOKENS = 64;  // of a KV block, see layout.py
constexpr uint32 FULL_WARP = 0xffffffffu;

// ---- programmatic dependent launch --------------------------------------------------------------------------------
// Every kernel calls grid_wait() in every thread before it reads or writes anything that an earlier kernel touches
// (weights never are), also in blocks that have nothing to do: it is what orders kernels that overlap.
// Pointers to what an earlier kernel wrote must not be `const __restrict__` (nor read through __ldg): that promises the
// compiler memory that nobody writes while the kernel runs, and it may move such a load to before grid_wait(). For
// weights it is right.

DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start as soon as all blocks of this one have called it (or ended).
DEVICE void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- memory ---------------------------------------------------------------------------------------------------------

// Orders this thread's accesses to device memory before and after it (acquire and release; __threadfence() costs more)
DEVICE void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// ---- fp16 -----------------------------------------------------------------------------------------------------------

DEVICE uint16 float_to_half(float x) {
    uint16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

DEVICE float half_to_float(uint16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

DEVICE uint32 floats_to_half2(float low, float high) {
    uint32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE float low_half(uint32 pair) { return half_to_float(uint16(pair)); }
DEVICE float high_half(uint32 pair) { return half_to_float(uint16(pair >> 16)); }

DEVICE uint32 half2_add(uint32 a, uint32 b) {
    uint32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

DEVICE uint32 half2_fma(uint32 a, uint32 b, uint32 c) {
    uint32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE uint32 broadcast_low(uint32 pair) { return __byte_perm(pair, pair, 0x1010); }
DEVICE uint32 broadcast_high(uint32 pair) { return __byte_perm(pair, pair, 0x3232); }

// (a & mask) | bits in one instruction
DEVICE uint32 and_or(uint32 a, uint32 mask, uint32 bits) {
    uint32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// Four int8 as two fp16 pairs: 0x6400 + byte is 1024 + byte, exactly, and the bytes are offset by 128.
DEVICE void int8_to_half(uint32 word, uint32& low, uint32& high) {
    const uint32 bytes = word ^ 0x80808080u;
    const uint32 minus_1152 = 0xe480e480u;
    low = half2_add(__byte_perm(bytes, 0x64646464u, 0x4140), minus_1152);
    high = half2_add(__byte_perm(bytes, 0x64646464u, 0x4342), minus_1152);
}

// ---- asynchronous copies to shared memory -----------------------------------------------------------------------------

DEVICE uint32 shared_address(const void* pointer) { return uint32(__cvta_generic_to_shared(pointer)); }

// 16 bytes, both sides aligned to 16, bypassing L1
DEVICE void copy_16_async(uint32 shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// As above; where `valid` is false, zeros are written and nothing is read
DEVICE void copy_16_async(uint32 shared, const void* global, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's newest groups are still under way
template <int pending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- tensor cores -------------------------------------------------------------------------------------------------------
// Fragment layouts: PTX ISA, "Matrix fragments for mma.m16n8k16". g = lane / 4, t = lane % 4.
//   a[0] (row g, cols 2t..2t+1), a[1] (row g + 8, same), a[2] (row g, cols 2t + 8..), a[3] (row g + 8, cols 2t + 8..)
//   b[0] (k 2t..2t+1, col g), b[1] (k 2t + 8.., col g)
//   d[0], d[1] (row g, cols 2t, 2t + 1), d[2], d[3] (row g + 8, same)

DEVICE void mma_16816(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 fp16 matrices; lane l gives the address of row l % 8 of matrix l / 8
DEVICE void load_matrices(uint32 (&d)[4], uint32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared));
}

// ---- reductions: all lanes get the result, always added in the same order -----------------------------------------------

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

DEVICE float warp_min(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fminf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}
