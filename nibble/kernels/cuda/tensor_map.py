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
    rows, columns = matrix.shape
    assert matrix.dtype == np.float16, f"{matrix.dtype} matrix, expected float16"
    assert columns % 8 == 0, f"{columns} columns: a row must be a multiple of 16 bytes"
    return _panel_map(matrix.data.ptr, rows, columns, box_rows)


@cache
def _encode_function() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled


@lru_cache(maxsize=4096)  # the workspace's addresses recur step by step
def _panel_map(pointer: int, rows: int, columns: int, box_rows: int) -> TensorMap:
    tensor_map = TensorMap()
    error = _encode_function()(
        ctypes.c_void_p(tensor_map.address),
        _FLOAT16,
        ctypes.c_uint32(2),
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(2 * columns),  # bytes from row to row
        (ctypes.c_uint32 * 2)(64, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        _NOT_INTERLEAVED,
        _SWIZZLE_128_BYTES,
        _PROMOTE_TO_128_BYTES,
        _ZEROS_OUTSIDE,
    )
    if error:
        raise DriverError(f"cuTensorMapEncodeTiled of {rows} x {columns}: error {error}")
    return tensor_map
