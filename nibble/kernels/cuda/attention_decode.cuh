// Decode attention, see attention_decode.cu: sizes, the layout of shared memory, the ring of stages, items of work.
#pragma once
#include "attention.cuh"
#include "attention_plan.cuh"

constexpr int WARPS = 8;  // that compute
constexpr int COMPUTING = WARPS * WARP;
constexpr int THREADS = COMPUTING + WARP;
constexpr int HEADS = 8;  // of a tile: the N of the products

constexpr int GROUP = 256;  // tokens
constexpr int STAGE = ROW_BYTES == 64 ? 256 : ROW_BYTES <= 128 ? 128 : ROW_BYTES <= 256 ? 64 : 32;  // tokens
constexpr int GROUP_STAGES = GROUP / STAGE;  // of keys, and as many of values
constexpr int KEY_TILES = GROUP / 16 / WARPS;  // of 16 tokens per warp: tiles w and w + 8 are warp w's
static_assert(SPLIT_TOKENS % GROUP == 0 && ENTRY_BLOCKS * BLOCK_TOKENS == GROUP, "a group must not cross a split");

constexpr int DIM_TILES = D / 16;
constexpr int WARP_DIM_TILES = DIM_TILES > WARPS ? DIM_TILES / WARPS : 1;
constexpr int TOKEN_PARTS = DIM_TILES * 2 <= WARPS ? 2 : 1;  // D = 64: two warps share 16 dimensions, and halve the tokens
constexpr int STEPS = D / 16;                                // of 16 along D in a score

// ---- shared memory --------------------------------------------------------------------------------------------------------

using Rows = SharedRows<ROW_BYTES>;
constexpr int STAGE_BYTES = STAGE * Rows::STRIDE;
// What comes with a group's keys: (scale, zero) of keys and values, the item's entry, q and the rope table's row; with a
// row's last group also the new token's k and v
constexpr int PARAMETER_BYTES = IS_FP16 ? 0 : GROUP * 4;
constexpr int Q_STRIDE = 2 * D + 32;  // bytes; shifts each head by 8 banks
constexpr int SIDE_VALUE_PARAMETERS = PARAMETER_BYTES;
constexpr int SIDE_Q = 2 * PARAMETER_BYTES;
constexpr int SIDE_TABLE = SIDE_Q + HEADS * Q_STRIDE;
constexpr int SIDE_KEY = SIDE_TABLE + D * 4;
constexpr int SIDE_VALUE = SIDE_KEY + 2 * D;
constexpr int SIDE_ENTRY = SIDE_VALUE + 2 * D;
constexpr int SIDE_BYTES = SIDE_ENTRY + int(sizeof(SplitEntry));

constexpr int WEIGHT_STRIDE = GROUP * 2 + 16;  // bytes of a head's weights; shifts each head by 4 banks
constexpr int WEIGHTS = 0;
constexpr int MAXIMA = WEIGHTS + HEADS * WEIGHT_STRIDE;     // float [WARPS][HEADS]
constexpr int SUMS = MAXIMA + WARPS * HEADS * 4;            // float2 [WARPS][HEADS]
constexpr int PARTS = SUMS + WARPS * HEADS * 8;             // float4 [WARPS / 2][WARP]
constexpr int Q_SUMS = PARTS + (TOKEN_PARTS - 1) * WARPS / 2 * WARP * 16;
constexpr int IS_LAST = Q_SUMS + HEADS * 4;
constexpr int MAX_STAGES = 6;
constexpr int FULL = IS_LAST + 16;          // uint64 [MAX_STAGES]: barriers
constexpr int FREE = FULL + MAX_STAGES * 8;  // the same
constexpr int NUM_SIDES = 2;
constexpr int SIDE_FREE = FREE + MAX_STAGES * 8;  // uint64 [NUM_SIDES]
constexpr int SIDES = SIDE_FREE + NUM_SIDES * 8;

// Leaves room for a thread block of the next kernel beside this one, or for a second one of this
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int SHARED_BYTES = 113 * 1024;
constexpr int BLOCKS_PER_MULTIPROCESSOR = D <= 128 ? 2 : 1;  // head_dim 256 needs more registers
#else
constexpr int SHARED_BYTES = 99 * 1024;
constexpr int BLOCKS_PER_MULTIPROCESSOR = 1;
#endif
constexpr int RING = SIDES + NUM_SIDES * SIDE_BYTES;
constexpr int shared_bytes(int stages) { return RING + stages * STAGE_BYTES; }
constexpr int STAGES = shared_bytes(6) <= SHARED_BYTES ? 6 : shared_bytes(5) <= SHARED_BYTES ? 5 : 4;
static_assert(shared_bytes(STAGES) <= SHARED_BYTES, "the ring is too large");
static_assert(RING % 16 == 0 && SIDES % 16 == 0 && SIDE_BYTES % 16 == 0, "copies need 16-byte alignment");

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

    // Computing warps, when they have used the stage
    __device__ __forceinline__ void release() const {
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(free());
    }
};

// The side of a group, full when the first stage of its keys is
struct Side {
    int index = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        index ^= 1;
        parity ^= index == 0;
    }
    __device__ __forceinline__ uint8* bytes() const { return shared + SIDES + index * SIDE_BYTES; }
    __device__ __forceinline__ uint32 free() const { return shared_address(shared + SIDE_FREE + index * 8); }

    __device__ __forceinline__ void release() const {
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(free());
    }
};
static_assert(NUM_SIDES == 2, "they alternate");

DEVICE void computing_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING) : "memory"); }

// ---- what is to be done ---------------------------------------------------------------------------------------------------

struct Arguments {
    const uint16* qkv;
    uint8* kv_cache;
    const int* block_tables;
    const float* table;  // null: q is rotated and this token's k and v are in the cache already
    int* plan;
    float* sums;    // of splits: [entry][item head][head of the tile][D]
    float2* stats;  // their (maximum, sum of weights)
    uint16* out;
    int num_counters, max_blocks, num_heads, num_kv_heads;

    __device__ __forceinline__ int group_size() const { return num_heads / num_kv_heads; }
    __device__ __forceinline__ int tiles() const { return (group_size() + HEADS - 1) / HEADS; }
    __device__ __forceinline__ int row_size() const { return (num_heads + 2 * num_kv_heads) * D; }

    __device__ __forceinline__ const int* entry(int index) const {
        constexpr int WORDS = sizeof(SplitEntry) / 4;
        return plan + PLAN_HEADER + num_counters + index / (num_kv_heads * tiles()) * WORDS;
    }

    // Whether this group of a split holds the row's newest token, whose k and v are still in qkv
    __device__ __forceinline__ bool has_new_token(int at, int stop, int context) const {
        return table != nullptr && stop == context && at + GROUP >= stop && at < stop;
    }
};

// A kv head and up to 8 of its query heads
struct HeadTile {
    int index, kv_head, first_head, num_heads;

    __device__ __forceinline__ HeadTile(const Arguments& a, int item) {
        index = item % (a.num_kv_heads * a.tiles());
        kv_head = index / a.tiles();
        int first = index % a.tiles() * HEADS;  // of the kv head's
        first_head = kv_head * a.group_size() + first;
        num_heads = min(HEADS, a.group_size() - first);
    }
    // Of the tiles that share a kv head one appends
    __device__ __forceinline__ bool appends(const Arguments& a) const { return index % a.tiles() == 0; }
};
