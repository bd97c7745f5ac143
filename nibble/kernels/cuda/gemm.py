"""cuBLASLt for what our kernels leave to it: products of many tokens with a matrix dequantised to fp16 (PREFILL mode).

A product reads its matrix in slabs of rows, so that the fp16 copy of a large one needs little of the workspace and is
still in the L2 cache when it is read. Additions of bias and of a gated activation are kernels of ours.
"""

from __future__ import annotations

from collections.abc import Callable

import cupy
import numpy as np

from nibble.kernels.cuda.add_bias import add_bias
from nibble.kernels.cuda.cublas_lt import FLOAT16, FLOAT32, product
from nibble.kernels.cuda.device import Device
from nibble.kernels.cuda.silu_and_mul import silu_and_mul

SLAB_BYTES = 64 << 20
SLAB_ROWS = 256  # a slab is a multiple of its tiles
GATED_TOKENS = 2048  # more than cuBLASLt needs to be at its best

_TYPES = {np.dtype(np.float16): FLOAT16, np.dtype(np.float32): FLOAT32}

# (first row, number of rows) -> those rows of the matrix, fp16 (rows, K)
Rows = Callable[[int, int], cupy.ndarray]


def linear(
    device: Device,
    x: cupy.ndarray,
    rows: Rows,
    num_rows: int,
    bias: cupy.ndarray | None,
    residual: cupy.ndarray | None,
    gated: bool,
) -> cupy.ndarray:
    """x (T, K) fp16 @ w.T (num_rows, K), then what `Kernels.int4_linear` says of bias, residual and gated."""
    num_tokens, num_columns = x.shape
    if gated:
        return _gated(device, x, rows, num_rows, bias)
    out = residual if residual is not None else device.empty((num_tokens, num_rows), np.float16)
    slab = max(SLAB_BYTES // (2 * num_columns) // SLAB_ROWS, 1) * SLAB_ROWS
    for first in range(0, num_rows, slab):
        with device.arena.scope():
            multiply(x, rows(first, min(slab, num_rows - first)), out, first, residual is not None)
    if bias is not None:
        add_bias(device, out, bias)
    return out


def _gated(device: Device, x: cupy.ndarray, rows: Rows, num_rows: int, bias: cupy.ndarray | None) -> cupy.ndarray:
    """Some tokens at a time: gate_up is large, and the workspace is not."""
    out = device.empty((x.shape[0], num_rows // 2), np.float16)
    for start in range(0, x.shape[0], GATED_TOKENS):
        with device.arena.scope():
            part = slice(start, min(start + GATED_TOKENS, x.shape[0]))
            result = silu_and_mul(device, linear(device, x[part], rows, num_rows, bias, None, False))
            out[part].data.copy_from_device_async(result.data, result.nbytes)
    return out


def multiply(x: cupy.ndarray, matrix: cupy.ndarray, out: cupy.ndarray, first: int, accumulate: bool) -> None:
    """out[:, first : first + rows] = or += x @ matrix.T."""
    num_tokens, num_columns = x.shape
    product(num_tokens, len(matrix), num_columns, out.shape[1], _TYPES[out.dtype]).run(
        matrix.data.ptr,
        x.data.ptr,
        out.data.ptr + first * out.itemsize,
        accumulate,
        cupy.cuda.get_current_stream().ptr,
    )
