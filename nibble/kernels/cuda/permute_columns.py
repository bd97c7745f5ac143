"""Launches permute_columns.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

BLOCK = 256


def permute_columns(device: Device, x: cupy.ndarray, order: cupy.ndarray) -> cupy.ndarray:
    """See `Kernels.permute_columns`; float16 in and out."""
    num_tokens, num_columns = x.shape
    assert x.dtype == np.float16, f"x is {x.dtype}, expected float16"
    assert (order.shape, order.dtype) == ((num_columns,), np.int32), "order must be int32 (K,)"
    out = device.empty(x.shape, np.float16)
    grid = (num_tokens, -(-num_columns // BLOCK), 1)
    device.kernel("permute_columns", "permute_columns").launch(grid, BLOCK, x, order, np.int32(num_columns), out)
    return out
