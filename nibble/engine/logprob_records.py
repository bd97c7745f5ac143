"""Log probabilities that a step left, as records of the sequences that wanted them (`TokenEvent`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nibble.engine.batch import Batch
from nibble.engine.pass_inputs import prompt_targets
from nibble.engine.sampling_params import record_bytes
from nibble.engine.sequence import Sequence


@dataclass(frozen=True)
class PromptPart:
    """num_tokens tokens of a sequence's prompt, from first_token on, whose log probabilities a step computes."""

    sequence: Sequence
    first_token: int
    num_tokens: int


def prompt_parts(batch: Batch) -> list[PromptPart]:
    """In the order of `pass_inputs.fill`; only prompts are computed in the prefill pass."""
    return [
        PromptPart(chunk.sequence, chunk.sequence.num_computed_tokens + 1, len(prompt_targets(chunk)))
        for chunk in batch.prefill
        if chunk.sequence.prompt_logprobs
    ]


def keep_logprobs(sequence: Sequence, rows: npt.NDArray[np.int32]) -> None:
    count = sequence.request.sampling.logprobs
    if count is not None:
        sequence.newest_logprobs = rows.view(np.uint8)[:, : record_bytes(count)].tobytes()


def keep_prompt_logprobs(parts: list[PromptPart], rows: npt.NDArray[np.int32]) -> None:
    start = 0
    for part in parts:
        count = part.sequence.request.sampling.prompt_logprobs
        if part.sequence.prompt_logprobs is not None and count is not None:
            size = record_bytes(count)
            records = rows[start : start + part.num_tokens].view(np.uint8)[:, :size]
            first = (part.first_token - 1) * size
            part.sequence.prompt_logprobs[first : first + part.num_tokens * size] = records.tobytes()
        start += part.num_tokens
