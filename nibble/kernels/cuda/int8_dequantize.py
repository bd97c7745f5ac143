"""Launches int8_dequantize.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.interface import Int8Weight

VARIANTS: tuple[Defines, ...] = ((),)

THREADS = 256
COLUMNS = 16  # of a thread, as in int8_dequantize.cu


def int8_dequantize(device: Device, weight: Int8Weight, first_row: int, num_rows: int) -> cupy.ndarray:
    """Rows first_row .. first_row + num_rows of the matrix -> new fp16 (num_rows, K)."""
    num_columns = weight.in_features
    assert 0 <= first_row <= first_row + num_rows <= weight.out_features, "rows out of range"
    out = device.empty((num_rows, num_columns), np.float16)
    blocks = -(-num_rows * num_columns // (COLUMNS * THREADS))
    device.kernel("int8_dequantize", "int8_dequantize").launch(
        (blocks, 1, 1),
        THREADS,
        weight.values,
        weight.scales,
        out,
        np.int32(first_row),
        np.int32(num_rows),
        np.int32(num_columns),
        np.int32(weight.group_size),
    )
    return out
