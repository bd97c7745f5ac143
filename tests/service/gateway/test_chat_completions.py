"""POST /v1/chat/completions through a real server, a real broker and the `openai` client."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from conftest import RunningGateway, wait_for
from small_models import CONTEXT_LENGTH
from synthetic_worker import CACHED_TOKENS

from nibble.engine.protocol import GenerationRequest

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


# The shape of answers


def test_whole_answer(running: RunningGateway) -> None:
    answer = running.openai().chat.completions.create(**BODY)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "small")
    assert re.fullmatch(r"nibble-[^-]+-small-synthetic", answer.system_fingerprint or "")
    request = running.worker.seen[-1]
    num_generated = len(running.gateway.model.encode(TEXT)) + 1
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == num_generated
    assert answer.usage.total_tokens == len(request.prompt_token_ids) + num_generated
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_cached_tokens_are_known_where_a_stop_string_ended_the_answer(running: RunningGateway) -> None:
    """The gateway ends it; the worker's last event is never seen."""
    running.reply_with("one two three four")
    answer = running.openai().chat.completions.create(**{**BODY, "stop": "two"})
    assert answer.choices[0].message.content == "one "
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS


def test_stream_shape(running: RunningGateway) -> None:
    response = running.post({**BODY, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    chunks = chunks_of(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1]), "the role comes once"
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1


def test_usage_in_the_stream_comes_last_and_is_null_before(running: RunningGateway) -> None:
    whole = running.post(BODY).json()
    chunks = chunks_of(running.post({**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_stream_with_the_official_client(running: RunningGateway) -> None:
    with running.openai().chat.completions.stream(**BODY) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == TEXT
    assert final.choices[0].finish_reason == "stop"


async def test_async_client_streams(running: RunningGateway) -> None:
    async with running.openai_async() as client:
        stream = await client.chat.completions.create(**BODY, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == TEXT


def test_event_ids_count_tokens(running: RunningGateway) -> None:
    events = events_of(running.post({**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    request_id = events[0][1]["id"]
    positions = [int((event_id or "").removeprefix(f"{request_id}:")) for event_id, _ in events[:-1]]
    num_generated = events[-2][1]["usage"]["completion_tokens"]
    assert positions == sorted(set(positions)), "a client can tell what it has from the last id"
    assert (positions[0], positions[-2:]) == (0, [num_generated + 1, num_generated + 2])


def test_tokens_in_larger_groups_give_the_same_answer(running: RunningGateway) -> None:
    alone = running.post(BODY).json()
    running.worker.tokens_per_step = 5
    grouped = running.post(BODY).json()
    assert grouped["choices"] == alone["choices"]
    assert grouped["usage"] == alone["usage"]


def test_length_is_reported(running: RunningGateway) -> None:
    answer = running.post({**BODY, "max_tokens": 3}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3
    assert TEXT.startswith(answer["choices"][0]["message"]["content"])


def test_character_that_never_completes_is_one_replacement_character(running: RunningGateway) -> None:
    tokens = running.gateway.model.encode("😀")[:-1]
    running.worker.reply = lambda request: [*tokens, running.end_of_turn]
    chunks = chunks_of(running.post({**BODY, "stream": True}))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == running.post(BODY).json()["choices"][0]["message"]["content"] == "\ufffd"


# Stop strings, several choices, seeds


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_answer_and_the_generation(running: RunningGateway, stream: bool) -> None:
    running.reply_with("one two <|stop|> three " + "four " * 100)
    body = {**BODY, "stop": ["never", "<|stop|>"], "stream": stream}
    response = running.post(body)
    if stream:
        chunks = chunks_of(response)
        contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert not any("<" in content for content in contents), "no part of the stop string leaks"
        answer, reason = "".join(contents), chunks[-1]["choices"][0]["finish_reason"]
        request_id = chunks[0]["id"]
    else:
        choice = response.json()["choices"][0]
        answer, reason, request_id = choice["message"]["content"], choice["finish_reason"], response.json()["id"]
    assert (answer, reason) == ("one two ", "stop")
    wait_for(lambda: request_id in running.worker.dropped)


def test_stop_string_can_be_shown(running: RunningGateway) -> None:
    running.reply_with("one two three")
    answer = running.post({**BODY, "stop": "wo", "include_stop_str_in_output": True}).json()
    assert answer["choices"][0]["message"]["content"] == "one two"


def test_n_choices_whole_and_streamed_agree(running: RunningGateway) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "random 20"}], "n": 3, "seed": 11}
    whole = running.post(body).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert len(set(texts)) == 3, "each choice has its own seed"
    chunks = chunks_of(running.post({**body, "stream": True, "stream_options": {"include_usage": True}}))
    streamed = ["", "", ""]
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts
    assert chunks[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 3 * 21
    assert whole["usage"]["prompt_tokens"] == len(running.worker.seen[-1].prompt_token_ids), "the prompt counts once"


def test_seed_decides(running: RunningGateway) -> None:
    def text(**fields: Any) -> str:
        body = {"model": "small", "messages": [{"role": "user", "content": "random 20"}], **fields}
        return str(running.post(body).json()["choices"][0]["message"]["content"])

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text(), "without a seed one is drawn"


# Fields that are not honoured


def test_ignored_fields_are_reported(running: RunningGateway, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    extra = {"metadata": {"a": "b"}, "best_of": 2, "weird\r\nx: y": 1}
    response = running.post({**BODY, **extra})
    assert response.status_code == 200
    assert response.headers["x-nibble-ignored"] == "metadata,best_of,weird%0D%0Ax%3A%20y"
    assert running.post({**BODY, "stream": True, **extra}).headers["x-nibble-ignored"].startswith("metadata")
    assert "x-nibble-ignored" not in running.post(BODY).headers
    assert any("ignored=metadata,best_of" in record.getMessage() for record in caplog.records)


def test_unsupported_field_is_refused_by_name(running: RunningGateway) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        running.openai().chat.completions.create(**BODY, functions=[{"name": "f"}])
    assert raised.value.param == "functions"
    assert "functions is not supported; send tools" in str(raised.value)


# Failures


def test_failed_request_is_an_error_whole(running: RunningGateway) -> None:
    response = running.post({"model": "small", "messages": [{"role": "user", "content": "fail: too odd"}]})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "fail: too odd",
        "type": "server_error",
        "param": None,
        "code": "generation_failed",
    }


def test_failed_request_is_an_error_event_in_a_stream(running: RunningGateway) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "fail: too odd"}], "stream": True}
    *_, error, done = [data for _, data in events_of(running.post(body))]
    assert done == "[DONE]"
    assert set(error["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.APIError, match="too odd"):
        list(running.openai().chat.completions.create(**body))


def test_one_failed_choice_fails_the_request_and_ends_the_others(running: RunningGateway) -> None:
    tokens = running.gateway.model.encode("word " * 50)

    def reply(request: GenerationRequest) -> list[int]:
        if request.request_id.endswith(".1"):
            raise ValueError("choice one failed")
        return tokens

    running.worker.reply = reply
    response = running.post({**BODY, "n": 2, "ignore_eos": True})
    assert response.status_code == 500
    assert "choice one failed" in response.json()["error"]["message"]
    first = running.worker.seen[-2].request_id
    wait_for(lambda: first in running.worker.dropped)


def test_deadline_ends_a_request_that_is_not_served(running: RunningGateway) -> None:
    running.worker.gate.clear()
    response = running.post(BODY, **{"x-nibble-timeout-ms": "150"})
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert running.worker.seen[-1].deadline_s is not None


def test_first_token_deadline_is_no_limit_for_the_rest(running: RunningGateway) -> None:
    running.worker.gate.clear()
    response = running.post(BODY, **{"x-nibble-ttft-timeout-ms": "100"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    running.worker.gate.set()
    assert running.post(BODY, **{"x-nibble-ttft-timeout-ms": "5000"}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_ends_its_generation(running: RunningGateway, stream: bool) -> None:
    running.worker.gate.clear()
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(f"{running.url}/v1/chat/completions", json={**BODY, "stream": stream, "n": 2}, timeout=0.3)
    request_ids = [request.request_id for request in running.worker.seen[-2:]]
    wait_for(lambda: set(request_ids) <= set(running.worker.dropped))
    wait_for(lambda: not running.gateway.in_flight)


def test_cancel_by_id_tells_the_client(running: RunningGateway) -> None:
    running.worker.gate.clear()
    url = f"{running.url}/v1/chat/completions"
    with httpx.stream("POST", url, json={**BODY, "n": 2, "stream": True}, timeout=10) as response:
        lines = response.iter_lines()
        request_id = next(lines).removeprefix("id: ").split(":")[0]
        answer = httpx.delete(f"{url}/{request_id}")
        assert answer.json() == {"id": request_id, "object": "chat.completion.deleted", "deleted": True}
        rest = list(lines)
    assert any('"code":"request_cancelled"' in line for line in rest)
    assert rest[-2:] == ["data: [DONE]", ""]
    wait_for(lambda: {request_id, f"{request_id}.1"} <= set(running.worker.dropped))
    unknown = httpx.delete(f"{url}/chatcmpl-unknown")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "request_not_found")


def test_silence_is_filled_with_comments(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(keep_alive_s=0.05) as running:
        running.worker.gate.clear()
        url = f"{running.url}/v1/chat/completions"
        with httpx.stream("POST", url, json={**BODY, "stream": True}, timeout=10) as response:
            lines = []
            for line in response.iter_lines():
                lines.append(line)
                if lines.count(": keep-alive") == 3:
                    running.worker.gate.set()
        assert lines[-2:] == ["data: [DONE]", ""]


def test_openai_client_reads_over_the_comments(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(keep_alive_s=0.05) as running:
        running.worker.gate.clear()
        chunks = running.openai().chat.completions.create(**BODY, stream=True)
        next(iter(chunks))  # the opening one, with an id
        threading.Timer(0.3, running.worker.gate.set).start()
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] is not None


# Overload


def test_full_queue_is_429_with_a_time_to_retry(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False, needs_worker=False, max_queued_requests=1) as running:
        thread = threading.Thread(target=lambda: running.post(BODY, **{"x-nibble-timeout-ms": "1500"}))
        thread.start()
        wait_for(lambda: running.gateway.in_flight)
        with pytest.raises(openai.RateLimitError) as raised:
            running.openai().chat.completions.create(**BODY)
        headers = raised.value.response.headers
        assert int(headers["retry-after"]) >= 1
        assert int(headers["retry-after-ms"]) > 0
        assert raised.value.code == "queue_full"
        thread.join()


def test_no_worker_is_503_with_a_time_to_retry(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False) as running:
        response = running.post(BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
        assert int(response.headers["retry-after"]) >= 1


def test_no_broker_is_503(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False, redis_url="redis://127.0.0.1:1/0") as running:
        response = running.post(BODY)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "broker_unavailable")
        assert "retry-after-ms" in response.headers


def test_refused_choice_leaves_none_of_its_siblings_behind(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False, needs_worker=False, max_queued_requests=2) as running:
        assert running.post({**BODY, "n": 4}).status_code == 429
        status = asyncio.run(queue_status(running))
        assert status.num_queued == 0


async def queue_status(running: RunningGateway) -> Any:
    from nibble.service.broker.gateway_side import GatewayBroker

    settings = running.gateway.settings
    broker = GatewayBroker(settings.redis_url, "observer", namespace=settings.namespace)
    try:
        return await broker.status()
    finally:
        await broker.close()


# Long prompts


def test_prompt_over_the_context_is_refused_with_numbers(running: RunningGateway) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        running.openai().chat.completions.create(model="small", messages=[{"role": "user", "content": "a b " * 400}])
    assert raised.value.code == "context_length_exceeded"
    assert str(CONTEXT_LENGTH) in str(raised.value)


def test_prompt_that_a_worker_cannot_hold_is_refused_with_its_numbers(run_gateway: Callable[..., Any]) -> None:
    """Any worker may get it, so the smallest one counts; and so the completion is cut there."""
    with run_gateway(has_worker=False) as running:
        running.worker.max_context_tokens = 64
        running.worker.start()
        assert running.worker.is_ready.wait(10)
        body = {"model": "small", "messages": [{"role": "user", "content": "a b " * 60}]}
        response = running.post(body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "the context length of this model is 64 tokens" in response.json()["error"]["message"]
        assert running.worker.seen == []
        assert running.post({**BODY, "max_tokens": 60}).json()["error"]["code"] == "context_length_exceeded"
        assert running.post(BODY).status_code == 200
        (request,) = running.worker.seen
        assert len(request.prompt_token_ids) + request.sampling.max_tokens == 64
        models = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [model["max_model_len"] for model in models] == [64]
        running.worker.stop()


def test_huge_prompt_is_refused_fast(running: RunningGateway) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "word " * 800_000}]}
    started_s = time.monotonic()
    response = running.post(body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert time.monotonic() - started_s < 2
