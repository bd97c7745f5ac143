"""x @ w.T for weights in fp16, in floats and in both modes: it serves comparisons, not speed.

As `int8_linear.py`, without scales: lanes are columns, up to 8 tokens share a row's weights, and a row of x is summed
in the same order whatever the number of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.int8_linear import CHUNK_ROWS, MAX_TOKENS, PREFETCH_BYTES, padded_tokens, store_sums
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import F16, F32X16, LANES, VECTOR_BYTES, call_fma, load_at, unpack_tuple

NUM_ARGUMENTS = 8
BYTES = 2  # of a weight


@intrinsic
def accumulate(typingctx: Any, sums: Any, values: Any, x: Any, x_stride: Any) -> Any:
    """sums (of each token) + 16 columns of the row at `values` times 16 columns of the tokens at `x`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        accumulators = unpack_tuple(builder, args[0], len(sums))
        _, values, x_address, x_stride = args
        weights = builder.fpext(load_at(builder, values, ir.VectorType(F16, LANES)), F32X16)
        for token in range(len(sums)):
            x_vector = load_at(builder, x_address, F32X16, align=4)
            accumulators[token] = call_fma(builder, weights, x_vector, accumulators[token])
            x_address = builder.add(x_address, x_stride)
        return context.make_tuple(builder, sums, accumulators)

    return sums(sums, types.intp, types.intp, types.intp), codegen


@inline_jit
def _row(sums, values, num_columns, x, out):
    """out (tokens,) at an address: a row of w times len(sums) rows of x."""
    for column in range(0, num_columns, LANES):
        memory.prefetch(values + column * BYTES + PREFETCH_BYTES)
        sums = accumulate(sums, values + column * BYTES, x + column * 4, num_columns * 4)
    memory.store(out, simd.sum_all(sums))


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    values, num_columns, num_rows, num_tokens, x, bias, add, out = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    sums = np.empty(LANES, np.float32)
    for token in range(0, num_tokens, MAX_TOKENS):
        tokens = min(MAX_TOKENS, num_tokens - token)
        x_token = x + token * num_columns * 4
        for row in range(chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, num_rows)):
            row_values = values + row * num_columns * BYTES
            if tokens == 1:
                _row(simd.zeros(1), row_values, num_columns, x_token, sums.ctypes.data)
            elif tokens == 2:
                _row(simd.zeros(2), row_values, num_columns, x_token, sums.ctypes.data)
            elif tokens <= 4:
                _row(simd.zeros(4), row_values, num_columns, x_token, sums.ctypes.data)
            else:
                _row(simd.zeros(8), row_values, num_columns, x_token, sums.ctypes.data)
            store_sums(sums, row, 1, token, tokens, bias, add, out, num_rows)


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@kernel_jit
def float16_gemv(pool, function, x, values, bias, add, out):
    """out (T, N) = x (T, K) @ w.T + bias, added to out where `add`; values and bias (0: none) are addresses."""
    buffer = padded_tokens(x)
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3] = values, x.shape[1], out.shape[1], x.shape[0]
    a[4] = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    a[5], a[6], a[7] = bias, add, out.ctypes.data
    run_job(pool, function, a.ctypes.data, -(-out.shape[1] // CHUNK_ROWS))
    memory.keep_alive(buffer)
    memory.keep_alive(a)
