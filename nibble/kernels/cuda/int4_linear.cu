// x @ w.T + bias for an INT4 weight in the tiles of layout.py, with its epilogues: fp16 out (T, N), += into a float32
// residual (T, N), or silu(gate) * up as fp16 (T, N / 2). For any device from sm_80 on.
//
// w[n, k] = fp16(scale * q + minimum), one rounding; products in tensor cores (mma.m16n8k16), sums in fp32. Weights are
// the A operand (16 rows a fragment), tokens are N (8 a fragment).
//
// Batch invariance: an output element is a sum over `num_slices` runs of K, each added up in its mma accumulator from
// its first column tile to its last, the slices then in order. Nothing of that depends on the number of tokens: slices
// depend on the weight's shape alone, and an element of an mma does not depend on the other columns.
//
// Thread block: 4 warps, 64 * ROW_FRAGMENTS rows x one slice x up to 64 tokens. Warp: 16 * ROW_FRAGMENTS rows, all the
// tokens; so warps share nothing but the copies to shared memory. Grid: (token chunks, row blocks, slices), chunks
// first so that those after the first find the weights in L2.
//
// A stage of the copy pipeline is one column tile: the rows' tiles as they lie in memory, and x (tokens, 128) with its
// 16-byte chunks swizzled by token % 8 so that ldmatrix has no bank conflicts. A ragged last tile is completed with
// zeros (q, scale, minimum and x), which add exact zeros. The first stages' weights are fetched before grid_wait().
//
// With more than one slice a block leaves its sums in `partials`, in the order of its registers, and the last block of a
// row block to arrive adds them up. It finds itself by `arrivals`, which it leaves zeroed.
//
// Bytes: N * K / 2 * (1 + 8 / GROUP_SIZE) of weights once per 64 tokens, and x once per row block.
#include "int4_tile.cuh"

constexpr int STEPS = TILE_COLUMNS / 16;          // of an mma along K
constexpr int FRAGMENT_BYTES = NIBBLE_BYTES / 4;  // 16 rows x 128 columns
constexpr int X_ROW_BYTES = TILE_COLUMNS * 2;
constexpr int THREADS = 128;
constexpr int MAX_TOKENS = 64;

struct Problem {
    const uint16* x;
    const uint8* packed;
    Epilogue epilogue;
    float4* partials;
    uint32* arrivals;
    int num_columns;
    int tiles_per_slice;
};

template <int ROW_TILES>
DEVICE void copy_weights(uint32 stage, const Problem& p, int row_tile, int tile) {
    const int num_row_tiles = (p.epilogue.num_rows + TILE_ROWS - 1) / TILE_ROWS;
    const int width = min(TILE_COLUMNS, p.num_columns - tile * TILE_COLUMNS);
    const int64 row_bytes = row_tile_bytes(p.num_columns);
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
        const uint8* source = p.packed + (row_tile + r) * row_bytes + int64(tile) * TILE_BYTES;
        const uint32 target = stage + r * TILE_BYTES;
        const bool exists = row_tile + r < num_row_tiles;
#pragma unroll
        for (int i = threadIdx.x; i < NIBBLE_BYTES / 16; i += THREADS) {
            const int fragment = i / (FRAGMENT_BYTES / 16), chunk = i % (FRAGMENT_BYTES / 16);
            const bool valid = exists && chunk < width / 2;
            copy_16_async(target + i * 16, valid ? source + fragment * 8 * width + chunk * 16 : p.packed, valid);
        }
        for (int i = threadIdx.x; i < GROUPS * GROUP_BYTES / 16; i += THREADS) {
            const bool valid = exists && i / (GROUP_BYTES / 16) * GROUP_SIZE < width;
            const uint8* scales = source + width * (TILE_ROWS / 2);
            copy_16_async(target + NIBBLE_BYTES + i * 16, valid ? scales + i * 16 : p.packed, valid);
        }
    }
}

template <int TOKENS>
DEVICE void copy_x(uint32 stage, const Problem& p, int first_token, int tile) {
#pragma unroll
    for (int i = threadIdx.x; i < TOKENS * X_ROW_BYTES / 16; i += THREADS) {
        const int token = i / (X_ROW_BYTES / 16), chunk = i % (X_ROW_BYTES / 16);
        const int column = tile * TILE_COLUMNS + chunk * 8;
        const bool valid = first_token + token < p.epilogue.num_tokens && column < p.num_columns;
        const uint16* source = valid ? p.x + int64(first_token + token) * p.num_columns + column : p.x;
        copy_16_async(stage + token * X_ROW_BYTES + (chunk ^ (token & 7)) * 16, source, valid);
    }
}

// One column tile of one warp. weights: its first row fragment. scales: of that fragment's rows, first group.
template <int TOKEN_TILES, int ROW_FRAGMENTS>
DEVICE void multiply(float (&sums)[ROW_FRAGMENTS][TOKEN_TILES][4], uint32 weights, const uint8* scales, uint32 x) {
    const int lane = threadIdx.x % WARP;
    uint32 scale[ROW_FRAGMENTS][2], minimum[ROW_FRAGMENTS][2];
#pragma unroll
    for (int quad = 0; quad < STEPS / 4; quad++) {
        uint32 words[ROW_FRAGMENTS][4];
#pragma unroll
        for (int r = 0; r < ROW_FRAGMENTS; r++)
            // ldmatrix of consecutive 16-byte rows gives lane l the l-th word of each 128 bytes
            load_matrices(words[r], weights + r * FRAGMENT_BYTES + quad * 512 + lane * 16);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int pair = quad * 2 + half;  // of k steps: 32 columns
            if (pair * 32 % GROUP_SIZE == 0) {
#pragma unroll
                for (int r = 0; r < ROW_FRAGMENTS; r++) {
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        const uint32 both = *reinterpret_cast<const uint32*>(
                            scales + pair * 32 / GROUP_SIZE * GROUP_BYTES + (r * 16 + h * 8 + lane / 4) * 4);
                        scale[r][h] = broadcast_low(both);
                        minimum[r][h] = broadcast_high(both);
                    }
                }
            }
            uint32 b[TOKEN_TILES][4];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; n++)
                load_matrices(b[n], x + (n * 8 + lane % 8) * X_ROW_BYTES + ((pair * 4 + lane / 8) ^ (lane & 7)) * 16);
#pragma unroll
            for (int step = 0; step < 2; step++) {
#pragma unroll
                for (int r = 0; r < ROW_FRAGMENTS; r++) {
                    uint32 q[4], a[4];
                    unpack(q, words[r][half * 2 + step]);
                    scale_fragment(a, q, scale[r], minimum[r]);
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; n++)
                        mma_16816(sums[r][n], a, b[n][step * 2], b[n][step * 2 + 1]);
                }
            }
        }
    }
}

// Replaces a thread's sums by those over all slices, in order. False in every block but the last to arrive.
template <int COUNT>
DEVICE bool add_slices(float (&sums)[COUNT][4], const Problem& p) {
    __shared__ bool is_last;
    const int num_slices = gridDim.z;
    if (num_slices == 1) return true;
    const int place = blockIdx.y * gridDim.x + blockIdx.x, num_places = gridDim.x * gridDim.y;
    float4* mine = p.partials + int64(place) * COUNT * THREADS + threadIdx.x;
    const int64 stride = int64(num_places) * COUNT * THREADS;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        mine[blockIdx.z * stride + i * THREADS] = make_float4(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(p.arrivals + place, 1) == num_slices - 1;
    __syncthreads();
    if (!is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float4 total = make_float4(0, 0, 0, 0);
        for (int slice = 0; slice < num_slices; slice++) {
            const float4 part = __ldcg(mine + slice * stride + i * THREADS);
            total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
        sums[i][0] = total.x, sums[i][1] = total.y, sums[i][2] = total.z, sums[i][3] = total.w;
    }
    if (threadIdx.x == 0) p.arrivals[place] = 0;
    return true;
}

template <int TOKEN_TILES, int ROW_FRAGMENTS, int STAGES>
DEVICE void int4_linear(const Problem& p) {
    constexpr int TOKENS = TOKEN_TILES * 8;
    constexpr int WEIGHT_BYTES = ROW_FRAGMENTS * TILE_BYTES;  // 4 warps * 16 rows are one tile
    constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKENS * X_ROW_BYTES;
    extern __shared__ __align__(128) uint8 shared[];
    const uint32 stages = shared_address(shared);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first_token = blockIdx.x * MAX_TOKENS, row_tile = blockIdx.y * ROW_FRAGMENTS;
    const int num_tiles = (p.num_columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const int start = blockIdx.z * p.tiles_per_slice, stop = min(start + p.tiles_per_slice, num_tiles);

    grid_launch_dependents();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++)
        if (start + i < stop) copy_weights<ROW_FRAGMENTS>(stages + i * STAGE_BYTES, p, row_tile, start + i);
    grid_wait();
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (start + i < stop) copy_x<TOKENS>(stages + i * STAGE_BYTES + WEIGHT_BYTES, p, first_token, start + i);
        commit_copies();
    }

    const int warp_row = warp * 16 * ROW_FRAGMENTS;  // within the block
    const int weights = warp_row / TILE_ROWS * TILE_BYTES + warp_row % TILE_ROWS / 16 * FRAGMENT_BYTES;
    const int scales = warp_row / TILE_ROWS * TILE_BYTES + NIBBLE_BYTES + warp_row % TILE_ROWS * 4;
    float sums[ROW_FRAGMENTS][TOKEN_TILES][4] = {};
    int stage = 0;
    for (int tile = start; tile < stop; tile++) {
        wait_copies<STAGES - 2>();
        __syncthreads();  // this stage is there for all; all are done with the one before, which is filled next
        const int next = tile + STAGES - 1;
        if (next < stop) {
            const uint32 target = stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE_BYTES;
            copy_weights<ROW_FRAGMENTS>(target, p, row_tile, next);
            copy_x<TOKENS>(target + WEIGHT_BYTES, p, first_token, next);
        }
        commit_copies();
        const int at = stage * STAGE_BYTES;
        multiply<TOKEN_TILES, ROW_FRAGMENTS>(sums, stages + at + weights, shared + at + scales, stages + at + WEIGHT_BYTES);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }

    float(&flat)[ROW_FRAGMENTS * TOKEN_TILES][4] = reinterpret_cast<float(&)[ROW_FRAGMENTS * TOKEN_TILES][4]>(sums);
    if (!add_slices(flat, p)) return;
    const int row = row_tile * TILE_ROWS + warp_row + lane / 4, token = first_token + lane % 4 * 2;
#pragma unroll
    for (int r = 0; r < ROW_FRAGMENTS; r++) store(p.epilogue, token, row + r * 16, sums[r]);
}

#define INT4_LINEAR(TOKENS, ROW_FRAGMENTS, STAGES)                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS) int4_linear_##TOKENS(                                         \
        const uint16* x, const uint8* __restrict__ packed, const float* __restrict__ bias, uint16* out,    \
        float* residual, float4* partials, uint32* arrivals, int num_tokens, int num_rows, int num_columns,             \
        int tiles_per_slice, int gated) {                                                                               \
        const Epilogue epilogue = {bias, out, residual, num_tokens, num_rows, gated != 0};                              \
        int4_linear<TOKENS / 8, ROW_FRAGMENTS, STAGES>(                                                                 \
            {x, packed, epilogue, partials, arrivals, num_columns, tiles_per_slice});                                   \
    }

// stages: as many as keep two blocks of the widest kernels, and more of the narrow ones, on a multiprocessor
INT4_LINEAR(8, 1, 6)
INT4_LINEAR(16, 1, 5)
INT4_LINEAR(32, 2, 4)
INT4_LINEAR(64, 2, 3)
