// One token id per row of logits; the rule is in interface.py. logits float32 (S, V) -> out int32 (S).
//
// All cuts (top_k, top_p, min_p) keep a prefix of the candidates in order of falling logit, and the draw asks where the
// prefix's running sum of weights passes a number. Nothing is sorted to find such a place: weights are integers (`Scale`)
// and summed into bins of falling logit; the bin that the place lies in is looked up, and its candidates alone are
// gathered and sorted, after finer bins (of the logit's bits, then the id's) where they are many. Where few candidates
// come before a cut, they are gathered too, and the rest is decided among them.
// Most logits of a language model lie far below the largest: at first only those above HEAD_END are put into bins, the
// tail is summed; a place in the tail (rare, it weighs little) asks for more.
//
// - Cluster of 8 thread blocks (before sm_90: one thread block): a row.
// - Thread block: an equal slice of the row, kept in shared memory where it fits, and its bins; an eighth of the bins it
//   can add up over the cluster. The cluster's first thread block also sorts.
// - Passes over the slice: the largest logit; bins; one per cut that falls within a bin (top_k, top_p, draw). A row at
//   temperature 0 ends after the first. What bounds the time are the exchanges between thread blocks.
// Integer sums make the result independent of the order of additions and of the other rows.
//
// Measured on an H100 80GB HBM3, 128256 normal logits of standard deviation 4 that the kernel before left in L2, us:
//   rows                     1      8     64
//   greedy                 4.6    6.1   19.3
//   temperature           19.1   22.9   73.8
//   top_p                 19.5   23.2   77.4
//   top_k, top_p, min_p   21.1   24.9   78.3
// The loop that fills the bins has 60 instructions per logit and two branches. By clock64(), a version that took 20.7 us
// for one row at temperature 1 spent 1300 cycles on each barrier of the cluster and 10 thousand on filling the bins.
#include "sample.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int PART = BINS / CLUSTER;  // bins that a thread block adds up
constexpr int CAPACITY = THREADS;     // candidates that are sorted at once
constexpr int FIRST_SHIFT = 64 - BIN_BITS;
constexpr int MOST_LOGITS = 32000;    // of a thread block, whose units of 17 bits add up in 32
constexpr bool CARRIES = CLUSTER == 1;  // has more of them: also the head's sums have carries
static_assert(PART <= THREADS && PART % WARP == 0 && WARPS > CLUSTER && WARPS <= WARP, "");

enum Step { TOP_K, TOP_P, DRAW };
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

struct Sampler {
    Shared& shared;
    const float4* groups;  // of 4 logits (the first and the last may hold some of other rows), global or shared memory
    int first_group, last_group;
    int first_id;  // of group 0: 0, or -1 .. -3
    int vocabulary;
    int rank, thread, lane, warp;
    int parity;
    Scale scale;
    // the row's parameters
    int top_k;
    float top_p, min_p;
    uint32 random;  // 24 bits
    uint64 above_min_p;

    // visit(logit, id) for the slice, -inf for what is no logit of this row; all lanes of a warp come together. LOADS of 16
    // bytes are under way at once.
    template <int LOADS, class Visit>
    __device__ void for_each(Visit visit) const {
        for (int base = first_group; base < last_group; base += THREADS * LOADS) {
            float4 values[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int group = base + i * THREADS + thread, id = first_id + 4 * group;
                values[i] = make_float4(MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY);
                if (group < last_group) values[i] = groups[group];
                if (id < 0 || id + 3 >= vocabulary) {
                    if (unsigned(id) >= unsigned(vocabulary)) values[i].x = MINUS_INFINITY;
                    if (unsigned(id + 1) >= unsigned(vocabulary)) values[i].y = MINUS_INFINITY;
                    if (unsigned(id + 2) >= unsigned(vocabulary)) values[i].z = MINUS_INFINITY;
                    if (unsigned(id + 3) >= unsigned(vocabulary)) values[i].w = MINUS_INFINITY;
                }
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int id = first_id + 4 * (base + i * THREADS + thread);
                visit(values[i].x, id);
                visit(values[i].y, id + 1);
                visit(values[i].z, id + 2);
                visit(values[i].w, id + 3);
            }
        }
    }

    // The slice to shared memory; a thread reads what it copied itself
    __device__ void keep(float4* slice) {
        for (int group = first_group + thread; group < last_group; group += THREADS)
            copy_16_async(shared_address(slice + (group - first_group)), groups + group);
        commit_copies();
        wait_copies<0>();
        groups = slice - first_group;
    }

    // Of the first `size` (32 at most) values, by a warp
    __device__ uint64 sum(const uint64* values, int size) const { return warp_sum_64(lane < size ? values[lane] : 0); }
    __device__ uint64 max(const uint64* values, int size) const { return warp_max_64(lane < size ? values[lane] : 0); }

    // ---- the largest logit: its order and ~id (the smallest id wins), or 0 where the row cannot be sampled

    __device__ uint64 find_largest() {
        float largest = MINUS_INFINITY, smallest = LARGEST_FLOAT;  // of the finite ones
        int id_of_largest = 0;
        bool bad = false;
        for_each<4>([&](float logit, int id) {
            bad |= !(logit <= LARGEST_FLOAT);
            if (logit > largest) largest = logit, id_of_largest = id;
            if (logit > MINUS_INFINITY) smallest = fminf(smallest, logit);
        });
        uint64 best = warp_max_64(uint64(order_of(largest)) << 32 | ~uint32(id_of_largest));
        uint64 worst = warp_max_64(~order_of(smallest));
        if (lane == 0) shared.reduced[warp] = best, shared.reduced_too[warp] = worst;
        bad = __syncthreads_or(bad);
        best = max(shared.reduced, WARPS);
        worst = max(shared.reduced_too, WARPS);
        cluster_wait();  // all have started
        if (thread < CLUSTER) {
            store_remote(&shared.best[rank], thread, best);
            store_remote(&shared.worst[rank], thread, worst);
            store_remote(&shared.bad[rank], thread, bad);
        }
        cluster_sync();
        best = max(shared.best, CLUSTER);
        return sum(shared.bad, CLUSTER) || float_of(uint32(best >> 32)) == MINUS_INFINITY ? 0 : best;
    }

    // The smallest finite logit, after that
    __device__ float smallest() const { return float_of(~uint32(max(shared.worst, CLUSTER))); }

    // ---- bins

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
    __device__ void fill_head(bool counts) {
        // min_p * max(p) <= p means t <= -log2(min_p); above 1 it would leave nobody
        const float last_t = min_p > 0 ? fmaxf(-log2f(min_p), 0.0f) : -1.0f;
        uint64 above = 0, tail = 0;
        for_each<1>([&](float logit, int) {
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
        for_each<1>([&](float logit, int) {
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
        for_each<1>([&](float logit, int id) {
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

    // ---- cuts

    // Candidates of bins first .. last that agree with `prefix` above `shift`, to the first thread block
    __device__ void gather(int first, int last, uint64 prefix, int shift) {
        for_each<1>([&](float logit, int id) {
            const Weight weight = scale.weigh(scale.t(logit));
            if (weight.bin < first || weight.bin > last || weight.units == 0) return;
            const uint64 value = candidate(logit, id);
            if (shift < 64 && value >> shift != prefix) return;
            const uint32 slot = add_remote(&shared.num_candidates, 0, 1);
            if (slot < CAPACITY) store_remote(shared.candidates + slot, 0, value);
        });
        cluster_sync();
    }

    __device__ bool is_active(int step) const {
        return step == DRAW || (step == TOP_P ? top_p < 1 : top_k > 0 && top_k < vocabulary);
    }

    // What the running sum (of counts, for top_k) reaches at the last candidate that `step` keeps, or at the one drawn.
    // total: the weight of those that the steps before have left; min_p is part of the draw.
    __device__ uint64 target_of(int step, uint64 total) const {
        if (step == TOP_K) return top_k;
        if (step == TOP_P) {
            const uint64 target = uint64(ceil(double(top_p) * double(total)));
            return target < 1 ? 1 : target < total ? target : total;
        }
        if (min_p > 0 && above_min_p < total) total = above_min_p;
        return (__umul64hi(total, random) << 40 | total * random >> 24) + 1;  // floor(random / 2^24 * total) + 1
    }

    // Decides steps first .. last among the gathered candidates, which come after `before`: shared.staged is the last one
    // kept, or drawn. By the first thread block.
    __device__ void decide(int first, int last, uint64 total, const Place& before, int size) {
        const bool valid = thread < size;
        const uint64 own = sort(valid ? shared.candidates[thread] : ~0ull, size, shared.candidates);
        const uint64 weight = valid ? scale.weigh(scale.t(logit_of(own))).value() : 0;
        const uint64 through = warp_prefix_64(weight);
        if (lane == WARP - 1) shared.reduced[warp] = through;
        __syncthreads();
        uint64 start = before.weight_before + through - weight;
        start += sum(shared.reduced, warp);
        const uint64 rank_of_own = before.count_before + thread + 1;
        for (int step = first; step <= last; step++) {
            if (!is_active(step)) continue;
            const uint64 target = target_of(step, total);
            const bool reaches = step == TOP_K ? rank_of_own == target : start < target && start + weight >= target;
            if (valid && reaches) shared.staged = {start, weight, rank_of_own - 1, 1, uint64(uint32(own))};
            __syncthreads();
            total = shared.staged.weight_before + shared.staged.weight;
            __syncthreads();
        }
    }

    // The token, in the first thread block
    __device__ int draw() {
        const bool counts = is_active(TOP_K) || is_active(TOP_P);
        fill_head(counts);
        const Place head = total_of_parts();
        const uint64 tail = sum(shared.tail, CLUSTER);
        above_min_p = sum(shared.above_min_p, CLUSTER);
        uint64 total = head.weight_before + tail;
        int contents = HEAD;
#pragma unroll 1
        for (int step = TOP_K; step <= DRAW; step++) {
            if (!is_active(step)) continue;
            const uint64 target = target_of(step, total);
            const bool by_count = step == TOP_K;
            const bool in_tail = target > (by_count ? head.count_before : head.weight_before);
            if (in_tail && tail == 0) continue;  // top_k candidates are more than weigh anything
            if (in_tail ? contents != TAIL : contents != HEAD) refill(in_tail, counts);
            contents = in_tail ? TAIL : HEAD;
            if (in_tail && by_count && head.count_before + total_of_parts().count_before <= target) continue;
            Place place = find_bin(Contents(contents), 0, target, by_count, in_tail ? head : Place());
            const bool decides_all = step == DRAW || (!in_tail && place.count_before + place.count <= CAPACITY);
            const uint64 end = by_count ? place.count_before + place.count : place.weight_before + place.weight;
            if (!decides_all && (end == target || place.weight == 0)) {
                total = place.weight_before + place.weight;
                continue;
            }
            const int last_bin = int(place.index) + (in_tail ? BINS : 0);
            const int first_bin = decides_all && step != DRAW ? 0 : last_bin;
            if (first_bin != last_bin) place = Place();
            const int size = narrow(contents, first_bin, last_bin, target, by_count, place);
            if (rank == 0) decide(step, decides_all ? DRAW : step, total, place, size);
            if (decides_all) break;
            if (rank == 0 && warp == 0) publish(&shared.found[parity ^ 1]);
            parity ^= 1;
            cluster_sync();
            if (rank == 0 && thread == 0) shared.num_candidates = 0;
            total = shared.found[parity].weight_before + shared.found[parity].weight;
        }
        return int(shared.staged.index);
    }

    __device__ void refill(bool in_tail, bool counts) {
        if (in_tail) return fill_tail();
        clear();
        __syncthreads();
        fill_head(counts);
    }

    // Gathers candidates of the bins, or those of finer ones around the target if they are too many: their number.
    // `place` becomes what they come after, `contents` what the bins hold.
    __device__ int narrow(int& contents, int first_bin, int last_bin, uint64 target, bool by_count, Place& place) {
        uint64 prefix = 0;
        for (int shift = 64;;) {
            gather(first_bin, last_bin, prefix, shift);
            const int size = int(load_remote(&shared.num_candidates, 0));
            if (size <= CAPACITY) return size;
            shift -= BIN_BITS;
            contents = DIGIT;
            fill_digit(first_bin, prefix, shift);
            if (rank == 0 && thread == 0) shared.num_candidates = 0;
            place = find_bin(DIGIT, shift_of(first_bin), target, by_count, place);
            prefix = prefix << BIN_BITS | place.index;
        }
    }
};

extern __shared__ float4 slice[];

// keeps: whether `slice` has room for one
extern "C" __global__ void __launch_bounds__(THREADS, CLUSTER > 1 ? 2 : 1)
    sample(const float* logits, const float* temperature, const int* top_k, const float* top_p, const float* min_p,
           const uint64* seeds, const int64* positions, int* out, int vocabulary, int keeps) {
    __shared__ Shared shared;
    const int row = blockIdx.y;
    grid_launch_dependents();
    Sampler sampler{shared};
    sampler.thread = threadIdx.x;
    sampler.lane = threadIdx.x % WARP;
    sampler.warp = threadIdx.x / WARP;
    sampler.rank = cluster_rank();
    sampler.parity = 0;
    sampler.clear();
    if (threadIdx.x == 0) shared.num_candidates = 0;
    cluster_arrive();
    const int64 start = int64(row) * vocabulary;
    const int skipped = int(start % 4);
    const int num_groups = (skipped + vocabulary + 3) / 4;
    sampler.groups = reinterpret_cast<const float4*>(logits + (start - skipped));
    sampler.first_id = -skipped;
    sampler.vocabulary = vocabulary;
    sampler.first_group = int(int64(num_groups) * sampler.rank / CLUSTER);
    sampler.last_group = int(int64(num_groups) * (sampler.rank + 1) / CLUSTER);

    grid_wait();
    const float row_temperature = temperature[row];
    sampler.top_k = top_k[row];
    sampler.top_p = top_p[row];
    sampler.min_p = min_p[row];
    const uint64 seed = seeds[row], position = positions[row];
    if (keeps && row_temperature != 0) sampler.keep(slice);  // one pass is all that the others make
    const uint64 best = sampler.find_largest();
    int token = best ? int(~uint32(best)) : -1;
    if (best && row_temperature != 0) {
        const bool fits = CARRIES || 4 * (num_groups / CLUSTER + 1) <= MOST_LOGITS;
        sampler.scale = Scale::of(float_of(uint32(best >> 32)), sampler.smallest(), row_temperature, fits ? 17 : 15);
        sampler.random = philox_word(seed, position) >> 8;
        token = sampler.draw();
        cluster_arrive_relaxed();  // the first thread block's shared memory is read until here
    }
    if (sampler.rank == 0 && threadIdx.x == 0) out[row] = token;
    if (best && row_temperature != 0) cluster_wait();
}
