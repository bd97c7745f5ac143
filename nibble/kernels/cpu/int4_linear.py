"""x @ w.T for INT4 tiles in DECODE mode, in floats: for CPUs without AVX512-VNNI (`digit_linear.py`).

Tiles are read in the order of their bytes, which is what hardware prefetching follows; the running sums of a tile's 64
rows wait in L1. Up to 8 tokens share the unpacked nibbles (`int4_fragment.py`). A row of x is summed in the same order
whatever the number of tokens and threads, so results are batch-invariant bit for bit.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.int4_fragment import (
    HALF_SUMS_BYTES,
    MAX_TOKENS,
    Q_PER_ONE,
    SCALE_BYTES,
    accumulate,
    load_sums,
    permute_columns,
    row_scales,
    row_sums,
    store_sums,
)
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.store_rows import store_rows
from nibble.kernels.cpu.thread_pool import num_threads_of, run_job
from nibble.kernels.cpu.vector_ir import VECTOR_BYTES
from nibble.kernels.layout import FRAGMENT, TILE_COLUMNS, TILE_ROWS

ROW_FRAGMENTS = TILE_ROWS // FRAGMENT
FRAGMENT_BYTES = FRAGMENT * FRAGMENT // 2
PREFETCH_BYTES = 4096  # how far ahead of its arithmetic a thread asks for words
NUM_ARGUMENTS = 10
# Few and long chunks: each begins with cache misses that no prefetching saw coming. On 2 cores, 4 chunks a matrix read
# it at 1.4 times the speed of 32. But not so long that groups of 8 tokens find a chunk no longer in the L2 cache.
CHUNKS_PER_THREAD = 2
MAX_CHUNK_BYTES = 1 << 19


@inline_jit
def _few_tokens(tokens, words, scales, num_groups, group_size, x, x_stride, totals):
    """One row fragment of one tile, both halves at once."""
    low, high = load_sums(tokens, totals), load_sums(tokens, totals + HALF_SUMS_BYTES)
    for _ in range(num_groups):
        low_scales, high_scales = row_scales(scales), row_scales(scales + 4 * SCALE_BYTES)
        for _ in range(group_size // FRAGMENT):
            low = accumulate(low, low_scales, words, x, x_stride)
            high = accumulate(high, high_scales, words + VECTOR_BYTES, x, x_stride)
            memory.prefetch(words + PREFETCH_BYTES)
            memory.prefetch(words + PREFETCH_BYTES + VECTOR_BYTES)
            words += FRAGMENT_BYTES
            x += VECTOR_BYTES
        scales += TILE_ROWS * SCALE_BYTES
    store_sums(totals, low)
    store_sums(totals + HALF_SUMS_BYTES, high)


@inline_jit
def _many_tokens(words, scales, num_groups, group_size, x, x_stride, totals):
    """As `_few_tokens` for 8 tokens, one half after the other: the accumulators of both do not fit the registers."""
    for half in range(2):
        half_words, half_scales, half_x = words + half * VECTOR_BYTES, scales + half * 4 * SCALE_BYTES, x
        sums = load_sums(MAX_TOKENS, totals + half * HALF_SUMS_BYTES)
        for _ in range(num_groups):
            rows = row_scales(half_scales)
            for _ in range(group_size // FRAGMENT):
                sums = accumulate(sums, rows, half_words, half_x, x_stride)
                memory.prefetch(half_words + PREFETCH_BYTES)
                half_words += FRAGMENT_BYTES
                half_x += VECTOR_BYTES
            half_scales += TILE_ROWS * SCALE_BYTES
        store_sums(totals + half * HALF_SUMS_BYTES, sums)


@inline_jit
def _tile(tokens, words, scales, num_groups, group_size, x, x_stride, totals):
    if tokens == 1:
        _few_tokens(1, words, scales, num_groups, group_size, x, x_stride, totals)
    elif tokens == 2:
        _few_tokens(2, words, scales, num_groups, group_size, x, x_stride, totals)
    elif tokens <= 4:
        _few_tokens(4, words, scales, num_groups, group_size, x, x_stride, totals)
    else:
        _many_tokens(words, scales, num_groups, group_size, x, x_stride, totals)


@inline_jit
def _row_tile(tokens, tile, first, last, num_columns, group_size, x, totals):
    """totals (at an address) = row fragments first..last of a row tile times 8 rows of x."""
    zero = simd.broadcast(np.float32(0))
    for place in range(first * 2 * HALF_SUMS_BYTES, last * 2 * HALF_SUMS_BYTES, VECTOR_BYTES):
        memory.store(totals + place, zero)
    for column in range(0, num_columns, TILE_COLUMNS):
        width = min(TILE_COLUMNS, num_columns - column)
        num_groups = width // group_size
        fragment_bytes = width // FRAGMENT * FRAGMENT_BYTES
        scales = tile + ROW_FRAGMENTS * fragment_bytes
        for r in range(first, last):
            _tile(
                tokens,
                tile + r * fragment_bytes,
                scales + r * FRAGMENT * SCALE_BYTES,
                num_groups,
                group_size,
                x + column * 4,
                num_columns * 4,
                totals + r * 2 * HALF_SUMS_BYTES,
            )
        tile = scales + num_groups * TILE_ROWS * SCALE_BYTES


@inline_jit
def _permute(x, count, permuted):
    """16 x with each 16 columns in nibble order."""
    factor = simd.broadcast(np.float32(Q_PER_ONE))
    for place in range(0, count * 4, VECTOR_BYTES):
        memory.store(permuted + place, permute_columns(memory.load(x + place)) * factor)


@inline_jit
def _row_fragments(start, stop, a):
    """Row fragments start..stop of w for all rows of x."""
    packed, group_size, num_columns, num_rows, num_tokens = a[0], a[1], a[2], a[3], a[4]
    permuted, bias, add, out = a[5], a[6], a[7], a[8]
    row_tile_bytes = TILE_ROWS * (num_columns // 2 + num_columns // group_size * SCALE_BYTES)
    buffer = np.empty(ROW_FRAGMENTS * 2 * HALF_SUMS_BYTES + VECTOR_BYTES, np.uint8)
    totals = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES  # no access crosses a cache line
    while start < stop:
        row_tile, first = start // ROW_FRAGMENTS, start % ROW_FRAGMENTS
        last = min(ROW_FRAGMENTS, first + stop - start)
        tile = packed + row_tile * row_tile_bytes
        for token in range(0, num_tokens, MAX_TOKENS):
            tokens = min(MAX_TOKENS, num_tokens - token)
            x = permuted + token * num_columns * 4
            _row_tile(tokens, tile, first, last, num_columns, group_size, x, totals)
            for r in range(first, last):
                for t in range(tokens):
                    sums = row_sums(totals + r * 2 * HALF_SUMS_BYTES + t * VECTOR_BYTES)
                    row = (row_tile * ROW_FRAGMENTS + r) * FRAGMENT
                    store_rows(sums, row, num_rows, bias, add, out + (token + t) * num_rows * 4)
        start += last - first
    memory.keep_alive(buffer)


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    units = -(-a[3] // FRAGMENT)
    start = chunk * a[9]
    _row_fragments(start, min(start + a[9], units), a)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def int4_gemv(pool, function, x, packed, group_size, bias, add, out):
    """out (T, N) = x (T, K) @ w.T + bias, added to out where `add` is 1; packed and bias (0: none): addresses."""
    num_tokens, num_columns = x.shape
    num_rows = out.shape[1]
    padded = -(-num_tokens // MAX_TOKENS) * MAX_TOKENS
    permuted = np.empty((padded, num_columns), np.float32)
    permuted[num_tokens:] = 0  # the rows that round T up to 1, 2, 4 or 8
    _permute(x.ctypes.data, num_tokens * num_columns, permuted.ctypes.data)
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3], a[4] = packed, group_size, num_columns, num_rows, num_tokens
    a[5], a[7], a[8] = permuted.ctypes.data, add, out.ctypes.data
    a[6] = bias
    units = -(-num_rows // FRAGMENT)
    unit_bytes = FRAGMENT * (num_columns // 2 + num_columns // group_size * SCALE_BYTES)
    per_chunk = max(1, min(units // (CHUNKS_PER_THREAD * num_threads_of(pool)), MAX_CHUNK_BYTES // unit_bytes))
    a[9] = per_chunk
    run_job(pool, function, a.ctypes.data, -(-units // per_chunk))
    memory.keep_alive(permuted)
    memory.keep_alive(a)
