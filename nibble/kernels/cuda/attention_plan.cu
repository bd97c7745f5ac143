// Cuts a batch's attention into work once per step, for all layers: lists of (row, split) or (sequence, query tile).
// What a plan is: attention_plan.cuh. Everything is read from the batch's arrays on the device, so that a captured step
// plans anew with each replay.
//
// One thread block per plan. Bytes moved: 12 per sequence, 16 per entry; what counts is latency, a few us per step.
#include "attention_plan.cuh"

constexpr int THREADS = 1024;
constexpr int MAX_SORTED = 2048;

// Sum of x over the threads before this one; `total` is the sum over all. All threads must call it.
DEVICE int exclusive_sum(int x, int& total) {
    __shared__ int sums[THREADS / WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, inclusive = x;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        int other = __shfl_up_sync(FULL_WARP, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    __syncthreads();  // the sums of a call before may still be read
    if (lane == WARP - 1) sums[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < THREADS / WARP; w++) {
        if (w == warp) before = total;
        total += sums[w];
    }
    return before + inclusive - x;
}

// The last i with starts[i] <= x
DEVICE int last_not_after(const int* starts, int count, int x) {
    int low = 0, high = count;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (starts[middle] <= x) low = middle; else high = middle;
    }
    return low;
}

// Thread block b plans rows b * ROWS_PER_PLAN and on, at plans + b * plan_size.
//
// Lets the next kernel start when the plan is made, not before: kernels start one after the other, so whichever starts
// later finds the plan, what it was made of, and all that was written before, without grid_wait(). attention_decode.cu
// relies on that.
extern "C" __global__ void __launch_bounds__(THREADS)
    plan_decode(const int* query_starts, const int* context_lens, int num_sequences, int num_rows, int max_blocks,
                int window, int num_counters, int plan_size, int* plans) {
    __shared__ int row_block[THREADS], row_context[THREADS], row_first[THREADS];
    grid_wait();
    int* plan = plans + int64(blockIdx.x) * plan_size;
    SplitEntry* entries = reinterpret_cast<SplitEntry*>(plan + PLAN_HEADER + num_counters);
    int first_row = blockIdx.x * ROWS_PER_PLAN, rows = min(ROWS_PER_PLAN, num_rows - first_row);

    int splits = 0;
    if (threadIdx.x < rows) {
        int row = first_row + threadIdx.x;
        int sequence = num_sequences == num_rows ? row : last_not_after(query_starts, num_sequences, row);
        int context = max(0, context_lens[sequence] - (query_starts[sequence + 1] - 1 - row));
        int skipped = blocks_before(context, window);
        context -= skipped * BLOCK_TOKENS;
        splits = num_splits(context);
        row_block[threadIdx.x] = sequence * max_blocks + skipped;
        row_context[threadIdx.x] = context;
    }
    int num_entries, different;
    int first = exclusive_sum(splits, num_entries);
    row_first[threadIdx.x] = first;
    exclusive_sum(threadIdx.x < rows && splits * rows != num_entries, different);  // from the mean

    if (threadIdx.x == 0) {
        plan[0] = num_entries;
        plan[1] = different == 0 ? splits : 0;
    }
    for (int i = threadIdx.x; i < num_counters; i += THREADS) plan[PLAN_HEADER + i] = 0;
    for (int i = threadIdx.x; i < num_entries; i += THREADS) {
        int r = last_not_after(row_first, rows, i);
        entries[i] = {first_row + r, row_block[r], row_context[r], row_first[r]};
    }
    __threadfence();
    __syncthreads();
    grid_launch_dependents();
}

// Thread block g plans for groups of g + 1 query heads per kv head, at plans + g * plan_size: tiles of as many tokens as
// have at most tile_rows rows. Those that see most keys come first, so that the last thread blocks are short ones.
extern "C" __global__ void __launch_bounds__(THREADS)
    plan_prefill(const int* query_starts, const int* context_lens, int num_sequences, int tile_rows, int plan_size,
                 int* plans) {
    __shared__ int lengths[MAX_SORTED];
    __shared__ int first_tile[THREADS];
    grid_launch_dependents();
    grid_wait();
    int* plan = plans + int64(blockIdx.x) * plan_size;
    TileEntry* entries = reinterpret_cast<TileEntry*>(plan + PLAN_HEADER);
    int tile_tokens = tile_rows / (blockIdx.x + 1);

    int num_tiles = 0;
    for (int s = threadIdx.x; s < num_sequences; s += THREADS)
        num_tiles += (query_starts[s + 1] - query_starts[s] + tile_tokens - 1) / tile_tokens;
    exclusive_sum(num_tiles, num_tiles);
    bool is_sorted = num_tiles <= MAX_SORTED;
    if (threadIdx.x == 0) plan[0] = num_tiles;

    // Two passes, THREADS sequences at a time: lengths, then entries, each at its rank among the lengths.
    for (int pass = is_sorted ? 0 : 1; pass < 2; pass++) {
        int before = 0;
        for (int base = 0; base < num_sequences; base += THREADS) {
            int s = base + threadIdx.x, count = min(THREADS, num_sequences - base), tiles = 0, tiles_here;
            if (s < num_sequences) tiles = (query_starts[s + 1] - query_starts[s] + tile_tokens - 1) / tile_tokens;
            int first = exclusive_sum(tiles, tiles_here);
            first_tile[threadIdx.x] = first;
            __syncthreads();
            for (int i = threadIdx.x; i < tiles_here; i += THREADS) {
                int r = last_not_after(first_tile, count, i), sequence = base + r;
                int start = query_starts[sequence], stop = query_starts[sequence + 1];
                TileEntry entry;
                entry.sequence = sequence;
                entry.first_row = start + (i - first_tile[r]) * tile_tokens;
                entry.num_rows = min(tile_tokens, stop - entry.first_row);
                entry.context = context_lens[sequence] - (stop - entry.first_row) + 1;
                int length = entry.context + entry.num_rows;
                if (pass == 0) {
                    lengths[before + i] = length;
                    continue;
                }
                int rank = before + i;
                if (is_sorted) {
                    rank = 0;
                    for (int other = 0; other < num_tiles; other++)
                        rank += lengths[other] > length || (lengths[other] == length && other < before + i);
                }
                entries[rank] = entry;
            }
            before += tiles_here;
            __syncthreads();
        }
    }
}
