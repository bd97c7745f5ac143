"""A response, made of the deltas of its generation: the events of its stream, and the object that they amount to.

One builder for both, so that a whole response is what the streamed one ends with.
Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import orjson

from nibble.service.gateway.completion import DONE
from nibble.service.gateway.errors import ApiError, Cancelled
from nibble.service.gateway.generation import Delta
from nibble.service.gateway.logprobs import TokenLogprob
from nibble.service.gateway.response_output import CallItem, Event, TextItem
from nibble.service.gateway.shapes import ChatShape
from nibble.service.gateway.tool_call_parser import CallDelta
from nibble.service.gateway.usage import Usage


class ResponseBuilder:
    """`response` is the object as it is now. `skeleton`: without what is generated."""

    def __init__(self, skeleton: dict[str, Any], token_bytes: Callable[[int], bytes], *, has_logprobs: bool) -> None:
        self.response = {**skeleton, "output": []}
        self._shape = ChatShape(token_bytes)
        self._has_logprobs = has_logprobs
        self._open: TextItem | CallItem | None = None  # the last item, while it grows
        self._finish_reason: str | None = None

    def begin(self) -> list[Event]:
        return [
            {"type": "response.created", "response": self.response},
            {"type": "response.in_progress", "response": self.response},
        ]

    def add(self, delta: Delta) -> list[Event]:
        self._finish_reason = delta.finish_reason or self._finish_reason
        events: list[Event] = []
        if delta.reasoning:
            events += self._add_text("reasoning", delta.reasoning, ())
        if delta.text or (delta.logprobs and not (delta.reasoning or delta.calls)):
            events += self._add_text("message", delta.text, delta.logprobs)
        for call in delta.calls:
            events += self._add_call(call)
        return events

    def end(self, usage: Usage) -> list[Event]:
        is_cut = self._finish_reason == "length"
        is_half_a_call = isinstance(self._open, CallItem) and self._finish_reason != "tool_calls"
        events: list[Event] = []
        if self._open is None:  # an empty text is a text
            events += self._begin(TextItem(self.response["id"], "message", 0))
        events += self._end_item("incomplete" if is_cut or is_half_a_call else "completed")
        self._conclude("incomplete" if is_cut else "completed", usage)
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, {"type": f"response.{self.response['status']}", "response": self.response}]

    def fail(self, error: ApiError, usage: Usage) -> list[Event]:
        """What was generated so far stays."""
        self._end_item("incomplete")
        is_cancelled = isinstance(error, Cancelled)
        self._conclude("cancelled" if is_cancelled else "failed", usage)
        if not is_cancelled:
            self.response["error"] = {"code": "server_error", "message": error.message}
        return [{"type": "response.failed", "response": self.response}]

    def _conclude(self, status: str, usage: Usage) -> None:
        self.response["status"] = status
        self.response["usage"] = _usage(usage)
        if status == "completed":
            self.response["completed_at"] = int(time.time())

    def _add_text(
        self, kind: Literal["message", "reasoning"], text: str, logprobs: Sequence[TokenLogprob]
    ) -> list[Event]:
        events: list[Event] = []
        item = self._open
        if not isinstance(item, TextItem) or item.kind != kind:
            events = self._end_item("completed")
            item = TextItem(self.response["id"], kind, len(self.response["output"]))
            events += self._begin(item)
        return [*events, *item.add(text, self._entries(logprobs))]

    def _add_call(self, call: CallDelta) -> list[Event]:
        events: list[Event] = []
        item = self._open
        if call.id is not None and call.name is not None:
            events = self._end_item("completed")
            item = CallItem(self.response["id"], len(self.response["output"]), call.id, call.name)
            events += self._begin(item)
        assert isinstance(item, CallItem), "arguments of a call that did not begin"
        return [*events, *item.add(call.arguments)]

    def _begin(self, item: TextItem | CallItem) -> list[Event]:
        self._open = item
        self.response["output"].append(item.item("in_progress"))
        return item.begin()

    def _end_item(self, status: str) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        self.response["output"][-1] = item.item(status)
        return item.end(status)

    def _entries(self, logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        if not self._has_logprobs:
            return []
        shown = self._shape.chunk(0, None, logprobs, None)["logprobs"]
        entries: list[dict[str, Any]] = shown["content"]
        return entries


def _usage(usage: Usage) -> dict[str, object]:
    """A chat's usage, under the names of this endpoint."""
    chat = usage.openai_json()
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": chat["prompt_tokens_details"],
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": chat["completion_tokens_details"],
        "total_tokens": chat["total_tokens"],
    }


class ResponseEncoder:
    """A builder's events as server-sent events, numbered; the event id is `<response id>:<number>`.

    after: the number of the last event that the client has.
    """

    def __init__(self, builder: ResponseBuilder, after: int = -1) -> None:
        self._builder = builder
        self._after = after
        self._number = 0

    def opening(self) -> bytes:
        return self._encoded(self._builder.begin())

    def delta(self, delta: Delta) -> bytes:
        return self._encoded(self._builder.add(delta))

    def closing(self, usage: Usage) -> bytes:
        return self._encoded(self._builder.end(usage)) + DONE

    def failure(self, error: ApiError, usage: Usage) -> bytes:
        return self._encoded(self._builder.fail(error, usage)) + DONE

    def _encoded(self, events: Sequence[Event]) -> bytes:
        parts: list[bytes] = []
        for event in events:
            if self._number > self._after:
                numbered = orjson.dumps({**event, "sequence_number": self._number})
                head = f"id: {self._builder.response['id']}:{self._number}\nevent: {event['type']}\ndata: "
                parts += (head.encode(), numbered, b"\n\n")
            self._number += 1
        return b"".join(parts)
