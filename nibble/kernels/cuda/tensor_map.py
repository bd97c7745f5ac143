"""Tensor maps (CUtensorMap, sm_90): how the copy engine sees a matrix in device memory. A kernel gets them by value."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import cupy
import numpy as np

from nibble.kernels.cuda.errors import DriverError

ALIGNMENT = 64  # bytes; of the map itself

# cuda.h
_FLOAT16 = 6
_NOT_INTERLEAVED = 0
_SWIZZLE_128_BYTES = 3
_PROMOTE_TO_128_BYTES = 2  # in L2
_ZEROS_OUTSIDE = 0


class TensorMap:
    """128 bytes that a kernel gets by value; the driver reads them from `address` at a launch."""

    def __init__(self) -> None:
        self._buffer = (ctypes.c_uint8 * (128 + ALIGNMENT))()
        start = ctypes.addressof(self._buffer)
        self.address = start + -start % ALIGNMENT


def panel_map(matrix: cupy.ndarray, box_rows: int) -> TensorMap:
    """Boxes of box_rows x 64 columns of an fp16 matrix, for `copy_box` and `panel_descriptor` of hopper.cuh."""
    rows, columns = _check(matrix)
    return _encode(matrix.data.ptr, (columns, rows), (2 * columns,), (64, box_rows))


def panels_map(matrix: cupy.ndarray, box_rows: int, box_panels: int) -> TensorMap:
    """The same box_panels times side by side, for `copy_panels`; the columns must be a multiple of 64."""
    rows, columns = _check(matrix)
    assert columns % 64 == 0, f"{columns} columns are no whole number of panels of 64"
    return _encode(matrix.data.ptr, (64, rows, columns // 64), (2 * columns, 128), (64, box_rows, box_panels))


def _check(matrix: cupy.ndarray) -> tuple[int, int]:
    rows, columns = matrix.shape
    assert matrix.dtype == np.float16, f"{matrix.dtype} matrix, expected float16"
    assert columns % 8 == 0, f"{columns} columns: a row must be a multiple of 16 bytes"
    return rows, columns


@cache
def _encode_function() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


@lru_cache(maxsize=4096)  # the workspace's addresses recur step by step
def _encode(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> TensorMap:
    """shape and box: elements, the innermost dimension first. strides: bytes, of all but the innermost."""
    tensor_map = TensorMap()
    rank = len(shape)
    error = _encode_function()(
        ctypes.c_void_p(tensor_map.address),
        _FLOAT16,
        ctypes.c_uint32(rank),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*shape),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NOT_INTERLEAVED,
        _SWIZZLE_128_BYTES,
        _PROMOTE_TO_128_BYTES,
        _ZEROS_OUTSIDE,
    )
    if error:
        raise DriverError(f"cuTensorMapEncodeTiled of {shape} elements: error {error}")
    return tensor_map
