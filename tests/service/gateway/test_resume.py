"""Streams that are taken up again, requests that are repeated, requests that are cancelled: by id and by key."""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
import redis
from conftest import RunningGateway, wait_for
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import make_plan

from nibble.engine.protocol import FinishReason, TokenEvent
from nibble.service.broker.embedded import EmbeddedValkey
from nibble.service.gateway.choice import Choice
from nibble.service.gateway.regroup import singly
from nibble.service.gateway.served_model import ServedModel

TEXT = "The quick brown 😀 fox — über 日本."
CHAT: dict[str, Any] = {
    "model": "small",
    "messages": [{"role": "user", "content": TEXT}],
    "stream": True,
    "stream_options": {"include_usage": True},
}
WHOLE: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": TEXT}]}


def folded(blocks: list[str]) -> dict[str, Any]:
    """What a client has in the end, however the tokens were grouped into events."""
    assert blocks[-1] == "data: [DONE]"
    found: dict[str, Any] = {"texts": {}, "logprobs": [], "reasons": [], "usage": None}
    for block in blocks[:-1]:
        chunk = json.loads(data(block))
        # Not its details: a worker tells them with its last event, and does not where a stop string ended the answer.
        found["usage"] = (chunk.get("usage") or {}).get("total_tokens")
        for choice in chunk["choices"]:
            index, logprobs = choice["index"], choice["logprobs"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            found["texts"][index] = found["texts"].get(index, "") + text
            found["logprobs"] += logprobs["content"] if logprobs else []
            if choice["finish_reason"]:
                found["reasons"].append((index, choice["finish_reason"], id_of(block)))
    return found


def blocks_of(text: str) -> list[str]:
    """The events of a finished stream, each with its id; comments are left out."""
    return [block for block in text.split("\n\n") if block and not block.startswith(":")]


def id_of(block: str) -> str:
    return block.split("\n")[0].removeprefix("id: ")


def resume(running: RunningGateway, event_id: str, path: str = "/v1/chat/completions") -> httpx.Response:
    url = f"{running.url}{path}/{event_id.split(':')[0]}/stream"
    return httpx.get(url, headers={"last-event-id": event_id} if ":" in event_id else {}, timeout=30)


@pytest.mark.parametrize("fields", [{}, {"stop": "über"}, {"logprobs": True, "top_logprobs": 2}, {"max_tokens": 5}])
def test_stream_resumes_after_every_event(running: RunningGateway, fields: dict[str, Any]) -> None:
    blocks = blocks_of(running.post({**CHAT, **fields}).text)
    assert blocks[-1] == "data: [DONE]"
    for position, block in enumerate(blocks[:-1]):
        rest = blocks_of(resume(running, id_of(block)).text)
        assert folded(rest) == folded(blocks[position + 1 :])
        assert all(id_of(event) > id_of(block) or len(id_of(event)) > len(id_of(block)) for event in rest[:-1])
    assert folded(blocks_of(resume(running, id_of(blocks[0]).split(":")[0]).text)) == folded(blocks)


def test_stream_of_several_choices_resumes(running: RunningGateway) -> None:
    blocks = blocks_of(running.post({**CHAT, "n": 2}).text)
    for position in (2, 5, len(blocks) - 3, len(blocks) - 2):
        rest, expected = (
            folded(blocks_of(resume(running, id_of(blocks[position])).text)),
            folded(blocks[position + 1 :]),
        )
        assert {index: text for index, text in rest["texts"].items() if text} == {
            index: text for index, text in expected["texts"].items() if text
        }
        assert {(index, reason) for index, reason, _ in rest["reasons"]} == {
            (index, reason) for index, reason, _ in expected["reasons"]
        }
        assert rest["usage"] == expected["usage"]


def data(block: str) -> str:
    return block.split("\ndata: ")[1]


def test_running_stream_is_followed(running: RunningGateway) -> None:
    running.worker.gate.clear()
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=CHAT, timeout=30) as response:
        chunks = response.iter_text()
        first = next(chunks)
        with httpx.stream("GET", f"{running.url}/v1/chat/completions/{id_of(first).split(':')[0]}/stream") as follower:
            running.worker.gate.set()
            followed = "".join(follower.iter_text())
        whole = first + "".join(chunks)
    assert text_of(followed) == text_of(whole) == TEXT
    wait_for(lambda: not running.gateway.in_flight)
    assert running.gateway.metrics.num_running == running.gateway.metrics.num_waiting == 0


def text_of(stream: str) -> str:
    text: str = folded(blocks_of(stream))["texts"][0]
    return text


def test_follower_that_leaves_ends_nothing(running: RunningGateway) -> None:
    running.worker.gate.clear()
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=CHAT, timeout=30) as response:
        chunks = response.iter_text()
        first = next(chunks)
        url = f"{running.url}/v1/chat/completions/{id_of(first).split(':')[0]}/stream"
        with httpx.stream("GET", url) as follower:
            assert next(follower.iter_text()).startswith(f"id: {id_of(first)}")
        wait_for(lambda: len(running.gateway.in_flight) == 1)
        running.worker.gate.set()
        assert text_of(first + "".join(chunks)) == TEXT


def test_completion_resumes_and_is_cancelled(running: RunningGateway) -> None:
    tokens = running.gateway.model.encode("one two three")
    running.worker.reply = lambda request: [*tokens, running.end_of_turn]
    body = {"model": "small", "prompt": "x", "stream": True}
    blocks = blocks_of(httpx.post(f"{running.url}/v1/completions", json=body).text)
    request_id = id_of(blocks[0]).split(":")[0]
    assert folded(blocks_of(resume(running, id_of(blocks[1]), "/v1/completions").text)) == folded(blocks[2:])
    deleted = {"id": request_id, "object": "text_completion.deleted", "deleted": True}
    assert httpx.delete(f"{running.url}/v1/completions/{request_id}").json() == deleted
    assert httpx.delete(f"{running.url}/v1/chat/completions/{request_id}").status_code == 404


@pytest.mark.parametrize("event_id", ["chatcmpl-x:1", "{id}:", "{id}:1.2", "{id}:-1", "{id}:x", "1"])
def test_event_id_of_something_else_is_refused(running: RunningGateway, event_id: str) -> None:
    request_id = running.post(WHOLE).json()["id"]
    url = f"{running.url}/v1/chat/completions/{request_id}/stream"
    response = httpx.get(url, headers={"last-event-id": event_id.replace("{id}", request_id)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_event_id")
    wait_for(lambda: not running.gateway.in_flight)


def test_unknown_request_is_404(running: RunningGateway) -> None:
    response = resume(running, "chatcmpl-unknown:3")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "request_not_found")


# Idempotency-Key


def keyed(running: RunningGateway, body: dict[str, Any], key: str) -> httpx.Response:
    return running.post(body, **{"idempotency-key": key})


@pytest.mark.parametrize("stream", [False, True])
def test_repeat_gives_the_finished_answer_again(running: RunningGateway, stream: bool) -> None:
    key = secrets.token_hex(8)
    body = {**(CHAT if stream else WHOLE), "messages": [{"role": "user", "content": "random 20"}]}
    num_seen = len(running.worker.seen)
    first, second = keyed(running, body, key), keyed(running, body, key)
    assert first.status_code == second.status_code == 200
    if stream:
        assert text_of(first.text) == text_of(second.text)
    else:
        assert first.json() == second.json()
    assert len(running.worker.seen) == num_seen + 1
    assert keyed(running, body, key + "x").text != first.text, "another key is another request"


def test_repeat_attaches_to_the_running_generation_whose_client_left(running: RunningGateway) -> None:
    key = secrets.token_hex(8)
    body = {**CHAT, "n": 2}
    num_seen = len(running.worker.seen)
    running.worker.gate.clear()
    url = f"{running.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers={"idempotency-key": key}) as response:
        next(response.iter_text())
    running.worker.gate.set()
    answer = folded(blocks_of(keyed(running, body, key).text))
    assert answer["texts"] == {0: TEXT, 1: TEXT}
    assert len(running.worker.seen) == num_seen + 2
    wait_for(lambda: not running.gateway.in_flight)
    assert not {request.request_id for request in running.worker.seen[-2:]} & set(running.worker.dropped)


def test_other_body_with_the_same_key_is_refused(running: RunningGateway) -> None:
    key = secrets.token_hex(8)
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
    assert keyed(running, body, key).status_code == 200
    response = keyed(running, {**body, "temperature": 0.5}, key)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_failed_request_can_be_repeated(running: RunningGateway) -> None:
    key = secrets.token_hex(8)
    body = {"model": "small", "messages": [{"role": "user", "content": "fail: once"}]}
    assert keyed(running, body, key).status_code == 500
    running.reply_with("better")
    assert keyed(running, body, key).json()["choices"][0]["message"]["content"] == "better"


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_bad_key_is_refused(running: RunningGateway, key: str) -> None:
    response = keyed(running, {"model": "small", "messages": [{"role": "user", "content": "x"}]}, key)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "idempotency-key")


def test_another_gateway_resumes_and_cancels(run_gateway: Callable[..., Any]) -> None:
    with run_gateway() as one, run_gateway(has_worker=False, namespace=one.gateway.settings.namespace) as other:
        blocks = blocks_of(one.post(CHAT).text)
        assert folded(blocks_of(resume(other, id_of(blocks[1])).text)) == folded(blocks[2:])
        one.worker.gate.clear()
        with httpx.stream("POST", f"{one.url}/v1/chat/completions", json=CHAT, timeout=30) as response:
            chunks = response.iter_text()
            request_id = id_of(next(chunks)).split(":")[0]
            assert httpx.delete(f"{other.url}/v1/chat/completions/{request_id}").status_code == 200
            assert '"code":"request_cancelled"' in "".join(chunks)


def test_choice_that_was_never_submitted_is_not_found(running: RunningGateway, valkey: EmbeddedValkey) -> None:
    """Its gateway died in between."""
    blocks = blocks_of(running.post({**CHAT, "n": 2}).text)
    request_id = id_of(blocks[0]).split(":")[0]
    with redis.Redis.from_url(valkey.url) as client:
        keys = list(client.scan_iter(f"*{request_id}.1*"))
        assert keys
        client.delete(*keys)
    response = resume(running, request_id)
    assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")


# What it rests on: text is a function of the tokens, however they were grouped


def events_of(token_ids: Sequence[int], cuts: Sequence[int], reason: FinishReason) -> list[TokenEvent]:
    bounds = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(token_ids)), len(token_ids)]
    return [
        TokenEvent(
            request_id="r",
            index=start,
            token_ids=list(token_ids[start:stop]),
            finish_reason=reason if stop == len(token_ids) else None,
        )
        for start, stop in itertools.pairwise(bounds)
    ]


def texts(model: ServedModel, events: list[TokenEvent], plan: dict[str, Any]) -> dict[int, str]:
    """Position -> the text so far."""
    choice, text, found = Choice(make_plan(**plan), model.make_detokenizer(True)), "", {}
    for event in events:
        text += choice.push(event)
        found[choice.num_tokens] = text
        if choice.finish_reason is not None:
            break
    return found


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tokens_one_by_one_pass_every_position_with_the_same_text(
    served_model: ServedModel, data: st.DataObject
) -> None:
    end = min(served_model.eos_token_ids)
    token_ids = data.draw(st.lists(st.integers(3, 300) | st.just(end), min_size=1, max_size=12))
    cuts = data.draw(st.lists(st.integers(0, 12)))
    plan = data.draw(
        st.sampled_from([{}, {"stops": ("a", "th")}, {"stop_token_ids": (end,)}, {"logprobs": None, "min_tokens": 3}])
    )
    reason = data.draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
    grouped = events_of(token_ids, cuts, reason)
    whole = events_of(token_ids, (), reason)
    single = [part for event in whole for part in singly(event, len(token_ids))]
    assert [event.token_ids for event in single[: len(token_ids)]] == [[token_id] for token_id in token_ids]
    found, expected = texts(served_model, single, plan), texts(served_model, grouped, plan)
    assert {position: found.get(position) for position in expected} == expected
