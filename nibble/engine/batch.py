"""What one step computes: the scheduler's decision, read by the model runner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from nibble.engine.sequence import Sequence
from nibble.engine.swap_space import BlockMove

# Newest tokens and drafts of a step that verifies drafts, at most. Up to so many tokens the products of a decode pass
# read their weights once; more sequences than that keep a device busy without guesses.
MAX_VERIFIED_TOKENS = 64


class Chunk(NamedTuple):
    """The next num_tokens tokens of a sequence; the logits of its last num_samples tokens give a new token each.

    Where these are several, all tokens but the first of them are drafts: the first num_drafts of `Sequence.drafts`.
    """

    sequence: Sequence
    num_tokens: int
    num_samples: int
    num_prompt_tokens: int = 0  # of the tokens

    @property
    def num_drafts(self) -> int:
        return max(0, self.num_samples - 1)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. Prompt tokens go through the throughput path (PREFILL mode), but for short prompts and the last few of
    a prompt on a backend that is faster so (`Kernels.num_prefill_tokens`); they and generated tokens are computed in
    DECODE mode.

    The split is by token, not by sequence: a resumed or preempted sequence recomputes each of its tokens with the same
    arithmetic as the first time, so that it goes on with the same tokens.
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
