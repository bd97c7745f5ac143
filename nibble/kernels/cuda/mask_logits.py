"""Launches mask_logits.cu."""

from __future__ import annotations

import cupy
import numpy as np

from nibble.kernels.cuda.compile import Defines
from nibble.kernels.cuda.device import Device
from nibble.kernels.slots import mask_words

VARIANTS: tuple[Defines, ...] = ((),)

THREADS = 256  # of which each takes a word


def mask_logits(device: Device, logits: cupy.ndarray, masks: cupy.ndarray, mask_rows: cupy.ndarray) -> None:
    """See `SamplingKernels.mask_logits`."""
    num_rows, vocabulary = logits.shape
    num_words = mask_words(vocabulary)
    assert logits.dtype == np.float32, f"logits are {logits.dtype}, expected float32"
    assert masks.dtype == mask_rows.dtype == np.int32, "masks and their rows must be int32"
    assert masks.shape[1] == num_words, f"masks have {masks.shape[1]} words, expected {num_words}"
    assert mask_rows.shape == (num_rows,), f"{len(mask_rows)} mask rows for {num_rows} rows"
    device.kernel("mask_logits", "mask_logits").launch(
        (-(-num_words // THREADS), num_rows, 1),
        THREADS,
        logits,
        masks,
        mask_rows,
        np.int32(num_words),
        np.int32(vocabulary),
    )
