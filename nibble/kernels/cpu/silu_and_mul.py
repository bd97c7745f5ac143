"""silu(gate) * up over interleaved gate and up columns (`layout.GATE_UP_INTERLEAVE`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import LANES, VECTOR_BYTES, shuffle, vector
from nibble.kernels.layout import GATE_UP_INTERLEAVE

CHUNK_TOKENS = 8
NUM_ARGUMENTS = 4


@intrinsic
def split_gate_up(typingctx: Any, first: Any, second: Any) -> Any:
    """(16 of gate, 16 of up) from two vectors of 8 of gate and 8 of up each."""
    result = types.UniTuple(vector, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        run = GATE_UP_INTERLEAVE
        lanes = [*range(run), *range(LANES, LANES + run)]
        gate = shuffle(builder, args[0], args[1], lanes)
        up = shuffle(builder, args[0], args[1], [lane + run for lane in lanes])
        return context.make_tuple(builder, result, [gate, up])

    return result(vector, vector), codegen


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    gate_up, out, size, num_tokens = a[0], a[1], a[2], a[3]
    zero, one = simd.broadcast(np.float32(0)), simd.broadcast(np.float32(1))
    start, stop = chunk * CHUNK_TOKENS, min((chunk + 1) * CHUNK_TOKENS, num_tokens)
    for place in range(start * size * 4, stop * size * 4, VECTOR_BYTES):
        first, second = memory.load(gate_up + 2 * place), memory.load(gate_up + 2 * place + VECTOR_BYTES)
        gate, up = split_gate_up(first, second)
        memory.store(out + place, gate / (one + simd.exp(zero - gate)) * up)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def silu_and_mul(pool, function, gate_up, out):
    """out (T, I) from gate_up (T, 2 I)."""
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = gate_up.ctypes.data, out.ctypes.data, out.shape[1], out.shape[0]
    run_job(pool, function, a.ctypes.data, -(-out.shape[0] // CHUNK_TOKENS))
    memory.keep_alive(a)
