// Many query rows per sequence over its paged keys and values (PREFILL): causal, ragged, chunked.
//
//   out[t, h] = sum_p w_p v_p / sum_p w_p,  w_p = exp((q[t, h] k_p) / sqrt(D)),  p up to t's own position
//
// qkv fp16 (T, (heads + 2 kv heads) D) with q rotated, cache (blocks, kv heads, head block of layout.py) with all
// tokens appended, out fp16 (T, heads D). Keys and values come from the cache alone.
//
// One thread block per (sequence, tile of query tokens, kv head), longest first (attention_plan.cu). A tile's rows are
// (token, query head of the kv head), token by token, so that what a KV head's keys cost is shared by its heads and few
// products are spent on masked positions. A warp has ROW_TILES x 16 rows: their scores, softmax state and results are
// in its registers ("FlashAttention-2", Dao 2023); q is in shared memory.
//
// With -DWINDOW=1 a row sees the newest `window` positions up to its own; keys and values are taken from there on.
//
// Keys and values are taken KEYS tokens at a time from position 0 on, in order: a row's additions do not depend on how
// the prompt was cut into chunks, and rows that a tile's later keys are masked for multiply by exactly 1 and add 0.
// INT8 becomes fp16 (q scale + zero, rounded once; by channel, q alone: see attention.cuh) in shared memory, once per thread block: each thread converts the
// 16-byte pieces that it has itself copied, so only the finished tile needs a barrier, one per tile. Two fp16 tiles
// take turns; half of the warps convert the next one before their products and half after, so that the tensor cores
// have work meanwhile.
//
// Bytes moved: K and V once per tile of queries, mostly from L2.
#include "attention.cuh"
#include "attention_plan.cuh"

#if __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 900
constexpr int WARPS = 8;
constexpr int ROW_TILES = D <= 128 ? 2 : 1;
constexpr int KEYS = D <= 128 ? 64 : 32;
constexpr int SHARED_BYTES = 160 * 1024;
#else
constexpr int WARPS = D <= 128 ? 8 : 4;
constexpr int ROW_TILES = 1;
constexpr int KEYS = D <= 128 ? 32 : 16;
constexpr int SHARED_BYTES = 99 * 1024;
#endif
constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = WARPS * ROW_TILES * 16;
constexpr int STEPS = D / 16;      // of the products along D
constexpr int PART = D == 64 ? KEYS : KEYS < 32 ? KEYS : 32;  // keys whose scores a warp holds at a time
constexpr int KEY_TILES = PART / 8;
constexpr int DIM_TILES = D / 8;

using Rows = SharedRows<2 * D>;  // fp16 rows: of q, and of keys and values after conversion
constexpr int TILE_BYTES = KEYS * Rows::STRIDE;
constexpr int Q = 0;
constexpr int TILES = ROWS * Rows::STRIDE;          // [2][keys | values]
constexpr int RAW = TILES + 4 * TILE_BYTES;         // INT8: each thread's own pieces
constexpr int RAW_PIECES = KEYS * ROW_BYTES / PIECE;  // of keys, and as many of values
constexpr int THREAD_PIECES = (RAW_PIECES + THREADS - 1) / THREADS;
constexpr int RAW_BYTES = IS_FP16 ? 0 : 2 * THREAD_PIECES * THREADS * PIECE;
constexpr int RAW_PARAMETERS = RAW + RAW_BYTES;  // (scale, zero) of each piece's row
constexpr int RAW_PARAMETER_BYTES = HAS_TOKEN_SCALES ? RAW_BYTES / 4 : 0;
static_assert(RAW_PARAMETERS + RAW_PARAMETER_BYTES <= SHARED_BYTES, "too much shared memory");

extern __shared__ __align__(128) uint8 shared[];

constexpr float SCORE_SCALE = (D == 64 ? 0.125f : D == 96 ? 0.10206207262f : D == 128 ? 0.08838834765f : 0.0625f) *
                              1.44269504089f;  // 1 / sqrt(D), and softmax in powers of two
constexpr float WEIGHT_EXPONENT = 6.0f;        // weights are scaled by 2^6: below 6e-5 fp16 loses bits
// Below every score, and finite: a window can mask all of the first keys that a row meets, and no NaN must be made of
// -inf - -inf
constexpr float LOWEST = -1e30f;
constexpr bool HAS_WINDOW = WINDOW;

// The keys and values that this thread block reads: positions 0 .. stop - 1 of a sequence's kv head
struct Context {
    const uint8* kv_cache;
    const int* block_tables;
    int max_blocks, num_kv_heads;  // so far what the kernel was given
    int sequence, kv_head, stop;

    __device__ __forceinline__ const uint8* head_block(int tile) const {
        int first = tile * KEYS;
        int64 block = first < stop ? block_tables[int64(sequence) * max_blocks + first / BLOCK_TOKENS] : 0;
        return kv_cache + (block * num_kv_heads + kv_head) * HEAD_BLOCK_BYTES;
    }
};

// ---- INT8: copy, convert ----------------------------------------------------------------------------------------------------

struct Converter {
    // Piece i of this thread: its row in the tile and its place there; false if there is none
    static __device__ __forceinline__ bool piece_of(int i, int& row, int& piece) {
        int index = threadIdx.x + i * THREADS;
        row = index / SharedRows<ROW_BYTES>::PIECES;
        piece = index % SharedRows<ROW_BYTES>::PIECES;
        return RAW_PIECES % THREADS == 0 || index < RAW_PIECES;
    }

    static __device__ __forceinline__ int raw_index(int which, int i) {
        return (which * THREAD_PIECES + i) * THREADS + threadIdx.x;
    }

    static __device__ __forceinline__ void copy(const Context& context, int tile) {
        const uint8* block = context.head_block(tile);
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; i++) {
                int row, piece;
                if (!piece_of(i, row, piece)) continue;
                bool is_there = tile * KEYS + row < context.stop;
                int token = tile * KEYS % BLOCK_TOKENS + row;
                if (is_there)
                    copy_16_async(shared_address(shared + RAW + raw_index(which, i) * PIECE),
                                  block + which * VALUES_START + token * ROW_BYTES + piece * PIECE);
                // Past the end scale and zero are 0, and so is what bytes become. By channel it is what lay there before:
                // it has no weight, and is finite.
                if constexpr (HAS_TOKEN_SCALES)
                    copy_4_async(shared_address(shared + RAW_PARAMETERS + raw_index(which, i) * 4),
                             block + KEY_PARAMETERS + (which * BLOCK_TOKENS + token) * 4, is_there);
            }
        commit_copies();
    }

    static __device__ __forceinline__ void convert(uint8* tiles) {
        wait_copies<0>();
#pragma unroll
        for (int which = 0; which < 2; which++)
#pragma unroll
            for (int i = 0; i < THREAD_PIECES; i++) {
                int row, piece;
                if (!piece_of(i, row, piece)) continue;
                uint4 bytes = *reinterpret_cast<const uint4*>(shared + RAW + raw_index(which, i) * PIECE);
                uint32 parameters = 0;
                if constexpr (HAS_TOKEN_SCALES)
                    parameters = *reinterpret_cast<const uint32*>(shared + RAW_PARAMETERS + raw_index(which, i) * 4);
                uint32 scale = broadcast_low(parameters), zero = broadcast_high(parameters);
                uint8* to = tiles + which * TILE_BYTES;
                *reinterpret_cast<uint4*>(to + Rows::offset(row, 2 * piece)) =
                    make_uint4(pair<0>(bytes.x, scale, zero), pair<1>(bytes.x, scale, zero),
                               pair<0>(bytes.y, scale, zero), pair<1>(bytes.y, scale, zero));
                *reinterpret_cast<uint4*>(to + Rows::offset(row, 2 * piece + 1)) =
                    make_uint4(pair<0>(bytes.z, scale, zero), pair<1>(bytes.z, scale, zero),
                               pair<0>(bytes.w, scale, zero), pair<1>(bytes.w, scale, zero));
            }
    }

    // Bytes 2 which and 2 which + 1 of a word as numbers
    template <int which>
    static __device__ __forceinline__ uint32 pair(uint32 four, uint32 scale, uint32 zero) {
        uint32 magic = __byte_perm(four ^ 0x80808080, 0x64646464, which ? 0x4342 : 0x4140);
        uint32 number = half2_add(magic, MINUS_1152);
        return HAS_TOKEN_SCALES ? half2_fma(number, scale, zero) : number;
    }
};

// ---- fp16: copy straight to where it is used ----------------------------------------------------------------------------------

DEVICE void copy_fp16(const Context& context, int tile, uint8* tiles) {
    const uint8* block = context.head_block(tile);
#pragma unroll
    for (int which = 0; which < 2; which++)
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; i++) {
            int index = threadIdx.x + i * THREADS, row = index / Rows::PIECES, piece = index % Rows::PIECES;
            if (RAW_PIECES % THREADS != 0 && index >= RAW_PIECES) continue;
            int token = tile * KEYS % BLOCK_TOKENS + row;
            // Zeros past the end: a weight of 0 times what happens to lie there must not be NaN
            copy_16_async(shared_address(tiles + which * TILE_BYTES + Rows::offset(row, piece)),
                          block + which * VALUES_START + token * ROW_BYTES + piece * PIECE,
                          tile * KEYS + row < context.stop);
        }
    commit_copies();
}

// ---- one warp's rows ------------------------------------------------------------------------------------------------------------

// Lane (g, t) has rows 16 i + 8 r + g of the warp's: [i][r].
struct State {
    float acc[ROW_TILES][DIM_TILES][4];
    float maximum[ROW_TILES][2], total[ROW_TILES][2];  // total: of this lane's columns alone
    int context, last, group_size;                     // row r sees up to position context + min(last, r / group_size)
    int window;                                        // and the last so many of them
    int least_visible, most_visible;                   // of the warp's rows

    __device__ __forceinline__ void start(const TileEntry& entry, int heads, int newest) {
        int warp = threadIdx.x / WARP;
        context = entry.context, last = entry.num_rows - 1, group_size = heads, window = newest;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
            for (int n = 0; n < DIM_TILES; n++) acc[i][n][0] = acc[i][n][1] = acc[i][n][2] = acc[i][n][3] = 0.0f;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                maximum[i][r] = LOWEST;
                total[i][r] = 0.0f;
            }
        }
        least_visible = visible(warp * ROW_TILES * 16);
        most_visible = visible((warp + 1) * ROW_TILES * 16 - 1);
    }

    __device__ __forceinline__ int visible(int row) const { return context + min(last, row / group_size); }

    // Keys and values of positions `first` .. first + KEYS - 1
    __device__ __forceinline__ void attend(const uint8* keys, int first) {
#pragma unroll 1
        for (int stop = first + KEYS; first < stop && first < most_visible; first += PART) {
            float scores[ROW_TILES][KEY_TILES][4];
            uint32 weights[ROW_TILES][KEY_TILES][2];
            multiply_keys(keys, scores);
            if (first + PART > least_visible || (HAS_WINDOW && first < most_visible - window)) mask(first, scores);
            weigh(scores, weights);
            multiply_values(keys + TILE_BYTES, weights);
            keys += PART * Rows::STRIDE;
        }
    }

    __device__ __forceinline__ void multiply_keys(const uint8* keys, float (&scores)[ROW_TILES][KEY_TILES][4]) const {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        uint32 q_from = shared_address(shared + Q) + Rows::offset(warp * ROW_TILES * 16 + lane % 16, lane / 16);
        uint32 keys_from = shared_address(keys) + Rows::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        forget(q_from);
        forget(keys_from);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++)
                scores[i][n][0] = scores[i][n][1] = scores[i][n][2] = scores[i][n][3] = 0.0f;
#pragma unroll 4
        for (int s = 0; s < STEPS; s++) {
            uint32 q[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
                load_matrices(q[i], Rows::further(q_from, 2 * s) + i * 16 * Rows::STRIDE);
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                uint32 k[4];
                load_matrices(k, Rows::further(keys_from, 2 * s) + n * 8 * Rows::STRIDE);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    mma_16816(scores[i][n], q[i], k[0], k[1]);
                    mma_16816(scores[i][n + 1], q[i], k[2], k[3]);
                }
            }
        }
    }

    __device__ __forceinline__ void mask(int first, float (&scores)[ROW_TILES][KEY_TILES][4]) const {
        int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int first_hidden = visible((warp * ROW_TILES + i) * 16 + 8 * r + g) - first - 2 * t;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        if (HAS_WINDOW ? uint32(first_hidden - 1 - (n * 8 + j)) >= uint32(window) : n * 8 + j >= first_hidden)
                            scores[i][n][2 * r + j] = negative_infinity();
            }
    }

    // Scores to weights; maxima, totals and sums on
    __device__ __forceinline__ void weigh(const float (&scores)[ROW_TILES][KEY_TILES][4],
                                          uint32 (&weights)[ROW_TILES][KEY_TILES][2]) {
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
            float correction[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float best = maximum[i][r];
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++)
                    best = fmaxf(best, fmaxf(scores[i][n][2 * r], scores[i][n][2 * r + 1]));
                best = fmaxf(best, __shfl_xor_sync(FULL_WARP, best, 1));
                best = fmaxf(best, __shfl_xor_sync(FULL_WARP, best, 2));
                correction[r] = exp2_fast((maximum[i][r] - best) * SCORE_SCALE);
                maximum[i][r] = best;
                float base = fmaf(best, SCORE_SCALE, -WEIGHT_EXPONENT), sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
                    float first = exp2_fast(fmaf(scores[i][n][2 * r], SCORE_SCALE, -base));
                    float second = exp2_fast(fmaf(scores[i][n][2 * r + 1], SCORE_SCALE, -base));
                    sum += first + second;
                    weights[i][n][r] = floats_to_half2(first, second);
                }
                total[i][r] = fmaf(total[i][r], correction[r], sum);
            }
            // Most tiles raise no maximum; multiplying by 1 can be left out
            if (!__any_sync(FULL_WARP, correction[0] != 1.0f || correction[1] != 1.0f)) continue;
#pragma unroll
            for (int n = 0; n < DIM_TILES; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) acc[i][n][c] *= correction[c >> 1];
        }
    }

    __device__ __forceinline__ void multiply_values(const uint8* values,
                                                    const uint32 (&weights)[ROW_TILES][KEY_TILES][2]) {
        int lane = threadIdx.x % WARP;
        uint32 from = shared_address(values) + Rows::offset(lane % 16, lane / 16);
        forget(from);
#pragma unroll
        for (int s = 0; s < PART / 16; s++) {
            uint32 w[ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
                for (int c = 0; c < 4; c++) w[i][c] = weights[i][2 * s + c / 2][c % 2];
#pragma unroll
            for (int n = 0; n < DIM_TILES; n += 2) {
                uint32 v[4];
                load_matrices_transposed(v, Rows::further(from, n) + s * 16 * Rows::STRIDE);
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    mma_16816(acc[i][n], w[i], v[0], v[1]);
                    mma_16816(acc[i][n + 1], w[i], v[2], v[3]);
                }
            }
        }
    }

    // out: the first token's first head of this kv head; values: its channels' scales and zeros, if there are
    __device__ __forceinline__ void store(uint16* out, int num_rows, int group_size, int out_row_size,
                                          const float* values) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        values += 2 * t;
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float sum = total[i][r];
                sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                float inverse = 1.0f / sum;
                int row = (warp * ROW_TILES + i) * 16 + 8 * r + g;
                if (row >= num_rows) continue;
                uint16* to = out + int64(row / group_size) * out_row_size + row % group_size * D + 2 * t;
#pragma unroll
                for (int n = 0; n < DIM_TILES; n++) {
                    float first = acc[i][n][2 * r] * inverse, second = acc[i][n][2 * r + 1] * inverse;
                    if constexpr (HAS_CHANNELS) {
                        float2 scale = *reinterpret_cast<const float2*>(values + n * 8);
                        float2 zero = *reinterpret_cast<const float2*>(values + D + n * 8);
                        first = fmaf(first, scale.x, zero.x);
                        second = fmaf(second, scale.y, zero.y);
                    }
                    *reinterpret_cast<uint32*>(to + n * 8) = floats_to_half2(first, second);
                }
            }
    }
};

// q: the first token's first head of this kv head. Rows that are not there become 0.
DEVICE void copy_queries(const uint16* q, int num_rows, int group_size, int row_size) {
    uint32 to = shared_address(shared + Q);
    for (int i = threadIdx.x; i < ROWS * Rows::PIECES; i += THREADS) {
        int row = i / Rows::PIECES, piece = i % Rows::PIECES;
        int64 from = int64(row / group_size) * row_size + row % group_size * D + piece * (PIECE / 2);
        copy_16_async(to + Rows::offset(row, piece), row < num_rows ? q + from : q, row < num_rows);
    }
    commit_copies();
}

// Times the keys' scales, each thread what it has itself copied
DEVICE void scale_queries(const float* scales) {
    for (int i = threadIdx.x; i < ROWS * Rows::PIECES; i += THREADS) {
        int row = i / Rows::PIECES, piece = i % Rows::PIECES;
        uint32* q = reinterpret_cast<uint32*>(shared + Q + Rows::offset(row, piece));
        const float2* of_piece = reinterpret_cast<const float2*>(scales) + piece * 4;
#pragma unroll
        for (int j = 0; j < 4; j++)
            q[j] = floats_to_half2(low_half(q[j]) * of_piece[j].x, high_half(q[j]) * of_piece[j].y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_prefill(const uint16* qkv, const uint8* kv_cache, const int* block_tables, const int* plan, uint16* out,
                      int max_blocks, int window, int num_heads, int num_kv_heads, const float* channels) {
    grid_launch_dependents();
    grid_wait();
    int index = blockIdx.x / num_kv_heads, kv_head = blockIdx.x % num_kv_heads;
    if (index >= plan[0]) return;
    int4 words = reinterpret_cast<const int4*>(plan + PLAN_HEADER)[index];
    TileEntry entry = {words.x, words.y, words.z, words.w};
    if (HAS_WINDOW) {  // positions count from the block that the first row's window begins in
        int skipped = blocks_before(entry.context, window);
        entry.context -= skipped * BLOCK_TOKENS;
        block_tables += skipped;
    }
    int group_size = num_heads / num_kv_heads, num_rows = entry.num_rows * group_size;
    if (num_rows > ROWS) __trap();  // planned for another device

    int row_size = (num_heads + 2 * num_kv_heads) * D, first_head = kv_head * group_size;
    copy_queries(qkv + int64(entry.first_row) * row_size + first_head * D, num_rows, group_size, row_size);
    Context context = {kv_cache,       block_tables, max_blocks, num_kv_heads,
                       entry.sequence, kv_head,      entry.context + entry.num_rows - 1};
    int num_tiles = (context.stop + KEYS - 1) / KEYS;

    State state;
    state.start(entry, group_size, window);
    if constexpr (IS_FP16) {
        copy_fp16(context, 0, shared + TILES);
        for (int tile = 0; tile < num_tiles; tile++) {
            wait_copies<0>();
            __syncthreads();  // this tile is complete, the other one has been used
            if (tile + 1 < num_tiles) copy_fp16(context, tile + 1, shared + TILES + (tile + 1) % 2 * 2 * TILE_BYTES);
            state.attend(shared + TILES + tile % 2 * 2 * TILE_BYTES, tile * KEYS);
        }
    } else {
        Converter::copy(context, 0);
        Converter::convert(shared + TILES);  // waits for q, too
        if constexpr (HAS_CHANNELS) scale_queries(channels + kv_head * CHANNEL_FLOATS);
        Converter::copy(context, 1);
        int turn = threadIdx.x / WARP % 8 / 4;  // warps 4 to 7 convert after their products
        for (int tile = 0; tile < num_tiles; tile++) {
            __syncthreads();
#pragma unroll 1
            for (int phase = 0; phase < 2; phase++) {
                if (phase != turn) {
                    state.attend(shared + TILES + tile % 2 * 2 * TILE_BYTES, tile * KEYS);
                } else if (tile + 1 < num_tiles) {
                    Converter::convert(shared + TILES + (tile + 1) % 2 * 2 * TILE_BYTES);
                    Converter::copy(context, tile + 2);
                }
            }
        }
    }
    state.store(out + (int64(entry.first_row) * num_heads + first_head) * D, num_rows, group_size, num_heads * D,
                HAS_CHANNELS ? channels + kv_head * CHANNEL_FLOATS + 2 * D : nullptr);
}
