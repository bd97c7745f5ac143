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

DEVICE float silu(float x) { return x / (1 + __expf(-x)); }

// The sums of rows `row` and row + 8, which a lane of an mma holds; with `gated` they are gate and up of one neuron
DEVICE void store(const Epilogue& e, int token, int row, float first, float second) {
    if (token >= e.num_tokens) return;
    const bool has_first = row < e.num_rows, has_second = row + 8 < e.num_rows;
    if (e.bias && has_first) first += e.bias[row];
    if (e.bias && has_second) second += e.bias[row + 8];
    if (e.gated) {
        const int64 at = int64(token) * (e.num_rows / 2) + row / 16 * 8 + row % 16;
        if (has_second) e.out[at] = float_to_half(silu(first) * second);
        return;
    }
    const int64 at = int64(token) * e.num_rows + row;
    if (e.residual) {
        if (has_first) e.residual[at] += first;
        if (has_second) e.residual[at + 8] += second;
    } else {
        if (has_first) e.out[at] = float_to_half(first);
        if (has_second) e.out[at + 8] = float_to_half(second);
    }
}
