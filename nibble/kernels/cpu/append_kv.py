"""Quantise this step's keys and values and write them to their slots; the formula is in layout.py."""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES
from nibble.kernels.layout import BLOCK_SIZE

CHUNK_TOKENS = 32
NUM_ARGUMENTS = 11
FP16_MAX = np.float32(65504)
INT8_STEPS = np.float32(255)
PARAMETER_BYTES = 4  # (scale, zero) fp16


@inline_jit
def _write_int8(x, head_dim, values, parameters):
    """One token of k or v, at address x."""
    low = high = memory.load(x)
    for place in range(VECTOR_BYTES, head_dim * 4, VECTOR_BYTES):
        low, high = simd.minimum(low, memory.load(x + place)), simd.maximum(high, memory.load(x + place))
    smallest, largest = simd.min_of(low), simd.max_of(high)
    middle = np.float32(0.5) * smallest + np.float32(0.5) * largest  # halved first: the sum may overflow
    scale = memory.store_float16_scalar(parameters, min((largest - smallest) / INT8_STEPS, FP16_MAX))
    zero = memory.store_float16_scalar(parameters + 2, max(-FP16_MAX, min(middle, FP16_MAX)))
    lowest, highest = simd.broadcast(np.float32(-128)), simd.broadcast(np.float32(127))
    for i in range(0, head_dim, LANES):
        q = simd.broadcast(np.float32(0))
        if scale != 0:
            q = simd.rint((memory.load(x + i * 4) - simd.broadcast(zero)) / simd.broadcast(scale))
        memory.store_int8(values + i, simd.minimum(simd.maximum(q, lowest), highest))


@inline_jit
def _write_channels(x, head_dim, values, parameters):
    """One token of k or v; parameters: its scales, then its zeros. Returns how many values saturate."""
    lowest, highest = simd.broadcast(np.float32(-128)), simd.broadcast(np.float32(127))
    num_saturated = 0
    for i in range(0, head_dim, LANES):
        scale, zero = memory.load(parameters + i * 4), memory.load(parameters + (head_dim + i) * 4)
        q = simd.rint((memory.load(x + i * 4) - zero) / scale)
        num_saturated += simd.count_outside(q, lowest, simd.broadcast(np.float32(128)))
        memory.store_int8(values + i, simd.minimum(simd.maximum(q, lowest), highest))
    return num_saturated


@inline_jit
def _write_float16(x, head_dim, values):
    lowest, highest = simd.broadcast(-FP16_MAX), simd.broadcast(FP16_MAX)
    for i in range(0, head_dim, LANES):
        clipped = simd.minimum(simd.maximum(memory.load(x + i * 4), lowest), highest)
        memory.store_float16(values + i * 2, clipped)


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    kv, row_bytes, slots, cache, num_kv_heads, head_dim, head_block_bytes, is_float16, num_tokens, channels = (
        a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
    )  # fmt: skip
    num_saturated = 0
    for t in range(chunk * CHUNK_TOKENS, min((chunk + 1) * CHUNK_TOKENS, num_tokens)):
        slot = memory.int64_at(slots + t * 8)
        if slot < 0:
            continue
        block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        for which in range(2):  # k, v
            for head in range(num_kv_heads):
                x = kv + t * row_bytes + (which * num_kv_heads + head) * head_dim * 4
                head_block = cache + (block * num_kv_heads + head) * head_block_bytes
                token = which * BLOCK_SIZE + offset
                if is_float16:
                    _write_float16(x, head_dim, head_block + token * head_dim * 2)
                elif channels:
                    parameters = channels + (head * 2 + which) * 2 * head_dim * 4
                    num_saturated += _write_channels(x, head_dim, head_block + token * head_dim, parameters)
                else:
                    parameters = head_block + 2 * BLOCK_SIZE * head_dim + token * PARAMETER_BYTES
                    _write_int8(x, head_dim, head_block + token * head_dim, parameters)
    carray(memory.address_as_void_pointer(a[10]), chunk + 1, np.int64)[chunk] = num_saturated


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def append_kv(pool, function, qkv, slots, kv_cache, num_kv_heads, head_dim, is_float16, channels):
    """kv_cache uint8 (num_blocks, num_kv_heads, bytes) is written in place; channels: their parameters' address, or 0.

    Returns how many values saturated, of channels' alone.
    """
    a = np.empty(NUM_ARGUMENTS, np.int64)
    num_chunks = -(-qkv.shape[0] // CHUNK_TOKENS)
    num_saturated = np.zeros(num_chunks, np.int64)
    kv_columns = 2 * num_kv_heads * head_dim
    a[0], a[1] = qkv.ctypes.data + (qkv.shape[1] - kv_columns) * 4, qkv.shape[1] * 4
    a[2], a[3], a[4], a[5] = slots.ctypes.data, kv_cache.ctypes.data, num_kv_heads, head_dim
    a[6], a[7], a[8], a[9], a[10] = kv_cache.shape[2], is_float16, qkv.shape[0], channels, num_saturated.ctypes.data
    run_job(pool, function, a.ctypes.data, num_chunks)
    memory.keep_alive(a)
    return num_saturated.sum()
