"""The output items of a response while they are generated: each has the events that tell it, and the item itself.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from typing import Any, Literal

Event = dict[str, Any]
_ID_PREFIXES = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}


def item_id(response_id: str, kind: str, index: int) -> str:
    """The same whenever the response is given again."""
    return f"{_ID_PREFIXES[kind]}{response_id.removeprefix('resp_')}{index:02x}"


class TextItem:
    """A message, or the reasoning before it: one part, whose text grows."""

    def __init__(self, response_id: str, kind: Literal["message", "reasoning"], index: int) -> None:
        self.kind = kind
        self._index = index
        self._place = {"item_id": item_id(response_id, kind, index), "output_index": index, "content_index": 0}
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": self.item("in_progress")},
            {"type": "response.content_part.added", **self._place, "part": self._part()},
        ]

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        self._texts.append(text)
        self._logprobs += logprobs
        return [self._event("delta", {"delta": text}, logprobs)]

    def end(self, status: str) -> list[Event]:
        return [
            self._event("done", {"text": "".join(self._texts)}, self._logprobs),
            {"type": "response.content_part.done", **self._place, "part": self._part()},
            {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)},
        ]

    def item(self, status: str) -> dict[str, Any]:
        common = {"id": self._place["item_id"], "type": self.kind, "status": status}
        content = [] if status == "in_progress" else [self._part()]
        if self.kind == "reasoning":
            return {**common, "summary": [], "content": content}
        return {**common, "role": "assistant", "content": content}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "annotations": [], "logprobs": self._logprobs, "text": text}

    def _event(self, what: str, text: dict[str, str], logprobs: list[dict[str, Any]]) -> Event:
        if self.kind == "reasoning":
            return {"type": f"response.reasoning_text.{what}", **self._place, **text}
        return {"type": f"response.output_text.{what}", **self._place, **text, "logprobs": logprobs}


class CallItem:
    """A call of a function, whose arguments grow."""

    kind = "function_call"

    def __init__(self, response_id: str, index: int, call_id: str, name: str) -> None:
        self._index = index
        self._place = {"item_id": item_id(response_id, self.kind, index), "output_index": index}
        self._call_id, self._name = call_id, name
        self._arguments: list[str] = []

    def begin(self) -> list[Event]:
        return [{"type": "response.output_item.added", "output_index": self._index, "item": self.item("in_progress")}]

    def add(self, arguments: str) -> list[Event]:
        self._arguments.append(arguments)
        event = {"type": "response.function_call_arguments.delta", **self._place, "delta": arguments}
        return [event] if arguments else []

    def end(self, status: str) -> list[Event]:
        done = {"name": self._name, "arguments": "".join(self._arguments)}
        return [
            {"type": "response.function_call_arguments.done", **self._place, **done},
            {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)},
        ]

    def item(self, status: str) -> dict[str, Any]:
        return {
            "id": self._place["item_id"],
            "type": self.kind,
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }
