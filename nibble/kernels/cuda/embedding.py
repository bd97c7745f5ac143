"""Launches embedding.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.interface import Float16Weight, Int8Weight

VARIANTS: tuple[Defines, ...] = ((),)

VECTOR = 16  # elements per thread
BLOCK = 256


def embedding(device: Device, ids: cupy.ndarray, weight: Int8Weight | Float16Weight) -> cupy.ndarray:
    """See `Kernels.embedding`; the result is float32."""
    hidden_size = weight.in_features
    assert ids.dtype == np.int32, f"ids are {ids.dtype}, expected int32"
    out = device.empty((len(ids), hidden_size), np.float32)
    grid = (len(ids), -(-hidden_size // (VECTOR * BLOCK)), 1)
    if isinstance(weight, Float16Weight):
        assert weight.values.dtype == np.float16, f"values are {weight.values.dtype}, expected float16"
        assert hidden_size % VECTOR == 0, f"{hidden_size} columns, not a multiple of {VECTOR}"
        kernel = device.kernel("embedding", "embedding_float16")
        kernel.launch(grid, BLOCK, ids, weight.values, np.int32(hidden_size), out)
        return out
    group_size = weight.group_size
    assert (weight.values.dtype, weight.scales.dtype) == (np.int8, np.float16), "an INT8 matrix is int8 and float16"
    assert group_size % VECTOR == 0, f"group size {group_size} is no multiple of {VECTOR}"
    device.kernel("embedding", "embedding").launch(
        grid, BLOCK, ids, weight.values, weight.scales, np.int32(hidden_size), np.int32(group_size), out
    )
    return out
