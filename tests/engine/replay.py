"""A drafter that knows what will come, and is wrong as often as it is told to be."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nibble.engine.sequence import Sequence


class ReplayDrafter:
    """outputs: the generated tokens of each request. accuracy: of each draft; the rest are other tokens."""

    def __init__(self, outputs: dict[str, list[int]], accuracy: float, vocab_size: int, seed: int = 0) -> None:
        self._outputs = outputs
        self._accuracy = accuracy
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(seed)
        self.forgotten: set[Sequence] = set()

    def propose(self, wishes: Mapping[Sequence, int]) -> list[list[int]]:
        drafts = []
        for sequence, count in wishes.items():
            assert sequence.num_unread_tokens == 0, "only who knows all tokens can guess the next ones"
            first = sequence.num_read_tokens
            right = self._outputs[sequence.request_id][first : first + count]
            wrong = self._rng.random(len(right)) >= self._accuracy
            shifts = self._rng.integers(1, self._vocab_size, len(right)) * wrong
            drafts.append([int(token_id) for token_id in (np.array(right, int) + shifts) % self._vocab_size])
        return drafts

    def is_promising(self, sequence: Sequence) -> bool:
        return len(self._outputs[sequence.request_id]) > sequence.num_read_tokens + 1

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.add(sequence)
