// Decode attention, see attention_decode.cu: the new token, which never comes from the cache.
//
// The warp that brings its k and v makes of them what the cache will hold, in the side and in the cache, while the others
// are at other tokens. Whoever needs them first brings them from there to where they would lie had they been cached:
// key, scales and zeros are used by the warp alone that has this token; the value by all, after the barrier of the weights.
#pragma once
#include "attention_decode_work.cuh"

constexpr int SIDE_ROWS[2] = {SIDE_KEY, SIDE_VALUE};

// One warp, after k, v and the table's row have come
struct NewTokenMaker {
    uint8* side;
    uint8* head_block;  // in the cache, or null: another tile appends
    int offset;         // in the block
    Channels channels;

    __device__ __forceinline__ NewTokenMaker(const Arguments& a, const HeadTile& tile, const Piece& piece, int block,
                                             uint8* side)
        : side(side), head_block(nullptr), offset((piece.context - 1) % BLOCK_TOKENS), channels(a.channels) {
        if (tile.appends(a)) head_block = a.kv_cache + (int64(block) * a.num_kv_heads + tile.kv_head) * HEAD_BLOCK_BYTES;
    }

    // which: 0 the key, 1 the value
    __device__ __forceinline__ void make(int which) const {
        uint8* at = side + SIDE_ROWS[which];
        HeadRow row;
        row.load(reinterpret_cast<const uint16*>(at));
        __syncwarp();
        if (which == 0) row.rotate_all(reinterpret_cast<const float*>(side + SIDE_TABLE));
        if constexpr (IS_FP16) {
            write(row, at, which);
        } else if constexpr (HAS_CHANNELS) {
            ChannelRow quantized(row, reinterpret_cast<const float*>(side + SIDE_CHANNELS) + which * 2 * D);
            write(quantized, at, which);
            if (head_block != nullptr) channels.count(quantized.num_saturated);
        } else {
            QuantizedRow quantized(row);
            write(quantized, at, which);
            if (threadIdx.x % WARP == 0) {
                reinterpret_cast<uint32*>(side + SIDE_PARAMETERS)[which] = quantized.parameters;
                uint8* to = head_block + KEY_PARAMETERS + (which * BLOCK_TOKENS + offset) * 4;
                if (head_block != nullptr) *reinterpret_cast<uint32*>(to) = quantized.parameters;
            }
        }
        __syncwarp();
    }

    template <typename Row>
    __device__ __forceinline__ void write(const Row& row, uint8* at, int which) const {
        uint8* cached = head_block + which * VALUES_START + offset * ROW_BYTES;
        store_cached_row(row, [&](int byte) { return at + byte; });
        if (head_block != nullptr) store_cached_row(row, [&](int byte) { return cached + byte; });
    }
};

// Of a group: for the warps that compute
struct NewToken {
    int token;  // in the group; below 0: not here
    Side side;

    __device__ __forceinline__ NewToken(const Arguments& a, const Piece& piece, int at, const Side& side)
        : token(piece.has_new_token(a, at) ? piece.context - 1 - at : -1), side(side) {}

    __device__ __forceinline__ bool is_in_tile(int tile) const { return token >= 0 && token / 16 == tile; }

    // The warp that has its tile, when the key's stage is full
    __device__ __forceinline__ void place_key(uint8* stage, uint8* scales) const {
        wait_barrier(side.has_new(0), side.parity);
        copy_row(stage, SIDE_KEY);
        copy_parameters(scales, 0);
        __syncwarp();
    }

    // The warp that has its tile, before it weighs the scores
    __device__ __forceinline__ void place_value_parameters(uint8* scales) const {
        if (!HAS_TOKEN_SCALES || token < 0 || token / 16 % WARPS != threadIdx.x / WARP) return;
        wait_barrier(side.has_new(1), side.parity);
        copy_parameters(scales, 1);
        __syncwarp();
    }

    // values: the group's first stage of values
    __device__ __forceinline__ void place_value(Place values) const {
        if (token < 0 || (token / 16 + 1) % WARPS != threadIdx.x / WARP) return;
        for (int s = 0; s < token / STAGE; s++) values.advance();
        wait_barrier(side.has_new(1), side.parity);
        wait_barrier(values.full(), values.parity);
        copy_row(values.bytes(), SIDE_VALUE);
    }

    __device__ __forceinline__ void copy_row(uint8* stage, int from) const {
        for (int byte = threadIdx.x % WARP * 4; byte < ROW_BYTES; byte += WARP * 4)
            *reinterpret_cast<uint32*>(stage + Rows::offset(token % STAGE, byte / PIECE) + byte % PIECE) =
                *reinterpret_cast<const uint32*>(side.bytes() + from + byte);
    }

    __device__ __forceinline__ void copy_parameters(uint8* scales, int which) const {
        if (!HAS_TOKEN_SCALES || threadIdx.x % WARP != 0) return;
        reinterpret_cast<uint32*>(scales + which * PARAMETER_BYTES)[token] =
            reinterpret_cast<const uint32*>(side.bytes() + SIDE_PARAMETERS)[which];
    }
};
