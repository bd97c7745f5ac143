// Keys and values of T tokens into their slots of the paged cache, quantised as layout.py says; with a table also the
// rotation of q (in place) and k that comes before (see rope.cu).
//
// qkv fp16 (T, (heads + 2 kv heads) D), slots int64 (T,): block * 64 + offset, cache (blocks, kv heads, head block).
// One thread block per token, one warp per head and pass: a warp holds a head's row in registers, its minimum and
// maximum are warp reductions. k is rounded to fp16 after its rotation, so that the fused and the separate ops agree.
// Bytes moved per token: 2 D per q head read and written, 2 D per k and v read, D + 4 written (D by channel, with
// parameters of 16 D per kv head out of the caches).
#include "attention.cuh"

// which: 0 keys, 1 values
DEVICE void append_row(const HeadRow& row, uint8* head_block, int which, int offset, const Channels& channels,
                       int kv_head) {
    uint8* at = head_block + which * VALUES_START + offset * ROW_BYTES;
    if constexpr (IS_FP16) {
        store_cached_row(row, [&](int byte) { return at + byte; });
    } else if constexpr (HAS_CHANNELS) {
        ChannelRow quantized(row, channels.of(kv_head, which));
        store_cached_row(quantized, [&](int byte) { return at + byte; });
        channels.count(quantized.num_saturated);
    } else {
        QuantizedRow quantized(row);
        store_cached_row(quantized, [&](int byte) { return at + byte; });
        uint8* parameters = head_block + KEY_PARAMETERS + which * BLOCK_TOKENS * 4 + offset * 4;
        if (threadIdx.x % WARP == 0) *reinterpret_cast<uint32*>(parameters) = quantized.parameters;
    }
}

DEVICE void append_token(uint16* token, int64 slot, uint8* kv_cache, const float* cos_sin, int num_heads,
                         int num_kv_heads, const Channels& channels) {
    int first_head = cos_sin == nullptr ? num_heads : 0;  // q is of no interest if it is not rotated
    uint8* block = kv_cache + slot / BLOCK_TOKENS * num_kv_heads * HEAD_BLOCK_BYTES;
    for (int head = first_head + threadIdx.x / WARP; head < num_heads + 2 * num_kv_heads; head += blockDim.x / WARP) {
        HeadRow row;
        row.load(token + head * D);
        bool is_value = head >= num_heads + num_kv_heads;
        if (cos_sin != nullptr && !is_value) row.rotate_all(cos_sin);
        if (head < num_heads) {
            row.store(token + head * D);
        } else if (slot >= 0) {
            int kv_head = head - num_heads - (is_value ? num_kv_heads : 0);
            uint8* head_block = block + kv_head * HEAD_BLOCK_BYTES;
            append_row(row, head_block, is_value, int(slot % BLOCK_TOKENS), channels, kv_head);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    append_kv(uint16* qkv, const int64* slots, uint8* kv_cache, const float* channels, uint64* num_saturated,
              int num_heads, int num_kv_heads) {
    grid_launch_dependents();
    grid_wait();
    int64 token = blockIdx.x;
    int row_size = (num_heads + 2 * num_kv_heads) * D;
    append_token(qkv + token * row_size, slots[token], kv_cache, nullptr, num_heads, num_kv_heads,
                 {channels, num_saturated});
}

extern "C" __global__ void __launch_bounds__(256)
    rope_append_kv(uint16* qkv, const int* positions, const int64* slots, const float* __restrict__ table,
                   uint8* kv_cache, const float* channels, uint64* num_saturated, int num_heads, int num_kv_heads) {
    grid_launch_dependents();
    grid_wait();
    int64 token = blockIdx.x;
    int row_size = (num_heads + 2 * num_kv_heads) * D;
    const float* cos_sin = table + int64(positions[token]) * D;
    append_token(qkv + token * row_size, slots[token], kv_cache, cos_sin, num_heads, num_kv_heads,
                 {channels, num_saturated});
}
