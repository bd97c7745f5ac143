// Decode attention, see attention_decode.cu: the new token, which never comes from the cache.
//
// Its key is needed by the warp that has that token, right away. Its value's (scale, zero) are needed after the barrier
// of the maxima, its value after that of the weights: another warp makes them, keeps the value in the side for a while
// and brings it to its stage when that is full.
#pragma once
#include "attention_decode.cuh"

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
