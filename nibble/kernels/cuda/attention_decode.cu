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
#include "attention_decode_copy.cuh"
#include "attention_decode_results.cuh"
#include "attention_decode_state.cuh"
#include "attention_decode_token.cuh"

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
