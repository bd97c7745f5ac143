"""What one step computes: the scheduler's decision, read by the model runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nibble.engine.sequence import Sequence
from nibble.engine.swap_space import BlockMove


class Chunk(NamedTuple):
    """The next num_tokens uncomputed tokens of a sequence. `samples`: its last token's logits give a new token."""

    sequence: Sequence
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Prompt tokens go through the throughput path, generated tokens through the batch-invariant one.

    The split is by token, not by sequence: a resumed or preempted sequence recomputes its prompt in `prefill` and its
    generated tokens in `decode`, with the same arithmetic as the first time, so that it goes on with the same tokens.
    """

    prefill: list[Chunk]
    decode: list[Chunk]
    moves: list[BlockMove] = field(default_factory=list)  # before anything is computed

    @property
    def chunks(self) -> list[Chunk]:
        return [*self.decode, *self.prefill]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)
