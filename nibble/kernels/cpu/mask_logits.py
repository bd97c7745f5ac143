"""Masks of one bit per token over the logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nibble.kernels.slots import mask_words, unpack_mask

MINUS_INFINITY = np.float32(-np.inf)


def mask_logits(
    logits: npt.NDArray[np.float32], masks: npt.NDArray[np.int32], mask_rows: npt.NDArray[np.int32]
) -> None:
    vocab_size = logits.shape[1]
    assert masks.shape[1] == mask_words(vocab_size), f"masks have {masks.shape[1]} words"
    for row in np.flatnonzero(mask_rows >= 0):
        allowed = unpack_mask(masks[mask_rows[row]], vocab_size)
        logits[row] = np.where(allowed, logits[row], MINUS_INFINITY)
