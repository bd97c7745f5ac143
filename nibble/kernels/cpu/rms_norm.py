"""Root-mean-square norm of each row."""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import VECTOR_BYTES

CHUNK_TOKENS = 32
NUM_ARGUMENTS = 6


@inline_jit
def norm_row(x, weight, size, eps, out):
    """`size` floats (a multiple of 16); out may be x. All addresses."""
    squares = simd.broadcast(np.float32(0))
    for place in range(0, size * 4, VECTOR_BYTES):
        values = memory.load(x + place)
        squares = simd.fma(values, values, squares)
    mean = simd.sum_of(squares) / np.float32(size)
    factor = simd.broadcast(np.float32(1) / np.sqrt(mean + eps))
    for place in range(0, size * 4, VECTOR_BYTES):
        memory.store(out + place, memory.load(x + place) * factor * memory.load(weight + place))


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    size = a[3]
    eps = memory.float32_at(arguments + 5 * 8)
    for t in range(chunk * CHUNK_TOKENS, min((chunk + 1) * CHUNK_TOKENS, a[4])):
        norm_row(a[0] + t * size * 4, a[1], size, eps, a[2] + t * size * 4)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def rms_norm(pool, function, x, weight, eps, out):
    """out (T, H) = x / sqrt(mean(x^2) + eps) * weight; weight is an address."""
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2] = x.ctypes.data, weight, out.ctypes.data
    a[3], a[4] = x.shape[1], x.shape[0]
    memory.store_float32(a.ctypes.data + 5 * 8, np.float32(eps))
    run_job(pool, function, a.ctypes.data, -(-x.shape[0] // CHUNK_TOKENS))
    memory.keep_alive(a)
