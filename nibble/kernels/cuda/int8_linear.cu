// y = x @ w.T, then + bias, += residual or silu(gate) * up, for INT8 rows; w[n, k] = scales[n, k / group] * values[n, k].
//
// Shapes: x fp16 (T, K); values int8 (N, K) row-major; scales fp16 (N, K / group); bias float32 (N); out see Output.
// Bytes: N * (K + 2 * K / group) once (from HBM; a thread block that takes other tokens finds them in L2), 2 * T * K of
// x per thread block, the result.
//
// Weights are the A operand of mma.m16n8k16, so 1 to 8 tokens cost one column tile. They become fp16 exactly (|v| <= 128)
// and are scaled as fp32 sums: of CHUNK columns, or of the whole row where it has one scale.
// - Thread block: 8 warps; a contiguous range of units (rows of one warp), ROW_WARPS of them at a time, and one chunk of
//   tokens. K_WARPS > 1 cuts K among warps, for matrices with too few rows to give every warp some.
// - Warp: ROW_FRAGMENTS * 16 rows x all tokens of the thread block. It copies its own rows: a ring of `stages` in shared
//   memory, the first of them asked for before the kernel that makes x has ended.
// - Lane (g = lane / 4, t = lane % 4): rows g and g + 8 of a fragment, and CHUNK / 4 neighbouring columns of each CHUNK
//   starting at t * CHUNK / 4. The mma's own order of columns is another one; as both operands use ours, its sums are
//   over the same products, and a lane's columns come from shared memory in one load.
//
// The order of additions depends on K, CHUNK and K_WARPS, which depend on the weight alone: a token's result is the same
// whatever the other tokens are (bit for bit).
//
// Measured on an H100 80GB HBM3, share of its 3.02 TB/s (L2-cold, graph replay), by tokens; the last columns are TFLOP/s:
//                                         1      8     16     32     64    128  256
//   128256 x 4096, scale per row      90.8 %   88.6   86.4   82.7   70.4    279  293
//   152064 x 3584, scale per row      91.9 %   89.4   87.3   81.9   69.6    287  289
//   49152 x 576, groups of 32         61.9 %   61.1   54.4   40.4   29.1    136  144
//   28672 x 4096, groups of 32        61.5 %   60.3   39.1   39.2   20.4     75   75
//   4096 x 4096, groups of 32         55.6 %   54.3   37.9   37.8   19.8     74   75
#include "common.cuh"

#ifndef CHUNK
#define CHUNK 64
#endif
#ifndef WHOLE_ROW
#define WHOLE_ROW 1
#endif
static_assert(CHUNK == 64 || CHUNK == 32 || CHUNK == 16, "the columns of one to four mma");

constexpr int WARPS = 8;
constexpr int COLUMN_TILE = 8;  // tokens of one mma

enum Output { LOGITS = 0, HALF = 1, RESIDUAL = 2, GATED = 3 };

struct Arguments {
    const uint16* x;
    const int8* values;
    const uint16* scales;
    const float* bias;
    void* out;
    int num_tokens, num_rows, num_columns, group_size, stages, output;
};

template <int ROW_FRAGMENTS, int TOKEN_TILES, int K_WARPS>
struct Shape {
    static constexpr int ROWS = ROW_FRAGMENTS * 16;                 // of a warp
    static constexpr int TOKENS = TOKEN_TILES * COLUMN_TILE;        // of a thread block
    static constexpr int ROW_WARPS = WARPS / K_WARPS;
    static constexpr int COLUMNS = K_WARPS == 1 ? 128 : 64;         // of a warp and stage
    static constexpr int STAGE_COLUMNS = COLUMNS * K_WARPS;
    static constexpr int WEIGHT_BYTES = WARPS * ROWS * COLUMNS;     // of a stage
    static constexpr int STAGE_BYTES = WEIGHT_BYTES + TOKENS * STAGE_COLUMNS * 2;
    static constexpr int CHUNKS = COLUMNS / CHUNK;                  // of a warp and stage
    static constexpr int SCALE_REGISTERS = CHUNKS > 4 ? CHUNKS / 4 : 1;
    static constexpr int CHUNKS_AT_ONCE = !WHOLE_ROW && TOKEN_TILES > 2 && SCALE_REGISTERS == 1 ? 1 : CHUNKS;
    // Bounds the registers: with more scales, the tiles' partial sums take some too.
    static constexpr int MOST_TILES = WHOLE_ROW ? 4 : 2;
    static constexpr int TILES_AT_ONCE = TOKEN_TILES < MOST_TILES ? TOKEN_TILES : MOST_TILES;
};

template <int ROW_FRAGMENTS, int TOKEN_TILES, int K_WARPS>
struct Linear : Shape<ROW_FRAGMENTS, TOKEN_TILES, K_WARPS> {
    using S = Shape<ROW_FRAGMENTS, TOKEN_TILES, K_WARPS>;

    const Arguments& p;
    const int warp, lane, g, t;
    const int k_warp, first_token;
    const int first_unit, last_unit, k_stages;
    const uint32 ring;

    __device__ Linear(const Arguments& arguments, const void* shared)
        : p(arguments),
          warp(threadIdx.x / WARP),
          lane(threadIdx.x % WARP),
          g(lane / 4),
          t(lane % 4),
          k_warp(warp % K_WARPS),
          first_token(blockIdx.x * S::TOKENS),
          first_unit(unit_of(arguments, blockIdx.y)),
          last_unit(unit_of(arguments, blockIdx.y + 1)),
          k_stages((arguments.num_columns + S::STAGE_COLUMNS - 1) / S::STAGE_COLUMNS),
          ring(shared_address(shared)) {}

    // Units are dealt evenly, so that all thread blocks read as many bytes
    static __device__ int unit_of(const Arguments& p, int block) {
        const int units = (p.num_rows + S::ROWS - 1) / S::ROWS;
        return int(int64(block) * units / gridDim.y);
    }

    __device__ int unit(int round) const { return first_unit + round * S::ROW_WARPS + warp / K_WARPS; }
    __device__ bool has_unit(int round) const { return unit(round) < last_unit; }

    // Rows past the end read the last one; their results are not stored.
    __device__ int row_in_bounds(int row) const { return row < p.num_rows ? row : p.num_rows - 1; }

    // ---- shared memory of a stage: weights [warp][row][column], then x [k warp][token][column], in pieces of 16 bytes
    // whose place is permuted within a row so that the loads of `multiply` touch every bank once.

    static __device__ int weight_swizzle(int row) {
        return ((row & 1) * 4 | (row & 2) | (row >> 2 & 1)) & (S::COLUMNS / 16 - 1);
    }
    static __device__ int x_swizzle(int token) { return (token & 1) * 5 ^ (token & 2); }

    __device__ uint32 weight_address(int slot, int row) const {
        return ring + slot * S::STAGE_BYTES + (warp * S::ROWS + row) * S::COLUMNS;
    }
    __device__ uint32 x_address(int slot, int slice, int token) const {
        return ring + slot * S::STAGE_BYTES + S::WEIGHT_BYTES + (slice * S::TOKENS + token) * S::COLUMNS * 2;
    }

    __device__ void load_weights(int slot, int round, int stage) const {
        if (!has_unit(round)) return;
        constexpr int PIECES = S::COLUMNS / 16, ROWS_AT_ONCE = WARP / PIECES;
        const int piece = lane % PIECES, column = stage * S::STAGE_COLUMNS + k_warp * S::COLUMNS + piece * 16;
        const bool valid = column < p.num_columns;
        const int8* source = p.values + (valid ? column : 0);
#pragma unroll
        for (int i = 0; i < S::ROWS / ROWS_AT_ONCE; i++) {
            const int row = i * ROWS_AT_ONCE + lane / PIECES;
            const uint32 target = weight_address(slot, row) + (piece ^ weight_swizzle(row)) * 16;
            copy_16_async(target, source + int64(row_in_bounds(unit(round) * S::ROWS + row)) * p.num_columns, valid);
        }
    }

    __device__ void load_x(int slot, int stage) const {
        constexpr int PIECES = S::COLUMNS / 8, TOTAL = S::TOKENS * K_WARPS * PIECES;
#pragma unroll
        for (int i = threadIdx.x; i < TOTAL; i += WARPS * WARP) {
            const int piece = i % PIECES, slice = i / PIECES % K_WARPS, token = i / (PIECES * K_WARPS);
            const int column = stage * S::STAGE_COLUMNS + slice * S::COLUMNS + piece * 8;
            const bool valid = column < p.num_columns && first_token + token < p.num_tokens;
            const uint16* source = p.x + (valid ? int64(first_token + token) * p.num_columns + column : 0);
            copy_16_async(x_address(slot, slice, token) + (piece ^ x_swizzle(token)) * 16, source, valid);
        }
    }

    // ---- scales: lane t holds those of chunks t, t + 4 .. of a stage for its rows; or, with WHOLE_ROW, the row's

    typedef uint16 Scales[ROW_FRAGMENTS][2][S::SCALE_REGISTERS];

    __device__ void load_scales(Scales& scales, int round, int stage) const {
        if (!has_unit(round)) return;
        const int num_groups = p.num_columns / p.group_size;
#pragma unroll
        for (int i = 0; i < S::SCALE_REGISTERS; i++) {
            const int chunk = i * 4 + t % S::CHUNKS;
            const int column = stage * S::STAGE_COLUMNS + k_warp * S::COLUMNS + chunk * CHUNK;
            const int group = WHOLE_ROW ? 0 : min(column, p.num_columns - 1) / p.group_size;
#pragma unroll
            for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = row_in_bounds(unit(round) * S::ROWS + fragment * 16 + half * 8 + g);
                    scales[fragment][half][i] = p.scales[int64(row) * num_groups + group];
                }
        }
    }

    typedef float Sums[ROW_FRAGMENTS][TOKEN_TILES][4];

    // CHUNK / 4 neighbouring bytes (a lane's share of a chunk of a row)
    static __device__ void load_shared(uint32 (&words)[CHUNK / 16], uint32 address) {
        if constexpr (CHUNK == 64)
            asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
        else if constexpr (CHUNK == 32)
            asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
        else
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
    }

    __device__ void multiply_chunk(Sums& sums, int slot, int chunk, const Scales& scales) const {
        constexpr int STEPS = CHUNK / 16;  // mma per chunk
        const int column = chunk * CHUNK + t * (CHUNK / 4);
        uint32 a[ROW_FRAGMENTS][STEPS][4];
#pragma unroll
        for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = fragment * 16 + half * 8 + g;
                uint32 words[STEPS];
                load_shared(words, weight_address(slot, row) + (column / 16 ^ weight_swizzle(g)) * 16 + column % 16);
#pragma unroll
                for (int step = 0; step < STEPS; step++)
                    int8_to_half(words[step], a[fragment][step][half], a[fragment][step][half + 2]);
            }
        float scale[ROW_FRAGMENTS][2];
        if constexpr (!WHOLE_ROW) {
#pragma unroll
            for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
                for (int half = 0; half < 2; half++)
                    scale[fragment][half] = half_to_float(uint16(
                        __shfl_sync(FULL_WARP, uint32(scales[fragment][half][S::SCALE_REGISTERS == 1 ? 0 : chunk / 4]),
                        (lane & ~3) | (chunk & 3))));
        }
#pragma unroll
        for (int first = 0; first < TOKEN_TILES; first += S::TILES_AT_ONCE) {
            uint32 b[S::TILES_AT_ONCE][STEPS * 2];
#pragma unroll
            for (int tile = 0; tile < S::TILES_AT_ONCE; tile++)
                load_x_fragment(b[tile], x_address(slot, k_warp, (first + tile) * COLUMN_TILE + g), column);
            if constexpr (WHOLE_ROW)
                multiply_tiles<STEPS>(sums, first, a, b);
            else {
                Sums parts;  // only TILES_AT_ONCE tiles of it are used, and kept in registers
#pragma unroll
                for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
                    for (int tile = first; tile < first + S::TILES_AT_ONCE; tile++)
#pragma unroll
                        for (int i = 0; i < 4; i++) parts[fragment][tile][i] = 0;
                multiply_tiles<STEPS>(parts, first, a, b);
#pragma unroll
                for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
                    for (int tile = first; tile < first + S::TILES_AT_ONCE; tile++)
#pragma unroll
                        for (int i = 0; i < 4; i++)
                            sums[fragment][tile][i] =
                                __fmaf_rn(parts[fragment][tile][i], scale[fragment][i / 2], sums[fragment][tile][i]);
            }
        }
    }

    __device__ void load_x_fragment(uint32 (&b)[CHUNK / 8], uint32 token_address, int column) const {
        const int piece = column / 8, swizzle = x_swizzle(g);
        if constexpr (CHUNK == 16) {
            asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                         : "=r"(b[0]), "=r"(b[1])
                         : "r"(token_address + (piece ^ swizzle) * 16 + column % 8 * 2) : "memory");
        } else {
#pragma unroll
            for (int i = 0; i < CHUNK / 32; i++)
                asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(b[4 * i]), "=r"(b[4 * i + 1]), "=r"(b[4 * i + 2]), "=r"(b[4 * i + 3])
                             : "r"(token_address + (piece + i ^ swizzle) * 16) : "memory");
        }
    }

    template <int STEPS>
    static __device__ void multiply_tiles(Sums& sums, int first, const uint32 (&a)[ROW_FRAGMENTS][STEPS][4],
                                          const uint32 (&b)[S::TILES_AT_ONCE][STEPS * 2]) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int tile = 0; tile < S::TILES_AT_ONCE; tile++)
#pragma unroll
                for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
                    mma_16816(sums[fragment][first + tile], a[fragment][step], b[tile][2 * step], b[tile][2 * step + 1]);
    }

    // ---- results

    __device__ void store(int row, int token, float value) const {
        if (row >= p.num_rows || token >= p.num_tokens) return;
        const int64 place = int64(token) * p.num_rows + row;
        if (p.output == LOGITS)
            static_cast<float*>(p.out)[place] = value;
        else {
            if (p.bias) value += p.bias[row];
            if (p.output == HALF)
                static_cast<uint16*>(p.out)[place] = float_to_half(value);
            else
                static_cast<float*>(p.out)[place] += value;
        }
    }

    // Rows g of a fragment are gate, rows g + 8 the same neurons' up
    __device__ void store_gated(int row, int token, float gate, float up) const {
        if (row >= p.num_rows || token >= p.num_tokens) return;
        if (p.bias) {
            gate += p.bias[row];
            up += p.bias[row + 8];
        }
        const float value = gate / (1.0f + __expf(-gate)) * up;
        const int64 place = int64(token) * (p.num_rows / 2) + row / 16 * 8 + g;
        static_cast<uint16*>(p.out)[place] = float_to_half(value);
    }

    __device__ void store_fragment(int round, int fragment, int tile, const float (&d)[4]) const {
        const int row = unit(round) * S::ROWS + fragment * 16 + g;
        const int token = first_token + tile * COLUMN_TILE + 2 * t;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (p.output == GATED)
                store_gated(row, token + i, d[i], d[i + 2]);
            else {
                store(row, token + i, d[i]);
                store(row + 8, token + i, d[i + 2]);
            }
        }
    }

    __device__ void finish(Sums& sums, int round, const Scales& scales) const {
        if constexpr (WHOLE_ROW) {
#pragma unroll
            for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
                for (int tile = 0; tile < TOKEN_TILES; tile++)
#pragma unroll
                    for (int i = 0; i < 4; i++) sums[fragment][tile][i] *= half_to_float(scales[fragment][i / 2][0]);
        }
        if constexpr (K_WARPS == 1) {
            if (!has_unit(round)) return;
#pragma unroll
            for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
                for (int tile = 0; tile < TOKEN_TILES; tile++) store_fragment(round, fragment, tile, sums[fragment][tile]);
        } else {
            add_up(sums, round);
        }
    }

    // The warps' sums over their columns, added warp by warp. Behind the ring; the next round's stages part its reads
    // from its next writes.
    __device__ void add_up(Sums& sums, int round) const {
        static_assert(K_WARPS == 1 || K_WARPS == WARPS, "one unit per thread block");
        constexpr int FRAGMENTS = ROW_FRAGMENTS * TOKEN_TILES;
        const uint32 partial = ring + p.stages * S::STAGE_BYTES + lane * 16;
#pragma unroll
        for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
            for (int tile = 0; tile < TOKEN_TILES; tile++) {
                const float(&d)[4] = sums[fragment][tile];
                asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(
                                 partial + (warp * FRAGMENTS + fragment * TOKEN_TILES + tile) * 512),
                             "f"(d[0]), "f"(d[1]), "f"(d[2]), "f"(d[3]) : "memory");
            }
        __syncthreads();
        for (int index = warp; index < FRAGMENTS; index += WARPS) {
            float total[4] = {0, 0, 0, 0};
            for (int source = 0; source < K_WARPS; source++) {
                float d[4];
                asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                             : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                             : "r"(partial + (source * FRAGMENTS + index) * 512) : "memory");
#pragma unroll
                for (int i = 0; i < 4; i++) total[i] += d[i];
            }
            store_fragment(round, index / TOKEN_TILES, index % TOKEN_TILES, total);
        }
    }

    // ---- the pipeline: one stage is multiplied while the next stages - 1 are on their way

    struct Cursor {
        int round = 0, stage = 0, slot = 0;

        __device__ void advance(int k_stages, int stages) {
            if (++stage == k_stages) stage = 0, round++;
            if (++slot == stages) slot = 0;
        }
    };

    __device__ void wait_for_oldest() const {
        if (p.stages >= 4)
            wait_copies<2>();
        else if (p.stages == 3)
            wait_copies<1>();
        else
            wait_copies<0>();
        __syncthreads();
    }

    __device__ void run() {
        grid_launch_dependents();
        const int rounds = (last_unit - first_unit + S::ROW_WARPS - 1) / S::ROW_WARPS;
        Scales scales = {}, next_scales = {};
        Cursor ahead;
        for (int i = 0; i < p.stages - 1 && ahead.round < rounds; i++, ahead.advance(k_stages, p.stages))
            load_weights(ahead.slot, ahead.round, ahead.stage);
        load_scales(next_scales, 0, 0);
        grid_wait();
        ahead = Cursor();
        for (int i = 0; i < p.stages - 1; i++, ahead.advance(k_stages, p.stages)) {
            if (ahead.round < rounds) load_x(ahead.slot, ahead.stage);
            commit_copies();
        }
        Cursor now;
        for (; now.round < rounds;) {
            Sums sums = {};
            for (int stage = 0; stage < k_stages; stage++) {
                wait_for_oldest();
                if (ahead.round < rounds) {
                    load_weights(ahead.slot, ahead.round, ahead.stage);
                    load_x(ahead.slot, ahead.stage);
                }
                commit_copies();
                ahead.advance(k_stages, p.stages);
                const int round = now.round, slot = now.slot;
                now.advance(k_stages, p.stages);
                if (!WHOLE_ROW || stage == 0) copy_scales(scales, next_scales);
                if (!WHOLE_ROW)
                    load_scales(next_scales, now.round, now.stage);
                else if (stage == 0)
                    load_scales(next_scales, round + 1, 0);
                if (!has_unit(round)) continue;
#pragma unroll S::CHUNKS_AT_ONCE
                for (int chunk = 0; chunk < S::CHUNKS; chunk++) multiply_chunk(sums, slot, chunk, scales);
            }
            finish(sums, now.round - 1, scales);
        }
    }

    static __device__ void copy_scales(Scales& target, const Scales& source) {
#pragma unroll
        for (int fragment = 0; fragment < ROW_FRAGMENTS; fragment++)
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int i = 0; i < S::SCALE_REGISTERS; i++) target[fragment][half][i] = source[fragment][half][i];
    }
};

extern __shared__ __align__(128) unsigned char shared_memory[];

#define LINEAR(NAME, ROW_FRAGMENTS, TOKEN_TILES, K_WARPS, BLOCKS)                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS* WARP, BLOCKS)                                                      \
        NAME(const uint16* x, const int8* __restrict__ values, const uint16* __restrict__ scales,             \
             const float* __restrict__ bias, void* out, int num_tokens, int num_rows, int num_columns,                     \
             int group_size, int stages, int output) {                                                                     \
        const Arguments arguments{x,        values,      scales,     bias,   out,   num_tokens,                            \
                                  num_rows, num_columns, group_size, stages, output};                                      \
        Linear<ROW_FRAGMENTS, TOKEN_TILES, K_WARPS>(arguments, shared_memory).run();                                       \
    }

// Many rows: a warp's own; few rows: K is cut among the warps of a thread block
LINEAR(tall_8, 2, 1, 1, 1)
LINEAR(tall_16, 2, 2, 1, 1)
LINEAR(tall_32, 2, 4, 1, 1)
LINEAR(tall_64, 2, 8, 1, 1)
LINEAR(short_8, 1, 1, 8, 2)
LINEAR(short_32, 2, 4, 8, 1)
