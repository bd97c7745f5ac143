"""Launches rms_norm.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

VECTOR = 8  # elements per thread and pass
MAX_BLOCK = 1024
WARP = 32


def rms_norm(device: Device, x: cupy.ndarray, weight: cupy.ndarray, eps: float) -> cupy.ndarray:
    """See `Kernels.rms_norm`; the result is float16."""
    num_rows, hidden_size = x.shape
    assert x.dtype == np.float32, f"x is {x.dtype}, expected float32"
    assert (weight.shape, weight.dtype) == ((hidden_size,), np.float32), "weight must be float32 (H,)"
    out = device.empty((num_rows, hidden_size), np.float16)
    name = "rms_norm" if hidden_size % VECTOR == 0 else "rms_norm_any"
    block = min(MAX_BLOCK, -(-hidden_size // (VECTOR * WARP)) * WARP)
    device.kernel("rms_norm", name).launch(
        (num_rows, 1, 1), block, x, weight, np.float32(eps), np.int32(hidden_size), out
    )
    return out
