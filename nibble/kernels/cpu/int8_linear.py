"""x @ w.T for INT8 rows in DECODE mode, in floats: for CPUs without AVX512-VNNI, and groups that 32 does not divide.

Lanes are columns. Up to 8 tokens share a row's dequantised weights; with few tokens several rows are computed at once,
so that additions do not wait for each other. A row of x is summed in the same order whatever the number of tokens, so
results are batch-invariant bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray
from numba.core import types
from numba.extending import intrinsic

from nibble.kernels.cpu import memory, simd
from nibble.kernels.cpu.jit import ChunkFunction, inline_jit, kernel_jit
from nibble.kernels.cpu.thread_pool import run_job
from nibble.kernels.cpu.vector_ir import (
    F16,
    F32,
    F32X16,
    I8,
    I32X16,
    LANES,
    VECTOR_BYTES,
    call_fma,
    load_at,
    splat,
    unpack_tuple,
    vector,
)

MAX_TOKENS = 8
CHUNK_ROWS = 512
PREFETCH_BYTES = 8192  # how far ahead of its arithmetic a thread asks for values
NUM_ARGUMENTS = 10


@intrinsic
def load_scales(typingctx: Any, rows: Any, address: Any, stride: Any) -> Any:
    """One float16 of each of `rows` (a literal) rows, stride bytes apart, each in all lanes of a vector."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    result = types.UniTuple(vector, rows.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, address, stride = args
        scales = []
        for _ in range(rows.literal_value):
            scales.append(splat(builder, builder.fpext(load_at(builder, address, F16), F32)))
            address = builder.add(address, stride)
        return context.make_tuple(builder, result, scales)

    return result(rows, types.intp, types.intp), codegen


@intrinsic
def accumulate(typingctx: Any, sums: Any, scales: Any, values: Any, stride: Any, x: Any, x_stride: Any) -> Any:
    """sums (of each row, each token) + 16 columns of the rows at `values` times 16 columns of the tokens at `x`."""
    num_rows = len(scales)
    tokens = len(sums) // num_rows

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        accumulators = unpack_tuple(builder, args[0], len(sums))
        scale_vectors = unpack_tuple(builder, args[1], num_rows)
        _, _, row_address, stride, x_address, x_stride = args
        for row in range(num_rows):
            integers = builder.sext(load_at(builder, row_address, ir.VectorType(I8, LANES)), I32X16)
            weights = builder.fmul(builder.sitofp(integers, F32X16), scale_vectors[row])
            x_token = x_address
            for token in range(tokens):
                place = row * tokens + token
                x_vector = load_at(builder, x_token, F32X16, align=4)
                accumulators[place] = call_fma(builder, weights, x_vector, accumulators[place])
                x_token = builder.add(x_token, x_stride)
            row_address = builder.add(row_address, stride)
        return context.make_tuple(builder, sums, accumulators)

    return sums(sums, scales, types.intp, types.intp, types.intp, types.intp), codegen


@inline_jit
def _rows(sums, num_rows, values, scales, num_columns, group_size, x, out):
    """out (num_rows, tokens) at an address: num_rows (a literal) rows of w times len(sums) / num_rows rows of x."""
    num_groups = num_columns // group_size
    for group in range(num_groups):
        scale = load_scales(num_rows, scales + group * 2, num_groups * 2)
        for column in range(group * group_size, (group + 1) * group_size, LANES):
            memory.prefetch(values + num_rows * column + PREFETCH_BYTES)
            sums = accumulate(sums, scale, values + column, num_columns, x + column * 4, num_columns * 4)
    memory.store(out, simd.sum_all(sums))


@inline_jit
def _block(tokens, num_rows, values, scales, num_columns, group_size, x, out):
    """As `_rows`, for any number of tokens up to 8; the tokens of a row in out are 1, 2, 4 or 8 floats."""
    if tokens == 1 and num_rows == 4:
        _rows(simd.zeros(4), 4, values, scales, num_columns, group_size, x, out)
    elif tokens == 1:
        _rows(simd.zeros(1), 1, values, scales, num_columns, group_size, x, out)
    elif tokens == 2 and num_rows == 4:
        _rows(simd.zeros(8), 4, values, scales, num_columns, group_size, x, out)
    elif tokens == 2:
        _rows(simd.zeros(2), 1, values, scales, num_columns, group_size, x, out)
    elif tokens <= 4:
        _rows(simd.zeros(4), 1, values, scales, num_columns, group_size, x, out)
    else:
        _rows(simd.zeros(8), 1, values, scales, num_columns, group_size, x, out)


@inline_jit
def store_sums(sums, first_row, rows, token, tokens, bias, add, out, num_rows):
    """out[token : token + tokens, first_row : first_row + rows] from sums (rows, tokens rounded up)."""
    width = 1 if tokens == 1 else 2 if tokens == 2 else 4 if tokens <= 4 else MAX_TOKENS
    for r in range(rows):
        for t in range(tokens):
            value = sums[r * width + t]
            place = out + ((token + t) * num_rows + first_row + r) * 4
            if bias:
                value += memory.float32_at(bias + (first_row + r) * 4)
            if add:
                value += memory.float32_at(place)
            memory.store_float32(place, value)


@inline_jit
def _chunk(arguments, chunk):
    a = carray(memory.address_as_void_pointer(arguments), NUM_ARGUMENTS, np.int64)
    values, scales, group_size, num_columns, num_rows = a[0], a[1], a[2], a[3], a[4]
    num_tokens, x, bias, add, out = a[5], a[6], a[7], a[8], a[9]
    sums = np.empty(LANES, np.float32)
    start, stop = chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, num_rows)
    for token in range(0, num_tokens, MAX_TOKENS):
        tokens = min(MAX_TOKENS, num_tokens - token)
        row = start
        while row < stop:
            rows = 4 if tokens <= 2 and row + 4 <= stop else 1
            row_values = values + row * num_columns
            row_scales = scales + row * (num_columns // group_size) * 2
            x_token = x + token * num_columns * 4
            _block(tokens, rows, row_values, row_scales, num_columns, group_size, x_token, sums.ctypes.data)
            store_sums(sums, row, rows, token, tokens, bias, add, out, num_rows)
            row += rows


@ChunkFunction
def chunk_function(arguments, chunk):
    _chunk(arguments, chunk)


@inline_jit
def padded_tokens(x):
    """A buffer with x from its first aligned place on, so that no load crosses a cache line, and with room for as many
    tokens as are computed: 3 are as 4, 5 as 8."""
    num_tokens, num_columns = x.shape
    row_bytes = num_columns * 4
    buffer = np.zeros(-(-num_tokens // MAX_TOKENS) * MAX_TOKENS * row_bytes + VECTOR_BYTES, np.uint8)
    aligned = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    for place in range(0, num_tokens * row_bytes, VECTOR_BYTES):
        memory.store(aligned + place, memory.load(x.ctypes.data + place))
    return buffer


@kernel_jit
def int8_gemv(pool, function, x, values, scales, group_size, bias, add, out):
    """out (T, N) = x (T, K) @ w.T + bias, added to out where `add`; values, scales and bias (0: none) are addresses."""
    num_tokens, num_columns = x.shape
    num_rows = out.shape[1]
    buffer = padded_tokens(x)
    aligned = -(-buffer.ctypes.data // VECTOR_BYTES) * VECTOR_BYTES
    a = np.empty(NUM_ARGUMENTS, np.int64)
    a[0], a[1], a[2], a[3], a[4] = values, scales, group_size, num_columns, num_rows
    a[5], a[6], a[8], a[9] = num_tokens, aligned, add, out.ctypes.data
    a[7] = bias
    run_job(pool, function, a.ctypes.data, -(-num_rows // CHUNK_ROWS))
    memory.keep_alive(buffer)
    memory.keep_alive(a)
