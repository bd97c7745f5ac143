"""Requests that are refused before they are queued: too many of them, nobody to serve them, too long a prompt."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from chat_client import BODY
from conftest import RunningGateway, wait_for
from small_models import CONTEXT_LENGTH

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
