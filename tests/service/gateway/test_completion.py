"""The chunk template against plain JSON encoding."""

from __future__ import annotations

import json

import pytest

from nibble.service.gateway.completion import ChunkEncoder, Identity
from nibble.service.gateway.generation import Delta
from nibble.service.gateway.shapes import ChatShape
from nibble.service.gateway.usage import Usage

IDENTITY = Identity("chatcmpl-1", 'model "x" \\ ü', 1700000000, "nibble-1-x-cpu", "default")
SHAPE = ChatShape(lambda token_id: bytes([token_id]))
USAGE = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=7)


def parse(events: bytes) -> list[tuple[str, object]]:
    parsed = []
    for event in events.decode().removesuffix("\n\n").split("\n\n"):
        event_id, data = event.split("\n")
        parsed.append((event_id, json.loads(data.removeprefix("data: "))))
    return parsed


@pytest.mark.parametrize("text", ["plain", 'quote " and \\', "new\nline\r\n\n", "\u2028 \x00 😀", "@TEXT@", "data: x"])
def test_any_text_survives(text: str) -> None:
    encoder = ChunkEncoder(IDENTITY, SHAPE, 1, include_usage=False)
    ((event_id, chunk),) = parse(encoder.delta(Delta(0, text, None, 3)))
    assert event_id == "id: chatcmpl-1:3"
    assert chunk == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": IDENTITY.model,
        "service_tier": "default",
        "system_fingerprint": "nibble-1-x-cpu",
        "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}],
    }


def test_last_text_and_finish_reason_are_two_chunks() -> None:
    encoder = ChunkEncoder(IDENTITY, SHAPE, 1, include_usage=True)
    (_, first), (last_id, last) = parse(encoder.delta(Delta(0, "end", "length", 7)))
    assert first["choices"][0]["delta"] == {"content": "end"}  # type: ignore[index]
    assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}  # type: ignore[index]
    assert last_id == "id: chatcmpl-1:8"
    closing = encoder.closing(USAGE)
    assert closing.endswith(b"data: [DONE]\n\n")
    ((usage_id, usage),) = parse(closing.removesuffix(b"data: [DONE]\n\n"))
    assert usage_id == "id: chatcmpl-1:9"
    assert usage["usage"]["total_tokens"] == 12  # type: ignore[index]


def test_positions_of_several_choices() -> None:
    encoder = ChunkEncoder(IDENTITY, SHAPE, 3, include_usage=False)
    opening = parse(encoder.opening())
    assert [event[1]["choices"][0]["index"] for event in opening] == [0, 1, 2]  # type: ignore[index]
    encoder.delta(Delta(2, "x", None, 4))
    ((event_id, chunk),) = parse(encoder.delta(Delta(1, "y", None, 9)))
    assert event_id == "id: chatcmpl-1:0.9.4"
    assert chunk["choices"][0]["index"] == 1  # type: ignore[index]
