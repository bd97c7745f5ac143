// What the attention kernels share: the KV block, its INT8 numbers, rotation and quantisation of one head's row, where
// 16-byte pieces lie in shared memory, how work is cut. Needs -DHEAD_DIM and -DKV_TYPE, of the
// blocks (0: INT8, 1: fp16, 2: INT8 by channel).
#pragma once
#include "common.cuh"

constexpr int D = HEAD_DIM;
constexpr bool IS_FP16 = KV_TYPE == 1;
constexpr bool HAS_TOKEN_SCALES = KV_TYPE == 0;  // (scale, zero) of each token's key and value, in the block
constexpr bool HAS_CHANNELS = KV_TYPE == 2;
static_assert(D % 32 == 0 && D >= 64 && D <= 256, "head_dim");

// ---- the KV block of one kv head, see layout.py -------------------------------------------------------------------------

constexpr int ROW_BYTES = IS_FP16 ? 2 * D : D;  // one token's key or value
constexpr int VALUES_START = BLOCK_TOKENS * ROW_BYTES;
constexpr int KEY_PARAMETERS = 2 * BLOCK_TOKENS * D;  // (scale, zero) per token
constexpr int VALUE_PARAMETERS = KEY_PARAMETERS + BLOCK_TOKENS * 4;
constexpr int HEAD_BLOCK_BYTES = HAS_TOKEN_SCALES ? VALUE_PARAMETERS + BLOCK_TOKENS * 4 : 2 * VALUES_START;

// ---- rows of keys and values in shared memory ------------------------------------------------------------------------------
// A row is cut into pieces of 16 bytes, permuted or padded so that the same piece of 8 consecutive rows lies in 8
// different groups of banks: what ldmatrix reads at a time.

constexpr int PIECE = 16;
template <int row_bytes>
struct SharedRows {
    static constexpr int PIECES = row_bytes / PIECE;
    static constexpr bool IS_PERMUTED = (PIECES & (PIECES - 1)) == 0;
    static constexpr int STRIDE = IS_PERMUTED ? row_bytes : row_bytes + PIECE;
    static_assert(IS_PERMUTED ? PIECES >= 4 : STRIDE / PIECE % 2 == 1, "rows would collide");

    static __device__ __forceinline__ int offset(int row, int piece) {
        if (!IS_PERMUTED) return row * STRIDE + piece * PIECE;
        return row * STRIDE + (piece ^ (PIECES >= 8 ? row & 7 : row >> 1 & 3)) * PIECE;
    }

    // The address `pieces` (even) further on in a row than that of its piece 0 or 1
    static __device__ __forceinline__ uint32 further(uint32 address, int pieces) {
        static_assert(!IS_PERMUTED || PIECES >= 8, "by 8 pieces");
        if (!IS_PERMUTED) return address + pieces * PIECE;
        return (address ^ (pieces & 7) * PIECE) + (pieces & ~7) * PIECE;
    }
};

// ---- small pieces of PTX ----------------------------------------------------------------------------------------------------

DEVICE void load_matrices_transposed(uint32 (&d)[4], uint32 shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared));
}

// 4 bytes; where `valid` is false, zeros are written and nothing is read
DEVICE void copy_4_async(uint32 shared, const void* global, bool valid) {
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// Barriers in shared memory (mbarrier): a phase ends when as many have arrived as the barrier was made for; phases
// alternate in parity, the first is 0. Waiting for the parity of the phase before the first one returns at once.
DEVICE void init_barrier(uint32 barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

DEVICE void arrive(uint32 barrier) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier) : "memory");
}

// Arrives when all copies that this thread has started so far are complete
DEVICE void arrive_after_copies(uint32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

DEVICE void wait_barrier(uint32 barrier, int parity) {
#if __CUDA_ARCH__ >= 900
#define WAIT "mbarrier.try_wait.parity.shared.b64"  // sleeps for a while
#else
#define WAIT "mbarrier.test_wait.parity.shared.b64"
#endif
    asm volatile(
        "{ .reg .pred done;\n"
        "again: " WAIT " done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(barrier),
        "r"(parity)
        : "memory");
#undef WAIT
}

// 2^x; 0 at -inf, NaN at NaN
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// (a & mask) ^ bits in one instruction
DEVICE uint32 and_xor(uint32 a, uint32 mask, uint32 bits) {
    uint32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
    return d;
}

// Keeps the compiler from computing all that follows from x ahead of a loop, in registers that it then has not
DEVICE void forget(uint32& x) { asm volatile("" : "+r"(x)); }

DEVICE float negative_infinity() { return __int_as_float(0xff800000); }

// ---- INT8 to fp16, exactly -------------------------------------------------------------------------------------------------
// A byte b with its sign bit flipped is b + 128; under the bits 0x64.. of an fp16 it reads 1024 + b + 128.

constexpr uint32 MAGIC = 0x64806480;           // 0x6400 | 0x80, twice
constexpr uint32 MINUS_1152 = 0xe480e480;      // -(1024 + 128), twice

DEVICE uint32 even_bytes_to_half2(uint32 four) { return half2_add(and_xor(four, 0x00ff00ff, MAGIC), MINUS_1152); }
DEVICE uint32 odd_bytes_to_half2(uint32 four) { return even_bytes_to_half2(four >> 8); }

// ---- one head's row of q, k or v, spread over a warp -------------------------------------------------------------------------
// Unit u holds elements 2u, 2u + 1 of the row's lower half and the same of its upper half: what rotation pairs. Lane l
// holds units l, l + 32 ...; of head_dim 64 and 96 some lanes hold none.

constexpr int HALF = D / 2;
constexpr int UNITS = HALF / 2;
constexpr int LANE_UNITS = (UNITS + WARP - 1) / WARP;

// One pair of a rotation. Products and sums are spelled out: every kernel must round alike.
DEVICE void rotate(float& low, float& high, float cos, float sin) {
    float rotated = __fmaf_rn(low, cos, -__fmul_rn(high, sin));
    high = __fmaf_rn(high, cos, __fmul_rn(low, sin));
    low = rotated;
}

struct HeadRow {
    uint32 low[LANE_UNITS], high[LANE_UNITS];  // fp16 pairs

    static __device__ __forceinline__ int unit(int j) { return threadIdx.x % WARP + j * WARP; }
    static __device__ __forceinline__ bool has(int j) { return UNITS % WARP == 0 || unit(j) < UNITS; }

    __device__ __forceinline__ void load(const uint16* row) {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            low[j] = has(j) ? *reinterpret_cast<const uint32*>(row + 2 * unit(j)) : 0;
            high[j] = has(j) ? *reinterpret_cast<const uint32*>(row + HALF + 2 * unit(j)) : 0;
        }
    }

    __device__ __forceinline__ void store(uint16* row) const {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!has(j)) continue;
            *reinterpret_cast<uint32*>(row + 2 * unit(j)) = low[j];
            *reinterpret_cast<uint32*>(row + HALF + 2 * unit(j)) = high[j];
        }
    }

    // Elements 4 i .. 4 i + 3 in the order 0, 2, 1, 3
    __device__ __forceinline__ void store_permuted(uint16* row) const {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!has(j)) continue;
            uint16* at = row + unit(j) / 2 * 4 + unit(j) % 2;
            at[0] = uint16(low[j]);
            at[2] = uint16(low[j] >> 16);
            at[HALF] = uint16(high[j]);
            at[HALF + 2] = uint16(high[j] >> 16);
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) low[j] = high[j] = 0;
    }

    // By a number for each of D channels
    __device__ __forceinline__ void multiply(const float* factors) {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!has(j)) continue;
            float2 of_low = *reinterpret_cast<const float2*>(factors + 2 * unit(j));
            float2 of_high = *reinterpret_cast<const float2*>(factors + HALF + 2 * unit(j));
            low[j] = floats_to_half2(low_half(low[j]) * of_low.x, high_half(low[j]) * of_low.y);
            high[j] = floats_to_half2(low_half(high[j]) * of_high.x, high_half(high[j]) * of_high.y);
        }
    }

    // Of this lane's elements
    __device__ __forceinline__ float sum() const {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++)
            sum += (low_half(low[j]) + high_half(low[j])) + (low_half(high[j]) + high_half(high[j]));
        return sum;
    }

    // cos_sin: D / 2 cosines, then as many sines, of this row's position
    __device__ __forceinline__ void rotate_all(const float* cos_sin) {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!has(j)) continue;
            float2 cos = *reinterpret_cast<const float2*>(cos_sin + 2 * unit(j));
            float2 sin = *reinterpret_cast<const float2*>(cos_sin + HALF + 2 * unit(j));
            float low0 = low_half(low[j]), low1 = high_half(low[j]);
            float high0 = low_half(high[j]), high1 = high_half(high[j]);
            rotate(low0, high0, cos.x, sin.x);
            rotate(low1, high1, cos.y, sin.y);
            low[j] = floats_to_half2(low0, low1);
            high[j] = floats_to_half2(high0, high1);
        }
    }
};

DEVICE bool has_nonfinite(uint32 pair) { return (pair & 0x7c00) == 0x7c00 || (pair & 0x7c000000) == 0x7c000000; }

DEVICE uint32 quantize_one(float x, float zero, float scale) {
    if (scale == 0.0f) return 0;
    float q = rintf(__fdiv_rn(__fsub_rn(x, zero), scale));
    return uint32(int(fminf(fmaxf(q, -128.0f), 127.0f))) & 0xff;
}

struct ByteRow {
    uint32 low[LANE_UNITS], high[LANE_UNITS];  // two bytes each, at elements 2u and D / 2 + 2u
};

struct QuantizedRow : ByteRow {
    uint32 parameters;  // (scale, zero) fp16, the same in all lanes

    // The formula of layout.py. A row with an infinity or a NaN gets NaN parameters: whoever attends to it then gets
    // NaN, which sampling detects.
    __device__ __forceinline__ explicit QuantizedRow(const HeadRow& row) {
        float least = __int_as_float(0x7f800000), most = negative_infinity();
        bool is_broken = false;
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!HeadRow::has(j)) continue;
            is_broken = is_broken || has_nonfinite(row.low[j]) || has_nonfinite(row.high[j]);
            least = fminf(fminf(fminf(least, low_half(row.low[j])), high_half(row.low[j])),
                          fminf(low_half(row.high[j]), high_half(row.high[j])));
            most = fmaxf(fmaxf(fmaxf(most, low_half(row.low[j])), high_half(row.low[j])),
                         fmaxf(low_half(row.high[j]), high_half(row.high[j])));
        }
        least = warp_min(least);
        most = warp_max(most);
        uint16 zero_bits = float_to_half(0.5f * least + 0.5f * most);
        uint16 scale_bits = float_to_half(__fdiv_rn(__fsub_rn(most, least), 255.0f));
        float zero = half_to_float(zero_bits), scale = half_to_float(scale_bits);
        parameters = uint32(zero_bits) << 16 | scale_bits;
        if (__any_sync(FULL_WARP, is_broken)) {
            parameters = 0x7fff7fff;
            scale = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            low[j] = quantize_one(low_half(row.low[j]), zero, scale) |
                     quantize_one(high_half(row.low[j]), zero, scale) << 8;
            high[j] = quantize_one(low_half(row.high[j]), zero, scale) |
                      quantize_one(high_half(row.high[j]), zero, scale) << 8;
        }
    }
};

// ---- INT8 by channel ---------------------------------------------------------------------------------------------------------
// scores: q k = sum_c (q_c scale_c) k8_c + sum_c q_c zero_c, of which the second sum is the same for all of a query's keys
// and drops out of softmax. Results: out_c = scale_c (sum_p w_p v8_pc) / sum_p w_p + zero_c.

constexpr int CHANNEL_FLOATS = 4 * D;  // of a kv head: the keys' scales, zeros, the values' scales, zeros

struct Channels {
    const float* parameters;  // float32 (kv heads, 4, D)
    uint64* num_saturated;

    // which: 0 keys, 1 values. Their scales, then their zeros
    __device__ __forceinline__ const float* of(int kv_head, int which) const {
        return parameters + kv_head * CHANNEL_FLOATS + which * 2 * D;
    }

    // All lanes of a warp, each with its count
    __device__ __forceinline__ void count(int saturated) const {
        saturated = __reduce_add_sync(FULL_WARP, saturated);
        if (saturated != 0 && threadIdx.x % WARP == 0) atomicAdd(num_saturated, saturated);
    }
};

struct ChannelRow : ByteRow {
    int num_saturated = 0;  // of this lane's elements

    // scales, then zeros
    __device__ __forceinline__ ChannelRow(const HeadRow& row, const float* parameters) {
#pragma unroll
        for (int j = 0; j < LANE_UNITS; j++) {
            if (!HeadRow::has(j)) continue;
            low[j] = quantize_pair(row.low[j], parameters + 2 * HeadRow::unit(j));
            high[j] = quantize_pair(row.high[j], parameters + HALF + 2 * HeadRow::unit(j));
        }
    }

    __device__ __forceinline__ uint32 quantize_pair(uint32 pair, const float* parameters) {
        float2 scale = *reinterpret_cast<const float2*>(parameters);
        float2 zero = *reinterpret_cast<const float2*>(parameters + D);
        return quantize(low_half(pair), scale.x, zero.x) | quantize(high_half(pair), scale.y, zero.y) << 8;
    }

    __device__ __forceinline__ uint32 quantize(float x, float scale, float zero) {
        float q = rintf(__fdiv_rn(__fsub_rn(x, zero), scale));
        num_saturated += !(q >= -128.0f && q <= 128.0f);
        return uint32(int(fminf(fmaxf(q, -128.0f), 127.0f))) & 0xff;
    }
};

// A row as it lies in the cache, to wherever `place(byte)` says that byte of the row goes
template <typename Place>
DEVICE void store_cached_row(const HeadRow& row, Place place) {
#pragma unroll
    for (int j = 0; j < LANE_UNITS; j++) {
        if (!HeadRow::has(j)) continue;
        *reinterpret_cast<uint32*>(place(4 * HeadRow::unit(j))) = row.low[j];
        *reinterpret_cast<uint32*>(place(2 * HALF + 4 * HeadRow::unit(j))) = row.high[j];
    }
}

template <typename Place>
DEVICE void store_cached_row(const ByteRow& row, Place place) {
#pragma unroll
    for (int j = 0; j < LANE_UNITS; j++) {
        if (!HeadRow::has(j)) continue;
        *reinterpret_cast<uint16*>(place(2 * HeadRow::unit(j))) = uint16(row.low[j]);
        *reinterpret_cast<uint16*>(place(HALF + 2 * HeadRow::unit(j))) = uint16(row.high[j]);
    }
}
