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
//   greedy                 3.9    4.5   13.7
//   temperature           19.8   22.7   67.8
//   top_p                 29.7   32.8   95.3
//   top_k, top_p, min_p   20.5   22.9   69.0
// The loop that fills the bins has 16 instructions for a logit of the tail and 40 for one of the head. By clock64(), an
// earlier version that took 20.7 us for one row at temperature 1 spent 1300 cycles on each barrier of the cluster and 10
// thousand on filling the bins.
//
// The files: sample_cluster.cuh (thread blocks and their memory), sample_slice.cuh (the logits), sample_weights.cuh,
// sample_bins.cuh, and here the cuts.
#include "philox.cuh"
#include "sample_bins.cuh"
#include "sort.cuh"

enum Step { TOP_K, TOP_P, DRAW };

struct Sampler : Bins {  // of a row; its parameters:
    int top_k;
    float top_p, min_p;
    uint32 random;  // 24 bits
    uint64 above_min_p;

    // ---- the largest logit: its order and ~id (the smallest id wins), or 0 where the row cannot be sampled

    __device__ uint64 find_largest() {
        float largest = MINUS_INFINITY, smallest = LARGEST_FLOAT;  // of the finite ones
        int id_of_largest = 0;
        bool bad = false;
        slice.for_each<4>([&](float logit, int id) {
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

    // ---- cuts

    // Candidates of bins first .. last that agree with `prefix` above `shift`, to the first thread block
    __device__ void gather(int first, int last, uint64 prefix, int shift) {
        slice.for_each<1>([&](float logit, int id) {
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
        return step == DRAW || (step == TOP_P ? top_p < 1 : top_k > 0 && top_k < slice.vocabulary);
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
        fill_head(min_p, counts);
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
        fill_head(min_p, counts);
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

extern __shared__ float4 slice_memory[];

// keeps: whether there is room for a slice
extern "C" __global__ void __launch_bounds__(THREADS, CLUSTER > 1 ? 2 : 1)
    sample(const float* logits, const float* temperature, const int* top_k, const float* top_p, const float* min_p,
           const uint64* seeds, const int64* positions, int* out, int vocabulary, int keeps) {
    __shared__ Shared shared;
    const int row = blockIdx.y;
    grid_launch_dependents();
    Sampler sampler{shared};
    sampler.clear();
    if (threadIdx.x == 0) shared.num_candidates = 0;
    cluster_arrive();
    sampler.slice = Slice::of(logits, row, vocabulary, sampler.rank);

    grid_wait();
    const float row_temperature = temperature[row];
    sampler.top_k = top_k[row];
    sampler.top_p = top_p[row];
    sampler.min_p = min_p[row];
    const uint64 seed = seeds[row], position = positions[row];
    if (keeps && row_temperature != 0) sampler.slice.keep(slice_memory);  // one pass is all that the others make
    const uint64 best = sampler.find_largest();
    int token = best ? int(~uint32(best)) : -1;
    if (best && row_temperature != 0) {
        const bool fits = CARRIES || sampler.slice.max_size() <= MOST_LOGITS;
        sampler.scale = Scale::of(float_of(uint32(best >> 32)), sampler.smallest(), row_temperature, fits ? 17 : 15);
        sampler.random = philox_word(seed, position) >> 8;
        token = sampler.draw();
        cluster_arrive_relaxed();  // the first thread block's shared memory is read until here
    }
    if (sampler.rank == 0 && threadIdx.x == 0) out[row] = token;
    if (best && row_temperature != 0) cluster_wait();
}
