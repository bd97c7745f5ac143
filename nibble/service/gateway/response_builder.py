"""A response, made of the deltas of its generation: the events of its stream, and the object that they amount to.

One builder for both, so that a whole response is what the streamed one ends with.
Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from nibble.service.gateway.completion import DONE
from nibble.service.gateway.errors import ApiError, Cancelled
from nibble.service.gateway.generation import Delta, Usage
from nibble.service.gateway.logprobs import TokenLogprob
from nibble.service.gateway.shapes import ChatShape

Event = dict[str, Any]


class ResponseBuilder:
    """`response` is the object as it is now. `skeleton`: without what is generated."""

    def __init__(self, skeleton: dict[str, Any], token_bytes: Callable[[int], bytes], *, has_logprobs: bool) -> None:
        self.response = {**skeleton, "output": []}
        self._shape = ChatShape(token_bytes)
        self._has_logprobs = has_logprobs
        self._texts: list[str] = []  # of the message, which is the last item once it is begun
        self._logprobs: list[dict[str, Any]] = []
        self._message: dict[str, Any] | None = None
        self._finish_reason: str | None = None

    def begin(self) -> list[Event]:
        return [
            {"type": "response.created", "response": self.response},
            {"type": "response.in_progress", "response": self.response},
        ]

    def add(self, delta: Delta) -> list[Event]:
        self._finish_reason = delta.finish_reason or self._finish_reason
        return self._add_text(delta.text, delta.logprobs) if delta.text or delta.logprobs else []

    def end(self, usage: Usage) -> list[Event]:
        is_cut = self._finish_reason == "length"
        events = [] if self.response["output"] else self._begin_message()  # an empty text is a text
        events += self._end_message("incomplete" if is_cut else "completed")
        self._conclude("incomplete" if is_cut else "completed", usage)
        if is_cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, {"type": f"response.{self.response['status']}", "response": self.response}]

    def fail(self, error: ApiError, usage: Usage) -> list[Event]:
        """What was generated so far stays."""
        self._end_message("incomplete")
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

    def _add_text(self, text: str, logprobs: Sequence[TokenLogprob]) -> list[Event]:
        events = self._begin_message() if self._message is None else []
        entries = self._entries(logprobs)
        self._texts.append(text)
        self._logprobs += entries
        return [*events, {"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": entries}]

    def _begin_message(self) -> list[Event]:
        index = len(self.response["output"])
        item_id = self.response["id"].replace("resp_", f"msg_{index or ''}", 1)
        self._message = {"id": item_id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        self.response["output"].append(self._message)
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
        return [
            {"type": "response.output_item.added", "output_index": index, "item": {**self._message}},
            {"type": "response.content_part.added", **self._place(), "part": part},
        ]

    def _end_message(self, status: str) -> list[Event]:
        message = self._message
        if message is None:
            return []
        text, place = "".join(self._texts), self._place()
        part = {"type": "output_text", "annotations": [], "logprobs": self._logprobs, "text": text}
        message.update(status=status, content=[part])
        self._message = None
        return [
            {"type": "response.output_text.done", **place, "text": text, "logprobs": self._logprobs},
            {"type": "response.content_part.done", **place, "part": part},
            {"type": "response.output_item.done", "output_index": place["output_index"], "item": message},
        ]

    def _place(self) -> dict[str, Any]:
        assert self._message is not None
        index = len(self.response["output"]) - 1
        return {"item_id": self._message["id"], "output_index": index, "content_index": 0}

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
    """A builder's events as server-sent events, numbered; the event id is `<response id>:<number>`."""

    def __init__(self, builder: ResponseBuilder) -> None:
        self._builder = builder
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
            numbered = orjson.dumps({**event, "sequence_number": self._number})
            head = f"id: {self._builder.response['id']}:{self._number}\nevent: {event['type']}\ndata: "
            parts += (head.encode(), numbered, b"\n\n")
            self._number += 1
        return b"".join(parts)
