// Decode attention, see attention_decode.cu: the warps that copy.
#pragma once
#include "attention_decode_token.cuh"
#include "attention_decode_work.cuh"

DEVICE void copy_pieces(uint32 to, const void* from, int num_pieces) {
    for (int i = threadIdx.x % WARP; i < num_pieces; i += WARP)
        copy_16_async(to + i * PIECE, static_cast<const uint8*>(from) + i * PIECE);
}

// What the cache holds is read once a step, and all of it: it should come in long runs, and push nothing out of the L2.
DEVICE uint64 read_once() {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// 16 bytes, as copy_16_async; where `valid` is false, zeros are written and nothing is read
DEVICE void copy_16_once(uint32 shared, const void* global, uint64 policy, bool valid = true) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::256B [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(bytes), "l"(policy)
                 : "memory");
}

// Everything but keys and values in the cache: waits for the kernel before, as late as possible. Makes the new token's.
struct SideCopier {
    Side side;

    __device__ __forceinline__ void copy(const Arguments& a, const Piece& piece) {
        HeadTile tile(a, piece.tile);
        bool has_new = piece.has_new_token(a);
        int block = has_new ? a.block(piece.first_block, (piece.context - 1) / BLOCK_TOKENS) : 0;
        wait_barrier(side.free(), side.parity ^ 1);
        uint32 to = shared_address(side.bytes());
        if (threadIdx.x % WARP == 0) {
            *reinterpret_cast<Piece*>(side.bytes() + SIDE_PIECE) = piece;
            arrive(side.full());
        }
        if (a.table != nullptr && piece.context > 0)
            copy_pieces(to + SIDE_TABLE, a.table + int64(__ldcg(a.positions + piece.row)) * D, D * 4 / PIECE);
        if constexpr (HAS_CHANNELS)
            copy_pieces(to + SIDE_CHANNELS, a.channels.of(tile.kv_head, 0), CHANNEL_FLOATS * 4 / PIECE);
        grid_wait();
        const uint16* row = a.qkv + int64(piece.row) * a.row_size();
        const uint16* q = row + tile.first_head * D;
        constexpr int HEAD_PIECES = 2 * D / PIECE;
        for (int i = threadIdx.x % WARP; i < tile.num_heads * HEAD_PIECES; i += WARP)
            copy_16_async(to + i / HEAD_PIECES * Q_STRIDE + i % HEAD_PIECES * PIECE, q + i * (PIECE / 2));
        if (has_new) {
            const uint16* k = row + (a.num_heads + tile.kv_head) * D;
            copy_pieces(to + SIDE_KEY, k, 2 * D / PIECE);
            copy_pieces(to + SIDE_VALUE, k + a.num_kv_heads * D, 2 * D / PIECE);
        }
        arrive_after_copies(side.full());
        if (has_new) {
            commit_copies();
            wait_copies<0>();
            __syncwarp();
        }
        NewTokenMaker maker(a, tile, piece, block, side.bytes());
#pragma unroll
        for (int which = 0; which < 2; which++) {
            if (has_new) maker.make(which);
            arrive(side.has_new(which));
        }
        side.advance();
    }
};

// Keys and values, group by group. Does not wait for the kernel before: what it reads was there when the plan was made.
struct CacheCopier {
    Place place;
    Scales scales;
    uint64 policy = read_once();

    __device__ __forceinline__ void copy(const Arguments& a, const Piece& piece) {
        HeadTile tile(a, piece.tile);
        int at = piece.start(), end = piece.end(), next = block_of_lane(a, piece, at, end);
        do {  // once for an empty piece, too
            int block = next;
            next = block_of_lane(a, piece, at + GROUP, end);
            int used = min(GROUP, end - at), cached = used - piece.has_new_token(a, at);
            if constexpr (HAS_TOKEN_SCALES) {
                wait_barrier(scales.free(), scales.parity ^ 1);
                copy_parameters(a, tile, block, cached);
                scales.advance();
            }
            copy_group(a, tile, block, cached, used, 0);
            copy_group(a, tile, block, cached, used, 1);
            at += GROUP;
        } while (at < end);
    }

    // Lane l has the block of tokens at + 64 (l % 4) and on, 0 where there is none
    static __device__ __forceinline__ int block_of_lane(const Arguments& a, const Piece& piece, int at, int end) {
        int index = at / BLOCK_TOKENS + threadIdx.x % GROUP_BLOCKS;
        return index * BLOCK_TOKENS < end ? a.block(piece.first_block, index) : 0;
    }

    static __device__ __forceinline__ const uint8* head_block(const Arguments& a, const HeadTile& tile, int block,
                                                              int index) {
        int64 id = __shfl_sync(FULL_WARP, block, index);
        return a.kv_cache + (id * a.num_kv_heads + tile.kv_head) * HEAD_BLOCK_BYTES;
    }

    __device__ __forceinline__ void copy_parameters(const Arguments& a, const HeadTile& tile, int block,
                                                    int cached) const {
        constexpr int PIECES = BLOCK_TOKENS * 4 / PIECE;  // of keys; then as many of values
        static_assert(2 * PIECES == WARP, "one pass");
        int piece = threadIdx.x % PIECES, is_value = threadIdx.x % WARP / PIECES;
        uint32 to = shared_address(scales.bytes()) + is_value * PARAMETER_BYTES + piece * PIECE;
#pragma unroll 1
        for (int b = 0; b < GROUP_BLOCKS; b++) {
            const uint8* from = head_block(a, tile, block, b) + KEY_PARAMETERS + (threadIdx.x % WARP) * PIECE;
            if (b * BLOCK_TOKENS + piece * 4 < cached) copy_16_once(to + b * BLOCK_TOKENS * 4, from, policy);
        }
    }

    // Keys (which 0) or values (1) of the group's tokens, stage by stage
    __device__ __forceinline__ void copy_group(const Arguments& a, const HeadTile& tile, int block, int cached, int used,
                                               int which) {
        constexpr int RUN = STAGE < BLOCK_TOKENS ? STAGE : BLOCK_TOKENS;  // tokens that lie one after the other
#pragma unroll 1
        for (int first = 0; first < max(used, 1); first += STAGE) {
            wait_barrier(place.free(), place.parity ^ 1);
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
    __device__ __forceinline__ void copy_run(uint8* stage, int row, const uint8* from, int cached, int used) const {
        // Rows that the warp covers in a whole number of passes and after which the permutation repeats: few offsets
        constexpr int PERIOD = Rows::PIECES % 4 == 0 ? 8 : 16, PASSES = PERIOD * Rows::PIECES / WARP;
        static_assert(PERIOD * Rows::PIECES % WARP == 0 && RUN % PERIOD == 0, "whole passes");
        uint32 to = shared_address(stage) + row * Rows::STRIDE;
        uint32 offsets[PASSES];
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            int index = threadIdx.x % WARP + i * WARP;
            offsets[i] = Rows::offset(index / Rows::PIECES, index % Rows::PIECES);
        }
        from += threadIdx.x % WARP * PIECE;
        if (cached >= RUN) {  // most: one instruction for each 512 bytes
#pragma unroll
            for (int k = 0; k < RUN; k += PERIOD)
#pragma unroll
                for (int i = 0; i < PASSES; i++)
                    copy_16_once(to + offsets[i] + k * Rows::STRIDE, from + k * ROW_BYTES + i * WARP * PIECE, policy);
            return;
        }
#pragma unroll 1
        for (int k = 0; k < RUN; k += PERIOD)
#pragma unroll
            for (int i = 0; i < PASSES; i++) {
                int token = k + (threadIdx.x % WARP + i * WARP) / Rows::PIECES;
                if (token < cached || token >= used)
                    copy_16_once(to + offsets[i] + k * Rows::STRIDE, from + k * ROW_BYTES + i * WARP * PIECE, policy,
                                 token < cached);
            }
    }
};
