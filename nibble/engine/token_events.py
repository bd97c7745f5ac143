"""What is told of a sequence: its new tokens, and how it ended."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nibble.engine.protocol import FinishReason, RequestMetrics, TokenEvent
from nibble.engine.sequence import Sequence
from nibble.grammar.bans import exhausting_fields
from nibble.kernels.slots import unpack_mask


class Ending(NamedTuple):
    """How a sequence ends. error, error_fields: with ERROR alone, see `TokenEvent`."""

    reason: FinishReason
    error: str | None = None
    error_fields: tuple[str, ...] = ()


def nothing_left(fields: tuple[str, ...]) -> Ending:
    """These fields of a request contradict each other."""
    return Ending(FinishReason.ERROR, f"no token is left to draw: {' and '.join(fields)} forbid all", fields)


def exhausted(sequence: Sequence, vocab_size: int, *, may_end: bool) -> Ending | None:
    """Of a sequence for which nothing could be drawn: its parameters forbade all that its grammar, if it has one,
    allowed. None: they did not. may_end: its text can, so it does."""
    masks, generated = sequence.token_masks, sequence.token_ids[sequence.num_prompt_tokens :]
    allowed = np.ones(vocab_size, np.bool_) if masks is None else unpack_mask(masks[0], vocab_size)
    fields = exhausting_fields(sequence.request.sampling, generated, allowed)
    if not fields:
        return None
    if may_end:
        return Ending(FinishReason.STOP)
    return nothing_left(fields if masks is None else (*fields, "grammar"))


def token_event(
    sequence: Sequence, token_ids: list[int], metrics: RequestMetrics | None, ending: Ending | None = None
) -> TokenEvent:
    """ending: of the last one."""
    logprobs, prompt_logprobs = sequence.take_logprobs() if token_ids else (None, None)
    reason, error, error_fields = ending or (None, None, ())
    return TokenEvent(
        request_id=sequence.request_id,
        index=sequence.num_read_tokens - len(token_ids),
        token_ids=token_ids,
        finish_reason=reason,
        error=error,
        metrics=metrics,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        error_fields=error_fields,
    )
