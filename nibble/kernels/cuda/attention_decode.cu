// One query row per sequence over its paged keys and values (DECODE): rotate q and k, quantise and append this token's
// k and v, attend, combine the splits, all in one kernel per layer.
//
//   out[h] = sum_p w_p v_p / sum_p w_p,  w_p = exp((q_h k_p) / sqrt(D)),  k_p = scale_p k8_p + zero_p (v alike)
//
// qkv fp16 (T, (heads + 2 kv heads) D), cache (blocks, kv heads, head block of layout.py), out fp16 (T, heads D).
//
// Work: a row's context is cut into splits; all heads of a tile (up to 8 query heads of a kv head) share one reading of K
// and V. The grid is fixed, each thread block has an equal share of all splits of all tiles (attention_decode_work.cuh) and
// goes through it in groups of 256 tokens. One warp copies keys and values: it runs ahead of the others, keys and values of
// a group alternating, into a ring of 16 KB stages in shared memory. Another copies q and what else comes from the kernel
// before: only that one has to wait for it, so that keys and values are on their way while that kernel still runs. Eight
// warps compute; barriers in shared memory say which stages are full and which are free.
//
//   keys:    a warp has 32 of the group's tokens: scores^T (tokens x heads) = K (A operand) q^T (B operand).
//            INT8 keys become fp16 in registers, exactly; scale and zero are applied to the fp32 score:
//            q k_p = scale_p (q k8_p) + zero_p sum(q). Softmax weights times the value's scale go to shared memory.
//   values:  a warp has 16 of the D dimensions: out^T (dims x heads) += V^T (A operand) weights^T (B operand).
//            sum_p w_p zero_p is the same for all dimensions and is added at the end.
//   INT8 by channel (attention.cuh): the keys' scales go into q, the values' scales and zeros into the results.
//
// ldmatrix moves 16-bit units. Of INT8 keys a thread so gets 4 neighbouring bytes of a row, where the product wants 2
// and 2: q's elements are permuted alike, (0, 2), (1, 3) of each 4. Of INT8 values (transposed) it gets 2 neighbouring
// dimensions of 2 tokens: even bytes are a tile's row g, odd ones its row g + 8, so row g is dimension 2g, g + 8 is 2g + 1.
//
// Weights are scaled by 2^6: below 6e-5 fp16 loses bits, and the values' scales may be small. They stay below
// 64 * 514 (the largest scale there is), which fp16 holds.
//
// The new token is the last position of a row's last split: its keys and values never come from the cache. The warp that
// copies k and v makes them what the cache will hold, and the warps that need them first put them into the ring. That
// takes a ring that holds all values of a group: attention.py appends with a kernel of its own where rows are too long.
//
// A row's result is that of its splits added up in order, each time rescaled to the larger maximum. A thread block that has
// all splits of a row does so in registers. Where a row is cut between thread blocks, they leave unnormalised sums
// in memory, and the one that finishes last (a counter per row and head tile, left at zero) adds them up the same way. Every
// number is computed from the row's own context in an order fixed by positions, so a row's result does not depend on the
// batch.
//
// Bytes moved: per token and kv head 2 D + 8 (INT8) or 4 D (fp16); the sums of rows that are cut stay in L2. INT8, D = 128,
// 87 to 346 MB, of the 3.02 TB/s that an H100 80GB HBM3 reads: 87 to 95 % of it where shares end with rows, 80 to 84 % where
// they cut them (docs/performance.md).
#include "attention_decode_copy.cuh"
#include "attention_decode_results.cuh"
#include "attention_decode_state.cuh"
#include "attention_decode_token.cuh"
#include "attention_decode_work.cuh"

struct Computer {
    Place place;
    Scales scales;
    Side side;
    State state;

    // One piece; `row` becomes the sum of its splits if it begins with split 0. Otherwise each split gets a record.
    __device__ __forceinline__ void add_splits(const Arguments& a, const HeadTile& tile, const Piece& piece, Partial& row) {
        int at = piece.start(), end = piece.end(), length = split_length(piece.context), record = 0;
        bool is_first = true;
        prepare_queries(a, tile, side.bytes());
        row.clear();
        state.start();
        do {
            attend(a, piece, at, min(GROUP, end - at), is_first);
            is_first = false;
            at += GROUP;
            if (at % length != 0 && at < end) continue;
            Partial split;
            split.take(state);
            state.start();
            if (piece.first == 0)
                row.add(split);
            else
                split.store(record_at(a, first_record(a, blockIdx.x) + record++), tile.num_heads);
        } while (at < end);
        arrive(side.free());
        side.advance();
    }

    // The `count` tokens from `at` on
    __device__ __forceinline__ void attend(const Arguments& a, const Piece& piece, int at, int count, bool is_first) {
        NewToken new_token(a, piece, at, side);
        if (is_first) computing_barrier();
        float scores[KEY_TILES][4];
        state.multiply_keys(place, new_token, scales.bytes(), piece.oldest(a) - at, count, scores);
        state.raise_maxima(scores);
        new_token.place_value_parameters(scales.bytes());
        state.weigh(scales.bytes(), count, scores);
        if constexpr (HAS_TOKEN_SCALES) {
            arrive(scales.free());
            scales.advance();
        }
        new_token.place_value(place);
        computing_barrier();
        state.multiply_values(place, count);
    }

    __device__ __forceinline__ void run(const Arguments& a, const Shares& shares) {
        int flat = shares.start(blockIdx.x), stop = shares.start(blockIdx.x + 1);
        while (flat < stop) {
            wait_barrier(side.full(), side.parity);
            Piece piece = *reinterpret_cast<const Piece*>(side.bytes() + SIDE_PIECE);
            flat += piece.stop - piece.first;
            HeadTile tile(a, piece.tile);
            Partial row;
            add_splits(a, tile, piece, row);
            if (!piece.is_whole()) {
                if (piece.first == 0) row.store(record_at(a, last_record(a, blockIdx.x)), tile.num_heads);
                if (!is_last(a, piece)) continue;
                combine(a, shares, piece, tile.num_heads, row);
            }
            store_results(a, tile, piece, row);
        }
    }
};

// share_records: see attention_decode_work.cuh
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    attention_decode(const uint16* qkv, uint8* kv_cache, const int* block_tables, const float* table,
                     const int* positions, int* plan, float* records, uint16* out, int num_counters, int window,
                     int num_heads, int num_kv_heads, int share_records, const float* channels,
                     uint64* num_saturated) {
    grid_launch_dependents();
    init_barriers();
    __syncthreads();
    Arguments a = {qkv, kv_cache,     block_tables, table,     positions,    plan,          records,
                   out, num_counters, window,       num_heads, num_kv_heads, share_records, {channels, num_saturated}};
    // Without a table the kernel just before has written to the cache. Otherwise nobody has since the plan was made, and
    // plan and cache can be read at once (see attention_plan.cu).
    if (table == nullptr) grid_wait();
    Shares shares(a);
    if (blockIdx.x < shares.count) {
        if (threadIdx.x < COMPUTING) {
            grid_wait();
            Computer computer;
            computer.run(a, shares);
        } else if (threadIdx.x < COMPUTING + WARP) {
            CacheCopier copier;
            for_each_piece(a, shares, [&](const Piece& piece) { copier.copy(a, piece); });
        } else {
            SideCopier copier;
            for_each_piece(a, shares, [&](const Piece& piece) { copier.copy(a, piece); });
        }
    }
    grid_wait();
}
