"""Requests that end otherwise than by their last token: failures, deadlines, cancellation, clients that leave."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from chat_client import BODY, events_of
from conftest import RunningGateway, wait_for

from nibble.engine.protocol import GenerationRequest


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
