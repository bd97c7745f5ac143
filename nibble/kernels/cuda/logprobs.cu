// Log probabilities of a given token and of the most probable ones; the rule is in sampling.py.
//
// logits float32 (S, V), ids, num_logprobs, out_rows int32 (S,) -> out int32 (n, LOGPROB_WORDS): the float32 bits of the
// token's, then (id, float32 bits) of each of the others.
// Thread block: a row, cut into at most 1024 cells. One pass finds each cell's largest logit, which a lane of the warp
// that looked through the cell keeps, and the sum of all weights, always added in the same order. Then, for each token
// that is asked for, the largest of the cells' is taken, and its cell's next one found by that warp: a round costs a
// barrier and a load from L2.
//
// Measured in a graph of 10, NVIDIA H100 80GB HBM3, 128256 logits, us: no others 20 for 1 row and 21 for 64, 5 others 24 and
// 25, 20 others 34 and 36; no row that wants any: 1.0 and 1.2. One multiprocessor reads a row at 25 GB/s here.
#include "logits.cuh"

constexpr int BLOCK = 1024;
constexpr int WARPS = BLOCK / WARP;
constexpr int LOADS = 4;        // of a lane, for the smallest cell
constexpr int RUN = WARP * LOADS;
constexpr int CELLS_AT_ONCE = 4;
constexpr int LOGPROB_WORDS = 41;  // sampling.py
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Shared {
    uint64 best[2][WARPS];
    float largest[WARPS], sums[WARPS];
};

// Logits in their order, equal ones by falling id; 0 is less than any
DEVICE uint64 key_of(float logit, int id) { return uint64(order_of(logit)) << 32 | ~uint32(id); }

DEVICE float log_2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

struct Row {
    const float* logits;
    int vocabulary, cell_size, num_cells, lane, warp;
    uint64 own;             // the largest key left in cell lane * WARPS + warp
    float largest, weight;  // of this warp's cells; weight: this lane's sum of 2^((logit - largest) log2 e)

    __device__ float logit(int id, int end) const { return id < end ? logits[id] : MINUS_INFINITY; }

    // The whole of a cell: its largest logit to the lane that keeps it, its weights to the sum
    __device__ void add_run(int cell, int base, const float (&values)[LOADS], int end) {
        uint64 best = 0;
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            const int id = base + i * WARP + lane;
            if (id < end) best = max(best, key_of(values[i], id));
        }
        best = warp_max_64(best);
        if (lane == cell / WARPS) own = max(own, best);
        const float old = largest;
        largest = fmaxf(largest, float_of(uint32(best >> 32)));
        if (largest == MINUS_INFINITY) return;
        weight *= power_of_2((old - largest) * LOG2_E);
#pragma unroll
        for (int i = 0; i < LOADS; i++) weight += power_of_2((values[i] - largest) * LOG2_E);
    }

    __device__ void look_through() {
        own = 0, largest = MINUS_INFINITY, weight = 0;
        for (int offset = 0; offset < cell_size; offset += RUN) {
            for (int first = warp; first < num_cells; first += WARPS * CELLS_AT_ONCE) {
                float values[CELLS_AT_ONCE][LOADS];
#pragma unroll
                for (int c = 0; c < CELLS_AT_ONCE; c++) {
                    const int base = (first + c * WARPS) * cell_size + offset;
#pragma unroll
                    for (int i = 0; i < LOADS; i++) values[c][i] = logit(base + i * WARP + lane, vocabulary);
                }
#pragma unroll
                for (int c = 0; c < CELLS_AT_ONCE; c++) {
                    const int cell = first + c * WARPS, base = cell * cell_size + offset;
                    if (base < vocabulary) add_run(cell, base, values[c], vocabulary);
                }
            }
        }
    }

    // The largest key of a cell below `bound`
    __device__ uint64 next(int cell, uint64 bound) const {
        uint64 best = 0;
        const int end = min((cell + 1) * cell_size, vocabulary);
        for (int id = cell * cell_size + lane; id < end; id += WARP) {
            const uint64 key = key_of(logits[id], id);
            if (key < bound) best = max(best, key);
        }
        return warp_max_64(best);
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK)
    logprobs(const float* logits, const int* ids, const int* num_logprobs, const int* out_rows, int* out,
             int vocabulary, int cell_size) {
    __shared__ Shared shared;
    grid_launch_dependents();
    grid_wait();
    const int count = num_logprobs[blockIdx.x], token = ids[blockIdx.x], out_row = out_rows[blockIdx.x];
    if (count < 0 || token < 0 || out_row < 0) return;
    Row row;
    row.logits = logits + int64(blockIdx.x) * vocabulary;
    row.vocabulary = vocabulary;
    row.cell_size = cell_size;
    row.num_cells = (vocabulary + cell_size - 1) / cell_size;
    row.lane = threadIdx.x % WARP;
    row.warp = threadIdx.x / WARP;
    row.look_through();

    const float weight = warp_sum(row.weight);
    if (row.lane == 0) shared.largest[row.warp] = row.largest, shared.sums[row.warp] = weight;
    __syncthreads();
    const float warp_largest = shared.largest[row.lane], largest = warp_max(warp_largest);
    const float scaled = warp_largest == MINUS_INFINITY ? 0.0f : power_of_2((warp_largest - largest) * LOG2_E);
    const float log_sum = LN_2 * log_2(warp_sum(scaled * shared.sums[row.lane]));
    int* words = out + int64(out_row) * LOGPROB_WORDS;
    if (threadIdx.x == 0) words[0] = __float_as_int(row.logits[token] - largest - log_sum);

    for (int i = 0; i < count; i++) {
        const uint64 warp_best = warp_max_64(row.own);
        if (row.lane == 0) shared.best[i % 2][row.warp] = warp_best;  // two, so that nobody still reads what is written
        __syncthreads();
        const uint64 best = warp_max_64(shared.best[i % 2][row.lane]);
        const int id = best ? int(~uint32(best)) : -1;
        if (threadIdx.x == 0) {
            words[1 + 2 * i] = id;
            words[2 + 2 * i] = __float_as_int(best ? float_of(uint32(best >> 32)) - largest - log_sum : MINUS_INFINITY);
        }
        const int cell = id / cell_size;
        if (best == 0 || cell % WARPS != row.warp) continue;
        const uint64 next = row.next(cell, best);
        if (row.lane == cell / WARPS) row.own = next;
    }
}
