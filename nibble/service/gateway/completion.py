"""The JSON of completions: the chunks of a stream, and the whole answer, which is the fold of the same deltas.

A chunk costs one bytes template and the escaping of its text; nothing else in it changes (a pydantic model or a dict
for each chunk costs 5 to 40 times as much).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from nibble.service.gateway.answer_parser import Answer, Parts
from nibble.service.gateway.errors import ApiError
from nibble.service.gateway.generation import Delta, Generation
from nibble.service.gateway.logprobs import TokenLogprob
from nibble.service.gateway.shapes import Shape
from nibble.service.gateway.usage import Usage

# No blank line: to the `openai` client one ends an event, without data, once it has seen an id.
KEEP_ALIVE = b": keep-alive\n"
DONE = b"data: [DONE]\n\n"
_TEXT = "@TEXT@"  # stands for the text while a template is made


@dataclass(frozen=True)
class Identity:
    """What is the same in every chunk of an answer. created_s: Unix time."""

    request_id: str
    model: str
    created_s: int
    system_fingerprint: str
    service_tier: str


class ChunkEncoder:
    """Deltas to server-sent events. The event id is `<request id>:<position>`, from where a client can resume.

    The position is the number of tokens that the text so far is made of, one for each choice, joined by dots; the
    chunk with the finish reason and the one with the usage each count as one more.

    after: the position from where a client resumes; () is the beginning.
    """

    __slots__ = ("_after", "_has_logprobs", "_id", "_identity", "_include_usage", "_positions", "_shape", "_templates")

    def __init__(
        self,
        identity: Identity,
        shape: Shape,
        num_choices: int,
        *,
        include_usage: bool,
        has_logprobs: bool = False,
        after: Sequence[int] = (),
    ) -> None:
        self._after = after
        self._identity = identity
        self._shape = shape
        self._include_usage = include_usage
        self._has_logprobs = has_logprobs
        self._positions = [0] * num_choices
        self._id = f"id: {identity.request_id}:".encode()
        self._templates = [self._template(choice) for choice in range(num_choices)]

    def opening(self) -> bytes:
        """What comes before the first delta, for each choice."""
        if self._after:
            return b""
        choices = [self._shape.opening(choice) for choice in range(len(self._positions))]
        return b"".join(self._event(self._chunk(choice)) for choice in choices if choice is not None)

    def delta(self, delta: Delta) -> bytes:
        return self._missing(delta) if self._after else self._events(delta)

    def _events(self, delta: Delta) -> bytes:
        choice, text, reasoning, calls = delta.choice, delta.text, delta.reasoning, delta.calls
        self._positions[choice] = delta.num_tokens
        events = b""
        if self._has_logprobs or reasoning or calls:
            if text or delta.logprobs or reasoning or calls:
                parts, shown = Parts(reasoning, text, calls), delta.logprobs if self._has_logprobs else None
                events = self._event(self._chunk(self._shape.chunk(choice, parts, shown, None)))
        elif text:
            position = delta.num_tokens if len(self._positions) == 1 else self._position()
            events = self._templates[choice] % (position, orjson.dumps(text))
        if delta.finish_reason is not None:
            self._positions[choice] += 1
            events += self._event(self._chunk(self._shape.chunk(choice, None, None, delta.finish_reason)))
        return events

    def _missing(self, delta: Delta) -> bytes:
        """Those events of a delta that the client does not have."""
        choice, after = delta.choice, self._after[delta.choice]
        if delta.num_tokens > after:
            return self._events(delta)
        self._positions[choice] = delta.num_tokens
        if delta.finish_reason is None:
            return b""
        last = self._events(Delta(choice, "", delta.finish_reason, delta.num_tokens))
        return last if self._positions[choice] > after else b""

    def closing(self, usage: Usage) -> bytes:
        """What follows the last delta of an answer without error."""
        if not self._include_usage:
            return DONE
        self._positions[-1] += 1
        if self._after and self._positions[-1] <= self._after[-1]:
            return DONE
        return self._event(orjson.dumps({**self._common(), "choices": [], "usage": usage.openai_json()})) + DONE

    def failure(self, error: ApiError, usage: Usage) -> bytes:
        """What follows the last delta of an answer that ended with an error."""
        return b"data: " + error.body() + b"\n\n" + DONE

    def _template(self, choice: int) -> bytes:
        """An event with text alone, for the formatting of its position and its text."""
        chunk = self._chunk(self._shape.chunk(choice, Parts("", _TEXT, ()), None, None))
        head, _, tail = chunk.rpartition(orjson.dumps(_TEXT))  # the last one: a model may have that name
        position = b"%d" if len(self._positions) == 1 else b"%b"
        fixed = [part.replace(b"%", b"%%") for part in (self._id, head, tail)]
        return fixed[0] + position + b"\ndata: " + fixed[1] + b"%b" + fixed[2] + b"\n\n"

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._include_usage else {}
        return orjson.dumps({**self._common(), "choices": [choice], **usage})

    def _common(self) -> dict[str, Any]:
        return _common(self._identity, self._shape.chunk_object)

    def _event(self, chunk: bytes) -> bytes:
        return b"".join((self._id, self._position(), b"\ndata: ", chunk, b"\n\n"))

    def _position(self) -> bytes:
        return b".".join([b"%d" % position for position in self._positions])


async def fold(generation: Generation, identity: Identity, shape: Shape) -> bytes:
    """Return the whole answer as JSON. Raises ApiError."""
    answers = [Answer() for _ in generation.choices]
    logprobs: list[list[TokenLogprob]] = [[] for _ in generation.choices]
    reasons = [""] * len(answers)

    def add(delta: Delta) -> None:
        answers[delta.choice].add(delta.reasoning, delta.text, delta.calls)
        logprobs[delta.choice] += delta.logprobs
        if delta.finish_reason is not None:
            reasons[delta.choice] = delta.finish_reason

    await generation.run(add)
    has_logprobs = generation.plan.num_logprobs is not None
    choices = [
        shape.whole(index, answer, own_logprobs if has_logprobs else None, reason)
        for index, (answer, own_logprobs, reason) in enumerate(zip(answers, logprobs, reasons, strict=True))
    ]
    usage = generation.usage().openai_json()
    return orjson.dumps({**_common(identity, shape.whole_object), "choices": choices, "usage": usage})


def _common(identity: Identity, object_name: str) -> dict[str, Any]:
    return {
        "id": identity.request_id,
        "object": object_name,
        "created": identity.created_s,
        "model": identity.model,
        "service_tier": identity.service_tier,
        "system_fingerprint": identity.system_fingerprint,
    }
