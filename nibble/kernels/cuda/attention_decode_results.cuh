// Decode attention, see attention_decode.cu: sums over warps, results, and the splits of a row put together.
#pragma once
#include "attention_decode_state.cuh"

DEVICE int64 split_slot(const Arguments& a, const HeadTile& tile, int entry) {
    return (int64(entry) * a.num_kv_heads * a.tiles() + tile.index) * min(HEADS, a.group_size());
}

// Sums over the lanes and warps that shared the tokens; afterwards all lanes have their two heads' in total and zeros.
DEVICE void reduce(State& state) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
    float2* sums = reinterpret_cast<float2*>(shared + SUMS);
    float4* parts = reinterpret_cast<float4*>(shared + PARTS);
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int offset = 4; offset < WARP; offset *= 2) {
            state.total[j] += __shfl_xor_sync(FULL_WARP, state.total[j], offset);
            state.zeros[j] += __shfl_xor_sync(FULL_WARP, state.zeros[j], offset);
        }
        if (lane < 4) sums[warp * HEADS + 2 * t + j] = make_float2(state.total[j], state.zeros[j]);
    }
#pragma unroll
    for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) state.acc[i][0][j] += state.acc[i][1][j];
    float(&acc)[4] = state.acc[0][0];
    if (TOKEN_PARTS == 2 && warp >= DIM_TILES)
        parts[(warp - DIM_TILES) * WARP + lane] = make_float4(acc[0], acc[1], acc[2], acc[3]);
    computing_barrier();
#pragma unroll
    for (int j = 0; j < 2; j++) {
        state.total[j] = state.zeros[j] = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = sums[w * HEADS + 2 * t + j];
            state.total[j] += other.x;
            state.zeros[j] += other.y;
        }
    }
    if (TOKEN_PARTS == 2 && warp < DIM_TILES) {
        float4 other = parts[warp * WARP + lane];
        acc[0] += other.x, acc[1] += other.y, acc[2] += other.z, acc[3] += other.w;
    }
}

// Calls store(head of the tile, first dimension, the value there, the value at the second dimension) for this lane's
// results. The second dimension is the next one of INT8, 8 further of fp16.
constexpr int DIMENSION_STEP = IS_FP16 ? 8 : 1;
template <typename Store>
DEVICE void for_each_result(const State& state, int num_heads, Store store) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    if (warp >= DIM_TILES) return;
#pragma unroll
    for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (2 * t + j >= num_heads) continue;
            int dimension = (warp + i * WARPS) * 16 + (IS_FP16 ? g : 2 * g);
            const float(&acc)[4] = state.acc[i][0];
            store(2 * t + j, dimension, acc[j] + state.zeros[j], acc[2 + j] + state.zeros[j]);
        }
}

DEVICE float inverse_or_zero(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// Adds up the splits of a row and head tile, in their order.
DEVICE void combine(const Arguments& a, const HeadTile& tile, const SplitEntry& entry) {
    uint16* out = a.out + (int64(entry.row) * a.num_heads + tile.first_head) * D;
    int64 stride = split_slot(a, tile, 1) - split_slot(a, tile, 0), first = split_slot(a, tile, entry.first_entry);
    for (int i = threadIdx.x; i < tile.num_heads * D / 4; i += COMPUTING) {
        int head = i / (D / 4), dimension = i % (D / 4) * 4;
        const float2* stats = a.stats + first + head;
        const float4* sums = reinterpret_cast<const float4*>(a.sums + (first + head) * D + dimension);
        float maximum = negative_infinity(), total = 0.0f;
#pragma unroll 4
        for (int s = 0; s < entry.num_splits; s++) maximum = fmaxf(maximum, __ldcg(stats + s * stride).x);
        float base = maximum == negative_infinity() ? 0.0f : maximum;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int s = 0; s < entry.num_splits; s++) {
            float2 stat = __ldcg(stats + s * stride);
            float4 part = __ldcg(sums + s * stride * (D / 4));
            float factor = exp2_fast(stat.x - base);
            total = fmaf(stat.y, factor, total);
            sum.x = fmaf(part.x, factor, sum.x);
            sum.y = fmaf(part.y, factor, sum.y);
            sum.z = fmaf(part.z, factor, sum.z);
            sum.w = fmaf(part.w, factor, sum.w);
        }
        float inverse = inverse_or_zero(total);
        uint2 halves = make_uint2(floats_to_half2(sum.x * inverse, sum.y * inverse),
                                  floats_to_half2(sum.z * inverse, sum.w * inverse));
        *reinterpret_cast<uint2*>(out + head * D + dimension) = halves;
    }
}

// The only split: the result itself
DEVICE void store_result(const Arguments& a, const HeadTile& tile, const SplitEntry& entry, const State& state) {
    uint16* out = a.out + (int64(entry.row) * a.num_heads + tile.first_head) * D;
    float inverse[2] = {inverse_or_zero(state.total[0]), inverse_or_zero(state.total[1])};
    for_each_result(state, tile.num_heads, [&](int head, int dimension, float first, float second) {
        float factor = inverse[head & 1];
        uint16* at = out + head * D + dimension;
        if constexpr (IS_FP16) {
            at[0] = float_to_half(first * factor);
            at[DIMENSION_STEP] = float_to_half(second * factor);
        } else {
            *reinterpret_cast<uint32*>(at) = floats_to_half2(first * factor, second * factor);
        }
    });
}

// One split of several: its sums, for the thread block that is the last to finish one of this row and head tile
DEVICE void store_sums(const Arguments& a, const HeadTile& tile, int entry_index, const State& state) {
    int64 slot = split_slot(a, tile, entry_index);
    for_each_result(state, tile.num_heads, [&](int head, int dimension, float first, float second) {
        float* at = a.sums + (slot + head) * D + dimension;
        if constexpr (IS_FP16) {
            at[0] = first;
            at[DIMENSION_STEP] = second;
        } else {
            *reinterpret_cast<float2*>(at) = make_float2(first, second);
        }
    });
#pragma unroll
    for (int j = 0; j < 2; j++) {
        int head = threadIdx.x * 2 + j;  // of lanes 0 to 3 of warp 0
        if (threadIdx.x < 4 && head < tile.num_heads)
            a.stats[slot + head] = make_float2(state.maximum[j], state.total[j]);
    }
}

// Whether all splits of the row and head tile are stored; their sums can be read then.
DEVICE bool is_last(const Arguments& a, const HeadTile& tile, const SplitEntry& entry) {
    int* flag = reinterpret_cast<int*>(shared + IS_LAST);
    computing_barrier();
    if (threadIdx.x == 0) {
        int* counter = a.plan + PLAN_HEADER + entry.row % ROWS_PER_PLAN * a.num_kv_heads * a.tiles() + tile.index;
        __threadfence();  // for all threads: the barrier comes before it
        *flag = atomicAdd(counter, 1) == entry.num_splits - 1;
        if (*flag) *counter = 0;
        __threadfence();
    }
    computing_barrier();
    return *flag;
}
