// An INT4 weight in the tiles of layout.py as the fp16 matrix (N, K), row-major: w[n, k] = fp16(scale * q + minimum), the
// very values that int4_linear.cu multiplies with.
//
// Warp: 16 rows x 64 columns, i.e. 4 fragments. Lane l reads 16 bytes, which are the words of four lanes of a fragment:
// all 16 columns of the rows l % 8 and l % 8 + 8 in fragment l / 8. So what it writes is contiguous, and the 4 lanes of
// a row write 128 bytes. Grid: (column tiles, row tiles); 4 warps take the 4 row fragments, one column half after the
// other. first_row: a multiple of 64; row first_row of the matrix is the first of out.
//
// Bytes: N * K / 2 * (1 + 8 / GROUP_SIZE) read, 2 * N * K written.
#include "int4_tile.cuh"

extern "C" __global__ void int4_dequantize(const uint8* __restrict__ packed, uint16* out, int first_row, int num_rows,
                                           int num_columns) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int width = min(TILE_COLUMNS, num_columns - int(blockIdx.x) * TILE_COLUMNS);
    const uint8* tile = packed + (first_row / TILE_ROWS + int(blockIdx.y)) * row_tile_bytes(num_columns) +
                        int64(blockIdx.x) * TILE_BYTES;
    const uint8* scales = tile + width * (TILE_ROWS / 2);
    grid_launch_dependents();
    grid_wait();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int column = half * 64 + lane / 8 * 16;  // in the tile
        if (column >= width) continue;
        const uint4 words = *reinterpret_cast<const uint4*>(tile + warp * 8 * width + half * 512 + lane * 16);
        const uint32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int h = 0; h < 2; h++) {  // rows l % 8 and l % 8 + 8
            const int row = warp * 16 + h * 8 + lane % 8;
            const uint32 both = *reinterpret_cast<const uint32*>(scales + column / GROUP_SIZE * GROUP_BYTES + row * 4);
            const uint32 scale = broadcast_low(both), minimum = broadcast_high(both);
            uint32 w[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int shift = 4 * h + 8 * (i / 4);  // columns 0..7, then 8..15
                const uint32 q = half2_add(and_or(word[i % 4] >> shift, 0x000F000F, 0x64006400), 0xE400E400);
                w[i] = half2_fma(q, scale, minimum);
            }
            const int64 out_row = int64(blockIdx.y) * TILE_ROWS + row;
            if (out_row >= num_rows) continue;
            uint4* target = reinterpret_cast<uint4*>(out + out_row * num_columns + blockIdx.x * TILE_COLUMNS + column);
            target[0] = make_uint4(w[0], w[1], w[2], w[3]);
            target[1] = make_uint4(w[4], w[5], w[6], w[7]);
        }
    }
}
