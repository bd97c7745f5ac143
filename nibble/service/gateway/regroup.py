"""The tokens of an answer in other groups than they came in."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from nibble.engine.protocol import TokenEvent


def singly(event: TokenEvent, until: int) -> Iterator[TokenEvent]:
    """The same tokens, each of those before position `until` in an event of its own."""
    ids, logprobs = event.token_ids, event.logprobs
    num_single = min(max(until - event.index, 0), len(ids))
    record_bytes = len(logprobs) // len(ids) if logprobs and ids else 0
    for i in range(num_single):
        yield TokenEvent(
            request_id=event.request_id,
            index=event.index + i,
            token_ids=ids[i : i + 1],
            metrics=event.metrics,
            logprobs=logprobs[i * record_bytes : (i + 1) * record_bytes] if logprobs else None,
            prompt_logprobs=event.prompt_logprobs if i == 0 else None,
        )
    if num_single == 0:
        yield event
    elif num_single < len(ids) or event.finish_reason is not None:
        yield msgspec.structs.replace(
            event,
            index=event.index + num_single,
            token_ids=ids[num_single:],
            logprobs=logprobs[num_single * record_bytes :] if logprobs else None,
            prompt_logprobs=None,
        )
