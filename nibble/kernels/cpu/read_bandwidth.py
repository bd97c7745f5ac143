"""How fast this machine reads memory: the roof of decode."""

from __future__ import annotations

import time

import numpy as np
from numba import carray

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import VECTOR_BYTES

NUM_BYTES = 256 << 20  # larger than the caches of most machines
CHUNK_BYTES = 1 << 20
REPEATS = 3


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), 2, np.int64)
    start = a[0] + chunk * CHUNK_BYTES
    low = high = memory.load(start)
    for place in range(start, start + CHUNK_BYTES, 2 * VECTOR_BYTES):
        low = simd.maximum(low, memory.load(place))
        high = simd.maximum(high, memory.load(place + VECTOR_BYTES))
    memory.store_float32(a[1] + chunk * 4, simd.max_of(simd.maximum(low, high)))


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def _read(pool, function, data, largest):
    a = np.array((data.ctypes.data, largest.ctypes.data))
    run_job(pool, function, a.ctypes.data, len(largest))
    memory.keep_alive(a)


def read_bandwidth(pool: int) -> float:
    """Bytes per second, the best of a few runs over memory that no cache holds."""
    data = np.zeros(NUM_BYTES // 4, np.float32)
    data.fill(1)  # a page that was never written is no memory
    largest = np.empty(NUM_BYTES // CHUNK_BYTES, np.float32)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one compiles
        start = time.perf_counter()
        _read(pool, chunk_function.address, data, largest)
        seconds.append(time.perf_counter() - start)
    return NUM_BYTES / min(seconds)
