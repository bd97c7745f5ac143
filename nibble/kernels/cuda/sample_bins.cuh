// Bins of falling logit over a cluster: each thread block fills its own from its slice and adds up a part of the bins of
// all; all learn in which bin a running sum passes a number.
#pragma once

#include "sample_slice.cuh"
#include "sample_weights.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int PART = BINS / CLUSTER;  // bins that a thread block adds up
constexpr int CAPACITY = THREADS;     // candidates that are sorted at once
constexpr int FIRST_SHIFT = 64 - BIN_BITS;
constexpr int MOST_LOGITS = 32000;    // of a thread block, whose units of 17 bits add up in 32
constexpr bool CARRIES = CLUSTER == 1;  // has more of them: also the head's sums have carries
static_assert(PART <= THREADS && PART % WARP == 0 && WARPS > CLUSTER && WARPS <= WARP, "");

enum Contents { HEAD, TAIL, DIGIT };  // of the bins

struct Place {  // of a bin, or of a candidate
    uint64 weight_before, weight, count_before, count, index;
};
constexpr int PLACE_WORDS = sizeof(Place) / sizeof(uint64);

struct Shared {
    uint32 units[BINS], counts[BINS];  // of this thread block's slice
    uint32 carries[BINS];
    uint64 part_weights[CLUSTER][CLUSTER];  // [thread block][part of the bins]
    uint64 part_counts[CLUSTER][CLUSTER];
    uint64 best[CLUSTER], worst[CLUSTER], bad[CLUSTER], tail[CLUSTER], above_min_p[CLUSTER];
    Place found[2];
    uint64 weights[PART];  // of the part that is being looked through
    uint32 part_count[PART];
    uint64 reduced[WARPS], reduced_too[WARPS];
    Place staged;
    // of the first thread block
    uint64 candidates[CAPACITY];
    uint32 num_candidates;
};

struct Bins {
    Shared& shared;
    int rank = cluster_rank(), thread = threadIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int parity = 0;
    Slice slice;
    Scale scale;

    // Of the first `size` (32 at most) values, by a warp
    __device__ uint64 sum(const uint64* values, int size) const { return warp_sum_64(lane < size ? values[lane] : 0); }
    __device__ uint64 max(const uint64* values, int size) const { return warp_max_64(lane < size ? values[lane] : 0); }

    // To be followed by a barrier
    __device__ void clear() {
        for (int i = thread; i < BINS; i += THREADS) {
            shared.units[i] = shared.counts[i] = shared.carries[i] = 0;
        }
    }

    __device__ void add_head(int bin, uint32 units) {
        if (CARRIES)
            add_tail(bin, units);
        else
            atomicAdd(&shared.units[bin], units);
    }

    __device__ void add_tail(int bin, uint32 units) {
        if (atomicAdd(&shared.units[bin], units) > ~units) atomicAdd(&shared.carries[bin], 1u);
    }

    // The head to bins; sums of the tail and of what min_p leaves
    __device__ void fill_head(float min_p, bool counts) {
        // min_p * max(p) <= p means t <= -log2(min_p); above 1 it would leave nobody
        const float last_t = min_p > 0 ? fmaxf(-log2f(min_p), 0.0f) : -1.0f;
        uint64 above = 0, tail = 0;
        slice.for_each<1>([&](float logit, int) {
            const float t = scale.t(logit);
            if (t >= HEAD_END) {  // most of them
                const uint32 units = Scale::tail_units(t);
                tail += units;
                if (t <= last_t) above += units;
                return;
            }
            const Weight weight = scale.weigh_head(t);
            if (t <= last_t) above += weight.value();
            add_head(weight.bin, weight.units);
            if (counts) atomicAdd(&shared.counts[weight.bin], 1u);
        });
        above = warp_sum_64(above);
        tail = warp_sum_64(tail);
        if (lane == 0) shared.reduced[warp] = above, shared.reduced_too[warp] = tail;
        __syncthreads();
        if (warp == WARPS - 1) {  // the others have parts of the bins to sum
            above = sum(shared.reduced, WARPS);
            tail = sum(shared.reduced_too, WARPS);
            if (lane < CLUSTER) {
                store_remote(&shared.above_min_p[rank], lane, above);
                store_remote(&shared.tail[rank], lane, tail);
            }
        }
        publish_parts(HEAD, 0);
    }

    __device__ void fill_tail() {
        clear();
        __syncthreads();
        slice.for_each<1>([&](float logit, int) {
            const Weight weight = scale.weigh(scale.t(logit));
            if (weight.bin < BINS || weight.units == 0) return;
            add_tail(weight.bin - BINS, weight.units);
            atomicAdd(&shared.counts[weight.bin - BINS], 1u);
        });
        __syncthreads();
        publish_parts(TAIL, 0);
    }

    // The candidates of one bin that agree with `prefix` above `shift`'s digit: by that digit. Where a warp's candidates
    // are alike it adds once: many equal logits would queue for one bin.
    __device__ void fill_digit(int first_bin, uint64 prefix, int shift) {
        clear();
        __syncthreads();
        slice.for_each<1>([&](float logit, int id) {
            const Weight weight = scale.weigh(scale.t(logit));
            int place = -1;
            if (weight.bin == first_bin && weight.units) {
                const uint64 value = candidate(logit, id);
                if (shift == FIRST_SHIFT || value >> (shift + BIN_BITS) == prefix) place = int(value >> shift & (BINS - 1));
            }
            uint32 units = weight.units, count = 1;
            // (Not in the tail, whose units would not fit the sum)
            if (first_bin < BINS && __all_sync(FULL_WARP, place == __shfl_sync(FULL_WARP, place, 0))) {
                units = __reduce_add_sync(FULL_WARP, units);
                count = WARP;
                if (lane > 0) return;
            }
            if (place < 0) return;
            add_tail(place, units);
            atomicAdd(&shared.counts[place], count);
        });
        __syncthreads();
        publish_parts(DIGIT, shift_of(first_bin));
    }

    // Weights of the bins are units << this; the digits' bins are of one bin of the head or the tail
    __device__ int shift_of(int bin) const {
        if (bin >= BINS) return 0;
        const float power = __fmaf_rn(float(bin), scale.per_bin, -0.5f);
        return 43 - scale.unit_bits - int(fmaxf(__fsub_rn(__fadd_rn(power, ROUND), ROUND), 0.0f));
    }

    __device__ int shift_of(Contents contents, int digit_shift, int bin) const {
        return contents == DIGIT ? digit_shift : shift_of(bin + (contents == TAIL ? BINS : 0));
    }

    // Sums over each part of this thread block's bins, to all; after a barrier, ends with one of the cluster
    __device__ void publish_parts(Contents contents, int digit_shift) {
        if (warp < CLUSTER) {
            uint64 weight = 0, count = 0;
            for (int i = warp * PART + lane; i < (warp + 1) * PART; i += WARP) {
                weight += (uint64(shared.carries[i]) << 32 | shared.units[i]) << shift_of(contents, digit_shift, i);
                count += shared.counts[i];
            }
            weight = warp_sum_64(weight);
            count = warp_sum_64(count);
            if (lane < CLUSTER) {
                store_remote(&shared.part_weights[rank][warp], lane, weight);
                store_remote(&shared.part_counts[rank][warp], lane, count);
            }
        }
        cluster_sync();
    }

    // Sums over the cluster of part lane % CLUSTER
    __device__ void sum_part(uint64& weight, uint64& count) const {
        weight = count = 0;
        for (int source = lane / CLUSTER; source < CLUSTER; source += WARP / CLUSTER) {
            weight += shared.part_weights[source][lane % CLUSTER];
            count += shared.part_counts[source][lane % CLUSTER];
        }
#pragma unroll
        for (int offset = CLUSTER; offset < WARP; offset *= 2) {
            weight += __shfl_xor_sync(FULL_WARP, weight, offset);
            count += __shfl_xor_sync(FULL_WARP, count, offset);
        }
    }

    // What comes before a bin after the last
    __device__ Place total_of_parts() const {
        Place total = {};
        sum_part(total.weight_before, total.count_before);
#pragma unroll
        for (int offset = 1; offset < CLUSTER; offset *= 2) {
            total.weight_before += __shfl_xor_sync(FULL_WARP, total.weight_before, offset);
            total.count_before += __shfl_xor_sync(FULL_WARP, total.count_before, offset);
        }
        return total;
    }

    // The bin in which the running sum (of weights, or of counts) reaches `target`, which is above what comes before the
    // bins, `before`, and not above what comes after. Ends with a barrier of the cluster.
    __device__ Place find_bin(Contents contents, int digit_shift, uint64 target, bool by_count, const Place& before) {
        Place* found = &shared.found[parity ^= 1];  // two, so that nobody still reads what is written
        uint64 own_weight, own_count;
        sum_part(own_weight, own_count);
        uint64 weight = own_weight, count = own_count;
#pragma unroll
        for (int offset = 1; offset < CLUSTER; offset *= 2) {
            const uint64 lower_weight = __shfl_up_sync(FULL_WARP, weight, offset, CLUSTER);
            const uint64 lower_count = __shfl_up_sync(FULL_WARP, count, offset, CLUSTER);
            if (lane % CLUSTER >= offset) weight += lower_weight, count += lower_count;
        }
        weight += before.weight_before, count += before.count_before;
        const uint32 reach = __ballot_sync(FULL_WARP, (by_count ? count : weight) >= target);
        const int part = (__ffs(reach) - 1) & (CLUSTER - 1);
        weight = __shfl_sync(FULL_WARP, weight - own_weight, part);
        count = __shfl_sync(FULL_WARP, count - own_count, part);
        if (part == rank) find_own_bin(found, contents, digit_shift, target, by_count, weight, count);
        cluster_sync();
        return *found;
    }

    __device__ void find_own_bin(Place* found, Contents contents, int digit_shift, uint64 target, bool by_count,
                                 uint64 weight, uint64 count) {
        if (thread < PART) {
            const int bin = rank * PART + thread;
            uint64 bin_weight = 0;
            uint32 bin_count = 0, units[CLUSTER], counts[CLUSTER];
#pragma unroll
            for (int source = 0; source < CLUSTER; source++) {
                units[source] = load_remote(&shared.units[bin], source);
                counts[source] = load_remote(&shared.counts[bin], source);
            }
#pragma unroll
            for (int source = 0; source < CLUSTER; source++)
                bin_weight += units[source], bin_count += counts[source];
            if (CARRIES || contents != HEAD) {
#pragma unroll 1
                for (int source = 0; source < CLUSTER; source++)
                    bin_weight += uint64(load_remote(&shared.carries[bin], source)) << 32;
            }
            shared.weights[thread] = bin_weight << shift_of(contents, digit_shift, bin);
            shared.part_count[thread] = bin_count;
        }
        __syncthreads();
        if (warp > 0) return;
        constexpr int LANE_BINS = PART / WARP;
        uint64 lane_weight = 0, lane_count = 0;
        for (int i = 0; i < LANE_BINS; i++) {
            lane_weight += shared.weights[lane * LANE_BINS + i];
            lane_count += shared.part_count[lane * LANE_BINS + i];
        }
        weight += warp_prefix_64(lane_weight) - lane_weight;
        count += warp_prefix_64(lane_count) - lane_count;
        const uint64 start = by_count ? count : weight, size = by_count ? lane_count : lane_weight;
        if (start < target && start + size >= target) {
            int i = lane * LANE_BINS;
            for (; i < (lane + 1) * LANE_BINS - 1; i++) {
                if ((by_count ? count + shared.part_count[i] : weight + shared.weights[i]) >= target) break;
                weight += shared.weights[i], count += shared.part_count[i];
            }
            shared.staged = {weight, shared.weights[i], count, shared.part_count[i], uint64(rank * PART + i)};
        }
        __syncwarp();
        publish(found);
    }

    // shared.staged to `place` in all of the cluster, by one warp
    __device__ void publish(Place* place) {
        for (int i = lane; i < PLACE_WORDS * CLUSTER; i += WARP)
            store_remote(&place->weight_before + i / CLUSTER, i % CLUSTER, (&shared.staged.weight_before)[i / CLUSTER]);
    }
};
