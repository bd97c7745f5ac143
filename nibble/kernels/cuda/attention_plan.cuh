// How attention's work is cut; attention_plan.cu writes these plans, the attention kernels read them.
#pragma once
#include "common.cuh"

// DECODE: one query row's context is cut into splits of a length that depends on that context alone, so that the row's
// result does not depend on the batch. SPLIT_TOKENS keeps a batch of one spread over the device; MAX_SPLITS bounds what
// the thread block has to read that puts a row's splits together.
constexpr int SPLIT_TOKENS = 256;
constexpr int MAX_SPLITS = 32;

DEVICE int split_length(int num_tokens) {
    int quantum = SPLIT_TOKENS * MAX_SPLITS;
    return max(1, (num_tokens + quantum - 1) / quantum) * SPLIT_TOKENS;
}

// At least one: a row of no context at all has an empty split.
DEVICE int num_splits(int num_tokens) {
    int length = split_length(num_tokens);
    return max(1, (num_tokens + length - 1) / length);
}

// With a window of so many positions (0: none) a row sees none before the block that the window begins in; of that block
// what is older is masked.
DEVICE int blocks_before(int num_tokens, int window) {
    return window == 0 ? 0 : max(0, num_tokens - window) / BLOCK_TOKENS;
}

// One split of a row: the same for all of a row's splits, so that the row of any split is found in one step.
struct __align__(16) SplitEntry {
    int row;
    int first_block;  // in the block tables, of what the row sees: its sequence's first one, or the first in its window
    int context;      // positions that the row sees, counted from the beginning of that block: 0 .. context - 1
    int first_entry;  // of the row's splits, which lie one after the other
};

// A plan of DECODE, for up to ROWS_PER_PLAN rows: the number of entries, the number of splits of a row if it is the same for all (or
// 0), padding to 16 bytes, counters (one per row and head tile; zero, and left so by every kernel that uses them), entries.
constexpr int PLAN_HEADER = 4;
constexpr int ROWS_PER_PLAN = 256;

// One (sequence, query tile) of PREFILL. The plan: the number of entries, padding to 16 bytes, entries.
struct __align__(16) TileEntry {
    int sequence;
    int first_row;   // of q
    int num_rows;
    int context;     // positions that the first row sees; each further row sees one more
};
