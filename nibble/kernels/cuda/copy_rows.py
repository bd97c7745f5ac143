"""Launches copy_rows.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

THREADS, PIECES = 256, 4


def copy_rows(device: Device, x: cupy.ndarray, wanted: cupy.ndarray) -> cupy.ndarray:
    """See `SamplingKernels.copy_rows`."""
    assert x.dtype == np.float32, f"x is {x.dtype}, expected float32"
    assert wanted.dtype == np.int32, f"wanted is {wanted.dtype}, expected int32"
    assert wanted.shape == (len(x),), f"{len(wanted)} wishes for {len(x)} rows"
    out = device.empty(x.shape, x.dtype)
    piece_bytes = 16 if x.shape[1] % 4 == 0 else 4
    num_pieces = x.shape[1] * 4 // piece_bytes
    device.kernel("copy_rows", f"copy_rows_{piece_bytes}").launch(
        (-(-num_pieces // (THREADS * PIECES)), len(x), 1), THREADS, x, wanted, np.int32(num_pieces), out
    )
    return out
