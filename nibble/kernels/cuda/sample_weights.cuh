// The weights that sample.cu draws by, as integers, and the bins of falling logit that they are added up in.
#pragma once

#include "logits.cuh"
#include "sample_cluster.cuh"

constexpr int BIN_BITS = CLUSTER > 1 ? 10 : 9;  // bounds shared memory
constexpr int BINS = 1 << BIN_BITS;
constexpr float HEAD_END = 14;   // in powers of two below the largest weight
constexpr float TAIL_END = 44;   // less weighs nothing
constexpr float ROUND = 12582912.0f;  // added to and subtracted from |x| < 2^22, rounds it to an integer, which its bits show

// A weight is units << shift; the largest logit's is 2^43. The shift belongs to a bin. Units of the head (2^17 at most, 2^15
// where a thread block has more than 2^15 logits) can so be added up in 32 bits; those of the tail, 2^29 at most and never
// shifted, are added up with a carry.
struct Weight {
    int bin;  // 0 .. of the head, BINS .. of the tail, in order of falling logit
    uint32 units;
    int shift;

    __device__ uint64 value() const { return uint64(units) << shift; }
};

// The weights of a row: 2^-t, t = (largest - logit) * log2(e) / temperature, as integers, which add up exactly and in any
// order. One is rounded by 2^-unit_bits of itself at most (and by 2^-44 of the largest).
struct Scale {
    float largest, factor;
    int unit_bits;  // 17 or 15
    float per_t, per_bin;  // the head's bins per unit of t and the reverse; they cover what the row has

    DEVICE Scale of(float largest, float smallest, float temperature, int unit_bits) {
        Scale scale;
        scale.largest = largest;
        scale.unit_bits = unit_bits;
        // Finite at any temperature, so that 0 * factor stays 0
        scale.factor = __fdiv_rn(1.4426950408889634f, fmaxf(temperature, 1e-30f));
        const float range = __fmul_rn(__fsub_rn(largest, smallest), scale.factor);
        const float head = fmaxf(fminf(range, HEAD_END), 1e-3f);
        scale.per_t = __fdiv_rn(BINS - 1, head), scale.per_bin = __fdiv_rn(head, BINS - 1);
        return scale;
    }

    // Rises as logits fall. Every operation is rounded as written, so that all passes agree.
    __device__ float t(float logit) const { return fminf(__fmul_rn(__fsub_rn(largest, logit), factor), 60.0f); }

    // The units of a weight of the tail; few operations, for most logits are there
    DEVICE uint32 tail_units(float t) {
        uint32 units;
        asm("cvt.rni.u32.f32 %0, %1;" : "=r"(units) : "f"(power_of_2(__fsub_rn(43.0f, t))));
        return units;
    }

    __device__ Weight weigh_head(float t) const {
        const float place = __fmaf_rn(t, per_t, ROUND);
        const float bin = fminf(__fsub_rn(place, ROUND), BINS - 1);
        // The bin's power of two; t is less than 1 + 2 bins beyond it
        const float power = __fmaf_rn(bin, per_bin, -0.5f);
        const float whole = fmaxf(__fsub_rn(__fadd_rn(power, ROUND), ROUND), 0.0f);
        const float units = power_of_2(__fsub_rn(whole + unit_bits, t));
        return {int(__float_as_uint(__fadd_rn(bin, ROUND)) & 0xffff),
                __float_as_uint(__fadd_rn(units, 8388608.0f)) & 0x7fffff,
                43 - unit_bits - int(__float_as_uint(__fadd_rn(whole, ROUND)) & 0xff)};
    }

    __device__ Weight weigh(float t) const {
        if (t < HEAD_END) return weigh_head(t);
        const float place = fminf(__fmul_rn(__fsub_rn(t, HEAD_END), (BINS - 1) / (TAIL_END - HEAD_END)), BINS - 1);
        return {BINS + int(place), tail_units(t), 0};
    }
};
