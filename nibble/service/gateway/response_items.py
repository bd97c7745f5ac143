"""The items of a response's input and output, as the messages of a chat."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nibble.service.gateway.errors import InvalidRequest, shown
from nibble.service.gateway.schema.responses import Item, ItemPart

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def with_ids(items: str | Sequence[Item]) -> list[dict[str, Any]]:
    """An input as it is kept: every item has an id and a type, every message a list of parts."""
    if isinstance(items, str):
        return [_kept({"role": "user", "content": items})]
    return [_kept(item.model_dump(exclude_none=True)) for item in items]


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.setdefault("type", "message")
    item.setdefault("id", f"{_ID_PREFIXES.get(kind, 'item')}_{secrets.token_hex(16)}")
    if kind == "message":
        item.setdefault("status", "completed")
        if isinstance(item.get("content"), str):
            part = "output_text" if item.get("role") == "assistant" else "input_text"
            item["content"] = [{"type": part, "text": item["content"]}]
    return item


_ID_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def to_messages(items: Iterable[Item], path: str) -> list[dict[str, Any]]:
    """Raises InvalidRequest for an item of a kind that cannot be part of a prompt; `path` is where they are."""
    messages: list[dict[str, Any]] = []
    reasoning = ""
    for i, item in enumerate(items):
        where = f"{path}[{i}]"
        match item.type:
            case None | "message":
                message = _message(item, where)
            case "function_call":
                message = _call(item, where)
            case "function_call_output":
                output = _text(_needed(item, "output", where), f"{where}.output")
                message = {"role": "tool", "tool_call_id": _needed(item, "call_id", where), "content": output}
            case "reasoning":
                reasoning = _text(item.content or item.summary or [], where)
                continue
            case kind:
                raise InvalidRequest(f"{where}: items of type {shown(kind)} are not supported", param=where)
        if message["role"] == "assistant" and reasoning:
            message["reasoning_content"] = reasoning
        reasoning = ""  # what came to no answer belongs to no other one
        _append(messages, message)
    return messages


def _append(messages: list[dict[str, Any]], message: Mapping[str, Any]) -> None:
    """What an assistant said and the calls that follow it are one message."""
    calls = message.get("tool_calls")
    if calls and messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).extend(calls)
    else:
        messages.append(dict(message))


def _message(item: Item, where: str) -> dict[str, Any]:
    content = _needed(item, "content", where)
    return {"role": _needed(item, "role", where), "content": _text(content, f"{where}.content")}


def _call(item: Item, where: str) -> dict[str, Any]:
    function = {"name": _needed(item, "name", where), "arguments": _needed(item, "arguments", where)}
    call = {"id": _needed(item, "call_id", where), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _text(content: str | Sequence[ItemPart], where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text if part.type in _TEXT_PARTS else None
        if text is None:
            message = f"{where}[{i}]: content of type {shown(part.type)} is not supported, or has no text"
            raise InvalidRequest(message, param=f"{where}[{i}]")
        texts.append(text)
    return "\n".join(texts)


def _needed(item: Item, field: str, where: str) -> Any:
    value = getattr(item, field)
    if value is None:
        raise InvalidRequest(f"{where}.{field}: field required", param=f"{where}.{field}")
    return value
