"""x @ w.T in PREFILL mode where the CPU has AMX: bf16 products, fp32 sums. Compute-bound, so the tiles decide.

A chunk of the job is 64 rows of w: they are unpacked to bf16 tiles once (`int4_panel.py`, `int8_panel.py`), which then
stay in the L2 cache while all tokens pass, 32 at a time. Sums along K are taken in the order of K for every token,
so that a row's result does not depend on how the prompt was cut. Rounding x and w to bf16 costs a relative
2^-9 per product, at random: about 0.2 % of the root of the sum of their squares.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import amx, memory, simd
from nibble.kernels.cpu.int4_fragment import Q_PER_ONE, SCALE_BYTES
from nibble.kernels.cpu.int4_panel import unpack_row_tile
from nibble.kernels.cpu.int8_panel import unpack_rows
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.store_rows import store_rows
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES
from nibble.kernels.layout import TILE_ROWS

TOKENS = 2 * amx.TILE  # of one step of 2 x 2 tiles, and rows of w
NUM_ARGUMENTS = 13
SUMS_BYTES = TOKENS * 4  # a row of the 2 x 2 sums


@inline_jit
def _multiply(panel, row, a):
    """out of all tokens for the 64 rows of w (from `row` on) in the panel."""
    num_columns, num_rows, num_tokens, x, x_stride = a[2], a[3], a[4], a[5], a[6]
    bias, add, out = a[7], a[8], a[9]
    buffer = np.empty(TOKENS * SUMS_BYTES + VECTOR_BYTES, np.uint8)
    sums = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    amx.configure(a[10])
    for token in range(0, num_tokens, TOKENS):
        for pair in range(0, TILE_ROWS, TOKENS):
            b = panel + pair // amx.TILE * amx.TILE_BYTES
            rows = x + token * x_stride
            amx.zero_sums()
            for _ in range(0, num_columns, amx.TILE_DEPTH):
                amx.multiply_add(rows, x_stride, b, b + amx.TILE_BYTES)
                rows += amx.TILE_DEPTH * 2
                b += TILE_ROWS // amx.TILE * amx.TILE_BYTES
            amx.store_sums(sums, SUMS_BYTES)
            for t in range(min(TOKENS, num_tokens - token)):
                place = out + (token + t) * num_rows * 4
                values = memory.load(sums + t * SUMS_BYTES)
                store_rows(values, row + pair, num_rows, bias, add, place)
                values = memory.load(sums + t * SUMS_BYTES + VECTOR_BYTES)
                store_rows(values, row + pair + LANES, num_rows, bias, add, place)
    amx.release()
    memory.keep_alive(buffer)


@inline_jit
def _int4_chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    packed, group_size, num_columns = a[0], a[1], a[2]
    row_tile_bytes = TILE_ROWS * (num_columns // 2 + num_columns // group_size * SCALE_BYTES)
    panel = np.empty(TILE_ROWS * num_columns * 2 + VECTOR_BYTES, np.uint8)
    aligned = -(-panel.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    unpack_row_tile(packed + chunk * row_tile_bytes, num_columns, group_size, aligned)
    _multiply(aligned, chunk * TILE_ROWS, a)
    memory.keep_alive(panel)


@inline_jit
def _int8_chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    values, group_size, num_columns, num_rows, scales = a[0], a[1], a[2], a[3], a[11]
    panel = np.empty(TILE_ROWS * num_columns * 2 + VECTOR_BYTES, np.uint8)
    aligned = -(-panel.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    row = chunk * TILE_ROWS
    row_values, row_scales = values + row * num_columns, scales + row * (num_columns // group_size) * 2
    unpack_rows(row_values, row_scales, num_rows - row, num_columns, group_size, aligned)
    _multiply(aligned, row, a)
    memory.keep_alive(panel)


@ChunkFunction
def int4_chunk_function(arguments, chunk):
    _int4_chunk(arguments, chunk)


@ChunkFunction
def int8_chunk_function(arguments, chunk):
    _int8_chunk(arguments, chunk)


@inline_jit
def _round(x, num_columns, num_tokens, factor, stride, out):
    """out bf16 = x times factor, rows stride bytes apart; addresses."""
    factors = simd.broadcast(np.float32(factor))
    for t in range(num_tokens):
        for column in range(0, num_columns, LANES):
            amx.store_bfloat16(out + t * stride + column * 2, memory.load(x + column * 4) * factors)
        x += num_columns * 4


@kernel_jit
def bf16_linear(pool, function, config, x, weight, scales, group_size, bias, add, out):
    """As `int4_gemv` (scales 0: INT4 tiles, packed in `weight`) and `int8_gemv`; config is `amx.tile_config`'s."""
    num_tokens, num_columns = x.shape
    # An odd number of cache lines apart, so that a tile's 16 rows spread over the cache.
    stride = num_columns * 2 + (VECTOR_BYTES if num_columns * 2 % (2 * VECTOR_BYTES) == 0 else 0)
    rows = -(-num_tokens // TOKENS) * TOKENS
    buffer = np.empty(rows * stride + VECTOR_BYTES, np.uint8)
    rounded = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    for place in range(rounded + num_tokens * stride, rounded + rows * stride, VECTOR_BYTES):
        memory.store(place, simd.broadcast(np.float32(0)))
    _round(x.ctypes.data, num_columns, num_tokens, 1 if scales else Q_PER_ONE, stride, rounded)
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3], a[4] = weight, group_size, num_columns, out.shape[1], num_tokens
    a[5], a[6], a[7], a[8], a[9] = rounded, stride, bias, add, out.ctypes.data
    a[10], a[11] = config.ctypes.data, scales
    run_job(pool, function, a.ctypes.data, -(-out.shape[1] // TILE_ROWS))
    memory.keep_alive(buffer)
    memory.keep_alive(a)
