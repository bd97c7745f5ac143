// Decode attention, see attention_decode.cu: sizes, the layout of shared memory, the ring of stages.
#pragma once
#include "attention.cuh"
#include "attention_plan.cuh"

constexpr int WARPS = 8;  // that compute
constexpr int COMPUTING = WARPS * WARP;
constexpr int THREADS = COMPUTING + 2 * WARP;
constexpr int HEADS = 8;  // of a tile: the N of the products

constexpr int GROUP = 256;  // tokens
constexpr int GROUP_BLOCKS = GROUP / BLOCK_TOKENS;
constexpr int STAGE = ROW_BYTES == 64 ? 256 : ROW_BYTES <= 128 ? 128 : ROW_BYTES <= 256 ? 64 : 32;  // tokens
constexpr int GROUP_STAGES = GROUP / STAGE;  // of keys, and as many of values
constexpr int KEY_TILES = GROUP / 16 / WARPS;  // of 16 tokens per warp: tiles w and w + 8 are warp w's
static_assert(SPLIT_TOKENS % GROUP == 0, "a group must not cross a split");

constexpr int DIM_TILES = D / 16;
constexpr int WARP_DIM_TILES = DIM_TILES > WARPS ? DIM_TILES / WARPS : 1;
constexpr int TOKEN_PARTS = DIM_TILES * 2 <= WARPS ? 2 : 1;  // D = 64: two warps share 16 dimensions, and halve the tokens
constexpr int VALUE_WARPS = DIM_TILES * TOKEN_PARTS < WARPS ? DIM_TILES * TOKEN_PARTS : WARPS;  // that multiply values

// ---- shared memory --------------------------------------------------------------------------------------------------------

using Rows = SharedRows<ROW_BYTES>;
constexpr int STAGE_BYTES = STAGE * Rows::STRIDE;

// With a group's keys come the (scale, zero) of its keys and values
constexpr int PARAMETER_BYTES = HAS_TOKEN_SCALES ? GROUP * 4 : 0;
constexpr int SCALES_BYTES = 2 * PARAMETER_BYTES;

// What a piece of work has beside keys and values: q, the rope table's row, the new token's k and v, the piece itself,
// its kv head's channels
constexpr int Q_STRIDE = 2 * D + 32;  // bytes; shifts each head by 8 banks
constexpr int SIDE_TABLE = HEADS * Q_STRIDE;
constexpr int SIDE_KEY = SIDE_TABLE + D * 4;
constexpr int SIDE_VALUE = SIDE_KEY + 2 * D;
constexpr int SIDE_PIECE = SIDE_VALUE + 2 * D;
constexpr int SIDE_PARAMETERS = SIDE_PIECE + 32;  // (scale, zero) of the new token's k and v
constexpr int SIDE_CHANNELS = SIDE_PARAMETERS + 16;
constexpr int SIDE_BYTES = SIDE_CHANNELS + (HAS_CHANNELS ? CHANNEL_FLOATS * 4 : 0);

constexpr int WEIGHT_STRIDE = GROUP * 2 + 16;  // bytes of a head's weights; shifts each head by 4 banks
constexpr int WEIGHTS = 0;
constexpr int FACTORS = WEIGHTS;  // float2 [HEADS][MAX_SPLITS], when nobody needs weights
static_assert(MAX_SPLITS * 8 <= WEIGHT_STRIDE, "factors do not fit");
constexpr int MAXIMA = WEIGHTS + HEADS * WEIGHT_STRIDE;     // float [WARPS][HEADS]
constexpr int SUMS = MAXIMA + WARPS * HEADS * 4;            // float4 [WARPS][4]
constexpr int PARTS = SUMS + WARPS * 4 * 16;                // float4 [WARPS / 2][WARP]
constexpr int Q_SUMS = PARTS + (TOKEN_PARTS - 1) * WARPS / 2 * WARP * 16;
constexpr int IS_LAST = Q_SUMS + HEADS * 4;
constexpr int MAX_STAGES = 6;
constexpr int FULL = IS_LAST + 16;            // uint64 [MAX_STAGES]: barriers
constexpr int FREE = FULL + MAX_STAGES * 8;   // the same
constexpr int SCALES_FREE = FREE + MAX_STAGES * 8;  // uint64 [2]
constexpr int SIDE_FULL = SCALES_FREE + 2 * 8;
constexpr int SIDE_FREE = SIDE_FULL + 2 * 8;
constexpr int SIDE_NEW = SIDE_FREE + 2 * 8;  // uint64 [2 sides][2]: the new token's key, its value
constexpr int SCALES = SIDE_NEW + 4 * 8;
constexpr int SIDES = SCALES + 2 * SCALES_BYTES;
// 32 bytes that lie together in memory do so in shared memory: a version with the ring at 16 more was 9 % slower
constexpr int RING = (SIDES + 2 * SIDE_BYTES + 63) / 64 * 64;

// Leaves room for a thread block of the next kernel beside this one, or for a second one of this
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int SHARED_BYTES = 113 * 1024;
constexpr int BLOCKS_PER_MULTIPROCESSOR = D <= 128 ? 2 : 1;  // head_dim 256 needs more registers
#else
constexpr int SHARED_BYTES = 99 * 1024;
constexpr int BLOCKS_PER_MULTIPROCESSOR = 1;
#endif
constexpr int shared_bytes(int stages) { return RING + stages * STAGE_BYTES; }
constexpr int STAGES = shared_bytes(6) <= SHARED_BYTES ? 6 : shared_bytes(5) <= SHARED_BYTES ? 5 : 4;
static_assert(shared_bytes(STAGES) <= SHARED_BYTES, "the ring is too large");
static_assert(STAGE_BYTES % 64 == 0 && SCALES % 16 == 0 && SIDES % 16 == 0 && SIDE_BYTES % 16 == 0, "copies need alignment");

extern __shared__ __align__(128) uint8 shared[];

// A place in the ring, and the parity of the phase that its barriers are in
struct Place {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        stage++;
        if (stage == STAGES) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint8* bytes() const { return shared + RING + stage * STAGE_BYTES; }
    __device__ __forceinline__ uint32 full() const { return shared_address(shared + FULL + stage * 8); }
    __device__ __forceinline__ uint32 free() const { return shared_address(shared + FREE + stage * 8); }
};

// One of two places that take turns
struct Turn {
    int index = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        index ^= 1;
        parity ^= index == 0;
    }
};

// The (scale, zero) of a group, full when the first stage of its keys is
struct Scales : Turn {
    __device__ __forceinline__ uint8* bytes() const { return shared + SCALES + index * SCALES_BYTES; }
    __device__ __forceinline__ uint32 free() const { return shared_address(shared + SCALES_FREE + index * 8); }
};

struct Side : Turn {
    __device__ __forceinline__ uint8* bytes() const { return shared + SIDES + index * SIDE_BYTES; }
    __device__ __forceinline__ uint32 full() const { return shared_address(shared + SIDE_FULL + index * 8); }
    __device__ __forceinline__ uint32 free() const { return shared_address(shared + SIDE_FREE + index * 8); }
    // That the new token's key (which 0) or value (1) is quantised
    __device__ __forceinline__ uint32 has_new(int which) const {
        return shared_address(shared + SIDE_NEW + index * 16 + which * 8);
    }
};

// What is free and what is new says every thread for itself: __syncwarp() and one lane's arrival take as long, and racecheck
// does not follow that order.
DEVICE void init_barriers() {
    if (threadIdx.x < STAGES) {
        init_barrier(shared_address(shared + FULL + threadIdx.x * 8), WARP);
        init_barrier(shared_address(shared + FREE + threadIdx.x * 8), COMPUTING);
    }
    if (threadIdx.x < 2) {
        init_barrier(shared_address(shared + SCALES_FREE + threadIdx.x * 8), COMPUTING);
        init_barrier(shared_address(shared + SIDE_FULL + threadIdx.x * 8), WARP + 1);
        init_barrier(shared_address(shared + SIDE_FREE + threadIdx.x * 8), COMPUTING);
        init_barrier(shared_address(shared + SIDE_NEW + threadIdx.x * 16), WARP);
        init_barrier(shared_address(shared + SIDE_NEW + threadIdx.x * 16 + 8), WARP);
    }
}

DEVICE void computing_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory"); }
