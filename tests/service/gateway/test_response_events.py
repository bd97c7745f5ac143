"""GET /v1/responses/{id}?stream=true: the events of a response again, or those after one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import redis
from conftest import RunningGateway, wait_for
from responses_client import BODY, TEXT, events_of, post

from nibble.service.broker.embedded import EmbeddedValkey

CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}}
ANSWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": (TEXT, {}),
    "log probabilities": (TEXT, {"top_logprobs": 2}),
    "cut": (TEXT, {"max_output_tokens": 5}),
    "a call": (f"{CALL}\n{CALL}", {"tools": [TOOL]}),
}


def again(running: RunningGateway, response_id: str, headers: Any = None, **query: object) -> httpx.Response:
    params: Any = {"stream": "true", **query}
    return httpx.get(f"{running.url}/v1/responses/{response_id}", params=params, headers=headers, timeout=30)


def blocks_of(text: str) -> list[str]:
    """Events as they were sent, but for the time at which a response was completed."""
    blocks = text.split("\n\n")[:-2]
    return [block.replace(f'"completed_at":{_completed_at(block)}', '"completed_at":0') for block in blocks]


def _completed_at(block: str) -> object:
    event = json.loads(block.partition("data: ")[2])
    return event.get("response", {}).get("completed_at")


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_events_are_the_same_however_tokens_came(running: RunningGateway, name: str, tokens_per_step: int) -> None:
    text, fields = ANSWERS[name]
    running.reply_with(text)
    running.worker.tokens_per_step = tokens_per_step
    live = blocks_of(post(running, {**BODY, **fields, "stream": True}).text)
    response_id = live[0].removeprefix("id: ").partition(":")[0]
    assert blocks_of(again(running, response_id).text) == live
    for number in {*range(0, len(live), 4), len(live) - 1}:
        assert blocks_of(again(running, response_id, starting_after=number).text) == live[number + 1 :]


def test_whole_response_is_streamed_afterwards_with_the_official_client(running: RunningGateway) -> None:
    client = running.openai()
    whole = client.responses.create(**BODY)
    events = list(client.responses.retrieve(whole.id, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == TEXT
    rest = list(client.responses.retrieve(whole.id, stream=True, starting_after=events[-3].sequence_number))
    assert [event.type for event in rest] == [event.type for event in events[-2:]]


def test_running_response_is_joined(running: RunningGateway) -> None:
    running.worker.gate.clear()
    with httpx.stream("POST", f"{running.url}/v1/responses", json={**BODY, "stream": True}, timeout=10) as response:
        chunks = response.iter_text()
        first = next(chunks)
        response_id = first.split("\n")[0].removeprefix("id: ").split(":")[0]
        with httpx.stream("GET", f"{running.url}/v1/responses/{response_id}?stream=true", timeout=10) as joined:
            joined_chunks = joined.iter_text()
            begun = next(joined_chunks)
            running.worker.gate.set()
            assert events_of(begun + "".join(joined_chunks))[-1]["response"]["status"] == "completed"
        events_of(first + "".join(chunks))


def test_event_id_says_where_to_go_on(running: RunningGateway) -> None:
    """As a browser's EventSource sends it."""
    live = blocks_of(post(running, {**BODY, "stream": True}).text)
    event_id = live[3].split("\n")[0].removeprefix("id: ")
    response_id = event_id.partition(":")[0]
    assert blocks_of(again(running, response_id, {"last-event-id": event_id}).text) == live[4:]
    assert again(running, response_id, {"last-event-id": "resp_x:3"}).status_code == 400


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"stream": "yes"}, "stream"),
        ({"starting_after": "-1"}, "starting_after"),
        ({"starting_after": "x"}, "starting_after"),
        ({"starting_after": "1" * 30}, "starting_after"),
        ({"stream": "false", "starting_after": "1"}, "starting_after"),
    ],
)
def test_query_at_fault_is_named(running: RunningGateway, query: dict[str, str], param: str) -> None:
    response_id = post(running, BODY).json()["id"]
    response = again(running, response_id, **query)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_query_without_effect_is_reported(running: RunningGateway) -> None:
    response_id = post(running, BODY).json()["id"]
    for stream in ("true", "false"):
        response = again(running, response_id, stream=stream, include_obfuscation="false")
        assert response.headers["x-nibble-ignored"] == "include_obfuscation"
    assert "x-nibble-ignored" not in again(running, response_id).headers


def test_no_events_of_what_is_not_kept(running: RunningGateway, valkey: EmbeddedValkey) -> None:
    not_stored = post(running, {**BODY, "store": False}).json()["id"]
    deleted, forgotten = (post(running, BODY).json()["id"] for _ in range(2))
    running.openai().responses.delete(deleted)
    with redis.Redis.from_url(valkey.url) as client:
        client.delete(*[key for key in client.scan_iter(f"*{forgotten}*") if b":response:" not in key])
    for response_id in (not_stored, deleted, "resp_unknown"):
        response = again(running, response_id)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "response_not_found")
    response = again(running, forgotten)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "response_events_not_found")
    assert running.openai().responses.retrieve(forgotten).output_text == TEXT
    assert running.openai().responses.cancel(forgotten).output_text == TEXT, "it has ended, and stays as it is"
    unknown = httpx.post(f"{running.url}/v1/responses/resp_unknown/cancel")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "response_not_found")


def test_other_gateways_stream_it_to_its_client_alone(run_gateway: Callable[..., Any]) -> None:
    keys = {"api_keys": ("one", "two")}
    with (
        run_gateway(**keys) as first,
        run_gateway(has_worker=False, namespace=first.gateway.settings.namespace, **keys) as other,
    ):
        live = blocks_of(post(first, {**BODY, "stream": True}, authorization="Bearer one").text)
        response_id = live[0].removeprefix("id: ").partition(":")[0]
        assert blocks_of(again(other, response_id, {"authorization": "Bearer one"}).text) == live
        assert again(other, response_id, {"authorization": "Bearer two"}).status_code == 404


@pytest.mark.parametrize("is_repeat", [False, True])
def test_reader_who_leaves_does_not_change_what_is_kept(running: RunningGateway, is_repeat: bool) -> None:
    running.worker.gate.clear()
    body, headers = {**BODY, "stream": True}, {"idempotency-key": f"reader {is_repeat}"}
    url = f"{running.url}/v1/responses"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=10) as response:
        chunks = response.iter_text()
        first = next(chunks)
        response_id = first.split("\n")[0].removeprefix("id: ").split(":")[0]
        other = ("POST", url, body) if is_repeat else ("GET", f"{url}/{response_id}?stream=true", None)
        with httpx.stream(other[0], other[1], json=other[2], headers=headers, timeout=10) as second:
            next(second.iter_text())
        wait_for(lambda: len(running.gateway.in_flight) == 1)
        assert running.openai().responses.retrieve(response_id).status == "in_progress"
        running.worker.gate.set()
        events_of(first + "".join(chunks))
    assert running.openai().responses.retrieve(response_id).status == "completed"
