"""One token id per row of logits; the rule is in `interface.Kernels.sample`.

The order of candidates is needed near the cuts only. Logits are counted into bins of falling value; whole bins are
skipped by their counts and sums, and just the bins that a cut falls into are sorted. Weights are exp in fp32, their
sums fp64. Source of the random word: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES

NUM_ARGUMENTS = 10
NUM_BINS = 1024
BINNED_RANGE = np.float32(32)  # exp(-32) = 1e-14: all that is below shares the last bin
MAX_FACTOR = np.float32(1e30)  # finite at any temperature, so that 0 stays in bin 0
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
U24 = 1.0 / (1 << 24)


@inline_jit
def philox_word(seed, position):
    """The first word of Philox4x32-10, key (seed low, seed high), counter (position low, position high, 0, 0)."""
    low32 = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = position & low32, position >> shift, np.uint64(0), np.uint64(0)
    k0, k1 = seed & low32, seed >> shift
    for _ in range(PHILOX_ROUNDS):
        first, second = c0 * np.uint64(PHILOX_MULTIPLIERS[0]), c2 * np.uint64(PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = (second >> shift) ^ c1 ^ k0, second & low32, (first >> shift) ^ c3 ^ k1, first & low32
        k0, k1 = (k0 + np.uint64(PHILOX_WEYL[0])) & low32, (k1 + np.uint64(PHILOX_WEYL[1])) & low32
    return c0


@inline_jit
def _largest(logits):
    """(largest logit, is there a NaN)."""
    size = len(logits)
    full = size // LANES * LANES
    best = simd.broadcast(np.float32(-np.inf))
    nan = False
    for place in range(logits.ctypes.data, logits.ctypes.data + full * 4, VECTOR_BYTES):
        values = memory.load(place)
        best = simd.maximum(best, values)
        nan |= simd.has_nan(values)
    largest = simd.max_of(best)
    for i in range(full, size):
        nan |= np.isnan(logits[i])
        largest = max(largest, logits[i])
    return largest, nan


@inline_jit
def _first_equal(logits, value):
    size = len(logits)
    full = size // LANES * LANES
    for i in range(0, full, LANES):
        lane = simd.find(memory.load(logits.ctypes.data + i * 4), value)
        if lane < LANES:
            return i + lane
    for i in range(full, size):
        if logits[i] == value:
            return i
    return -1


@inline_jit
def _weigh(logits, largest, temperature, weights):
    """weights = exp((logits - largest) / temperature), unnormalised: the largest is 1."""
    size = len(logits)
    full = size // LANES * LANES
    top, divisor = simd.broadcast(largest), simd.broadcast(temperature)
    for place in range(0, full * 4, VECTOR_BYTES):
        difference = (memory.load(logits.ctypes.data + place) - top) / divisor
        memory.store(weights.ctypes.data + place, simd.exp_or_zero(difference))
    for i in range(full, size):
        difference = simd.broadcast((logits[i] - largest) / temperature)
        weights[i] = simd.first_of(simd.exp_or_zero(difference))


@inline_jit
def _bin(logits, largest, temperature, weights, order, bin_starts, bin_sums):
    """Sort ids into bins of falling logit (ids rise within a bin): order, and per bin its start and sum of weights."""
    size = len(logits)
    factor = min(np.float32(NUM_BINS) / (BINNED_RANGE * temperature), MAX_FACTOR)
    bins = np.empty(size, np.int16)
    counts = np.zeros(NUM_BINS + 1, np.int64)
    bin_sums[:] = 0
    for i in range(size):
        distance = (largest - logits[i]) * factor
        place = np.int64(min(distance, np.float32(NUM_BINS - 1)))
        bins[i] = place
        counts[place + 1] += 1
        bin_sums[place] += weights[i]
    for b in range(NUM_BINS):
        counts[b + 1] += counts[b]
    bin_starts[:] = counts
    for i in range(size):
        order[counts[bins[i]]] = i
        counts[bins[i]] += 1


@inline_jit
def _sort_bin(logits, order, start, stop):
    """Order the ids of one bin by falling logit; equal logits keep rising ids (a merge sort, bottom-up)."""
    ids = order[start:stop]
    merged = np.empty(stop - start, np.int32)
    width = 1
    while width < len(ids):
        for left in range(0, len(ids), 2 * width):
            i, j = left, left + width
            middle, right = min(left + width, len(ids)), min(left + 2 * width, len(ids))
            for place in range(left, right):
                if i < middle and (j >= right or logits[ids[i]] >= logits[ids[j]]):
                    merged[place] = ids[i]
                    i += 1
                else:
                    merged[place] = ids[j]
                    j += 1
        for place in range(len(ids)):
            ids[place] = merged[place]
        width *= 2


@inline_jit
def _prefix(logits, weights, order, bin_starts, bin_sums, is_sorted, limit, target):
    """The shortest prefix of the candidates that is `limit` long or whose sum is >= target: (length, sum)."""
    running = 0.0
    for b in range(NUM_BINS):
        start, stop = bin_starts[b], bin_starts[b + 1]
        if stop <= limit and running + bin_sums[b] < target:
            running += bin_sums[b]
            continue
        if not is_sorted[b]:
            _sort_bin(logits, order, start, stop)
            is_sorted[b] = True
        for i in range(start, stop):
            if i >= limit:
                return limit, running
            running += weights[order[i]]
            if running >= target:
                return i + 1, running
    return min(limit, len(order)), running


@inline_jit
def _draw(logits, largest, temperature, top_k, top_p, min_p, u):
    size = len(logits)
    weights = np.empty(size, np.float32)
    _weigh(logits, largest, temperature, weights)
    order = np.empty(size, np.int32)
    bin_starts, bin_sums = np.empty(NUM_BINS + 1, np.int64), np.empty(NUM_BINS, np.float64)
    is_sorted = np.zeros(NUM_BINS, np.bool_)
    _bin(logits, largest, temperature, weights, order, bin_starts, bin_sums)
    keep = min(top_k, size) if top_k > 0 else size
    keep, total = _prefix(logits, weights, order, bin_starts, bin_sums, is_sorted, keep, np.inf)
    if top_p < 1:
        keep, total = _prefix(logits, weights, order, bin_starts, bin_sums, is_sorted, keep, np.float64(top_p) * total)
    if min_p > 0:
        above = 0
        for i in range(size):
            above += weights[i] >= min_p
        keep = max(1, min(keep, above))
        keep, total = _prefix(logits, weights, order, bin_starts, bin_sums, is_sorted, keep, np.inf)
    # the first candidate whose running sum exceeds u * total, which is the shortest prefix that reaches the next float
    target = np.nextafter(u * total, np.inf)
    keep, _ = _prefix(logits, weights, order, bin_starts, bin_sums, is_sorted, keep, target)
    return order[max(keep, 1) - 1]


@inline_jit
def _row(logits, temperature, top_k, top_p, min_p, seed, position):
    largest, nan = _largest(logits)
    if nan or not np.isfinite(largest):
        return -1
    if temperature == 0:
        return _first_equal(logits, largest)
    u = (philox_word(seed, position) >> np.uint64(8)) * U24
    return _draw(logits, largest, temperature, top_k, top_p, min_p, u)


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    size = a[1]
    logits = carray(memory.address_as_void_pointer(a[0] + chunk * size * 4), size, np.float32)
    token = _row(
        logits,
        memory.float32_at(a[2] + chunk * 4),
        memory.int32_at(a[3] + chunk * 4),
        memory.float32_at(a[4] + chunk * 4),
        memory.float32_at(a[5] + chunk * 4),
        np.uint64(memory.int64_at(a[6] + chunk * 8)),
        np.uint64(memory.int64_at(a[7] + chunk * 8)),
    )
    out = carray(memory.address_as_void_pointer(a[8]), chunk + 1, np.int32)
    out[chunk] = token


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def sample(pool, function, logits, temperature, top_k, top_p, min_p, seeds, positions, out):
    """out int32 (S,): a token id per row of logits (S, V), -1 where a row has a NaN or no finite logit."""
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = logits.ctypes.data, logits.shape[1], temperature.ctypes.data, top_k.ctypes.data
    a[4], a[5], a[6], a[7] = top_p.ctypes.data, min_p.ctypes.data, seeds.ctypes.data, positions.ctypes.data
    a[8] = out.ctypes.data
    run_job(pool, function, a.ctypes.data, logits.shape[0])
    memory.keep_alive(a)
