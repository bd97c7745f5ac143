"""Launches gather_rows.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

BLOCK = 256


def gather_rows(device: Device, x: cupy.ndarray, rows: cupy.ndarray) -> cupy.ndarray:
    """See `Kernels.gather_rows`; float32 or float16."""
    assert x.dtype in (np.float32, np.float16), f"x is {x.dtype}, expected float32 or float16"
    assert rows.dtype == np.int32, f"rows are {rows.dtype}, expected int32"
    out = device.empty((len(rows), x.shape[1]), x.dtype)
    row_bytes = x.shape[1] * x.dtype.itemsize
    piece_bytes = 16 if row_bytes % 16 == 0 else 2
    num_pieces = row_bytes // piece_bytes
    device.kernel("gather_rows", f"gather_rows_{piece_bytes}").launch(
        (len(rows), -(-num_pieces // BLOCK), 1), BLOCK, x, rows, np.int32(num_pieces), out
    )
    return out
