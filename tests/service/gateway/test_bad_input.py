"""What comes in wrong goes out as an error in OpenAI's shape, with all four keys, and never as a 500."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from conftest import RunningGateway, wait_for

USER = [{"role": "user", "content": "hello"}]


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "small", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "small", "messages": [], "temperature": NaN}',
        b'{"model": "small", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        b"[" * 100_000,
        b'{"model": "small", "messages": [{"role": "user", "content": "x"}],}',
    ],
)
def test_body_that_is_not_a_request(running: RunningGateway, body: bytes) -> None:
    response = httpx.post(f"{running.url}/v1/chat/completions", content=body)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**30}, None),
        ({"max_completion_tokens": "9"}, "max_completion_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": 5}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"service_tier": "royal"}, "service_tier"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"user": "x" * 300}, "user"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_field_at_fault_is_named(running: RunningGateway, fields: dict[str, Any], param: str | None) -> None:
    response = running.post({"model": "small", "messages": USER, **fields})
    assert response.status_code == 400
    error = error_of(response)
    if param is not None:
        assert error["param"] == param
        assert param in error["message"]


def test_value_that_was_sent_is_shown_but_not_all_of_it(running: RunningGateway) -> None:
    message = error_of(running.post({"model": "small", "messages": USER, "temperature": 7}))["message"]
    assert "7" in message
    assert len(error_of(running.post({"model": "x" * 10_000, "messages": USER}))["message"]) < 300


@pytest.mark.parametrize(
    ("header", "value"), [("x-nibble-timeout-ms", v) for v in ("soon", "0", "-5", "1.5", "9" * 30)]
)
def test_timeout_header_is_checked(running: RunningGateway, header: str, value: str) -> None:
    response = running.post({"model": "small", "messages": USER}, **{header: value})
    assert response.status_code == 400
    assert error_of(response)["param"] == header


def test_unknown_model(running: RunningGateway) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        running.openai().chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/nothing", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/models", 405),
    ],
)
def test_unknown_url_and_wrong_method(running: RunningGateway, method: str, path: str, status: int) -> None:
    response = httpx.request(method, running.url + path)
    assert response.status_code == status
    error_of(response)
    if status == 405:
        assert response.headers["allow"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_over_the_limit_is_413(run_gateway: Callable[..., Any], is_chunked: bool) -> None:
    body = json.dumps({"model": "small", "messages": [{"role": "user", "content": "x" * 5000}]}).encode()
    with run_gateway(has_worker=False, max_body_bytes=1000) as running:
        content = iter([body[:2000], body[2000:]]) if is_chunked else body
        response = httpx.post(f"{running.url}/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert "1000" in error_of(response)["message"]
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_bug_is_a_500_in_the_same_shape_and_is_logged(
    run_gateway: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with run_gateway() as running:
        running.gateway.model = None  # what no code expects
        response = running.post({"model": "small", "messages": USER})
        assert response.status_code == 500
        error = error_of(response)
        assert "NoneType" not in error["message"], "details stay in the log"
        wait_for(lambda: any(record.exc_info for record in caplog.records))
        assert running.gateway.metrics.responses[500] == 1
