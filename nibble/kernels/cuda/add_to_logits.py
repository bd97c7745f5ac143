"""Launches add_to_logits.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device

VARIANTS: tuple[Defines, ...] = ((),)

BLOCK = 256


def add_to_logits(
    device: Device, logits: cupy.ndarray, rows: cupy.ndarray, ids: cupy.ndarray, values: cupy.ndarray
) -> None:
    """See `Kernels.add_to_logits`."""
    assert (logits.dtype, values.dtype) == (np.float32, np.float32), "logits and values must be float32"
    assert (rows.dtype, ids.dtype) == (np.int32, np.int32), "rows and ids must be int32"
    assert rows.shape == ids.shape == values.shape, "rows, ids and values must have one shape"
    device.kernel("add_to_logits", "add_to_logits").launch(
        (-(-len(rows) // BLOCK), 1, 1),
        BLOCK,
        logits,
        rows,
        ids,
        values,
        np.int32(len(rows)),
        np.int32(logits.shape[1]),
    )
