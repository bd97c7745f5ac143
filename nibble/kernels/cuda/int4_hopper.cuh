// What the INT4 kernels for sm_90a share: how K is cut, the ring's bookkeeping, a warp's weights.
#pragma once
#include "hopper.cuh"
#include "int4_tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define MEMBER __device__ __forceinline__

// The order of additions, and with it batch invariance: the column tiles are cut into 8 slices, each added up in the
// tensor core's accumulators in order of K. A run (below) adds its even slices in order, its odd ones, and these two;
// then the runs are added. All of it depends on the weight's shape alone, not on the tokens nor on the device; an
// element of a product does not depend on the other columns, and has the same bits by mma.sync and by wgmma.
constexpr int SLICES = 8;
constexpr int PAIRS = SLICES / 2;

DEVICE int first_tile(int slice, int num_tiles) { return slice * num_tiles / SLICES; }

// A task is a pair of slices of a group of 4 row tiles. In row-major order, runs of tasks as equal as can be.
constexpr int GROUP_TILES = 4;
constexpr int MAX_RUNS = 66;  // one for every two of an H100's 132 multiprocessors

struct Runs {
    int num_tasks, num_runs;

    MEMBER explicit Runs(int num_rows) {
        num_tasks = (num_rows + GROUP_TILES * TILE_ROWS - 1) / (GROUP_TILES * TILE_ROWS) * PAIRS;
        num_runs = min(MAX_RUNS, num_tasks);
    }

    MEMBER int first(int run) const { return run * num_tasks / num_runs; }
    MEMBER int owner(int task) const { return ((task + 1) * num_runs - 1) / num_tasks; }
};

constexpr int PANEL_COLUMNS = 64;  // of x: 128 bytes per token, swizzled
constexpr int PANELS = TILE_COLUMNS / PANEL_COLUMNS;
constexpr int STEPS = PANEL_COLUMNS / 16;

// A stage of a ring, and the parity of its barriers in this round. Waiting for a parity only tells a phase from the one
// before it, so whoever waits must have waited in the round before, too: stages are a multiple of the teams that take turns.
// With 11 stages for two teams one could run ahead of bytes that were still on their way to the other, two rounds at once.
template <int STAGES>
struct Place {
    int slot = 0, parity = 0;

    MEMBER void advance(int by = 1) {
        slot += by;
        if (slot >= STAGES) slot -= STAGES, parity ^= 1;
    }
};

// Of a tile; a group of 128 columns does not fit a ragged one
DEVICE int tile_width(int tile, int num_columns) {
    return GROUP_SIZE == TILE_COLUMNS ? TILE_COLUMNS : min(TILE_COLUMNS, num_columns - tile * TILE_COLUMNS);
}

// A warp's 16 rows of a tile, and where a lane finds its own
struct Fragments {
    uint32 words[PANELS][STEPS], nibbles, scales, scale_place, scale[2], minimum[2];
    int columns, fragment;

    // tile: the first one's place in shared memory; row_fragment: 0 .. 3. Once, so that a tile takes few instructions.
    MEMBER void find(uint32 tile, int row_fragment, int lane) {
        nibbles = tile + lane * 16;
        scales = tile + (row_fragment * 16 + lane / 4) * 4;
        if (GROUP_SIZE == TILE_COLUMNS) nibbles += row_fragment * 8 * TILE_COLUMNS, scales += NIBBLE_BYTES;
        fragment = row_fragment;
        asm volatile("" : "+r"(nibbles), "+r"(scales));  // registers: not to be computed again
    }

    // offset: of another tile from the first one
    MEMBER void load(uint32 offset, int num_columns) {
        columns = num_columns;
        uint32 from = nibbles + offset;
        scale_place = scales + offset;
        if (GROUP_SIZE < TILE_COLUMNS) from += fragment * 8 * columns, scale_place += columns * (TILE_ROWS / 2);
#pragma unroll
        for (int h = 0; h < PANELS; h++)  // ldmatrix of consecutive 16-byte rows: lane l gets the l-th word of 128 bytes
            load_matrices(words[h], from + h * 512);
    }

    // 16 x 16 weights, asked for in order of columns
    MEMBER void get(uint32 (&a)[4], int h, int step) {
        const int column = h * PANEL_COLUMNS + step * 16;
        if (column % GROUP_SIZE == 0) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32 both = load_shared(scale_place + column / GROUP_SIZE * GROUP_BYTES + r * 32);
                if (GROUP_SIZE < TILE_COLUMNS && column >= columns) both = 0;  // past a ragged tile: weights of zero
                scale[r] = broadcast_low(both);
                minimum[r] = broadcast_high(both);
            }
        }
        uint32 q[4];
        unpack(q, words[h][step]);
        scale_fragment(a, q, scale, minimum);
    }
};

#endif
