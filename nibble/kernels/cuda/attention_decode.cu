// One query row per sequence over its paged keys and values (DECODE): rotate q and k, quantise and append this token's
// k and v, attend, combine the splits, all in one kernel per layer.
//
//   out[h] = sum_p w_p v_p / sum_p w_p,  w_p = exp((q_h k_p) / sqrt(D)),  k_p = scale_p k8_p + zero_p (v alike)
//
// qkv fp16 (T, (heads + 2 kv heads) D), cache (blocks, kv heads, head block of layout.py), out fp16 (T, heads D).
//
// Work: an item is (query row, split of its context, kv head, tile of up to 8 of its query heads); all heads of a tile
// share one reading of K and V. The grid is fixed; each thread block takes items at a stride of the grid's size and goes
// through an item in groups of GROUP tokens. The keys of a group are one stage of a ring in shared memory, its values
// the next; all threads copy, STAGES - 1 stages ahead and across items, so that memory is never idle between items.
//
//   keys:    a warp has 16 or 32 of the group's tokens: scores^T (tokens x heads) = K (A operand) q^T (B operand).
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
// written to the ring by the warps that need them first (bit for bit what they write to the cache).
//
// A row of more than one split leaves unnormalised sums per split; the thread block that finishes last (a counter per
// row and head tile, left at zero) adds them up in the order of the splits. Every number is computed from the row's own
// context in an order fixed by positions, so a row's result does not depend on the batch.
//
// Bytes moved: per token and kv head 2 D + 8 (INT8) or 4 D (fp16); the split sums stay in L2.
#include "attention.cuh"
#include "attention_plan.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int HEADS = 8;  // of a tile: the N of the products

// Tokens per stage: 16 KB of keys or values
constexpr int GROUP = ROW_BYTES == 64 ? 256 : ROW_BYTES <= 128 ? 128 : ROW_BYTES <= 256 ? 64 : 32;
constexpr int KEY_TOKENS = GROUP >= 32 * WARPS ? 32 : 16;  // per warp; of small groups some warps have none
constexpr int KEY_TILES = KEY_TOKENS / 16;
constexpr int GROUP_BLOCKS = GROUP > BLOCK_TOKENS ? GROUP / BLOCK_TOKENS : 1;
static_assert(SPLIT_TOKENS % GROUP == 0, "a group must not cross a split");

constexpr int DIM_TILES = D / 16;
constexpr int WARP_DIM_TILES = DIM_TILES > WARPS ? DIM_TILES / WARPS : 1;
constexpr int TOKEN_PARTS = DIM_TILES * 2 <= WARPS ? 2 : 1;  // D = 64: two warps share 16 dimensions, and halve the tokens
constexpr int STEPS = D / 16;                                // of 16 along D in a score

// ---- shared memory --------------------------------------------------------------------------------------------------------

using Rows = SharedRows<ROW_BYTES>;
constexpr int STAGE_BYTES = GROUP * Rows::STRIDE;
// What comes with a group's keys: (scale, zero) of keys and values; with an item's first group q, with its last k and v
constexpr int PARAMETER_BYTES = IS_FP16 ? 0 : GROUP * 4;
constexpr int Q_STRIDE = 2 * D + 32;  // bytes; shifts each head by 8 banks
constexpr int SIDE_VALUE_PARAMETERS = PARAMETER_BYTES;
constexpr int SIDE_Q = 2 * PARAMETER_BYTES;
constexpr int SIDE_TABLE = SIDE_Q + HEADS * Q_STRIDE;
constexpr int SIDE_KEY = SIDE_TABLE + D * 4;
constexpr int SIDE_VALUE = SIDE_KEY + 2 * D;
constexpr int SIDE_BYTES = SIDE_VALUE + 2 * D;

constexpr int WEIGHT_STRIDE = GROUP * 2 + 16;  // bytes of a head's weights; shifts each head by 4 banks
constexpr int WEIGHTS = 0;
constexpr int MAXIMA = WEIGHTS + HEADS * WEIGHT_STRIDE;     // float [WARPS][HEADS]
constexpr int SUMS = MAXIMA + WARPS * HEADS * 4;            // float2 [WARPS][HEADS]
constexpr int PARTS = SUMS + WARPS * HEADS * 8;             // float4 [WARPS / 2][WARP]
constexpr int IS_LAST = PARTS + (TOKEN_PARTS - 1) * WARPS / 2 * WARP * 16;
constexpr int SIDES = IS_LAST + 16;

// Leaves room for a thread block of the next kernel beside this one, or for a second one of this
#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int SHARED_BYTES = 113 * 1024;
#else
constexpr int SHARED_BYTES = 99 * 1024;
#endif
// Keys come in every other stage: STAGES of the ring hold at most (STAGES + 1) / 2 sides
constexpr int shared_bytes(int stages) { return SIDES + (stages + 1) / 2 * SIDE_BYTES + stages * STAGE_BYTES; }
constexpr int STAGES = shared_bytes(6) <= SHARED_BYTES ? 6 : shared_bytes(5) <= SHARED_BYTES ? 5 : 4;
constexpr int NUM_SIDES = (STAGES + 1) / 2;
constexpr int RING = SIDES + NUM_SIDES * SIDE_BYTES;
static_assert(shared_bytes(STAGES) <= SHARED_BYTES, "the ring is too large");
static_assert(RING % 16 == 0 && SIDES % 16 == 0 && SIDE_BYTES % 16 == 0, "copies need 16-byte alignment");

extern __shared__ __align__(128) uint8 shared[];

// ---- what is to be done ---------------------------------------------------------------------------------------------------

struct Arguments {
    const uint16* qkv;
    uint8* kv_cache;
    const int* block_tables;
    const int* positions;
    const int64* slots;
    const float* table;  // null: q is rotated and this token's k and v are in the cache already
    int* plan;
    float* sums;    // of splits: [entry][item head][head of the tile][D]
    float2* stats;  // their (maximum, sum of weights)
    uint16* out;
    int num_counters, max_blocks, num_heads, num_kv_heads;

    __device__ __forceinline__ int group_size() const { return num_heads / num_kv_heads; }
    __device__ __forceinline__ int tiles() const { return (group_size() + HEADS - 1) / HEADS; }
    __device__ __forceinline__ int row_size() const { return (num_heads + 2 * num_kv_heads) * D; }
};

struct Item {
    int row, sequence, start, stop, context, first_entry, num_splits;
    int kv_head, tile, head;  // head: kv_head and tile in one

    __device__ __forceinline__ Item(const Arguments& a, int index) {
        int per_entry = a.num_kv_heads * a.tiles();
        const int4* entry = reinterpret_cast<const int4*>(a.plan + PLAN_HEADER + a.num_counters);
        entry += index / per_entry * 2;
        int4 x = entry[0], y = entry[1];
        row = x.x, sequence = x.y, start = x.z, stop = x.w, context = y.x, first_entry = y.y, num_splits = y.z;
        head = index % per_entry;
        kv_head = head / a.tiles();
        tile = head % a.tiles();
    }

    // The group that holds the row's newest token, whose k and v are still in qkv
    __device__ __forceinline__ bool has_new_token(const Arguments& a, int at) const {
        return a.table != nullptr && stop == context && at + GROUP >= stop;
    }

    __device__ __forceinline__ int num_heads(const Arguments& a) const {
        return min(HEADS, a.group_size() - tile * HEADS);
    }

    __device__ __forceinline__ int first_head(const Arguments& a) const {
        return kv_head * a.group_size() + tile * HEADS;
    }
};

// ---- copying ----------------------------------------------------------------------------------------------------------------

// Runs ahead of the computation, through the same items and groups.
struct Producer {
    Item item;
    int index, num_items, at;  // at: first token of the group
    int stage, side;
    bool wants_values;
    int blocks[GROUP_BLOCKS];

    __device__ __forceinline__ Producer(const Arguments& a, int num_items)
        : item(a, blockIdx.x), index(blockIdx.x), num_items(num_items), stage(0), side(0), wants_values(false) {
        at = item.start;
        if (index < num_items) skip_empty(a);
    }

    // On to an item that has tokens
    __device__ __forceinline__ void skip_empty(const Arguments& a) {
        while (at >= item.stop) {
            index += gridDim.x;
            if (index >= num_items) return;
            item = Item(a, index);
            at = item.start;
        }
    }

    // Starts the copies of the next stage, if there is one; a group of copies is committed in any case.
    __device__ __forceinline__ void advance(const Arguments& a) {
        if (index < num_items) {
            if (!wants_values) find_blocks(a);
            copy_rows(a);
            if (!wants_values) {
                copy_side(a);
                side = side + 1 == NUM_SIDES ? 0 : side + 1;
            } else {
                at += GROUP;
                skip_empty(a);
            }
            wants_values = !wants_values;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        commit_copies();
    }

    __device__ __forceinline__ void find_blocks(const Arguments& a) {
        const int* table = a.block_tables + int64(item.sequence) * a.max_blocks + at / BLOCK_TOKENS;
#pragma unroll
        for (int b = 0; b < GROUP_BLOCKS; b++) blocks[b] = at + b * BLOCK_TOKENS < item.stop ? table[b] : 0;
    }

    __device__ __forceinline__ const uint8* head_block(const Arguments& a, int row) const {
        int block = blocks[0];
#pragma unroll
        for (int b = 1; b < GROUP_BLOCKS; b++) block = row >= b * BLOCK_TOKENS ? blocks[b] : block;
        return a.kv_cache + (int64(block) * a.num_kv_heads + item.kv_head) * HEAD_BLOCK_BYTES;
    }

    // Tokens of this group that are in the cache
    __device__ __forceinline__ int num_cached(const Arguments& a) const {
        return min(GROUP, item.stop - at) - int(item.has_new_token(a, at));
    }

    __device__ __forceinline__ void copy_rows(const Arguments& a) const {
        int cached = num_cached(a), used = min(GROUP, item.stop - at);
        uint32 to = shared_address(shared + RING + stage * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < GROUP * Rows::PIECES / THREADS; i++) {
            int index = threadIdx.x + i * THREADS, row = index / Rows::PIECES, piece = index % Rows::PIECES;
            const uint8* from = head_block(a, row) + (wants_values ? VALUES_START : 0) +
                                (at + row) % BLOCK_TOKENS * ROW_BYTES + piece * PIECE;
            if (row < cached) {
                copy_16_async(to + Rows::offset(row, piece), from);
            } else if (IS_FP16 && wants_values && row >= used) {
                // A weight of 0 times what happens to lie there must not be NaN; INT8 has no NaN
                copy_16_async(to + Rows::offset(row, piece), a.kv_cache, false);
            }
        }
    }

    __device__ __forceinline__ void copy_side(const Arguments& a) const {
        uint32 to = shared_address(shared + SIDES + side * SIDE_BYTES);
        int thread = threadIdx.x;
        if constexpr (!IS_FP16) {
            constexpr int PIECES = GROUP / 4;  // of 4 tokens; keys, then values
            if (thread < 2 * PIECES) {
                int row = thread % PIECES * 4, is_value = thread / PIECES;
                const uint8* from = head_block(a, row) + KEY_PARAMETERS + is_value * BLOCK_TOKENS * 4 +
                                    (at + row) % BLOCK_TOKENS * 4;
                if (row < num_cached(a)) copy_16_async(to + thread * PIECE, from);
            }
            static_assert(2 * PIECES <= THREADS, "one pass");
        }
        bool is_first = at == item.start, is_new = item.has_new_token(a, at);
        const uint16* token = a.qkv + int64(item.row) * a.row_size();
        constexpr int HEAD_PIECES = 2 * D / PIECE;  // 8 to 32
        if (is_first && thread < item.num_heads(a) * HEAD_PIECES) {
            const uint16* from = token + item.first_head(a) * D + thread * (PIECE / 2);
            copy_16_async(to + SIDE_Q + thread / HEAD_PIECES * Q_STRIDE + thread % HEAD_PIECES * PIECE, from);
        }
        static_assert(HEADS * HEAD_PIECES <= THREADS, "one pass");
        if (a.table != nullptr && (is_first || is_new) && thread < D / 4)
            copy_16_async(to + SIDE_TABLE + thread * PIECE, a.table + int64(a.positions[item.row]) * D + thread * 4);
        if (is_new && thread >= THREADS - 2 * HEAD_PIECES) {
            int piece = thread - (THREADS - 2 * HEAD_PIECES), is_value = piece / HEAD_PIECES;
            const uint16* from = token + (a.num_heads + item.kv_head + is_value * a.num_kv_heads) * D;
            copy_16_async(to + SIDE_KEY + piece * PIECE, from + piece % HEAD_PIECES * (PIECE / 2));
        }
    }
};

// ---- computing ----------------------------------------------------------------------------------------------------------------

// q of a tile's heads as B operand, rotated. Lane (g, t) has elements 16 s + 4 t .. + 3 of head g, as (0, 2), (1, 3), for
// INT8 keys, elements 16 s + 2 t, + 1, + 8, + 9 for fp16 keys.
struct Query {
    uint32 q[STEPS][2];
    float sum[2];  // of all elements of q of heads 2t and 2t + 1

    __device__ __forceinline__ void load(const uint8* side, bool is_rotated, int num_heads) {
        int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        const uint8* row = side + SIDE_Q + g * Q_STRIDE;
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            if constexpr (IS_FP16) {
                q[s][0] = *reinterpret_cast<const uint32*>(row + (16 * s + 2 * t) * 2);
                q[s][1] = *reinterpret_cast<const uint32*>(row + (16 * s + 8 + 2 * t) * 2);
            } else {
                uint2 four = *reinterpret_cast<const uint2*>(row + (16 * s + 4 * t) * 2);
                q[s][0] = __byte_perm(four.x, four.y, 0x5410);
                q[s][1] = __byte_perm(four.x, four.y, 0x7632);
            }
            if (g >= num_heads) q[s][0] = q[s][1] = 0;
        }
        if (!is_rotated) rotate_all(reinterpret_cast<const float*>(side + SIDE_TABLE), t);
        if constexpr (!IS_FP16) sum_up(t);
    }

    __device__ __forceinline__ void rotate_all(const float* table, int t) {
#pragma unroll
        for (int s = 0; s < STEPS / 2; s++) {
            float cos[4], sin[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {  // in the order of q's halves
                int at = IS_FP16 ? 16 * s + 2 * t + (i & 1) + (i & 2) * 4 : 16 * s + 4 * t + (i & 1) * 2 + (i >> 1);
                cos[i] = table[at];
                sin[i] = table[HALF + at];
            }
#pragma unroll
            for (int b = 0; b < 2; b++) {
                uint32 &low = q[s][b], &high = q[s + STEPS / 2][b];
                float low0 = low_half(low), low1 = high_half(low), high0 = low_half(high), high1 = high_half(high);
                rotate(low0, high0, cos[2 * b], sin[2 * b]);
                rotate(low1, high1, cos[2 * b + 1], sin[2 * b + 1]);
                low = floats_to_half2(low0, low1);
                high = floats_to_half2(high0, high1);
            }
        }
    }

    __device__ __forceinline__ void sum_up(int t) {
        float own = 0.0f;
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            own += (low_half(q[s][0]) + high_half(q[s][0])) + (low_half(q[s][1]) + high_half(q[s][1]));
        own += __shfl_xor_sync(FULL_WARP, own, 1);
        own += __shfl_xor_sync(FULL_WARP, own, 2);
        sum[0] = __shfl_sync(FULL_WARP, own, 8 * t);
        sum[1] = __shfl_sync(FULL_WARP, own, 8 * t + 4);
    }
};

constexpr float SCORE_SCALE = (D == 64 ? 0.125f : D == 96 ? 0.10206207262f : D == 128 ? 0.08838834765f : 0.0625f) *
                              1.44269504089f;  // 1 / sqrt(D), and softmax in powers of two
constexpr float WEIGHT_EXPONENT = 6.0f;

// The state of an item. Lane (g, t) of every warp: maxima and sums of heads 2t, 2t + 1; acc: D-fragments of out^T.
struct State {
    Query query;
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

    // q k of this warp's tokens: scores[i][2 r + j] of token 16 i + 8 r + g, head 2 t + j
    __device__ __forceinline__ void products(const uint8* stage, int first, float (&scores)[KEY_TILES][4]) const {
        int lane = threadIdx.x % WARP;
        int row = first + lane % 16, piece = lane / 16;
        uint32 from = shared_address(stage);
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++) scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = 0.0f;
#pragma unroll
        for (int p = 0; p < Rows::PIECES; p += 2) {
#pragma unroll
            for (int i = 0; i < KEY_TILES; i++) {
                uint32 k[4];
                load_matrices(k, from + Rows::offset(row + 16 * i, p + piece));
                if constexpr (IS_FP16) {
                    mma_16816(scores[i], k, query.q[p / 2][0], query.q[p / 2][1]);
                } else {
                    uint32 a[4] = {even_bytes_to_half2(k[0]), even_bytes_to_half2(k[1]), odd_bytes_to_half2(k[0]),
                                   odd_bytes_to_half2(k[1])};
                    mma_16816(scores[i], a, query.q[p][0], query.q[p][1]);
                    uint32 b[4] = {even_bytes_to_half2(k[2]), even_bytes_to_half2(k[3]), odd_bytes_to_half2(k[2]),
                                   odd_bytes_to_half2(k[3])};
                    mma_16816(scores[i], b, query.q[p + 1][0], query.q[p + 1][1]);
                }
            }
        }
    }

    // Keys of a group, of which `count` tokens count: weights to shared memory, sums and maxima on.
    __device__ __forceinline__ void keys(const uint8* stage, const uint8* side, int count) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        int first = warp * KEY_TOKENS;
        float* maxima = reinterpret_cast<float*>(shared + MAXIMA);
        float scores[KEY_TILES][4], best[2] = {negative_infinity(), negative_infinity()};
        bool has_tokens = first < GROUP;
        if (has_tokens) {
            products(stage, first, scores);
#pragma unroll
            for (int i = 0; i < KEY_TILES; i++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    int token = first + 16 * i + 8 * r + g;
                    bool is_valid = token < count;
                    float scale = SCORE_SCALE, zero = 0.0f;
                    if constexpr (!IS_FP16) {
                        uint32 parameters = reinterpret_cast<const uint32*>(side)[token];
                        scale *= low_half(parameters);
                        zero = high_half(parameters) * SCORE_SCALE;
                    }
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float& score = scores[i][2 * r + j];
                        score *= scale;
                        if constexpr (!IS_FP16) score = fmaf(zero, query.sum[j], score);
                        score = is_valid ? score : negative_infinity();
                        best[j] = fmaxf(best[j], score);
                    }
                }
#pragma unroll
            for (int j = 0; j < 2; j++)
#pragma unroll
                for (int offset = 4; offset < WARP; offset *= 2)
                    best[j] = fmaxf(best[j], __shfl_xor_sync(FULL_WARP, best[j], offset));
        }
        if (g == 0) *reinterpret_cast<float2*>(maxima + warp * HEADS + 2 * t) = make_float2(best[0], best[1]);
        __syncthreads();

        float base[2];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = *reinterpret_cast<const float2*>(maxima + w * HEADS + 2 * t);
            best[0] = fmaxf(best[0], other.x);
            best[1] = fmaxf(best[1], other.y);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            best[j] = fmaxf(best[j], maximum[j]);
            // No score at all (every one is NaN): NaN weights, but no NaN made of -inf - -inf
            float correction = best[j] == negative_infinity() ? 1.0f : exp2_fast(maximum[j] - best[j]);
            base[j] = best[j] == negative_infinity() ? 0.0f : best[j] - WEIGHT_EXPONENT;
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
        if (!has_tokens) return;
        uint16* weights = reinterpret_cast<uint16*>(shared + WEIGHTS + 2 * t * WEIGHT_STRIDE);
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = first + 16 * i + 8 * r + g;
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

    // Values of a group times its weights
    __device__ __forceinline__ void values(const uint8* stage) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        uint32 from = shared_address(stage);
        uint32 weights_at = shared_address(shared + WEIGHTS) + lane % 8 * WEIGHT_STRIDE + lane / 8 * 16;
        if (warp >= DIM_TILES * TOKEN_PARTS) return;
#pragma unroll
        for (int step = 0; step < GROUP / 32 / TOKEN_PARTS; step++) {
            int token = (step * TOKEN_PARTS + warp / DIM_TILES % TOKEN_PARTS) * 32;
            uint32 w[4];
            load_matrices(w, weights_at + token * 2);
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

// One warp: k (or v) as it will be cached, to its row of the stage and its (scale, zero) to the side; `to`: its head
// block in the cache, or null.
DEVICE void add_new_row(HeadRow& row, uint8* stage, uint8* parameters, int token, uint8* to, int which, int offset) {
    auto in_ring = [&](int byte) { return stage + Rows::offset(token, byte / PIECE) + byte % PIECE; };
    uint8* row_to = to + which * VALUES_START + offset * ROW_BYTES;
    auto in_cache = [&](int byte) { return row_to + byte; };
    if constexpr (IS_FP16) {
        store_cached_row(row, in_ring);
        if (to != nullptr) store_cached_row(row, in_cache);
    } else {
        QuantizedRow quantized(row);
        store_cached_row(quantized, in_ring);
        if (threadIdx.x % WARP == 0) *reinterpret_cast<uint32*>(parameters + 4 * token) = quantized.parameters;
        if (to != nullptr) {
            store_cached_row(quantized, in_cache);
            uint8* parameters_to = to + KEY_PARAMETERS + (which * BLOCK_TOKENS + offset) * 4;
            if (threadIdx.x % WARP == 0) *reinterpret_cast<uint32*>(parameters_to) = quantized.parameters;
        }
    }
    __syncwarp();
}

// Its key is needed by the warp that has that token, right away; its value's row and parameters by others, after the
// next barriers, so another warp makes them meanwhile.
DEVICE void add_new_token(const Arguments& a, const Item& item, uint8* key_stage, uint8* value_stage, uint8* side,
                          int token) {
    int warp = threadIdx.x / WARP, key_warp = token / KEY_TOKENS;
    bool is_value = warp == (key_warp + 1) % WARPS;
    if (warp != key_warp && !is_value) return;
    int64 slot = a.slots[item.row];
    uint8* to = nullptr;
    if (slot >= 0 && item.tile == 0)
        to = a.kv_cache + (slot / BLOCK_TOKENS * a.num_kv_heads + item.kv_head) * HEAD_BLOCK_BYTES;
    HeadRow row;
    row.load(reinterpret_cast<const uint16*>(side + (is_value ? SIDE_VALUE : SIDE_KEY)));
    if (!is_value) row.rotate_all(reinterpret_cast<const float*>(side + SIDE_TABLE));
    add_new_row(row, is_value ? value_stage : key_stage, side + (is_value ? SIDE_VALUE_PARAMETERS : 0), token, to,
                is_value, int(slot % BLOCK_TOKENS));
}

// ---- results ----------------------------------------------------------------------------------------------------------------------

DEVICE int64 split_slot(const Arguments& a, const Item& item, int entry) {
    return (int64(entry) * a.num_kv_heads * a.tiles() + item.head) * min(HEADS, a.group_size());
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
    __syncthreads();
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
DEVICE void combine(const Arguments& a, const Item& item) {
    int num_heads = item.num_heads(a);
    uint16* out = a.out + (int64(item.row) * a.num_heads + item.first_head(a)) * D;
    int64 stride = split_slot(a, item, 1) - split_slot(a, item, 0), first = split_slot(a, item, item.first_entry);
    for (int i = threadIdx.x; i < num_heads * D / 4; i += THREADS) {
        int head = i / (D / 4), dimension = i % (D / 4) * 4;
        const float2* stats = a.stats + first + head;
        const float4* sums = reinterpret_cast<const float4*>(a.sums + (first + head) * D + dimension);
        float maximum = negative_infinity(), total = 0.0f;
        for (int s = 0; s < item.num_splits; s++) maximum = fmaxf(maximum, __ldcg(stats + s * stride).x);
        float base = maximum == negative_infinity() ? 0.0f : maximum;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int s = 0; s < item.num_splits; s++) {
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

DEVICE void finish(const Arguments& a, const Item& item, int index, State& state) {
    int lane = threadIdx.x % WARP, t = lane % 4, num_heads = item.num_heads(a);
    reduce(state);
    if (item.num_splits == 1) {
        uint16* out = a.out + (int64(item.row) * a.num_heads + item.first_head(a)) * D;
        float inverse[2] = {inverse_or_zero(state.total[0]), inverse_or_zero(state.total[1])};
        for_each_result(state, num_heads, [&](int head, int dimension, float first, float second) {
            float factor = inverse[head & 1];
            uint16* at = out + head * D + dimension;
            if constexpr (IS_FP16) {
                at[0] = float_to_half(first * factor);
                at[DIMENSION_STEP] = float_to_half(second * factor);
            } else {
                *reinterpret_cast<uint32*>(at) = floats_to_half2(first * factor, second * factor);
            }
        });
        return;
    }
    int64 slot = split_slot(a, item, index / (a.num_kv_heads * a.tiles()));
    for_each_result(state, num_heads, [&](int head, int dimension, float first, float second) {
        float* at = a.sums + (slot + head) * D + dimension;
        if constexpr (IS_FP16) {
            at[0] = first;
            at[DIMENSION_STEP] = second;
        } else {
            *reinterpret_cast<float2*>(at) = make_float2(first, second);
        }
    });
#pragma unroll
    for (int j = 0; j < 2; j++)
        if (threadIdx.x < 4 && 2 * t + j < num_heads)
            a.stats[slot + 2 * t + j] = make_float2(state.maximum[j], state.total[j]);

    // The last thread block of the row and head tile sees what all of them wrote.
    int* is_last = reinterpret_cast<int*>(shared + IS_LAST);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        int* counter = a.plan + PLAN_HEADER + item.row % ROWS_PER_PLAN * a.num_kv_heads * a.tiles() + item.head;
        *is_last = atomicAdd(counter, 1) == item.num_splits - 1;
        if (*is_last) *counter = 0;
        __threadfence();
    }
    __syncthreads();
    if (*is_last) combine(a, item);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    attention_decode(const uint16* qkv, uint8* kv_cache, const int* block_tables, const int* positions,
                     const int64* slots, const float* table, int* plan, float* sums, float2* stats, uint16* out,
                     int num_counters, int max_blocks, int num_heads, int num_kv_heads) {
    grid_launch_dependents();
    Arguments a = {qkv,  kv_cache, block_tables, positions,    slots,      table,     plan,
                   sums, stats,    out,          num_counters, max_blocks, num_heads, num_kv_heads};
    grid_wait();
    int num_items = plan[0] * num_kv_heads * a.tiles();
    if (blockIdx.x >= num_items) return;
    Producer producer(a, num_items);
    for (int s = 0; s < STAGES - 1; s++) producer.advance(a);

    int stage = 0, side_index = 0;
    State state;
    for (int index = blockIdx.x; index < num_items; index += gridDim.x) {
        Item item(a, index);
        if (item.start >= item.stop) {  // a row without any context
            uint16* out_row = out + (int64(item.row) * num_heads + item.first_head(a)) * D;
            for (int i = threadIdx.x; i < item.num_heads(a) * D; i += THREADS) out_row[i] = 0;
            continue;
        }
        state.start();
        for (int at = item.start; at < item.stop; at += GROUP) {
            // A barrier per stage: it has arrived for all, and the stage before it is free to be filled.
            wait_copies<STAGES - 2>();
            __syncthreads();
            producer.advance(a);
            uint8* keys = shared + RING + stage * STAGE_BYTES;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            uint8* values = shared + RING + stage * STAGE_BYTES;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            uint8* side = shared + SIDES + side_index * SIDE_BYTES;
            side_index = side_index + 1 == NUM_SIDES ? 0 : side_index + 1;

            int count = min(GROUP, item.stop - at);
            if (item.has_new_token(a, at)) add_new_token(a, item, keys, values, side, count - 1);
            if (at == item.start) state.query.load(side, table == nullptr, item.num_heads(a));
            state.keys(keys, side, count);

            wait_copies<STAGES - 2>();
            __syncthreads();
            producer.advance(a);
            state.values(values);
        }
        finish(a, item, index, state);
    }
}
