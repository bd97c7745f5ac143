"""What tests of /v1/responses share: a request, and how its events are read."""

from __future__ import annotations

import json
from typing import Any

import httpx
from conftest import RunningGateway

TEXT = "The quick brown 😀 fox — über 日本."
BODY: dict[str, Any] = {"model": "small", "input": TEXT}


def post(running: RunningGateway, body: dict[str, Any], **headers: str) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/responses", json=body, headers=headers, timeout=30)


def events_of(text: str) -> list[dict[str, Any]]:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert blocks[-1] == "data: [DONE]"
    events = []
    for block in blocks[:-1]:
        event_id, name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event_id.endswith(f":{event['sequence_number']}")
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def prompt_of(running: RunningGateway) -> str:
    return str(running.tokenizer.decode(running.worker.seen[-1].prompt_token_ids, skip_special_tokens=False))


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in response.items() if name not in ("id", "created_at", "completed_at")}
    return {**kept, "output": [{**item, "id": None} for item in response["output"]]}
