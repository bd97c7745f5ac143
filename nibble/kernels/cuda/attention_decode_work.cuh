// Decode attention, see attention_decode.cu: which splits are a thread block's, and where it leaves their sums.
//
// All splits of all (row, head tile) lie in one line: row by row, in a row head tile by head tile, their splits in order.
// A position in the line is called flat. The line is cut into shares of equal length, one per thread block: of pieces, of
// which only the first and the last may be parts of a (row, head tile).
#pragma once
#include "attention_decode.cuh"

struct Arguments {
    const uint16* qkv;
    uint8* kv_cache;
    const int* block_tables;
    const float* table;  // null: q is rotated and this token's k and v are in the cache already
    const int* positions;  // of the rows, for the table
    int* plan;
    float* records;
    uint16* out;
    int num_counters, window, num_heads, num_kv_heads, share_records;
    Channels channels;

    __device__ __forceinline__ int group_size() const { return num_heads / num_kv_heads; }
    __device__ __forceinline__ int tiles() const { return (group_size() + HEADS - 1) / HEADS; }
    __device__ __forceinline__ int head_tiles() const { return num_kv_heads * tiles(); }
    __device__ __forceinline__ int row_size() const { return (num_heads + 2 * num_kv_heads) * D; }

    // Of the row of a flat position. Past the L1, which may have kept what was there before.
    __device__ __forceinline__ SplitEntry entry(int flat) const {
        const int4* entries = reinterpret_cast<const int4*>(plan + PLAN_HEADER + num_counters);
        int4 words = __ldcg(entries + flat / head_tiles());
        return {words.x, words.y, words.z, words.w};
    }

    // `index` further on than first_block
    __device__ __forceinline__ int block(int first_block, int index) const {
        return __ldcg(block_tables + first_block + index);
    }
};

// A kv head and up to 8 of its query heads
struct HeadTile {
    int index, kv_head, first_head, num_heads;

    __device__ __forceinline__ HeadTile(const Arguments& a, int index) : index(index) {
        kv_head = index / a.tiles();
        int first = index % a.tiles() * HEADS;  // of the kv head's
        first_head = kv_head * a.group_size() + first;
        num_heads = min(HEADS, a.group_size() - first);
    }
    // Of the tiles that share a kv head one appends
    __device__ __forceinline__ bool appends(const Arguments& a) const { return index % a.tiles() == 0; }
};

// Share i has the flat positions start(i) .. start(i + 1) - 1.
struct Shares {
    int total, length, count;

    __device__ __forceinline__ explicit Shares(const Arguments& a) {
        int2 header = __ldcg(reinterpret_cast<const int2*>(a.plan));
        total = header.x * a.head_tiles();
        length = aligned((total + gridDim.x - 1) / gridDim.x, header.y);
        count = total == 0 ? 0 : (total + length - 1) / length;
    }

    // The least length there can be, or up to an eighth more where all rows have as many splits and shares then hold whole
    // rows or equal parts of them: what a cut row costs is more than what thread blocks then wait for each other.
    // attention_decode.py knows how long they may become.
    static __device__ __forceinline__ int aligned(int length, int row_splits) {
        if (row_splits == 0) return length;
        for (int longer = length; longer <= length + length / 8; longer++)
            if (longer % row_splits == 0 || row_splits % longer == 0) return longer;
        return length;
    }

    __device__ __forceinline__ int start(int share) const { return min(share * length, total); }
    __device__ __forceinline__ int owner(int flat) const { return flat / length; }
};

// Splits first .. stop - 1 of a (row, head tile)
struct __align__(16) Piece {
    int row, first_block, context, flat;  // flat: of split 0
    int tile, first, stop, unused;

    __device__ __forceinline__ int start() const { return first * split_length(context); }
    __device__ __forceinline__ int end() const { return min(stop * split_length(context), context); }
    // What lies before it is older than the window
    __device__ __forceinline__ int oldest(const Arguments& a) const { return a.window == 0 ? 0 : max(0, context - a.window); }
    __device__ __forceinline__ bool is_whole() const { return stop - first == num_splits(context); }

    // Whether it holds the row's newest token, whose k and v are still in qkv
    __device__ __forceinline__ bool has_new_token(const Arguments& a) const {
        return a.table != nullptr && context > 0 && end() == context;
    }
    // Whether the group of tokens from `at` on does
    __device__ __forceinline__ bool has_new_token(const Arguments& a, int at) const {
        return has_new_token(a) && at + GROUP >= context && at < context;
    }
};
static_assert(sizeof(Piece) == SIDE_PARAMETERS - SIDE_PIECE, "the piece's place in a side");

// The piece that begins at `flat` of the share that ends at `stop`
DEVICE Piece piece_at(const Arguments& a, const SplitEntry& entry, int flat, int stop) {
    int splits = num_splits(entry.context), local = flat - entry.first_entry * a.head_tiles();
    Piece piece;
    piece.row = entry.row;
    piece.first_block = entry.first_block;
    piece.context = entry.context;
    piece.tile = local / splits;
    piece.first = local % splits;
    piece.stop = min(splits, piece.first + stop - flat);
    piece.flat = flat - piece.first;
    piece.unused = 0;
    return piece;
}

// Calls use(piece) for each piece of this thread block's share; what the plan says of the next one is under way meanwhile.
template <typename Use>
DEVICE void for_each_piece(const Arguments& a, const Shares& shares, Use use) {
    int flat = shares.start(blockIdx.x), stop = shares.start(blockIdx.x + 1);
    SplitEntry next = a.entry(flat);
    while (flat < stop) {
        Piece piece = piece_at(a, next, flat, stop);
        flat += piece.stop - piece.first;
        if (flat < stop) next = a.entry(flat);
        use(piece);
    }
}

// ---- records: sums of splits in memory -------------------------------------------------------------------------------------
// A share has `share_records`: from the front those of its first piece's splits, if split 0 is another's; the last is for
// its last piece, if that begins with split 0: added up already.

DEVICE int first_record(const Arguments& a, int share) { return share * a.share_records; }
DEVICE int last_record(const Arguments& a, int share) { return first_record(a, share + 1) - 1; }

// The records of a (row, head tile) that is in pieces: how many there are, and in lane l the l-th.
struct RecordList {
    int count, mine;

    __device__ __forceinline__ RecordList(const Arguments& a, const Shares& shares, const Piece& piece) {
        int lane = threadIdx.x % WARP, share = shares.owner(piece.flat);
        int next = shares.start(share + 1);  // the first split with a record of its own
        count = 1 + piece.flat + num_splits(piece.context) - next;
        mine = last_record(a, share);
        if (lane > 0 && lane < count) {
            share = shares.owner(next + lane - 1);
            mine = first_record(a, share) + next + lane - 1 - shares.start(share);
        }
    }
    __device__ __forceinline__ int operator[](int i) const { return __shfl_sync(FULL_WARP, mine, i); }
};
static_assert(MAX_SPLITS <= WARP, "a lane per record");
