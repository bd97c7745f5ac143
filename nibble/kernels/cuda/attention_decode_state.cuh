// Decode attention, see attention_decode.cu: what the computing warps do with a group's keys and values.
#pragma once
#include "attention_decode_token.cuh"
#include "attention_decode_work.cuh"

// q of a tile's heads in the side becomes the B operand: rotated, for INT8 keys permuted (each 4 elements as 0, 2, 1, 3);
// q's sums, or times the keys' scales. Each warp has one head; a barrier must follow.
DEVICE void prepare_queries(const Arguments& a, const HeadTile& tile, uint8* side) {
    int head = threadIdx.x / WARP;
    uint16* at = reinterpret_cast<uint16*>(side + head * Q_STRIDE);
    HeadRow row;
    row.load(at);
    if (head >= tile.num_heads) row.clear();
    if (a.table != nullptr) row.rotate_all(reinterpret_cast<const float*>(side + SIDE_TABLE));
    if constexpr (HAS_CHANNELS) row.multiply(reinterpret_cast<const float*>(side + SIDE_CHANNELS));
    __syncwarp();
    if constexpr (IS_FP16) {
        row.store(at);
    } else {
        row.store_permuted(at);
    }
    if constexpr (HAS_TOKEN_SCALES) {
        float sum = warp_sum(row.sum());
        if (threadIdx.x % WARP == 0) reinterpret_cast<float*>(shared + Q_SUMS)[head] = sum;
    }
}

constexpr float SCORE_SCALE = (D == 64 ? 0.125f : D == 96 ? 0.10206207262f : D == 128 ? 0.08838834765f : 0.0625f) *
                              1.44269504089f;  // 1 / sqrt(D), and softmax in powers of two
constexpr float WEIGHT_EXPONENT = 6.0f;

// The state of a split. Lane (g, t) of every warp: maxima and sums of heads 2t, 2t + 1; acc: D-fragments of out^T.
struct State {
    float maximum[2], total[2], zeros[2];  // total and zeros: of this lane's tokens alone; scaled by 2^6
    float acc[WARP_DIM_TILES][2][4];       // steps of 16 tokens alternate between two sums: products wait less

    __device__ __forceinline__ void start() {
#pragma unroll
        for (int j = 0; j < 2; j++) {
            maximum[j] = negative_infinity();
            total[j] = zeros[j] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][0][j] = acc[i][1][j] = 0.0f;
    }

    // q k of 16 tokens, rows `row` and on of a stage: scores[2 r + j] of token 8 r + g, head 2 t + j
    static __device__ __forceinline__ void products(const uint8* stage, int row, const uint8* side, float (&scores)[4]) {
        int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        uint32 from = shared_address(stage);
        const uint8* q_from = side + g * Q_STRIDE + t * (IS_FP16 ? 4 : 8);
        scores[0] = scores[1] = scores[2] = scores[3] = 0.0f;
#pragma unroll
        for (int p = 0; p < Rows::PIECES; p += 2) {
            uint32 k[4];
            load_matrices(k, from + Rows::offset(row + lane % 16, p + lane / 16));
            if constexpr (IS_FP16) {
                mma_16816(scores, k, *reinterpret_cast<const uint32*>(q_from + p * 16),
                          *reinterpret_cast<const uint32*>(q_from + p * 16 + 16));
            } else {
                uint32 a[4] = {even_bytes_to_half2(k[0]), even_bytes_to_half2(k[1]), odd_bytes_to_half2(k[0]),
                               odd_bytes_to_half2(k[1])};
                uint2 q = *reinterpret_cast<const uint2*>(q_from + p * 32);
                mma_16816(scores, a, q.x, q.y);
                uint32 b[4] = {even_bytes_to_half2(k[2]), even_bytes_to_half2(k[3]), odd_bytes_to_half2(k[2]),
                               odd_bytes_to_half2(k[3])};
                q = *reinterpret_cast<const uint2*>(q_from + p * 32 + 32);
                mma_16816(scores, b, q.x, q.y);
            }
        }
    }

    // Scores of this warp's two tiles of a group's tokens, of which those from `oldest` (which may be below 0) to `count`
    // count; -inf for those that don't.
    // `place` goes on to the values.
    __device__ __forceinline__ void multiply_keys(Place& place, const NewToken& new_token, uint8* scales, int oldest, int count,
                                                  float (&scores)[KEY_TILES][4]) const {
        int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
        float2 q_sums = reinterpret_cast<const float2*>(shared + Q_SUMS)[threadIdx.x % 4];  // of heads 2t and 2t + 1
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++)
            scores[i][0] = scores[i][1] = scores[i][2] = scores[i][3] = negative_infinity();
#pragma unroll
        for (int s = 0; s < GROUP_STAGES; s++) {
            if (s > 0 && s * STAGE >= count) break;
            wait_barrier(place.full(), place.parity);
#pragma unroll
            for (int i = 0; i < KEY_TILES; i++) {
                int token = (warp + i * WARPS) * 16;
                bool may_be_here = STAGE == GROUP || s * STAGE / (16 * WARPS) == i;
                if (!may_be_here || token / STAGE != s) continue;
                if (new_token.is_in_tile(token / 16)) new_token.place_key(place.bytes(), scales);
                products(place.bytes(), token % STAGE, new_token.side.bytes(), scores[i]);
#pragma unroll
                for (int r = 0; r < 2; r++) 
                    scale(scales, token + 8 * r + g, oldest, count, q_sums, scores[i][2 * r], scores[i][2 * r + 1]);
            }
            arrive(place.free());
            place.advance();
        }
    }

    // The scores of a token with this lane's two heads
    static __device__ __forceinline__ void scale(const uint8* scales, int token, int oldest, int count, float2 q_sums,
                                                 float& first, float& second) {
        float scale = SCORE_SCALE;
        if constexpr (!HAS_TOKEN_SCALES) {
            first *= scale;
            second *= scale;
        } else {
            uint32 parameters = reinterpret_cast<const uint32*>(scales)[token];
            scale *= low_half(parameters);
            float zero = high_half(parameters) * SCORE_SCALE;
            first = fmaf(zero, q_sums.x, first * scale);
            second = fmaf(zero, q_sums.y, second * scale);
        }
        bool counts = token >= oldest && token < count;
        first = counts ? first : negative_infinity();
        second = counts ? second : negative_infinity();
    }

    // Raises the maxima to those of all warps' scores
    __device__ __forceinline__ void raise_maxima(const float (&scores)[KEY_TILES][4]) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
        float* maxima = reinterpret_cast<float*>(shared + MAXIMA);
        float best[2];
#pragma unroll
        for (int j = 0; j < 2; j++) {
            best[j] = negative_infinity();
#pragma unroll
            for (int i = 0; i < KEY_TILES; i++) best[j] = fmaxf(best[j], fmaxf(scores[i][j], scores[i][2 + j]));
#pragma unroll
            for (int offset = 4; offset < WARP; offset *= 2)
                best[j] = fmaxf(best[j], __shfl_xor_sync(FULL_WARP, best[j], offset));
        }
        if (lane < 4) *reinterpret_cast<float2*>(maxima + warp * HEADS + 2 * t) = make_float2(best[0], best[1]);
        computing_barrier();
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = *reinterpret_cast<const float2*>(maxima + w * HEADS + 2 * t);
            best[0] = fmaxf(best[0], other.x);
            best[1] = fmaxf(best[1], other.y);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            best[j] = fmaxf(best[j], maximum[j]);
            // No score at all (there is no token, or all are NaN): no NaN made of -inf - -inf
            float correction = best[j] == negative_infinity() ? 1.0f : exp2_fast(maximum[j] - best[j]);
            maximum[j] = best[j];
            total[j] *= correction;
            zeros[j] *= correction;
#pragma unroll
            for (int i = 0; i < WARP_DIM_TILES; i++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    acc[i][c][j] *= correction;
                    acc[i][c][2 + j] *= correction;
                }
        }
    }

    // Scores to weights, in shared memory, and their sums
    __device__ __forceinline__ void weigh(const uint8* scales, int count, const float (&scores)[KEY_TILES][4]) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
        uint16* weights = reinterpret_cast<uint16*>(shared + WEIGHTS + 2 * t * WEIGHT_STRIDE);
        float base[2];
#pragma unroll
        for (int j = 0; j < 2; j++)
            base[j] = maximum[j] == negative_infinity() ? 0.0f : maximum[j] - WEIGHT_EXPONENT;
#pragma unroll
        for (int i = 0; i < KEY_TILES; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int token = (warp + i * WARPS) * 16 + 8 * r + g;
                float scale = 1.0f, zero = 0.0f;
                if constexpr (HAS_TOKEN_SCALES) {
                    uint32 parameters = reinterpret_cast<const uint32*>(scales + PARAMETER_BYTES)[token];
                    parameters = token < count ? parameters : 0;  // what is there may be NaN
                    scale = low_half(parameters);
                    zero = high_half(parameters);
                }
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float weight = exp2_fast(scores[i][2 * r + j] - base[j]);
                    total[j] += weight;
                    zeros[j] = fmaf(weight, zero, zeros[j]);
                    weights[j * (WEIGHT_STRIDE / 2) + token] = float_to_half(weight * scale);
                }
            }
    }

    // Values of a group, of which `count` tokens count, times their weights
    __device__ __forceinline__ void multiply_values(Place& place, int count) {
#pragma unroll
        for (int s = 0; s < GROUP_STAGES; s++) {
            if (s > 0 && s * STAGE >= count) break;
            wait_barrier(place.full(), place.parity);
            if (threadIdx.x < DIM_TILES * TOKEN_PARTS * WARP) multiply_stage(place.bytes(), s * STAGE);
            arrive(place.free());
            place.advance();
        }
    }

    __device__ __forceinline__ void multiply_stage(const uint8* stage, int first) {
        int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        uint32 from = shared_address(stage);
        uint32 weights = shared_address(shared + WEIGHTS) + lane % 8 * WEIGHT_STRIDE + lane / 8 * 16 + first * 2;
#pragma unroll
        for (int step = 0; step < STAGE / 32 / TOKEN_PARTS; step++) {
            int token = (step * TOKEN_PARTS + warp / DIM_TILES % TOKEN_PARTS) * 32;
            uint32 w[4];
            load_matrices(w, weights + token * 2);
#pragma unroll
            for (int i = 0; i < WARP_DIM_TILES; i++) {
                int tile = warp % DIM_TILES + i * WARPS;
                uint32 v[4];
                if constexpr (IS_FP16) {
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        int row = token + 16 * c + lane % 8 + lane / 16 * 8;
                        load_matrices_transposed(v, from + Rows::offset(row, 2 * tile + lane / 8 % 2));
                        mma_16816(acc[i][c], v, w[2 * c], w[2 * c + 1]);
                    }
                } else {
                    load_matrices_transposed(v, from + Rows::offset(token + lane, tile));
#pragma unroll
                    for (int c = 0; c < 2; c++) {
                        uint32 a[4] = {even_bytes_to_half2(v[2 * c]), odd_bytes_to_half2(v[2 * c]),
                                       even_bytes_to_half2(v[2 * c + 1]), odd_bytes_to_half2(v[2 * c + 1])};
                        mma_16816(acc[i][c], a, w[2 * c], w[2 * c + 1]);
                    }
                }
            }
        }
    }
};
