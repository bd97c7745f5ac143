"""What tests of /v1/chat/completions share: a request, and how the events of a stream are read."""

from __future__ import annotations

import json
from typing import Any

import httpx

TEXT = "The quick brown 😀 fox — über 日本."
USER = [{"role": "user", "content": TEXT}]
BODY: dict[str, Any] = {"model": "small", "messages": USER}


def events_of(response: httpx.Response) -> list[tuple[str | None, Any]]:
    """(event id, decoded data) of a finished stream; comments are left out."""
    events = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            data = fields["data"]
            events.append((fields.get("id"), data if data == "[DONE]" else json.loads(data)))
    return events


def chunks_of(response: httpx.Response) -> list[Any]:
    events = events_of(response)
    assert events[-1] == (None, "[DONE]")
    return [data for _, data in events[:-1]]
