"""Requests that are no request yet: HTTP that is wrong, too long, too slow, or breaks off. By sockets, as no client
would send them."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from typing import BinaryIO

import httpx
import pytest
from conftest import RunningGateway, wait_for
from test_bad_input import USER, error_of

from nibble.service.gateway import http_protocol
from nibble.service.gateway.routes import body as body_module

BODY = json.dumps({"model": "small", "messages": USER}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


def connect(running: RunningGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10)


def read_all(client: socket.socket) -> tuple[int, dict[str, str]]:
    """Status and error, of an answer after which the connection is closed."""
    received = b""
    while part := client.recv(1 << 16):
        received += part
    head, _, content = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    return int(head.split()[1]), json.loads(content)["error"]


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 this is TLS\r\n\r\n",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_answered_in_the_usual_shape(running: RunningGateway, sent: bytes) -> None:
    with connect(running) as client:
        client.sendall(sent)
        status, error = read_all(client)
    assert status == 400
    assert error == {"message": "Invalid HTTP request received.", "type": "invalid_request_error", "param": None} | {
        "code": None
    }


@pytest.mark.parametrize(
    "head", [b"GET /health HTTP/1.1\r\nX: ", b"GET /", b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 99]
)
def test_head_has_a_limit(running: RunningGateway, head: bytes) -> None:
    with connect(running) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")  # the limit is of each head
        client.sendall(head + b"a" * http_protocol.MAX_HEAD_BYTES)
        status, error = read_all(client)
    assert status == 431
    assert "more than 65536 bytes" in error["message"]
    long = httpx.get(f"{running.url}/health", headers={"x": "a" * 30_000})
    assert long.status_code == 200


def test_head_that_never_ends_is_waited_for_a_while(running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.05)
    for sent in (b"", POST):
        with connect(running) as client:
            client.sendall(sent)
            assert client.recv(10) == b""
    with connect(running) as client:  # a whole one has all the time that its answer takes
        running.worker.gate.clear()
        client.sendall(POST + f"Connection: close\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(10)
        running.worker.gate.set()
        client.settimeout(10)
        assert client.recv(12) == b"HTTP/1.1 200"


def test_body_that_never_ends_is_waited_for_a_while(running: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "PART_S", 0.05)
    with connect(running) as client:
        client.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        status, error = read_all(client)
    assert status == 408
    assert error["code"] == "request_timeout"


def test_client_that_leaves_with_its_body_is_no_fault_of_ours(
    running: RunningGateway, caplog: pytest.LogCaptureFixture
) -> None:
    responses = running.gateway.metrics.responses
    faults, aborted = responses[500], responses[499]
    with caplog.at_level(logging.INFO):
        with connect(running) as client:
            client.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        wait_for(lambda: responses[499] > aborted)
    assert responses[500] == faults
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_encoded_body_is_refused_by_name(running: RunningGateway) -> None:
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize"):
        response = httpx.post(running.url + path, content=gzip.compress(BODY), headers=headers)
        assert response.status_code == 400
        assert error_of(response)["param"] == "content-encoding"
    plain = httpx.post(f"{running.url}/v1/chat/completions", content=BODY, headers={"content-encoding": "identity"})
    assert plain.status_code == 200


def test_pipelined_streams_are_answered_in_turn(running: RunningGateway) -> None:
    """Both have the connection; what is written past ASGI must be of the first until that has ended."""
    texts = ["first one of them", "second"]
    requests = [{"model": "small", "stream": True, "messages": [{"role": "user", "content": text}]} for text in texts]
    with connect(running) as client:
        for connection, request in zip(("keep-alive", "close"), requests, strict=True):
            body = json.dumps(request).encode()
            client.sendall(POST + f"Connection: {connection}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        with client.makefile("rb") as received:
            answers = [read_chunked(received) for _ in texts]
            assert received.read() == b""
    for text, answer in zip(texts, answers, strict=True):
        *events, done = (part.partition("data: ")[2] for part in answer.split("\n\n")[:-1])
        assert done == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events) == text


def read_chunked(received: BinaryIO) -> str:
    """The body of the next answer."""
    assert received.readline() == b"HTTP/1.1 200 OK\r\n"
    while received.readline() != b"\r\n":
        pass
    body = b""
    while size := int(received.readline(), 16):
        body += received.read(size)
        assert received.read(2) == b"\r\n"
    assert received.readline() == b"\r\n"
    return body.decode()
