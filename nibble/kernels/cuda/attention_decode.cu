// One query row per sequence over its paged keys and values (DECODE): rotate q and k, quantise and append this token's
// k and v, attend, combine the splits, all in one kernel per layer.
//
//   out[h] = sum_p w_p v_p / sum_p w_p,  w_p = exp((q_h k_p) / sqrt(D)),  k_p = scale_p k8_p + zero_p (v alike)
//
// qkv fp16 (T, (heads + 2 kv heads) D), cache (blocks, kv heads, head block of layout.py), out fp16 (T, heads D).
//
// Work: an item is (query row, split of its context, kv head, tile of up to 8 of its query heads); all heads of a tile
// share one reading of K and V. The grid is fixed; each thread block takes items at a stride of the grid's size and goes
// through an item in groups of 256 tokens. One warp copies: it runs through the block's items ahead of the others, keys
// and values of a group alternating, into a ring of 16 KB stages in shared memory. Eight warps compute; barriers in
// shared memory say which stages are full and which are free, so memory is never idle between items.
//
//   keys:    a warp has 32 of the group's tokens: scores^T (tokens x heads) = K (A operand) q^T (B operand).
//            INT8 keys become fp16 in registers, exactly; scale and zero are applied to the fp32 score:
//            q k_p = scale_p (q k8_p) + zero_p sum(q). Softmax weights times the value's scale go to shared memory.
//   values:  a warp has 16 of the D dimensions: out^T (dims x heads) += V^T (A operand) weights^T (B operand).
//            sum_p w_p zero_p is the same for all dimensions and is added at the end.
//
// ldmatrix moves 16-bit units. Of INT8 keys a thread so gets 4 neighbouring bytes of a row, where the product wants 2
// and 2: q's elements are permuted alike, (0, 2), (1, 3) of each 4. Of INT8 values (transposed) it gets 2 neighbouring
// dimensions of 2 tokens: even bytes are a tile's row g, odd ones its row g + 8, so row g is dimension 2g, g + 8 is 2g + 1.
//
// Weights are scaled by 2^6: below 6e-5 fp16 loses bits, and the values' scales may be small. They stay below
// 64 * 514 (the largest scale there is), which fp16 holds.
//
// The new token is the last position of a row's last split: its keys and values never come from the cache but are
// written to the ring by the warps that need them first (bit for bit what they write to the cache). That takes a ring
// that holds all keys of a group: attention.py appends with a kernel of its own where rows are too long for it.
//
// A row of more than one split leaves unnormalised sums per split; the thread block that finishes last (a counter per
// row and head tile, left at zero) adds them up in the order of the splits. Every number is computed from the row's own
// context in an order fixed by positions, so a row's result does not depend on the batch.
//
// Bytes moved: per token and kv head 2 D + 8 (INT8) or 4 D (fp16); the split sums stay in L2.
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

// ---- copying ----------------------------------------------------------------------------------------------------------------

DEVICE void copy_pieces(uint32 to, const void* from, int num_pieces) {
    for (int i = threadIdx.x % WARP; i < num_pieces; i += WARP)
        copy_16_async(to + i * PIECE, static_cast<const uint8*>(from) + i * PIECE);
}

// The copying warp. Lane l has word l of the item's entry.
struct Producer {
    Place place;
    Side side;

    __device__ __forceinline__ void run(const Arguments& a, int num_items) {
        int lane = threadIdx.x % WARP, word_index = min(lane, int(sizeof(SplitEntry)) / 4 - 1);
        int next = a.entry(blockIdx.x)[word_index];
        for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
            int word = next;
            if (item + gridDim.x < num_items) next = a.entry(item + gridDim.x)[word_index];
            HeadTile tile(a, item);
            int row = __shfl_sync(FULL_WARP, word, 0), sequence = __shfl_sync(FULL_WARP, word, 1);
            int start = __shfl_sync(FULL_WARP, word, 2), stop = __shfl_sync(FULL_WARP, word, 3);
            int context = __shfl_sync(FULL_WARP, word, 4);
            int block = __shfl_sync(FULL_WARP, word, 8 + lane % ENTRY_BLOCKS);
            int at = start;
            do {  // once for an empty split, too
                if (at > start) {
                    int index = at / BLOCK_TOKENS + lane % ENTRY_BLOCKS;
                    block = index * BLOCK_TOKENS < stop ? a.block_tables[int64(sequence) * a.max_blocks + index] : 0;
                }
                bool has_new = a.has_new_token(at, stop, context);
                int used = min(GROUP, stop - at), cached = used - has_new;
                wait_barrier(side.free(), side.parity ^ 1);
                wait_barrier(place.free(), place.parity ^ 1);
                copy_item(a, item, tile, row, context);
                if (has_new) copy_new_token(a, tile, row);
                if constexpr (!IS_FP16) copy_parameters(a, tile, block, cached);
                copy_group(a, tile, block, cached, used, 0);
                copy_group(a, tile, block, cached, used, 1);
                side.advance();
                at += GROUP;
            } while (at < stop);
        }
    }

    __device__ __forceinline__ void copy_item(const Arguments& a, int item, const HeadTile& tile, int row,
                                              int context) const {
        uint32 to = shared_address(side.bytes());
        copy_pieces(to + SIDE_ENTRY, a.entry(item), sizeof(SplitEntry) / PIECE);
        const uint16* q = a.qkv + int64(row) * a.row_size() + tile.first_head * D;
        constexpr int HEAD_PIECES = 2 * D / PIECE;
        for (int i = threadIdx.x % WARP; i < tile.num_heads * HEAD_PIECES; i += WARP)
            copy_16_async(to + SIDE_Q + i / HEAD_PIECES * Q_STRIDE + i % HEAD_PIECES * PIECE, q + i * (PIECE / 2));
        if (a.table != nullptr && context > 0)
            copy_pieces(to + SIDE_TABLE, a.table + int64(context - 1) * D, D * 4 / PIECE);
    }

    __device__ __forceinline__ void copy_new_token(const Arguments& a, const HeadTile& tile, int row) const {
        const uint16* k = a.qkv + int64(row) * a.row_size() + (a.num_heads + tile.kv_head) * D;
        copy_pieces(shared_address(side.bytes() + SIDE_KEY), k, 2 * D / PIECE);
        copy_pieces(shared_address(side.bytes() + SIDE_VALUE), k + a.num_kv_heads * D, 2 * D / PIECE);
    }

    __device__ __forceinline__ const uint8* head_block(const Arguments& a, const HeadTile& tile, int block,
                                                       int index) const {
        int64 id = __shfl_sync(FULL_WARP, block, index);
        return a.kv_cache + (id * a.num_kv_heads + tile.kv_head) * HEAD_BLOCK_BYTES;
    }

    __device__ __forceinline__ void copy_parameters(const Arguments& a, const HeadTile& tile, int block,
                                                    int cached) const {
        constexpr int PIECES = BLOCK_TOKENS * 4 / PIECE;  // of keys; then as many of values
        static_assert(2 * PIECES == WARP, "one pass");
        int piece = threadIdx.x % PIECES, is_value = threadIdx.x % WARP / PIECES;
        uint32 to = shared_address(side.bytes()) + is_value * SIDE_VALUE_PARAMETERS + piece * PIECE;
#pragma unroll 1
        for (int b = 0; b < ENTRY_BLOCKS; b++) {
            const uint8* from = head_block(a, tile, block, b) + KEY_PARAMETERS + (threadIdx.x % WARP) * PIECE;
            if (b * BLOCK_TOKENS + piece * 4 < cached) copy_16_async(to + b * BLOCK_TOKENS * 4, from);
        }
    }

    // Keys (which 0) or values (1) of the group's tokens, stage by stage
    __device__ __forceinline__ void copy_group(const Arguments& a, const HeadTile& tile, int block, int cached, int used,
                                               int which) {
        constexpr int RUN = STAGE < BLOCK_TOKENS ? STAGE : BLOCK_TOKENS;  // tokens that lie one after the other
#pragma unroll 1
        for (int first = 0; first < max(used, 1); first += STAGE) {
            if (which == 1 || first > 0) wait_barrier(place.free(), place.parity ^ 1);
            uint8* stage = place.bytes();
#pragma unroll 1
            for (int run = first; run < first + STAGE; run += RUN) {
                const uint8* from = head_block(a, tile, block, run / BLOCK_TOKENS) + which * VALUES_START +
                                    run % BLOCK_TOKENS * ROW_BYTES;
                copy_run<RUN>(stage, run - first, from, cached - run, IS_FP16 && which == 1 ? used - run : RUN);
            }
            arrive_after_copies(place.full());
            place.advance();
        }
    }

    // Rows of a stage from `row` on: those before `cached` are copied, those from `used` on become zeros, because a
    // weight of 0 times what happens to lie there must not be NaN (INT8 has no NaN).
    template <int RUN>
    static __device__ __forceinline__ void copy_run(uint8* stage, int row, const uint8* from, int cached, int used) {
        // Rows that the warp covers in a whole number of passes and after which the permutation repeats: few offsets
        constexpr int PERIOD = Rows::PIECES % 4 == 0 ? 8 : 16, PASSES = PERIOD * Rows::PIECES / WARP;
        static_assert(PERIOD * Rows::PIECES % WARP == 0 && RUN % PERIOD == 0, "whole passes");
        int lane = threadIdx.x % WARP;
        uint32 to = shared_address(stage) + row * Rows::STRIDE;
#pragma unroll 2
        for (int k = 0; k < RUN; k += PERIOD) {
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                int index = lane + i * WARP, token = index / Rows::PIECES;
                if (k + token < cached || k + token >= used)
                    copy_16_async(to + Rows::offset(token, index % Rows::PIECES), from + index * PIECE,
                                  k + token < cached);
            }
            to += PERIOD * Rows::STRIDE;
            from += PERIOD * ROW_BYTES;
        }
    }
};

// ---- computing ----------------------------------------------------------------------------------------------------------------

// q of a tile's heads in the side becomes the B operand: rotated, for INT8 keys permuted (each 4 elements as 0, 2, 1, 3);
// q's sums. Each warp has one head.
DEVICE void prepare_queries(const Arguments& a, const HeadTile& tile, uint8* side) {
    int head = threadIdx.x / WARP;
    uint16* at = reinterpret_cast<uint16*>(side + SIDE_Q + head * Q_STRIDE);
    HeadRow row;
    row.load(at);
    if (head >= tile.num_heads) row.clear();
    if (a.table != nullptr) row.rotate_all(reinterpret_cast<const float*>(side + SIDE_TABLE));
    __syncwarp();
    if constexpr (IS_FP16) {
        row.store(at);
    } else {
        row.store_permuted(at);
        float sum = warp_sum(row.sum());
        if (threadIdx.x % WARP == 0) reinterpret_cast<float*>(shared + Q_SUMS)[head] = sum;
    }
    computing_barrier();
}

constexpr float SCORE_SCALE = (D == 64 ? 0.125f : D == 96 ? 0.10206207262f : D == 128 ? 0.08838834765f : 0.0625f) *
                              1.44269504089f;  // 1 / sqrt(D), and softmax in powers of two
constexpr float WEIGHT_EXPONENT = 6.0f;

// The state of an item. Lane (g, t) of every warp: maxima and sums of heads 2t, 2t + 1; acc: D-fragments of out^T.
struct State {
    float maximum[2], total[2], zeros[2];  // total and zeros: of this lane's tokens alone; scaled by 2^6
    float acc[WARP_DIM_TILES][2][4];       // steps of 16 tokens alternate between two sums: products wait less

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            maximum[j] = negative_infinity();
            total[j] = zeros[j] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][0][j] = acc[i][1][j] = 0.0f;
    }

    // q k of 16 tokens, rows `row` and on of a stage: scores[2 r + j] of token 8 r + g, head 2 t + j
    static __device__ __forceinline__ void products(const uint8* stage, int row, const uint8* side, float (&scores)[4]) {
        int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        uint32 from = shared_address(stage);
        const uint8* q_from = side + SIDE_Q + g * Q_STRIDE + t * (IS_FP16 ? 4 : 8);
        scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
        for (int p = 0; p < Rows::PIECES; p += 2) {
            uint32 k[4];
            load_matrices(k, from + Rows::offset(row + lane % 16, p + lane / 16));
            if constexpr (IS_FP16) {
                mma_16816(scores, k, *reinterpret_cast<const uint32*>(q_from + p * 16),
                          *reinterpret_cast<const uint32*>(q_from + p * 16 + 16));
            } else {
                uint32 a[4] = {even_bytes_to_half2(k[0]), even_bytes_to_half2(k[1]), odd_bytes_to_half2(k[0]),
                               odd_bytes_to_half2(k[1])};
                uint2 q = *reinterpret_cast<const uint2*>(q_from + p * 32);
                mma_16816(scores, a, q.x, q.y);
                uint32 b[4] = {even_bytes_to_half2(k[2]), even_bytes_to_half2(k[3]), odd_bytes_to_half2(k[2]),
                               odd_bytes_to_half2(k[3])};
                q = *reinterpret_cast<const uint2*>(q_from + p * 32 + 32);
                mma_16816(scores, b, q.x, q.y);
            }
        }
    }

    // Scores of this warp's two tiles of a group's tokens, of which `count` count; -inf for those that don't.
    // `place` goes on to the values.
    __device__ __forceinline__ void multiply_keys(Place& place, const uint8* side, int count,
                                                  float (&scores)[KEY_TILES][4]) const {
        int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
        float2 q_sums = reinterpret_cast<const float2*>(shared + Q_SUMS)[threadIdx.x % 4];  // of heads 2t and 2t + 1
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++)
            scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = negative_infinity();
#pragma unroll
        for (int s = 0; s < GROUP_STAGES; s++) {
            if (s > 0 && s * STAGE >= count) break;
            wait_barrier(place.full(), place.parity);
#pragma unroll
            for (int i = 0; i < KEY_TILES; i++) {
                int token = (warp + i * WARPS) * 16;
                bool may_be_here = STAGE == GROUP || s * STAGE / (16 * WARPS) == i;
                if (!may_be_here || token / STAGE != s) continue;
                products(place.bytes(), token % STAGE, side, scores[i]);
#pragma unroll
                for (int r = 0; r < 2; r++) 
                    scale(side, token + 8 * r + g, count, q_sums, scores[i][2 * r], scores[i][2 * r + 1]);
            }
            place.release();
            place.advance();
        }
    }

    // The scores of a token with this lane's two heads
    static __device__ __forceinline__ void scale(const uint8* side, int token, int count, float2 q_sums, float& first,
                                                 float& second) {
        float scale = SCORE_SCALE;
        if constexpr (IS_FP16) {
            first *= scale;
            second *= scale;
        } else {
            uint32 parameters = reinterpret_cast<const uint32*>(side)[token];
            scale *= low_half(parameters);
            float zero = high_half(parameters) * SCORE_SCALE;
            first = fmaf(zero, q_sums.x, first * scale);
            second = fmaf(zero, q_sums.y, second * scale);
        }
        first = token < count ? first : negative_infinity();
        second = token < count ? second : negative_infinity();
    }

    // Raises the maxima to those of all warps' scores
    __device__ __forceinline__ void raise_maxima(const float (&scores)[KEY_TILES][4]) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
        float* maxima = reinterpret_cast<float*>(shared + MAXIMA);
        float best[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            best[j] = negative_infinity();
#pragma unroll
            for (int i = 0; i < KEY_TILES; i++) best[j] = fmaxf(best[j], fmaxf(scores[i][j], scores[i][2 + j]));
#pragma unroll
            for (int offset = 4; offset < WARP; offset *= 2)
                best[j] = fmaxf(best[j], __shfl_xor_sync(FULL_WARP, best[j], offset));
        }
        if (lane < 4) *reinterpret_cast<float2*>(maxima + warp * HEADS + 2 * t) = make_float2(best[0], best[1]);
        computing_barrier();
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = *reinterpret_cast<const float2*>(maxima + w * HEADS + 2 * t);
            best[0] = fmaxf(best[0], other.x);
            best[1] = fmaxf(best[1], other.y);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            best[j] = fmaxf(best[j], maximum[j]);
            // No score at all (there is no token, or all are NaN): no NaN made of -inf - -inf
            float correction = best[j] == negative_infinity() ? 1.0f : exp2_fast(maximum[j] - best[j]);
            maximum[j] = best[j];
            total[j] *= correction;
            zeros[j] *= correction;
#pragma unroll
            for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    acc[i][c][j] *= correction;
                    acc[i][c][2 + j] *= correction;
                }
        }
    }

    // Scores to weights, in shared memory, and their sums
    __device__ __forceinline__ void weigh(const uint8* side, int count, const float (&scores)[KEY_TILES][4]) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        uint16* weights = reinterpret_cast<uint16*>(shared + WEIGHTS + 2 * t * WEIGHT_STRIDE);
        float base[2];
#pragma unroll
        for (int j = 0; j < 2; j++)
            base[j] = maximum[j] == negative_infinity() ? 0.0f : maximum[j] - WEIGHT_EXPONENT;
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = (warp + i * WARPS) * 16 + 8 * r + g;
                float scale = 1.0f, zero = 0.0f;
                if constexpr (!IS_FP16) {
                    uint32 parameters = reinterpret_cast<const uint32*>(side + SIDE_VALUE_PARAMETERS)[token];
                    parameters = token < count ? parameters : 0;  // what is there may be NaN
                    scale = low_half(parameters);
                    zero = high_half(parameters);
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float weight = exp2_fast(scores[i][2 * r + j] - base[j]);
                    total[j] += weight;
                    zeros[j] = fmaf(weight, zero, zeros[j]);
                    weights[j * (WEIGHT_STRIDE / 2) + token] = float_to_half(weight * scale);
                }
            }
    }

    // Values of a group, of which `count` tokens count, times their weights
    __device__ __forceinline__ void multiply_values(Place& place, int count) {
#pragma unroll
        for (int s = 0; s < GROUP_STAGES; s++) {
            if (s > 0 && s * STAGE >= count) break;
            wait_barrier(place.full(), place.parity);
            if (threadIdx.x < DIM_TILES * TOKEN_PARTS * WARP) multiply_stage(place.bytes(), s * STAGE);
            place.release();
            place.advance();
        }
    }

    __device__ __forceinline__ void multiply_stage(const uint8* stage, int first) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        uint32 from = shared_address(stage);
        uint32 weights = shared_address(shared + WEIGHTS) + lane % 8 * WEIGHT_STRIDE + lane / 8 * 16 + first * 2;
#pragma unroll
        for (int step = 0; step < STAGE / 32 / TOKEN_PARTS; step++) {
            int token = (step * TOKEN_PARTS + warp / DIM_TILES % TOKEN_PARTS) * 32;
            uint32 w[4];
            load_matrices(w, weights + token * 2);
#pragma unroll
            for (int i = 0; i < WARP_DIM_TILES; i++) {
                int tile = warp % DIM_TILES + i * WARPS;
                uint32 v[4];
                if constexpr (IS_FP16) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        int row = token + 16 * c + lane % 8 + lane / 16 * 8;
                        load_matrices_transposed(v, from + Rows::offset(row, 2 * tile + lane / 8 % 2));
                        mma_16816(acc[i][c], v, w[2 * c], w[2 * c + 1]);
                    }
                } else {
                    load_matrices_transposed(v, from + Rows::offset(token + lane, tile));
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        uint32 a[4] = {even_bytes_to_half2(v[2 * c]), odd_bytes_to_half2(v[2 * c]),
                                       even_bytes_to_half2(v[2 * c + 1]), odd_bytes_to_half2(v[2 * c + 1])};
                        mma_16816(acc[i][c], a, w[2 * c], w[2 * c + 1]);
                    }
                }
            }
        }
    }
};

// ---- the new token --------------------------------------------------------------------------------------------------------------
// Its key is needed by the warp that has that token, right away. Its value's (scale, zero) are needed after the barrier
// of the maxima, its value after that of the weights: another warp makes them, keeps the value in the side for a while
// and brings it to its stage when that is full.

struct NewToken {
    int token;           // in the group; below 0: not here
    uint8* head_block;   // in the cache, or null: another tile appends
    int offset;          // in the block

    __device__ __forceinline__ NewToken(const Arguments& a, const HeadTile& tile, const SplitEntry& entry, int at)
        : token(-1), head_block(nullptr) {
        if (!a.has_new_token(at, entry.stop, entry.context)) return;
        int position = entry.context - 1;
        token = position - at;
        offset = position % BLOCK_TOKENS;
        if (!tile.appends(a)) return;
        int64 block = a.block_tables[int64(entry.sequence) * a.max_blocks + position / BLOCK_TOKENS];
        head_block = a.kv_cache + (block * a.num_kv_heads + tile.kv_head) * HEAD_BLOCK_BYTES;
    }

    __device__ __forceinline__ bool is_key_warp() const { return threadIdx.x / WARP == token / 16 % WARPS; }
    __device__ __forceinline__ bool is_value_warp() const { return threadIdx.x / WARP == (token / 16 + 1) % WARPS; }

    // One warp: a row as it will be cached, to the cache and to where `place` says; its (scale, zero) to the side
    template <typename Place>
    __device__ __forceinline__ void write(const HeadRow& row, int which, uint8* parameters, Place place) const {
        uint8* row_to = head_block + which * VALUES_START + offset * ROW_BYTES;
        auto in_cache = [&](int byte) { return row_to + byte; };
        if constexpr (IS_FP16) {
            store_cached_row(row, place);
            if (head_block != nullptr) store_cached_row(row, in_cache);
        } else {
            QuantizedRow quantized(row);
            store_cached_row(quantized, place);
            if (threadIdx.x % WARP == 0) *reinterpret_cast<uint32*>(parameters + 4 * token) = quantized.parameters;
            if (head_block != nullptr) {
                store_cached_row(quantized, in_cache);
                uint8* to = head_block + KEY_PARAMETERS + (which * BLOCK_TOKENS + offset) * 4;
                if (threadIdx.x % WARP == 0) *reinterpret_cast<uint32*>(to) = quantized.parameters;
            }
        }
        __syncwarp();
    }

    // After the first stage of keys, which the side comes with, is full; keys: the group's first stage
    __device__ __forceinline__ void make(Place keys, uint8* side) const {
        HeadRow row;
        if (is_key_warp()) {
            for (int s = 0; s < token / STAGE; s++) keys.advance();
            wait_barrier(keys.full(), keys.parity);
            uint8* stage = keys.bytes();
            row.load(reinterpret_cast<const uint16*>(side + SIDE_KEY));
            row.rotate_all(reinterpret_cast<const float*>(side + SIDE_TABLE));
            write(row, 0, side, [&](int byte) {
                return stage + Rows::offset(token % STAGE, byte / PIECE) + byte % PIECE;
            });
        } else if (is_value_warp()) {
            row.load(reinterpret_cast<const uint16*>(side + SIDE_VALUE));
            __syncwarp();
            write(row, 1, side + SIDE_VALUE_PARAMETERS, [&](int byte) { return side + SIDE_VALUE + byte; });
        }
    }

    // values: the group's first stage of values
    __device__ __forceinline__ void place_value(Place values, const uint8* side) const {
        if (!is_value_warp()) return;
        for (int s = 0; s < token / STAGE; s++) values.advance();
        wait_barrier(values.full(), values.parity);
        for (int byte = threadIdx.x % WARP * 4; byte < ROW_BYTES; byte += WARP * 4)
            *reinterpret_cast<uint32*>(values.bytes() + Rows::offset(token % STAGE, byte / PIECE) + byte % PIECE) =
                *reinterpret_cast<const uint32*>(side + SIDE_VALUE + byte);
    }
};

// ---- results ----------------------------------------------------------------------------------------------------------------------

DEVICE int64 split_slot(const Arguments& a, const HeadTile& tile, int entry) {
    return (int64(entry) * a.num_kv_heads * a.tiles() + tile.index) * min(HEADS, a.group_size());
}

// Sums over the lanes and warps that shared the tokens; afterwards all lanes have their two heads' in total and zeros.
DEVICE void reduce(State& state) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
    float2* sums = reinterpret_cast<float2*>(shared + SUMS);
    float4* parts = reinterpret_cast<float4*>(shared + PARTS);
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int offset = 4; offset < WARP; offset *= 2) {
            state.total[j] += __shfl_xor_sync(FULL_WARP, state.total[j], offset);
            state.zeros[j] += __shfl_xor_sync(FULL_WARP, state.zeros[j], offset);
        }
        if (lane < 4) sums[warp * HEADS + 2 * t + j] = make_float2(state.total[j], state.zeros[j]);
    }
#pragma unroll
    for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) state.acc[i][0][j] += state.acc[i][1][j];
    float(&acc)[4] = state.acc[0][0];
    if (TOKEN_PARTS == 2 && warp >= DIM_TILES)
        parts[(warp - DIM_TILES) * WARP + lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
    computing_barrier();
#pragma unroll
    for (int j = 0; j < 2; j++) {
        state.total[j] = state.zeros[j] = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = sums[w * HEADS + 2 * t + j];
            state.total[j] += other.x;
            state.zeros[j] += other.y;
        }
    }
    if (TOKEN_PARTS == 2 && warp < DIM_TILES) {
        float4 other = parts[warp * WARP + lane];
        acc[0] += other.x, acc[1] += other.y, acc[2] += other.z, acc[3] += other.w;
    }
}

// Calls store(head of the tile, first dimension, the value there, the value at the second dimension) for this lane's
// results. The second dimension is the next one of INT8, 8 further of fp16.
constexpr int DIMENSION_STEP = IS_FP16 ? 8 : 1;
template <typename Store>
DEVICE void for_each_result(const State& state, int num_heads, Store store) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    if (warp >= DIM_TILES) return;
#pragma unroll
    for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (2 * t + j >= num_heads) continue;
            int dimension = (warp + i * WARPS) * 16 + (IS_FP16 ? g : 2 * g);
            const float(&acc)[4] = state.acc[i][0];
            store(2 * t + j, dimension, acc[j] + state.zeros[j], acc[2 + j] + state.zeros[j]);
        }
}

DEVICE float inverse_or_zero(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// Adds up the splits of a row and head tile, in their order.
DEVICE void combine(const Arguments& a, const HeadTile& tile, const SplitEntry& entry) {
    uint16* out = a.out + (int64(entry.row) * a.num_heads + tile.first_head) * D;
    int64 stride = split_slot(a, tile, 1) - split_slot(a, tile, 0), first = split_slot(a, tile, entry.first_entry);
    for (int i = threadIdx.x; i < tile.num_heads * D / 4; i += COMPUTING) {
        int head = i / (D / 4), dimension = i % (D / 4) * 4;
        const float2* stats = a.stats + first + head;
        const float4* sums = reinterpret_cast<const float4*>(a.sums + (first + head) * D + dimension);
        float maximum = negative_infinity(), total = 0.0f;
#pragma unroll 4
        for (int s = 0; s < entry.num_splits; s++) maximum = fmaxf(maximum, __ldcg(stats + s * stride).x);
        float base = maximum == negative_infinity() ? 0.0f : maximum;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int s = 0; s < entry.num_splits; s++) {
            float2 stat = __ldcg(stats + s * stride);
            float4 part = __ldcg(sums + s * stride * (D / 4));
            float factor = exp2_fast(stat.x - base);
            total = fmaf(stat.y, factor, total);
            sum.x = fmaf(part.x, factor, sum.x);
            sum.y = fmaf(part.y, factor, sum.y);
            sum.z = fmaf(part.z, factor, sum.z);
            sum.w = fmaf(part.w, factor, sum.w);
        }
        float inverse = inverse_or_zero(total);
        uint2 halves = make_uint2(floats_to_half2(sum.x * inverse, sum.y * inverse),
                                  floats_to_half2(sum.z * inverse, sum.w * inverse));
        *reinterpret_cast<uint2*>(out + head * D + dimension) = halves;
    }
}

// The only split: the result itself
DEVICE void store_result(const Arguments& a, const HeadTile& tile, const SplitEntry& entry, const State& state) {
    uint16* out = a.out + (int64(entry.row) * a.num_heads + tile.first_head) * D;
    float inverse[2] = {inverse_or_zero(state.total[0]), inverse_or_zero(state.total[1])};
    for_each_result(state, tile.num_heads, [&](int head, int dimension, float first, float second) {
        float factor = inverse[head & 1];
        uint16* at = out + head * D + dimension;
        if constexpr (IS_FP16) {
            at[0] = float_to_half(first * factor);
            at[DIMENSION_STEP] = float_to_half(second * factor);
        } else {
            *reinterpret_cast<uint32*>(at) = floats_to_half2(first * factor, second * factor);
        }
    });
}

// One split of several: its sums, for the thread block that is the last to finish one of this row and head tile
DEVICE void store_sums(const Arguments& a, const HeadTile& tile, int entry_index, const State& state) {
    int64 slot = split_slot(a, tile, entry_index);
    for_each_result(state, tile.num_heads, [&](int head, int dimension, float first, float second) {
        float* at = a.sums + (slot + head) * D + dimension;
        if constexpr (IS_FP16) {
            at[0] = first;
            at[DIMENSION_STEP] = second;
        } else {
            *reinterpret_cast<float2*>(at) = make_float2(first, second);
        }
    });
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int head = threadIdx.x * 2 + j;  // of lanes 0 to 3 of warp 0
        if (threadIdx.x < 4 && head < tile.num_heads)
            a.stats[slot + head] = make_float2(state.maximum[j], state.total[j]);
    }
}

// Whether all splits of the row and head tile are stored; their sums can be read then.
DEVICE bool is_last(const Arguments& a, const HeadTile& tile, const SplitEntry& entry) {
    int* flag = reinterpret_cast<int*>(shared + IS_LAST);
    computing_barrier();
    if (threadIdx.x == 0) {
        int* counter = a.plan + PLAN_HEADER + entry.row % ROWS_PER_PLAN * a.num_kv_heads * a.tiles() + tile.index;
        __threadfence();  // for all threads: the barrier comes before it
        *flag = atomicAdd(counter, 1) == entry.num_splits - 1;
        if (*flag) *counter = 0;
        __threadfence();
    }
    computing_barrier();
    return *flag;
}

DEVICE void compute(const Arguments& a, int num_items) {
    Place place;
    Side side;
    State state;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        HeadTile tile(a, item);
        wait_barrier(place.full(), place.parity);
        SplitEntry entry = *reinterpret_cast<const SplitEntry*>(side.bytes() + SIDE_ENTRY);
        state.start();
        int at = entry.start;
        do {
            wait_barrier(place.full(), place.parity);
            int count = min(GROUP, entry.stop - at);
            NewToken new_token(a, tile, entry, at);
            if (new_token.token >= 0) new_token.make(place, side.bytes());
            prepare_queries(a, tile, side.bytes());
            float scores[KEY_TILES][4];
            state.multiply_keys(place, side.bytes(), count, scores);
            state.raise_maxima(scores);
            state.weigh(side.bytes(), count, scores);
            if (new_token.token >= 0) new_token.place_value(place, side.bytes());
            side.release();
            side.advance();
            computing_barrier();
            state.multiply_values(place, count);
            at += GROUP;
        } while (at < entry.stop);
        reduce(state);
        if (entry.num_splits == 1) {
            store_result(a, tile, entry, state);
            continue;
        }
        store_sums(a, tile, item / (a.num_kv_heads * a.tiles()), state);
        if (is_last(a, tile, entry)) combine(a, tile, entry);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    attention_decode(const uint16* qkv, uint8* kv_cache, const int* block_tables, const float* table, int* plan,
                     float* sums, float2* stats, uint16* out, int num_counters, int max_blocks, int num_heads,
                     int num_kv_heads) {
    grid_launch_dependents();
    if (threadIdx.x < STAGES) {
        init_barrier(shared_address(shared + FULL + threadIdx.x * 8), WARP);
        init_barrier(shared_address(shared + FREE + threadIdx.x * 8), WARPS);
    }
    if (threadIdx.x < NUM_SIDES) init_barrier(shared_address(shared + SIDE_FREE + threadIdx.x * 8), WARPS);
    __syncthreads();
    grid_wait();
    Arguments a = {qkv,   kv_cache, block_tables, table,        plan,      sums,
                   stats, out,      num_counters, max_blocks, num_heads, num_kv_heads};
    int num_items = plan[0] * num_kv_heads * a.tiles();
    if (blockIdx.x >= num_items) return;
    if (threadIdx.x >= COMPUTING) {
        Producer producer;
        producer.run(a, num_items);
    } else {
        compute(a, num_items);
    }
}
