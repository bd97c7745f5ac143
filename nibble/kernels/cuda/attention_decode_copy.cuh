// Decode attention, see attention_decode.cu: the warp that copies.
#pragma once
#include "attention_decode.cuh"

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
