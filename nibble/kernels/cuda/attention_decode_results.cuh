// Decode attention, see attention_decode.cu: sums of splits, added up in order, and what becomes of them.
#pragma once
#include "attention_decode_state.cuh"

constexpr int ACC = WARP_DIM_TILES * COMPUTING * 4;  // floats of a record: acc, then sums, then maxima
constexpr int RECORD_SUMS = WARPS * WARP / 2;
constexpr int RECORD = ACC + RECORD_SUMS + HEADS;
constexpr int BATCH = D <= 128 ? 8 : 4;  // records that are loaded at once: as registers allow

// A thread's part of a split's sums, or of several splits'
struct Partial {
    float maximum[2];  // of heads 2t, 2t + 1
    float sum;         // over the warp's tokens: lane 4 g + t has that of head 2t + (g / 2) % 2: total, for odd g zeros
    float acc[WARP_DIM_TILES][4];

    __device__ __forceinline__ void clear() {
        maximum[0] = maximum[1] = negative_infinity();
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
    }

    // Each step of the sum over the lanes' tokens leaves a lane with half of the numbers
    __device__ __forceinline__ void take(const State& state) {
        int lane = threadIdx.x % WARP;
        bool has_zeros = lane & 4, has_second = lane & 8;
        float kept[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            maximum[j] = state.maximum[j];
            kept[j] = has_zeros ? state.zeros[j] : state.total[j];
            kept[j] += __shfl_xor_sync(FULL_WARP, has_zeros ? state.total[j] : state.zeros[j], 4);
        }
        sum = has_second ? kept[1] : kept[0];
        sum += __shfl_xor_sync(FULL_WARP, has_second ? kept[0] : kept[1], 8);
        sum += __shfl_xor_sync(FULL_WARP, sum, 16);
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = state.acc[i][0][j] + state.acc[i][1][j];
    }

    __device__ __forceinline__ void add(const Partial& other) {
        float mine[2], others[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float best = fmaxf(maximum[j], other.maximum[j]);
            mine[j] = factor(maximum[j], best);
            others[j] = factor(other.maximum[j], best);
            maximum[j] = best;
        }
        add(mine, other, others);
    }

    static __device__ __forceinline__ float factor(float of, float to) {
        return to == negative_infinity() ? 1.0f : exp2_fast(of - to);  // no NaN made of -inf - -inf
    }

    // Products and sums are spelled out: wherever splits are added, they must round alike.
    __device__ __forceinline__ void add(const float (&mine)[2], const Partial& other, const float (&others)[2]) {
        bool has_second = threadIdx.x & 8;
        sum = __fmaf_rn(other.sum, has_second ? others[1] : others[0],
                        __fmul_rn(sum, has_second ? mine[1] : mine[0]));
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                acc[i][j] = __fmaf_rn(other.acc[i][j], others[j % 2], __fmul_rn(acc[i][j], mine[j % 2]));
    }

    static __device__ __forceinline__ bool has_acc(int num_heads) {
        return threadIdx.x < VALUE_WARPS * WARP && threadIdx.x % 4 * 2 < num_heads;
    }
    static __device__ __forceinline__ int sum_index() { return threadIdx.x / WARP * (WARP / 2) + threadIdx.x % 16; }

    __device__ __forceinline__ void store(float* record, int num_heads) const {
        float4* to = reinterpret_cast<float4*>(record) + threadIdx.x;
        if (has_acc(num_heads))
#pragma unroll
            for (int i = 0; i < WARP_DIM_TILES; i++)
                to[i * COMPUTING] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        if (threadIdx.x % WARP < 16) record[ACC + sum_index()] = sum;
        if (threadIdx.x < 4)
            reinterpret_cast<float2*>(record + ACC + RECORD_SUMS)[threadIdx.x] = make_float2(maximum[0], maximum[1]);
    }

    // Without the maxima
    __device__ __forceinline__ void load(const float* record, int num_heads) {
        sum = __ldcg(record + ACC + sum_index());
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++) {
            float4 part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (has_acc(num_heads)) part = __ldcg(reinterpret_cast<const float4*>(record) + i * COMPUTING + threadIdx.x);
            acc[i][0] = part.x, acc[i][1] = part.y, acc[i][2] = part.z, acc[i][3] = part.w;
        }
    }
};

DEVICE float* record_at(const Arguments& a, int index) { return a.records + int64(index) * RECORD; }

// The lanes' numbers are added in order, each with a maximum of its own: factors of the sum before, and of the number
DEVICE float2 factors_in_order(float maximum) {
    int lane = threadIdx.x % WARP;
    float best = maximum;  // up to this lane's
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) best = fmaxf(best, __shfl_up_sync(FULL_WARP, best, offset));
    float before = __shfl_up_sync(FULL_WARP, best, 1);
    if (lane == 0) before = negative_infinity();
    return make_float2(Partial::factor(before, best), Partial::factor(maximum, best));
}

// Adds up the splits of a (row, head tile) that is in pieces, in their order: as Partial::add would one by one, but with
// all factors known before.
DEVICE void combine(const Arguments& a, const Shares& shares, const Piece& piece, int num_heads, Partial& row) {
    RecordList list(a, shares, piece);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
    float maximum = negative_infinity();  // of the lane's record and the warp's head
    if (lane < list.count) maximum = __ldcg(record_at(a, list.mine) + ACC + RECORD_SUMS + warp);
    bool is_barrier_due = true;
    row.clear();
#pragma unroll 1
    for (int first = 0; first < list.count; first += BATCH) {
        Partial parts[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) parts[i].load(record_at(a, list[min(first + i, list.count - 1)]), num_heads);
        if (is_barrier_due) {
            reinterpret_cast<float2*>(shared + FACTORS)[warp * MAX_SPLITS + lane] = factors_in_order(maximum);
            computing_barrier();
            is_barrier_due = false;
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            if (first + i >= list.count) break;
            const float2* factors = reinterpret_cast<const float2*>(shared + FACTORS) + 2 * t * MAX_SPLITS + first + i;
            float2 of_first = factors[0], of_second = factors[MAX_SPLITS];
            row.add({of_first.x, of_second.x}, parts[i], {of_first.y, of_second.y});
        }
    }
}

// Whether all splits of the piece's (row, head tile) are stored; their records can be read then.
DEVICE bool is_last(const Arguments& a, const Piece& piece) {
    int* flag = reinterpret_cast<int*>(shared + IS_LAST);
    computing_barrier();
    if (threadIdx.x == 0) {
        int* counter = a.plan + PLAN_HEADER + piece.row % ROWS_PER_PLAN * a.head_tiles() + piece.tile;
        int missing = num_splits(piece.context) - (piece.stop - piece.first);
        fence_device();  // for all threads: the barrier comes before it
        *flag = atomicAdd(counter, piece.stop - piece.first) == missing;
        if (*flag) *counter = 0;
        fence_device();
    }
    computing_barrier();
    return *flag;
}

// Scales and zeros of the values of this thread's dimensions, two of each of its tiles
struct ValueChannels {
    float2 scale[WARP_DIM_TILES], zero[WARP_DIM_TILES];

    __device__ __forceinline__ ValueChannels(const Channels& channels, int kv_head) {
        if constexpr (!HAS_CHANNELS) return;
        const float* values = channels.of(kv_head, 1) + threadIdx.x % WARP / 4 * 2;
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++) {
            int first = (threadIdx.x / WARP % DIM_TILES + i * WARPS) * 16;
            scale[i] = *reinterpret_cast<const float2*>(values + first);
            zero[i] = *reinterpret_cast<const float2*>(values + D + first);
        }
    }
};

DEVICE float inverse_or_zero(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }

// Sums over the warps that shared the tokens, and the results: fp16, to the row's heads of the tile
DEVICE void store_results(const Arguments& a, const HeadTile& tile, const Piece& piece, const Partial& row) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float* sums = reinterpret_cast<float*>(shared + SUMS);
    float4* parts = reinterpret_cast<float4*>(shared + PARTS);
    ValueChannels channels(a.channels, tile.kv_head);  // under way while the warps wait for each other
    float4 part = make_float4(row.acc[0][0], row.acc[0][1], row.acc[0][2], row.acc[0][3]);
    if (g < 4) sums[(warp * 4 + t) * 4 + g] = row.sum;
    if (TOKEN_PARTS == 2 && warp >= DIM_TILES) parts[(warp - DIM_TILES) * WARP + lane] = part;
    computing_barrier();
    if (warp >= DIM_TILES) return;
    float total[2] = {0.0f, 0.0f}, zeros[2] = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        float4 other = reinterpret_cast<const float4*>(sums)[w * 4 + t];
        total[0] += other.x, zeros[0] += other.y;
        total[1] += other.z, zeros[1] += other.w;
    }
    uint16* out = a.out + (int64(piece.row) * a.num_heads + tile.first_head) * D;
#pragma unroll
    for (int i = 0; i < WARP_DIM_TILES; i++) {
        float4 other = TOKEN_PARTS == 2 ? parts[warp * WARP + lane] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float others[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (2 * t + j >= tile.num_heads) continue;
            float inverse = inverse_or_zero(total[j]);
            float first = (row.acc[i][j] + others[j] + zeros[j]) * inverse;
            float second = (row.acc[i][2 + j] + others[2 + j] + zeros[j]) * inverse;
            if (HAS_CHANNELS && total[j] != 0.0f) {
                first = fmaf(first, channels.scale[i].x, channels.zero[i].x);
                second = fmaf(second, channels.scale[i].y, channels.zero[i].y);
            }
            uint16* at = out + (2 * t + j) * D + (warp + i * WARPS) * 16;
            if constexpr (IS_FP16) {
                at[g] = float_to_half(first);
                at[g + 8] = float_to_half(second);
            } else {
                *reinterpret_cast<uint32*>(at + 2 * g) = floats_to_half2(first, second);
            }
        }
    }
}
