"""Matrix products by cuBLASLt. CuPy has cuBLAS alone, where an algorithm cannot be chosen nor a product be captured.

The choice is the fastest of those that add up a result in one go, along K. On an H100 these all give the same bits, so
that a token's result depends neither on how many others there are nor on which algorithm is chosen for so many; those
that cut K for a few tokens are hardly faster.

Names, numbers and layouts of structures: cublasLt.h of CUDA 13 (unchanged since CUDA 11).
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import cache, lru_cache

from cuda.pathfinder import load_nvidia_dynamic_lib

from nibble.kernels.cuda.errors import DriverError

FLOAT32, FLOAT16 = 0, 2  # cudaDataType
_COMPUTE_32F = 68
_TRANSPOSE_A, _TRANSPOSED = 3, 1
# Of a preference
_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK, _MIN_ALIGNMENTS, _IMPLEMENTATION_MASK = 1, 3, (5, 6, 7, 8), 12
_NO_REDUCTION = 0
_TENSOR_CORES = ~1 & (1 << 64) - 1  # any implementation but one: multiplications and additions
_ALIGNMENT = 16  # bytes, of what is multiplied and of results
_ZERO, _ONE = c_float(0), c_float(1)


class _Choice(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t; the first member is an opaque cublasLtMatmulAlgo_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Product:
    """out = or += x @ matrix.T: x fp16 (tokens, columns), matrix fp16 (rows, columns), out (tokens, rows) with its rows
    `out_stride` elements apart; sums are float32. Raises DriverError."""

    def __init__(self, tokens: int, rows: int, columns: int, out_stride: int, out_type: int) -> None:
        # cuBLASLt is column-major: out.T = matrix @ x.T
        self._matrix = _layout(FLOAT16, columns, rows, columns)
        self._x = _layout(FLOAT16, columns, tokens, columns)
        self._out = _layout(out_type, rows, tokens, out_stride)
        self._choice, count = _Choice(), c_int()
        _check(
            _library().cublasLtMatmulAlgoGetHeuristic(
                *(_handle(), _operation(), self._matrix, self._x, self._out, self._out, _preference()),
                *(c_int(1), byref(self._choice), byref(count)),
            )
        )
        if count.value == 0:
            raise DriverError(f"cuBLASLt has no product of {tokens} x {columns} and {rows} x {columns}")

    def __del__(self) -> None:
        for layout in (self._matrix, self._x, self._out):
            _library().cublasLtMatrixLayoutDestroy(layout)

    def run(self, matrix: int, x: int, out: int, accumulates: bool, stream: int) -> None:
        """Addresses on the device, multiples of 16."""
        beta = byref(_ONE if accumulates else _ZERO)
        _check(
            _library().cublasLtMatmul(
                *(_handle(), _operation(), byref(_ONE), c_void_p(matrix), self._matrix, c_void_p(x), self._x, beta),
                *(c_void_p(out), self._out, c_void_p(out), self._out, byref(self._choice), None, c_size_t(0)),
                c_void_p(stream),
            )
        )


@lru_cache(maxsize=1024)
def product(tokens: int, rows: int, columns: int, out_stride: int, out_type: int) -> Product:
    return Product(tokens, rows, columns, out_stride, out_type)


def _check(status: int) -> None:
    if status:
        raise DriverError(f"cuBLASLt: status {status}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)


@cache
def _handle() -> c_void_p:
    handle = c_void_p()
    _check(_library().cublasLtCreate(byref(handle)))
    return handle


@cache
def _operation() -> c_void_p:
    operation, transposed = c_void_p(), c_int(_TRANSPOSED)
    _check(_library().cublasLtMatmulDescCreate(byref(operation), c_int(_COMPUTE_32F), c_int(FLOAT32)))
    _check(_library().cublasLtMatmulDescSetAttribute(operation, c_int(_TRANSPOSE_A), byref(transposed), c_size_t(4)))
    return operation


@cache
def _preference() -> c_void_p:
    preference = c_void_p()
    _check(_library().cublasLtMatmulPreferenceCreate(byref(preference)))
    values = {
        _MAX_WORKSPACE_BYTES: c_uint64(0),
        _REDUCTION_SCHEME_MASK: c_int(_NO_REDUCTION),
        _IMPLEMENTATION_MASK: c_uint64(_TENSOR_CORES),
        **{name: c_int(_ALIGNMENT) for name in _MIN_ALIGNMENTS},
    }
    for name, value in values.items():
        _check(
            _library().cublasLtMatmulPreferenceSetAttribute(
                preference, c_int(name), byref(value), c_size_t(ctypes.sizeof(value))
            )
        )
    return preference


def _layout(data_type: int, rows: int, columns: int, stride: int) -> c_void_p:
    layout = c_void_p()
    _check(
        _library().cublasLtMatrixLayoutCreate(
            byref(layout), c_int(data_type), c_uint64(rows), c_uint64(columns), c_int64(stride)
        )
    )
    return layout
