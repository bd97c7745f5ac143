"""Penalties, biases and bans of sequences that have a slot (`kernels/slots.py`), row by row.

Few rows have one, so numpy's own passes over a row are all it takes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nibble.kernels.sampling import AdjustmentBatch
from nibble.kernels.slots import (
    END_OF_WORD,
    IN_PROMPT,
    MAX_COUNT,
    NUM_RECENT,
    Header,
    SlotLayout,
    SlotView,
    unpack_mask,
)

Row = npt.NDArray[np.float32]
MINUS_INFINITY = np.float32(-np.inf)


def adjust_logits(logits: npt.NDArray[np.float32], slots: npt.NDArray[np.int32], batch: AdjustmentBatch) -> None:
    layout = SlotLayout(logits.shape[1])
    assert slots.shape[1] == layout.num_words, f"slots have {slots.shape[1]} words, expected {layout.num_words}"
    for row in np.flatnonzero(batch.slots >= 0):
        slot, position = layout.view(slots[batch.slots[row]]), int(batch.positions[row])
        _remember(slot, int(batch.ids[batch.rows[row]]), position)
        _forbid(logits[row], slot, position)
        num_biases = slot.header[Header.NUM_BIASES]
        np.add.at(logits[row], slot.bias_ids[:num_biases], slot.bias_values[:num_biases])
        if slot.header[Header.HAS_COUNTS]:
            _penalize(logits[row], slot)


def _remember(slot: SlotView, token_id: int, position: int) -> None:
    if position > 0:
        slot.recent[(position - 1) % NUM_RECENT] = token_id
    if not slot.header[Header.HAS_COUNTS]:
        return
    if position == 0:
        slot.counts[token_id] |= IN_PROMPT
    elif slot.counts[token_id] & MAX_COUNT < MAX_COUNT:
        slot.counts[token_id] += 1


def _forbid(logits: Row, slot: SlotView, position: int) -> None:
    header = slot.header
    if header[Header.HAS_ALLOWED]:
        logits[:] = np.where(unpack_mask(slot.allowed, len(logits)), logits, MINUS_INFINITY)
    if position < header[Header.MIN_TOKENS]:
        logits[slot.stop_ids[: header[Header.NUM_STOP_IDS]]] = -np.inf
    start, words = 0, slot.bad_words[: header[Header.NUM_BAD_WORD_WORDS]]
    for end in np.flatnonzero(words == END_OF_WORD).tolist():
        *before, last = words[start:end].tolist()
        if len(before) <= position and before == _newest(slot, position, len(before)):
            logits[last] = -np.inf
        start = end + 1


def _newest(slot: SlotView, position: int, count: int) -> list[int]:
    """The newest `count` of the `position` generated tokens."""
    return [int(slot.recent[i % NUM_RECENT]) for i in range(position - count, position)]


def _penalize(logits: Row, slot: SlotView) -> None:
    repetition, frequency, presence = slot.header_floats[[Header.REPETITION, Header.FREQUENCY, Header.PRESENCE]]
    seen = np.flatnonzero(slot.counts != 0)  # which is faster for booleans
    x = logits[seen]
    x = np.where(x > 0, x / repetition, x * repetition)
    count = (slot.counts[seen] & MAX_COUNT).astype(np.float32)
    logits[seen] = np.where(count > 0, x - frequency * count - presence, x)
