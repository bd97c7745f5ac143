"""Responses that are kept: retrieved, gone on from, listed, cancelled and deleted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from conftest import RunningGateway, wait_for
from responses_client import BODY, events_of, post, prompt_of

# What is kept


def test_response_is_retrieved_and_deleted(running: RunningGateway) -> None:
    client = running.openai()
    created = client.responses.create(**BODY)
    assert client.responses.retrieve(created.id) == created
    client.responses.delete(created.id)
    for call in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError) as raised:
            call(created.id)
        assert raised.value.code == "response_not_found"
    assert post(running, {**BODY, "previous_response_id": created.id}).status_code == 400


def test_response_is_not_kept_where_it_should_not_be(running: RunningGateway) -> None:
    client = running.openai()
    created = client.responses.create(**BODY, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(created.id)


def test_conversation_goes_on_from_a_response(running: RunningGateway) -> None:
    client = running.openai()
    first = client.responses.create(model="small", input="one", instructions="be kind")
    second = client.responses.create(model="small", input="two", previous_response_id=first.id)
    client.responses.create(model="small", input="three", previous_response_id=second.id)
    said = [("user", "one"), ("assistant", "one"), ("user", "two"), ("assistant", "two"), ("user", "three")]
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    assert prompt_of(running) == f"{turns}<|im_start|>assistant\n", "instructions are of one response alone"
    client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(model="small", input="four", previous_response_id=second.id)
    assert raised.value.code == "previous_response_not_found"


def test_streamed_response_can_be_gone_on_from_at_once(running: RunningGateway) -> None:
    with running.openai().responses.stream(model="small", input="one") as stream:
        for event in stream:
            if event.type == "response.completed":
                kept = running.openai().responses.retrieve(event.response.id)
                assert (kept.status, kept.output_text) == ("completed", "one")


def test_input_items_are_listed(running: RunningGateway) -> None:
    client = running.openai()
    items: Any = [{"role": "user", "content": f"item {number}"} for number in range(5)]
    created = client.responses.create(model="small", input=items)
    listed = list(client.responses.input_items.list(created.id, limit=2))
    assert [item.content[0].text for item in listed] == [f"item {number}" for number in (4, 3, 2, 1, 0)]  # type: ignore[union-attr]
    first = client.responses.input_items.list(created.id, order="asc", limit=1)
    assert (first.data[0].id, first.has_more) == (listed[-1].id, True)
    for query in ("order=up", "limit=0", "limit=x", "after=msg_x"):
        url = f"{running.url}/v1/responses/{created.id}/input_items?{query}"
        assert httpx.get(url).status_code == 400


def test_kept_for_a_while_alone(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(response_ttl_s=1.5) as running:
        client = running.openai()
        first = client.responses.create(**BODY)
        assert client.responses.retrieve(first.id).id == first.id
        pause = threading.Event()
        pause.wait(0.8)
        second = client.responses.create(**BODY, previous_response_id=first.id)
        pause.wait(0.8)
        client.responses.create(**BODY, previous_response_id=second.id)
        pause.wait(1.7)
        assert post(running, {**BODY, "previous_response_id": second.id}).status_code == 400


def test_other_gateways_know_it_and_other_clients_do_not(run_gateway: Callable[..., Any]) -> None:
    keys = {"api_keys": ("one", "two")}
    with (
        run_gateway(**keys) as one,
        run_gateway(has_worker=False, namespace=one.gateway.settings.namespace, **keys) as other,
    ):
        created = post(one, BODY, authorization="Bearer one").json()

        def ask(method: str, key: str, path: str = "") -> int:
            url = f"{other.url}/v1/responses/{created['id']}{path}"
            return httpx.request(method, url, headers={"authorization": f"Bearer {key}"}).status_code

        assert (ask("GET", "one"), ask("GET", "two")) == (200, 404)
        assert (ask("GET", "two", "/input_items"), ask("DELETE", "two"), ask("POST", "two", "/cancel")) == (404,) * 3
        body = {**BODY, "previous_response_id": created["id"]}
        assert post(other, body, authorization="Bearer two").json()["error"]["code"] == "previous_response_not_found"
        assert post(other, body, authorization="Bearer one").status_code == 200


# While it is generated


def test_running_response_is_retrieved_and_cancelled(running: RunningGateway) -> None:
    running.worker.gate.clear()
    client = running.openai()
    with httpx.stream("POST", f"{running.url}/v1/responses", json={**BODY, "stream": True}, timeout=10) as response:
        chunks = response.iter_text()
        first = next(chunks)
        response_id = first.split("\n")[0].removeprefix("id: ").split(":")[0]
        assert client.responses.retrieve(response_id).status == "in_progress"
        assert client.responses.cancel(response_id).status == "cancelled"
        last = events_of(first + "".join(chunks))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "cancelled")
    wait_for(lambda: response_id in running.worker.dropped)
    assert client.responses.retrieve(response_id).status == "cancelled"


def test_running_response_is_deleted_for_good(running: RunningGateway) -> None:
    running.worker.gate.clear()
    with httpx.stream("POST", f"{running.url}/v1/responses", json={**BODY, "stream": True}, timeout=10) as response:
        chunks = response.iter_text()
        response_id = next(chunks).split("\n")[0].removeprefix("id: ").split(":")[0]
        running.openai().responses.delete(response_id)
        "".join(chunks)
    with pytest.raises(openai.NotFoundError):
        running.openai().responses.retrieve(response_id)


def test_failure(running: RunningGateway) -> None:
    body = {"model": "small", "input": "fail: too odd"}
    response = post(running, body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
    last = events_of(post(running, {**body, "stream": True}).text)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"] == {"code": "server_error", "message": "fail: too odd"}
    stored = running.openai().responses.retrieve(last["response"]["id"])
    assert stored.error is not None
    assert stored.error.message == "fail: too odd"


def test_repeat_gives_the_same_response(running: RunningGateway) -> None:
    first, second = (post(running, BODY, **{"idempotency-key": "once"}).json() for _ in range(2))
    assert {**first, "completed_at": 0} == {**second, "completed_at": 0}
