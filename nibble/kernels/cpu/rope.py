"""Rotary position embedding (Su et al., "RoFormer", 2021), halves paired as in Hugging Face models."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import carray

from nibble.kernels.cpu import memory
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import VECTOR_BYTES

CHUNK_TOKENS = 32
NUM_ARGUMENTS = 7


def rope_table(
    inverse_frequencies: list[float], num_positions: int, attention_factor: float
) -> npt.NDArray[np.float32]:
    """cos and sin of all positions, (num_positions, 2, D / 2); angles in float64."""
    angles = np.arange(num_positions, dtype=np.float64)[:, None] * np.array(inverse_frequencies, np.float64)
    return (np.stack((np.cos(angles), np.sin(angles)), axis=1) * attention_factor).astype(np.float32)


@inline_jit
def _token(heads, num_heads, half_bytes, cos_sin):
    """Rotate num_heads heads that lie one after the other."""
    for _ in range(num_heads):
        for place in range(0, half_bytes, VECTOR_BYTES):
            cos, sin = memory.load(cos_sin + place), memory.load(cos_sin + half_bytes + place)
            first, second = memory.load(heads + place), memory.load(heads + half_bytes + place)
            memory.store(heads + place, first * cos - second * sin)
            memory.store(heads + half_bytes + place, second * cos + first * sin)
        heads += 2 * half_bytes


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    qkv, row_bytes, positions, table, rotated_heads, half_bytes, num_tokens = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    for t in range(chunk * CHUNK_TOKENS, min((chunk + 1) * CHUNK_TOKENS, num_tokens)):
        position = memory.int32_at(positions + t * 4)
        _token(qkv + t * row_bytes, rotated_heads, half_bytes, table + position * 2 * half_bytes)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def rope(pool, function, qkv, positions, table, num_kv_heads, head_dim):
    """Rotate q and k heads of qkv (T, (heads + 2 kv heads) * D) in place; table is an address."""
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = qkv.ctypes.data, qkv.shape[1] * 4, positions.ctypes.data, table
    a[4], a[5], a[6] = qkv.shape[1] // head_dim - num_kv_heads, head_dim // 2 * 4, qkv.shape[0]
    run_job(pool, function, a.ctypes.data, -(-qkv.shape[0] // CHUNK_TOKENS))
    memory.keep_alive(a)
