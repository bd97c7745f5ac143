"""The shapes of forward passes, and those that passes are captured for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import numpy as np

from nibble.kernels.interface import Mode

ALIGNMENT = 64  # bytes; more than any vector access needs
# Tokens that passes are captured for.
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
PROMPT_END_BUCKETS = (16, 32, 64, 128)  # in DECODE mode, beside what decodes
PROMPT_BUCKETS = (128, 256)  # in PREFILL mode; of more tokens the device needs as long as the host, op by op
MAX_CAPTURED_PROMPTS = 8  # of one pass in PREFILL mode; more take a while on the device anyway


@dataclass(frozen=True)
class PassShape:
    """T tokens of S sequences, whose block tables have B columns; N of the tokens have their logits sampled.

    adjusts: whether some of these N need more than `sample`; A is N then, else 0. P: tokens of prompts whose log
    probabilities are wanted.
    """

    num_tokens: int
    num_sequences: int
    num_blocks: int
    num_samples: int
    adjusts: bool = False
    num_prompt_logprobs: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the buffer that the pass is cut out of."""
        return sum(aligned(math.prod(shape) * dtype.itemsize) for _, shape, dtype in self.fields())

    def fields(self) -> Iterator[tuple[str, tuple[int, ...], np.dtype[Any]]]:
        """Name, shape and type of each array of `PassInputs`."""
        tokens, sequences, samples = self.num_tokens, self.num_sequences, self.num_samples
        for name in ("ids", "positions"):
            yield name, (tokens,), np.dtype(np.int32)
        yield "slots", (tokens,), np.dtype(np.int64)
        yield "query_starts", (sequences + 1,), np.dtype(np.int32)
        yield "context_lens", (sequences,), np.dtype(np.int32)
        for name in ("last_rows", "sample_rows", "top_k"):
            yield name, (samples,), np.dtype(np.int32)
        for name in ("temperature", "top_p", "min_p"):
            yield name, (samples,), np.dtype(np.float32)
        yield "seeds", (samples,), np.dtype(np.uint64)
        yield "draw_positions", (samples,), np.dtype(np.int64)
        for name in ("adjustment_slots", "mask_rows", "num_logprobs"):
            yield name, (samples if self.adjusts else 0,), np.dtype(np.int32)
        for name in ("prompt_rows", "prompt_targets", "prompt_num_logprobs", "prompt_out_rows"):
            yield name, (self.num_prompt_logprobs,), np.dtype(np.int32)
        yield "block_tables", (sequences, self.num_blocks), np.dtype(np.int32)


NOTHING = PassShape(0, 0, 0, 0)


class PassKind(Enum):
    """What passes are captured for, in graphs of their own."""

    SINGLE_TOKENS = auto()  # in DECODE mode, one of each sequence
    SEVERAL_TOKENS = auto()  # in DECODE mode: drafts, short prompts, ends of prompts, tokens computed anew
    PROMPTS = auto()  # in PREFILL mode, nothing of which is sampled

    @property
    def samples(self) -> bool:
        return self is not PassKind.PROMPTS


def holds(captured: PassShape, shape: PassShape) -> bool:
    """Whether idle rows can make a pass of this shape one of the captured shape."""
    num_idle_sequences = captured.num_sequences - shape.num_sequences
    return (
        shape.num_tokens <= captured.num_tokens
        and (num_idle_sequences > 0 or (num_idle_sequences == 0 and shape.num_tokens == captured.num_tokens))
        and shape.num_samples <= captured.num_samples
        and not shape.num_prompt_logprobs
    )


def kind_of(shape: PassShape, mode: Mode) -> PassKind:
    if mode is Mode.PREFILL:
        return PassKind.PROMPTS
    return PassKind.SEVERAL_TOKENS if shape.num_tokens > shape.num_sequences else PassKind.SINGLE_TOKENS


def captured_shapes(
    max_sequences: int, max_tokens: int, max_verified: int, num_blocks: int
) -> dict[PassKind, list[PassShape]]:
    """By rising number of tokens.

    Where there are several tokens of a sequence there are fewer sequences; tokens left over belong to one more.
    """
    single = [bucket for bucket in BUCKETS if bucket < max_sequences] + [max_sequences]
    several = {bucket for bucket in BUCKETS if 1 < bucket <= max_verified}
    several |= {bucket for bucket in PROMPT_END_BUCKETS if bucket <= max_tokens}
    prompts = [bucket for bucket in PROMPT_BUCKETS if bucket <= max_tokens]
    max_samples = max(max_sequences, max_verified)
    return {
        PassKind.SINGLE_TOKENS: [PassShape(tokens, tokens, num_blocks, tokens) for tokens in single],
        PassKind.SEVERAL_TOKENS: [
            PassShape(tokens, min(tokens - 1, max_sequences + 1), num_blocks, min(tokens, max_samples))
            for tokens in sorted(several)
        ],
        PassKind.PROMPTS: [
            PassShape(tokens, min(MAX_CAPTURED_PROMPTS, max_sequences) + 1, num_blocks, 0) for tokens in prompts
        ],
    }


def max_input_bytes(max_sequences: int, max_tokens: int, max_verified: int, num_blocks: int) -> int:
    """Of the largest pass that there can be, captured or not. A step may have one in each mode."""
    max_samples = max_sequences + max_verified
    largest = PassShape(max(max_tokens, max_verified), max_sequences, num_blocks, max_samples, True, max_tokens)
    shapes = captured_shapes(max_sequences, max_tokens, max_verified, num_blocks).values()
    captured = [replace(shape, adjusts=True) for kind in shapes for shape in kind]
    return max(shape.num_bytes for shape in (largest, *captured))


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
