"""Launches adjust_logits.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.sampling import AdjustmentBatch
from nibble.kernels.slots import SlotLayout

VARIANTS: tuple[Defines, ...] = ((),)

THREADS = 256
PARTS = 16


def adjust_logits(device: Device, logits: cupy.ndarray, slots: cupy.ndarray, batch: AdjustmentBatch) -> None:
    """See `SamplingKernels.adjust_logits`."""
    num_rows, vocabulary = logits.shape
    layout = SlotLayout(vocabulary)
    assert logits.dtype == np.float32, f"logits are {logits.dtype}, expected float32"
    assert slots.dtype == batch.slots.dtype == batch.ids.dtype == batch.rows.dtype == np.int32, "ids must be int32"
    assert batch.positions.dtype == np.int64, f"positions are {batch.positions.dtype}, expected int64"
    assert slots.shape[1] == layout.num_words, f"slots have {slots.shape[1]} words, expected {layout.num_words}"
    assert batch.slots.shape == batch.rows.shape == batch.positions.shape == (num_rows,), "one of each for each row"
    device.kernel("adjust_logits", "adjust_logits").launch(
        (PARTS, num_rows, 1),
        THREADS,
        logits,
        slots,
        np.int32(layout.num_words),
        np.int32(layout.counts),
        batch.slots,
        batch.ids,
        batch.rows,
        batch.positions,
        np.int32(vocabulary),
    )
