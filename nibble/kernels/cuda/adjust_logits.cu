// Penalties, biases and bans of the rows whose sequence has a slot (slots.py); the rule is in sampling.py.
//
// logits float32 (S, V), in place; slots int32 (num_slots, slot_words); slot_of, rows int32 (S,), positions int64 (S,).
// Thread block (x: part of the vocabulary, y: row): what concerns tokens of other parts is left to their thread blocks, so
// the three phases (bans, biases, penalties) are in order within a thread block and none waits for another. The newest
// token is counted by the part that it is in. A row without a slot costs one load.
// Bytes moved per row: the counts (2 V) and the logits of seen tokens; with allowed tokens also what they leave out.
// Measured in a graph of 10, NVIDIA H100 80GB HBM3, 128256 tokens, us for 1, 8, 64 rows: no slot 1.1, 1.1, 1.9; a bias 2.0,
// 2.1, 2.8; penalties of 1500 tokens 7.2, 8.0, 9.6; half of all tokens allowed 7.2, 7.5, 14.2.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int PARTS = 16;  // as in adjust_logits.py
// slots.py
constexpr int RECENT = 16, STOP_IDS = 32, BIAS_IDS = 288, BIAS_VALUES = 1312, BAD_WORDS = 2336, ALLOWED = 3360;
constexpr int NUM_RECENT = 16;
constexpr uint32 IN_PROMPT = 1 << 15, MAX_COUNT = IN_PROMPT - 1;
enum Header {
    REPETITION, FREQUENCY, PRESENCE, MIN_TOKENS, NUM_STOP_IDS, NUM_BIASES, NUM_BAD_WORD_WORDS, HAS_ALLOWED, HAS_COUNTS
};
constexpr int COUNTS_AT_ONCE = 8;  // of a load of 16 bytes

#define MINUS_INFINITY __int_as_float(0xff800000)

struct Row {
    float* logits;
    int* slot;
    int first, last;  // this part of the vocabulary; first is a multiple of 32
    int newest;
    int64 position;

    __device__ bool has(int id) const { return id >= first && id < last; }

    __device__ void remember(uint16* counts) const {
        if (slot[HAS_COUNTS] && has(newest)) {
            const uint32 count = counts[newest];
            if (position == 0)
                counts[newest] = uint16(count | IN_PROMPT);
            else if ((count & MAX_COUNT) < MAX_COUNT)
                counts[newest] = uint16(count + 1);
        }
        if (blockIdx.x == 0 && position > 0) slot[RECENT + int((position - 1) % NUM_RECENT)] = newest;
    }

    // Whether the generated tokens end with what is before the last id of the bad word that ends at `end`. The newest is
    // not read from the slot, which another thread block is writing; what it overwrites is older than any bad word.
    __device__ bool matches(const int* words, int end) const {
        for (int back = 1; back < end && words[end - 1 - back] >= 0; back++) {
            if (position < back) return false;
            const int token = back == 1 ? newest : slot[RECENT + int((position - back) % NUM_RECENT)];
            if (token != words[end - 1 - back]) return false;
        }
        return true;
    }

    __device__ void forbid() const {
        if (slot[HAS_ALLOWED]) {
            for (int id = first + threadIdx.x; id < last; id += THREADS)
                if (!(uint32(slot[ALLOWED + id / 32]) >> (id % 32) & 1)) logits[id] = MINUS_INFINITY;
        }
        const int num_stop_ids = position < slot[MIN_TOKENS] ? slot[NUM_STOP_IDS] : 0;
        for (int i = threadIdx.x; i < num_stop_ids; i += THREADS)
            if (has(slot[STOP_IDS + i])) logits[slot[STOP_IDS + i]] = MINUS_INFINITY;
        const int* words = slot + BAD_WORDS;
        const int num_words = slot[NUM_BAD_WORD_WORDS];
        for (int end = 1 + threadIdx.x; end < num_words; end += THREADS)
            if (words[end] < 0 && has(words[end - 1]) && matches(words, end)) logits[words[end - 1]] = MINUS_INFINITY;
    }

    __device__ void bias() const {
        const int num_biases = slot[NUM_BIASES];
        for (int i = threadIdx.x; i < num_biases; i += THREADS) {
            const int id = slot[BIAS_IDS + i];
            if (has(id)) logits[id] += __int_as_float(slot[BIAS_VALUES + i]);
        }
    }

    __device__ void penalize(const uint16* counts) const {
        const float repetition = __int_as_float(slot[REPETITION]), frequency = __int_as_float(slot[FREQUENCY]);
        const float presence = __int_as_float(slot[PRESENCE]);
        for (int base = first + COUNTS_AT_ONCE * threadIdx.x; base < last; base += COUNTS_AT_ONCE * THREADS) {
            const uint4 words = *reinterpret_cast<const uint4*>(counts + base);  // beyond the vocabulary there is padding
            if ((words.x | words.y | words.z | words.w) == 0) continue;
            const uint32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int i = 0; i < COUNTS_AT_ONCE; i++) {
                const uint32 count = pairs[i / 2] >> (16 * (i % 2)) & 0xffff;
                if (count == 0 || base + i >= last) continue;
                float x = logits[base + i];
                x = x > 0 ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
                const float times = float(count & MAX_COUNT);
                if (times > 0) x = __fsub_rn(__fsub_rn(x, __fmul_rn(frequency, times)), presence);
                logits[base + i] = x;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    adjust_logits(float* logits, int* slots, int slot_words, int counts_start, const int* slot_of, const int* ids,
                  const int* rows, const int64* positions, int vocabulary) {
    grid_launch_dependents();
    grid_wait();
    const int index = blockIdx.y;
    if (slot_of[index] < 0) return;
    Row row;
    row.logits = logits + int64(index) * vocabulary;
    row.slot = slots + int64(slot_of[index]) * slot_words;
    const int part = (vocabulary + 32 * PARTS - 1) / (32 * PARTS) * 32;
    row.first = part * blockIdx.x;
    row.last = min(row.first + part, vocabulary);
    row.newest = ids[rows[index]];
    row.position = positions[index];
    uint16* counts = reinterpret_cast<uint16*>(row.slot + counts_start);
    if (threadIdx.x == 0) row.remember(counts);
    row.forbid();
    __syncthreads();
    row.bias();
    __syncthreads();
    if (row.slot[HAS_COUNTS]) row.penalize(counts);
}
