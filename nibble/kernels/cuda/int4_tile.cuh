// What the INT4 kernels share: the tiles of layout.py, a fragment's words to fp16, and the epilogues of int4_linear.
#pragma once
#include "common.cuh"

#ifndef GROUP_SIZE
#error "GROUP_SIZE: 32, 64 or 128"
#endif
static_assert(GROUP_SIZE == 32 || GROUP_SIZE == 64 || GROUP_SIZE == 128, "group sizes of layout.py");

constexpr int TILE_ROWS = 64;
constexpr int TILE_COLUMNS = 128;
constexpr int GROUPS = TILE_COLUMNS / GROUP_SIZE;
constexpr int NIBBLE_BYTES = TILE_ROWS * TILE_COLUMNS / 2;
constexpr int GROUP_BYTES = TILE_ROWS * 4;  // (scale, minimum) of one group
constexpr int TILE_BYTES = NIBBLE_BYTES + GROUPS * GROUP_BYTES;

// Bytes of a tile of `width` columns, which is less than 128 in a ragged last one
DEVICE int tile_bytes(int width) { return width * (TILE_ROWS / 2) + width / GROUP_SIZE * GROUP_BYTES; }

// Bytes of 64 rows of a matrix, i.e. of a run of tiles
DEVICE int64 row_tile_bytes(int num_columns) {
    return int64(num_columns) * (TILE_ROWS / 2) + int64(num_columns / GROUP_SIZE) * GROUP_BYTES;
}

// A fragment of 16 x 16 weights from one word per lane, first without scales: 0 .. 15 as fp16
DEVICE void unpack(uint32 (&q)[4], uint32 word) {
    const uint32 high = word >> 8;
    // An fp16 1024 with q in its low mantissa bits is 1024 + q, one nibble up 1024 + 16 q: both steps below are exact
    q[0] = half2_add(and_or(word, 0x000F000F, 0x64006400), 0xE400E400);              // - 1024
    q[1] = half2_fma(and_or(word, 0x00F000F0, 0x64006400), 0x2C002C00, 0xD400D400);  // / 16 - 64
    q[2] = half2_add(and_or(high, 0x000F000F, 0x64006400), 0xE400E400);
    q[3] = half2_fma(and_or(high, 0x00F000F0, 0x64006400), 0x2C002C00, 0xD400D400);
}

// scale and minimum of row g and of row g + 8, in pairs
DEVICE void scale_fragment(uint32 (&a)[4], const uint32 (&q)[4], const uint32 (&scale)[2], const uint32 (&minimum)[2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = half2_fma(q[i], scale[i % 2], minimum[i % 2]);
}

// What becomes of the sums. x @ w.T + bias goes to out, fp16 (T, N), or is added to residual, float32 (T, N), or with
// `gated` silu(gate) * up of it goes to out, fp16 (T, N / 2). bias, and out or residual, may be null.
struct Epilogue {
    const float* bias;
    uint16* out;
    float* residual;
    int num_tokens, num_rows;
    bool gated;
};

DEVICE float silu(float x) { return __fdividef(x, 1 + __expf(-x)); }  // to 2 ulp: fp16 comes of it

// A lane's part of an mma's sums, 16 rows x 8 tokens: sums are, for token and token + 1, those of `row` and then of
// row + 8, which with `gated` are gate and up of one neuron. Where nothing is added to a residual, before is ignored.
DEVICE void load_residual(float (&before)[4], const Epilogue& e, int token, int row) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        before[i] = e.residual && token + i % 2 < e.num_tokens && row + i / 2 * 8 < e.num_rows
                        ? e.residual[int64(token + i % 2) * e.num_rows + row + i / 2 * 8]
                        : 0;
}

DEVICE void store(const Epilogue& e, int token, int row, float (&sums)[4], const float (&before)[4]) {
    const bool has_row[2] = {row < e.num_rows, row + 8 < e.num_rows};
    if (e.bias) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] += has_row[i / 2] ? e.bias[row + i / 2 * 8] : 0;
    }
    if (e.gated) {
        const int stride = e.num_rows / 2, column = row / 16 * 8 + row % 16;
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (token + i < e.num_tokens && has_row[1])
                e.out[int64(token + i) * stride + column] = float_to_half(silu(sums[i]) * sums[2 + i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (token + i % 2 >= e.num_tokens || !has_row[i / 2]) continue;
        const int64 at = int64(token + i % 2) * e.num_rows + row + i / 2 * 8;
        if (e.residual)
            e.residual[at] = before[i] + sums[i];
        else
            e.out[at] = float_to_half(sums[i]);
    }
}

// The same for 8 * COUNT tokens from first_token on
template <int COUNT>
DEVICE void store(const Epilogue& e, int first_token, int row, float (&sums)[COUNT][4]) {
    constexpr int BATCH = COUNT < 2 ? COUNT : 2;  // loads before the first store, which each would otherwise wait for
#pragma unroll
    for (int start = 0; start < COUNT; start += BATCH) {
        float before[BATCH][4];
#pragma unroll
        for (int j = 0; j < BATCH; j++) load_residual(before[j], e, first_token + (start + j) * 8, row);
#pragma unroll
        for (int j = 0; j < BATCH; j++) store(e, first_token + (start + j) * 8, row, sums[start + j], before[j]);
    }
}

// A lane's part of whole rows of results: rows `row` .. row + 3 (a multiple of 4) of a token; a warp has 128 rows. Where
// nothing is added to a residual, before is ignored.
DEVICE void load_rows(float (&before)[4], const Epilogue& e, int token, int row) {
    const bool exists = e.residual && token < e.num_tokens;
    const float* from = e.residual + int64(token) * e.num_rows + row;
    if (exists && e.num_rows % 4 == 0 && row < e.num_rows) {
        const float4 all = *reinterpret_cast<const float4*>(from);
        before[0] = all.x, before[1] = all.y, before[2] = all.z, before[3] = all.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) before[i] = exists && row + i < e.num_rows ? from[i] : 0;
    }
}

// All lanes of the warp at once
DEVICE void store_rows(const Epilogue& e, int token, int row, float (&sums)[4], const float (&before)[4]) {
    if (e.bias) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] += row + i < e.num_rows ? e.bias[row + i] : 0;
    }
    if (e.gated) {
        float up[4];  // 8 rows on
#pragma unroll
        for (int i = 0; i < 4; i++) up[i] = __shfl_down_sync(FULL_WARP, sums[i], 2);
        if (token >= e.num_tokens || row >= e.num_rows || row % 16 >= 8) return;
        uint16* to = e.out + int64(token) * (e.num_rows / 2) + row / 16 * 8 + row % 16;
        uint2 halves;
        halves.x = float_to_half(silu(sums[0]) * up[0]) | uint32(float_to_half(silu(sums[1]) * up[1])) << 16;
        halves.y = float_to_half(silu(sums[2]) * up[2]) | uint32(float_to_half(silu(sums[3]) * up[3])) << 16;
        *reinterpret_cast<uint2*>(to) = halves;
        return;
    }
    if (token >= e.num_tokens) return;
    const int64 at = int64(token) * e.num_rows + row;
    if (e.residual) {
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = before[i] + sums[i];
    }
    if (e.num_rows % 4 == 0) {
        if (row >= e.num_rows) return;
        if (e.residual) {
            *reinterpret_cast<float4*>(e.residual + at) = make_float4(sums[0], sums[1], sums[2], sums[3]);
        } else {
            uint2 halves;
            halves.x = float_to_half(sums[0]) | uint32(float_to_half(sums[1])) << 16;
            halves.y = float_to_half(sums[2]) | uint32(float_to_half(sums[3])) << 16;
            *reinterpret_cast<uint2*>(e.out + at) = halves;
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (row + i >= e.num_rows) break;
        if (e.residual)
            e.residual[at + i] = sums[i];
        else
            e.out[at + i] = float_to_half(sums[i]);
    }
}
