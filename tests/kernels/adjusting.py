"""Random slots and the rows that they adjust, for the tests of both backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nibble.kernels.sampling import AdjustmentBatch
from nibble.kernels.slots import MAX_BIASES, SlotContent, SlotLayout


@dataclass(frozen=True)
class Case:
    """A sequence: its newest token is the last one of `generated`, or of the prompt where there is none."""

    content: SlotContent
    prompt: list[int]
    generated: list[int]

    @property
    def before(self) -> tuple[list[int], list[int]]:
        """Prompt and generated tokens without the newest."""
        return (self.prompt, self.generated[:-1]) if self.generated else (self.prompt[:-1], [])

    @property
    def newest(self) -> int:
        return [*self.prompt, *self.generated][-1]


def random_case(rng: np.random.Generator, vocab_size: int) -> Case:
    def ids(most: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist()

    generated = ids(60)
    if rng.random() < 0.5:  # few distinct tokens: high counts
        generated = [token % 3 for token in generated]
    ends = [generated[-k:] for k in (1, 2, 16) if len(generated) >= k]  # words that are about to be completed
    words = [[*end, int(rng.integers(vocab_size))] for end in ends] + [[*ids(5), 1] for _ in range(3)]
    biased = rng.permutation(vocab_size)[: rng.choice([0, 1, 5, min(vocab_size, MAX_BIASES)])]
    penalty = rng.choice([0, 1, 2])  # none, some, all
    content = SlotContent(
        repetition=float(rng.choice([0.5, 1.3])) if penalty == 2 else 1.0,
        frequency=float(rng.choice([-1, 0.3, 2])) if penalty else 0.0,
        presence=float(rng.choice([-0.7, 1.5])) if penalty == 2 else 0.0,
        min_tokens=int(rng.choice([0, 30])),
        stop_ids=ids(8),
        biases=[(int(i), float(rng.choice([-np.inf, -100, 2.5]))) for i in biased],
        bad_words=words if rng.random() < 0.7 else (),
        allowed=ids(vocab_size // 2) if rng.random() < 0.3 else None,
    )
    return Case(content, [*ids(40), int(rng.integers(vocab_size))], generated)


def slots_of(cases: list[Case], vocab_size: int, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Case i is in slot order[i]; what no slot uses is noise."""
    layout = SlotLayout(vocab_size)
    slots = rng.integers(-(2**31), 2**31, (len(order) + 2, layout.num_words)).astype(np.int32)
    for case, slot in zip(cases, order, strict=True):
        layout.write(slots[slot], case.content, *case.before)
    return slots


def batch_of(cases: list[Case | None], order: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of AdjustmentBatch on the host; None: a row without a slot. Each row has three tokens in the pass."""
    ids = rng.integers(0, 2, 3 * len(cases)).astype(np.int32)
    rows = np.arange(2, 3 * len(cases), 3, dtype=np.int32)
    slots = np.full(len(cases), -1, np.int32)
    positions = np.zeros(len(cases), np.int64)
    for i, (case, slot) in enumerate(zip(cases, order, strict=True)):
        if case is not None:
            ids[rows[i]], slots[i], positions[i] = case.newest, slot, len(case.generated)
    return {"slots": slots, "ids": ids, "rows": rows, "positions": positions}


def adjustment(arrays: dict[str, Any]) -> AdjustmentBatch:
    return AdjustmentBatch(**arrays)
