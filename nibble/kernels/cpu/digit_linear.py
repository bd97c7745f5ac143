"""x @ w.T in DECODE mode where the CPU has AVX512-VNNI: integer products, so that few instructions serve many tokens.

x is split into three int8 digits (`digits.py`), whose products with the integers of w are summed exactly over 32
columns of 16 rows at a time (`digit_tiles.py`); scales, minima and units meet these sums in fp32, in the order of K.
A tile of w is unpacked once for all tokens and each token's arithmetic is the same alone or among others, so results
are batch-invariant bit for bit. Rounding x to digits costs 2^-23 of its block's largest magnitude per product at most;
the rest is fp32's rounding of K / 32 sums.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import digit_tiles, digits, memory, simd
from nibble.kernels.cpu.digit_tiles import ROWS
from nibble.kernels.cpu.digits import BLOCK, DIGITS_BYTES, FACTORS_BYTES
from nibble.kernels.cpu.int4_fragment import SCALE_BYTES
from nibble.kernels.cpu.int4_panel import FRAGMENT_BYTES, ROW_FRAGMENTS
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.store_rows import store_rows
from nibble.kernels.cpu.thread_pool import num_threads_of, run_job
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES
from nibble.kernels.layout import FRAGMENT, TILE_COLUMNS, TILE_ROWS

NUM_ARGUMENTS = 12
MAX_TOKENS = 64  # of one pass over w, whose running sums stay in the L1 cache
PREFETCH_BYTES = 4096  # how far ahead of its arithmetic a thread asks for weights
# Few and long chunks: each begins with cache misses that no prefetching saw coming. But more than one per thread: where
# the system stops one for a while, the others take what is left.
CHUNKS_PER_THREAD = 2
MAX_CHUNK_BYTES = 1 << 19


@inline_jit
def _aligned(buffer):
    return -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES


@inline_jit
def _clear(totals, count):
    zero = simd.broadcast(np.float32(0))
    for t in range(count):
        memory.store(totals + t * VECTOR_BYTES, zero)


@inline_jit
def _add_tile(num_tokens, weights, scales, x, factors, totals):
    """totals (a vector of 16 rows for each token) += 16 rows and 32 columns of w times x."""
    for _ in range(num_tokens // 4):
        digit_tiles.add_products(4, weights, scales, x, factors, totals)
        x, factors, totals = x + 4 * DIGITS_BYTES, factors + 4 * FACTORS_BYTES, totals + 4 * VECTOR_BYTES
    if num_tokens & 2:
        digit_tiles.add_products(2, weights, scales, x, factors, totals)
        x, factors, totals = x + 2 * DIGITS_BYTES, factors + 2 * FACTORS_BYTES, totals + 2 * VECTOR_BYTES
    if num_tokens & 1:
        digit_tiles.add_products(1, weights, scales, x, factors, totals)


@inline_jit
def _int4_block(num_tokens, words, scales, x, factors, totals):
    for line in range(0, 2 * FRAGMENT_BYTES, VECTOR_BYTES):
        memory.prefetch(words + PREFETCH_BYTES + line)
    _add_tile(num_tokens, digit_tiles.load_int4(words), digit_tiles.int4_scales(scales), x, factors, totals)


@inline_jit
def _int4_row_tile(num_tokens, tile, first, last, num_columns, group_size, x, factors, totals):
    """totals = row fragments first..last of a row tile times x."""
    _clear(totals, (last - first) * num_tokens)
    for column in range(0, num_columns, TILE_COLUMNS):
        width = min(TILE_COLUMNS, num_columns - column)
        fragment_bytes = width // FRAGMENT * FRAGMENT_BYTES
        scales = tile + ROW_FRAGMENTS * fragment_bytes
        for r in range(first, last):
            for c in range(0, width, BLOCK):
                _int4_block(
                    num_tokens,
                    tile + r * fragment_bytes + c // FRAGMENT * FRAGMENT_BYTES,
                    scales + (c // group_size * TILE_ROWS + r * FRAGMENT) * SCALE_BYTES,
                    x + (column + c) // BLOCK * num_tokens * DIGITS_BYTES,
                    factors + (column + c) // BLOCK * num_tokens * FACTORS_BYTES,
                    totals + (r - first) * num_tokens * VECTOR_BYTES,
                )
        tile = scales + width // group_size * TILE_ROWS * SCALE_BYTES


@inline_jit
def _store(num_tokens, totals, row, num_rows, bias, add, out):
    """16 rows of w from `row` on of all tokens."""
    for t in range(num_tokens):
        store_rows(memory.load(totals + t * VECTOR_BYTES), row, num_rows, bias, add, out + t * num_rows * 4)


@inline_jit
def _int4_chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    packed, group_size, num_columns, num_rows, num_tokens = a[0], a[1], a[2], a[3], a[4]
    buffer = np.empty((ROW_FRAGMENTS * num_tokens + 1) * VECTOR_BYTES, np.uint8)
    totals = _aligned(buffer)
    row_tile_bytes = TILE_ROWS * (num_columns // 2 + num_columns // group_size * SCALE_BYTES)
    unit = chunk * a[9]
    stop = min(unit + a[9], -(-num_rows // FRAGMENT))
    while unit < stop:
        row_tile, first = unit // ROW_FRAGMENTS, unit % ROW_FRAGMENTS
        last = min(ROW_FRAGMENTS, first + stop - unit)
        tile = packed + row_tile * row_tile_bytes
        _int4_row_tile(num_tokens, tile, first, last, num_columns, group_size, a[5], a[11], totals)
        for r in range(last - first):
            row_totals = totals + r * num_tokens * VECTOR_BYTES
            _store(num_tokens, row_totals, (unit + r) * FRAGMENT, num_rows, a[6], a[7], a[8])
        unit += last - first
    memory.keep_alive(buffer)


@inline_jit
def _int8_scales(count, scales, num_groups, out):
    """out fp32 (num_groups, 16) = the scales of `count` <= 16 rows."""
    group = 0
    if num_groups >= LANES:
        while group < num_groups:
            group = min(group, num_groups - LANES)  # no read past the end of the last row
            digit_tiles.transpose_scales(count, scales + group * 2, num_groups * 2, out + group * VECTOR_BYTES)
            group += LANES
    for g in range(group, num_groups):
        digit_tiles.collect_scales(count, scales + g * 2, num_groups * 2, out + g * VECTOR_BYTES)


@inline_jit
def _int8_rows(num_tokens, row, count, a, totals, row_scales):
    """totals = `count` <= 16 rows from `row` on times x."""
    group_size, num_columns, x, factors = a[1], a[2], a[5], a[11]
    values = a[0] + row * num_columns
    num_groups = num_columns // group_size
    _int8_scales(count, a[10] + row * num_groups * 2, num_groups, row_scales)
    _clear(totals, num_tokens)
    for column in range(0, num_columns, BLOCK):
        for line in range(0, ROWS * BLOCK, VECTOR_BYTES):
            memory.prefetch(values + ROWS * column + PREFETCH_BYTES + line)
        weights = digit_tiles.load_int8(count, values + column, num_columns)
        scale = memory.load(row_scales + column // group_size * VECTOR_BYTES)
        _add_tile(num_tokens, weights, (scale,), x, factors, totals)
        x += num_tokens * DIGITS_BYTES
        factors += num_tokens * FACTORS_BYTES


@inline_jit
def _int8_chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    group_size, num_columns, num_rows, num_tokens = a[1], a[2], a[3], a[4]
    buffer = np.empty((num_tokens + num_columns // group_size + 1) * VECTOR_BYTES, np.uint8)
    totals = _aligned(buffer)
    start = chunk * a[9] * ROWS
    for row in range(start, min(start + a[9] * ROWS, num_rows), ROWS):
        _int8_rows(num_tokens, row, min(ROWS, num_rows - row), a, totals, totals + num_tokens * VECTOR_BYTES)
        _store(num_tokens, totals, row, num_rows, a[6], a[7], a[8])
    memory.keep_alive(buffer)


@ChunkFunction
def int4_chunk_function(arguments, chunk):
    _int4_chunk(arguments, chunk)


@ChunkFunction
def int8_chunk_function(arguments, chunk):
    _int8_chunk(arguments, chunk)


@kernel_jit
def digit_linear(pool, function, x, weight, scales, group_size, bias, add, out):
    """As `int4_gemv` (scales 0: INT4 tiles, packed in `weight`) and `int8_gemv`."""
    num_columns, num_rows = x.shape[1], out.shape[1]
    is_int4 = scales == 0
    num_blocks = min(len(x), MAX_TOKENS) * num_columns // BLOCK
    buffer = np.empty(num_blocks * DIGITS_BYTES + VECTOR_BYTES, np.uint8)
    factors = np.empty(num_blocks * FACTORS_BYTES, np.uint8)
    units = -(-num_rows // ROWS)
    unit_bytes = ROWS * (num_columns // 2 + num_columns // group_size * SCALE_BYTES if is_int4 else num_columns)
    per_chunk = max(1, min(units // (CHUNKS_PER_THREAD * num_threads_of(pool)), MAX_CHUNK_BYTES // unit_bytes))
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = weight, group_size, num_columns, num_rows
    a[5], a[6], a[7], a[9], a[10], a[11] = _aligned(buffer), bias, add, per_chunk, scales, factors.ctypes.data
    for token in range(0, len(x), MAX_TOKENS):
        a[4] = min(MAX_TOKENS, len(x) - token)
        a[8] = out.ctypes.data + token * num_rows * 4
        digits.split(x.ctypes.data + token * num_columns * 4, a[4], num_columns, is_int4, a[5], a[11])
        run_job(pool, function, a.ctypes.data, -(-units // per_chunk))
    memory.keep_alive(buffer)
    memory.keep_alive(factors)
    memory.keep_alive(a)
