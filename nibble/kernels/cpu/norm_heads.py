"""Root-mean-square norm of each head of q and k, in place."""

from __future__ import annotations

import numpy as np
from numba import carray

from nibble.kernels.cpu import memory
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.rms_norm import norm_row
from nibble.kernels.cpu.thread_pool import run_job

CHUNK_TOKENS = 16
NUM_ARGUMENTS = 9


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    qkv, row_bytes, num_tokens, num_heads, num_kv_heads, head_dim = a[0], a[1], a[2], a[3], a[4], a[5]
    eps = memory.float32_at(arguments + 8 * 8)
    for t in range(chunk * CHUNK_TOKENS, min((chunk + 1) * CHUNK_TOKENS, num_tokens)):
        for head in range(num_heads + num_kv_heads):
            place = qkv + t * row_bytes + head * head_dim * 4
            norm_row(place, a[6] if head < num_heads else a[7], head_dim, eps, place)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def norm_heads(pool, function, qkv, q_weight, k_weight, eps, num_kv_heads, head_dim):
    """qkv (T, (heads + 2 kv heads) * D); weights are addresses."""
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = (
        qkv.ctypes.data,
        qkv.shape[1] * 4,
        qkv.shape[0],
        qkv.shape[1] // head_dim - 2 * num_kv_heads,
    )
    a[4], a[5], a[6], a[7] = num_kv_heads, head_dim, q_weight, k_weight
    memory.store_float32(a.ctypes.data + 8 * 8, np.float32(eps))
    run_job(pool, function, a.ctypes.data, -(-qkv.shape[0] // CHUNK_TOKENS))
    memory.keep_alive(a)
