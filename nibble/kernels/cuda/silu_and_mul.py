"""Launches silu_and_mul.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.layout import GATE_UP_INTERLEAVE

VARIANTS: tuple[Defines, ...] = ((),)

BLOCK = 256


def silu_and_mul(device: Device, gate_up: cupy.ndarray) -> cupy.ndarray:
    """See `Kernels.silu_and_mul`; float16 in and out."""
    num_tokens, num_columns = gate_up.shape
    assert gate_up.dtype == np.float16, f"gate_up is {gate_up.dtype}, expected float16"
    assert num_columns % (2 * GATE_UP_INTERLEAVE) == 0, f"{num_columns} columns are not interleaved runs"
    out = device.empty((num_tokens, num_columns // 2), np.float16)
    num_pairs = out.size // GATE_UP_INTERLEAVE
    device.kernel("silu_and_mul", "silu_and_mul").launch(
        (-(-num_pairs // BLOCK), 1, 1), BLOCK, gate_up, np.int64(num_pairs), out
    )
    return out
