// The slice of a row of logits that a thread block of its cluster looks through, pass after pass.
#pragma once

#include "logits.cuh"
#include "sample_cluster.cuh"

struct Slice {
    const float4* groups;  // of 4 logits, aligned; the row's first and last may hold some of others. Global or shared memory
    int first_group, last_group;
    int first_id;  // of group 0: 0, or -1 .. -3
    int vocabulary;

    DEVICE Slice of(const float* logits, int row, int vocabulary, int rank) {
        const int64 start = int64(row) * vocabulary;
        const int skipped = int(start % 4);
        const int64 num_groups = (skipped + vocabulary + 3) / 4;
        return {reinterpret_cast<const float4*>(logits + (start - skipped)), int(num_groups * rank / CLUSTER),
                int(num_groups * (rank + 1) / CLUSTER), -skipped, vocabulary};
    }

    // The most logits of a slice of this row
    __device__ int max_size() const { return 4 * ((vocabulary - first_id + 3) / 4 / CLUSTER + 1); }

    // visit(logit, id) for the slice, -inf for what is no logit of this row; all lanes of a warp come together. LOADS of 16
    // bytes are under way at once.
    template <int LOADS, class Visit>
    __device__ void for_each(Visit visit) const {
        for (int base = first_group; base < last_group; base += THREADS * LOADS) {
            float4 values[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int group = base + i * THREADS + threadIdx.x;
                values[i] = make_float4(MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY, MINUS_INFINITY);
                if (group < last_group && is_whole(group)) values[i] = groups[group];
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int group = base + i * THREADS + threadIdx.x;
                if (group < last_group && !is_whole(group)) values[i] = part_of(group);
            }
#pragma unroll
            for (int i = 0; i < LOADS; i++) {
                const int id = first_id + 4 * (base + i * THREADS + threadIdx.x);
                visit(values[i].x, id);
                visit(values[i].y, id + 1);
                visit(values[i].z, id + 2);
                visit(values[i].w, id + 3);
            }
        }
    }

    // To shared memory; a thread reads what it copied itself
    __device__ void keep(float4* memory) {
        for (int group = first_group + threadIdx.x; group < last_group; group += THREADS) {
            float4* to = memory + (group - first_group);
            if (is_whole(group))
                copy_16_async(shared_address(to), groups + group);
            else
                *to = part_of(group);
        }
        commit_copies();
        wait_copies<0>();
        groups = memory - first_group;
    }

    // Whether all four are of this row. If not, they are not read at once: they may end beyond the allocation.
    __device__ bool is_whole(int group) const {
        return first_id + 4 * group >= 0 && first_id + 4 * group + 3 < vocabulary;
    }

    __device__ float4 part_of(int group) const {
        const int id = first_id + 4 * group;
        return make_float4(logit(id), logit(id + 1), logit(id + 2), logit(id + 3));
    }

    __device__ float logit(int id) const {
        return unsigned(id) < unsigned(vocabulary) ? reinterpret_cast<const float*>(groups)[id - first_id] : MINUS_INFINITY;
    }
};
