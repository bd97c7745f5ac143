"""/health, /ready, /version, /docs, /v1/models and request ids."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import RunningGateway

from nibble.service.broker.embedded import EmbeddedValkey

BODY = {"model": "small", "messages": [{"role": "user", "content": "x"}]}


def ready(running: RunningGateway) -> tuple[int, str | None]:
    response = httpx.get(f"{running.url}/ready")
    return response.status_code, response.json().get("reason")


def test_ready_with_a_ready_worker(running: RunningGateway) -> None:
    assert ready(running) == (200, None)
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


def test_not_ready_without_a_worker_and_alive_all_the_same(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False) as running:
        assert ready(running) == (503, "no worker is alive")
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_ready_without_a_worker_where_they_scale_from_zero(run_gateway: Callable[..., Any]) -> None:
    """Nobody would send the request that the first one starts for."""
    with run_gateway(has_worker=False, needs_worker=False) as running:
        assert ready(running) == (200, None)


def test_not_ready_while_the_only_worker_loads(run_gateway: Callable[..., Any]) -> None:
    with run_gateway(has_worker=False) as running:
        running.worker.state = "loading"
        running.worker.start()
        assert running.worker.is_ready.wait(10)
        assert ready(running) == (503, "no worker is ready: loading")
        running.worker.stop()


def test_not_ready_when_the_broker_dies(run_gateway: Callable[..., Any], tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.start()
    with run_gateway(has_worker=False, redis_url=server.url) as running:
        assert ready(running)[1] == "no worker is alive"
        server.stop()
        status, reason = ready(running)
        assert status == 503
        assert (reason or "").startswith("the broker cannot be reached")
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_models(running: RunningGateway) -> None:
    client = running.openai()
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("small", "model", "nibble")
    assert client.models.retrieve("small") == model


def test_version(running: RunningGateway) -> None:
    version = httpx.get(f"{running.url}/version").json()
    assert version["model"] == "small"
    fingerprint = running.post(BODY).json()["system_fingerprint"]
    assert fingerprint == f"nibble-{version['version']}-small-synthetic"


def test_document_describes_the_chat_request(running: RunningGateway) -> None:
    assert httpx.get(f"{running.url}/docs").status_code == 200
    document = httpx.get(f"{running.url}/openapi.json").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert {"messages", "model", "temperature", "stop"} <= set(schema["properties"])
    text = str(document)
    for name in document["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text, f"{name} is referred to"


def test_request_id_is_echoed_or_made(running: RunningGateway) -> None:
    def request_id(**headers: str) -> str:
        return str(httpx.get(f"{running.url}/health", headers=headers).headers["x-request-id"])

    assert request_id(**{"x-request-id": "my-id/7"}) == "my-id/7"
    assert request_id() != request_id()
    assert request_id(**{"x-request-id": "x" * 500}).startswith("req-")
    assert running.post(BODY, **{"x-request-id": "mine"}).headers["x-request-id"] == "mine"
    assert running.post({**BODY, "stream": True}, **{"x-request-id": "mine"}).headers["x-request-id"] == "mine"


@pytest.mark.parametrize("request_line", [b"GARBAGE\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\x16\x03\x01\x02"])
def test_garbage_on_the_port_does_no_harm(running: RunningGateway, request_line: bytes) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(request_line)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert ready(running) == (200, None)
