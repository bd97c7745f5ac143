"""Launches int4_dequantize.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.interface import Int4Weight
from nibble.kernels.layout import GROUP_SIZES, TILE_COLUMNS, TILE_ROWS

VARIANTS: tuple[Defines, ...] = tuple((("GROUP_SIZE", size),) for size in GROUP_SIZES)

THREADS = 128


def int4_dequantize(device: Device, weight: Int4Weight, first_row: int, num_rows: int) -> cupy.ndarray:
    """Rows first_row .. first_row + num_rows of the matrix -> new fp16 (num_rows, K). first_row starts a row tile."""
    num_columns = weight.in_features
    assert 0 <= first_row <= first_row + num_rows <= weight.out_features, "rows out of range"
    assert first_row % TILE_ROWS == 0, f"row {first_row} is not the first of a tile"
    out = device.empty((num_rows, num_columns), np.float16)
    device.kernel("int4_dequantize", "int4_dequantize", (("GROUP_SIZE", weight.group_size),)).launch(
        (-(-num_columns // TILE_COLUMNS), -(-num_rows // TILE_ROWS), 1),
        THREADS,
        *(weight.packed, out, np.int32(first_row), np.int32(num_rows), np.int32(num_columns)),
    )
    return out
